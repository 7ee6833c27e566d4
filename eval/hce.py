"""Human correction effort (HCE): how many points a person would have to click to correct a mask (IS-Net, ECCV 2022).

pysodmetrics counts it. Only the simplification of outlines is done here: OpenCV's changed with 4.13, and every number
published before would come out higher by about one point per outline that returns to its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Point = tuple[int, int]


def human_correction_effort(predicted: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """HCE with relaxation 5 and tolerance 2.

    Args:
        predicted: (H, W) in [0, 1], thresholded at 0.5.

    Raises:
        ImportError: pysodmetrics is not installed.
    """
    try:
        from py_sod_metrics import HumanCorrectionEffortMeasure
    except ImportError:
        raise ImportError('HCE is counted by pysodmetrics: pip install "diffrep[dis]"') from None
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
    kept: list[Point] = []
    stack: list[tuple[int, int]] = []
    closed = points[0] == points[-1]
    if closed:
        x, y = points[0]
        distances = [(px - x) ** 2 + (py - y) ** 2 for px, py in points]
        far = max(range(count), key=lambda i: (distances[i], -i))
        if distances[far] <= tolerance:
            kept.append(points[0])
        else:
            stack = [(far, 0), (0, far)]
    else:
        stack = [(0, count - 1)]
    while stack:
        start, end = stack.pop()
        split = _farthest(points, start, end, tolerance)
        if split is None:
            kept.append(points[start])
        else:
            stack += [(split, end), (start, split)]
    if not closed:
        kept.append(points[-1])
    return _without_straight(kept, tolerance)


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


def _without_straight(kept: Sequence[Point], tolerance: float) -> int:
    left, count = len(kept), len(kept)
    if count < 3:
        return left
    start, middle, position, i = kept[0], kept[1], 2, 1
    while i < count - 1 and left > 2:
        end = kept[position % count]
        position += 1
        dx, dy = end[0] - start[0], end[1] - start[1]
        distance = abs((middle[0] - start[0]) * dy - (middle[1] - start[1]) * dx)
        onward = (middle[0] - start[0]) * (end[0] - middle[0]) + (middle[1] - start[1]) * (end[1] - middle[1])
        if distance * distance <= 0.5 * tolerance * (dx * dx + dy * dy) and dx and dy and onward >= 0:
            left -= 1
            start, middle = end, kept[position % count]
            position += 1
            i += 2
            continue
        start, middle = middle, end
        i += 1
    return left
