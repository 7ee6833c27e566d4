"""Nearest neighbours in galleries: one interface, two backends with the same answers.

`TorchIndex` is an exact product in chunks on the tensor's own device; `FaissIndex` is FAISS's flat inner
product index, on the GPU where FAISS was built for it and the gallery lies there. Float32 products of two
libraries differ in their last bits, so whatever they leave undecided is settled in float64, and equals go to
the lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffrep.files import optional_import
from diffrep.similarity import FAISS_FROM, full_precision

Backend: TypeAlias = Literal["auto", "torch", "faiss"]
CHUNK_BYTES = 2**26  # of the similarities that TorchIndex holds at once
_SPARE = 8  # candidates beyond k, among which near equals are settled


@dataclass(frozen=True)
class Neighbours:
    """The k best gallery vectors of each of Q queries, best first; of equals the lower index first.

    Attributes:
        indices: (Q, k) int64, rows of the gallery.
        scores: (Q, k) float32, inner products.
    """

    indices: Tensor
    scores: Tensor


class TorchIndex:
    """A gallery (N, C) that is searched by inner product, the cosine for vectors of unit length.

    The search is exact, by products in chunks of `memory` bytes, on the gallery's device.

    Raises:
        ValueError: the gallery is no matrix, is empty, or has values that are not finite.
    """

    def __init__(self, gallery: Tensor, *, memory: int = CHUNK_BYTES) -> None:
        self.gallery = _matrix(gallery, "gallery")
        self.longest = float(self.gallery.square().sum(1).max().sqrt())  # norm of the longest vector
        self.memory = memory

    def candidates(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(scores, indices) of the k best, both (Q, k), best first, as exact as float32 is."""
        step = max(1, self.memory // (4 * len(self.gallery)))
        best = []
        with full_precision(self.gallery.device):
            for chunk in queries.split(step):
                scores = chunk @ self.gallery.T
                best.append(scores.max(1, keepdim=True) if k == 1 else scores.topk(k, dim=1))
        return torch.cat([values for values, _ in best]), torch.cat([indices for _, indices in best])


class FaissIndex(TorchIndex):
    """The same by FAISS's flat inner product index.

    Raises:
        ImportError: faiss is not installed.
    """

    def __init__(self, gallery: Tensor) -> None:
        super().__init__(gallery)
        faiss = import_faiss()
        self.index: Any = faiss.IndexFlatIP(self.gallery.shape[1])
        if self.gallery.is_cuda and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
            self._resources = faiss.StandardGpuResources()  # has to live as long as the index
            device = self.gallery.device.index or 0
            self.index = faiss.index_cpu_to_gpu(self._resources, device, self.index)
        self.index.add(self.gallery.cpu().numpy())

    def candidates(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `TorchIndex.candidates`."""
        scores, indices = self.index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(scores).to(queries.device), torch.from_numpy(indices).to(queries.device)


def build_index(gallery: Tensor, backend: Backend = "auto") -> TorchIndex:
    """Make an index of (N, C) gallery vectors; ``auto`` takes FAISS from 50,000 vectors on.

    Raises:
        ValueError: the gallery is no matrix, is empty, has values that are not finite, or the backend is
            unknown.
        ImportError: ``faiss`` was asked for and is not installed.
    """
    if backend == "auto":
        backend = "faiss" if len(gallery) >= FAISS_FROM else "torch"
    if backend not in ("torch", "faiss"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'faiss', got {backend!r}")
    return FaissIndex(gallery) if backend == "faiss" else TorchIndex(gallery)


@torch.no_grad()
def search(index: TorchIndex, queries: Tensor, k: int = 1) -> Neighbours:
    """Find the k gallery vectors with the largest inner product for each of (Q, C) queries.

    Raises:
        ValueError: the queries are no finite matrix of the gallery's channels, or k is not in 1..N.
    """
    queries, gallery = _matrix(queries, "queries").to(index.gallery.device), index.gallery
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} channels, the gallery {gallery.shape[1]}")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k must be in 1..{len(gallery)}, the size of the gallery, got {k}")
    scores, indices = index.candidates(queries, min(k + _SPARE, len(gallery)))
    # two float32 sums of C products differ by less than this, in practice by far
    slack = queries.square().sum(1).sqrt() * index.longest * (16 * torch.finfo(torch.float32).eps)
    near = scores[:, :-1] - scores[:, 1:] < slack[:, None]
    for row in near[:, :k].any(1).nonzero()[:, 0].tolist():
        among = indices[row]
        if len(among) < len(gallery) and scores[row, k - 1] - scores[row, -1] < slack[row]:
            with full_precision(gallery.device):
                among = (gallery @ queries[row] >= scores[row, k - 1] - slack[row]).nonzero()[:, 0]
        among = among.sort().values
        exact = (gallery[among].double() * queries[row].double()).sum(1).float()
        order = exact.argsort(descending=True, stable=True)[:k]
        scores[row, :k], indices[row, :k] = exact[order], among[order]
    return Neighbours(indices[:, :k].contiguous(), scores[:, :k].contiguous())


def nearest(queries: Tensor, gallery: Tensor, k: int = 1, *, backend: Backend = "auto") -> Neighbours:
    """`search` in a gallery that is used once."""
    return search(build_index(gallery, backend), queries, k)


def _matrix(vectors: Tensor, name: str) -> Tensor:
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(f"{name} must be a matrix (N, C) with at least one row, got {tuple(vectors.shape)}")
    vectors = vectors.detach().float().contiguous()
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError(f"{name} has NaN or infinite values")
    return vectors


def import_faiss() -> Any:
    """FAISS, where it is needed.

    Raises:
        ImportError: it is not installed.
    """
    message = "backend='faiss' needs faiss: pip install faiss-cpu, or use backend='torch' (on disk: kind 'flat')"
    with optional_import(message):
        import faiss
    return faiss
