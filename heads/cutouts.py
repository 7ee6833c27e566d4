"""What is made of a mask: the object cut out, or set before another background.

A pixel of an outline shows object and background mixed. Cut out as it is, it carries the old background with it as a
halo; so the object's own colour is estimated first: "Approximate Fast Foreground Colour Estimation" (Forte, ICIP 2021).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from diffrep.images import load_image

_RADII = (90, 6)  # pixels, of the two passes of the estimate


def foreground_colours(pixels: Tensor, mask: Tensor) -> Tensor:
    """The object's colour at every pixel, without what shines through of the background.

    Args:
        pixels: (3, H, W) in [0, 1].
        mask: (H, W) in [0, 1].

    Returns:
        (3, H, W) in [0, 1]; where the mask is 1 the pixels themselves.
    """
    alpha = mask[None].to(pixels)
    front = back = pixels
    for radius in _RADII:
        near_front = _blur(front * alpha, radius) / (_blur(alpha, radius) + 1e-5)
        near_back = _blur(back * (1 - alpha), radius) / (_blur(1 - alpha, radius) + 1e-5)
        mixed = alpha * near_front + (1 - alpha) * near_back
        front, back = (near_front + alpha * (pixels - mixed)).clamp(0, 1), near_back.clamp(0, 1)
    return torch.where(alpha >= 1, pixels, front)


def _blur(values: Tensor, radius: int) -> Tensor:
    """Mean over a square of 2 radius + 1 pixels, of those that lie in the image."""
    for axis in (1, 2):
        side = values.shape[axis]
        total = F.pad(values.double().cumsum(axis), (1, 0) if axis == 2 else (0, 0, 1, 0))
        place = torch.arange(side, device=values.device)
        high, low = (place + radius + 1).clamp(max=side), (place - radius).clamp(min=0)
        sums = total.index_select(axis, high) - total.index_select(axis, low)
        values = sums / (high - low).view(-1, *(1,) * (2 - axis))
    return values.float()


def cut_out(image: Image.Image, mask: Tensor, *, estimate: bool = True) -> Image.Image:
    """The object with transparency around it, RGBA.

    Args:
        mask: (H, W) in [0, 1], of the image's size.
        estimate: give outlines the object's own colour; False keeps the image's pixels.

    Raises:
        ValueError: mask and image differ in size.
    """
    colours = _colours(image, mask, estimate)
    return Image.fromarray(_bytes(torch.cat([colours, mask[None].to(colours)])), "RGBA")


def composite(
    image: Image.Image, mask: Tensor, background: str | Image.Image | tuple[int, int, int], *, estimate: bool = True
) -> Image.Image:
    """The object before another background, RGB.

    Args:
        mask: (H, W) in [0, 1], of the image's size.
        background: a colour ("white", "#20c040", (r, g, b)); or an image or the path of one, which is scaled to cover
            the whole and cropped around its centre.

    Raises:
        ValueError: mask and image differ in size, or the background is neither a colour nor an image file.
    """
    colours, alpha = _colours(image, mask, estimate), mask[None].float()
    behind = _pixels(backdrop(background, image.size))
    return Image.fromarray(_bytes(colours * alpha + behind * (1 - alpha)))


def backdrop(background: str | Image.Image | tuple[int, int, int], size: tuple[int, int]) -> Image.Image:
    """A background of (width, height) pixels; see `composite`."""
    if isinstance(background, tuple):
        return Image.new("RGB", size, background)
    if isinstance(background, str):
        try:
            return Image.new("RGB", size, ImageColor.getrgb(background)[:3])
        except ValueError:
            if "." not in background and "/" not in background:
                raise ValueError(
                    f"no colour {background!r}: give a name such as white, a code such as #20c040, or an image file"
                ) from None
        background = load_image(background)
    return ImageOps.fit(background, size, Image.Resampling.LANCZOS)


def grey_image(values: Tensor) -> Image.Image:
    """(H, W) in [0, 1] as 8-bit grey."""
    return Image.fromarray(_bytes(values[None])[..., 0])


def _colours(image: Image.Image, mask: Tensor, estimate: bool) -> Tensor:
    if tuple(mask.shape) != (image.height, image.width):
        raise ValueError(
            f"the mask is {mask.shape[-1]} x {mask.shape[-2]} pixels, the image {image.width} x {image.height}"
        )
    pixels = _pixels(image)
    return foreground_colours(pixels, mask) if estimate else pixels


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _bytes(values: Tensor) -> np.ndarray:
    array: np.ndarray = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return array
