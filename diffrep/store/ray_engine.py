"""The same extraction on Ray Data: actors with one model each make shards, this process commits them in order.

The store lies on a file system that all machines share. Actors write shard files, which do not count before the
manifest lists them; only this process, which holds the store's lock, writes the manifest.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffrep.backbones import Backbone, load_backbone
from diffrep.features import ExtractConfig
from diffrep.store.bulk import BulkConfig, Made
from diffrep.store.decoding import Job
from diffrep.store.extraction import ShardMaker
from diffrep.store.manifest import Keep, ShardEntry, StoreError
from diffrep.store.provenance import environment, weights_sha256
from diffrep.store.sources import ImageSource
from diffrep.store.writer import StoreWriter


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
        self.folder, self.workers, self.made_by = Path(folder), workers, environment(loaded)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """{"job": JSON} -> {"shard": JSON}."""
        given = json.loads(row["job"])
        job = Job(given["number"], tuple(ImageSource(**source) for source in given["sources"]))
        ((_, builder),) = self.maker.run([job], workers=self.workers)
        entry = builder.save(self.folder, job.number)
        return {"shard": json.dumps({"entry": asdict(entry), "environment": self.made_by})}


def ray_shards(
    writer: StoreWriter,
    jobs: Sequence[Job],
    loaded: Backbone,
    backbone: str,
    config: ExtractConfig,
    bulk: BulkConfig,
    progress: Callable[[int], Any],
) -> Iterator[Made]:
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
            made = json.loads(row["shard"])
            progress(len(job.sources))
            yield job, ShardEntry(**made["entry"]), made["environment"]
    finally:
        if started:
            ray.shutdown()
