"""What pictures and pages are put together from: images in rows, captions, colours of features; HTML.

Pages need nothing but themselves: one escaping template engine, one content security policy. Whatever a title, a label
or a file name holds is shown as text. Data for a page's script go into a ``<script type="application/json">`` in which
``<``, ``>`` and ``&`` are escaped, and the policy lets a browser run nothing but the script that the package carries.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffrep.files import printable, write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from torch import Tensor

HEIGHT = 360  # of each image in a picture, pixels
_WIDEST = 4  # times its height: wider images are drawn smaller, so that a thin one needs no more memory than another
GAP = 14
PAPER = (250, 250, 248)
INK = (32, 36, 40)


def side_by_side(
    images: Sequence[Image.Image], *, titles: Sequence[str] = (), height: int = HEIGHT
) -> tuple[Image.Image, list[tuple[float, float, float]]]:
    """Images of one height in a row, with titles above.

    Returns:
        The picture, and for each image (left, top, scale): image point p lies at (left, top) + scale * (p + 0.5).
    """
    title_height = 30 if titles else 0
    scales = [min(height / image.height, _WIDEST * height / image.width) for image in images]
    sizes = [
        (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        for image, scale in zip(images, scales, strict=True)
    ]
    total = sum(width for width, _ in sizes) + GAP * (len(images) - 1)
    row = max(tall for _, tall in sizes)
    picture = Image.new("RGB", (total, row + title_height), PAPER)
    pen, places, left = ImageDraw.Draw(picture), [], 0
    for i, (image, size, scale) in enumerate(zip(images, sizes, scales, strict=True)):
        top = title_height + (row - size[1]) // 2
        picture.paste(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), (left, top))
        if i < len(titles):
            pen.text((left + 2, 6), printable(titles[i]), fill=INK, font=sized_font(17))
        places.append((float(left), float(top), scale))
        left += size[0] + GAP
    return picture, places


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other."""
    picture = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows) + GAP * (len(rows) - 1)), PAPER
    )
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height + GAP
    return picture


