"""Losses of one-step heads: Lotus's in latent space, E2E-FT's on the decoded image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.alignment import fit_scale_shift


def latent_mask(valid: Tensor, stride: int = 8) -> Tensor:
    """Cells of which every pixel is valid: (B, 1, H, W) bool -> (B, 1, H / stride, W / stride) bool."""
    return F.max_pool2d((~valid).float(), stride, stride) == 0


def latent_loss(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error in float32 over the latent cells that count.

    Args:
        predicted, target: (B, c, h, w).
        mask: (B, 1, h, w) bool; None counts all. Zero where it counts none.
    """
    squares = (predicted.float() - target.float()).square()
    if mask is None:
        return squares.mean()
    keep = mask.expand_as(squares)
    return torch.where(keep, squares, 0.0).sum() / keep.sum().clamp(min=1)


def decoded_depth(decoded: Tensor) -> Tensor:
    """(B, 3, H, W) as the VAE decodes it -> (B, 1, H, W) in [-1, 1]: the channels' mean, clamped."""
    return decoded.mean(1, keepdim=True).clamp(-1, 1)


def decoded_normals(decoded: Tensor) -> Tensor:
    """(B, 3, H, W) as the VAE decodes it -> nearly unit normals (E2E-FT divides by the length + 1e-5, and clamps)."""
    length = torch.linalg.vector_norm(decoded, dim=1, keepdim=True)
    return (decoded / (length + 1e-5)).clamp(-1, 1)


def affine_invariant_loss(estimate: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """E2E-FT's depth loss: mean over all masked pixels of the batch of |s p + t - d|.

    Scale and shift are fitted per image by least squares, and gradients flow through the fit.

    Args:
        estimate, reference: (B, 1, H, W); mask: (B, 1, H, W) bool.
    """
    scale, shift = fit_scale_shift(estimate, reference, mask, undetermined="zero")
    aligned = scale.view(-1, 1, 1, 1) * estimate + shift.view(-1, 1, 1, 1)
    return (aligned - reference)[mask].abs().mean()


def angular_loss(estimate: Tensor, reference: Tensor, mask: Tensor, *, margin: float = 1e-4) -> Tensor:
    """E2E-FT's normal loss: mean angle over the masked pixels, radians.

    Args:
        estimate, reference: (B, 3, H, W) unit normals; mask: (B, 1, H, W) bool.
        margin: cosines are kept this far from 1 and -1, where the gradient is infinite; 0 is the published form,
            which gives NaN gradients where the estimate is exact.
    """
    cosine = (estimate * reference).sum(1, keepdim=True)[mask]
    return torch.acos(cosine.clamp(-1 + margin, 1 - margin)).mean()
