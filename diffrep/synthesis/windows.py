"""Windows on a canvas: where they lie, how much each counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.synthesis.grids import EmbeddingGrid

Weighting = Literal["cells", "hann", "gaussian", "uniform"]
DecodeWeighting = Literal["hann", "official"]

Block = tuple[int, np.ndarray]
"""A first line, and lines (n, c, W) from there on."""

LINES = 32  # that are finished together: what is temporary has to fit into memory for the widest of canvases
HANN_FLOOR = 1e-3  # so that what only the border of one window covers is covered at all
BETWEEN = 0.1  # weight, for each axis, of windows between unrelated cells in the weighting "cells"
ALIKE = 0.75  # of the way from the cosine of unrelated embeddings to 1, cells are wholly alike


@dataclass(frozen=True)
class WindowPlan:
    """Overlapping square windows that cover a canvas.

    Where the stride does not fit, a last row and column of windows lie flush with the border, so that nothing stays
    uncovered.

    Attributes:
        size: (H, W) of the canvas.
        window: side of a window; not larger than the canvas.
        stride: between neighbouring windows; not larger than a window.

    >>> WindowPlan((10, 4), window=4, stride=4).rows
    (0, 4, 6)
    """

    size: tuple[int, int]
    window: int
    stride: int

    def __post_init__(self) -> None:
        if min(self.size) < self.window:
            raise ValueError(f"the canvas is {self.size[0]} x {self.size[1]}, smaller than one window of {self.window}")
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"the window stride must be in 1..{self.window}, got {self.stride}")

    @property
    def rows(self) -> tuple[int, ...]:
        """Top of each row of windows."""
        return self._starts(self.size[0])

    @property
    def columns(self) -> tuple[int, ...]:
        """Left of each column of windows."""
        return self._starts(self.size[1])

    def _starts(self, side: int) -> tuple[int, ...]:
        last = side - self.window
        return (*range(0, last, self.stride), last)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)


def window_weights(weighting: Weighting, window: int) -> Tensor:
    """(window, window) float32 weights of a window's predictions where windows overlap.

    ``uniform`` is the official average (and MultiDiffusion's); ``hann`` a raised cosine, by which seams vanish at half
    overlap; ``gaussian`` that of Mixture of Diffusers: variance 0.01 in units of the side. ``cells`` is ``hann`` for
    one window; see `window_shares`.
    """
    places = torch.arange(window, dtype=torch.float64)
    if weighting == "uniform":
        profile = torch.ones(window, dtype=torch.float64)
    elif weighting in ("cells", "hann"):
        profile = torch.sin(torch.pi * (places + 0.5) / window).square() + HANN_FLOOR
    elif weighting == "gaussian":
        profile = torch.exp(-((places - (window - 1) / 2) ** 2) / (2 * 0.01 * window**2))
    else:
        raise ValueError(f"window weights are cells, hann, gaussian or uniform, not {weighting!r}")
    return torch.outer(profile, profile).float()


def window_shares(
    weighting: Weighting, plan: WindowPlan, corners: Tensor, grid: EmbeddingGrid, *, unrelated: float
) -> tuple[Tensor, Tensor]:
    """How much windows count where they overlap with others, and how strongly they are guided by their embedding.

    All count and are guided fully but with ``cells``. There a window between cells is so only as far as its cells are
    alike (`EmbeddingGrid.agreement`). What lies between the embeddings of unrelated cells describes nothing that
    belongs there: guidance to it strews small objects along the borders, and at half overlap a cell's window makes
    only a quarter of the cell. Between unrelated cells the windows are therefore without condition and only close the
    borders, with a weight of `BETWEEN` for each axis. Between alike cells, as of one continuous picture, a window
    without condition would paint anything, so it has what lies on both sides.

    Where a canvas ends within a cell, the last windows, which are flush with its end, are all that the cell has, and
    have its condition.

    Args:
        corners: (N, 2) of windows of the plan, row and column.
        unrelated: cosine up to which embeddings are unrelated; from `ALIKE` of the way from there to 1 on, they are
            wholly alike.

    Returns:
        (N,) factors of the weights, and (N,) of guidance, each in 0..1.
    """
    if weighting != "cells" or plan.window % plan.stride:  # otherwise few cells have a window of their own
        return torch.ones(len(corners)), torch.ones(len(corners))
    alike = ((grid.agreement(corners, plan.window) - unrelated) / (ALIKE * (1 - unrelated))).clamp(0, 1)
    between = corners % plan.window != 0
    weight = torch.where(between, BETWEEN + (1 - BETWEEN) * alike[:, None], 1.0).prod(1)
    last = corners + plan.window == torch.tensor(plan.size)
    return weight, torch.where((between & ~last).any(1), alike, 1.0)


def decode_weights(window: int, sigma: float = 0.8) -> Tensor:
    """(window, window) float32: exp(-d^2 / sigma^2), d the distance from the centre of [-1, 1]^2, maximum 1."""
    axis = torch.linspace(-1, 1, window) ** 2
    kernel = torch.exp(-(axis[:, None] + axis[None]) / sigma**2)
    return kernel / kernel.max()


class RowSweep:
    """Averages windows that come row by row; gives lines as soon as no later window touches them.

    Args:
        weights: (window, window) of the values of a window.
        channels: of the values.
        strip: (first, behind the last) column of the canvas that is wanted; all where left out.

    Attributes:
        columns: numbers of the columns of windows that touch the strip; only these may be added.
    """

    def __init__(
        self, plan: WindowPlan, weights: Tensor, channels: int, *, strip: tuple[int, int] | None = None
    ) -> None:
        self.plan, self.weights = plan, weights.numpy()
        left, right = strip or (0, plan.size[1])
        self.columns = [k for k, x in enumerate(plan.columns) if x + plan.window > left and x < right]
        self.row, self._left = 0, plan.columns[self.columns[0]]
        self._wanted = slice(left - self._left, right - self._left)
        # a ring of lines: line i of the canvas is line i modulo window here; the last channel is that of the weights
        reach = plan.columns[self.columns[-1]] + plan.window - self._left
        self.sums = np.zeros((channels + 1, plan.window, reach), np.float32)

    @property
    def carry(self) -> np.ndarray:
        """Sums of the lines that later rows of windows touch, for `resume`."""
        return self.sums

    def resume(self, row: int, carry: np.ndarray) -> None:
        """Go on with a row of windows where another sweep ended the one before."""
        self.row, self.sums = row, carry

    def add(self, row: int, column: int, values: np.ndarray, factor: float = 1.0) -> list[Block]:
        """Add a window (c, window, window); windows come in the order of rows and columns.

        Args:
            factor: of its weights.

        Returns:
            What `end_row` gives, where this is the first window of a new row.
        """
        ready = list(self.end_row()) if row != self.row else []
        window, top, left = self.plan.window, self.plan.rows[row], self.plan.columns[column] - self._left
        split, weights = window - top % window, self.weights * np.float32(factor)
        for sums, weighted in ((self.sums[:-1], weights * values), (self.sums[-1:], weights[None])):
            sums[:, top % window :, left : left + window] += weighted[:, :split]
            sums[:, : top % window, left : left + window] += weighted[:, split:]
        return ready

    def end_row(self) -> Iterator[Block]:
        """All windows of this row were added: the lines that are final now, a few at a time."""
        if self.row == len(self.plan.rows):
            return
        tops = (*self.plan.rows, self.plan.size[0])
        top, after = tops[self.row], tops[self.row + 1]
        while top < after:
            place = top % self.plan.window
            stop = min(after, top + LINES, top - place + self.plan.window)
            sums = self.sums[:, place : place + stop - top]
            means = sums[:-1, :, self._wanted] / sums[-1:, :, self._wanted]
            sums[:] = 0
            yield top, np.ascontiguousarray(means.swapaxes(0, 1))
            top = stop
        self.row += 1
