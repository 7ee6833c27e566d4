"""What the numbers in label files mean: names of classes, and numbers that are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffrep.heads.probes.annotated import AnnotatedFiles, read_labels
from diffrep.heads.probes.labelled import DataError
from diffrep.heads.probes.pixel_probe import IGNORED
from diffrep.images import load_image

MOST_CLASSES = 256  # that a palette holds


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
        for number in labels.unique().tolist():
            if number == self.ignored:
                continue
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
                picture = load_image(image)
                numbers |= set(read_labels(annotation, (picture.height, picture.width)).unique().tolist())
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
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: names of classes cannot be read ({error})") from None
