"""Ensembles: one image, several noise draws, maps averaged over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffrep.backbones.noise import draw_noise


def ensemble_noise(given: Tensor | None, shape: Sequence[int], members: int, seed: int, *, stream: int = 0) -> Tensor:
    """The noise of each member, (members, *shape): drawn from the seed, or given.

    Raises:
        ValueError: what is given has another shape.
    """
    if given is None:
        return torch.cat([draw_noise(shape, seed, member, stream=stream) for member in range(members)])
    if given.shape != (members, *shape):
        raise ValueError(f"noise must be {(members, *shape)} for this ensemble, got {tuple(given.shape)}")
    return given


def ensemble_maps(
    run: Callable[[list[int], list[int]], Mapping[str, Tensor]],
    images: int,
    members: int,
    *,
    batch_size: int,
    average: bool,
) -> dict[str, Tensor]:
    """Run every image with every member, `batch_size` of them at once.

    Args:
        run: numbers of images, numbers of members (one each per job) -> tap -> (jobs, C, h, w).
        average: over the members, in float32; False keeps them, those of an image next to each other.

    Returns:
        tap -> (images, C, h, w), or (images * members, C, h, w).
    """
    jobs = [(image, member) for image in range(images) for member in range(members)]
    chunks = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    found = [run([image for image, _ in chunk], [member for _, member in chunk]) for chunk in chunks]
    maps = {tap: torch.cat([part[tap] for part in found]) for tap in found[0]}
    if average and members > 1:
        maps = {tap: m.unflatten(0, (-1, members)).float().mean(1).to(m.dtype) for tap, m in maps.items()}
    return maps
