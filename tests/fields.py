"""Descriptors with known answers, for tests of fusion and matching."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from diffrep.backbones import Grid
from diffrep.features import FeatureMaps
from diffrep.images import Sizing, fit_image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_maps(
    image_size: tuple[int, int], cells: tuple[int, int], sizing: Sizing, *, channels: int = 64, seed: int = 0
) -> FeatureMaps:
    """Independent features at every cell of a canvas that an image of (H, W) pixels was brought to."""
    _, placement = fit_image(Image.new("RGB", (image_size[1], image_size[0])), sizing)
    values = torch.randn(1, channels, *cells, generator=generator(seed))
    return FeatureMaps({"a": values}, (placement,), {"a": Grid.covering(placement.canvas_size, cells)})


def smooth_field(places: Tensor, *, channels: int = 96, length: float = 30.0, seed: int = 0) -> Tensor:
    """Features (..., channels) that change slowly with the place (..., 2), over about `length` units.

    Neighbouring cells differ so little that a product in reduced precision mistakes one for another.
    """
    waves = torch.randn(channels, 2, generator=generator(seed)) / length
    phases = torch.rand(channels, generator=generator(seed + 1)) * 2 * torch.pi
    return torch.cos(places.float() @ waves.T + phases)
