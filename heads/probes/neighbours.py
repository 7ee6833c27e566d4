"""Weighted k-NN on features, as DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193) evaluate them.

Features are brought to unit length; each of the k nearest training features votes for its class with the weight
exp(cosine / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.index import Backend, Neighbours, build_index, search

TEMPERATURE = 0.07


class NearestNeighbours:
    """A gallery of labelled features that votes.

    Args:
        features: (N, D), of any length but zero.
        labels: (N,) int64, 0..classes - 1.
        backend: see `diffrep.index.build_index`; "faiss" is FAISS's flat index.

    Raises:
        ValueError: features and labels differ in number.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        *,
        temperature: float = TEMPERATURE,
        backend: Backend = "faiss",
    ) -> None:
        if len(features) != len(labels):
            raise ValueError(f"{len(features)} features but {len(labels)} labels")
        self.labels, self.classes, self.temperature = labels, classes, temperature
        self.index = build_index(F.normalize(features.float(), dim=1), backend)

    def neighbours(self, features: Tensor, k: int, *, batch_size: int = 4096) -> Neighbours:
        """The nearest training features by cosine of (Q, D) features; k is limited to their number."""
        k = min(k, len(self.labels))
        parts = [search(self.index, F.normalize(chunk.float(), dim=1), k) for chunk in features.split(batch_size)]
        return Neighbours(torch.cat([n.indices for n in parts]), torch.cat([n.scores for n in parts]))

    def votes(self, features: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
        """Votes (Q, K) for each k, from one search.

        The weights are the softmax over the neighbours of the largest k, of which the first k are summed, as DINOv2
        has it: for smaller k they do not sum to 1. Their order is that of DINO's unnormalised sums.
        """
        return self.votes_of(self.neighbours(features, max(ks)), ks)

    def votes_of(self, neighbours: Neighbours, ks: Sequence[int]) -> dict[int, Tensor]:
        """`votes` of neighbours that have been found already."""
        weights = (neighbours.scores / self.temperature).softmax(1)
        classes = self.labels[neighbours.indices]
        return {k: torch.zeros(len(weights), self.classes).scatter_add_(1, classes[:, :k], weights[:, :k]) for k in ks}


def top_accuracy(scores: Tensor, labels: Tensor, n: int, *, voted_only: bool = False) -> float:
    """Share of rows whose label is among the n highest scores; with fewer than n classes, among all of them.

    Args:
        scores: (Q, K). labels: (Q,).
        voted_only: a class with the score 0 counts as wrong, for k-NN with few neighbours, where the order of the
            classes without votes means nothing.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : min(n, scores.shape[1])]
    right = order == labels[:, None]
    if voted_only:
        right &= scores.gather(1, order) > 0
    return right.any(1).float().mean().item()
