"""What depth probes are trained with: scale-invariant error and gradients, both of log depth."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_invariant_loss(depth: Tensor, reference: Tensor, valid: Tensor, *, invariance: float = 0.85) -> Tensor:
    """sqrt(mean(g^2) - invariance mean(g)^2) over the valid pixels of a batch, g = log depth - log reference.

    Eigen et al. 2014 (arXiv 1406.2283), with the weight and the root of AdaBins (arXiv 2011.14141, equation 5).

    Args:
        depth, reference: (B, 1, H, W) metres, positive where valid.
        valid: (B, 1, H, W) bool. Zero where there is none.
    """
    g = depth[valid].log() - reference[valid].log()
    if not len(g):
        return depth.sum() * 0
    return (g.square().mean() - invariance * g.mean().square()).clamp(min=1e-12).sqrt()


def gradient_loss(depth: Tensor, reference: Tensor, valid: Tensor, *, scales: int = 4) -> Tensor:
    """Mean absolute gradient of log depth - log reference, summed over every, every second, fourth, ... pixel.

    MegaDepth (arXiv 1804.00607, equation 4); gradients whose two pixels are valid count.

    Args:
        depth, reference, valid: as of `scale_invariant_loss`.
    """
    difference = torch.where(valid, depth, 1.0).log() - torch.where(valid, reference, 1.0).log()
    total = difference.sum() * 0
    for scale in range(scales):
        part, known = difference[..., :: 2**scale, :: 2**scale], valid[..., :: 2**scale, :: 2**scale]
        for axis in (-2, -1):
            both = known.narrow(axis, 1, known.shape[axis] - 1) & known.narrow(axis, 0, known.shape[axis] - 1)
            total = total + (part.diff(dim=axis).abs() * both).sum() / known.sum().clamp(min=1)
    return total


def depth_loss(depth: Tensor, reference: Tensor, valid: Tensor) -> Tensor:
    """probe3d's loss (arXiv 2404.08636): 10 times the scale-invariant one, 0.5 times that of the gradients.

    The weights are published; the forms of the two are the ones their papers give, see above.
    """
    return 10 * scale_invariant_loss(depth, reference, valid) + 0.5 * gradient_loss(depth, reference, valid)
