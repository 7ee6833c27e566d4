"""Random crops, mirrors and colour changes of rendered scenes, the labels that follow them, and the losses on labels.

The dense labels of the renderer put the question that matching asks as a classification: among all cells of the other
objects of a category, backgrounds included, which are the place that the query shows? Linear heads on the same features
also name the part, its class (leg, wheel, handle, ...), which categories share, and its canonical place; they are
thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.scenes import PART_CLASS_OF, PART_CLASSES, PART_MIRROR, PARTS, UNSEEN, SceneSet
from diffrep.settings import check
from diffrep.training.loop import Batch, FitSettings, Loss, fit

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
        cls, count: int, image_size: int, size: int, generator: torch.Generator, *, sides: tuple[float, float]
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
        return torch.stack([x * scale, y * scale], -1) + self.corner.view(*shape, 2)

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
        label = torch.zeros(centres.shape[:3], dtype=torch.int64)
        where = centres.new_zeros(centres.shape).long()
        for offset in _LOOK:
            points = centres + centres.new_tensor(offset) * (self.side / self.size)[:, None, None, None]
            pixel = points.floor().long().clamp(0, part.shape[1] - 1)
            here = part[batch, pixel[..., 1], pixel[..., 0]].long()
            new = (label == 0) & (here > 0)
            label = torch.where(new, here, label)
            where = torch.where(new[..., None], pixel, where)
        xyz = canonical[batch, where[..., 1], where[..., 0]].float() / 127 * (label > 0)[..., None]
        flip = self.mirrored[:, None, None]
        label = torch.where(flip, torch.from_numpy(PART_MIRROR).long()[label], label)
        sign = torch.ones(3).index_fill(0, torch.tensor(0), -1.0)
        return label, torch.where(flip[..., None], xyz * sign, xyz)


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
    mix = (mix / mix.sum(-1, keepdim=True).clamp(min=0.3)).to(images)  # keeps grey grey
    contrast = 1 + 0.5 * strength * (2 * torch.rand(batch, 1, 1, 1, generator=generator) - 1).to(images)
    shift = 0.25 * strength * (2 * torch.rand(batch, 3, 1, 1, generator=generator) - 1).to(images)
    mean = images.mean((-3, -2, -1), keepdim=True)
    mixed = torch.einsum("bij,bjhw->bihw", mix, images)
    return ((mixed - mean) * contrast + mean + shift * mean).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The dense losses."""

    members: int = 4  # objects of one category that are compared with each other
    queries: int = 48  # cells drawn from each object
    temperature: float = 0.07  # of the cosine similarities
    spread: float = 0.12  # standard deviation of a match, canonical coordinates (the object spans -1..1)
    parts: float = 1.0  # weight of naming the part
    classes: float = 0.5  # weight of naming its class, which categories share
    place: float = 1.0  # weight of the canonical coordinates
    background: float = 0.2  # weight of a background cell beside one of the object, where parts are named
    weight: float = 0.5  # of all dense losses beside the label-free one

    def __post_init__(self) -> None:
        check(self)


