"""How an image goes through a head: in tiles where it is very large, at the size of its family, in an ensemble.

Very large images go as square tiles through the network, one batch after the other, blended where they overlap.

A tile of depth knows neither its scale nor its shift. One pass over the whole image at the working size gives every
tile what to fit to; overlapping tiles are then averaged with weights that fall to 0 at their edges. Normals need no
fit. Memory beyond the image and the finished map is that of a batch of tiles and of a band one tile high.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.alignment import fit_scale_shift
from diffrep.backbones import draw_noise
from diffrep.heads.families import Family
from diffrep.heads.maps import DepthMap, NormalMap, unit_length
from diffrep.settings import check

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


# -- Bringing an image to the size that a one-step head sees, and its map back, by the rule of the family ----


Resample: TypeAlias = Literal["bilinear", "bicubic", "nearest", "nearest-exact"]
"""As the official programs call them; "nearest" is "nearest-exact", the value under the pixel's centre, unless a family
says otherwise."""
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
        values = resize(values, size, resample, nearest=family.nearest)
        if family.resized == "uint8":
            values = values.round().clamp(0, 255)
    return values / 255


def resize(
    values: Tensor,
    size: tuple[int, int],
    resample: Resample = "bilinear",
    *,
    antialias: bool = True,
    nearest: str = "nearest-exact",
) -> Tensor:
    """Resize (B, C, h, w) maps; nothing is done where the size is right already.

    Args:
        nearest: what "nearest" means, in torch's names.

    Raises:
        ValueError: there is no such way of resampling.
    """
    if resample not in get_args(Resample):
        raise ValueError(f"resample must be {', '.join(get_args(Resample))}, got {resample!r}")
    if size == tuple(values.shape[-2:]):
        return values
    if resample.startswith("nearest"):
        return F.interpolate(values, size, mode=nearest if resample == "nearest" else resample)
    return F.interpolate(values, size, mode=resample, align_corners=False, antialias=antialias)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Repeat the right and bottom edges of (B, C, H, W) until both sides are multiples."""
    bottom, right = -pixels.shape[-2] % multiple, -pixels.shape[-1] % multiple
    return F.pad(pixels, (0, right, 0, bottom), mode="replicate") if bottom or right else pixels


def to_image_size(values: Tensor, size: tuple[int, int], family: Family, resample: Resample = "bilinear") -> Tensor:
    """Resize predictions (B, C, h, w) to the image's (H, W) as the family does it."""
    if family.resize_back == "nearest":
        return resize(values, size, "nearest-exact")
    return resize(values, size, resample, antialias=family.resize_back == "antialias", nearest=family.nearest)


