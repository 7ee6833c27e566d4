"""Canvases larger than memory: the windows on them, their lines, and runs that can be killed.

A canvas is an array of lines, in memory or in a file that is read and written by lines; nothing is mapped, so that
memory use does not grow with the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.files import one_line, read_document, sweep_partials, write_document, write_whole
from diffrep.settings import check
from diffrep.synthesis.grids import EmbeddingGrid

Weighting = Literal["cells", "hann", "gaussian", "uniform"]

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
        check(self)
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


ANEW = "delete the folder to begin again"


class Lines:
    """An array (lines, ...) that is read and written by consecutive lines.

    Args:
        path: of a raw file, made where missing; None: in memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, path: Path | None = None) -> None:
        self.shape, self.dtype, self.path = shape, np.dtype(dtype), path
        self._bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        self.bytes = shape[0] * self._bytes
        if path is None:
            self._array = np.zeros(shape, self.dtype)
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, self.bytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Lines start..stop, (stop - start, ...), a copy."""
        if self.path is None:
            return self._array[start:stop].copy()
        wanted, place, parts = (stop - start) * self._bytes, start * self._bytes, []
        while wanted > 0:
            parts.append(os.pread(self._file, wanted, place))
            if not parts[-1]:
                raise OSError(f"{self.path}: ended at byte {place}: the file was cut from outside")
            wanted, place = wanted - len(parts[-1]), place + len(parts[-1])
        return np.frombuffer(bytearray().join(parts), self.dtype).reshape(stop - start, *self.shape[1:])

    def write(self, start: int, lines: np.ndarray) -> None:
        """Put (n, ...) lines at `start`."""
        if self.path is None:
            self._array[start : start + len(lines)] = lines
            return
        self._write(start * self._bytes, np.ascontiguousarray(lines, self.dtype))

    def _write(self, place: int, values: np.ndarray) -> None:
        left = values.data.cast("B")
        while left:
            written = os.pwrite(self._file, left, place)
            left, place = left[written:], place + written

    def write_at(self, start: int, column: int, lines: np.ndarray) -> None:
        """Put a piece (n, w, ...) of lines at (start, column)."""
        if self.path is None:
            self._array[start : start + len(lines), column : column + lines.shape[1]] = lines
            return
        cell = self._bytes // self.shape[1]
        for number, line in enumerate(np.ascontiguousarray(lines, self.dtype)):
            self._write((start + number) * self._bytes + column * cell, line)

    def tensor(self, start: int, stop: int) -> Tensor:
        """`read` as a tensor."""
        return torch.from_numpy(self.read(start, stop))

    def flush(self) -> None:
        """Bring what was written to the disk."""
        if self.path is not None:
            os.fsync(self._file)

    def close(self) -> None:
        if self.path is not None:
            os.close(self._file)


@dataclass(frozen=True)
class Position:
    """Where a run is: the next row of windows of the next step of a stage."""

    stage: Literal["denoise", "decode", "done"] = "denoise"
    step: int = 0
    row: int = 0

    def __post_init__(self) -> None:
        check(self, step="0..", row="0..")


class Run:
    """The arrays of a run and how far it has come; with a folder it can be killed and goes on.

    Two generations of every array of the canvas are kept, so that lines of the step that was interrupted can be
    written again.

    Args:
        folder: None: in memory, nothing is kept.
        identity: everything on which the result depends; a folder is only taken up for the same.
        seconds: between checkpoints inside a step.

    Raises:
        ValueError: the folder holds a run with another identity.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], *, seconds: float = 20.0) -> None:
        self.folder, self.seconds = folder, seconds
        self.position = Position()
        self.carry: np.ndarray | None = None  # sums of the lines that are not final yet, as of `position`
        self._open: dict[str, Lines] = {}
        self._arrays: dict[str, int] = {}  # name -> bytes, of those that `position` stands on
        self._saved, self._number = time.monotonic(), 0
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        ours = json.loads(json.dumps(dict(identity)))
        file = folder / "run.json"
        if file.is_file():
            theirs = read_document(file)
            changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            if changed:
                raise ValueError(
                    f"{folder}: holds an unfinished run with another {', '.join(changed)}: repeat its command, or"
                    " delete the folder"
                )
            self._resume()
        else:
            write_document(file, ours, sync=True)

    def lines(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Lines:
        """An array of the run by its name; of a run that is taken up, one of the size that it had.

        Raises:
            ValueError: it had another size.
        """
        if name not in self._open:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            if self._arrays.get(name, size) != size:
                raise ValueError(f"{self.folder}: its {name} has {self._arrays[name]:,} bytes, not {size:,}: {ANEW}")
            self._open[name] = Lines(shape, dtype, None if self.folder is None else self._inside(f"{name}.raw"))
        return self._open[name]

    def written(self, name: str, shape: tuple[int, ...]) -> Lines:
        """An array that an earlier step has written, here or before the run was interrupted.

        Raises:
            ValueError: none has: the run was begun where the solver carries less from step to step.
        """
        if name not in self._open and name not in self._arrays:
            raise ValueError(f"{self.folder}: the unfinished run carries no {name}: {ANEW}")
        return self.lines(name, shape)

    def _inside(self, name: str) -> Path:
        """A file of the run's folder, which may have come from somebody else: no link out of it is followed."""
        assert self.folder is not None
        path = self.folder / name
        if path.is_symlink():
            raise ValueError(f"{path}: is a link, a run has plain files only")
        return path

    def take_up(self, sweep: RowSweep, row: int) -> int:
        """Give an interrupted sweep its sums back, once; returns the row of windows that it goes on with."""
        if self.carry is not None:
            sweep.resume(row, self.carry)
            self.carry = None
        return row

    def checkpoint(self, position: Position, carry: np.ndarray | None, *, force: bool = False) -> None:
        """Note how far the run is, if the last note is old enough."""
        self.position = position
        if self.folder is None or not (force or time.monotonic() - self._saved >= self.seconds):
            return
        for lines in self._open.values():
            lines.flush()
        self._number += 1
        name = None
        if carry is not None:
            name, sums = f"carry-{self._number}.npy", carry
            write_whole(self.folder / name, lambda partial: np.save(partial, sums), sync=True)
        note = {
            "stage": position.stage, "step": position.step, "row": position.row, "carry": name,
            "arrays": self._arrays | {key: lines.bytes for key, lines in self._open.items()},
        }  # fmt: skip
        write_document(self.folder / "progress.json", note, sync=True)
        for old in self.folder.glob("carry-*.npy"):
            if old.name != name:
                old.unlink()
        self._saved = time.monotonic()

    def _resume(self) -> None:
        assert self.folder is not None
        file = self.folder / "progress.json"
        if not file.is_file():
            return
        note = read_document(file)
        try:
            stage, step, row, carry, arrays = (note[name] for name in ("stage", "step", "row", "carry", "arrays"))
            number = None if carry is None else re.fullmatch(r"carry-(\d{1,9})\.npy", carry)
            if carry is not None and number is None:
                raise ValueError(f"its carry is {carry!r}")
            self.position, self._arrays = Position(stage, step, row), dict(arrays)
            for name, size in self._arrays.items():
                raw = self._inside(Path(f"{name}.raw").name)
                if raw.stat().st_size != size:
                    raise ValueError(f"{raw.name} has {raw.stat().st_size:,} bytes, not {size!r}")
            if number is not None:
                self.carry = np.load(self._inside(carry), allow_pickle=False)
                self._number = int(number[1])
        except (KeyError, TypeError, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{file}: is damaged ({one_line(error)}): {ANEW}") from None

    def close(self, *, delete: bool = False) -> None:
        """Close the files; `delete` removes the folder with everything in it that a run makes."""
        for lines in self._open.values():
            lines.close()
        self._open.clear()
        if delete and self.folder is not None:
            for pattern in ("*.raw", "carry-*.npy", "run.json", "progress.json"):
                for file in self.folder.glob(pattern):
                    file.unlink()
            sweep_partials(self.folder)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
