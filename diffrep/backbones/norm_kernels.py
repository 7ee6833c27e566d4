"""Group normalisation of channels-last maps with SiLU behind it, and what else residual blocks do, as Triton kernels.

PyTorch's group norm wants contiguous maps on CUDA and cuDNN's fast convolutions channels-last ones: between the two,
every residual block of a U-Net or VAE copies its maps four times. Here maps stay channels-last and are read twice and
written once for normalisation, the embedding of time, and activation together. All sums are float32, of values around
their mean.

Imported where there is a CUDA device only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64  # channels of a program
ROWS = 64  # cells of a step of a program
TILES = 64  # tiles that the finishing kernel reads at once, fewer where groups are wider than 512 channels
BLOCK = 1024  # elements of a program of the kernels that look at one element at a time


@triton.jit  # type: ignore[untyped-decorator]  # Triton declares no types
def _moments(x, means, squares, rows, channels, span, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and sum of squared differences of each channel over each span of cells: (N, tiles, C)."""
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < channels
    end = tl.minimum((tile + 1) * span, rows)
    # differences to the first cell: near enough to the mean that nothing cancels
    pivot = tl.load(x + (image * rows + tile * span) * channels + columns, mask=known, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    powers = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tile * span, end, ROWS):
        cells = start + tl.arange(0, ROWS)
        inside = (cells < end)[:, None] & known[None, :]
        at = image * rows * channels + cells[:, None].to(tl.int64) * channels + columns[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, values - pivot[None, :], 0.0)
        sums += apart
        powers += apart * apart
    count = (end - tile * span).to(tl.float32)
    total = tl.sum(sums, 0)
    mean = pivot + total / count
    square = tl.sum(powers, 0) - total * total / count
    at = (image * tiles + tile) * channels + columns
    tl.store(means + at, mean, mask=known)
    tl.store(squares + at, square, mask=known)


