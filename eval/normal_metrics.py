"""Angular errors of surface normals: pooled over the pixels of a data set, or averaged over its images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = (5.0, 7.5, 11.25, 22.5, 30.0)  # degrees


def angular_error(prediction: Tensor, reference: Tensor) -> Tensor:
    """Angle between predicted and true normals, degrees.

    Args:
        prediction, reference: (B, 3, H, W), of any length.

    Returns:
        (B, 1, H, W) in [0, 180]; 90 where either is the zero vector.
    """
    cosine = F.cosine_similarity(prediction, reference, dim=1).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosine))[:, None]


def normal_metrics(errors: Tensor) -> dict[str, float]:
    """Metrics of one set of pixels.

    Args:
        errors: (N,) degrees.

    Returns:
        mean, median (of the two middle ones the mean), rmse in degrees, and "under 5" to "under 30", percent of
        pixels strictly below; NaN where there is no pixel.
    """
    count = len(errors)
    if not count:
        return dict.fromkeys(["mean", "median", "rmse", *(f"under {t:g}" for t in THRESHOLDS)], math.nan)
    e = errors.double()
    return {
        "mean": e.mean().item(),
        "median": torch.quantile(e, 0.5).item() if count < 2**24 else e.median().item(),
        "rmse": e.square().mean().sqrt().item(),
        **{f"under {t:g}": 100 * (e < t).double().mean().item() for t in THRESHOLDS},
    }


class PooledAngles:
    """Metrics over all pixels of a data set together (DSINE, Lotus, E2E-FT), from counts that merge exactly.

    The median comes from a histogram of cells `WIDTH` degrees wide and is right to that.
    """

    WIDTH = 5e-4

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        self.squares = 0.0
        self.under = torch.zeros(len(THRESHOLDS), dtype=torch.int64)
        self.histogram = torch.zeros(round(180 / self.WIDTH) + 1, dtype=torch.int64)

    def update(self, errors: Tensor) -> None:
        """Count the pixels of one image: (N,) degrees."""
        e = errors.double()
        self.count += len(e)
        self.sum += e.sum().item()
        self.squares += e.square().sum().item()
        self.under += torch.stack([(e < t).sum() for t in THRESHOLDS])
        self.histogram += torch.bincount((e / self.WIDTH).long(), minlength=len(self.histogram))

    def merge(self, other: PooledAngles) -> None:
        """Add what another process counted."""
        self.count += other.count
        self.sum += other.sum
        self.squares += other.squares
        self.under += other.under
        self.histogram += other.histogram

    def compute(self) -> dict[str, float]:
        """As `normal_metrics`, over everything counted."""
        if not self.count:
            return normal_metrics(torch.zeros(0))
        total = self.histogram.cumsum(0)
        middle = torch.tensor([(self.count - 1) // 2, self.count // 2]) + 1
        cells = torch.searchsorted(total, middle)
        return {
            "mean": self.sum / self.count,
            "median": (cells.double().mean().item() + 0.5) * self.WIDTH,
            "rmse": math.sqrt(self.squares / self.count),
            **{f"under {t:g}": 100 * n / self.count for t, n in zip(THRESHOLDS, self.under.tolist(), strict=True)},
        }


def mean_of_images(images: Sequence[Tensor]) -> dict[str, float]:
    """Marigold's protocol: metrics of each image, each rounded to 4 digits, then their mean.

    Args:
        images: the errors of each image, (N,) degrees.
    """
    each = [{k: round(v, 4) for k, v in normal_metrics(errors).items()} for errors in images]
    return {name: math.fsum(image[name] for image in each) / len(each) for name in each[0]} if each else {}
