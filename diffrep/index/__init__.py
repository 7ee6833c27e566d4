"""Nearest neighbours: exact in memory (`build_index`, `search`), and of whole stores on disk (`index_store`)."""

from diffrep.index.building import IndexConfig, index_store
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
from diffrep.index.kinds import IndexKind, choose_kind
from diffrep.index.query import Hit, query_image
from diffrep.index.stored import StoredIndex, open_index

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
    "index_store",
    "nearest",
    "open_index",
    "query_image",
    "search",
]
