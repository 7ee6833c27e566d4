"""Dense labels of the renderer as a loss: features of the same place on two objects of one category agree.

This is the question that matching asks, put as a classification: among all cells of the other objects, backgrounds
included, which are the place that the query shows? Linear heads on the same features also name the part, its class
(leg, wheel, handle, ...), which categories share, and its canonical place; they are thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.scenes import PART_CLASS_OF, PART_CLASSES, PARTS, UNSEEN, SceneSet
from diffrep.training.loop import Batch


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
    own = number.repeat_interleave(queries.shape[1])[:, None] == number.repeat_interleave(rows.shape[1])[None]
    similarity = similarity.masked_fill(own.to(similarity.device), -1e4)
    distance = torch.cdist(grouped(asked_place), grouped(place))
    same = grouped(asked_part)[:, :, None] == grouped(part)[:, None]
    match = torch.exp(-0.5 * (distance / settings.spread) ** 2) * (same & ~own.to(same.device))
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
    if found := sorted(set(scenes.settings.categories) & set(UNSEEN)):
        raise ValueError(f"{scenes.folder}: holds {', '.join(found)}, which training must never see")
