"""Canvases larger than memory, and runs that can be killed.

A canvas is an array of lines, in memory or in a file that is read and written by lines; nothing is mapped, so that
memory use does not grow with the file.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.files import one_line, read_document, sweep_partials, write_document, write_whole
from diffrep.synthesis.windows import RowSweep

STAGES = ("denoise", "decode", "done")


class Lines:
    """An array (lines, ...) that is read and written by consecutive lines.

    Args:
        path: of a raw file, made where missing; None: in memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, path: Path | None = None) -> None:
        self.shape, self.dtype, self.path = shape, np.dtype(dtype), path
        self._bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        if path is None:
            self._array = np.zeros(shape, self.dtype)
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, shape[0] * self._bytes)

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

    stage: str = "denoise"  # of `STAGES`
    step: int = 0
    row: int = 0


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
        """An array of the run by its name."""
        if name not in self._open:
            self._open[name] = Lines(shape, dtype, None if self.folder is None else self._inside(f"{name}.raw"))
        return self._open[name]

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
        note = {"stage": position.stage, "step": position.step, "row": position.row, "carry": name}
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
            stage, step, row, carry = (note[name] for name in ("stage", "step", "row", "carry"))
            number = None if carry is None else re.fullmatch(r"carry-(\d{1,9})\.npy", carry)
            if stage not in STAGES or min(step, row) < 0 or (carry is not None and number is None):
                raise ValueError(f"it has stage {stage!r}, step {step!r}, row {row!r}, carry {carry!r}")
            self.position = Position(stage, int(step), int(row))
            if number is not None:
                self.carry = np.load(self._inside(carry), allow_pickle=False)
                self._number = int(number[1])
        except (KeyError, TypeError, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{file}: is damaged ({one_line(error)}): delete the folder to begin again") from None

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