@triton.jit  # type: ignore[untyped-decorator]  # Triton declares no types
def _factors(  # type: ignore[no-untyped-def]
    means,
    squares,
    weight,
    bias,
    added,
    step,
    scales,
    shifts,
    rows,
    channels,
    width,
    span,
    tiles,
    eps,
    ADDED: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Scale and shift of each channel of one group, (N, C), from the moments of its tiles."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = group * width + tl.arange(0, WIDTH)
    known = tl.arange(0, WIDTH) < width
    numbers = rows * 1.0 * width  # more than 2^31 in the widest maps
    extra = tl.zeros([WIDTH], tl.float32)
    if ADDED:
        extra = tl.load(added + image * step + columns, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros([TILES, WIDTH], tl.float32)
    for first in range(0, tiles, TILES):
        number = first + tl.arange(0, TILES)
        inside = (number < tiles)[:, None] & known[None, :]
        at = (image * tiles + number[:, None]) * channels + columns[None, :]
        counts = tl.minimum(span, rows - number * span).to(tl.float32)[:, None]
        total += tl.where(inside, (tl.load(means + at, mask=inside, other=0.0) + extra[None, :]) * counts, 0.0)
    mean = tl.sum(tl.sum(total, 0), 0) / numbers
    total = tl.zeros([TILES, WIDTH], tl.float32)
    for first in range(0, tiles, TILES):
        number = first + tl.arange(0, TILES)
        inside = (number < tiles)[:, None] & known[None, :]
        at = (image * tiles + number[:, None]) * channels + columns[None, :]
        counts = tl.minimum(span, rows - number * span).to(tl.float32)[:, None]
        apart = tl.load(means + at, mask=inside, other=0.0) + extra[None, :] - mean
        total += tl.where(inside, tl.load(squares + at, mask=inside, other=0.0) + apart * apart * counts, 0.0)
    variance = tl.sum(tl.sum(total, 0), 0) / numbers
    scale = tl.load(weight + columns, mask=known, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    shift = tl.load(bias + columns, mask=known, other=0.0).to(tl.float32) + (extra - mean) * scale
    tl.store(scales + image * channels + columns, scale, mask=known)
    tl.store(shifts + image * channels + columns, shift, mask=known)


@triton.jit  # type: ignore[untyped-decorator]  # Triton declares no types
def _apply(x, y, scales, shifts, rows, channels, ACTIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x * scale + shift, then SiLU."""
    image = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    cells = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = columns < channels
    scale = tl.load(scales + image * channels + columns, mask=known, other=0.0)
    shift = tl.load(shifts + image * channels + columns, mask=known, other=0.0)
    inside = (cells < rows)[:, None] & known[None, :]
    at = image * rows * channels + cells[:, None].to(tl.int64) * channels + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if ACTIVE:
        values = values * tl.sigmoid(values)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, added: Tensor | None = None, silu: bool = False
) -> Tensor:
    """Group normalisation of x (+ `added` per channel), then SiLU where asked for.

    Args:
        x: (N, C, H, W), copied to channels-last where it is not; float32, float16 or bfloat16.
        weight, bias: (C,).
        added: (N or 1, C), what is added to every cell of x first.

    Returns:
        (N, C, H, W), channels-last, in the type of x.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    added = None if added is None else added.contiguous().expand(images, -1)
    rows, parts = height * width, triton.cdiv(channels, COLUMNS)
    # enough programs to fill a card: each goes over a span of cells, at most 512 of them
    span = ROWS * triton.cdiv(triton.cdiv(rows, ROWS), 512)
    tiles = triton.cdiv(rows, span)
    moments = torch.empty(2, images, tiles, channels, dtype=torch.float32, device=x.device)
    factors = torch.empty(2, images, channels, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x)
    grid: Any = (tiles, parts, images)
    _moments[grid](x, moments[0], moments[1], rows, channels, span, tiles, ROWS=ROWS, COLUMNS=COLUMNS)
    of_group = channels // groups
    width_of_group = 8
    while width_of_group < of_group:  # few sizes, for each is compiled
        width_of_group *= 4
    _factors[(groups, images)](
        moments[0],
        moments[1],
        weight,
        bias,
        weight if added is None else added,
        0 if added is None else added.stride(0),
        factors[0],
        factors[1],
        rows,
        channels,
        of_group,
        span,
        tiles,
        eps,
        ADDED=added is not None,
        TILES=min(TILES, max(1, 512 * TILES // width_of_group)),
        WIDTH=width_of_group,
    )
    grid = (triton.cdiv(rows, ROWS), parts, images)
    _apply[grid](x, y, factors[0], factors[1], rows, channels, ACTIVE=silu, ROWS=ROWS, COLUMNS=COLUMNS)
    return y


@triton.jit  # type: ignore[untyped-decorator]  # Triton declares no types
def _join(x, y, bias, z, count, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """z = x + y + bias, channels running fastest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(x + at, mask=inside).to(tl.float32) + tl.load(y + at, mask=inside).to(tl.float32)
    total += tl.load(bias + at % channels, mask=inside).to(tl.float32)
    tl.store(z + at, total.to(z.dtype.element_ty), mask=inside)


def join(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias of maps (N, C, H, W), rounded once: the end of a residual block. Channels-last."""
    x, y = (maps.contiguous(memory_format=torch.channels_last) for maps in (x, y))
    z = torch.empty_like(x)
    _join[(triton.cdiv(x.numel(), BLOCK),)](x, y, bias, z, x.numel(), x.shape[1], BLOCK=BLOCK)
    return z


@triton.jit  # type: ignore[untyped-decorator]  # Triton declares no types
def _gated(x, y, count, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = first half * GELU(second half) of each row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    first = at // width * (2 * width) + at % width
    value = tl.load(x + first, mask=inside).to(tl.float32)
    gate = tl.load(x + first + width, mask=inside).to(tl.float32)
    value = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def gated_gelu(x: Tensor) -> Tensor:
    """GEGLU behind its projection: (..., 2 C) -> (..., C), the first half times the exact GELU of the second."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    _gated[(triton.cdiv(y.numel(), BLOCK),)](x, y, y.numel(), width, BLOCK=BLOCK)
    return y
