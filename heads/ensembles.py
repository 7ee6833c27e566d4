"""Many predictions of one image made one: aligned, averaged, with a map of their disagreement.

The published alignment (Marigold, arXiv 2312.02145, eq. 6) minimises the distances of all pairs under a weak pull
towards the range [0, 1]. Where members disagree by more than that pull weighs, its minimum is the collapse of all
scales to 0; the released codes are saved from it by differences in float32 that are mostly rounding, or by stopping
after two iterations. Their variants are presets here, for the published numbers; the default aligns by least squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.alignment import fit_scale_shift
from diffrep.heads.sizes import SizeRule, resize, working_size


@dataclass(frozen=True, kw_only=True)
class DepthEnsemble:
    """How depth predictions with their own scale and shift are brought together."""

    method: Literal["least squares", "pairs"] = (
        "least squares"  # fit every member to the median of all; or as published
    )
    reduction: Literal["median", "mean"] = "median"  # of the aligned members, over each pixel
    shift: bool = True  # members have their own shift; without, only their own scale
    # of the published fit:
    regularizer: float = 0.02  # weight of the distance of the result from the range [0, 1]
    iterations: int = 50  # of BFGS
    tolerance: float = 1e-6  # at which BFGS stops
    # of the solver's values and of its objective; in float32 its numerical gradient takes wider steps
    precision: Literal["float64", "float32"] = "float64"
    pairs: Literal["each", "together"] = "each"  # root mean square of each pair, summed; or once over all pairs
    fit_size: int | None = 1024  # the fit reads maps at most this long, by nearest subsampling; None: whole
    size_rule: SizeRule = "truncate"  # of the subsampled size


MARIGOLD_ENSEMBLE = DepthEnsemble(method="pairs")
DIFFUSERS_ENSEMBLE = DepthEnsemble(method="pairs", iterations=2, tolerance=1e-3, size_rule="integer")
E2E_ENSEMBLE = DepthEnsemble(
    method="pairs", iterations=2, tolerance=1e-3, precision="float32", pairs="together", fit_size=None
)


def ensemble_depth(members: Tensor, settings: DepthEnsemble | None = None) -> tuple[Tensor, Tensor]:
    """Align E predictions of one image and reduce them.

    Args:
        members: (E, H, W), affine-invariant depth or disparity; not negative where `settings.shift` is False.
        settings: `DepthEnsemble()` where None.

    Returns:
        (H, W) in [0, 1], and its uncertainty (H, W): the median absolute deviation of the aligned members from it, or
        their standard deviation where they are averaged, in the same unit.

    Raises:
        ValueError: fewer than two members, or another shape.
    """
    if members.ndim != 3 or len(members) < 2:
        raise ValueError(f"an ensemble needs (E, H, W) with at least two members, got {tuple(members.shape)}")
    members, settings = members.float(), settings or DepthEnsemble()
    pairs = settings.method == "pairs"
    aligned = _aligned_pairs(members, settings) if pairs else _aligned_to_median(members, settings.shift)
    result, uncertainty = _reduce(aligned, settings.reduction)
    low = result.min() if settings.shift else result.new_zeros(())
    extent = (result.max() - low).clamp(min=1e-6)
    return (result - low) / extent, uncertainty / extent


def ensemble_normals(members: Tensor, reduction: Literal["closest", "mean"] = "closest") -> tuple[Tensor, Tensor]:
    """Bring E normal maps of one image together.

    Args:
        members: (E, 3, H, W), about unit length.
        reduction: "closest" takes the member nearest to the mean direction at each pixel, "mean" that direction.

    Returns:
        (3, H, W), and (H, W) the mean angle between members and mean direction, divided by pi.

    Raises:
        ValueError: fewer than two members, or another shape.
    """
    if members.ndim != 4 or members.shape[1] != 3 or len(members) < 2:
        raise ValueError(f"an ensemble needs (E, 3, H, W) with at least two members, got {tuple(members.shape)}")
    mean = members.mean(0)
    mean = mean / mean.norm(dim=0).clamp(min=1e-6)
    cosine = (members * mean).sum(1).clamp(-1, 1)
    uncertainty = cosine.arccos().mean(0) / math.pi
    if reduction == "mean":
        return mean, uncertainty
    nearest = cosine.argmax(0)[None, None].expand(1, 3, -1, -1)
    return members.gather(0, nearest)[0], uncertainty


def _aligned_to_median(members: Tensor, shift: bool, rounds: int = 5) -> Tensor:
    """Every member with the scale (and shift) that brings it nearest to the median of all, which spans [0, 1]."""
    middle = members
    for _ in range(rounds + 1):
        low = middle.amin((-2, -1), keepdim=True) if shift else middle.new_zeros(())
        middle = (middle - low) / (middle.amax((-2, -1), keepdim=True) - low).clamp(min=1e-6)
        middle = (middle.median(0).values if middle.ndim == 3 else middle).expand_as(members)
        if shift:
            scale, offset = fit_scale_shift(members, middle, torch.ones_like(members, dtype=torch.bool))
        else:
            scale = (members * middle).sum((1, 2)) / members.square().sum((1, 2)).clamp(min=1e-12)
            offset = torch.zeros_like(scale)
        aligned = members * scale[:, None, None] + offset[:, None, None]
        middle = aligned.median(0).values
    return aligned


def _aligned_pairs(members: Tensor, settings: DepthEnsemble) -> Tensor:
    """Members at the scale and shift that BFGS with numerical gradients gives them, as in the official code."""
    from scipy.optimize import minimize

    height, width = members.shape[-2:]
    small = members
    if settings.fit_size is not None and max(height, width) > settings.fit_size:
        size = working_size(height, width, settings.fit_size, settings.size_rule)
        small = resize(members[None], size, "nearest")[0]
    count, dtype = len(small), np.dtype(settings.precision)
    low, high = small.flatten(1).min(1).values, small.flatten(1).max(1).values
    scale = 1 / (high - (low if settings.shift else 0)).clamp(min=1e-6)
    start = torch.cat([scale, -scale * low]) if settings.shift else scale
    first, second = torch.combinations(torch.arange(count)).T

    def aligned_by(parameters: np.ndarray, maps: Tensor) -> Tensor:
        scales = maps.new_tensor(parameters[:count])[:, None, None]
        return maps * scales + (maps.new_tensor(parameters[count:])[:, None, None] if settings.shift else 0)

    def cost(parameters: np.ndarray) -> np.floating[Any]:
        aligned = aligned_by(parameters, small)
        if settings.pairs == "each":
            pairs = zip(first, second, strict=True)
            distance = sum(float((aligned[i] - aligned[j]).square().mean().sqrt()) for i, j in pairs)
        else:
            distance = float((aligned[first] - aligned[second]).square().mean().sqrt())
        if settings.regularizer:
            result, _ = _reduce(aligned, settings.reduction)
            distance += settings.regularizer * (float(result.min().abs()) + float((1 - result.max()).abs()))
        rounded: np.floating[Any] = dtype.type(distance)
        return rounded

    options = {"maxiter": settings.iterations, "disp": False}
    start_values = start.cpu().numpy().astype(dtype)
    solved = minimize(cost, start_values, method="BFGS", tol=settings.tolerance, options=options)
    return aligned_by(solved.x, members)


def _reduce(aligned: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(H, W), and its uncertainty: the standard deviation, or the median absolute deviation."""
    if reduction == "mean":
        return aligned.mean(0), aligned.std(0)
    result = aligned.median(0).values
    return result, (aligned - result).abs().median(0).values
