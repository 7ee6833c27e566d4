"""Dense flow by nearest neighbours, and how TSS counts it (as sd-dino, pck_tss.py).

For each pixel of the target the flow says where it lies in the source. PCK of an item is the share of the
object's pixels whose flow is at most ``alpha * max(H, W)`` of the source image away from the truth; items
are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.eval.datasets.tss import FlowItem
from diffrep.fusion import Descriptors, lattice, sample
from diffrep.matching import MatchConfig, match_dense
from diffrep.similarity import Metric, nearest

ALPHAS = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)


def nearest_flow(
    source: Descriptors,
    target: Descriptors,
    size: tuple[int, int],
    *,
    metric: Metric = "euclidean",
    rounding: Literal["floor", "official"] = "floor",
) -> Tensor:
    """Flow from each pixel of the target to its nearest place in the source.

    Args:
        source, target: descriptors on the cells of a square on which the padded images lie centred.
        size: (H, W) of both images after padding to a common size.
        rounding: ``official`` keeps a slip of the released code, which divides the flat index without
            rounding down and so adds column / cells to every vertical displacement; published TSS numbers
            have it.

    Returns:
        (2, H, W) float32, (x, y) in pixels.

    Raises:
        ValueError: the two sides have other cells, or the cells are no square.
    """
    rows, columns = target.size
    if source.size != target.size or rows != columns:
        raise ValueError(f"the cells must be one square for both images, got {source.size} and {target.size}")
    best = nearest(target.rows(), source.rows(), metric).indices.view(rows, columns)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    found_row = best / columns if rounding == "official" else (best // columns).float()
    flow = torch.stack([(best % columns).float() - column, found_row - row])
    long = max(size)
    dense = F.interpolate(flow[None], size=(long, long), mode="bilinear", align_corners=False)[0] * (long / columns)
    top, left = ((long - side) // 2 for side in size)
    return dense[:, top : top + size[0], left : left + size[1]]


def dense_flow(source: Descriptors, target: Descriptors, matching: MatchConfig) -> Tensor:
    """Flow from each pixel of the target to the source, interpolated between centres of the target's cells.

    Returns:
        (2, H, W) float32, (x, y) in pixels, over the target's image.
    """
    matches = match_dense(target, source, matching)
    rows, columns = matches.valid.any(1).nonzero()[:, 0], matches.valid.any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])  # cells on padding match nothing, and are left out
    flow = (matches.points - matches.sources)[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].cpu()
    pixels = target.cells(lattice(target.placement.image_size).float())
    return sample(flow, pixels - pixels.new_tensor([left, top])).movedim(-1, 0)


@dataclass(frozen=True)
class FlowCount:
    """What one item adds to every figure of the report."""

    name: str
    subset: str
    category: str
    pixels: int  # of the object
    correct: tuple[int, ...]  # per alpha of ALPHAS: pixels right by the item's own threshold
    error: float  # mean end-point error over the object, pixels
    smoothness: float  # mean absolute first difference over the object, pixels


def count_flow(item: FlowItem, flow: Tensor, truth: Tensor, mask: Tensor) -> FlowCount:
    """Compare flow with truth, both (2, H, W), on the pixels of a mask (H, W).

    Raises:
        ValueError: the mask is empty.
    """
    if not bool(mask.any()):
        raise ValueError(f"{item.name}: the mask {item.mask_file} marks no pixel")
    distance = torch.linalg.vector_norm(flow - truth, dim=0)[mask]
    limit = max(item.source_size)
    correct = tuple(int((distance <= alpha * limit).sum()) for alpha in ALPHAS)
    x = flow.diff(dim=2).abs().sum(0)[mask[:, 1:] & mask[:, :-1]]
    y = flow.diff(dim=1).abs().sum(0)[mask[1:] & mask[:-1]]
    steps = torch.cat([x, y])
    smoothness = float(steps.mean()) if len(steps) else 0.0
    return FlowCount(item.name, item.subset, item.category, len(distance), correct, float(distance.mean()), smoothness)


def mean_pck(counts: Sequence[FlowCount], alpha: float) -> float:
    """Mean over items of the share of pixels that are right; NaN where there is no item.

    Raises:
        ValueError: alpha was not counted.
    """
    if alpha not in ALPHAS:
        raise ValueError(f"alpha {alpha} was not counted; counted were {', '.join(map(str, ALPHAS))}")
    i = ALPHAS.index(alpha)
    return _mean([count.correct[i] / count.pixels for count in counts])


def mean_error(counts: Sequence[FlowCount]) -> float:
    """Mean over items of the mean end-point error, pixels; NaN where there is no item."""
    return _mean([count.error for count in counts])


def mean_smoothness(counts: Sequence[FlowCount]) -> float:
    """Mean over items of the mean absolute first difference, pixels; NaN where there is no item."""
    return _mean([count.smoothness for count in counts])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
