"""Depth metrics, one image at a time, and their mean over a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DEPTH_METRICS = (
    "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "delta1", "delta2", "delta3", "irmse", "silog",
)  # fmt: skip
LOWER_IS_BETTER = frozenset(DEPTH_METRICS) - {"delta1", "delta2", "delta3"}


def depth_metrics(prediction: Tensor, reference: Tensor, valid: Tensor) -> dict[str, float]:
    """The usual metrics of one image, over its valid pixels.

    Args:
        prediction, reference: (H, W) metres, positive where valid.
        valid: (H, W) bool.

    Returns:
        abs_rel, sq_rel (metres), rmse (metres), rmse_log, log10, delta1 to delta3 (shares of pixels whose ratio is
        below 1.25 to the power 1 to 3), irmse (1 / metres) and silog (times 100); NaN where nothing is valid.
    """
    p, g = prediction[valid].double(), reference[valid].double()
    if not len(p):
        return dict.fromkeys(DEPTH_METRICS, math.nan)
    difference, logs = p - g, p.log() - g.log()
    ratio = torch.maximum(p / g, g / p)
    values = {
        "abs_rel": (difference.abs() / g).mean(),
        "sq_rel": (difference.square() / g).mean(),
        "rmse": difference.square().mean().sqrt(),
        "rmse_log": logs.square().mean().sqrt(),
        "log10": logs.abs().mean() / math.log(10),
        **{f"delta{k}": (ratio < 1.25**k).double().mean() for k in (1, 2, 3)},
        "irmse": (1 / p - 1 / g).square().mean().sqrt(),
        "silog": 100 * (logs.square().mean() - logs.mean().square()).clamp(min=0).sqrt(),
    }
    return {name: value.item() for name, value in values.items()}


def mean_metrics(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Unweighted mean over images of each metric; NaN where there is no image."""
    if not images:
        return dict.fromkeys(DEPTH_METRICS, math.nan)
    return {name: math.fsum(image[name] for image in images) / len(images) for name in images[0]}
