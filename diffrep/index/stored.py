"""An index of stores, on disk: FAISS finds candidates, their original vectors decide. Both are memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffrep.index.exact import FaissIndex, Neighbours, TorchIndex, build_index, import_faiss, search
from diffrep.index.kinds import Design

FORMAT, VERSION = "diffrep-index", 1
DESCRIPTION, VECTORS, PLACES, CODES = "index.json", "vectors.safetensors", "places.safetensors", "codes.faiss"


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
        collections: root and number of images of each store; names are memory-mapped too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / DESCRIPTION
        if not file.is_file():
            raise ValueError(f"{self.folder}: is no index (it has no {DESCRIPTION}); `diffrep index` makes one")
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"is not of format {FORMAT!r}, version {VERSION}")
            self.tap: str = values["tap"]
            self.level: Literal["image", "patch"] = values["level"]
            self.features: Mapping[str, Any] = values["features"]
            self.design = Design(**values["design"])
            self.collections: list[dict[str, Any]] = values["collections"]
            with safe_open(self.folder / VECTORS, "pt") as opened:
                self.vectors = opened.get_tensor("vectors")
            with safe_open(self.folder / PLACES, "pt") as opened:
                self._images = opened.get_tensor("images")
                self._names, self._ends = opened.get_tensor("names"), opened.get_tensor("ends")
                self._points = opened.get_tensor("points") if self.level == "patch" else None
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder}: the index is damaged ({error}); `diffrep index` makes it again") from None

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return (
            f"StoredIndex({str(self.folder)!r}, {len(self):,} vectors of {self.tap}, {self.level}, {self.design.kind})"
        )

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
        distances, found = self._codes.search(queries.numpy(), wanted)
        indices, scores = torch.from_numpy(found), 1 - torch.from_numpy(distances) / 2  # of unit vectors
        if rescore:
            originals = self.vectors[indices.clamp(min=0).reshape(-1)].float()
            scores = torch.bmm(originals.view(*indices.shape, -1), queries[:, :, None])[..., 0]
        scores = scores.masked_fill(indices < 0, -torch.inf)  # fewer were found than asked for
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        return Neighbours(indices.gather(1, order), scores.gather(1, order))

    def place(self, vector: int) -> Place:
        """Where a vector comes from."""
        number = int(self._images[vector])
        start = int(self._ends[number - 1]) if number else 0
        name = bytes(self._names[start : int(self._ends[number])].tolist()).decode()
        for collection in self.collections:
            if number < collection["images"]:
                break
            number -= collection["images"]
        point = None if self._points is None else tuple(self._points[vector].tolist())
        return Place(name, Path(collection["root"]), point)

    def image_of(self, vectors: Tensor) -> Tensor:
        """The number of the image of each vector, counted over all stores."""
        return self._images[vectors]

    @cached_property
    def _exact(self) -> TorchIndex | FaissIndex:
        return build_index(F.normalize(self.vectors.float(), dim=1))

    @cached_property
    def _codes(self) -> Any:
        faiss = import_faiss()
        file = self.folder / CODES
        try:
            graph = self.design.kind == "hnsw"  # FAISS maps graphs and inverted lists by different readers
            codes = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if graph else faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise ValueError(f"{file}: is damaged ({reason}); `diffrep index` makes it again") from None
        set_probes(codes, self.design)
        return codes


def set_probes(codes: Any, design: Design) -> None:
    """Tell a FAISS index how far to look."""
    parameter = "efSearch" if design.kind == "hnsw" else "nprobe"
    import_faiss().ParameterSpace().set_index_parameter(codes, parameter, design.probes)


def open_index(folder: str | Path) -> StoredIndex:
    """Open an index that `index_store` wrote.

    Raises:
        ValueError: the folder holds none, or a damaged one.
    """
    return StoredIndex(folder)
