"""From images to shards: the plan that makes a run repeatable, and the loop that keeps a network fed.

A shard is a function of its list of images and the settings alone: images go through the network in batches of
one size of canvas that end with the shard. Shards are committed in order. So a run that was killed, and one on other
machines, end with the very bytes of a run in one piece.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from diffrep.backbones import Backbone
from diffrep.features import ExtractConfig, FeatureMaps, extract_canvases
from diffrep.images import ImageError
from diffrep.store.manifest import Keep, StoreError, shard_number
from diffrep.store.shards import ImageFile, PlacesError, ShardBuilder, damage, load_records, select
from diffrep.store.sources import Canvases, ImageSource, Job, decode, locate
from diffrep.store.writer import StoreWriter

logger = logging.getLogger(__name__)

Changed: TypeAlias = Literal["refuse", "keep", "update"]
_PORTION = 16  # images that a worker process decodes at a time


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    Attributes:
        jobs: shards to make, in order of their numbers.
        finished: images that are in the store and stay there.
        notes: what is repaired, for the user.
    """

    jobs: tuple[Job, ...]
    finished: int
    notes: tuple[str, ...] = ()


def make_plan(
    writer: StoreWriter, sources: Sequence[ImageSource], changed: Changed = "refuse", *, verify: bool = False
) -> Plan:
    """Which shards are to be made so that a store holds a collection.

    Damaged shards are made again from their own images. New images fill the numbers that are free, then new ones.

    Args:
        changed: what to do about images that are not as they were: refuse, keep their old features, or make
            their shards again.
        verify: read all shards and compare their hashes, instead of their lengths.

    Raises:
        StoreError: images have changed and `changed` is ``refuse``, or a shard has to be made again and an
            image of it is gone.
    """
    named = {source.name: source for source in sources}
    jobs: list[Job] = []
    notes: list[str] = []
    known: set[str] = set()
    altered: list[str] = []
    finished = 0
    for shard in writer.manifest.shards:
        wrong = damage(writer.folder, shard, contents=verify)
        try:
            records = load_records(writer.folder, shard)
        except StoreError:  # its images are not known: they count as new
            notes.append(f"made again: {wrong}")
            writer.drop(shard)
            continue
        listed = [*records.images, *(file for file, _ in records.quarantined)]
        known.update(file.name for file in listed)
        different = [file.name for file in listed if file.name in named and _differs(file, named[file.name])]
        altered += different
        if wrong is not None:
            notes.append(f"made again: {wrong}")
        if wrong is not None or (different and changed == "update"):
            jobs.append(Job(shard_number(shard.name), _in_order(writer, listed, named)))
        else:
            finished += shard.images
    if altered and changed == "refuse":
        raise StoreError(
            f"{len(altered)} of the images have changed since they were extracted, first {altered[0]}:"
            " --changed update makes their shards again, --changed keep leaves their features as they are"
        )
    new = [source for source in sources if source.name not in known]
    taken = {shard_number(shard.name) for shard in writer.manifest.shards}
    free = iter(number for number in range(len(taken) + len(new)) if number not in taken)
    size = writer.manifest.shard_images
    jobs += [Job(next(free), tuple(new[start : start + size])) for start in range(0, len(new), size)]
    return Plan(tuple(sorted(jobs, key=lambda job: job.number)), finished, tuple(notes))


def _differs(file: ImageFile, source: ImageSource) -> bool:
    """Whether an image has other bytes than it had; they are read only where size or time say that it may."""
    if (file.bytes, file.modified) == (source.size, source.modified):
        return False
    try:
        return sha256(source.read()).hexdigest() != file.sha256
    except ImageError:
        return True


