"""The crops of guided-diffusion's data loader, which the probes on ADM networks were trained and tested with.

Large images are halved with a box filter before one bicubic resize, then cropped to a square.
"""

from __future__ import annotations

import math
from random import Random

from PIL import Image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image whose short side has been brought to `size` pixels."""
    image = _shrink(image, size)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(image: Image.Image, size: int, random: Random, *, least: float = 0.8) -> Image.Image:
    """A random square of an image whose short side has been brought to a random length.

    Args:
        random: gives the short side, drawn from [size, ceil(size / least)], then the top, then the left edge.
        least: the smallest share of the short side that the crop shows.
    """
    image = _shrink(image, random.randrange(size, math.ceil(size / least) + 1))
    top = random.randrange(image.height - size + 1)
    left = random.randrange(image.width - size + 1)
    return _crop(image, left, top, size)


def _shrink(image: Image.Image, short: int) -> Image.Image:
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))
