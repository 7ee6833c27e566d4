"""Images whose pixels are annotated, one file beside each: depth, surface normals, or labels of classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.files import number_of, one_line
from diffrep.heads.families import FRAME_SIGNS, Frame
from diffrep.heads.maps import read_known_depths
from diffrep.heads.probes.labelled import DataError
from diffrep.images import find_images, load_image
from diffrep.results import read_array
from diffrep.settings import check

DenseTask: TypeAlias = Literal["depth", "normals"]
ENDINGS = (".npy", ".png")
IGNORED = -1  # label of pixels that are not used
MOST_CLASSES = 256  # that a palette holds


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
        images, annotations = (tuple(files[row] for row in rows) for files in (self.images, self.annotations))
        return AnnotatedFiles(self.name, images, annotations)


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
    matched: list[Path] = []
    missing: list[Path] = []
    for file in files:
        stem = folder / file.relative_to(base).with_suffix("")
        places = [stem.with_name(stem.name + ending) for ending in ENDINGS]
        beside = [place for place in places if place.is_file() and place.resolve() != file.resolve()]
        matched += beside[:1]
        missing += [] if beside else [file]
    if missing:
        raise DataError(
            f"{folder}: no annotation for {len(missing)} of {number_of(len(files), 'image')}, the first is"
            f" {missing[0].name} (expected {missing[0].stem}.npy or .png)"
        )
    return AnnotatedFiles(str(root), tuple(files), tuple(matched))


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


def _read_array(file: Path, what: str, shape: tuple[int, ...], decode: Callable[[Image.Image], Any], kind: type) -> Any:
    """The array of a ``.npy``, or of a picture through `decode`; its numbers are of a kind that numpy knows."""
    try:
        if file.suffix.lower() == ".npy":
            array = read_array(file)
        else:
            with Image.open(file) as opened:
                array = decode(opened)
        if not np.issubdtype(array.dtype, kind):
            raise ValueError(f"{what} are {kind.__name__}s, these are {array.dtype}")
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(f"{file}: cannot be read as {what} ({error})") from None
    if array.shape != shape:
        raise DataError(f"{file}: has the shape {array.shape}, its image {shape}")
    return array


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

    def decode(picture: Image.Image) -> Any:
        if picture.mode not in ("RGB", "RGBA"):
            raise ValueError(f"a picture of normals has three channels, this one is of mode {picture.mode}")
        pixels = np.asarray(picture.convert("RGB"))
        return np.where(pixels.any(-1, keepdims=True), pixels.astype(np.float32) / 127.5 - 1, 0)

    array = np.nan_to_num(_read_array(file, "normals", (*size, 3), decode, np.number).astype(np.float32))
    values = torch.from_numpy(array).permute(2, 0, 1) * torch.tensor(FRAME_SIGNS[frame])[:, None, None]
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

    def decode(picture: Image.Image) -> Any:
        if picture.mode not in ("P", "L", "1") and not picture.mode.startswith("I"):
            raise ValueError(f"a picture of labels has one channel, this one is of mode {picture.mode}")
        return np.array(picture).astype(np.int64)

    return torch.from_numpy(_read_array(file, "labels", size, decode, np.integer).astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """How annotation files are read."""

    per_metre: float = 1000.0  # counts of a 16-bit depth .png; 1000: millimetres
    frame: Frame = "lub"  # camera axes of normals: lub (x left, y up, z to the camera), rub, rdf

    def __post_init__(self) -> None:
        check(self)

    def read(self, task: DenseTask, file: Path, size: tuple[int, int]) -> Tensor:
        """Depth (1, H, W) in metres or normals (3, H, W) in "lub" of an image of size (H, W); 0 where unknown.

        Raises:
            ValueError: the file cannot be read, or is of another size.
        """
        if task == "normals":
            return read_normals(file, size, self.frame)
        return read_known_depths(file, file, size[::-1], per_metre=self.per_metre)[None]


@dataclass(frozen=True)
class PixelClasses:
    """The classes of label files.

    Attributes:
        names: of the K classes.
        numbers: that stand for them in the files.
        ignored: number of pixels that are not used.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    ignored: int | None = None

    def read(self, file: Path, size: tuple[int, int]) -> Tensor:
        """Labels (H, W) int64 in 0..K - 1, `IGNORED` where a pixel is not used.

        Raises:
            DataError: the file cannot be read, or has a number that stands for nothing.
        """
        labels = read_labels(file, size)
        classes = torch.full_like(labels, IGNORED)
        for number in set(labels.unique().tolist()) - {self.ignored}:
            if number not in self.numbers:
                raise DataError(
                    f"{file}: has the label {number}, which is none of the {len(self.names)} classes"
                    f" ({self.numbers[0]}..{self.numbers[-1]}) nor the ignored {self.ignored}"
                )
            classes[labels == number] = self.numbers.index(number)
        return classes

    def examples(self, data: AnnotatedFiles) -> Iterator[tuple[Image.Image, Tensor]]:
        """Images with their labels, one at a time.

        Raises:
            ImageError, DataError: one of them cannot be read.
        """
        for image, annotation in zip(data.images, data.annotations, strict=True):
            picture = load_image(image)
            yield picture, self.read(annotation, (picture.height, picture.width))


def find_classes(parts: Sequence[AnnotatedFiles], names: Path | None = None, ignored: int | None = 255) -> PixelClasses:
    """The classes of label files, by their names or, where there are none, by the numbers that occur.

    Args:
        names: a text file with a name in each line, or JSON: a list of names, or an object of number -> name; None:
            classes are called by their numbers.

    Raises:
        DataError: the names cannot be read, or there are fewer than two classes, or more than `MOST_CLASSES`.
    """
    if names is not None:
        by_number = _named(names)
    else:
        numbers: set[int] = set()
        for data in parts:
            for image, annotation in zip(data.images, data.annotations, strict=True):
                numbers |= set(read_labels(annotation, load_image(image).size[::-1]).unique().tolist())
        by_number = {number: str(number) for number in sorted(numbers - {ignored})}
    where = str(names) if names is not None else parts[0].name
    if not 2 <= len(by_number) <= MOST_CLASSES:
        raise DataError(f"{where}: a pixel probe tells 2 to {MOST_CLASSES} classes apart, found {len(by_number)}")
    return PixelClasses(tuple(by_number.values()), tuple(by_number), ignored)


def _named(file: Path) -> dict[int, str]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix.lower() != ".json":
            return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
        values = json.loads(text)
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return dict(sorted((int(number), str(name)) for number, name in pairs))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: names of classes cannot be read ({one_line(error)})") from None