def _in_order(
    writer: StoreWriter, listed: Sequence[ImageFile], named: Mapping[str, ImageSource]
) -> tuple[ImageSource, ...]:
    """The images of a shard that is there, in the order in which a collection lists them."""
    root = Path(writer.manifest.root)
    order = {name: position for position, name in enumerate(named)}
    sources = [named.get(file.name) or locate(root, file.name) for file in listed]
    if gone := [source.name for source in sources if source.size < 0 and source.name not in named]:
        raise StoreError(f"{writer.folder}: a shard must be made again, but its image {gone[0]} is gone")
    return tuple(sorted(sources, key=lambda source: (order.get(source.name, len(order)), source.name)))


class ShardMaker:
    """Makes the contents of shards with one backbone: what every engine runs.

    Args:
        config: resolved for the backbone.
    """

    def __init__(self, backbone: Backbone, config: ExtractConfig, keep: Keep) -> None:
        self.backbone, self.config, self.keep = backbone, config, keep
        self._limit = config.batch_size  # gets smaller where memory runs out

    def run(
        self, jobs: Sequence[Job], *, workers: int, progress: Callable[[int], Any] = lambda images: None
    ) -> Iterator[tuple[Job, ShardBuilder]]:
        """Make shards, in order; images of the next ones are decoded meanwhile.

        Args:
            workers: processes that decode.
            progress: is called with the number of further images that are done.
        """
        assert self.config.sizing is not None
        builder = ShardBuilder(self.keep)
        waiting: dict[tuple[int, int], list[Canvases]] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="drain") as thread:
            # while the network works on a batch, the one before it is copied and sorted in
            draining: Future[None] = thread.submit(lambda: None)

            def work(batch: Canvases, into: ShardBuilder) -> None:
                nonlocal draining
                maps = self._features(batch)
                draining.result()
                draining = thread.submit(self._sort_in, maps, batch, into, progress)

            current = 0
            for decoded in decode(jobs, self.config.sizing, portion=_PORTION, workers=workers):
                if decoded.job != current:
                    for pieces in waiting.values():
                        work(Canvases.join(pieces), builder)
                    draining.result()
                    yield jobs[current], builder
                    current, builder, waiting = decoded.job, ShardBuilder(self.keep), {}
                for position, file, reason in decoded.unusable:
                    builder.quarantine(position, file, reason)
                progress(len(decoded.unusable))
                for canvases in decoded.canvases:
                    size = canvases.placements[0].canvas_size
                    gathered = Canvases.join([*waiting.pop(size, []), canvases])
                    while len(gathered) >= self.config.batch_size:
                        work(gathered[: self.config.batch_size], builder)
                        gathered = gathered[self.config.batch_size :]
                    if len(gathered):
                        waiting[size] = [gathered]
            for pieces in waiting.values():
                work(Canvases.join(pieces), builder)
            draining.result()
            if jobs:
                yield jobs[current], builder

    def _features(self, batch: Canvases) -> FeatureMaps:
        """Features of a batch; where memory runs out, in smaller and smaller parts."""
        pixels = batch.pixels.to(self.backbone.device, non_blocking=True)
        while True:
            try:
                limited = replace(self.config, batch_size=self._limit)
                return extract_canvases(self.backbone, pixels, batch.placements, limited)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self._limit == 1:
                    raise
                self._limit = max(1, self._limit // 2)
            # outside of the handler: there the error still holds the tensors of the failed attempt
            gc.collect()
            if self.backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning("out of memory: going on with batches of %d", self._limit)

    @torch.inference_mode()
    def _sort_in(self, maps: FeatureMaps, batch: Canvases, into: ShardBuilder, progress: Callable[[int], Any]) -> None:
        # places can be missing for one image; the others of the batch are not to suffer from it
        size = 1 if self.keep.kind == "points" else len(batch)
        for first in range(0, len(batch), size):
            part = batch[first : first + size]
            names = [file.name for file in part.files]
            try:
                selections = select(maps[first] if size == 1 else maps, self.keep, names)
            except PlacesError as error:
                into.quarantine(part.positions[0], part.files[0], str(error))
                continue
            for position, file, selection in zip(part.positions, part.files, selections, strict=True):
                into.add(position, file, selection)
        progress(len(batch))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the CPU or a GPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)
