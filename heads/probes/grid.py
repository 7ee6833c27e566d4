"""Features that need not fit into memory, and linear probes for a whole grid of settings trained over one read of them.

All heads see the same mini-batches; their weights are one tensor (G, K, D). This is how DINOv2 evaluates (arXiv
2304.07193, its linear evaluation: momentum 0.9, cosine to zero, the best head chosen on val), here on features that
are brought to mean 0 and variance 1 / D per channel: the raw channels of a U-Net differ by orders of magnitude from
block to block, and with vectors of length about 1 the same learning rates suit every width.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffrep.settings import NOT_NEGATIVE, POSITIVE, check

Matrix: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
RowNumbers: TypeAlias = "Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]"

SEED = "[0, 2^32)"  # what numpy's generators take
BLOCK_BYTES = 2**27  # of float32 that are in memory at once
HELD_BYTES = 2**30  # a matrix that is smaller is read once and held
_TYPES = {"F16": np.float16, "F32": np.float32}


class FeatureRows:
    """N rows of D numbers, in matrices that may be memory-mapped.

    Args:
        columns: each a list of matrices (n, d) of one width that continue each other; several columns, of the same
            rows, stand side by side: features of several cells, fused.
    """

    def __init__(self, *columns: Sequence[Matrix]) -> None:
        lengths = {sum(map(len, pieces)) for pieces in columns}
        if len(lengths) != 1 or any(len({piece.shape[1] for piece in pieces}) != 1 for pieces in columns):
            shapes = [[piece.shape for piece in pieces] for pieces in columns]
            raise ValueError(f"a column is matrices of one width, columns have the same rows, got {shapes}")
        self.columns = columns
        self.width = sum(int(pieces[0].shape[1]) for pieces in columns)
        (self._length,) = lengths

    @classmethod
    def held(cls, values: Tensor) -> FeatureRows:
        """Rows (N, D) in memory."""
        return cls([values.float().numpy()])

    @classmethod
    def side_by_side(cls, parts: Sequence[FeatureRows]) -> FeatureRows:
        """The columns of several."""
        return cls(*(pieces for part in parts for pieces in part.columns))

    def __len__(self) -> int:
        return self._length

    def read(self, rows: RowNumbers) -> Tensor:
        """Some rows, (n, D) float32, in the order given."""
        wanted, left = np.asarray(rows, dtype=np.int64), 0
        out = np.empty((len(wanted), self.width), dtype=np.float32)
        for pieces in self.columns:
            right = left + pieces[0].shape[1]
            starts = np.cumsum([0, *map(len, pieces)])
            owner = np.searchsorted(starts, wanted, side="right") - 1
            for piece in np.unique(owner):
                here = owner == piece
                out[here, left:right] = pieces[piece][wanted[here] - starts[piece]]
            left = right
        return torch.from_numpy(out)


def map_tensor(file: Path, name: str) -> Matrix:
    """A matrix of a safetensors file, memory-mapped, read only.

    Raises:
        ValueError: the file is damaged, or has no such matrix.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            about = json.loads(opened.read(length))[name]
        start, end = about["data_offsets"]
        if file.stat().st_size < 8 + length + end:
            raise ValueError("it is truncated")
        return np.memmap(file, _TYPES[about["dtype"]], "r", 8 + length + start, tuple(about["shape"]))
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{file}: no matrix {name!r} can be read ({error}); delete it to have it made again") from None


