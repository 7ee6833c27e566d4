"""Grids of embeddings, and the embedding of a window anywhere between their cells."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEARLY_PARALLEL = 0.9995  # |cosine| above which the official code interpolates linearly


class GridError(ValueError):
    """A grid of embeddings that cannot be used; the message says where."""


@dataclass(frozen=True)
class EmbeddingGrid:
    """What a large image shall look like, cell by cell.

    Attributes:
        embeddings: (R, C, D) float32, raw, not normalised. Cell (r, c) describes the square of one window whose top
            left corner is at (r, c) windows.
        encoder: the backbone that made them; "" where that is not known.
    """

    embeddings: Tensor
    encoder: str = ""

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.embeddings)
        if values.ndim != 3 or 0 in values.shape:
            raise GridError(f"a grid of embeddings must be (rows, columns, dim), got {tuple(values.shape)}")
        values = values.detach().float().cpu()
        faults = {"NaN or infinite values": ~values.isfinite().all(-1), "length 0": values.norm(dim=-1) == 0}
        for what, bad in faults.items():
            if bool(bad.any()):
                row, column = bad.nonzero()[0].tolist()
                raise GridError(f"the embedding of cell ({row}, {column}) has {what}")
        object.__setattr__(self, "embeddings", values.contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return int(self.embeddings.shape[0]), int(self.embeddings.shape[1])

    @property
    def dim(self) -> int:
        return int(self.embeddings.shape[2])

    def checksum(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(self.embeddings.numpy().tobytes()).hexdigest()[:16]

    def at(self, offsets: Tensor, cell: int | Sequence[int]) -> Tensor:
        """Embeddings of windows anywhere on the canvas.

        The four cells around a corner are interpolated spherically, first along the row, then down (official code);
        beyond the last row and column the border is repeated.

        Args:
            offsets: (N, 2), row and column of each window's top left corner, in any unit.
            cell: the side of a cell in that unit, or its (height, width).

        Returns:
            (N, D).
        """
        (upper, lower), (down, across) = self._around(offsets, cell)
        return slerp(down, slerp(across, *upper), slerp(across, *lower))

    def agreement(self, offsets: Tensor, cell: int | Sequence[int]) -> Tensor:
        """The smallest cosine between the embeddings of two cells that a window touches; see `at`.

        Returns:
            (N,); 1 for a window that touches a single cell.
        """
        (upper, lower), parts = self._around(offsets, cell)
        down, across = (part > 0 for part in parts)
        cells = F.normalize(torch.stack([*upper, *lower], dim=1), dim=2)
        touched = torch.stack([torch.ones_like(down), across, down, down & across], dim=1)
        cells = torch.where(touched[:, :, None], cells, cells[:, :1])
        # not as a product of matrices, whose rounding may depend on how many windows there are
        return (cells[:, :, None] * cells[:, None]).sum(3).flatten(1).amin(1)

    def _around(self, offsets: Tensor, cell: int | Sequence[int]) -> tuple[list[list[Tensor]], tuple[Tensor, Tensor]]:
        """The four cells around each corner, upper and lower, left and right, and how far down and across it lies."""
        rows, columns = self.shape
        height, width = (cell, cell) if isinstance(cell, int) else cell
        place = offsets.double() / torch.tensor([height, width], dtype=torch.float64)
        corner = place.floor().long()
        r0, c0 = corner[:, 0].clamp(0, rows - 1), corner[:, 1].clamp(0, columns - 1)
        r1, c1 = (r0 + 1).clamp(max=rows - 1), (c0 + 1).clamp(max=columns - 1)
        down, across = (place - corner).clamp(0, 1).float().unbind(1)
        return [[self.embeddings[r, c0], self.embeddings[r, c1]] for r in (r0, r1)], (down, across)

    def resized(self, shape: tuple[int, int]) -> EmbeddingGrid:
        """The grid brought to (rows, columns): cell centres are laid over each other, values between interpolated."""
        rows, columns = shape
        if rows < 1 or columns < 1:
            raise GridError(f"a grid needs at least one row and one column, got {shape}")
        if shape == self.shape:
            return self
        places = []
        for ours, theirs in zip(shape, self.shape, strict=True):
            places.append(((torch.arange(ours) + 0.5) * theirs / ours - 0.5).clamp(0, theirs - 1))
        row, column = torch.meshgrid(*places, indexing="ij")
        found = self.at(torch.stack([row, column], -1).reshape(-1, 2), 1)
        return EmbeddingGrid(found.reshape(rows, columns, -1), self.encoder)


def slerp(t: Tensor | float, a: Tensor, b: Tensor) -> Tensor:
    """Spherical interpolation of raw vectors, (..., D).

    The coefficients come from the angle between the vectors, whose lengths stay in; nearly parallel and opposite
    pairs are interpolated linearly (official code).

    Args:
        t: () or (...,), 0 gives a, 1 gives b.
    """
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)[..., None]
    cosine = ((a * b).sum(-1, keepdim=True)) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True))
    linear = cosine.abs() > NEARLY_PARALLEL
    angle = torch.arccos(torch.where(linear, torch.zeros_like(cosine), cosine))
    spherical = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(linear, (1 - t) * a + t * b, spherical)