def stretch(maps: Tensor) -> Tensor:
    """Each sample (C, H, W) of a batch to [0, 1] by its extremes over all its values; a constant one becomes 0."""
    maps = maps.float()
    low, high = maps.amin((-3, -2, -1), keepdim=True), maps.amax((-3, -2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


# -- Many predictions of one image made one: aligned, averaged, with a map of their disagreement -------------
# The published alignment (Marigold, arXiv 2312.02145, eq. 6) minimises the distances of all pairs under a weak pull
# towards the range [0, 1]. Where members disagree by more than that pull weighs, its minimum is the collapse of all
# scales to 0; the released codes are saved from it by differences in float32 that are mostly rounding, or by stopping
# after two iterations. Their variants are presets here, for the published numbers; the default aligns by least squares.


@dataclass(frozen=True, kw_only=True)
class DepthEnsemble:
    """How depth predictions with their own scale and shift are brought together."""

    method: Literal["least squares", "pairs"] = (
        "least squares"  # fit every member to the median of all; or as published
    )
    reduction: Literal["median", "mean"] = "median"  # of the aligned members, over each pixel
    shift: bool = True  # members have their own shift; without, only their own scale
    # of the published fit:
    regularizer: float = 0.02  # weight of the distance of the result from the range [0, 1]
    iterations: int = 50  # of BFGS
    tolerance: float = 1e-6  # at which BFGS stops
    # of the solver's values and of its objective; in float32 its numerical gradient takes wider steps
    precision: Literal["float64", "float32"] = "float64"
    pairs: Literal["each", "together"] = "each"  # root mean square of each pair, summed; or once over all pairs
    fit_size: int | None = 1024  # the fit reads maps at most this long, by nearest subsampling; None: whole
    size_rule: SizeRule = "truncate"  # of the subsampled size

    def __post_init__(self) -> None:
        check(self)


MARIGOLD_ENSEMBLE = DepthEnsemble(method="pairs")
DIFFUSERS_ENSEMBLE = DepthEnsemble(method="pairs", iterations=2, tolerance=1e-3, size_rule="integer")
E2E_ENSEMBLE = DepthEnsemble(
    method="pairs", iterations=2, tolerance=1e-3, precision="float32", pairs="together", fit_size=None
)


def ensemble_depth(members: Tensor, settings: DepthEnsemble | None = None) -> tuple[Tensor, Tensor]:
    """Align E predictions of one image and reduce them.

    Args:
        members: (E, H, W), affine-invariant depth or disparity; not negative where `settings.shift` is False.
        settings: `DepthEnsemble()` where None.

    Returns:
        (H, W) in [0, 1], and its uncertainty (H, W): the median absolute deviation of the aligned members from it, or
        their standard deviation where they are averaged, in the same unit (NaN where there is one member).

    Raises:
        ValueError: no member, or another shape.
    """
    if members.ndim != 3 or not len(members):
        raise ValueError(f"an ensemble needs (E, H, W) with at least one member, got {tuple(members.shape)}")
    members, settings = members.float(), settings or DepthEnsemble()
    pairs = settings.method == "pairs"
    aligned = _aligned_pairs(members, settings) if pairs else _aligned_to_median(members, settings.shift)
    result, uncertainty = _reduce(aligned, settings.reduction)
    low = result.min() if settings.shift else result.new_zeros(())
    extent = (result.max() - low).clamp(min=1e-6)
    return (result - low) / extent, uncertainty / extent


def ensemble_normals(members: Tensor, reduction: Literal["closest", "mean"] = "closest") -> tuple[Tensor, Tensor]:
    """Bring E normal maps of one image together.

    Args:
        members: (E, 3, H, W), about unit length.
        reduction: "closest" takes the member nearest to the mean direction at each pixel, "mean" that direction.

    Returns:
        (3, H, W), and (H, W) the mean angle between members and mean direction, divided by pi.

    Raises:
        ValueError: no member, or another shape.
    """
    if members.ndim != 4 or members.shape[1] != 3 or not len(members):
        raise ValueError(f"an ensemble needs (E, 3, H, W) with at least one member, got {tuple(members.shape)}")
    mean = members.mean(0)
    mean = mean / mean.norm(dim=0).clamp(min=1e-6)
    cosine = (members * mean).sum(1).clamp(-1, 1)
    uncertainty = cosine.arccos().mean(0) / math.pi
    if reduction == "mean":
        return mean, uncertainty
    nearest = cosine.argmax(0)[None, None].expand(1, 3, -1, -1)
    return members.gather(0, nearest)[0], uncertainty


def _aligned_to_median(members: Tensor, shift: bool, rounds: int = 5) -> Tensor:
    """Every member with the scale (and shift) that brings it nearest to the median of all, which spans [0, 1]."""
    middle = members
    for _ in range(rounds + 1):
        low = middle.amin((-2, -1), keepdim=True) if shift else middle.new_zeros(())
        middle = (middle - low) / (middle.amax((-2, -1), keepdim=True) - low).clamp(min=1e-6)
        middle = (middle.median(0).values if middle.ndim == 3 else middle).expand_as(members)
        if shift:
            scale, offset = fit_scale_shift(members, middle, torch.ones_like(members, dtype=torch.bool))
        else:
            scale = (members * middle).sum((1, 2)) / members.square().sum((1, 2)).clamp(min=1e-12)
            offset = torch.zeros_like(scale)
        aligned = members * scale[:, None, None] + offset[:, None, None]
        middle = aligned.median(0).values
    return aligned


def _aligned_pairs(members: Tensor, settings: DepthEnsemble) -> Tensor:
    """Members at the scale and shift that BFGS with numerical gradients gives them, as in the official code."""
    from scipy.optimize import minimize

    height, width = members.shape[-2:]
    small = members
    if settings.fit_size is not None and max(height, width) > settings.fit_size:
        size = working_size(height, width, settings.fit_size, settings.size_rule)
        small = resize(members[None], size, "nearest")[0]
    count, dtype = len(small), np.dtype(settings.precision)
    low, high = small.flatten(1).min(1).values, small.flatten(1).max(1).values
    scale = 1 / (high - (low if settings.shift else 0)).clamp(min=1e-6)
    start = torch.cat([scale, -scale * low]) if settings.shift else scale
    first, second = torch.combinations(torch.arange(count)).T

    def aligned_by(parameters: np.ndarray, maps: Tensor) -> Tensor:
        scales = maps.new_tensor(parameters[:count])[:, None, None]
        return maps * scales + (maps.new_tensor(parameters[count:])[:, None, None] if settings.shift else 0)

    def cost(parameters: np.ndarray) -> np.floating[Any]:
        aligned = aligned_by(parameters, small)
        if settings.pairs == "each":
            pairs = zip(first, second, strict=True)
            distance = sum(float((aligned[i] - aligned[j]).square().mean().sqrt()) for i, j in pairs)
        else:  # of one member there are none
            distance = float((aligned[first] - aligned[second]).square().mean().sqrt()) if count > 1 else 0.0
        if settings.regularizer:
            result, _ = _reduce(aligned, settings.reduction)
            distance += settings.regularizer * (float(result.min().abs()) + float((1 - result.max()).abs()))
        return dtype.type(distance)

    options = {"maxiter": settings.iterations, "disp": False}
    start_values = start.cpu().numpy().astype(dtype)
    solved = minimize(cost, start_values, method="BFGS", tol=settings.tolerance, options=options)
    return aligned_by(solved.x, members)


def _reduce(aligned: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(H, W), and its uncertainty: the standard deviation, or the median absolute deviation."""
    if reduction == "mean":
        mean = aligned.mean(0)
        return mean, aligned.std(0) if len(aligned) > 1 else torch.full_like(mean, math.nan)
    result = aligned.median(0).values
    return result, (aligned - result).abs().median(0).values
