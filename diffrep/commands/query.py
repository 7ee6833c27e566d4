"""``diffrep query``: where in the collection is this?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from diffrep.commands.output import check_writable, write_image
from diffrep.draw import draw_contact_sheet
from diffrep.images import ImageError, load_image
from diffrep.index import Hit, open_index, query_image
from diffrep.store.sources import read_image


@dataclass(frozen=True)
class Query:
    """Find images that look like yours, or the places in a collection that look like a part of it.

    For example: diffrep query photos.index cat.jpg --point 120,80 -o found.png
    """

    index: Annotated[Path, tyro.conf.Positional]  # made by `diffrep index`
    image: Annotated[Path, tyro.conf.Positional]  # what to look for
    point: str | None = None  # x,y in pixels: a place in the image, for an index of places
    box: str | None = None  # x0,y0,x1,y1 in pixels: a part of the image, for an index of places
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10  # images to find
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # contact sheet; query.png without --json
    json: bool = False  # print what was found as JSON
    backbone: str | None = None  # where the backbone of the index lies now, if it was a folder that has moved
    device: str = "cpu"  # cpu or cuda

    def run(self) -> None:
        output = self.output or (None if self.json else Path("query.png"))
        if output is not None:
            check_writable(output)
        if self.k < 1:
            raise ValueError(f"-k must be at least 1, got {self.k}")
        point, box = _numbers(self.point, 2, "point"), _numbers(self.box, 4, "box")
        picture, index = load_image(self.image), open_index(self.index)
        hits = query_image(index, picture, point=point, box=box, k=self.k, backbone=self.backbone, device=self.device)
        if output is not None:
            write_image(output, contact_sheet(picture, hits, point=point, box=box))
        if self.json:
            found = [hit.document() for hit in hits]
            asked = {"index": str(self.index), "image": str(self.image), "point": point, "box": box}
            print(json.dumps(asked | {"hits": found}, indent=2))
            return
        for rank, hit in enumerate(hits, 1):
            place = "" if hit.place.point is None else "  at ({:.0f}, {:.0f})".format(*hit.place.point)
            print(f"{rank:3d}  {hit.score:.3f}  {hit.place.image}{place}")
        print(f"wrote {output}")


def contact_sheet(
    picture: Image.Image,
    hits: Sequence[Hit],
    *,
    point: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
) -> Image.Image:
    """The image that was asked with, and what was found; images that are gone are named on an empty sheet."""
    found = []
    for hit in hits:
        try:
            image: Image.Image | None = read_image(hit.place.root, hit.place.image)
        except ImageError:
            image = None
        found.append((image, f"{hit.score:.3f}  {hit.place.image}", hit.place.point))
    return draw_contact_sheet(picture, found, point=point, box=box)


def _numbers(text: str | None, count: int, what: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        form = "x,y in pixels, for example 120,80" if count == 2 else "x0,y0,x1,y1 in pixels, for example 20,20,90,80"
        raise ValueError(f"cannot read the {what} {text!r}: write {form}")
    return numbers
