"""Windows on a canvas: where they lie, how much each counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Weighting = Literal["cells", "hann", "gaussian", "uniform"]
DecodeWeighting = Literal["hann", "official"]

Block = tuple[int, np.ndarray]
"""A first line, and lines (n, c, W) from there on."""

LINES = 32  # that are finished together: what is temporary has to fit into memory for the widest of canvases
HANN_FLOOR = 1e-3  # so that what only the border of one window covers is covered at all
BETWEEN = 0.1  # weight, for each axis, of windows between cells in the weighting "cells"


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
            raise ValueError(
                f"the canvas is {self.size[0]} x {self.size[1]}, smaller than one window of {self.window}"
            )
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
    one window; see `between_cells`.
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


def between_cells(weighting: Weighting, plan: WindowPlan) -> float:
    """Factor, for each axis, of the weights of windows that do not begin at a cell.

    At half overlap a cell's own window makes a quarter of it, the windows around it, whose embeddings are mixed with
    the neighbours', the rest: little is left of what a cell was to be. With this factor the windows between cells only
    close the borders, which are as smooth but narrower.
    """
    return BETWEEN if _by_cells(weighting, plan) else 1.0


def told_windows(weighting: Weighting, plan: WindowPlan) -> tuple[list[bool], list[bool]]:
    """Rows and columns of windows that are told their embedding; a window is told it where both are.

    With ``cells`` windows between cells are told nothing. What lies between the embeddings of unrelated cells
    describes nothing that belongs there, and guidance to it strews small objects along the borders: of pictures of
    4 x 4 unrelated scenes, two thirds of the cells were nearest to their own embedding when they were embedded again,
    nine of ten without it (tiny-synthesis). Where a canvas ends within a cell, the last windows, which are flush with
    its end, are all that the cell has, and are told.
    """
    if not _by_cells(weighting, plan):
        return [True] * len(plan.rows), [True] * len(plan.columns)
    rows, columns = (
        [start % plan.window == 0 or start + plan.window == side for start in starts]
        for starts, side in zip((plan.rows, plan.columns), plan.size, strict=True)
    )
    return rows, columns


def _by_cells(weighting: Weighting, plan: WindowPlan) -> bool:
    return weighting == "cells" and plan.window % plan.stride == 0  # otherwise few cells have a window of their own


def decode_weights(window: int, sigma: float = 0.8) -> Tensor:
    """(window, window) float32: exp(-d^2 / sigma^2), d the distance from the centre of [-1, 1]^2, maximum 1."""
    axis = torch.linspace(-1, 1, window) ** 2
    kernel = torch.exp(-(axis[:, None] + axis[None]) / sigma**2)
    return kernel / kernel.max()


class Sweep:
    """Averages windows that come row by row; gives lines as soon as no later window touches them.

    Args:
        weights: (window, window) of the values of a window, an outer product of two profiles.
        channels: of the values.
        strip: (first, behind the last) column of the canvas that is wanted; all where left out.
        between: factor, for each axis, of the weights of windows that do not begin at a multiple of their side.

    Attributes:
        columns: numbers of the columns of windows that touch the strip; only these may be added.
    """

    def __init__(
        self,
        plan: WindowPlan,
        weights: Tensor,
        channels: int,
        *,
        strip: tuple[int, int] | None = None,
        between: float = 1.0,
    ) -> None:
        self.plan, self.weights = plan, weights.numpy()
        height, width = plan.size
        left, right = strip or (0, width)
        self.columns = [k for k, x in enumerate(plan.columns) if x + plan.window > left and x < right]
        self.row, self._left = 0, plan.columns[self.columns[0]]
        self._wanted = slice(left - self._left, right - self._left)
        # a ring of lines: line i of the canvas is line i modulo window here
        reach = plan.columns[self.columns[-1]] + plan.window - self._left
        self.sums = np.zeros((channels, plan.window, reach), np.float32)
        # on a product of places the sum of weights is a product too: no canvas of counts is needed
        centre = self.weights[plan.window // 2]
        profile = centre / np.sqrt(centre[plan.window // 2])
        self._down, self._across = np.zeros(height, np.float32), np.zeros(width, np.float32)
        self._factors = tuple(
            [1.0 if start % plan.window == 0 else between for start in starts] for starts in (plan.rows, plan.columns)
        )
        for starts, totals, factors in zip(
            (plan.rows, plan.columns), (self._down, self._across), self._factors, strict=True
        ):
            for start, factor in zip(starts, factors, strict=True):
                totals[start : start + plan.window] += profile * factor
        self._across = self._across[left:right]

    @property
    def carry(self) -> np.ndarray:
        """Sums of the lines that later rows of windows touch, for `resume`."""
        return self.sums

    def resume(self, row: int, carry: np.ndarray) -> None:
        """Go on with a row of windows where another sweep ended the one before."""
        self.row, self.sums = row, carry

    def add(self, row: int, column: int, values: np.ndarray) -> list[Block]:
        """Add a window (c, window, window); windows come in the order of rows and columns.

        Returns:
            What `end_row` gives, where this is the first window of a new row.
        """
        ready = list(self.end_row()) if row != self.row else []
        window, top, left = self.plan.window, self.plan.rows[row], self.plan.columns[column] - self._left
        factor = np.float32(self._factors[0][row] * self._factors[1][column])
        split, weighted = window - top % window, self.weights * factor * values
        self.sums[:, top % window :, left : left + window] += weighted[:, :split]
        self.sums[:, : top % window, left : left + window] += weighted[:, split:]
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
            found = sums[:, :, self._wanted] / self._down[top:stop, None] / self._across
            sums[:] = 0
            yield top, np.ascontiguousarray(found.swapaxes(0, 1))
            top = stop
        self.row += 1
