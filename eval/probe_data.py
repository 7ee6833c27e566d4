"""Labelled images with a name: rendered scenes, scikit-learn's digits, and the released layouts of data sets.

Scenes and digits become files named in a table, so that they go through the same path as anybody's images. Of
published data sets each reader takes the folder that the archive unpacks to; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeAlias, cast

import numpy as np

from diffrep.eval.rendering import SceneJob, encoded, rendered_into
from diffrep.files import write_whole
from diffrep.heads.probes.labelled import (
    PARTS,
    DataError,
    LabelledImage,
    LabelledImages,
    Part,
    assemble,
    image_file,
    read_labelled,
)
from diffrep.images import SUFFIXES
from diffrep.results import csv_text
from diffrep.scenes import SEEN, scene_seed
from diffrep.settings import check

ATTRIBUTES = ("category", "colour", "second colour", "pattern", "view", "floor", "back")


@dataclass(frozen=True, kw_only=True)
class SceneImages:
    """How many scenes of each part are rendered.

    The embedded models were trained on scenes of the split "train" and validated on "val": images that they have
    seen would flatter a probe, so all parts are taken from the split "test", at places far apart.
    """

    train: int = 1100
    val: int = 330
    test: int = 660
    size: int = 128  # pixels
    categories: tuple[str, ...] = SEEN

    def __post_init__(self) -> None:
        check(self)

    def jobs(self) -> dict[tuple[Part, int], SceneJob]:
        """(part, index in the split "test") -> seed, category and size of each scene."""
        jobs: dict[tuple[Part, int], SceneJob] = {}
        for place, (part, count) in enumerate(zip(PARTS, (self.train, self.val, self.test), strict=True), 1):
            for i in range(count):
                index = place * 2**30 + i  # the other benchmarks draw theirs at random from 2**40
                jobs[part, index] = scene_seed("test", index), self.categories[i % len(self.categories)], self.size
        return jobs


def scene_images(
    folder: str | Path,
    label: str = "category",
    settings: SceneImages | None = None,
    *,
    workers: int = 1,
    progress: bool = True,
) -> LabelledImages:
    """Render scenes as PNG files once, and label them by their category or by one of their attributes.

    Args:
        folder: of the files; those that are there are kept.
        label: one of `ATTRIBUTES`.

    Raises:
        ValueError: there is no such attribute, or the folder holds other scenes.
    """
    if label not in ATTRIBUTES:
        raise ValueError(f"scenes have no label {label!r}; there are {', '.join(ATTRIBUTES)}")
    settings, folder, rows = settings or SceneImages(), Path(folder), []
    jobs = {folder / part / f"{index:012d}.json": job for (part, index), job in settings.jobs().items()}
    missing = {file: job for file, job in jobs.items() if not file.is_file()}
    for file, scene in rendered_into(folder, settings, missing, workers=workers, progress=progress):
        write_whole(file.with_suffix(".png"), encoded(scene.image, ".png"))
        words = {"category": scene.category, **scene.attributes}
        write_whole(file, json.dumps(words))  # last: it says that all is there
    for file in jobs:
        words = json.loads(file.read_text())
        if label in words:
            rows.append((file.with_suffix(".png"), words[label], file.parent.name))
    return _from_table(folder / f"{label.replace(' ', '-')}.csv", rows)


def digit_images(folder: str | Path) -> LabelledImages:
    """The 1797 handwritten digits that come with scikit-learn, 8 x 8 pixels, as PNG files; not split."""
    from sklearn.datasets import load_digits

    folder, digits, rows = Path(folder), load_digits(), []
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / f"{number:04d}.png"
        if not file.is_file():
            write_whole(file, encoded(np.rint(255 - image * 255 / 16).astype(np.uint8), ".png"))  # ink is dark
        rows.append((file, str(digit), ""))
    return _from_table(folder / "digits.csv", rows)


def _from_table(file: Path, rows: Sequence[tuple[Path, str, str]]) -> LabelledImages:
    lines = [(os.path.relpath(path, file.parent), label, part) for path, label, part in rows]
    write_whole(file, csv_text([("path", "label", "split"), *lines]))
    return read_labelled(file)


def named_images(source: str, work: str | Path, *, workers: int = 1) -> LabelledImages:
    """What the command line calls ``scenes``, ``scenes:ATTRIBUTE`` or ``digits``.

    Args:
        work: folder below which scenes and digits are written.
    """
    if source == "digits":
        return digit_images(Path(work) / source)
    settings, attribute = SceneImages(), source.partition(":")[2] or "category"
    place = f"scenes-{settings.size}-{settings.train}-{settings.val}-{settings.test}"
    return scene_images(Path(work) / place, attribute, settings, workers=workers)


Rows: TypeAlias = Iterator[tuple[Path, str, Part]]  # file, label and part of each image
Arguments = ParamSpec("Arguments")
_OFFICIAL: tuple[Part, ...] = ("train", "test")


def _layout(
    read: Callable[Concatenate[Path, Arguments], Rows],
) -> Callable[Concatenate[Path, Arguments], LabelledImages]:
    """A reader of a folder's images with their official split."""

    @wraps(read)
    def labelled(folder: Path, *args: Arguments.args, **kwargs: Arguments.kwargs) -> LabelledImages:
        rows = read(folder, *args, **kwargs)
        images = [LabelledImage(image_file(file, folder), label, None, part) for file, label, part in rows]
        return assemble(str(folder), images)

    return cast("Callable[Concatenate[Path, Arguments], LabelledImages]", labelled)


