"""Labelled images: folders by class, tables, webdataset shards, Hugging Face data sets on disk."""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from diffrep.files import read_document
from diffrep.images import SUFFIXES, images_below
from diffrep.store.sources import ImageSource

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
_SPELLINGS: Mapping[str, Part] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class DataError(ValueError):
    """Labelled images that cannot be used; the message names the place and what is wrong."""


class Readable(Protocol):
    """An image that has not been read yet."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class StoredBytes:
    """An image whose file content lies in a table."""

    name: str
    content: bytes

    def read(self) -> bytes:
        return self.content


SAMPLED = 2**15  # bytes at either end of a file that are looked at


def images_sha256(images: Iterable[Readable]) -> str:
    """What a list of images is known by when something is kept for it: SHA-256 over their names and contents.

    Files of up to twice `SAMPLED` bytes count in full, larger ones by size, time of change and both ends.
    """
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.name.encode("utf-8", "surrogateescape") + b"\0")
        if not isinstance(image, ImageSource):
            digest.update(hashlib.sha256(image.read()).digest())
            continue
        digest.update(f"{image.size}\0".encode())
        if image.size > 2 * SAMPLED:
            digest.update(f"{image.modified}\0".encode())
        try:
            with open(image.file, "rb") as opened:
                for start in sorted({0, max(0, image.size - SAMPLED)}):
                    opened.seek((image.offset or 0) + start)
                    digest.update(opened.read(min(SAMPLED, image.size)))
        except OSError as error:  # reading it will fail too, and say so
            digest.update(str(error.errno).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class LabelledImages:
    """N images with one label each.

    Attributes:
        images: not read yet; their names are unique.
        labels: number of each one's class.
        classes: names of the K classes.
        groups: images of one group never lie in different parts; None: each is its own.
        parts: which part each belongs to, where the source says so.
    """

    name: str
    images: tuple[Readable, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    parts: tuple[Part, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def counts(self, rows: Iterable[int] | None = None) -> dict[str, int]:
        """Class -> images, of some rows or of all."""
        counts = Counter(self.labels[i] for i in (range(len(self)) if rows is None else rows))
        return {name: counts[number] for number, name in enumerate(self.classes)}


@dataclass(frozen=True)
class LabelledImage:
    """One image with its label, and its group and part where the source names them."""

    image: Readable
    label: str
    group: str | None = None
    part: Part | None = None


def assemble(name: str, rows: Sequence[LabelledImage], classes: Sequence[str] | None = None) -> LabelledImages:
    """Check rows and number their classes: in the given order, else sorted, as numbers where all are.

    Raises:
        DataError: there are no rows, fewer than two classes, an image with two labels, or only some rows name a
            part or a group.
    """
    if not rows:
        raise DataError(f"{name}: no labelled image found")
    labels: dict[str, str] = {}
    for row in rows:
        if labels.setdefault(row.image.name, row.label) != row.label:
            first = labels[row.image.name]
            raise DataError(f"{name}: {row.image.name} has two labels that disagree, {first!r} and {row.label!r}")
    unique = list({row.image.name: row for row in rows}.values())
    names = {row.label for row in unique}
    if classes is None:
        numeric = all(label.lstrip("-").isdigit() for label in names)
        classes = sorted(names, key=lambda label: (int(label), label) if numeric else (0, label))
    elif unknown := sorted(names - set(classes)):
        raise DataError(f"{name}: has the labels {', '.join(unknown[:5])}, which are not among its classes")
    if len(classes) < 2:
        raise DataError(f"{name}: a probe tells at least two classes apart, found only {', '.join(classes)}")
    for what, values in (("part", [r.part for r in unique]), ("group", [r.group for r in unique])):
        if (missing := sum(value is None for value in values)) and missing < len(values):
            raise DataError(f"{name}: {missing} of {len(values)} images have no {what}, the others have one")
    numbers = {label: number for number, label in enumerate(classes)}
    return LabelledImages(
        name=name,
        images=tuple(row.image for row in unique),
        labels=tuple(numbers[row.label] for row in unique),
        classes=tuple(classes),
        groups=None if unique[0].group is None else tuple(row.group or "" for row in unique),
        parts=None if unique[0].part is None else tuple(row.part or "train" for row in unique),
    )


def read_labelled(
    source: str | Path | Any, *, image: str | None = None, label: str = "label", group: str | None = None
) -> LabelledImages:
    """Find the labelled images of a source.

    Sources: a folder with one folder of images per class, or with ``train``, ``val``, ``test`` folders of such; a
    ``.csv`` table with columns for path (relative to the table), label and, where they are there, ``split``; a
    ``.tar`` in webdataset's layout, or a folder or glob pattern of such (image beside ``.cls`` or ``.json``); a
    Hugging Face data set that `save_to_disk` wrote, or a ``.parquet`` file of one; in Python also a `datasets.Dataset`
    or `DatasetDict` itself.

    Args:
        image: the column or key that holds the image; None: "path" in a table, "image" in a data set.
        label: the column or key that holds the label.
        group: the column or key that holds the group.

    Raises:
        DataError: nothing is found, or labels disagree; see also `assemble`.
    """
    if not isinstance(source, (str, Path)):
        return from_data_set(source, image=image or "image", label=label, group=group)
    path = Path(source)
    if path.suffix.lower() == ".csv":
        return _from_csv(path, image or "path", label, group)
    if path.suffix.lower() == ".parquet" or any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _from_arrow(path, image or "image", label, group)
    shards = _shards(path)
    if shards:
        return _from_shards(str(source), shards, label, group)
    if path.is_dir():
        return _from_folder(path)
    raise DataError(
        f"{source}: no such folder of classes, .csv, .tar or .parquet" if not path.exists() else
        f"{source}: is neither a folder of classes nor a .csv, .tar or .parquet file"
    )  # fmt: skip


# -- folders ------------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> LabelledImages:
    below = [d for d in sorted(folder.iterdir()) if d.is_dir() and not d.name.startswith(".")]
    parts: dict[Path, Part | None] = {d: _SPELLINGS[d.name.lower()] for d in below if d.name.lower() in _SPELLINGS}
    if not below:
        raise DataError(f"{folder}: has no folders; each class is a folder of images")
    if not parts:
        return assemble(str(folder), list(_class_folders(folder, folder, None)))
    rows, classes = [], {}
    for part_folder, part in parts.items():
        of_part = list(_class_folders(part_folder, folder, part))
        if not of_part:
            raise DataError(f"{part_folder}: the split is empty")
        rows += of_part
        classes[part_folder.name] = {row.label for row in of_part}
    names = list(classes)
    for other in names[1:]:
        if differ := sorted(classes[names[0]] ^ classes[other]):
            raise DataError(
                f"{folder}: {names[0]} and {other} do not have the same classes; they differ in {', '.join(differ[:5])}"
            )
    return assemble(str(folder), rows)


def _class_folders(folder: Path, root: Path, part: Part | None) -> Iterable[LabelledImage]:
    for class_folder in sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")):
        for file in images_below(class_folder):
            yield LabelledImage(image_file(file, root), class_folder.name, part=part)


def image_file(file: Path, root: Path) -> ImageSource:
    """An image file, named relative to a folder; one that does not exist is found out when it is read."""
    name = (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()
    try:
        status = file.stat()
    except OSError:
        return ImageSource(name, str(file), -1, 0)
    return ImageSource(name, str(file), status.st_size, status.st_mtime_ns)


# -- tables -------------------------------------------------------------------------------------------------


def _from_csv(file: Path, image: str, label: str, group: str | None) -> LabelledImages:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            table = csv.DictReader(opened)
            columns, lines = table.fieldnames or [], list(enumerate(table, 2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as a table in UTF-8 ({_reason(error)})") from None
    wanted = [image, label, *([group] if group else [])]
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(f"{file}: has no column {', '.join(missing)}, only {', '.join(columns)}")
    rows = []
    for number, line in lines:
        where = f"{file}, line {number}"
        if empty := [name for name in wanted if not line[name]]:
            raise DataError(f"{where}: the {empty[0]} is empty")
        source = image_file(file.parent / line[image], file.parent)
        part = _part(line["split"], where) if line.get("split") else None
        rows.append(LabelledImage(source, line[label], line[group] if group else None, part))
    return assemble(str(file), rows)


def _part(text: str, where: str) -> Part:
    if text.lower() not in _SPELLINGS:
        raise DataError(f"{where}: the split {text!r} is none of {', '.join(PARTS)}")
    return _SPELLINGS[text.lower()]


# -- webdataset ---------------------------------------------------------------------------------------------


def _shards(path: Path) -> list[Path]:
    if path.suffix.lower() == ".tar":
        if any(c in str(path) for c in "*?["):
            return sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        return [path] if path.is_file() else []
    return sorted(path.glob("*.tar")) if path.is_dir() else []


def _from_shards(name: str, shards: Sequence[Path], label: str, group: str | None) -> LabelledImages:
    rows = []
    for shard in shards:
        samples: dict[str, dict[str, Any]] = defaultdict(dict)
        try:
            modified = shard.stat().st_mtime_ns
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    place = PurePosixPath(member.name.removeprefix("./"))
                    stem, _, ending = place.name.partition(".")
                    sample = samples[str(place.parent / stem)]
                    if f".{ending.lower()}" in SUFFIXES:
                        inside = f"{shard.name}/{place}"
                        sample["image"] = ImageSource(inside, str(shard), member.size, modified, member.offset_data)
                    elif ending in ("cls", "json"):
                        content = archive.extractfile(member)
                        sample[ending] = content.read() if content is not None else b""
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise DataError(f"{shard}: is not an uncompressed webdataset shard ({error})") from None
        rows += [_sample_row(shard, key, sample, label, group) for key, sample in samples.items() if "image" in sample]
    return assemble(name, rows)


def _sample_row(shard: Path, key: str, sample: Mapping[str, Any], label: str, group: str | None) -> LabelledImage:
    values: Mapping[str, Any] = {}
    try:
        if "json" in sample:
            values = json.loads(sample["json"])
            if not isinstance(values, Mapping):
                raise ValueError(f"its .json must hold an object, found {type(values).__name__}")
        text = sample["cls"].decode().strip() if "cls" in sample else values.get(label)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shard}: the label of {key} cannot be read ({_reason(error)})") from None
    if text is None or isinstance(text, (list, dict)):
        raise DataError(f"{shard}: {key} has no label (neither .cls nor {label!r} in a .json)")
    if group is not None and group not in values:
        raise DataError(f"{shard}: {key} has no group ({group!r} in a .json)")
    return LabelledImage(sample["image"], str(text), str(values[group]) if group is not None else None)


def _reason(error: BaseException) -> str:
    """The message of an error in one short line."""
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]


# -- Hugging Face data sets ---------------------------------------------------------------------------------


def _from_arrow(path: Path, image: str, label: str, group: str | None) -> LabelledImages:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{path}: reading Arrow and Parquet files needs pyarrow: pip install pyarrow") from None
    tables: list[tuple[str, Any, Part | None]] = []
    try:
        if path.suffix.lower() == ".parquet":
            tables.append((path.stem, pq.read_table(path), None))
        else:
            for folder, part in _split_folders(path):
                for entry in read_document(folder / "state.json", error=DataError)["_data_files"]:
                    with pa.memory_map(str(folder / Path(entry["filename"]).name)) as opened:
                        table = pa.ipc.open_stream(opened).read_all()
                    tables.append((f"{folder.name}/{entry['filename']}", table, part))
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a data set ({_reason(error)})") from None
    return _from_tables(path, tables, image, label, group)


def _split_folders(path: Path) -> list[tuple[Path, Part | None]]:
    """The folders of a saved data set's parts; the folder itself where it has none."""
    if not (path / "dataset_dict.json").is_file():
        return [(path, None)]
    names = read_document(path / "dataset_dict.json", error=DataError)["splits"]
    return [(path / Path(name).name, _part(name, str(path))) for name in names]


