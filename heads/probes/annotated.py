"""Images whose pixels are annotated, one file beside each: depth, surface normals, or labels of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.heads.families import FRAME_SIGNS, Frame
from diffrep.heads.probes.labelled import DataError
from diffrep.images import find_images

ENDINGS = (".npy", ".png")


@dataclass(frozen=True)
class AnnotatedFiles:
    """N images and the files of their annotations, not read yet."""

    name: str
    images: tuple[Path, ...]
    annotations: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: Sequence[int]) -> AnnotatedFiles:
        """Some of them."""
        return AnnotatedFiles(
            self.name, tuple(self.images[row] for row in rows), tuple(self.annotations[row] for row in rows)
        )


def pair_annotations(images: str | Path, annotations: str | Path) -> AnnotatedFiles:
    """The images of a folder, and the ``.npy`` or ``.png`` of the same name below the folder of annotations.

    Raises:
        ImageError: there is no image.
        DataError: there is no folder of annotations, or an image has none.
    """
    root, folder = Path(images), Path(annotations)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of annotations")
    files = find_images([root])
    base = root if root.is_dir() else root.parent
    matched = []
    for file in files:
        stem = folder / file.relative_to(base).with_suffix("")
        candidates = [place for ending in ENDINGS if (place := stem.with_name(stem.name + ending)).is_file()]
        matched.append(next((place for place in candidates if place.resolve() != file.resolve()), None))
    if missing := [file for file, place in zip(files, matched, strict=True) if place is None]:
        raise DataError(
            f"{folder}: {len(missing)} of {len(files)} images have no annotation, the first is {missing[0].name}"
            f" (expected {missing[0].stem}.npy or .png)"
        )
    return AnnotatedFiles(str(root), tuple(files), tuple(place for place in matched if place is not None))


def hold_out(data: AnnotatedFiles, share: float = 0.2, seed: int = 0) -> tuple[AnnotatedFiles, AnnotatedFiles]:
    """Split images at random into those to train on and those to measure on.

    Raises:
        ValueError: the share is not between 0 and 1.
        DataError: one of the two would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of held-out images must be between 0 and 1, got {share:g}")
    order = np.random.default_rng(seed).permutation(len(data))
    count = round(share * len(data))
    if not 0 < count < len(data):
        part = "test" if count == 0 else "train"
        raise DataError(f"{data.name}: the {part} split is empty ({len(data)} images, {share:g} of them held out)")
    return data.rows(sorted(order[count:])), data.rows(sorted(order[:count]))


def read_normals(file: Path, size: tuple[int, int], frame: Frame = "lub") -> Tensor:
    """Surface normals of an image.

    Args:
        file: ``.npy`` (H, W, 3), or ``.png`` with 0 for -1 and full for 1, black where unknown.
        size: (H, W) of the image.
        frame: camera axes of the file.

    Returns:
        (3, H, W) float32 of unit length, x left, y up, z towards the camera; zero where unknown.

    Raises:
        DataError: the file cannot be read, or is of another size than the image.
    """
    try:
        if file.suffix.lower() == ".npy":
            array = np.load(file, allow_pickle=False).astype(np.float32)
        else:
            with Image.open(file) as opened:
                if opened.mode not in ("RGB", "RGBA"):
                    raise ValueError(f"a picture of normals has three channels, this one is of mode {opened.mode}")
                pixels = np.asarray(opened.convert("RGB"))
            array = np.where(pixels.any(-1, keepdims=True), pixels.astype(np.float32) / 127.5 - 1, 0)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(f"{file}: cannot be read as normals ({error})") from None
    if array.shape != (*size, 3):
        raise DataError(f"{file}: has the shape {array.shape}, its image {(*size, 3)}")
    values = torch.from_numpy(np.nan_to_num(array)).permute(2, 0, 1) * torch.tensor(FRAME_SIGNS[frame])[:, None, None]
    length = values.norm(dim=0, keepdim=True)
    return torch.where(length > 0.5, values / length.clamp(min=1e-6), 0.0)


def read_labels(file: Path, size: tuple[int, int]) -> Tensor:
    """Labels of an image's pixels, (H, W) int64.

    Args:
        file: ``.png`` of one channel or a palette, or ``.npy`` of integers.
        size: (H, W) of the image.

    Raises:
        DataError: the file cannot be read, or is of another size than the image.
    """
    try:
        if file.suffix.lower() == ".npy":
            array = np.load(file, allow_pickle=False)
        else:
            with Image.open(file) as opened:
                if opened.mode not in ("P", "L", "1") and not opened.mode.startswith("I"):
                    raise ValueError(f"a picture of labels has one channel, this one is of mode {opened.mode}")
                array = np.array(opened).astype(np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"labels are integers, these are {array.dtype}")
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(f"{file}: cannot be read as labels ({error})") from None
    if array.shape != size:
        raise DataError(f"{file}: has the shape {array.shape}, its image {size}")
    return torch.from_numpy(array.astype(np.int64))