def part_classifier(channels: int) -> nn.Module:
    """The linear head that is thrown away after training: part id, part class and canonical place of a cell."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, len(PARTS) + len(PART_CLASSES) + 3))


def draw_queries(part: Tensor, settings: LabelSettings, generator: torch.Generator) -> Tensor:
    """(B, Q) cells of each object, of (B, h, w) part ids; background only where an object has too few cells."""
    score = torch.rand(part.shape[0], part[0].numel(), generator=generator) + (part.flatten(1) > 0)
    return score.topk(min(settings.queries, score.shape[1]), dim=1).indices


def matching_loss(features: Tensor, batch: Batch, settings: LabelSettings) -> tuple[Tensor, Tensor]:
    """Cross-entropy of soft matches between the objects of a group.

    Args:
        features: (B, C, h, w) of groups of `members` images next to each other.
        batch: "part" (B, h, w), "canonical" (B, h, w, 3), "queries" (B, Q).

    Returns:
        The loss, and the share of queries whose most similar cell lies within 0.25 of the place.
    """
    members, count = settings.members, len(features)
    rows = F.normalize(features.flatten(2).mT.float(), dim=-1)  # (B, N, C)
    part, place = batch["part"].flatten(1), batch["canonical"].flatten(1, 2)
    queries = batch["queries"]
    asked = rows.gather(1, queries[..., None].expand(-1, -1, rows.shape[-1]))
    asked_part = part.gather(1, queries)
    asked_place = place.gather(1, queries[..., None].expand(-1, -1, 3))

    def grouped(x: Tensor) -> Tensor:  # (B, n, ...) -> (G, members * n, ...)
        return x.unflatten(0, (count // members, members)).flatten(1, 2)

    similarity = torch.einsum("gqc,gnc->gqn", grouped(asked), grouped(rows)) / settings.temperature
    number = torch.arange(members)
    same_image = number.repeat_interleave(queries.shape[1])[:, None] == number.repeat_interleave(rows.shape[1])[None]
    similarity = similarity.masked_fill(same_image.to(similarity.device), -1e4)
    distance = torch.cdist(grouped(asked_place), grouped(place))
    same = grouped(asked_part)[:, :, None] == grouped(part)[:, None]
    match = torch.exp(-0.5 * (distance / settings.spread) ** 2) * (same & ~same_image.to(same.device))
    total = match.sum(-1)
    asked_well = (total > 0.1) & (grouped(asked_part) > 0)
    share = match / total.clamp(min=1e-6)[..., None]
    loss = -(share * similarity.log_softmax(-1)).sum(-1)
    best = similarity.argmax(-1, keepdim=True)
    right = (distance.gather(-1, best) < 0.25) & same.gather(-1, best)
    weight = asked_well.float() / asked_well.sum().clamp(min=1)
    return (loss * weight).sum(), (right[..., 0] * weight).sum()


def dense_losses(
    features: Tensor, classifier: nn.Module, batch: Batch, settings: LabelSettings
) -> Mapping[str, Tensor]:
    """The losses of one feature map: "match", "parts", "place", the weighted sum "dense", "right" to look at."""
    match, right = matching_loss(features, batch, settings)
    part = batch["part"].flatten()
    outputs = classifier(features.movedim(1, -1).float()).float().flatten(0, 2)
    parts, classes, place = outputs.split([len(PARTS), len(PART_CLASSES), 3], dim=-1)
    classes_of = torch.from_numpy(PART_CLASS_OF).long().to(part.device)
    seen = part > 0
    weight = torch.where(seen, 1.0, settings.background)
    weight = weight / weight.sum()
    named = (F.cross_entropy(parts, part, reduction="none") * weight).sum()
    grouped = (F.cross_entropy(classes, classes_of[part], reduction="none") * weight).sum()
    off = (place - batch["canonical"].flatten(0, 2)).abs().mean(-1)
    placed = (off * seen).sum() / seen.sum().clamp(min=1)
    dense = match + settings.parts * named + settings.classes * grouped + settings.place * placed
    return {"match": match, "parts": named, "place": placed, "right": right, "dense": settings.weight * dense}


def check_unseen(scenes: SceneSet) -> None:
    """Refuse to train on categories that are kept for zero-shot tests.

    Raises:
        ValueError: the set was rendered with one of them.
    """
    if unseen := sorted(set(scenes.settings.categories) & set(UNSEEN)):
        raise ValueError(f"{scenes.folder}: holds {', '.join(unseen)}, which training must never see")


Module = TypeVar("Module", bound=nn.Module)


def fit_stages(
    module: Module,
    stages: Mapping[str, tuple[FitSettings, Callable[[torch.Generator], Batch]]],
    loss: Loss[Module],
    folder: Path,
    *,
    progress: bool = True,
) -> list[Module]:
    """Train a module in stages, each from the average of the last; returns the averages, and resumes from `folder`."""
    averages = []
    for name, (settings, batches) in stages.items():
        averages.append(fit(module, batches, loss, settings, folder / name, progress=progress))
        module.load_state_dict(averages[-1].state_dict())
    return averages
