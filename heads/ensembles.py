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
    """How depth predictions with their own scale and shift are brought together.

    Attributes:
        method: "least squares" fits every member to the median of all, some times over; "pairs" is the published one,
            to which the settings from `regularizer` on belong.
        reduction: of the aligned members, over each pixel.
        shift: members have their own shift; without, only their own scale.
        regularizer: weight of the distance of the result from the range [0, 1].
        iterations, tolerance: where BFGS stops.
        precision: of the solver's values and of its objective; in float32 its numerical gradient takes wider steps.
        pairs: the root mean square is taken of each pair and summed, or once over all pairs together.
        fit_size: the fit reads maps at most this long, by nearest subsampling; None reads them whole.
        size_rule: of the subsampled size, see `diffrep.heads.sizes.working_size`.
    """

    method: Literal["least squares", "pairs"] = "least squares"
    reduction: Literal["median", "mean"] = "median"
    shift: bool = True
    regularizer: float = 0.02
    iterations: int = 50
    tolerance: float = 1e-6
    precision: Literal["float64", "float32"] = "float64"
    pairs: Literal["each", "together"] = "each"
    fit_size: int | None = 1024
    size_rule: SizeRule = "truncate"


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
    if settings.method == "least squares":
        aligned = _align_to_median(members, settings.shift)
    else:
        aligned = _align(members, *_fit(_subsampled(members, settings), settings))
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


def _align_to_median(members: Tensor, shift: bool, rounds: int = 5) -> Tensor:
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


def _subsampled(members: Tensor, settings: DepthEnsemble) -> Tensor:
    height, width = members.shape[-2:]
    if settings.fit_size is None or max(height, width) <= settings.fit_size:
        return members
    return resize(members[None], working_size(height, width, settings.fit_size, settings.size_rule), "nearest")[0]


def _align(members: Tensor, scale: np.ndarray, shift: np.ndarray) -> Tensor:
    return members * members.new_tensor(scale)[:, None, None] + members.new_tensor(shift)[:, None, None]


def _reduce(aligned: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    if reduction == "mean":
        return aligned.mean(0), aligned.std(0)
    result = aligned.median(0).values
    return result, (aligned - result).abs().median(0).values


def _fit(members: Tensor, settings: DepthEnsemble) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of every member, by BFGS with numerical gradients as the official code does it."""
    from scipy.optimize import minimize

    count, dtype = len(members), np.dtype(settings.precision)
    low, high = members.flatten(1).min(1).values, members.flatten(1).max(1).values
    scale = 1 / (high - (low if settings.shift else 0)).clamp(min=1e-6)
    start = torch.cat([scale, -scale * low]) if settings.shift else scale
    first, second = torch.combinations(torch.arange(count)).T

    def cost(parameters: np.ndarray) -> np.floating[Any]:
        shift = parameters[count:] if settings.shift else np.zeros(count)
        aligned = _align(members, parameters[:count], shift)
        if settings.pairs == "each":
            distance = sum(
                float((aligned[i] - aligned[j]).square().mean().sqrt()) for i, j in zip(first, second, strict=True)
            )
        else:
            distance = float((aligned[first] - aligned[second]).square().mean().sqrt())
        if settings.regularizer:
            result, _ = _reduce(aligned, settings.reduction)
            distance += settings.regularizer * (float(result.min().abs()) + float((1 - result.max()).abs()))
        rounded: np.floating[Any] = dtype.type(distance)
        return rounded

    options = {"maxiter": settings.iterations, "disp": False}
    solved = minimize(cost, start.cpu().numpy().astype(dtype), method="BFGS", tol=settings.tolerance, options=options)
    return solved.x[:count], solved.x[count:] if settings.shift else np.zeros(count)
