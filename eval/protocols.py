"""How each published benchmark counts, every choice stated.

Papers that report "PCK@0.1 on SPair-71k" differ in the frame in which distances are measured, in what a
threshold is a share of, in whether the threshold itself counts, and in what is averaged. A `Protocol` says
all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.eval.datasets.pairs import AnnotatedImage, AnnotatedPair
from diffrep.eval.pck import Aggregate, PairCount, within
from diffrep.eval.published import read_tables
from diffrep.features import Descriptors
from diffrep.similarity import Metric, nearest, similarities, soft_argmax


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