def from_data_set(
    data_set: Any, *, image: str = "image", label: str = "label", group: str | None = None
) -> LabelledImages:
    """The images of a `datasets.Dataset` with an undecoded or decoded `Image` column, or of a `DatasetDict` of such.

    Raises:
        DataError: a column is missing, or a name of a part is none of train, validation and test; see `assemble`.
    """
    if not isinstance(data_set, Mapping) and not hasattr(data_set, "with_format"):
        raise DataError(f"labelled images come from a path or a datasets.Dataset, got {type(data_set).__name__}")
    parts = data_set.items() if isinstance(data_set, Mapping) else [("", data_set)]
    tables = [
        (name or "data", one.with_format("arrow")[:], _part(name, "the data set") if name else None)
        for name, one in parts
    ]
    return _from_tables(Path("data set"), tables, image, label, group)


def _from_tables(
    path: Path, tables: Sequence[tuple[str, Any, Part | None]], image: str, label: str, group: str | None
) -> LabelledImages:
    rows, classes = [], None
    for name, table, part in tables:
        wanted = [image, label, *([group] if group else [])]
        if missing := [column for column in wanted if column not in table.column_names]:
            raise DataError(f"{path}: has no column {', '.join(missing)}, only {', '.join(table.column_names)}")
        classes = _class_names(path, table, label) or classes
        for number, record in enumerate(table.select(wanted).to_pylist()):
            picture, value = record[image], record[label]
            content = picture if isinstance(picture, Mapping) else {}
            if value is None or not (content.get("bytes") or content.get("path")):
                raise DataError(f"{path}, {name}, row {number}: has no {label if value is None else image}")
            source: Readable = (
                StoredBytes(f"{name}/{number:08d}", content["bytes"])
                if content.get("bytes")
                else image_file(Path(content["path"]), path)
            )
            rows.append(LabelledImage(source, _class_of(path, value, classes), _text(record, group), part))
    return assemble(str(path), rows, classes)


def _text(record: Mapping[str, Any], column: str | None) -> str | None:
    return None if column is None or record[column] is None else str(record[column])


def _class_of(path: Path, value: object, classes: Sequence[str] | None) -> str:
    if classes is None or not isinstance(value, int):
        return str(value)
    if not 0 <= value < len(classes):
        raise DataError(f"{path}: has the label {value}, but only {len(classes)} classes")
    return classes[value]


def _class_names(path: Path, table: Any, label: str) -> tuple[str, ...] | None:
    """The names that a `ClassLabel` feature gives its numbers, from the schema's metadata."""
    about = (table.schema.metadata or {}).get(b"huggingface")
    if about is None:
        return None
    try:
        names = json.loads(about)["info"]["features"].get(label, {}).get("names")
        return None if names is None else tuple(map(str, names))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its description of the column {label} cannot be read ({_reason(error)})") from None
