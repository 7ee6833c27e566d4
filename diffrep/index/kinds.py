"""Which kind of index for how many vectors, and how FAISS is to build it.

All are searched with vectors of unit length, where the order by Euclidean distance, which a centred projection
keeps as far as it can, is the order by cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

IndexKind: TypeAlias = Literal["flat", "hnsw", "ivf", "ivf-pq"]

EXACT_TO = 100_000  # vectors: up to here an exact product answers within some milliseconds
EIGHT_BIT_TO = 20_000_000  # up to here 8 bits of 128 components, some 140 bytes a vector, fit into memory
_PROJECTED = 128  # components that 8-bit codes keep
_SUBSPACES = 64  # of product quantisation, 4 bits each


@dataclass(frozen=True)
class Design:
    """How one index is built.

    Attributes:
        kind: flat: exact; hnsw: a graph; ivf: lists with 8-bit codes of principal components; ivf-pq: lists with
            4-bit product codes after an optimised rotation (OPQ).
        reason: why this kind, in words.
        factory: what FAISS's `index_factory` is told; empty for flat.
        lists: inverted lists, 0 without.
        probes: lists that a query looks into.
        rescore: candidates whose original vectors are compared.
    """

    kind: IndexKind
    reason: str
    factory: str
    lists: int
    probes: int
    rescore: int


def choose_kind(count: int, channels: int, kind: IndexKind | None = None) -> Design:
    """The design for (count, channels) vectors; `kind` overrides the choice by size.

    >>> choose_kind(1_000_000, 768).factory
    'PCA128,IVF2048,SQ8'

    Raises:
        ValueError: there is no such kind, or there are too few vectors to train it.
    """
    if kind is not None:
        reason = f"{kind} was asked for"
    elif count <= EXACT_TO:
        kind = "flat"
        reason = f"{count:,} vectors are no more than {EXACT_TO:,}: the exact product is fast enough and misses nothing"
    elif count <= EIGHT_BIT_TO:
        kind = "ivf"
        reason = (
            f"more than {EXACT_TO:,} vectors: 8-bit codes are quick to build and fit into memory up to {EIGHT_BIT_TO:,}"
        )
    else:
        kind = "ivf-pq"
        reason = f"more than {EIGHT_BIT_TO:,} vectors: product codes need the least memory"
    lists = min(2 ** round(math.log2(2 * math.sqrt(max(count, 1)))), max(1, count // 40))
    probes = min(lists, 8)
    if kind == "flat":
        return Design(kind, reason, "", 0, 0, 0)
    if kind == "hnsw":
        return Design(kind, reason, "HNSW32,Flat", 0, 64, 10)
    if count < 1000:
        raise ValueError(
            f"an index of kind {kind!r} is trained on at least 1,000 vectors, there are {count:,}: use 'flat'"
        )
    if kind == "ivf":
        projection = f"PCA{_PROJECTED}," if channels > _PROJECTED else ""
        return Design(kind, reason, f"{projection}IVF{lists},SQ8", lists, probes, 20)
    if kind == "ivf-pq":
        subspaces = next(m for m in (_SUBSPACES, 32, 16, 8, 4, 2, 1) if channels >= 2 * m or m == 1)
        rotated = min(channels // subspaces, 4) * subspaces
        return Design(kind, reason, f"OPQ{subspaces}_{rotated},IVF{lists},PQ{subspaces}x4fs", lists, probes, 50)
    raise ValueError(f"kind must be 'flat', 'hnsw', 'ivf' or 'ivf-pq', got {kind!r}")