def blocks_of(rows: RowNumbers, width: int, *, generator: np.random.Generator | None = None) -> Iterator[Any]:
    """Sorted rows in blocks that fit into `BLOCK_BYTES`; with a generator the blocks come in random order.

    Neighbours on disk stay together, so that a block is one run through a part of the file; rows are to be shuffled
    inside a block.
    """
    rows, size = np.asarray(rows, dtype=np.int64), max(1, BLOCK_BYTES // (4 * width))
    starts = np.arange(0, len(rows), size)
    for start in starts if generator is None else generator.permutation(starts):
        yield rows[start : start + size]


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
        check(self, learning_rates=POSITIVE, epochs=POSITIVE, batch_size=POSITIVE, seed=SEED)
        check(self, weight_decays=NOT_NEGATIVE, momentum=NOT_NEGATIVE)

    def heads(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each head."""
        return list(itertools.product(self.learning_rates, self.weight_decays))


def moments(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (D,) float64, over the rows of blocks (n, D), in one pass.

    A channel that never changes says nothing: its deviation is infinite, so that dividing leaves it at 0.
    """
    count, shift, total, squares = 0, torch.empty(0), torch.zeros(()), torch.zeros(())
    for block in blocks:
        values = block.double()
        shift = shift if count else values[0].clone()  # the first row: keeps the difference of squares exact
        values -= shift
        count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return mean + shift, torch.where(variance > 1e-12, variance.sqrt(), torch.inf)


@dataclass(frozen=True)
class Standardiser:
    """x -> (x - mean) / (std sqrt(D)), from the statistics of the training rows.

    Attributes:
        mean, scale: (D,) float32.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: FeatureRows, rows: RowNumbers) -> Standardiser:
        """Measure some rows."""
        mean, spread = moments(features.read(block) for block in blocks_of(np.sort(rows), features.width))
        return cls(mean.float(), (1 / (spread * math.sqrt(features.width))).float())

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

    def logits(self, features: FeatureRows, rows: RowNumbers) -> Tensor:
        """(G, n, K) of some rows, in the order given."""
        out = [torch.empty(len(self.heads), 0, self.biases.shape[1])]
        for block in blocks_of(rows, features.width):
            x = self.standardise(features.read(block))
            out.append(torch.einsum("nd,gkd->gnk", x, self.weights) + self.biases[:, None])
        return torch.cat(out, dim=1)

    def accuracies(self, features: FeatureRows, labels: Tensor, rows: RowNumbers) -> Tensor:
        """(G,) share of some rows that each head has right; read block by block."""
        right = torch.zeros(len(self.heads))
        for block in blocks_of(rows, features.width):
            right += (self.logits(features, block).argmax(2) == labels[torch.from_numpy(block)]).sum(1)
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
    features: FeatureRows, labels: Tensor, rows: RowNumbers, classes: int, settings: GridSettings | None = None
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
    held = 4 * len(chosen) * width <= HELD_BYTES
    if held:
        features, labels = FeatureRows.held(standardise(features.read(chosen))), labels[torch.from_numpy(chosen)]
        chosen = np.arange(len(chosen))
    weights, biases = torch.zeros(len(heads), classes, width), torch.zeros(len(heads), classes)
    velocity = torch.zeros_like(weights), torch.zeros_like(biases)
    rates, decays = (torch.tensor(values)[:, None, None] for values in zip(*heads, strict=True))
    emphasis = class_weights(labels[torch.from_numpy(chosen)], classes) if settings.balanced else None
    steps, step = settings.epochs * math.ceil(len(chosen) / settings.batch_size), 0
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch])
        for x, y in _batches(features, labels, chosen, settings.batch_size, order):
            x = x if held else standardise(x)
            gradient = (torch.einsum("nd,gkd->gnk", x, weights) + biases[:, None]).softmax(2)
            gradient[:, torch.arange(len(y)), y] -= 1
            if emphasis is None:
                gradient /= len(y)
            else:
                gradient *= (emphasis[y] / emphasis[y].sum())[None, :, None]
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            velocity[0].mul_(settings.momentum).add_(torch.einsum("gnk,nd->gkd", gradient, x) + decays * weights)
            velocity[1].mul_(settings.momentum).add_(gradient.sum(1))
            weights -= cosine * rates * velocity[0]
            biases -= cosine * rates[:, 0] * velocity[1]
            step += 1
    return LinearGrid(weights, biases, standardise, heads)


def _batches(
    features: FeatureRows, labels: Tensor, rows: RowNumbers, size: int, order: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches of one epoch; what a block leaves over goes into the next one's first."""
    x, y = torch.empty(0, features.width), labels[:0]
    for block in blocks_of(rows, features.width, generator=order):
        shuffled = order.permutation(block)
        where = np.argsort(shuffled)  # sorted reading is a run through the file; the shuffle happens in memory
        read = torch.empty(len(block), features.width)
        read[torch.from_numpy(where)] = features.read(shuffled[where])
        x, y = torch.cat([x, read]), torch.cat([y, labels[torch.from_numpy(shuffled)]])
        whole = len(y) - len(y) % size
        for start in range(0, whole, size):
            yield x[start : start + size], y[start : start + size]
        x, y = x[whole:].clone(), y[whole:].clone()
    if len(y):
        yield x, y