def component_colours(maps: Sequence[Tensor]) -> list[Image.Image]:
    """Three joint principal components of maps (h, w, C) as red, green and blue, one pixel per location.

    Equal colours mean similar features, across maps too.
    """
    import torch

    cells = [features.detach().flatten(0, 1).float().cpu() for features in maps]
    together = torch.cat(cells)
    centred = together - together.mean(0)
    _, _, directions = torch.linalg.svd(centred.double(), full_matrices=False)
    directions = torch.nn.functional.pad(directions[:3], (0, 0, 0, max(0, 3 - len(directions))))
    signs = torch.where(directions.gather(1, directions.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    scores = centred.double() @ (directions * signs).T
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return [
        Image.fromarray((255 * part).byte().unflatten(0, features.shape[:2]).numpy())
        for features, part in zip(maps, colours.split([len(c) for c in cells]), strict=True)
    ]


def sized_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def shortened(caption: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A caption of one line, at most `width` pixels wide: its start (a score) and its end (of a name) say most."""
    caption = printable(caption)
    text = caption
    for cut in range(9, len(caption)):
        if font.getlength(text) <= width:
            break
        text = f"{caption[:7]}…{caption[cut:]}"
    return text


def paste_inside(
    sheet: Image.Image, image: Image.Image, corner: tuple[int, int], side: int
) -> tuple[float, float, float]:
    """Put an image into a square, aspect kept; (left, top, scale) as `side_by_side` has them."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    left, top = corner[0] + (side - size[0]) // 2, corner[1] + (side - size[1]) // 2
    sheet.paste(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), (left, top))
    return float(left), float(top), scale


def image_grid(rows: Sequence[Tensor], *, captions: Sequence[str] = (), gap: int = 2) -> Image.Image:
    """Rows of images, each (N, 3, H, W) in [0, 1], as one picture; captions, one a row, stand before them."""
    import torch

    padded = [torch.nn.functional.pad(row, (gap, gap, gap, gap), value=1.0) for row in rows]
    joined = torch.cat([torch.cat(list(row), dim=-1) for row in padded], dim=-2)
    picture = Image.fromarray((joined.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    if not captions:
        return picture
    font = sized_font(14)
    margin = 2 * gap + math.ceil(max(font.getlength(caption) for caption in captions))
    labelled = Image.new("RGB", (margin + picture.width, picture.height), "white")
    labelled.paste(picture, (margin, 0))
    pen, top = ImageDraw.Draw(labelled), 0
    for row, caption in zip(padded, captions, strict=True):
        pen.text((gap, top + row.shape[-2] / 2), caption, fill="black", font=font, anchor="lm")
        top += row.shape[-2]
    return labelled


PNG = b"\x89PNG\r\n\x1a\n"  # how its files begin


def png16(values: np.ndarray, chunks: Mapping[bytes, bytes], *, differences: bool = False) -> bytes:
    """A PNG of (H, W, 1 to 4) uint16, of which Pillow writes one channel alone, with chunks before the pixels.

    Args:
        differences: to the pixel on the left, byte by byte, which pack smooth maps better.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    rows = np.ascontiguousarray(values, dtype=">u2").view(np.uint8)
    rows = np.diff(rows, axis=1, prepend=np.uint8(0)) if differences else rows
    lines = np.insert(rows.reshape(height, -1), 0, int(differences), axis=1)  # each begins with the filter's number
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = {b"IHDR": head, **chunks, b"IDAT": zlib.compress(lines.tobytes(), 6), b"IEND": b""}
    return PNG + b"".join(chunk(*part) for part in parts.items())


def render(template: str, *, title: str, style: str, script: str | None = None, **values: Any) -> str:
    """Fill a template of ``diffrep/templates``.

    Args:
        template: name of the file, which extends ``base.html``.
        title: of the page.
        style: name of the style sheet.
        script: name of the script, the only one that may run; None: none may.
        values: what the template shows; text is escaped, ``tojson`` makes data safe inside a script.

    Raises:
        jinja2.UndefinedError: the template needs a value that is missing.
    """
    from markupsafe import Markup

    sheet, code = _source(style), None if script is None else _source(script)
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src '{_digest(sheet)}'",
        f"script-src '{_digest(code)}'" if code else "script-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    values |= {"style": Markup(sheet), "script": None if code is None else Markup(code)}
    return _templates().get_template(template).render(title=title, policy="; ".join(policy), **values)


def data_uri(image: Image.Image, kind: Literal["PNG", "JPEG"] = "PNG", **options: Any) -> str:
    """An image as text that a page can hold; `options` as `PIL.Image.Image.save` takes them."""
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def smaller_uri(image: Image.Image, quality: int = 88) -> str:
    """An image as text for a page: PNG, or JPEG where that needs less than half of the room, as photographs do."""
    exact = data_uri(image)
    if image.mode != "RGB":
        return exact
    close = data_uri(image, "JPEG", quality=quality, subsampling=0)
    return close if 2 * len(close) < len(exact) else exact


@dataclass
class Page:
    """A report of pictures, text and tables, collected piece by piece; `save` writes it."""

    title: str
    lead: str
    _blocks: list[dict[str, Any]] = field(default_factory=list)

    def section(self, title: str, text: str = "") -> None:
        """Start a section."""
        self._blocks.append({"kind": "section", "text": title})
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._blocks.append({"kind": "text", "text": text})

    def code(self, code: str) -> None:
        """Something to type."""
        self._blocks.append({"kind": "code", "text": code})

    def figures(
        self, figures: Sequence[tuple[Image.Image, str]], *, layout: Literal["", "wide", "three", "small"] = ""
    ) -> None:
        """Pictures with captions, side by side where there is room.

        Args:
            figures: (picture, caption) each.
            layout: ``wide`` gives each picture a row, ``three`` puts three in one, ``small`` six or so.
        """
        sources = [(smaller_uri(image), caption) for image, caption in figures]
        self._blocks.append({"kind": "figures", "figures": sources, "layout": layout})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None = None) -> None:
        """A table; row `best` is set off."""
        self._blocks.append({"kind": "table", "header": header, "rows": rows, "best": best})

    def html(self) -> str:
        """The whole page."""
        return render("report.html", title=self.title, style="report.css", lead=self.lead, blocks=self._blocks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page at once: a file that is there is replaced only when the new one is whole."""
        write_whole(path, self.html())


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def _source(name: str) -> str:
    return resources.files("diffrep").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the policy calls an inline script or style sheet."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"
