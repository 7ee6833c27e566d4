"""Nearest neighbours: exact in memory (`build_index`, `search`), and of whole stores on disk (`index_store`).

What works on stores is imported when it is first used: matching needs the exact product alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from diffrep.index.exact import (
    FAISS_FROM,
    Backend,
    FaissIndex,
    Index,
    Neighbours,
    TorchIndex,
    build_index,
    nearest,
    search,
)

if TYPE_CHECKING:
    from diffrep.index.building import IndexConfig, index_store
    from diffrep.index.query import Hit, contact_sheet, query_image, search_folder
    from diffrep.index.stored import IndexKind, StoredIndex, choose_kind, open_index

_HOME = {  # public name -> module that defines it
    "Hit": "query",
    "IndexConfig": "building",
    "IndexKind": "stored",
    "StoredIndex": "stored",
    "choose_kind": "stored",
    "contact_sheet": "query",
    "index_store": "building",
    "open_index": "stored",
    "query_image": "query",
    "search_folder": "query",
}

__all__ = [
    "FAISS_FROM",
    "Backend",
    "FaissIndex",
    "Hit",
    "Index",
    "IndexConfig",
    "IndexKind",
    "Neighbours",
    "StoredIndex",
    "TorchIndex",
    "build_index",
    "choose_kind",
    "contact_sheet",
    "index_store",
    "nearest",
    "open_index",
    "query_image",
    "search",
    "search_folder",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"diffrep.index.{_HOME[name]}"), name)
    raise AttributeError(f"module 'diffrep.index' has no attribute {name!r}")
