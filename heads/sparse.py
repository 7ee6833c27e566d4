"""Reading known depths of an image, for example of a lidar, that make a relative map metric."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ENDINGS = (".npy", ".png", ".csv")
_FARTHEST = 1000.0  # metres: known depths that are mostly farther are taken for millimetres, and refused


class KnownDepthError(ValueError):
    """Known depths that are missing, cannot be read or do not belong to the image; the message names the file."""


def known_files(source: Path, images: Mapping[Path, Iterable[Path]]) -> dict[Path, Path]:
    """Which file of known depths belongs to which image.

    Args:
        source: one file, or a folder that has a file for each image, laid out as the images are, or flat.
        images: image -> its paths below their folder, without an ending, the most exact first.

    Returns:
        Image -> its file, for the images that have one.

    Raises:
        KnownDepthError: two images would get one file.
    """
    files: dict[Path, Path] = {}
    owners: dict[Path, Path] = {}
    for image, names in images.items():
        file = source if not source.is_dir() else _file_of(source, image, names)
        if file is None:
            continue
        if file in owners:
            raise KnownDepthError(f"{file}: known depths of two images, {owners[file]} and {image}: which one is it?")
        owners[file], files[image] = image, file
    return files


def _file_of(folder: Path, image: Path, names: Iterable[Path]) -> Path | None:
    """The first that exists of FOLDER/NAME.ENDING; flat, by the image's own name, at last."""
    candidates = (
        folder / name.with_name(f"{name.name}{ending}") for name in (*names, Path(image.stem)) for ending in ENDINGS
    )
    return next((file for file in candidates if file.is_file()), None)


def read_known_depths(source: Path, image: Path, size: tuple[int, int], *, per_metre: float = 1000.0) -> Tensor:
    """Known depths of an image as a map.

    Args:
        source: ``.npy``, (H, W) metres, floating point; ``.png``, 16 bits, millimetres unless `per_metre` says
            otherwise; ``.csv``, UTF-8, lines x,y,metres with x, y in pixels of the image; or a folder with such a file
            for each image, of the same name.
        image: the image's path, for its name.
        size: (width, height) of the image.
        per_metre: counts of a ``.png`` that make a metre.

    Returns:
        (H, W) float32 metres; 0 where nothing is known.

    Raises:
        KnownDepthError: the file is missing, cannot be read, is of another size than the image, or holds millimetres.
    """
    width, height = size
    if source.is_dir():
        if (file := _file_of(source, image, ())) is None:
            raise KnownDepthError(f"{source}: has no known depths for {image.name} ({image.stem}.npy, .png or .csv)")
        source = file
    if not source.is_file() or source.suffix.lower() not in ENDINGS:
        raise KnownDepthError(f"{source}: known depths are a file that ends in {', '.join(ENDINGS)}")
    read = {".csv": _from_csv, ".npy": _from_npy, ".png": _from_png}[source.suffix.lower()]
    try:
        array = read(source, height, width, per_metre)
    except KnownDepthError:
        raise
    except Exception as error:  # whatever the readers of damaged files raise
        raise KnownDepthError(f"{source}: cannot be read as known depths ({' '.join(str(error).split())})") from None
    if array.shape != (height, width):
        raise KnownDepthError(f"{source}: has the shape {array.shape}, its image {(height, width)}")
    array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    known = array[array > 0]
    if known.size and np.median(known) > _FARTHEST:
        raise KnownDepthError(
            f"{source}: known depths are metres, half of these are above {np.median(known):g}: are they millimetres?"
        )
    return torch.from_numpy(array)


def _from_npy(file: Path, height: int, width: int, per_metre: float) -> np.ndarray:
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise KnownDepthError(f"{file}: known depths are metres in floating point, this array is {array.dtype}")
    return array.astype(np.float32)


def _from_png(file: Path, height: int, width: int, per_metre: float) -> np.ndarray:
    with Image.open(file) as opened:
        if not opened.mode.startswith("I"):
            raise ValueError(f"a depth picture has one channel of 16 bits, this one is of mode {opened.mode}")
        return np.asarray(opened).astype(np.float32) / np.float32(per_metre)


def _from_csv(file: Path, height: int, width: int, per_metre: float) -> np.ndarray:
    depths = np.zeros((height, width), dtype=np.float32)
    unit = 1.0
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = [word.strip() for word in line.split(",")]
        if not any(words):
            continue
        try:
            x, y, metres = (float(word) for word in words)
        except ValueError:
            if number == 1 and len(words) == 3 and re.match(r"[A-Za-z\"']", words[0]):  # a line of names
                unit = 1000.0 if re.search(r"\bmm\b|millimet", words[2].lower()) else 1.0
                continue
            raise KnownDepthError(f"{file}: line {number} is {line!r}, not x,y,metres") from None
        if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):  # written so that NaN fails too
            raise KnownDepthError(
                f"{file}: line {number} lies at {x:g}, {y:g}, outside the image of {width} x {height}"
            )
        depths[min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)] = metres / unit
    return depths
