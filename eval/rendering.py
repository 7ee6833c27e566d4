"""Samples of rendered scenes, in batches, by as many processes as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from diffrep.scenes import CATEGORIES

LARGEST = 4096  # side of a rendered image, pixels
Job = TypeVar("Job")
Rendered = TypeVar("Rendered")


def check_scenes(*, size: int, categories: Sequence[str], **counts: int) -> None:
    """Refuse settings of which no scenes can be rendered.

    Args:
        counts: by the name of the setting; ``workers``, ``first`` and ``seed`` may be 0.

    Raises:
        ValueError: naming the setting.
    """
    if not 16 <= size <= LARGEST:
        raise ValueError(f"size must be 16 to {LARGEST} pixels, got {size}")
    if not categories:
        raise ValueError("categories must name at least one")
    if unknown := sorted(set(categories) - set(CATEGORIES)):
        raise ValueError(f"no category {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")
    for name, count in counts.items():
        least = 0 if name in ("workers", "first", "seed") else 1
        if not least <= count < 2**31:
            raise ValueError(f"{name} must be at least {least}, got {count}")


def rendered(
    render: Callable[[Job], Rendered], jobs: Sequence[Job], *, workers: int, batch_size: int
) -> Iterator[list[Rendered]]:
    """What a function renders of every job, in order.

    Args:
        render: of a module, so that other processes can import it.
        workers: processes that render ahead; 0: none beside this one.
    """
    if not jobs:
        return
    if workers == 0:
        yield from _batched(map(render, jobs), batch_size)
        return
    # spawn: a forked child would inherit the threads' locks of the libraries that are loaded here
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from _batched(pool.map(render, jobs, chunksize=4), batch_size)


def _batched(samples: Iterator[Rendered], size: int) -> Iterator[list[Rendered]]:
    while batch := list(islice(samples, size)):
        yield batch
