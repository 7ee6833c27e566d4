"""Pictures of the pairs that went worst, to see what kind of mistake a recipe makes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffrep.files import write_whole
from diffrep.images import load_image

TILE = 480  # pixels: the long side of each image in a picture


@dataclass(frozen=True)
class Failure:
    """One pair with its matches, in pixels of the original images."""

    title: str
    source: Path
    target: Path
    points: Tensor  # (N, 2) queries in the source
    predicted: Tensor  # (N, 2) in the target
    truth: Tensor  # (N, 2) in the target
    right: Tensor  # (N,) bool


def draw_failure(failure: Failure) -> Image.Image:
    """Source with numbered dots; target with each match as a dot, its true place as a ring, a line between.

    Rings of matches that count as right are white.
    """
    pictures, scales = [], []
    for path in (failure.source, failure.target):
        picture = load_image(path)
        scale = TILE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        pictures.append(picture.resize(size, Image.Resampling.LANCZOS))
        scales.append(scale)
    font = ImageFont.load_default(15)
    head, gap = 30, 12
    width, height = sum(p.width for p in pictures) + gap, max(p.height for p in pictures) + head
    canvas = Image.new("RGB", (width, height), (24, 24, 28))
    canvas.paste(pictures[0], (0, head))
    canvas.paste(pictures[1], (pictures[0].width + gap, head))
    pen = ImageDraw.Draw(canvas)
    pen.text((8, 6), failure.title, fill=(235, 235, 235), font=font)

    def place(points: Tensor, side: int) -> list[tuple[float, float]]:
        left = 0 if side == 0 else pictures[0].width + gap
        shown = (points + 0.5) * scales[side]
        low = shown.new_zeros(2)
        shown = torch.maximum(torch.minimum(shown, shown.new_tensor(pictures[side].size)), low)
        return [(left + x, head + y) for x, y in shown.tolist()]

    queries, matched, true = place(failure.points, 0), place(failure.predicted, 1), place(failure.truth, 1)
    for i, (query, match, place_) in enumerate(zip(queries, matched, true, strict=True)):
        red, green, blue = colorsys.hsv_to_rgb(i / max(len(queries), 1), 0.75, 1.0)
        colour = (round(255 * red), round(255 * green), round(255 * blue))
        ring = (255, 255, 255) if bool(failure.right[i]) else colour
        pen.line([match, place_], fill=colour, width=2)
        pen.ellipse(_around(place_, 8), outline=(0, 0, 0), width=4)
        pen.ellipse(_around(place_, 7), outline=ring, width=2)
        for centre in (query, match):
            pen.ellipse(_around(centre, 5), fill=colour, outline=(0, 0, 0), width=1)
        pen.text(
            (query[0] + 7, query[1] - 16),
            str(i + 1),
            fill=colour,
            font=font,
            stroke_width=2,
            stroke_fill=(0, 0, 0),
        )
    return canvas


def _around(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


def save_failures(failures: Sequence[Failure], folder: Path) -> list[Path]:
    """Write one PNG per failure, numbered from the worst."""
    files = []
    for number, failure in enumerate(failures, start=1):
        file = folder / f"{number:02d}.png"
        write_whole(file, draw_failure(failure).save)
        files.append(file)
    return files
