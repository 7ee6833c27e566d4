"""Bringing an image to the size that a one-step head sees, and its map back, by the rule of the family."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch.nn.functional as F
from torch import Tensor

from diffrep.heads.families import Family

Resample: TypeAlias = Literal["bilinear", "bicubic", "nearest", "nearest-exact"]
"""As the official programs call them; "nearest" takes the value under the pixel's centre, like "nearest-exact"."""
SizeRule: TypeAlias = Literal["truncate", "integer"]


def working_size(height: int, width: int, side: int, rule: SizeRule) -> tuple[int, int]:
    """Height and width with a long side of `side` pixels, up as well as down; side 0 keeps the image's own.

    The truncation can lose a pixel, as it does in the official code:

    >>> working_size(370, 1226, 768, "truncate"), working_size(370, 1226, 768, "integer")
    ((231, 767), (231, 768))

    Raises:
        ValueError: a side would have no pixel left.
    """
    if side == 0:
        return height, width
    if rule == "truncate":
        factor = min(side / width, side / height)
        size = int(height * factor), int(width * factor)
    else:
        size = height * side // max(height, width), width * side // max(height, width)
    if min(size) < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no pixel left on its short side at size {side}")
    return size


def to_working(pixels: Tensor, family: Family, side: int, resample: Resample = "bilinear") -> Tensor:
    """Resize images for the network.

    Args:
        pixels: (B, 3, H, W) uint8.
        side: long side in pixels; 0 keeps the size.

    Returns:
        (B, 3, h, w) float32 in about [0, 1] (bicubic can leave it).
    """
    size = working_size(int(pixels.shape[-2]), int(pixels.shape[-1]), side, family.size_rule)
    values = pixels.float()
    if size != tuple(pixels.shape[-2:]):
        values = resize(values, size, resample)
        if family.resized == "uint8":
            values = values.round().clamp(0, 255)
    return values / 255


def resize(values: Tensor, size: tuple[int, int], resample: Resample = "bilinear", *, antialias: bool = True) -> Tensor:
    """Resize (B, C, h, w) maps; nothing is done where the size is right already.

    Raises:
        ValueError: there is no such way of resampling.
    """
    if resample not in get_args(Resample):
        raise ValueError(f"resample must be {', '.join(get_args(Resample))}, got {resample!r}")
    if size == tuple(values.shape[-2:]):
        return values
    if resample.startswith("nearest"):
        return F.interpolate(values, size, mode="nearest-exact")
    return F.interpolate(values, size, mode=resample, align_corners=False, antialias=antialias)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Repeat the right and bottom edges of (B, C, H, W) until both sides are multiples."""
    bottom, right = -pixels.shape[-2] % multiple, -pixels.shape[-1] % multiple
    return F.pad(pixels, (0, right, 0, bottom), mode="replicate") if bottom or right else pixels


def to_image_size(values: Tensor, size: tuple[int, int], family: Family, resample: Resample = "bilinear") -> Tensor:
    """Resize predictions (B, C, h, w) to the image's (H, W) as the family does it."""
    if family.resize_back == "nearest":
        return resize(values, size, "nearest-exact")
    return resize(values, size, resample, antialias=family.resize_back == "antialias")


def stretch(maps: Tensor) -> Tensor:
    """Each sample (C, H, W) of a batch to [0, 1] by its extremes over all its values; a constant one becomes 0."""
    maps = maps.float()
    low, high = maps.amin((-3, -2, -1), keepdim=True), maps.amax((-3, -2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
