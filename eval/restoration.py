"""How near restored images come to the originals: PSNR and SSIM as the papers count them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def luma(images: Tensor) -> Tensor:
    """Y of YCbCr (BT.601, 16 to 235) of RGB: (..., 3, H, W) uint8 -> (..., 1, H, W) float32 in 0..255."""
    weights = torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return (images.float() / 255 * weights).sum(-3, keepdim=True) + 16


def _compared(restored: Tensor, reference: Tensor, crop: int, y: bool) -> tuple[Tensor, Tensor]:
    if restored.shape != reference.shape:
        raise ValueError(
            f"images of one size can be compared, not {tuple(restored.shape)} and {tuple(reference.shape)}"
        )
    if 2 * crop >= min(reference.shape[-2:]):
        raise ValueError(f"a border of {crop} pixels leaves nothing of an image of {tuple(reference.shape[-2:])}")
    inside = slice(crop, -crop or None)
    pair = (image[..., inside, inside] for image in (restored, reference))
    first, second = (luma(image).double() if y else image.double() for image in pair)
    return first, second


def psnr(restored: Tensor, reference: Tensor, *, crop: int = 0, y: bool = True) -> float:
    """Peak signal to noise ratio in dB of (3, H, W) uint8; infinite where they are equal.

    Args:
        crop: pixels of the border that do not count; the papers of diffusion models take 0, classical ones the scale.
        y: of the luma alone, as published.

    Raises:
        ValueError: the sizes differ, or nothing is left inside of the border.
    """
    first, second = _compared(restored, reference, crop, y)
    error = float((first - second).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(restored: Tensor, reference: Tensor, *, crop: int = 0, y: bool = True) -> float:
    """Structural similarity (Wang et al. 2004) of (3, H, W) uint8: 11 x 11 Gaussian of sigma 1.5, where it fits.

    Arguments and errors are those of `psnr`; of RGB it is the channels' mean.
    """
    first, second = (image[:, None] for image in _compared(restored, reference, crop, y))
    line = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel)

    a, b = mean(first), mean(second)
    spread_a, spread_b = mean(first**2) - a**2, mean(second**2) - b**2
    both = mean(first * second) - a * b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * a * b + c1) * (2 * both + c2) / ((a**2 + b**2 + c1) * (spread_a + spread_b + c2))).mean())
