"""How masks are scored: F, weighted F, MAE, S and E measures of the DIS benchmarks, and the authors' variant of them.

Two definitions are in use. `DIS` is that of the published tables' protocol and of the package pysodmetrics, with which
the tests compare: soft maps, stretched to [0, 1] per image. `AUTHORS`, with maps thresholded at 0.5 before every
metric, is what DiffDIS' own `test_score.py` computes: population variances, 255 thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve, distance_transform_edt

from diffrep.files import optional_import
from diffrep.settings import check

Array = NDArray[np.float64]
Truth = NDArray[np.bool_]

_TINY = float(np.spacing(1))


@dataclass(frozen=True)
class Definition:
    """The choices in which the definitions differ.

    Attributes:
        thresholds: of the curves; with 255 the grey levels 254 and 255 count as one.
        deviation: degrees of freedom taken off in the variances of the S-measure (its covariances lose 1).
        floor: the S-measure is not negative.
        epsilon, weighted_epsilon: added to denominators, of the S- and E-measures and of the weighted F.
    """

    thresholds: int = 256
    deviation: int = 1
    floor: bool = True
    epsilon: float = _TINY
    weighted_epsilon: float = _TINY

    def __post_init__(self) -> None:
        check(self)


DIS = Definition()
AUTHORS = Definition(thresholds=255, deviation=0, floor=False, weighted_epsilon=1e-6, epsilon=1e-8)


def prepare(predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> tuple[Array, Truth]:
    """8-bit maps (H, W) -> prediction in [0, 1], stretched to its full range, and truth above 128.

    Raises:
        ValueError: the maps differ in shape or are no 8-bit grey maps.
    """
    if predicted.shape != truth.shape or predicted.ndim != 2:
        raise ValueError(f"prediction and truth must be (H, W) of one size, got {predicted.shape} and {truth.shape}")
    if predicted.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"prediction and truth must be 8-bit maps, got {predicted.dtype} and {truth.dtype}")
    values = predicted / 255.0
    low, high = values.min(), values.max()
    return (values if high == low else (values - low) / (high - low)), truth > 128


def counts(predicted: Array, truth: Truth, definition: Definition = DIS) -> tuple[Array, Array]:
    """Pixels of the object and of the background at or above each threshold, from the highest to the lowest."""
    levels = np.floor(predicted * 255).astype(int)
    if definition.thresholds == 255:
        levels = np.minimum(levels, 254)
    size = definition.thresholds
    inside = np.bincount(levels[truth], minlength=size)
    outside = np.bincount(levels[~truth], minlength=size)
    return np.cumsum(inside[::-1]).astype(float), np.cumsum(outside[::-1]).astype(float)


def f_curve(predicted: Array, truth: Truth, definition: Definition = DIS) -> Array:
    """F measure (beta^2 = 0.3) at every threshold, from the highest to the lowest."""
    return _f(*counts(predicted, truth, definition), truth)


def e_curve(predicted: Array, truth: Truth, definition: Definition = DIS) -> Array:
    """E measure at every threshold, from the highest to the lowest."""
    return _e(*counts(predicted, truth, definition), truth, definition)


def _f(hits: Array, false: Array, truth: Truth) -> Array:
    """F measure of binary maps with that many right and wrong pixels of the object."""
    precision, recall = hits / np.maximum(hits + false, 1), hits / max(truth.sum(), 1)
    top = 1.3 * precision * recall
    return np.divide(top, 0.3 * precision + recall, out=np.zeros_like(top), where=top > 0)


def _e(hits: Array, false: Array, truth: Truth, definition: Definition) -> Array:
    """E measure of binary maps with that many right and wrong pixels of the object."""
    pixels, inside = truth.size, int(truth.sum())
    if inside in (0, pixels):
        right = pixels - (hits + false) if inside == 0 else hits + false
        return np.asarray(right / (pixels - 1 + _TINY))
    x, y = (hits + false) / pixels, inside / pixels
    total = np.zeros_like(x)
    for count, a, b in (
        (hits, 1 - x, 1 - y),
        (false, 1 - x, -y),
        (inside - hits, -x, 1 - y),
        (pixels - inside - false, -x, -y),
    ):
        align = 2 * a * b / (a * a + b * b + definition.epsilon)
        total += count * (align + 1) ** 2 / 4
    return np.asarray(total / (pixels - 1 + _TINY))


def s_measure(predicted: Array, truth: Truth, definition: Definition = DIS) -> float:
    """Structure measure: half of it looks at object and background as wholes, half at four regions."""
    share = truth.mean()
    if share == 0:
        return float(1 - predicted.mean())
    if share == 1:
        return float(predicted.mean())
    whole = share * _object(predicted[truth], definition) + (1 - share) * _object(1 - predicted[~truth], definition)
    measure = 0.5 * whole + 0.5 * _regions(predicted, truth, definition)
    return float(max(0.0, measure) if definition.floor else measure)


def _object(values: Array, definition: Definition) -> float:
    mean = values.mean()
    spread = values.std(ddof=definition.deviation) if len(values) > definition.deviation else 0.0
    return float(2 * mean / (mean * mean + 1 + spread + definition.epsilon))


def _regions(predicted: Array, truth: Truth, definition: Definition) -> float:
    height, width = truth.shape
    rows, columns = np.nonzero(truth)
    y, x = int(np.round(rows.mean())) + 1, int(np.round(columns.mean())) + 1
    total = 0.0
    for part in (np.s_[:y, :x], np.s_[:y, x:], np.s_[y:, :x], np.s_[y:, x:]):
        p, g = predicted[part], truth[part].astype(float)
        if p.size:
            total += p.size / (height * width) * _similarity(p, g, definition)
    return total


def _similarity(p: Array, g: Array, definition: Definition) -> float:
    a, b = p.mean(), g.mean()
    spread = (((p - a) ** 2).sum() + ((g - b) ** 2).sum()) / max(p.size - definition.deviation, 1)
    together = ((p - a) * (g - b)).sum() / max(p.size - 1, 1)
    top, bottom = 4 * a * b * together, (a * a + b * b) * spread
    if top != 0:
        return float(top / (bottom + definition.epsilon))
    return 1.0 if bottom == 0 else 0.0


def weighted_f(predicted: Array, truth: Truth, definition: Definition = DIS) -> float:
    """F measure (beta 1) that forgives errors near the object's border and weighs distant ones.

    0 where there is no object.
    """
    if not truth.any():
        return 0.0
    distance, nearest = distance_transform_edt(~truth, return_indices=True)
    error = np.abs(predicted - truth)
    carried = error[nearest[0], nearest[1]]  # background takes the error of the nearest pixel of the object
    smooth = convolve(carried, _gaussian(7, 5.0), mode="constant")
    error = np.where(truth & (smooth < error), smooth, error)
    weighted = error * np.where(truth, 1.0, 2 - np.exp(math.log(0.5) / 5 * distance))
    inside = weighted[truth]
    hits, false = truth.sum() - inside.sum(), weighted[~truth].sum()
    recall, precision = 1 - inside.mean(), hits / (hits + false + definition.weighted_epsilon)
    return float(2 * recall * precision / (recall + precision + definition.weighted_epsilon))


def _gaussian(side: int, sigma: float) -> Array:
    offsets = np.arange(side) - side // 2
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * sigma**2))
    return kernel / kernel.sum()


def scores(predicted: Array, truth: Truth, definition: Definition = DIS) -> dict[str, float]:
    """All scores of one map but HCE and the curves: "mae", "sm", "wfm", and F and E at the threshold of twice the mean,
    at most 1: "f_adaptive", "em_adaptive"."""
    chosen = predicted >= min(2 * predicted.mean(), 1)
    hits, false = (np.array([chosen[part].sum()], dtype=float) for part in (truth, ~truth))
    return {
        "mae": float(np.abs(predicted - truth).mean()),
        "sm": s_measure(predicted, truth, definition),
        "wfm": weighted_f(predicted, truth, definition),
        "f_adaptive": float(_f(hits, false, truth)[0]),
        "em_adaptive": float(_e(hits, false, truth, definition)[0]),
    }


def overlaps(predicted: Truth, truth: Truth) -> dict[str, float]:
    """Other scores of DiffDIS' script, of binary maps: "ber", the balanced error rate, "dice", "iou", "accuracy"."""
    both, either, right = predicted & truth, predicted | truth, predicted == truth
    hits, inside, smooth = both.sum(), truth.sum(), 1e-5
    rates = hits / (inside + 1e-8), (~either).sum() / (truth.size - inside + 1e-8)
    return {
        "ber": float(1 - sum(rates) / 2),
        "dice": float((2 * hits + smooth) / (predicted.sum() + inside + smooth)),
        "iou": float((hits + smooth) / (either.sum() + smooth)),
        "accuracy": float(right.mean()),
    }


