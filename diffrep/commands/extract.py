"""``diffrep extract``, ``index``, ``query`` and ``search``: features of a collection, and what in it looks alike."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diffrep.backbones import Backbone, load_backbone
from diffrep.commands.options import (
    BackboneOptions,
    Command,
    DeviceOptions,
    PrecisionOptions,
    ReadingOptions,
    numbers,
    refuse_conditions,
    refuse_failed,
    typed_conditions,
)
from diffrep.features import ExtractConfig
from diffrep.files import DRAWING, check_writable, is_written_by_diffrep, number_of, printable, write_image
from diffrep.images import Sizing
from diffrep.index import IndexConfig, index_store
from diffrep.store import BulkConfig, Keep, extract_store, open_store
from diffrep.tasks import note_embedded

if TYPE_CHECKING:
    from PIL import Image

    from diffrep.index import Hit
    from diffrep.store import Extracted

_BATCH = 32  # images or noise draws that go through the network together; halved where memory runs out


@dataclass(frozen=True)
class Extract(ReadingOptions, PrecisionOptions):
    """Extract the features of a collection of images into a store, and go on after an interruption.

    For example: diffrep extract photos/ -o photos.store --taps up.1

    Run the same command again to resume, to append new images, or to have damaged shards made again.
    """

    FIRST = "output backbone extract.taps extract.timestep extract.ensemble size keep.kind device precision json"

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
        placed = self.placed()
        if "keep.points" in self.typed and self.keep.kind != "points":
            raise ValueError("--keep.points goes with --keep.kind points")
        backbone: str | Backbone = self.named(self.backbone)
        if self.schedule is not None or typed_conditions(self.typed):
            loaded = load_backbone(self.named(self.backbone), weights=self.schedule is not None, **placed)
            refuse_conditions(self.typed, [loaded])
            config = dataclasses.replace(config, **self.place(self.typed, loaded))
            if self.schedule is not None and self.bulk.engine == "local":
                backbone = loaded  # weights are read once
        new = not self.output.exists()
        done = extract_store(
            self.images,
            self.output,
            backbone,
            config,
            self.keep,
            self.bulk,
            root=self.root,
            **placed,
            progress=not self.json,
        )
        note_embedded("features", self.backbone)
        if self.json:
            print(json.dumps(dataclasses.asdict(done) | {"folder": str(done.folder)}, indent=2))
        else:
            for note in done.notes:
                print(printable(note))
            rate = f" ({done.images / done.seconds:.1f} a second)" if done.images else ""
            if done.images or done.before:
                print(f"wrote {done.folder}: {number_of(done.images, 'image')}{rate}, {done.before:,} already there")
        if new and not done.images and not done.before:
            shutil.rmtree(done.folder)
        refuse_quarantined(done)


def refuse_quarantined(done: Extracted) -> None:
    """End a command some of whose images could not be used; the store keeps their names, and the others.

    Raises:
        ValueError: one of this run could not be used, or none of any run.
    """
    failed = [f"{printable(name)}: {reason}" for name, reason in done.quarantined]
    for line in failed if len(failed) > 3 else ():
        print(f"left out {line}", file=sys.stderr)
    refuse_failed(failed, done.images + len(failed))
    if not done.images and not done.before:
        raise ValueError(f"{printable(done.folder)}: no image of it can be used; its records say why")


# -- `diffrep index`: make the features of stores searchable -------------------------------------------------


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
        print(f"wrote {self.output}: {number_of(len(index), 'vector')} of {index.tap}, one per {_ONE_PER[index.level]}")


_ONE_PER = {"image": "image", "patch": "place"}


# -- `diffrep query` and `diffrep search`: where in the collection is this? ----------------------------------


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(DeviceOptions):
    """What is looked for, and where the answer goes."""

    point: str | None = None  # x,y in pixels: a place in the image
    box: str | None = None  # x0,y0,x1,y1 in pixels: a part of the image
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10  # images to find
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = (
        None  # contact sheet, a picture; query.png without --json
    )
    json: bool = False  # print what was found as JSON

    @property
    def sheet(self) -> Path | None:
        """Where the contact sheet goes; None: it is not drawn."""
        return self.output or (None if self.json else Path("query.png"))

    def question(self) -> dict[str, Any]:
        """Point, box and k, once all options have been checked.

        Raises:
            ValueError, OSError: one of them cannot be used.
        """
        if (sheet := self.sheet) is not None:
            check_writable(sheet)
        if self.k < 1:
            raise ValueError(f"-k must be at least 1, got {self.k}")
        places = {"point": self.point, "box": self.box}
        question: dict[str, Any] = {
            what: None if text is None else numbers(text, what) for what, text in places.items()
        }
        return question | {"k": self.k}

    def answer(
        self, picture: Image.Image, hits: Sequence[Hit], question: dict[str, Any], asked: dict[str, str]
    ) -> None:
        """Print the hits and draw them."""
        from diffrep.index import contact_sheet

        part = {"point": question["point"], "box": question["box"]}
        if (sheet := self.sheet) is not None:
            write_image(sheet, contact_sheet(picture, hits, **part), mark=DRAWING)
        if self.json:
            print(json.dumps({**asked, **part, "hits": [hit.document() for hit in hits]}, indent=2))
            return
        for rank, hit in enumerate(hits, 1):
            place = "" if hit.place.point is None else "  at ({:.0f}, {:.0f})".format(*hit.place.point)
            print(f"{rank:3d}  {hit.score:.3f}  {printable(hit.place.image)}{place}")
        print(f"wrote {sheet}")


@dataclass(frozen=True)
class Query(BackboneOptions, QuestionOptions):
    """Find images that look like yours, or the places in a collection that look like a part of it.

    For example: diffrep query photos.index cat.jpg --point 120,80 -o found.png
    """

    FIRST = "point box k output backbone json"

    index: Annotated[Path, tyro.conf.Positional]  # made by `diffrep index`
    image: Annotated[Path, tyro.conf.Positional]  # what to look for
    backbone: str | None = None  # that made the index: where it lies now if it has moved, or what may be fetched

    def run(self) -> None:
        from diffrep.images import load_image
        from diffrep.index import open_index, query_image
        from diffrep.index.query import needs_fetching

        question = self.question()
        (backbone,) = self.named_alone([] if self.backbone is None else [self.backbone]) or (None,)
        picture, index = load_image(self.image), open_index(self.index)
        name = needs_fetching(index)
        if backbone is None and name is not None and sys.stdin.isatty():
            answer = input(f"{printable(self.index)} was made with {printable(name)}, fetch it? [y/N] ")
            backbone = name if answer.strip().lower() in ("y", "yes") else None
        hits = query_image(index, picture, **question, backbone=backbone, device=self.device)
        note_embedded("search", backbone or str(index.features.get("backbone")))
        self.answer(picture, hits, question, {"index": str(self.index), "image": str(self.image)})
        if index.level == "image" and (question["point"] or question["box"]):
            print(
                f"{self.index} holds one vector per image: the part was looked for in the {len(hits)} most similar"
                " images; `diffrep extract --keep.kind maps` keeps all places",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Search(BackboneOptions, QuestionOptions):
    """Find the images in a folder that look like yours, or have the places that look like a part of it.

    For example: diffrep search photos/ cat.jpg --point 120,80 -o found.png

    Extracts features, indexes them and asks. What it keeps makes the next question quick; new and changed images are
    extracted then. A place is the centre of a cell of the backbone's grid, which is coarse: `diffrep info BACKBONE`
    prints its stride, `diffrep match` answers to the pixel.
    """

    FIRST = "point box k output backbone work json device"

    folder: Annotated[Path, tyro.conf.Positional]  # where to look
    image: Annotated[Path, tyro.conf.Positional]  # what to look for
    backbone: str = "tiny"  # by name, folder or hub id
    work: Path | None = None  # folder that keeps features and indexes; else FOLDER.search beside the folder

    def run(self) -> None:
        from diffrep.images import load_image
        from diffrep.index import search_folder

        question, sheet = self.question(), self.sheet
        inside = sheet is not None and Path(os.path.realpath(sheet)).is_relative_to(os.path.realpath(self.folder))
        if sheet is not None and inside and sheet.is_file() and not is_written_by_diffrep(sheet):
            raise ValueError(f"{sheet}: is one of the images in {self.folder} and would be written over")
        picture = load_image(self.image)
        searched = search_folder(
            self.folder,
            picture,
            **question,
            backbone=self.named(self.backbone),
            work=self.work,
            device=self.device,
            progress=not self.json,
        )
        note_embedded("search", self.backbone)
        self.answer(picture, searched.hits, question, {"folder": str(self.folder), "image": str(self.image)})
        refuse_quarantined(searched.extracted)
