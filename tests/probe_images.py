"""Small labelled images for the tests of probes: squares of a colour per class, in every source's layout."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
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


def refusal(load: Callable[[Path], object], folder: Path) -> str | None:
    try:
        load(folder)
    except ValueError as error:
        return str(error)
    return None


def damage_of_every_kind(file: Path, document: Mapping[str, object], load: Callable[[Path], object]) -> None:
    """Whatever value a field of a probe's document has, the folder is read or refused with its name."""
    for key in document:
        for value in (None, -1, 10**12, [], "x", {"x": 1}):
            file.write_text(json.dumps({**document, key: value}))
            error = refusal(load, file.parent)
            assert error is None or str(file.parent) in error, (key, value)
    for content in (b"", b"[" * 100_000, b"\xff", b"[]", b"{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(file.parent)):
            load(file.parent)