@dataclass(frozen=True)
class ImageScores:
    """What one image got: its scores, and its curves of F and E over the thresholds."""

    values: Mapping[str, float]
    f: Array
    e: Array


def score_image(
    predicted: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    definition: Definition = DIS,
    *,
    binarize: bool = False,
    hce: bool = False,
) -> ImageScores:
    """All scores of one image, "maxf" and "em_mean" of its own curves among them.

    Args:
        predicted, truth: 8-bit maps (H, W).
        binarize: threshold the map at 0.5 first, as the authors' script does, and count its `overlaps` as well.
        hce: also count HCE, which is slow on large maps.

    Raises:
        ValueError: the maps differ in shape or are no 8-bit grey maps.
    """
    p, g = prepare(predicted, truth)
    values = {}
    if binarize:
        inside = p > 0.5
        values, p = overlaps(inside, g), inside.astype(float)
    values |= scores(p, g, definition)
    if hce:
        values["hce"] = human_correction_effort(p, g)
    f, e = f_curve(p, g, definition), e_curve(p, g, definition)
    return ImageScores(values | {"maxf": float(f.max()), "em_mean": float(e.mean())}, f, e)


def together(images: Sequence[ImageScores]) -> dict[str, float]:
    """Scores of a data set: means over images; max F and mean E from the mean curves. NaN where there are none."""
    if not images:
        return dict.fromkeys(("maxf", "em_mean", "mae"), math.nan)
    names = [name for name in images[0].values if name not in ("maxf", "em_mean")]
    means = {name: float(np.nanmean([image.values[name] for image in images])) for name in names}
    f, e = (np.mean([getattr(image, curve) for image in images], axis=0) for curve in ("f", "e"))
    return {"maxf": float(f.max()), "em_mean": float(e.mean()), **means}


