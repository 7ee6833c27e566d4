"""Windows on a canvas: where they lie, how much each counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["hann", "gaussian", "uniform"]

HANN_FLOOR = 1e-3  # so that what only the border of one window covers is covered at all


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

    def bands(self) -> Iterator[tuple[int, int, int]]:
        """(top of a row of windows, first line, line after the last) that are final when this row has been added."""
        rows = self.rows
        for top, after in zip(rows, (*rows[1:], self.size[0]), strict=True):
            yield top, top, after


def window_weights(weighting: Weighting, window: int) -> Tensor:
    """(window, window) float32 weights of a window's predictions where windows overlap.

    ``uniform`` is the official average (and MultiDiffusion's); ``hann`` a raised cosine, by which seams vanish at half
    overlap; ``gaussian`` that of Mixture of Diffusers: variance 0.01 in units of the side.
    """
    places = torch.arange(window, dtype=torch.float64)
    if weighting == "uniform":
        profile = torch.ones(window, dtype=torch.float64)
    elif weighting == "hann":
        profile = torch.sin(torch.pi * (places + 0.5) / window).square() + HANN_FLOOR
    elif weighting == "gaussian":
        profile = torch.exp(-((places - (window - 1) / 2) ** 2) / (2 * 0.01 * window**2))
    else:
        raise ValueError(f"window weights are hann, gaussian or uniform, not {weighting!r}")
    return torch.outer(profile, profile).float()


def decode_weights(window: int, sigma: float = 0.8) -> Tensor:
    """(window, window) float32: exp(-d^2 / sigma^2), d the distance from the centre of [-1, 1]^2, maximum 1."""
    axis = torch.linspace(-1, 1, window) ** 2
    kernel = torch.exp(-(axis[:, None] + axis[None]) / sigma**2)
    return kernel / kernel.max()
