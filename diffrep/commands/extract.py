"""``diffrep extract``: from a collection of images to a store of features."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import BackboneOptions, PrecisionOptions
from diffrep.features import ExtractConfig
from diffrep.files import printable
from diffrep.images import Sizing
from diffrep.store import BulkConfig, Keep, extract_store
from diffrep.tasks import note_embedded

_BATCH = 32  # images or noise draws that go through the network together; halved where memory runs out


@dataclass(frozen=True)
class Extract(BackboneOptions, PrecisionOptions):
    """Extract the features of a collection of images into a store, and go on after an interruption.

    For example: diffrep extract photos/ -o photos.store --taps up.1

    Run the same command again to resume, to append new images, or to have damaged shards made again.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional]  # files, folders, globs, .tar archives, .parquet of paths
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # the store, a folder; docs/store.md describes it
    backbone: str = "tiny"  # by name, folder or hub id
    size: int | None = None  # squash images to a square of this side, in pixels, instead of the backbone's own rule
    root: Path | None = None  # the folder to which image names are relative; else the deepest that holds all images
    json: bool = False  # print what was done as JSON
    extract: Annotated[ExtractConfig, tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: ExtractConfig(batch_size=_BATCH)
    )
    keep: Keep = field(default_factory=Keep)
    bulk: Annotated[BulkConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=BulkConfig)

    def run(self) -> None:
        if not self.images:
            raise ValueError("say which images: diffrep extract IMAGES -o STORE")
        logging.basicConfig(format="%(message)s")
        config = self.extract
        if self.size is not None:
            config = dataclasses.replace(config, sizing=Sizing("squash", self.size))
        device, dtype = self.resolved()
        done = extract_store(
            self.images,
            self.output,
            self.named(self.backbone),
            config,
            self.keep,
            self.bulk,
            root=self.root,
            device=device,
            dtype=dtype,
            progress=not self.json,
        )
        note_embedded(self.backbone, "features")
        if self.json:
            print(json.dumps(dataclasses.asdict(done) | {"folder": str(done.folder)}, indent=2))
            return
        for note in done.notes:
            print(printable(note))
        for name, reason in done.quarantined:
            print(f"quarantined {printable(name)}: {reason}")
        rate = f" ({done.images / done.seconds:.1f} a second)" if done.images else ""
        print(f"wrote {done.folder}: {done.images:,} images{rate}, {done.before:,} were there already")