Point = tuple[int, int]


def human_correction_effort(predicted: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """HCE with relaxation 5 and tolerance 2.

    Args:
        predicted: (H, W) in [0, 1], thresholded at 0.5.

    Raises:
        ImportError: pysodmetrics is not installed.
    """
    with optional_import('HCE is counted by pysodmetrics: pip install "diffrep[dis]"'):
        from py_sod_metrics import HumanCorrectionEffortMeasure
    measure: Any = HumanCorrectionEffortMeasure()
    measure.count_polygon_control_points = _count_points
    return float(measure.cal_hce(pred=predicted, gt=truth))


def _count_points(boundaries: Sequence[NDArray[np.int32]], epsilon: float = 2.0) -> int:
    return sum(simplified_length([(int(x), int(y)) for x, y in b.reshape(-1, 2)], epsilon) for b in boundaries)


def simplified_length(points: Sequence[Point], epsilon: float) -> int:
    """How many points are left of an open line by Douglas-Peucker, as OpenCV counted before 4.13.

    A line that ends where it starts is split at the point farthest from there. Points that lie almost straight between
    their neighbours are dropped at the end.

    >>> simplified_length([(0, 0), (5, 0), (10, 0), (10, 7)], 2.0)
    3
    """
    count, tolerance = len(points), epsilon * epsilon
    remaining: list[Point] = []
    stack: list[tuple[int, int]] = []
    closed = points[0] == points[-1]
    if closed:
        x, y = points[0]
        distances = [(px - x) ** 2 + (py - y) ** 2 for px, py in points]
        far = max(range(count), key=lambda i: (distances[i], -i))
        if distances[far] <= tolerance:
            remaining.append(points[0])
        else:
            stack = [(far, 0), (0, far)]
    else:
        stack = [(0, count - 1)]
    while stack:
        start, end = stack.pop()
        split = _farthest(points, start, end, tolerance)
        if split is None:
            remaining.append(points[start])
        else:
            stack += [(split, end), (start, split)]
    if not closed:
        remaining.append(points[-1])
    return _without_straight(remaining, tolerance)


def _farthest(points: Sequence[Point], start: int, end: int, tolerance: float) -> int | None:
    """The point between two others that is farthest from their line, None where all are near enough."""
    count, (x, y) = len(points), points[start]
    dx, dy = points[end][0] - x, points[end][1] - y
    largest, split, position = 0, start, (start + 1) % count
    while position != end:
        distance = abs((points[position][1] - y) * dx - (points[position][0] - x) * dy)
        if distance > largest:
            largest, split = distance, position
        position = (position + 1) % count
    return None if largest * largest <= tolerance * (dx * dx + dy * dy) else split


def _without_straight(remaining: Sequence[Point], tolerance: float) -> int:
    left, count = len(remaining), len(remaining)
    if count < 3:
        return left
    start, middle, position, i = remaining[0], remaining[1], 2, 1
    while i < count - 1 and left > 2:
        end = remaining[position % count]
        position += 1
        dx, dy = end[0] - start[0], end[1] - start[1]
        distance = abs((middle[0] - start[0]) * dy - (middle[1] - start[1]) * dx)
        onward = (middle[0] - start[0]) * (end[0] - middle[0]) + (middle[1] - start[1]) * (end[1] - middle[1])
        if distance * distance <= 0.5 * tolerance * (dx * dx + dy * dy) and dx and dy and onward >= 0:
            left -= 1
            start, middle = end, remaining[position % count]
            position += 1
            i += 2
            continue
        start, middle = middle, end
        i += 1
    return left
