"""PCK, the percentage of correct keypoints, and how each published benchmark counts it, every choice stated.

A keypoint is correct when it lands within ``alpha * scale`` of its target. Papers that report "PCK@0.1 on SPair-71k"
differ in the frame in which distances are measured, in what a threshold is a share of, in whether the threshold itself
counts, and in what is averaged. A `Protocol` says all of it. The same counts give very different numbers, depending on
what is averaged; every aggregate here has a name:

    per image               mean over pairs of the pair's share of correct points
    per point               correct points over all points of all pairs
    category mean           mean over categories of the category's per-point value
    pair-weighted category  the same mean, weighted by the category's number of pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffrep.eval.datasets.pairs import AnnotatedImage, AnnotatedPair
from diffrep.eval.report import Aggregate, read_tables
from diffrep.fusion import Descriptors
from diffrep.settings import check
from diffrep.similarity import Metric, nearest, similarities, soft_argmax

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


@dataclass(frozen=True, kw_only=True)
class CellSearch:
    """Matching by the cells of a padded square, as sd-dino and GeoAware-SC do it.

    A query is the cell that a keypoint lies in, the answer the centre of a target cell, or the expectation
    of a softmax in a window around it. All in pixels of the square.
    """

    cells: int = 60  # per side
    centre: float = 6.5  # of cell 0, pixels; the next ones follow at side / cells
    metric: Metric = "euclidean"
    window: int | None = None  # half-size of the window of the soft-argmax; None: the best cell itself
    temperature: float = 0.02

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, source: Descriptors, target: Descriptors, points: Tensor, side: int) -> Tensor:
        """Points (N, 2) of the source's square -> points (N, 2) of the target's.

        Raises:
            ValueError: the descriptors do not lie on `cells` x `cells` cells.
        """
        for descriptors in (source, target):
            if descriptors.size != (self.cells, self.cells):
                raise ValueError(
                    f"this protocol matches {self.cells} x {self.cells} cells of a padded square,"
                    f" the recipe's descriptors have {descriptors.size[0]} x {descriptors.size[1]}"
                )
        columns, rows = (points.float() * (self.cells / side)).long().clamp(0, self.cells - 1).unbind(-1)
        queries = source.rows()[rows * self.cells + columns]
        if self.window is None:
            best = nearest(queries, target.rows(), self.metric).indices
            places = torch.stack([best % self.cells, best // self.cells], dim=-1).float()
        else:
            scores = similarities(queries, target.rows(), self.metric).unflatten(1, target.size)
            places = soft_argmax(scores, window=self.window, temperature=self.temperature, outside="zero")
        return places * (side / self.cells) + self.centre


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one paper counts on one benchmark.

    Attributes:
        frame: None measures in pixels of the original image. A number is the side of a square on which the
            image is centred with its aspect kept; distances are measured there, with that paper's rounding.
        threshold: what alpha is a share of: the longer side of the target's ``box``, of the target ``image``
            (of the square, where there is one), or of the box around the target's ``keypoints``.
        inclusive: whether a point exactly on the threshold counts.
        aggregate: the average that the paper's headline number is; reports print all of them.
        keypoints: whether the common keypoints come from the pair's own list, or from both images'
            annotations.
        search: the paper's own way from keypoints to matches on the square; None leaves it to the recipe.
        by_part: also count the keypoints that share a part with another one visible in the target.
    """

    name: str
    benchmark: Literal["spair", "spair-u", "pf-pascal", "pf-willow", "ap-10k"]
    alphas: tuple[float, ...]
    frame: int | None = None
    threshold: Literal["box", "image", "keypoints"] = "box"
    inclusive: bool = True
    aggregate: Aggregate = "per point"
    keypoints: Literal["pair", "image"] = "pair"
    search: CellSearch | None = None
    by_part: bool = False
    source: str = ""

    def zoom(self, image: AnnotatedImage) -> float:
        """Pixels of the frame for each pixel of the image."""
        return 1.0 if self.frame is None else square_placement(image.size, self.frame)[0]

    def to_frame(self, points: Tensor, image: AnnotatedImage) -> Tensor:
        """Points (N, 2) in pixels of the image -> in the frame's pixels, float32."""
        if self.frame is None:
            return points.float()
        scale, offset = square_placement(image.size, self.frame)
        return points.float() * scale + torch.tensor(offset, dtype=torch.float32)

    def to_image(self, points: Tensor, image: AnnotatedImage) -> Tensor:
        """The way back."""
        if self.frame is None:
            return points.float()
        scale, offset = square_placement(image.size, self.frame)
        return (points.float() - torch.tensor(offset, dtype=torch.float32)) / scale

    def scale(self, pair: AnnotatedPair) -> float:
        """The length that alpha is a share of, in the frame's pixels.

        Raises:
            ValueError: the threshold is a share of the box and the target has none.
        """
        target = pair.target
        if self.threshold == "image":
            return float(max(target.size) if self.frame is None else self.frame)
        if self.threshold == "keypoints":
            points = target.points(pair.ids)
            return float((points.amax(0) - points.amin(0)).max()) * self.zoom(target)
        if target.box is None:
            raise ValueError(f"{pair.name}: {self.name} needs the target's box, {target.path} has none")
        x0, y0, x1, y1 = target.box
        return max(x1 - x0, y1 - y0) * self.zoom(target)

    def hits(self, pair: AnnotatedPair, predicted: Tensor) -> Tensor:
        """Which predictions (N, 2) in the frame's pixels count as right; (A, N) bool."""
        truth = self.to_frame(pair.target.points(pair.ids), pair.target)
        return within(predicted, truth, self.scale(pair), self.alphas, inclusive=self.inclusive)

    def count(self, pair: AnnotatedPair, predicted: Tensor) -> PairCount:
        """The pair's counts."""
        return PairCount.of(pair.name, pair.category, self.hits(pair, predicted))

    def count_shared(self, pair: AnnotatedPair, predicted: Tensor, groups: Sequence[frozenset[int]]) -> PairCount:
        """The pair's counts over the keypoints that `shares_part` picks."""
        return PairCount.of(pair.name, pair.category, self.hits(pair, predicted)[:, shares_part(pair, groups)])


def shares_part(pair: AnnotatedPair, groups: Sequence[frozenset[int]]) -> Tensor:
    """Which of a pair's keypoints are one of several alike: (N,) bool (GeoAware-SC's geometry-aware subset).

    A keypoint counts where the target shows at least two of its group, so that the right one has to be told
    from another by where it is on the object. Needs all keypoints of the target (``keypoints="image"``).
    """
    shown = pair.target.keypoints.keys()
    alike = [any(i in group and len(group & shown) >= 2 for group in groups) for i in pair.ids]
    return torch.tensor(alike, dtype=torch.bool)


def square_placement(size: tuple[int, int], side: int) -> tuple[float, tuple[int, int]]:
    """Scale and (x, y) offset of an (H, W) image on a padded square, with sd-dino's rounding.

    >>> square_placement((480, 640), 840)
    (1.3125, (0, 105))
    """
    height, width = size
    long = max(height, width)
    short = int(np.around(side * min(height, width) / long))
    margin = int((side - short) / 2)
    offset = (0, margin) if height < width else (margin, 0) if width < height else (0, 0)
    return side / long, offset


SQUARE = 840


def _protocol(search: Mapping[str, Any] | None = None, **fields: Any) -> Protocol:
    return Protocol(search=None if search is None else CellSearch(**search), **fields)


PROTOCOLS = {protocol.name: protocol for protocol in read_tables("protocols", _protocol)}
