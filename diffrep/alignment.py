"""Scale and shift between a relative map and a reference: what depth metrics, losses and sparse depth share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Space = Literal["depth", "disparity"]

LEAST_DISPARITY = 1e-3  # 1 / metres: what an aligned disparity is clipped at before it is inverted


def fit_scale_shift(
    prediction: Tensor, reference: Tensor, mask: Tensor, *, undetermined: Literal["mean", "zero"] = "mean"
) -> tuple[Tensor, Tensor]:
    """The least-squares scale s and shift t of each image: argmin over the mask of sum (s p + t - r)^2.

    Solved in closed form in float64; gradients flow through it.

    Args:
        prediction, reference: (B, ...), of one shape; reference may be anything outside the mask.
        mask: (B, ...) bool.
        undetermined: what an image gets whose predictions in the mask are all equal: scale 0 and the mean of the
            reference as shift, or zero for both (E2E-FT's loss).

    Returns:
        Scale and shift, (B,) each, in the dtype of the prediction.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(prediction, reference, mask)
    keep = mask.flatten(1)
    p = torch.where(keep, prediction.flatten(1).double(), 0.0)
    r = torch.where(keep, reference.flatten(1).double(), 0.0)
    count = keep.sum(1).clamp(min=1)
    mean_p, mean_r = p.sum(1) / count, r.sum(1) / count
    centred = torch.where(keep, p - mean_p[:, None], 0.0)
    variance = centred.square().sum(1)
    determined = variance > 1e-20 * count
    scale = torch.where(determined, (centred * r).sum(1) / torch.where(determined, variance, 1.0), 0.0)
    shift = mean_r - scale * mean_p
    if undetermined == "zero":
        shift = torch.where(determined, shift, 0.0)
    return scale.to(prediction.dtype), shift.to(prediction.dtype)


def _check_shapes(*maps: Tensor) -> None:
    if len({x.shape for x in maps}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in maps)
        raise ValueError(f"prediction, reference and mask must have one shape, got {shapes}")


def fit_robust(
    prediction: Tensor, reference: Tensor, mask: Tensor, *, trials: int = 512, rounds: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Scale and shift of each image that up to almost half of the references may contradict.

    Lines through random pairs of points are judged by their median absolute residual; the best one is refined by least
    squares with Tukey's weights (4.685 robust standard deviations).

    Args:
        prediction, reference: (B, ...), of one shape; reference may be anything outside the mask.
        mask: (B, ...) bool.
        trials: pairs that are tried.
        rounds: of the refinement, at most.
        seed: of the pairs.

    Returns:
        Scale and shift, (B,) each, in the dtype of the prediction. An image whose predictions in the mask are all equal
        gets scale 0 and the median of its references; one without any, zeros.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(prediction, reference, mask)
    lines = [
        _robust_line(p[m].double(), r[m].double(), trials, rounds, seed)
        for p, r, m in zip(prediction, reference, mask, strict=True)
    ]
    scales, shifts = prediction.new_tensor(lines).unbind(1)
    return scales, shifts


def _robust_line(p: Tensor, r: Tensor, trials: int, rounds: int, seed: int) -> tuple[float, float]:
    """Scale and shift of (N,) points."""
    if not len(p):
        return 0.0, 0.0
    if float(p.max() - p.min()) < 1e-10:
        return 0.0, float(r.median())
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randint(len(p), (2, trials), generator=generator).to(p.device)
    apart = (p[i] - p[j]).abs() > 1e-3 * (p.max() - p.min())  # pairs nearer than that say nothing of the scale
    i, j = i[apart], j[apart]
    if not len(i):
        i, j = p.argmin()[None], p.argmax()[None]
    scales = (r[i] - r[j]) / (p[i] - p[j])
    shifts = r[i] - scales * p[i]
    many = len(p) > 4096
    judges = torch.randint(len(p), (4096,), generator=generator).to(p.device) if many else slice(None)
    residuals = (scales[:, None] * p[judges] + shifts[:, None] - r[judges]).abs().median(1).values
    best = residuals.argmin()
    scale, shift = scales[best], shifts[best]
    for _ in range(rounds):
        residual = scale * p + shift - r
        spread = (1.4826 * residual.abs().median()).clamp(min=1e-12 + 1e-9 * r.abs().max())
        weight = (1 - (residual / (4.685 * spread)).square()).clamp(min=0).square()
        total = weight.sum()
        mean_p, mean_r = (weight * p).sum() / total, (weight * r).sum() / total
        variance = (weight * (p - mean_p).square()).sum()
        if float(variance) <= 0:
            break
        new = (weight * (p - mean_p) * r).sum() / variance
        moved = float((new - scale).abs())
        scale, shift = new, mean_r - new * mean_p
        if moved <= 1e-10 * float(scale.abs()):
            break
    return float(scale), float(shift)


def align_depth(
    prediction: Tensor,
    reference: Tensor,
    valid: Tensor,
    *,
    space: Space = "depth",
    bounds: tuple[float, float] = (1e-3, 1e9),
    fit_size: int | None = None,
    subsample: Literal["both sides", "width"] = "both sides",
) -> tuple[Tensor, float, float]:
    """Metric depth from one affine-invariant prediction and its reference, as the papers' evaluations align it.

    Args:
        prediction: (H, W), depth or disparity up to scale and shift.
        reference: (H, W), metres; anything where not valid.
        valid: (H, W) bool, the pixels that count.
        space: in which scale and shift are fitted. "disparity" fits 1 / reference where the prediction is positive
            and inverts the result.
        bounds: metres, smallest and largest depth; the result is clipped to them.
        fit_size: the fit reads the map at most this many pixels long, by nearest subsampling; None: all pixels.
        subsample: "width" reduces the width alone, as the official code of Marigold and Lotus does (it hands a map
            to an up-sampler of signals); "both sides" reduces both.

    Returns:
        (H, W) depth in metres, with the scale and shift that gave it.

    Raises:
        ValueError: no valid pixel, or the shapes differ.
    """
    keep = valid & (reference > 0)
    target = reference
    if space == "disparity":
        keep = keep & (prediction > 0)
        target = torch.where(keep, 1 / reference, 0.0)
    chosen = [prediction[None], target[None], keep[None]]
    if fit_size is not None and (factor := fit_size / max(reference.shape)) < 1:
        chosen = [_reduced(x, factor, subsample) for x in chosen]
    if not bool(chosen[2].any()):
        raise ValueError("there is no valid pixel to align the prediction to")
    scale, shift = (x.item() for x in fit_scale_shift(*chosen))
    depth = scale * prediction + shift
    if space == "disparity":
        depth = 1 / depth.clamp(min=LEAST_DISPARITY)
    return depth.clamp(*bounds).clamp(min=1e-6), scale, shift


def _reduced(x: Tensor, factor: float, subsample: str) -> Tensor:
    """Nearest subsampling of (1, H, W)."""
    signal = x.to(torch.promote_types(x.dtype, torch.float32))
    if subsample == "width":  # (1, H, W) read as H channels of a signal
        return F.interpolate(signal, scale_factor=factor, mode="nearest").to(x.dtype)
    return F.interpolate(signal[None], scale_factor=factor, mode="nearest")[0].to(x.dtype)
