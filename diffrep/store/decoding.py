"""Reading images in worker processes, a fixed number at a time, so that a network never waits for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffrep.images import ImageError, Placement, Sizing, decode_image, fit_image
from diffrep.store.shards import ImageFile
from diffrep.store.sources import ImageSource


@dataclass(frozen=True)
class Job:
    """One shard to be made: its number, and the images that go into it, in order."""

    number: int
    sources: tuple[ImageSource, ...]


@dataclass(frozen=True)
class Canvases:
    """Images of one size of canvas.

    Attributes:
        pixels: (n, 3, H, W) uint8.
        positions: of each, in its job.
        files: of each.
        placements: of each.
    """

    pixels: Tensor
    positions: tuple[int, ...]
    files: tuple[ImageFile, ...]
    placements: tuple[Placement, ...]

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    def join(cls, pieces: Sequence[Canvases]) -> Canvases:
        """All images of the pieces, in order."""
        if len(pieces) == 1:
            return pieces[0]
        columns = zip(*((p.positions, p.files, p.placements) for p in pieces), strict=True)
        positions, files, placements = (sum(column, ()) for column in columns)
        return cls(torch.cat([p.pixels for p in pieces]), positions, files, placements)

    def __getitem__(self, part: slice) -> Canvases:
        return Canvases(self.pixels[part], self.positions[part], self.files[part], self.placements[part])


@dataclass(frozen=True)
class Decoded:
    """A few images of one job that follow each other, by size of canvas.

    Attributes:
        canvases: those that could be read.
        unusable: (position, file, reason) of the others.
    """

    job: int
    canvases: tuple[Canvases, ...]
    unusable: tuple[tuple[int, ImageFile, str], ...]


class _Portions(Dataset[Decoded]):
    """Jobs, cut into portions of a few images; reading one decodes it."""

    def __init__(self, jobs: Sequence[Job], sizing: Sizing, portion: int) -> None:
        self.jobs, self.sizing, self.portion = jobs, sizing, portion
        self.places = [(j, start) for j, job in enumerate(jobs) for start in range(0, len(job.sources), portion)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Decoded:
        number, start = self.places[index]
        return decode_portion(number, start, self.jobs[number].sources[start : start + self.portion], self.sizing)


def decode_portion(job: int, start: int, sources: Sequence[ImageSource], sizing: Sizing) -> Decoded:
    """Read images; what cannot be read is set apart with the reason."""
    by_size: dict[tuple[int, int], list[tuple[Tensor, int, ImageFile, Placement]]] = {}
    unusable = []
    for position, source in enumerate(sources, start):
        file = ImageFile(source.name, source.size, source.modified)
        try:
            content = source.read()
            file = ImageFile(source.name, len(content), source.modified, hashlib.sha256(content).hexdigest())
            canvas, placement = fit_image(decode_image(content, source.name), sizing)
        except ImageError as error:
            unusable.append((position, file, str(error).removeprefix(f"{source.name}: ")))
            continue
        by_size.setdefault(placement.canvas_size, []).append((canvas, position, file, placement))
    canvases = []
    for items in by_size.values():
        pixels, positions, files, placements = zip(*items, strict=True)
        canvases.append(Canvases(torch.stack(pixels), positions, files, placements))
    return Decoded(job, tuple(canvases), tuple(unusable))


def decode(jobs: Sequence[Job], sizing: Sizing, *, portion: int, workers: int) -> Iterator[Decoded]:
    """All images of the jobs, in order, decoded ahead in `workers` processes (0: in this one).

    Args:
        portion: images that a worker decodes at a time.
    """
    loader = DataLoader(
        _Portions(jobs, sizing, portion),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
