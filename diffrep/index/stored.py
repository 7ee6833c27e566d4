"""An index of stores, on disk: FAISS finds candidates, their original vectors decide. Both are memory-mapped.

All kinds are searched with vectors of unit length, where the order by Euclidean distance, which a centred projection
keeps as far as it can, is the order by cosine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffrep.files import one_line, read_document
from diffrep.index.exact import FaissIndex, Neighbours, TorchIndex, build_index, import_faiss, search
from diffrep.store import Store

FORMAT, VERSION = "diffrep-index", 1
DESCRIPTION, VECTORS, PLACES, CODES = "index.json", "vectors.safetensors", "places.safetensors", "codes.faiss"

IndexKind: TypeAlias = Literal["flat", "hnsw", "ivf", "ivf-pq"]
Level: TypeAlias = Literal["image", "patch"]

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
        factory: the description for FAISS's `index_factory`; empty for flat.
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


@dataclass(frozen=True)
class Place:
    """Where a vector comes from.

    Attributes:
        image: name, relative to `root`.
        root: folder of the collection.
        point: (x, y) in pixels of the image; None for whole images.
    """

    image: str
    root: Path
    point: tuple[float, float] | None


class StoredIndex:
    """The vectors of one tap of one or more stores.

    Args:
        folder: written by `index_store`.

    Raises:
        ValueError: the folder holds no index, or a damaged one; the message names the file.

    Attributes:
        tap, level: which vectors; level ``image`` has one per image, ``patch`` one per place.
        features: provenance that all of them share.
        design: kind of index, why, and its settings.
        vectors: (N, C) float16, of unit length, memory-mapped.
        collections: root, number of images and shards of each store; names are memory-mapped too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / DESCRIPTION
        if not file.is_file():
            raise ValueError(f"{self.folder}: is no index (it has no {DESCRIPTION}); `diffrep index` makes one")
        values = read_document(file)
        try:
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{DESCRIPTION} is not of format {FORMAT!r}, version {VERSION}")
            self.tap: str = values["tap"]
            self.level: Level = values["level"]
            self.features: Mapping[str, Any] = values["features"]
            self.design = Design(**values["design"])
            self.collections: list[dict[str, Any]] = values["collections"]
            with safe_open(self.folder / VECTORS, "pt") as opened:
                self.vectors = opened.get_tensor("vectors")
            with safe_open(self.folder / PLACES, "pt") as opened:
                self._images = opened.get_tensor("images")
                self._names, self._ends = opened.get_tensor("names"), opened.get_tensor("ends")
                self._points = opened.get_tensor("points") if self.level == "patch" else None
            self._check()
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise self._damaged(one_line(error)) from None

    def _check(self) -> None:
        """Refuse files that do not belong together.

        Raises:
            ValueError: saying which do not.
        """
        count = len(self.vectors)
        if not (isinstance(self.tap, str) and self.level in ("image", "patch") and isinstance(self.features, Mapping)):
            raise ValueError(f"{DESCRIPTION} must name a tap, a level and features")
        if self.design.kind not in ("flat", "hnsw", "ivf", "ivf-pq") or not all(
            type(number) is int for number in (self.design.lists, self.design.probes, self.design.rescore)
        ):
            raise ValueError(f"{DESCRIPTION} has no design that is known")
        if not all(type(c["images"]) is int and isinstance(c["root"], str) for c in self.collections):
            raise ValueError(f"{DESCRIPTION} must have a root and a number of images for each collection")
        if self.vectors.ndim != 2 or not self.vectors.is_floating_point() or 0 in self.vectors.shape:
            raise ValueError(f"{VECTORS} must hold a matrix, got {tuple(self.vectors.shape)}")
        if self._images.shape != (count,) or self._images.is_floating_point() or self._ends.ndim != 1:
            raise ValueError(f"{PLACES} must name an image for each of the {count:,} vectors")
        if self._points is not None and self._points.shape != (count, 2):
            raise ValueError(f"{PLACES} must hold a point for each of the {count:,} vectors")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.folder}: the index is damaged ({reason}); `diffrep index` makes it again")

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return (
            f"StoredIndex({str(self.folder)!r}, {len(self):,} vectors of {self.tap}, {self.level}, {self.design.kind})"
        )

    def holds(self, stores: Sequence[Store]) -> bool:
        """Whether the index was made of just these stores, as they are now."""
        return [collection.get("shards") for collection in self.collections] == [shard_names(store) for store in stores]

    def search(self, queries: Tensor, k: int = 10, *, rescore: bool = True) -> Neighbours:
        """The k nearest vectors of each of (Q, C) queries by cosine, best first.

        Args:
            rescore: compare the original vectors of the candidates; without, the codes alone decide, and scores
                are those of the codes.

        Raises:
            ValueError: the queries have other channels, or k is not in 1..N.
        """
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries must be (Q, {self.vectors.shape[1]}), got {tuple(queries.shape)}")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be in 1..{len(self)}, the size of the index, got {k}")
        queries = F.normalize(queries.float().cpu(), dim=1)
        if self.design.kind == "flat":
            return search(self._exact, queries, k)
        wanted = min(len(self), max(k, self.design.rescore) if rescore else k)
        distances, rows = self._codes.search(queries.numpy(), wanted)
        indices, scores = torch.from_numpy(rows), 1 - torch.from_numpy(distances) / 2  # of unit vectors
        if int(indices.max()) >= len(self):
            raise self._damaged(f"{CODES} knows vectors that {VECTORS} does not hold")
        if rescore:
            originals = self.vectors[indices.clamp(min=0).reshape(-1)].float()
            scores = torch.bmm(originals.view(*indices.shape, -1), queries[:, :, None])[..., 0]
        scores = scores.masked_fill(indices < 0, -torch.inf)  # the lists looked into held fewer than asked for
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        return Neighbours(indices.gather(1, order), scores.gather(1, order))

    def place(self, vector: int) -> Place:
        """Where a vector comes from.

        Raises:
            ValueError: the index does not know, it is damaged.
        """
        number = int(self._images[vector])
        point = None if self._points is None else tuple(self._points[vector].tolist())
        rest = number
        for collection in self.collections:
            if 0 <= rest < collection["images"] and number < len(self._ends):
                start, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
                try:
                    name = bytes(self._names[start:end].tolist()).decode("utf-8", "surrogatepass")
                except (UnicodeDecodeError, ValueError) as error:
                    raise self._damaged(one_line(error)) from None
                return Place(name, Path(collection["root"]), point)
            rest -= collection["images"]
        raise self._damaged(f"{PLACES} names image {number}, which no collection holds")

    def image_of(self, vectors: Tensor) -> Tensor:
        """The number of the image of each vector, counted over all stores."""
        return self._images[vectors]

    @cached_property
    def _exact(self) -> TorchIndex | FaissIndex:
        try:
            return build_index(F.normalize(self.vectors.float(), dim=1))
        except ValueError as error:  # values that are not finite
            raise self._damaged(one_line(error)) from None

    @cached_property
    def _codes(self) -> Any:
        faiss = import_faiss()
        file = self.folder / CODES
        try:
            graph = self.design.kind == "hnsw"  # FAISS maps graphs and inverted lists by different readers
            codes = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if graph else faiss.IO_FLAG_MMAP)
            if (codes.ntotal, codes.d) != tuple(self.vectors.shape):
                raise RuntimeError(f"it holds {codes.ntotal:,} vectors of {codes.d} channels")
            set_probes(codes, self.design)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise ValueError(f"{file}: is damaged ({reason}); `diffrep index` makes it again") from None
        return codes


def shard_names(store: Store) -> list[str]:
    """The shards of a store, which are named after their contents: what an index was made of."""
    return [shard.name for shard in store.manifest.shards]


def set_probes(codes: Any, design: Design) -> None:
    """Set how far a FAISS index looks."""
    parameter = "efSearch" if design.kind == "hnsw" else "nprobe"
    import_faiss().ParameterSpace().set_index_parameter(codes, parameter, design.probes)


def open_index(folder: str | Path) -> StoredIndex:
    """Open an index that `index_store` wrote.

    Raises:
        ValueError: the folder holds none, or a damaged one.
    """
    return StoredIndex(folder)
