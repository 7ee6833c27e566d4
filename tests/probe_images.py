"""Small labelled images for the tests of probes: squares of a colour per class, in every source's layout."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 70, 200), "green": (50, 160, 60), "red": (200, 50, 40)}


def picture(colour: str, number: int, size: int = 16) -> Image.Image:
    """A noisy patch of a colour, different for every number."""
    random = np.random.default_rng([number, len(colour)])
    pixels = np.array(COLOURS[colour]) + random.normal(0, 6, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="png")
    return out.getvalue()


def image_folder(folder: Path, per_class: int = 10, parts: tuple[str, ...] = ()) -> Path:
    """Folders of classes, below folders of parts where some are named."""
    for place, part in enumerate(parts or ("",)):
        for colour in COLOURS:
            for number in range(per_class):
                file = folder / part / colour / f"{number:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture(colour, 100 * place + number).save(file)
    return folder


def csv_table(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def shard(file: Path, per_class: int = 4, *, as_json: bool = False) -> Path:
    """A webdataset shard: an image beside its ``.cls`` or ``.json``."""
    with tarfile.open(file, "w") as archive:
        for label, colour in enumerate(COLOURS):
            for number in range(per_class):
                note = json.dumps({"label": colour, "owner": f"{number // 2}"}) if as_json else str(label)
                ending = "json" if as_json else "cls"
                for suffix, content in (("png", png(picture(colour, number))), (ending, note.encode())):
                    member = tarfile.TarInfo(f"{colour}{number:03d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return file
