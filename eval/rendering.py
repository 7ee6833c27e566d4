"""Rendered scenes to measure on: which are taken, and their samples in batches, by as many processes as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import Literal, TypeVar

from diffrep.scenes import CATEGORIES

LARGEST = 4096  # side of a rendered image, pixels
Job = TypeVar("Job")
Rendered = TypeVar("Rendered")


@dataclass(frozen=True, kw_only=True)
class RenderedScenes:
    """Which scenes are rendered, and how. A subclass says how many.

    Raises:
        ValueError: naming a setting of which no scenes can be rendered.
    """

    categories: tuple[str, ...] = CATEGORIES
    split: Literal["train", "val", "test"] = "test"  # of disjoint seeds
    size: int = 128  # side of the rendered images, pixels
    batch_size: int = 8  # samples that are taken together
    workers: int = 2  # processes that render ahead; 0: none beside this one

    def __post_init__(self) -> None:
        if not 16 <= self.size <= LARGEST:
            raise ValueError(f"size must be 16 to {LARGEST} pixels, got {self.size}")
        if not self.categories:
            raise ValueError("categories must name at least one")
        if unknown := sorted(set(self.categories) - set(CATEGORIES)):
            raise ValueError(f"no category {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")
        for name, value in vars(self).items():
            least = 0 if name in ("workers", "first", "seed") else 1
            if isinstance(value, int) and not least <= value < 2**31:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def batches(self, render: Callable[[Job], Rendered], jobs: Sequence[Job]) -> Iterator[list[Rendered]]:
        """What a function renders of every job, in order.

        Args:
            render: of a module, so that other processes can import it.
        """
        if not jobs:
            return
        if self.workers == 0:
            samples = map(render, jobs)
            while batch := list(islice(samples, self.batch_size)):
                yield batch
            return
        # spawn: a forked child would inherit the threads' locks of the libraries that are loaded here
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            samples = pool.map(render, jobs, chunksize=4)
            while batch := list(islice(samples, self.batch_size)):
                yield batch
