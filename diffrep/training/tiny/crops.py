"""Random crops, mirrors and colour changes of rendered scenes, with the labels that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.scenes import PART_MIRROR, SceneSet

# Where a cell looks for its label, pixels from its centre: thin parts often miss the centre itself.
_LOOK = ((0, 0), (-2, 0), (2, 0), (0, -2), (0, 2), (-2, -2), (2, -2), (-2, 2), (2, 2))


@dataclass(frozen=True)
class Crops:
    """Square windows on B images, brought to `size` pixels a side.

    Attributes:
        corner: (B, 2) x, y of the top left edge, in pixels of the image (edges, not centres).
        side: (B,) of the window, pixels of the image.
        mirrored: (B,) bool: the window is flipped left to right.
        size: pixels a side of what comes out.
    """

    corner: Tensor
    side: Tensor
    mirrored: Tensor
    size: int

    @classmethod
    def draw(
        cls,
        count: int,
        image_size: int,
        size: int,
        generator: torch.Generator,
        *,
        sides: tuple[float, float],
    ) -> Crops:
        """Uniform sides (shares of the image's side), places and mirrors."""
        low, high = sides
        side = image_size * (low + (high - low) * torch.rand(count, generator=generator))
        corner = torch.rand(count, 2, generator=generator) * (image_size - side)[:, None]
        return cls(corner, side, torch.rand(count, generator=generator) < 0.5, size)

    def to_image(self, points: Tensor) -> Tensor:
        """Points (B, ..., 2) of the crops, in pixels measured from the edge -> the same in the image."""
        shape = (-1, *[1] * (points.ndim - 2))
        x, y = points.unbind(-1)
        x = torch.where(self.mirrored.view(shape), self.size - x, x)
        scale = (self.side / self.size).view(shape)
        return torch.stack([x * scale, y * scale], -1) + self.corner.view(-1, *[1] * (points.ndim - 2), 2)

    def from_image(self, points: Tensor) -> Tensor:
        """The inverse of `to_image`."""
        shape = (-1, *[1] * (points.ndim - 2))
        scale = (self.size / self.side).view(shape)
        x, y = (points - self.corner.view(*shape, 2)).unbind(-1)
        x, y = x * scale, y * scale
        return torch.stack([torch.where(self.mirrored.view(shape), self.size - x, x), y], -1)

    def cell_points(self, cells: int) -> Tensor:
        """(B, cells, cells, 2): the centres of the cells of a map over the crops, in pixels of the image."""
        centres = (torch.arange(cells) + 0.5) * (self.size / cells)
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.to_image(torch.stack([x, y], -1).expand(len(self.side), -1, -1, -1))

    def images(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, size, size) float in [0, 1]."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        grid = self.cell_points(self.size) * (2 / images.shape[1]) - 1
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    def labels(self, part: Tensor, canonical: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """Labels of the cells of a map over the crops.

        Args:
            part: (B, H, W) uint8; canonical: (B, H, W, 3) int8, as a `SceneSet` keeps them.

        Returns:
            (B, cells, cells) int64 part ids and (B, cells, cells, 3) float canonical coordinates: of the pixel of
            the object nearest to the cell's centre within a few pixels, 0 where there is none.
        """
        batch = torch.arange(len(part))[:, None, None]
        centres = self.cell_points(cells)
        found = torch.zeros(centres.shape[:3], dtype=torch.int64)
        where = centres.new_zeros(centres.shape).long()
        for offset in _LOOK:
            points = centres + centres.new_tensor(offset) * (self.side / self.size)[:, None, None, None]
            pixel = points.floor().long().clamp(0, part.shape[1] - 1)
            here = part[batch, pixel[..., 1], pixel[..., 0]].long()
            new = (found == 0) & (here > 0)
            found = torch.where(new, here, found)
            where = torch.where(new[..., None], pixel, where)
        xyz = canonical[batch, where[..., 1], where[..., 0]].float() / 127 * (found > 0)[..., None]
        flip = self.mirrored[:, None, None]
        found = torch.where(flip, torch.from_numpy(PART_MIRROR).long()[found], found)
        sign = torch.ones(3).index_fill(0, torch.tensor(0), -1.0)
        return found, torch.where(flip[..., None], xyz * sign, xyz)


def gather(scenes: SceneSet, name: str, indices: Tensor) -> Tensor:
    """Rows of one array of a set."""
    return torch.from_numpy(np.ascontiguousarray(getattr(scenes, name)[indices.numpy()]))


def draw_groups(category: Sequence[int] | np.ndarray, groups: int, members: int, generator: torch.Generator) -> Tensor:
    """Indices (groups * members,) of scenes: each run of `members` shows different objects of one category.

    Raises:
        ValueError: a category has fewer scenes than members.
    """
    labels = np.asarray(category)
    kinds = np.unique(labels)
    chosen = []
    for kind in torch.randint(len(kinds), (groups,), generator=generator).tolist():
        rows = np.flatnonzero(labels == kinds[kind])
        if len(rows) < members:
            raise ValueError(f"a group needs {members} scenes of a category, one category has {len(rows)}")
        chosen.append(torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)[:members]])
    return torch.cat(chosen)


def jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast and mixing of colour channels, one draw per image.

    Args:
        images: (B, 3, H, W) in [0, 1].
        strength: 0 leaves them as they are; at 1 hues move freely and every fifth image turns grey.
    """
    batch = len(images)
    mix = torch.eye(3) + 0.35 * strength * torch.randn(batch, 3, 3, generator=generator)
    grey = torch.rand(batch, 1, 1, generator=generator) < 0.2 * strength
    mix = torch.where(grey, torch.full((3, 3), 1 / 3), mix)
    mix = mix / mix.sum(-1, keepdim=True).clamp(min=0.3)  # keeps grey grey
    contrast = 1 + 0.5 * strength * (2 * torch.rand(batch, 1, 1, 1, generator=generator) - 1)
    shift = 0.25 * strength * (2 * torch.rand(batch, 3, 1, 1, generator=generator) - 1)
    mean = images.mean((-3, -2, -1), keepdim=True)
    mixed = torch.einsum("bij,bjhw->bihw", mix, images)
    return ((mixed - mean) * contrast + mean + shift * mean).clamp(0, 1)
