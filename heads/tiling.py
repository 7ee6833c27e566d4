"""Very large images: square tiles through the network one batch after the other, blended where they overlap.

A tile of depth knows neither its scale nor its shift. One pass over the whole image at the working size gives every
tile what to fit to; overlapping tiles are then averaged with weights that fall to 0 at their edges. Normals need no
fit. Memory beyond the image and the finished map is that of a batch of tiles and of a band one tile high.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.alignment import fit_scale_shift
from diffrep.backbones import draw_noise
from diffrep.heads.maps import DepthMap, NormalMap, unit_length

if TYPE_CHECKING:
    from diffrep.heads.dense import DenseHead, PredictConfig

_BLOCK = 16  # latent cells: noise is drawn in blocks of this side, so that a place has the same noise in every tile


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start along a side, evenly spaced on multiples of 8, with at least `overlap` pixels in common.

    >>> tile_starts(1000, 512, 128)
    [0, 240, 488]
    """
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    last = side - tile
    return [round(i * last / (count - 1) / 8) * 8 if i < count - 1 else last for i in range(count)]


@torch.no_grad()
def predict_tiled(
    head: DenseHead, pixels: Tensor, config: PredictConfig, *, into: np.ndarray | None = None
) -> DepthMap | NormalMap:
    """Predict the map of one large image at its own resolution.

    Args:
        pixels: (3, H, W) uint8.
        config: `tile` and `overlap` count, `size` is that of the pass over the whole image (depth only).
        into: (H, W) or (3, H, W) float32, for example a `np.memmap`, that the map is written to; it is the values of
            the result.
    """
    assert config.tile is not None
    tile = config.tile // 8 * 8
    height, width = pixels.shape[1:]
    is_depth = head.task != "normals"
    channels = 1 if is_depth else 3
    if into is None:
        into = np.empty((height, width) if is_depth else (channels, height, width), dtype=np.float32)
    rows, columns = (tile_starts(side, tile, int(tile * config.overlap)) for side in (height, width))
    plain = dataclasses.replace(config, size=0, tile=None, official=False)
    whole = head.maps(pixels[None], dataclasses.replace(plain, size=config.size))[0] if is_depth else None

    pending = torch.zeros(channels + 1, 0, width)  # weighted sums, and weights, of rows that a later band still adds to
    for top, below in zip(rows, [*rows[1:], height], strict=True):
        bottom = min(top + tile, height)
        band = F.pad(pending, (0, 0, 0, bottom - top - pending.shape[1]))
        for start in range(0, len(columns), config.batch_size):
            lefts = columns[start : start + config.batch_size]
            crops = torch.stack([pixels[:, top:bottom, left : left + tile] for left in lefts])
            for left, values in zip(lefts, _tile_maps(head, crops, top, lefts, plain), strict=True):
                if whole is not None:
                    values = _fitted(values, _window(whole, (height, width), (top, left), values.shape[1:]))
                shown = slice(left, left + values.shape[2])
                weight = blend_weight(slice(top, bottom), shown, (height, width))
                band[:-1, :, shown] += weight * values
                band[-1, :, shown] += weight
        finished, pending = band[:, : below - top], band[:, below - top :]
        finished = finished[:-1] / finished[-1]
        finished = finished[0].clamp(0, 1) if is_depth else unit_length(finished, head.family.frame)
        into[..., top:below, :] = finished.numpy()
    return head.wrap(torch.from_numpy(into), dataclasses.replace(config, tile=tile))


def _tile_maps(head: DenseHead, crops: Tensor, top: int, lefts: list[int], config: PredictConfig) -> list[Tensor]:
    """Maps (1 or 3, h, w) of tiles of one row; noise belongs to the place in the image, not to the tile."""
    stride, starts_from_noise = head.model.stride, head.family.first_latent == "noise"
    if not starts_from_noise and config.posterior == "mean":
        return list(head.maps(crops, config)[0].cpu())
    results = []
    for crop, left in zip(crops, lefts, strict=True):
        corner, size = (top // stride, left // stride), (-(-crop.shape[1] // stride), -(-crop.shape[2] // stride))
        noise, posterior = (_noise(head.model.channels, corner, size, config.seed, stream) for stream in (0, 1))
        drawn = {"noise": noise if starts_from_noise else None}
        drawn["posterior_noise"] = posterior if config.posterior == "sample" else None
        results.append(head.maps(crop[None], config, **drawn)[0][0].cpu())
    return results


def _noise(channels: int, corner: tuple[int, int], size: tuple[int, int], seed: int, stream: int) -> Tensor:
    """Standard normal noise (1, c, h, w) of a window of an unbounded plane of noise, drawn in blocks."""
    (top, left), (height, width) = corner, size
    rows = range(top // _BLOCK, (top + height - 1) // _BLOCK + 1)
    columns = range(left // _BLOCK, (left + width - 1) // _BLOCK + 1)

    def block(row: int, column: int) -> Tensor:
        return draw_noise((channels, _BLOCK, _BLOCK), seed, 1 + row * 65536 + column, stream=stream)

    plane = torch.cat([torch.cat([block(row, column) for column in columns], 3) for row in rows], 2)
    return plane[..., top % _BLOCK : top % _BLOCK + height, left % _BLOCK : left % _BLOCK + width]


def _window(whole: Tensor, size: tuple[int, int], corner: tuple[int, int], window: tuple[int, ...]) -> Tensor:
    """The part of the small map of the whole image that a window of the large one shows, at the window's size."""
    (height, width), (top, left), (rows, columns) = size, corner, window
    y = (torch.arange(rows) + top + 0.5) / height * 2 - 1
    x = (torch.arange(columns) + left + 0.5) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    return F.grid_sample(whole.float().cpu(), grid, padding_mode="border", align_corners=False)[0]


def _fitted(values: Tensor, target: Tensor) -> Tensor:
    """A tile's depth at the scale and shift of the whole image's.

    Where the tile contradicts the whole (a flat wall: its own range is all noise), its scale is not made negative, and
    only the shift is fitted.
    """
    scale, shift = fit_scale_shift(values, target, torch.ones_like(values, dtype=torch.bool))
    scale = scale.clamp(min=0)
    shift = torch.where(scale > 0, shift, target.mean())
    return values * scale[:, None, None] + shift[:, None, None]


def blend_weight(rows: slice, columns: slice, size: tuple[int, int]) -> Tensor:
    """Weights (h, w) of a tile: squared sines that fall towards each edge beyond which the image of (H, W) goes on."""

    def feather(part: slice, side: int) -> Tensor:
        place = (torch.arange(part.stop - part.start) + 0.5) / (part.stop - part.start)
        weight = torch.ones(len(place))
        for goes_on, distance in ((part.start > 0, place), (part.stop < side, 1 - place)):
            if goes_on:
                weight = weight * torch.sin(torch.pi / 2 * (distance / 0.5).clamp(max=1)).square()
        return weight

    return feather(rows, size[0])[:, None] * feather(columns, size[1])
