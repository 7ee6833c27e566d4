"""``diffrep index``: make the features of stores searchable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import Command
from diffrep.index import IndexConfig, index_store
from diffrep.store import open_store


@dataclass(frozen=True)
class Index(Command):
    """Make the features of one or more stores searchable.

    For example: diffrep index photos.store -o photos.index

    Stores whose features were made by different backbones, taps, seeds or settings are refused.
    """

    stores: Annotated[tuple[Path, ...], tyro.conf.Positional]  # made by `diffrep extract`
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # the index, a new folder
    json: bool = False  # print what was made as JSON
    config: Annotated[IndexConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=IndexConfig)

    def run(self) -> None:
        if not self.stores:
            raise ValueError("say which stores: diffrep index STORE -o INDEX")
        index = index_store(
            [open_store(store) for store in self.stores], self.output, self.config, progress=not self.json
        )
        if self.json:
            design = asdict(index.design)
            print(
                json.dumps({"index": str(self.output), "vectors": len(index), "level": index.level, "design": design})
            )
            return
        print(f"{index.design.kind}: {index.design.reason}")
        print(f"wrote {self.output}: {len(index):,} vectors of {index.tap}, one per {_ONE_PER[index.level]}")


_ONE_PER = {"image": "image", "patch": "place"}
