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
    Neighbours,
    TorchIndex,
    build_index,
    nearest,
    search,
)

if TYPE_CHECKING:
    from diffrep.index.query import Hit, contact_sheet, query_image, search_folder
    from diffrep.index.stored import IndexConfig, IndexKind, StoredIndex, choose_kind, index_store, open_index

_QUERY = {"Hit", "contact_sheet", "query_image", "search_folder"}  # the others are in `stored`

__all__ = [
    "FAISS_FROM",
    "Backend",
    "FaissIndex",
    "Hit",
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
    if name not in __all__:
        raise AttributeError(f"module 'diffrep.index' has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffrep.index.{'query' if name in _QUERY else 'stored'}"), name)
