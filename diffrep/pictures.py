"""What pictures are put together from: images in rows, captions, colours of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffrep.files import printable

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


def image_grid(rows: Sequence[Tensor], *, gap: int = 2) -> Image.Image:
    """Rows of images, each (N, 3, H, W) in [0, 1], as one picture."""
    padded = [F.pad(row, (gap, gap, gap, gap), value=1.0) for row in rows]
    joined = torch.cat([torch.cat(list(row), dim=-1) for row in padded], dim=-2)
    return Image.fromarray((joined.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
