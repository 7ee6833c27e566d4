"""`extract_store`: from a collection of images to a store, on this machine or on a cluster."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tqdm import tqdm

from diffrep.backbones import Backbone, load_backbone
from diffrep.devices import resolve_device
from diffrep.features import ExtractConfig
from diffrep.store.extraction import Changed, ShardMaker, make_plan
from diffrep.store.manifest import Keep, ShardEntry, StoreError, environment, provenance, weights_sha256
from diffrep.store.shards import load_records, places_in
from diffrep.store.sources import ImageSource, Job, find_sources
from diffrep.store.writer import StoreWriter

Engine: TypeAlias = Literal["local", "ray"]
Finished: TypeAlias = "tuple[Job, ShardEntry, Mapping[str, Any]]"  # the last: libraries and device that made it


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
        for name, least in (("shard_images", 1), ("workers", 0), ("actors", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

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
    if keep.kind == "points" and keep.points.endswith(".json"):
        places_in(keep.points)
    base, sources = find_sources(images, root)
    if isinstance(backbone, str):
        loaded = load_backbone(backbone, device=resolve_device(device), dtype=dtype)
    else:
        loaded = backbone
    config = config.resolve(loaded)
    features = provenance(loaded, config)
    if keep.kind == "points" and keep.points.endswith(".json"):
        features["points_sha256"] = sha256(Path(keep.points).read_bytes()).hexdigest()
    begun = time.monotonic()
    size = bulk.shard_images or (128 if keep.kind == "maps" else 1024)
    with StoreWriter(folder, features, keep, root=base, shard_images=size) as writer:
        plan = make_plan(writer, sources, bulk.changed, verify=bulk.verify)
        total = sum(len(job.sources) for job in plan.jobs)
        committed: list[ShardEntry] = []
        with tqdm(total=total, desc="extract", unit="image", disable=not progress) as bar:
            if bulk.engine == "ray":
                shards = ray_shards(writer, plan.jobs, loaded, str(backbone), config, bulk, bar.update)
            else:
                shards = local_shards(writer, plan.jobs, loaded, config, bulk, bar.update)
            for _, entry, surroundings in shards:
                writer.commit(entry, surroundings)
                committed.append(entry)
        quarantined = tuple(
            (file.name, reason)
            for entry in committed
            for file, reason in load_records(writer.folder, entry).quarantined
        )
    seconds = time.monotonic() - begun
    new = sum(entry.images for entry in committed)
    return Extracted(Path(folder), new, plan.finished, quarantined, seconds, plan.notes)


def local_shards(
    writer: StoreWriter,
    jobs: Sequence[Job],
    backbone: Backbone,
    config: ExtractConfig,
    bulk: BulkConfig,
    progress: Callable[[int], Any],
) -> Iterator[Finished]:
    """Make shards in this process, decoding in others; a shard is written while the next one is computed."""
    surroundings = environment(backbone)
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
        writing: tuple[Job, Future[ShardEntry]] | None = None
        maker = ShardMaker(backbone, config, writer.manifest.keep)
        for job, builder in maker.run(jobs, workers=bulk.decoders(), progress=progress):
            if writing is not None:
                yield writing[0], writing[1].result(), surroundings
            writing = (job, thread.submit(writer.save, builder, job.number))
        if writing is not None:
            yield writing[0], writing[1].result(), surroundings


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
    progress: Callable[[int], Any],
) -> Iterator[Finished]:
    """Make shards with Ray Data.

    Raises:
        ImportError: ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it starts; nothing is sent anywhere
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError:
        raise ImportError("the engine 'ray' needs Ray: pip install 'diffrep[ray]', or use the engine 'local'") from None
    if not jobs:
        return
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
            compute=ActorPoolStrategy(size=bulk.actors),
            num_gpus=1 if loaded.device.type == "cuda" else 0,
        )
        for job, row in zip(jobs, shards.iter_rows(), strict=True):
            values = json.loads(row["shard"])
            progress(len(job.sources))
            yield job, ShardEntry(**values["entry"]), values["environment"]
    finally:
        if started:
            ray.shutdown()
