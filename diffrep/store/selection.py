"""What is kept of feature maps: all of them, their mean over the image, or the vectors at chosen places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from diffrep.features import FeatureMaps
from diffrep.store.manifest import Keep
from diffrep.store.shards import Kept


class PlacesError(ValueError):
    """Places that an image does not have."""


def select(maps: FeatureMaps, keep: Keep, names: Sequence[str]) -> list[Kept]:
    """What is kept of each image of a batch, on the CPU and in the precision of the store.

    Args:
        names: of the images; places are looked up, or drawn, by them.

    Raises:
        PlacesError: the places of an image are missing or lie outside of it.
    """
    dtype = getattr(torch, keep.dtype)
    if keep.kind == "points":
        kept = []
        for i, name in enumerate(names):
            one = maps[i]
            points = places_of(keep.points, name, one.placements[0].image_size)
            features = {tap: one.at(tap, points[None])[0].to(dtype).cpu() for tap in maps.taps}
            kept.append(Kept(features, one.placements[0], one.grids, points))
        return kept
    whole = {tap: pooled(maps, tap) for tap in maps.taps} if keep.kind == "pooled" else maps.maps
    chosen = {tap: values.to(dtype).cpu() for tap, values in whole.items()}
    return [
        Kept({tap: values[i] for tap, values in chosen.items()}, placement, maps.grids)
        for i, placement in enumerate(maps.placements)
    ]


def pooled(maps: FeatureMaps, tap: str) -> Tensor:
    """(B, C) float32: the mean of each map over the cells whose centre lies on the image."""
    values = maps.maps[tap].float()
    masks = torch.stack([maps.content_mask(tap, i) for i in range(len(maps))]).to(values)
    means = (values * masks[:, None]).sum((-2, -1)) / masks.sum((-2, -1)).clamp(min=1)[:, None]
    for i in (masks.sum((-2, -1)) == 0).nonzero()[:, 0].tolist():  # an image thinner than a cell
        height, width = maps.placements[i].image_size
        means[i] = maps[i].at(tap, torch.tensor([[[(width - 1) / 2, (height - 1) / 2]]]))[0, 0].float()
    return means


def places_of(rule: str, name: str, image_size: tuple[int, int]) -> Tensor:
    """The places of an image, (P, 2) float32 as (x, y) in its pixels.

    Args:
        rule: ``grid:N`` for the centres of N x N equal parts, ``random:N`` for N draws that depend on nothing
            but the name, or a JSON file ``{"name": [[x, y], ...], ...}``.

    Raises:
        PlacesError: the file has no places, or outside ones, for the image.
        ValueError: the file cannot be read.
    """
    height, width = image_size
    word, _, number = rule.partition(":")
    if word == "grid":
        steps = (torch.arange(int(number)) + 0.5) / int(number)
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        shares = torch.stack([x, y], dim=-1).reshape(-1, 2)
    elif word == "random":
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        shares = torch.rand(int(number), 2, generator=torch.Generator().manual_seed(seed))
    else:
        places = places_in(rule)
        if name not in places:
            raise PlacesError(f"{rule} has no places for {name}")
        points = torch.tensor(places[name], dtype=torch.float32).reshape(-1, 2)
        x, y = points.unbind(-1)
        if bool(((x < -0.5) | (x > width - 0.5) | (y < -0.5) | (y > height - 0.5)).any()):
            raise PlacesError(f"{rule}: places of {name} lie outside of its {width} x {height} pixels")
        return points
    return shares * torch.tensor([width, height]) - 0.5


@lru_cache(maxsize=4)
def places_in(file: str) -> Mapping[str, list[list[float]]]:
    """Read a file of places, {"name": [[x, y], ...], ...}.

    Raises:
        ValueError: it is missing or holds something else.
    """
    try:
        places = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as places of images ({error})") from None
    if not isinstance(places, dict):
        raise ValueError(f"{file}: must hold an object of image names, each with a list of [x, y]")
    return places
