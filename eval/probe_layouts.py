"""The released layouts of classification data sets, read as labelled images with their official splits.

Nothing is downloaded; each reader takes the folder that the published archive unpacks to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffrep.heads.probes.labelled import DataError, LabelledImage, LabelledImages, Part, assemble, image_file
from diffrep.images import SUFFIXES

_OFFICIAL: tuple[Part, ...] = ("train", "test")


@dataclass(frozen=True)
class ProbeBenchmark:
    """A data set and how it is counted.

    Attributes:
        read: its folder -> labelled images with parts.
        metric: the number that papers report.
        sizes: images of the official (train, test), to notice an incomplete folder; from memory where noted.
    """

    name: str
    read: Callable[[Path], LabelledImages]
    metric: str = "top1"
    sizes: tuple[int, int] | None = None
    note: str = ""


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise DataError(f"{file}: is missing; is this the folder that the archive unpacks to?")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _pairs(file: Path) -> dict[str, str]:
    """First word -> rest, of a file of lines."""
    return {first: rest.strip() for first, _, rest in (line.partition(" ") for line in _lines(file))}


def imagenet(folder: Path, classes: Sequence[str] | None = None) -> LabelledImages:
    """ImageNet-1k as folders ``train/WNID`` and ``val/WNID``; val is the test.

    Args:
        classes: WordNet ids of a subset, such as ImageNet-50.
    """
    rows: list[LabelledImage] = []
    places: tuple[tuple[Part, str], ...] = (("train", "train"), ("test", "val"))
    for part, place in places:
        root = folder / place
        if not root.is_dir():
            raise DataError(f"{root}: is missing; ImageNet has the folders train and val with one folder per class")
        wanted = [d for d in sorted(root.iterdir()) if d.is_dir() and (classes is None or d.name in set(classes))]
        if classes is not None and len(wanted) < len(set(classes)):
            missing = sorted(set(classes) - {d.name for d in wanted})
            raise DataError(f"{root}: has no class {', '.join(missing[:3])} of the subset")
        for class_folder in wanted:
            rows += _in_folder(class_folder, folder, class_folder.name, part)
    return assemble(str(folder), rows)


def imagenet_subset(folder: Path, list_file: Path) -> LabelledImages:
    """ImageNet restricted to the classes of a file: a WordNet id first in each line (SCAN's lists are written so)."""
    return imagenet(folder, [line.split()[0] for line in _lines(list_file)])


def _in_folder(class_folder: Path, root: Path, label: str, part: Part) -> Iterator[LabelledImage]:
    for file in sorted(class_folder.iterdir()):
        if file.suffix.lower() in SUFFIXES or file.suffix == ".JPEG":
            yield LabelledImage(image_file(file, root), label, None, part)


def aircraft(folder: Path) -> LabelledImages:
    """FGVC-Aircraft, 100 variants: ``data/images`` and ``data/images_variant_{trainval,test}.txt``."""
    data = folder / "data" if (folder / "data").is_dir() else folder
    rows = []
    lists: tuple[tuple[Part, str], ...] = (("train", "trainval"), ("test", "test"))
    for part, name in lists:
        for key, label in _pairs(data / f"images_variant_{name}.txt").items():
            rows.append(LabelledImage(image_file(data / "images" / f"{key}.jpg", folder), label, None, part))
    return assemble(str(folder), rows)


def cub(folder: Path) -> LabelledImages:
    """CUB-200-2011: ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt`` and ``classes.txt``."""
    return _caltech_lists(folder, "images")


def nabirds(folder: Path) -> LabelledImages:
    """NABirds, 555 classes: the lists of CUB, of which only classes with images count."""
    return _caltech_lists(folder, "images")


def _caltech_lists(folder: Path, images: str) -> LabelledImages:
    files, labels = _pairs(folder / "images.txt"), _pairs(folder / "image_class_labels.txt")
    training, names = _pairs(folder / "train_test_split.txt"), _pairs(folder / "classes.txt")
    rows = []
    for key, file in files.items():
        if key not in labels or key not in training:
            raise DataError(f"{folder}: image {key} ({file}) has no class or no split in the lists")
        label = f"{labels[key]} {names.get(labels[key], '')}".strip()
        part: Part = "train" if training[key] == "1" else "test"
        rows.append(LabelledImage(image_file(folder / images / file, folder), label, None, part))
    return assemble(str(folder), rows)


def dogs(folder: Path) -> LabelledImages:
    """Stanford Dogs, 120 classes: ``Images``, ``train_list.mat`` and ``test_list.mat``."""
    rows = []
    for part in _OFFICIAL:
        for name in _cell_strings(_mat(folder / f"{part}_list.mat")["file_list"]):
            rows.append(LabelledImage(image_file(folder / "Images" / name, folder), name.split("/")[0], None, part))
    return assemble(str(folder), rows)


def cars(folder: Path) -> LabelledImages:
    """Stanford Cars, 196 classes: ``cars_{train,test}``, ``devkit/cars_train_annos.mat`` and the labelled test file.

    The test labels are ``cars_test_annos_withlabels.mat``, in the folder itself or in ``devkit``.
    """
    rows = []
    for part in _OFFICIAL:
        name = "cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        file = folder / "devkit" / name if (folder / "devkit" / name).is_file() else folder / name
        annotations = _mat(file)["annotations"].reshape(-1)
        for record in annotations:
            image, label = str(record["fname"].reshape(-1)[0]), int(record["class"].reshape(-1)[0])
            rows.append(LabelledImage(image_file(folder / f"cars_{part}" / image, folder), f"{label:03d}", None, part))
    return assemble(str(folder), rows)


def flowers(folder: Path) -> LabelledImages:
    """Oxford Flowers 102: ``jpg/image_NNNNN.jpg``, ``imagelabels.mat`` and ``setid.mat``.

    Train and val are joined (2040 images), as the published numbers have it.
    """
    labels = _mat(folder / "imagelabels.mat")["labels"].reshape(-1)
    ids = _mat(folder / "setid.mat")
    rows = []
    lists: tuple[tuple[str, Part], ...] = (("trnid", "train"), ("valid", "train"), ("tstid", "test"))
    for key, part in lists:
        for number in ids[key].reshape(-1).tolist():
            image = image_file(folder / "jpg" / f"image_{number:05d}.jpg", folder)
            rows.append(LabelledImage(image, f"{int(labels[number - 1]):03d}", None, part))
    return assemble(str(folder), rows)


def _mat(file: Path) -> Mapping[str, Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not file.is_file():
        raise DataError(f"{file}: is missing; is this the folder that the archive unpacks to?")
    try:
        return dict(loadmat(file))
    except (MatReadError, ValueError, NotImplementedError) as error:
        raise DataError(f"{file}: is no MATLAB file of version 7 or older ({error})") from None


def _cell_strings(cells: Any) -> Iterable[str]:
    for cell in cells.reshape(-1):
        value = cell
        while hasattr(value, "reshape") and getattr(value, "dtype", None) is not None and value.dtype.hasobject:
            value = value.reshape(-1)[0]
        yield str(value.reshape(-1)[0] if hasattr(value, "reshape") else value)


def from_list(folder: Path, list_file: Path) -> LabelledImages:
    """ImageNet with the training images of a list, one ``WNID_NNN.JPEG`` or ``WNID/NAME`` a line (1 % and 10 %)."""
    whole = imagenet(folder)
    wanted = {Path(line.split()[0]).name for line in _lines(list_file)}
    parts = whole.parts or ()
    rows = [
        LabelledImage(image, whole.classes[label], None, part)
        for image, label, part in zip(whole.images, whole.labels, parts, strict=True)
        if part != "train" or Path(image.name).name in wanted
    ]
    if not any(row.part == "train" for row in rows):
        raise DataError(f"{list_file}: names none of the training images of {folder}")
    return assemble(str(folder), rows)


BENCHMARKS: Mapping[str, ProbeBenchmark] = {
    b.name: b
    for b in (
        ProbeBenchmark("imagenet", imagenet, sizes=(1281167, 50000)),
        ProbeBenchmark("aircraft", aircraft, "mean_per_class", (6667, 3333), "sizes from memory"),
        ProbeBenchmark("cars", cars, sizes=(8144, 8041), note="sizes from memory"),
        ProbeBenchmark("cub", cub, sizes=(5994, 5794), note="sizes from memory"),
        ProbeBenchmark("dogs", dogs, sizes=(12000, 8580), note="sizes from memory"),
        ProbeBenchmark("flowers", flowers, "mean_per_class", (2040, 6149), "sizes from memory"),
        ProbeBenchmark("nabirds", nabirds, sizes=(23929, 24633), note="sizes from memory"),
    )
}
