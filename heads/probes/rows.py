"""Matrices of features that need not fit into memory: memory-mapped pieces, read block by block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

Matrix: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_TYPES = {"F16": np.float16, "F32": np.float32}
BLOCK_BYTES = 2**27  # of float32 that are in memory at once
HELD_BYTES = 2**30  # a matrix that is smaller is read once and held


class FeatureRows(Protocol):
    """N rows of D numbers."""

    @property
    def width(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        """Some rows, (n, D) float32, in the order given."""
        ...


def map_tensor(file: Path, name: str) -> Matrix:
    """A matrix of a safetensors file, memory-mapped, read only.

    Raises:
        ValueError: the file is damaged, or has no such matrix.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        about = header[name]
        start, end = about["data_offsets"]
        if file.stat().st_size < 8 + length + end:
            raise ValueError("it is truncated")
        return np.memmap(file, _TYPES[about["dtype"]], "r", 8 + length + start, tuple(about["shape"]))
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{file}: no matrix {name!r} can be read ({error}); delete it to have it made again") from None


class MappedRows:
    """Rows that lie in several memory-mapped matrices of one width."""

    def __init__(self, pieces: Sequence[Matrix]) -> None:
        if not pieces or len({piece.shape[1] for piece in pieces}) != 1:
            raise ValueError(f"pieces must be matrices of one width, got {[piece.shape for piece in pieces]}")
        self.pieces = tuple(pieces)
        self.starts = np.cumsum([0, *(len(piece) for piece in pieces)])

    @property
    def width(self) -> int:
        return int(self.pieces[0].shape[1])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, rows: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        wanted = np.asarray(rows, dtype=np.int64)
        out = np.empty((len(wanted), self.width), dtype=np.float32)
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        for piece in np.unique(owner):
            here = owner == piece
            out[here] = self.pieces[piece][wanted[here] - self.starts[piece]]
        return torch.from_numpy(out)


class HeldRows:
    """Rows in memory."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.float()

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def read(self, rows: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        return self.values[torch.as_tensor(np.asarray(rows, dtype=np.int64))]


class SideBySide:
    """The columns of several matrices of the same rows: features of several cells, fused."""

    def __init__(self, parts: Sequence[FeatureRows]) -> None:
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"parts must have the same rows, got {[len(part) for part in parts]}")
        self.parts = tuple(parts)

    @property
    def width(self) -> int:
        return sum(part.width for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def read(self, rows: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        return torch.cat([part.read(rows) for part in self.parts], dim=1)


def blocks_of(
    rows: np.ndarray[Any, np.dtype[np.int64]], width: int, *, generator: np.random.Generator | None = None
) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Sorted rows in blocks that fit into `BLOCK_BYTES`; with a generator the blocks come in random order.

    Neighbours on disk stay together, so that a block is one run through a part of the file; rows are to be shuffled
    inside a block.
    """
    size = max(1, BLOCK_BYTES // (4 * width))
    starts = np.arange(0, len(rows), size)
    for start in starts if generator is None else generator.permutation(starts):
        yield rows[start : start + size]
