"""`extract_store`: from a collection of images to a store, on this machine or on a cluster.

A shard is a function of its list of images and the settings alone: images go through the network in batches of
one size of canvas that end with the shard. Shards are committed in order. So a run that was killed, and one on other
machines, end with the very bytes of a run in one piece.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.backbones import Backbone, load_backbone
from diffrep.devices import resolve_device
from diffrep.features import ExtractConfig, FeatureMaps, extract_canvases
from diffrep.files import optional_import
from diffrep.images import ImageError
from diffrep.settings import ANY_WORKERS, check
from diffrep.store.manifest import StoreWriter, environment, provenance, weights_sha256
from diffrep.store.shards import (
    ImageFile,
    Keep,
    PlacesError,
    ShardBuilder,
    ShardEntry,
    StoreError,
    damage,
    load_records,
    places_in,
    select,
    shard_number,
)
from diffrep.store.sources import CanvasImage, ImageSource, Job, decode, find_sources, locate

logger = logging.getLogger(__name__)

Changed: TypeAlias = Literal["refuse", "keep", "update"]
Engine: TypeAlias = Literal["local", "ray"]
Shards: TypeAlias = "Iterator[tuple[ShardEntry, Mapping[str, Any]]]"  # with the libraries and device that made each
Count: TypeAlias = "Callable[[int], object]"  # is told how many further images are done
_PORTION = 16  # images that a worker process decodes at a time


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """How a collection is worked through. None of it changes the features."""

    shard_images: int | None = None  # images per shard; None: 128 whole maps, 1024 of anything smaller
    workers: int | None = None  # processes that decode; None: one per core, less the one that computes
    changed: Changed = "refuse"  # images that are not as they were when they were extracted: refuse, keep, update
    verify: bool = False  # first read all shards of the store and compare their hashes
    engine: Engine = "local"  # ray: actors with one model each, on this machine or a cluster
    actors: int = 1  # with ray: how many
    address: str | None = None  # with ray: of the cluster; None: this machine

    def __post_init__(self) -> None:
        check(self, shard_images="1..", workers=ANY_WORKERS, actors="1..")
        if self.engine != "ray" and (self.actors != 1 or self.address is not None):
            raise ValueError("actors and address go with engine 'ray'")

    def decoders(self) -> int:
        """Processes that decode."""
        return max(1, (os.cpu_count() or 2) - 1) if self.workers is None else self.workers


@dataclass(frozen=True)
class Extracted:
    """What `extract_store` did.

    Attributes:
        folder: the store.
        images: whose features were extracted now.
        before: images whose features the store had already.
        quarantined: (name, reason) of images of this run that could not be used.
        seconds: it took, the loading of the backbone left out.
        notes: what was repaired.
    """

    folder: Path
    images: int
    before: int
    quarantined: tuple[tuple[str, str], ...]
    seconds: float
    notes: tuple[str, ...] = ()


def extract_store(
    images: Sequence[str | os.PathLike[str]],
    folder: str | Path,
    backbone: str | Backbone = "tiny",
    config: ExtractConfig | None = None,
    keep: Keep | None = None,
    bulk: BulkConfig | None = None,
    *,
    root: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Extracted:
    """Extract a collection into a store; run it again to go on after an interruption, or to append.

    Whenever the run ends, the store holds whole shards only. A run that goes on gives the bytes of a run in one
    piece, on the same device and libraries (where memory ran out on the way and batches were made smaller, up to
    rounding).

    Args:
        images: files, folders, glob patterns, webdataset archives (.tar), Parquet files with a column ``path``.
        folder: the store, new or with the same settings.
        backbone: its name; or a loaded one, for the local engine.
        config: how features are read.
        keep: what of them is kept.
        root: the folder to which image names are relative; see `find_sources`.
        progress: show a bar with rate and time left on standard error.

    Raises:
        ImageError: an input does not exist or holds no images.
        StoreError: the store was made otherwise, is being written to by another process, or images have changed.
        OSError: the disk is full or cannot be written to; what was committed is safe.
        ImportError: ``ray`` was asked for and is not installed.
    """
    config, keep, bulk = config or ExtractConfig(), keep or Keep(), bulk or BulkConfig()
    if bulk.engine == "ray" and not isinstance(backbone, str):
        raise ValueError("the engine 'ray' loads the backbone in every actor: give its name, not a loaded one")
    places = Path(keep.points) if keep.kind == "points" and keep.points.endswith(".json") else None
    if places is not None:
        places_in(str(places))
    base, sources = find_sources(images, root)
    loaded = backbone
    if isinstance(loaded, str):
        loaded = load_backbone(loaded, device=resolve_device(device), dtype=dtype)
    config = config.resolve(loaded)
    features = provenance(loaded, config)
    if places is not None:
        features["points_sha256"] = sha256(places.read_bytes()).hexdigest()
    begun = time.monotonic()
    size = bulk.shard_images or (128 if keep.kind == "maps" else 1024)
    with StoreWriter(folder, features, keep, root=base, shard_images=size) as writer:
        plan = make_plan(writer, sources, bulk.changed, verify=bulk.verify)
        total = sum(len(job.sources) for job in plan.jobs)
        committed: list[ShardEntry] = []
        with tqdm(total=total, desc="extract", unit="image", disable=not (progress and total)) as bar:
            if bulk.engine == "ray":
                shards = ray_shards(writer, plan.jobs, loaded, str(backbone), config, bulk, bar.update)
            else:
                shards = local_shards(writer, plan.jobs, loaded, config, bulk, bar.update)
            for entry, surroundings in shards:
                writer.commit(entry, surroundings)
                committed.append(entry)
        bad = [item for entry in committed for item in load_records(writer.folder, entry).quarantined]
    new, quarantined = sum(entry.images for entry in committed), tuple((file.name, reason) for file, reason in bad)
    return Extracted(Path(folder), new, plan.finished, quarantined, time.monotonic() - begun, plan.notes)


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
        if (wrong := damage(writer.folder, shard, contents=verify)) is not None:
            notes.append(f"made again: {wrong}")
        try:
            records = load_records(writer.folder, shard)
        except StoreError as error:  # its images are not known: they count as new
            notes += [] if wrong is not None else [f"made again: {error}"]
            writer.drop(shard)
            continue
        files = [*records.images, *(file for file, _ in records.quarantined)]
        known.update(records.names)
        different = [file.name for file in files if file.name in named and _differs(file, named[file.name])]
        altered += different
        if wrong is not None or (different and changed == "update"):
            jobs.append(Job(shard_number(shard.name), _in_order(writer, records.names, named)))
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


def _in_order(writer: StoreWriter, names: Sequence[str], named: Mapping[str, ImageSource]) -> tuple[ImageSource, ...]:
    """The images of a shard that is there, in the order in which a collection lists them."""
    order = {name: position for position, name in enumerate(named)}
    sources = [named.get(name) or locate(Path(writer.manifest.root), name) for name in names]
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
        self, jobs: Sequence[Job], *, workers: int, progress: Count = lambda images: None
    ) -> Iterator[tuple[Job, ShardBuilder]]:
        """Make shards, in order; images of the next ones are decoded meanwhile.

        Args:
            workers: processes that decode.
            progress: is called with the number of further images that are done.
        """
        assert self.config.sizing is not None
        with ThreadPoolExecutor(1, thread_name_prefix="drain") as thread:
            # while the network works on a batch, the one before it is copied and sorted in
            draining: Future[None] = thread.submit(lambda: None)

            def work(batch: Sequence[tuple[Tensor, CanvasImage]], into: ShardBuilder) -> None:
                nonlocal draining
                images = [image for _, image in batch]
                maps = self._features(torch.stack([canvas for canvas, _ in batch]), images)
                draining.result()
                draining = thread.submit(self._sort_in, maps, images, into, progress)

            portions = decode(jobs, self.config.sizing, portion=_PORTION, workers=workers)
            for number, of_job in groupby(portions, key=lambda portion: portion.job):
                builder = ShardBuilder(self.keep)
                waiting: dict[tuple[int, int], list[tuple[Tensor, CanvasImage]]] = {}
                for portion in of_job:
                    for position, file, reason in portion.unusable:
                        builder.quarantine(position, file, reason)
                    progress(len(portion.unusable))
                    for pixels, images in portion.canvases:
                        size = images[0].placement.canvas_size
                        for item in zip(pixels, images, strict=True):
                            waiting.setdefault(size, []).append(item)
                            if len(waiting[size]) == self.config.batch_size:
                                work(waiting.pop(size), builder)
                for batch in waiting.values():
                    work(batch, builder)
                draining.result()
                yield jobs[number], builder

    def _features(self, canvases: Tensor, images: Sequence[CanvasImage]) -> FeatureMaps:
        """Features of a batch; where memory runs out, in smaller and smaller parts."""
        pixels = canvases.to(self.backbone.device, non_blocking=True)
        while True:
            try:
                limited = replace(self.config, batch_size=self._limit)
                return extract_canvases(self.backbone, pixels, [image.placement for image in images], limited)
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
    def _sort_in(self, maps: FeatureMaps, images: Sequence[CanvasImage], into: ShardBuilder, progress: Count) -> None:
        selected = select(maps, self.keep, [image.file for image in images])
        for image, stored in zip(images, selected, strict=True):
            if isinstance(stored, PlacesError):
                into.quarantine(image.position, image.file, str(stored))
            else:
                into.add(image.position, stored, maps.grids)
        progress(len(images))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the CPU or a GPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)


def local_shards(
    writer: StoreWriter,
    jobs: Sequence[Job],
    backbone: Backbone,
    config: ExtractConfig,
    bulk: BulkConfig,
    progress: Count,
) -> Shards:
    """Make shards in this process, decoding in others; a shard is written while the next one is computed."""
    surroundings = environment(backbone)
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
        writing: Future[ShardEntry] | None = None
        maker = ShardMaker(backbone, config, writer.manifest.keep)
        for job, builder in maker.run(jobs, workers=bulk.decoders(), progress=progress):
            if writing is not None:
                yield writing.result(), surroundings
            writing = thread.submit(writer.save, builder, job.number)
        if writing is not None:
            yield writing.result(), surroundings


class ShardActor:
    """Makes one shard per row; lives in a process of its own with its own model."""

    def __init__(
        self,
        folder: str,
        backbone: str,
        device: str,
        dtype: str,
        weights: str,
        config: ExtractConfig,
        keep: Keep,
        workers: int,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)  # as where the run was started: rounding can depend on it
        loaded = load_backbone(backbone, device=device, dtype=getattr(torch, dtype))
        if weights_sha256(loaded) != weights:
            raise StoreError(f"{backbone} has other weights on this machine than where the run was started")
        self.maker = ShardMaker(loaded, config, keep)
        self.folder, self.workers, self.surroundings = Path(folder), workers, environment(loaded)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """{"job": JSON} -> {"shard": JSON}."""
        values = json.loads(row["job"])
        job = Job(values["number"], tuple(ImageSource(**source) for source in values["sources"]))
        ((_, builder),) = self.maker.run([job], workers=self.workers)
        entry = builder.save(self.folder, job.number)
        return {"shard": json.dumps({"entry": asdict(entry), "environment": self.surroundings})}


def ray_shards(
    writer: StoreWriter,
    jobs: Sequence[Job],
    loaded: Backbone,
    backbone: str,
    config: ExtractConfig,
    bulk: BulkConfig,
    progress: Count,
) -> Shards:
    """Make shards with Ray Data.

    Raises:
        ImportError: ray is not installed.
        OSError: nothing answers at the address.
    """
    if not jobs:
        return
    if place := re.fullmatch(r"([^/]+):(\d+)", bulk.address or ""):  # Ray itself would ask for a quarter of an hour
        try:
            socket.create_connection((place[1].strip("[]"), int(place[2])), timeout=10).close()
        except (OSError, OverflowError) as problem:
            raise OSError(f"address {bulk.address}: no Ray cluster answers there ({problem})") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it starts; nothing is sent anywhere
    with optional_import("the engine 'ray' needs Ray: pip install 'diffrep[ray]', or use the engine 'local'"):
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    started = not ray.is_initialized()
    if started:
        ray.init(address=bulk.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.execution_options.preserve_order = True  # shards are committed in order
        context.enable_progress_bars = False
        actor: Any = ShardActor  # Ray's own types know functions only
        rows = [{"job": json.dumps(asdict(job))} for job in jobs]
        shards = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            actor,
            fn_constructor_kwargs={
                "folder": str(writer.folder.absolute()),
                "backbone": backbone if not Path(backbone).exists() else str(Path(backbone).absolute()),
                "device": loaded.device.type,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "weights": weights_sha256(loaded),
                "config": config,
                "keep": writer.manifest.keep,
                "workers": bulk.workers or 0,
                "threads": torch.get_num_threads(),
            },
            compute=ActorPoolStrategy(size=min(bulk.actors, len(rows))),
            num_gpus=1 if loaded.device.type == "cuda" else 0,
        )
        for job, row in zip(jobs, shards.iter_rows(), strict=True):
            values = json.loads(row["shard"])
            progress(len(job.sources))
            yield ShardEntry(**values["entry"]), values["environment"]
    finally:
        if started:
            ray.shutdown()
