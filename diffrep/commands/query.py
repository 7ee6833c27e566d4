"""``diffrep query`` and ``diffrep search``: where in the collection is this?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diffrep.commands.options import BackboneOptions, DeviceOptions, numbers
from diffrep.files import DRAWING, check_writable, printable, write_image
from diffrep.tasks import note_embedded

if TYPE_CHECKING:
    from PIL import Image

    from diffrep.index import Hit


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

    folder: Annotated[Path, tyro.conf.Positional]  # where to look
    image: Annotated[Path, tyro.conf.Positional]  # what to look for
    backbone: str = "tiny"  # by name, folder or hub id
    work: Path | None = None  # folder that keeps features and indexes; else FOLDER.search beside the folder

    def run(self) -> None:
        from diffrep.images import load_image
        from diffrep.index import search_folder

        question = self.question()
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
        note_embedded(self.backbone, "search")
        self.answer(picture, searched.hits, question, {"folder": str(self.folder), "image": str(self.image)})
        for name, reason in searched.extracted.quarantined:
            print(f"left out {printable(name)}: {reason}", file=sys.stderr)