def _present(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file}: is missing; is this the folder that the archive unpacks to?")
    return file


def _lines(file: Path) -> list[str]:
    return [line for line in _present(file).read_text(encoding="utf-8").splitlines() if line.strip()]


def _pairs(file: Path) -> dict[str, str]:
    """First word -> rest, of a file of lines."""
    return {first: rest.strip() for first, _, rest in (line.partition(" ") for line in _lines(file))}


def _mat(file: Path) -> Mapping[str, Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return dict(loadmat(_present(file), squeeze_me=True))
    except (MatReadError, ValueError, NotImplementedError) as error:
        raise DataError(f"{file}: is no MATLAB file of version 7 or older ({error})") from None


@_layout
def imagenet(folder: Path, classes: Sequence[str] | None = None) -> Rows:
    """ImageNet-1k as folders ``train/WNID`` and ``val/WNID``; val is the test.

    Args:
        classes: WordNet ids of a subset, such as ImageNet-50.
    """
    for part, place in zip(_OFFICIAL, ("train", "val"), strict=True):
        root = folder / place
        if not root.is_dir():
            raise DataError(f"{root}: is missing; ImageNet has the folders train and val with one folder per class")
        wanted = [d for d in sorted(root.iterdir()) if d.is_dir() and (classes is None or d.name in set(classes))]
        if missing := sorted(set(classes or ()) - {d.name for d in wanted}):
            raise DataError(f"{root}: has no class {', '.join(missing[:3])} of the subset")
        for class_folder in wanted:
            for file in sorted(class_folder.iterdir()):
                if file.suffix.lower() in SUFFIXES:
                    yield file, class_folder.name, part


def imagenet_subset(folder: Path, list_file: Path) -> LabelledImages:
    """ImageNet restricted to the classes of a file: a WordNet id first in each line (SCAN's lists are written so)."""
    return imagenet(folder, [line.split()[0] for line in _lines(list_file)])


@_layout
def from_list(folder: Path, list_file: Path) -> Rows:
    """ImageNet with the training images of a list, one ``WNID_NNN.JPEG`` or ``WNID/NAME`` a line (1 % and 10 %)."""
    whole = imagenet(folder)
    wanted = {Path(line.split()[0]).name for line in _lines(list_file)}
    if not wanted & {Path(image.name).name for image in whole.images}:
        raise DataError(f"{list_file}: names none of the training images of {folder}")
    for image, label, part in zip(whole.images, whole.labels, whole.parts or (), strict=True):
        if part != "train" or Path(image.name).name in wanted:
            yield folder / image.name, whole.classes[label], part


@_layout
def aircraft(folder: Path) -> Rows:
    """FGVC-Aircraft, 100 variants: ``data/images`` and ``data/images_variant_{trainval,test}.txt``.

    Papers report the mean of the classes' accuracies.
    """
    data = folder / "data" if (folder / "data").is_dir() else folder
    for part, name in zip(_OFFICIAL, ("trainval", "test"), strict=True):
        for key, label in _pairs(data / f"images_variant_{name}.txt").items():
            yield data / "images" / f"{key}.jpg", label, part


@_layout
def cub(folder: Path) -> Rows:
    """CUB-200-2011: ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt`` and ``classes.txt``.

    NABirds has the same lists; of its 555 classes only those with images count.
    """
    files, labels = _pairs(folder / "images.txt"), _pairs(folder / "image_class_labels.txt")
    training, names = _pairs(folder / "train_test_split.txt"), _pairs(folder / "classes.txt")
    for key, file in files.items():
        if key not in labels or key not in training:
            raise DataError(f"{folder}: image {key} ({file}) has no class or no split in the lists")
        label = f"{labels[key]} {names.get(labels[key], '')}".strip()
        yield folder / "images" / file, label, "train" if training[key] == "1" else "test"


@_layout
def dogs(folder: Path) -> Rows:
    """Stanford Dogs, 120 classes: ``Images``, ``train_list.mat`` and ``test_list.mat``."""
    for part in _OFFICIAL:
        for name in map(str, np.atleast_1d(_mat(folder / f"{part}_list.mat")["file_list"])):
            yield folder / "Images" / name, name.split("/")[0], part


@_layout
def cars(folder: Path) -> Rows:
    """Stanford Cars, 196 classes: ``cars_{train,test}``, ``devkit/cars_train_annos.mat`` and the labelled test file.

    The test labels are ``cars_test_annos_withlabels.mat``, in the folder itself or in ``devkit``.
    """
    for part, name in zip(_OFFICIAL, ("cars_train_annos.mat", "cars_test_annos_withlabels.mat"), strict=True):
        file = folder / "devkit" / name if (folder / "devkit" / name).is_file() else folder / name
        for record in np.atleast_1d(_mat(file)["annotations"]):
            yield folder / f"cars_{part}" / str(record["fname"]), f"{int(record['class']):03d}", part


@_layout
def flowers(folder: Path) -> Rows:
    """Oxford Flowers 102: ``jpg/image_NNNNN.jpg``, ``imagelabels.mat`` and ``setid.mat``.

    Train and val are joined (2040 images), as the published numbers, means of the classes' accuracies, have it.
    """
    labels, ids = np.atleast_1d(_mat(folder / "imagelabels.mat")["labels"]), _mat(folder / "setid.mat")
    for key in ("trnid", "valid", "tstid"):
        for number in np.atleast_1d(ids[key]).tolist():
            part: Part = "test" if key == "tstid" else "train"
            yield folder / "jpg" / f"image_{number:05d}.jpg", f"{int(labels[number - 1]):03d}", part


@dataclass(frozen=True)
class ProbeBenchmark:
    """A published data set.

    Attributes:
        read: its folder -> labelled images with parts.
        sizes: images of the official (train, test), to notice an incomplete folder; but for ImageNet's from memory.
    """

    read: Callable[[Path], LabelledImages]
    sizes: tuple[int, int]


BENCHMARKS: Mapping[str, ProbeBenchmark] = {
    "imagenet": ProbeBenchmark(imagenet, (1281167, 50000)),
    "aircraft": ProbeBenchmark(aircraft, (6667, 3333)),
    "cars": ProbeBenchmark(cars, (8144, 8041)),
    "cub": ProbeBenchmark(cub, (5994, 5794)),
    "dogs": ProbeBenchmark(dogs, (12000, 8580)),
    "flowers": ProbeBenchmark(flowers, (2040, 6149)),
    "nabirds": ProbeBenchmark(cub, (23929, 24633)),
}
