"""Reading known depths of an image, for example of a lidar, that make a relative map metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ENDINGS = (".npy", ".png", ".csv")


def read_known_depths(source: Path, image: Path, size: tuple[int, int], *, per_metre: float = 1000.0) -> Tensor:
    """Known depths of an image as a map.

    Args:
        source: ``.npy``, (H, W) metres; ``.png``, 16 bits, millimetres unless `per_metre` says otherwise; ``.csv``,
            lines x,y,metres with x, y in pixels of the image; or a folder with such a file for each image, of the
            same name.
        image: the image's path, for its name.
        size: (width, height) of the image.
        per_metre: counts of a ``.png`` that make a metre.

    Returns:
        (H, W) float32 metres; 0 where nothing is known.

    Raises:
        ValueError: the file is missing, cannot be read, or is of another size than the image.
    """
    width, height = size
    if source.is_dir():
        candidates = [source / f"{image.stem}{ending}" for ending in ENDINGS]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            raise ValueError(f"{source}: has no known depths for {image.name} ({image.stem}.npy, .png or .csv)")
        source = file
    if not source.is_file() or source.suffix.lower() not in ENDINGS:
        raise ValueError(f"{source}: known depths are a file that ends in {', '.join(ENDINGS)}")
    if source.suffix.lower() == ".csv":
        return _from_csv(source, height, width)
    try:
        if source.suffix.lower() == ".npy":
            array = np.load(source, allow_pickle=False).astype(np.float32)
        else:
            with Image.open(source) as opened:
                if not opened.mode.startswith("I"):
                    raise ValueError(f"a depth picture has one channel of 16 bits, this one is of mode {opened.mode}")
                array = np.asarray(opened).astype(np.float32) / per_metre
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{source}: cannot be read as known depths ({error})") from None
    if array.shape != (height, width):
        raise ValueError(f"{source}: has the shape {array.shape}, its image {(height, width)}")
    return torch.from_numpy(np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0))


def _from_csv(file: Path, height: int, width: int) -> Tensor:
    depths = torch.zeros(height, width)
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or (number == 1 and any(c.isalpha() for c in line.replace("e", ""))):
            continue  # a line of names
        try:
            x, y, metres = (float(word) for word in line.split(","))
        except ValueError:
            raise ValueError(f"{file}: line {number} is {line!r}, not x,y,metres") from None
        column, row = round(x), round(y)
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"{file}: line {number} lies at {x:g}, {y:g}, outside the image of {width} x {height}")
        depths[row, column] = metres
    return depths
