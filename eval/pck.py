"""PCK, the percentage of correct keypoints: counted per pair, then aggregated under its four names.

A keypoint is correct when it lands within ``alpha * scale`` of its target; `scale` is the longer side of the
target's box or of the image, as the benchmark says. The same counts give very different numbers, depending on
what is averaged, and papers often do not say which; every aggregate here has a name:

    per image               mean over pairs of the pair's share of correct points
    per point               correct points over all points of all pairs
    category mean           mean over categories of the category's per-point value
    pair-weighted category  the same mean, weighted by the category's number of pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Aggregate = Literal["per image", "per point", "category mean", "pair-weighted category"]
DRAWS = 2000  # of the bootstrap
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)


def within(
    predicted: Tensor,
    target: Tensor,
    scale: float | Tensor,
    alphas: Sequence[float],
    *,
    inclusive: bool = True,
) -> Tensor:
    """Which keypoints land within ``alpha * scale`` of their target.

    Args:
        predicted, target: (N, 2) points in one frame of coordinates.
        scale: the length that alpha is a share of, in the same coordinates; one or (N,).
        inclusive: whether a point exactly on the threshold counts (``<=``), or not (``<``).

    Returns:
        (A, N) bool, one row per alpha. Points that are not finite are wrong.

    Raises:
        ValueError: `predicted` and `target` differ in shape, or are not (N, 2).
    """
    if predicted.shape != target.shape or predicted.ndim != 2 or predicted.shape[-1] != 2:
        raise ValueError(
            f"predicted and target must both be (N, 2), got {tuple(predicted.shape)} and {tuple(target.shape)}"
        )
    distance = torch.linalg.vector_norm(predicted.double() - target.double(), dim=-1)
    limit = torch.tensor(alphas, dtype=torch.float64)[:, None] * torch.as_tensor(scale, dtype=torch.float64)
    return distance <= limit if inclusive else distance < limit


@dataclass(frozen=True)
class PairCount:
    """How many keypoints of one pair were right: all that any aggregate needs."""

    pair: str
    category: str
    points: int  # that count: visible in both images
    correct: tuple[float, ...]  # per alpha; whole numbers, except where an expectation stands for a method

    @classmethod
    def of(cls, pair: str, category: str, hits: Tensor) -> PairCount:
        """From (A, N) bool, as `within` gives it."""
        return cls(pair, category, hits.shape[-1], tuple(hits.sum(-1).tolist()))


@dataclass(frozen=True)
class Pck:
    """PCK over a set of pairs, for each alpha."""

    alphas: tuple[float, ...]
    pairs: tuple[PairCount, ...]

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if len(pair.correct) != len(self.alphas):
                counts = f"{len(pair.correct)} counts for {len(self.alphas)} alphas {self.alphas}"
                raise ValueError(f"pair {pair.pair} has {counts}")

    @property
    def counted(self) -> tuple[PairCount, ...]:
        """The pairs that have keypoints to count."""
        return tuple(pair for pair in self.pairs if pair.points)

    @property
    def points(self) -> int:
        """Keypoints counted."""
        return sum(pair.points for pair in self.pairs)

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories that occur, sorted."""
        return tuple(sorted({pair.category for pair in self.pairs}))

    def where(self, keep: Callable[[PairCount], bool]) -> Pck:
        """The same over some of the pairs."""
        return Pck(self.alphas, tuple(pair for pair in self.pairs if keep(pair)))

    def of(self, category: str) -> Pck:
        """The same over one category."""
        return self.where(lambda pair: pair.category == category)

    def value(self, aggregate: Aggregate = "per point") -> tuple[float, ...]:
        """PCK in [0, 1] per alpha; NaN where no keypoint was counted. Pairs without keypoints count nowhere.

        Raises:
            ValueError: there is no such aggregate.
        """
        counted = self.counted
        if aggregate == "per point":
            return _ratio([pair.correct for pair in counted], self.points, self.alphas)
        if aggregate == "per image":
            shares = [[correct / pair.points for correct in pair.correct] for pair in counted]
            return _ratio(shares, len(counted), self.alphas)
        if aggregate not in AGGREGATES:
            raise ValueError(f"no aggregate {aggregate!r}; there are {', '.join(map(repr, AGGREGATES))}")
        groups = [group for category in self.categories if (group := self.of(category)).points]
        weights = [1 if aggregate == "category mean" else len(group.counted) for group in groups]
        weighted = [[weight * one for one in group.value()] for weight, group in zip(weights, groups, strict=True)]
        return _ratio(weighted, sum(weights), self.alphas)

    def interval(self) -> tuple[tuple[float, float], ...]:
        """95 % interval of the per-point value, a percentile bootstrap over pairs: (low, high) per alpha.

        Pairs are drawn, not points, since the points of a pair succeed and fail together.
        """
        return _interval(self._resampled())

    def _resampled(self) -> np.ndarray:
        """(DRAWS, A): the per-point value over pairs drawn with replacement; NaN if nothing was counted."""
        counted = self.counted
        if not counted:
            return np.full((DRAWS, len(self.alphas)), np.nan)
        uniform = np.full(len(counted), 1 / len(counted))
        times = np.random.default_rng(0).multinomial(len(counted), uniform, size=DRAWS)  # (DRAWS, pairs)
        points = times @ np.array([pair.points for pair in counted])
        return times @ np.array([pair.correct for pair in counted]) / points[:, None]


def difference_interval(ours: Pck, theirs: Pck) -> tuple[tuple[float, float], ...]:
    """95 % interval of ``ours - theirs`` per point, a percentile bootstrap over the same pairs: (low, high) per alpha.

    Raises:
        ValueError: the two did not count the same pairs.
    """
    if [(p.pair, p.points) for p in ours.pairs] != [(p.pair, p.points) for p in theirs.pairs]:
        raise ValueError("a difference needs both sides counted over the same pairs in the same order")
    return _interval(ours._resampled() - theirs._resampled())  # one seed: the same draws of pairs


def _interval(values: np.ndarray) -> tuple[tuple[float, float], ...]:
    """(DRAWS, A) -> (low, high) per alpha."""
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def _ratio(rows: Sequence[Sequence[float]], count: int, alphas: Sequence[float]) -> tuple[float, ...]:
    """The sum of the rows over a count, per alpha; NaN where the count is 0."""
    if not count:
        return (math.nan,) * len(alphas)
    return tuple(math.fsum(column) / count for column in zip(*rows, strict=True))  # fsum: the same in any order


def chance_within(target: Tensor, scale: float, alphas: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Exact probability that a pixel drawn uniformly from the image counts as correct.

    Args:
        target: (N, 2) points (x, y) in pixels.
        size: (H, W) of the image.

    Returns:
        (A, N) float64.
    """
    height, width = size
    x = torch.arange(width, dtype=torch.float64) - target[:, :1].double()  # (N, W)
    y = torch.arange(height, dtype=torch.float64) - target[:, 1:].double()
    squared = y.square()[:, :, None] + x.square()[:, None, :]
    return torch.stack([(squared <= (alpha * scale) ** 2).double().mean((-2, -1)) for alpha in alphas])
