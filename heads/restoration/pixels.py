"""What restoration does to pixels before and behind the network: resizing as published, colours, blended tiles.

Sources: MATLAB's `imresize`; StableSR's colour fix (arXiv 2305.07015), whose wavelet form OSEDiff, PiSA-SR and S3Diff
use too; OSEDiff's latent tiles (arXiv 2406.08177).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.guidance.operators import cubic, tap_matrix

Colours: TypeAlias = Literal["wavelet", "low-band", "adain", "none"]
WAVELET_LEVELS = 5
WAVELET_REACH = 2**WAVELET_LEVELS - 1  # pixels that a value of the low band looks away


def imresize(images: Tensor, scale: float, *, antialias: bool = True) -> Tensor:
    """Bicubic resize as MATLAB's `imresize`: a = -0.5, edges mirrored, sides ceil(side * scale), not clamped.

    Args:
        images: (..., H, W) float.
        antialias: widen the kernel where the image shrinks.
    """
    shrink = scale if antialias and scale < 1 else 1.0
    for dim in (-2, -1):
        side = images.shape[dim]
        places = (torch.arange(math.ceil(side * scale), dtype=torch.float64) + 0.5) / scale - 0.5
        weights = tap_matrix(side, places, 2 / shrink, lambda far: cubic(far * shrink)).to(images)
        images = torch.tensordot(images, weights, dims=([dim], [1])).movedim(-1, dim)
    return images


def low_band(images: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """What is left of (B, C, H, W) after `levels` blurs, each twice as wide as the one before."""
    for level in range(levels):
        reach = 2**level
        for dim, around in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):  # [1 2 1] / 4, with gaps
            wide, side = F.pad(images, around, mode="replicate"), images.shape[dim]
            ends = wide.narrow(dim, 0, side) + wide.narrow(dim, 2 * reach, side)
            images = ends.mul_(0.25).add_(wide.narrow(dim, reach, side), alpha=0.5)
    return images


def wavelet_colours(restored: Tensor, reference: Tensor) -> Tensor:
    """The details of one image on the low band of another, (B, 3, H, W) both; not clamped."""
    return restored - low_band(restored) + low_band(reference)


def low_band_colours(restored: Tensor, reference: Tensor) -> Tensor:
    """As `wavelet_colours`, in [0, 1], but with a low band that is the reference's indeed.

    The published formula leaves a quarter of the difference at the frequencies where its two bands meet, since a blur
    of a blur is not the blur. Here the difference is blurred and taken away several times, by Chebyshev's steps, which
    leave least of what a blur passes; what is cut off at 0 and 1 is made up for in the next round.
    """
    for _ in range(_ROUNDS):
        for step in _LOW_BAND_STEPS:
            restored = restored - step * low_band(restored - reference)
        restored = restored.clamp(0, 1)
    return restored


def _chebyshev(count: int) -> list[float]:
    """Steps w for which x prod (1 - w x) of degree count + 1, of slope 1 at 0, is least on [0, 1]."""
    zeros = [math.cos((2 * k + 1) * math.pi / (2 * count + 2)) for k in range(count + 1)]
    return [(1 + zeros[0]) / (zeros[0] - zero) for zero in zeros[1:]]


_ROUNDS, _LOW_BAND_STEPS = 4, _chebyshev(4)
REACH = {"wavelet": WAVELET_REACH, "low-band": _ROUNDS * len(_LOW_BAND_STEPS) * WAVELET_REACH, "adain": 0}  # pixels


def adain_colours(restored: Tensor, reference: Tensor) -> Tensor:
    """An image with the mean and spread of another in each channel, (B, 3, H, W) both; not clamped."""
    (mean, spread), (wanted, breadth) = (channel_statistics(image) for image in (restored, reference))
    return (restored - mean) / spread * breadth + wanted


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (B, C, 1, 1); the variance unbiased, plus 1e-5."""
    variance, mean = torch.var_mean(images, (-2, -1), keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] to uint8 as torchvision's `ToPILImage` does it in the released programs: clamped, cut, not rounded."""
    return (images.clamp(0, 1) * 255).to(torch.uint8)


def tile_window(rows: int, columns: int, *, published: bool = False) -> Tensor:
    """Weights (rows, columns) of a tile: a Gaussian of variance 0.01 of its side, about 1e-6 at the corners.

    Args:
        published: its centre lies half a cell too low, as in OSEDiff, PiSA-SR and S3Diff.
    """

    def line(count: int, middle: float) -> Tensor:
        off = (torch.arange(count, dtype=torch.float64) - middle) / count
        return torch.exp(-off.square() / 0.02) / math.sqrt(2 * math.pi * 0.01)

    return (line(rows, rows / 2 if published else (rows - 1) / 2)[:, None] * line(columns, (columns - 1) / 2)).float()


def windows(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start along a side: every ``tile - overlap``, the last one flush with the border.

    >>> windows(28, 12, 4)
    [0, 8, 16]
    >>> windows(30, 12, 4)
    [0, 8, 16, 18]
    """
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def blended_rows(
    run: Callable[[slice, slice], Tensor], size: tuple[int, int], tile: int, overlap: int, *, step: int = 1,
    published: bool = False,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Bands of a large map that is computed tile by tile, blended where tiles overlap, from top to bottom.

    No more than one row of tiles is in memory, in float32.

    Args:
        run: the map (C, h * step, w * step) of the tile of h rows and w columns of cells.
        size: (H, W) in cells; tile, overlap: in cells. A map narrower than a tile has tiles of its own side that way.
        step: map pixels per cell.
        published: windows as `tile_window` has them, and tiles that stay squares where the map is narrower.

    Yields:
        The first row of the band in the map, and the band (C, rows, W * step).
    """
    if published:
        tile = min(tile, *size)
    rows, columns = windows(size[0], tile, overlap), windows(size[1], tile, overlap)
    high, wide = min(tile, size[0]), min(tile, size[1])
    window = tile_window(high * step, wide * step, published=published)
    pending: Tensor | None = None  # weighted sums, and weights, of rows that later tiles still add to
    for top, below in zip(rows, [*rows[1:], size[0]], strict=True):
        for left in columns:
            values = run(slice(top, top + high), slice(left, left + wide)).float().cpu()
            if pending is None:
                pending = values.new_zeros(len(values) + 1, 0, size[1] * step)
            if (more := high * step - pending.shape[1]) > 0:
                pending = F.pad(pending, (0, 0, 0, more))
            shown = slice(left * step, (left + wide) * step)
            pending[:-1, :, shown] += window * values
            pending[-1, :, shown] += window
        assert pending is not None
        done = (below - top) * step
        yield top * step, pending[:-1, :done] / pending[-1, :done]
        pending = pending[:, done:]
