"""Linear probes for a whole grid of learning rates and weight decays, trained together over one read of the features.

All heads see the same mini-batches; their weights are one tensor (G, K, D). This is how DINOv2 evaluates (arXiv
2304.07193, its linear evaluation: momentum 0.9, cosine to zero, the best head chosen on val), here on features that
are brought to mean 0 and variance 1 / D per channel: the raw channels of a U-Net differ by orders of magnitude from
block to block, and with vectors of length about 1 the same learning rates suit every width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.heads.probes.recipe import check_settings
from diffrep.heads.probes.rows import HELD_BYTES, FeatureRows, HeldRows, blocks_of

RowNumbers = "np.ndarray[Any, np.dtype[np.int64]]"


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """The grid, and how its heads are trained."""

    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)  # of SGD, on vectors of length about 1
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-3)  # of the weights, not of the biases
    epochs: int = 20
    batch_size: int = 256
    momentum: float = 0.9
    balanced: bool = False  # weigh classes by the inverse of their frequency
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("learning_rates", "epochs", "batch_size"),
            not_negative=("weight_decays", "momentum", "seed"),
        )

    def heads(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each head."""
        return list(itertools.product(self.learning_rates, self.weight_decays))


@dataclass(frozen=True)
class Standardiser:
    """x -> (x - mean) / (std sqrt(D)), from the statistics of the training rows.

    Attributes:
        mean, scale: (D,) float32.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: FeatureRows, rows: Sequence[int] | np.ndarray[Any, Any]) -> Standardiser:
        """Measure some rows in one pass, in float64."""
        total = torch.zeros(features.width, dtype=torch.float64)
        squares = torch.zeros_like(total)
        shift: Tensor | None = None  # of the first row: keeps the difference of squares exact
        for block in blocks_of(np.sort(np.asarray(rows, dtype=np.int64)), features.width):
            values = features.read(block).double()
            shift = values[0].clone() if shift is None else shift
            values -= shift
            total += values.sum(0)
            squares += values.square().sum(0)
        assert shift is not None  # there is at least one row
        mean = total / len(rows)
        variance = (squares / len(rows) - mean.square()).clamp(min=0)
        # a channel that never changes says nothing: it is left at 0
        spread = torch.where(variance > 1e-12, variance.sqrt(), torch.inf)
        return cls((mean + shift).float(), (1 / (spread * math.sqrt(features.width))).float())

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


@dataclass(frozen=True)
class LinearGrid:
    """Trained heads.

    Attributes:
        weights: (G, K, D), for standardised features. biases: (G, K).
        heads: (learning rate, weight decay) of each.
    """

    weights: Tensor
    biases: Tensor
    standardise: Standardiser
    heads: list[tuple[float, float]]

    def logits(self, features: FeatureRows, rows: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """(G, n, K) of some rows, in the order given."""
        out = [torch.empty(len(self.heads), 0, self.biases.shape[1])]
        for block in blocks_of(np.asarray(rows, dtype=np.int64), features.width):
            x = self.standardise(features.read(block))
            out.append(torch.einsum("nd,gkd->gnk", x, self.weights) + self.biases[:, None])
        return torch.cat(out, dim=1)

    def accuracies(self, features: FeatureRows, labels: Tensor, rows: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """(G,) share of some rows that each head has right; read block by block."""
        right = torch.zeros(len(self.heads))
        for block in blocks_of(np.asarray(rows, dtype=np.int64), features.width):
            answers = self.logits(features, block).argmax(2)
            right += (answers == labels[torch.from_numpy(block)]).sum(1)
        return right / len(rows)

    def linear(self, head: int) -> tuple[Tensor, Tensor]:
        """Weight (K, D) and bias (K,) of one head for features as they are read, the standardisation folded in."""
        weight = self.weights[head] * self.standardise.scale
        return weight, self.biases[head] - weight @ self.standardise.mean


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """(K,) inverse frequencies with mean 1 over the examples."""
    counts = torch.bincount(labels, minlength=classes).float()
    return torch.where(counts > 0, len(labels) / (counts.clamp(min=1) * (counts > 0).sum()), 0.0)


def fit_grid(
    features: FeatureRows,
    labels: Tensor,
    rows: Sequence[int] | np.ndarray[Any, Any],
    classes: int,
    settings: GridSettings | None = None,
) -> LinearGrid:
    """Train all heads of a grid on some rows.

    Each epoch is one run through the rows in blocks of random order, shuffled inside; memory does not grow with
    their number. Heads start at zero, so the seed decides the order of the examples only.

    Args:
        labels: (N,) of all rows of `features`.
    """
    settings = settings or GridSettings()
    chosen = np.sort(np.asarray(rows, dtype=np.int64))
    standardise = Standardiser.of(features, chosen)
    heads, width = settings.heads(), features.width
    if 4 * len(chosen) * width <= HELD_BYTES:
        held = HeldRows(standardise(features.read(chosen)))
        features, labels, standardised = held, labels[torch.from_numpy(chosen)], True
        chosen = np.arange(len(chosen))
    else:
        standardised = False
    weights = torch.zeros(len(heads), classes, width)
    biases = torch.zeros(len(heads), classes)
    velocity = torch.zeros_like(weights), torch.zeros_like(biases)
    rates, decays = (torch.tensor(values)[:, None, None] for values in zip(*heads, strict=True))
    emphasis = class_weights(labels[torch.from_numpy(chosen)], classes) if settings.balanced else None
    steps = settings.epochs * math.ceil(len(chosen) / settings.batch_size)
    step = 0
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch])
        for x, y in _batches(features, labels, chosen, settings.batch_size, order):
            x = x if standardised else standardise(x)
            logits = torch.einsum("nd,gkd->gnk", x, weights) + biases[:, None]
            gradient = logits.softmax(2)
            gradient[:, torch.arange(len(y)), y] -= 1
            if emphasis is not None:
                share = emphasis[y]
                gradient *= (share / share.sum())[None, :, None]
            else:
                gradient /= len(y)
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            velocity[0].mul_(settings.momentum).add_(torch.einsum("gnk,nd->gkd", gradient, x) + decays * weights)
            velocity[1].mul_(settings.momentum).add_(gradient.sum(1))
            weights -= cosine * rates * velocity[0]
            biases -= cosine * rates[:, 0] * velocity[1]
            step += 1
    return LinearGrid(weights, biases, standardise, heads)


def _batches(features: FeatureRows, labels: Tensor, rows: Any, size: int, order: np.random.Generator) -> Any:
    """Mini-batches of one epoch; what a block leaves over goes into the next one's first."""
    left: tuple[Tensor, Tensor] | None = None
    for block in blocks_of(rows, features.width, generator=order):
        shuffled = order.permutation(block)
        y = labels[torch.from_numpy(shuffled)]
        # sorted reading is a run through the file; the shuffle happens in memory
        where = np.argsort(shuffled)
        x = torch.empty(len(block), features.width)
        x[torch.from_numpy(where)] = features.read(shuffled[where])
        if left is not None:
            x, y = torch.cat([left[0], x]), torch.cat([left[1], y])
        whole = len(y) - len(y) % size
        for start in range(0, whole, size):
            yield x[start : start + size], y[start : start + size]
        left = (x[whole:].clone(), y[whole:].clone()) if whole < len(y) else None
    if left is not None:
        yield left


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(G,) mean cross-entropy of (G, n, K) logits."""
    return torch.stack([F.cross_entropy(one, labels) for one in logits])
