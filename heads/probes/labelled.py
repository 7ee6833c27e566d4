"""Labelled images: folders by class, tables, webdataset shards, Hugging Face data sets.

Each reader yields rows of `LabelledImage`; `assemble` checks them and numbers their classes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from diffrep.files import number_of, one_line, optional_import, printable, read_document
from diffrep.images import SUFFIXES, images_below, is_image
from diffrep.store.sources import ImageSource, refuse_damaged

logger = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
_SPELLINGS: Mapping[str, Part] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class DataError(ValueError):
    """Labelled images that cannot be used; the message names the place and what is wrong."""


@dataclass(frozen=True)
class StoredBytes:
    """An image whose file content lies in a table."""

    name: str
    content: bytes

    def read(self) -> bytes:
        """The encoded image."""
        return self.content


Readable: TypeAlias = ImageSource | StoredBytes  # an image that has not been read yet
SAMPLED = 2**15  # bytes at either end of a file that are looked at


def images_sha256(images: Iterable[Readable]) -> str:
    """What a list of images is known by when something is kept for it: SHA-256 over their names and contents.

    Files of up to twice `SAMPLED` bytes count in full, larger ones by size, time of change and both ends.
    """
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.name.encode("utf-8", "surrogateescape") + b"\0")
        if isinstance(image, StoredBytes):
            digest.update(hashlib.sha256(image.content).digest())
            continue
        changed = f"{image.modified}\0" if image.size > 2 * SAMPLED else ""
        digest.update(f"{image.size}\0{changed}".encode())
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
        numeric = all(re.fullmatch(r"-?\d{1,18}", label) for label in names)
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
        return _from_tables(Path("data set"), _tables_of(source), image or "image", label, group)
    path = Path(source)
    if path.suffix.lower() == ".parquet" or any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _from_tables(path, _arrow_tables(path), image or "image", label, group)
    if path.suffix.lower() == ".csv":
        records = _from_csv(path, image or "path", label, group)
    elif shards := _shards(path):
        records = (record for shard in shards for record in _from_shard(shard, label))
    elif path.is_dir():
        records, label, group = _from_folder(path), "class", None
    elif path.exists():
        raise DataError(f"{source}: is neither a folder of classes nor a .csv, .tar or .parquet file")
    else:
        raise DataError(f"{source}: no such folder of classes, .csv, .tar or .parquet")
    return assemble(str(source), _labelled(records, label, group))


_Record: TypeAlias = tuple[str, Readable, Mapping[str, Any], Part | None]  # place, image, what stands beside it, part


def _labelled(records: Iterable[_Record], label: str, group: str | None) -> list[LabelledImage]:
    rows = []
    for where, image, values, part in records:
        for name in (label, group or label):
            if values.get(name) in (None, "") or isinstance(values[name], (list, dict)):
                raise DataError(f"{where} has no {name}")
        rows.append(LabelledImage(image, str(values[label]), str(values[group]) if group else None, part))
    return rows


def _part(text: str, where: str) -> Part:
    if text.lower() not in _SPELLINGS:
        raise DataError(f"{where}: the split {text!r} is none of {', '.join(PARTS)}")
    return _SPELLINGS[text.lower()]


def _check_columns(path: Path, columns: Sequence[str], *names: str | None) -> None:
    if missing := [name for name in names if name is not None and name not in columns]:
        raise DataError(f"{path}: has no column {', '.join(missing)}, only {printable(', '.join(columns))}")


def image_file(file: Path, root: Path) -> ImageSource:
    """An image file, named relative to a folder; one that does not exist is found out when it is read."""
    name = (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()
    try:
        status = file.stat()
    except (OSError, ValueError):  # a name with a zero byte is that of no file
        return ImageSource(name, str(file), -1, 0)
    return ImageSource(name, str(file), status.st_size, status.st_mtime_ns)


def _folders(folder: Path) -> list[Path]:
    return [d for d in sorted(folder.iterdir()) if d.is_dir() and not d.name.startswith(".")]


def _from_folder(root: Path) -> Iterator[_Record]:
    parts = [(d, _SPELLINGS[d.name.lower()]) for d in _folders(root) if d.name.lower() in _SPELLINGS]
    if not _folders(root):
        raise DataError(f"{root}: has no folders; each class is a folder of images")
    classes: dict[str, set[str]] = {}
    places: list[tuple[Path, Part | None]] = [*parts] or [(root, None)]
    for folder, part in places:
        named = _folders(folder)
        images = [(file, place.name) for place in named for file in images_below(place)]
        beside = (file for file in folder.iterdir() if is_image(file.name) and not file.name.startswith("."))
        if loose := sorted(file.name for file in beside if file.is_file()):
            count = number_of(len(loose), "image")
            listed = printable(", ".join(loose[:3]))
            logger.warning("%s: passed over %s beside the folders of classes: %s", folder, count, listed)
        if part and not images:
            raise DataError(f"{folder}: the split is empty")
        if images and (empty := {place.name for place in named} - {label for _, label in images}):
            raise DataError(f"{folder}: no images of {', '.join(sorted(empty)[:5])}; each folder is a class")
        yield from (("", image_file(file, root), {"class": label}, part) for file, label in images)
        classes[folder.name] = {label for _, label in images}
    first, *others = classes
    for other in others:
        if differ := sorted(classes[first] ^ classes[other]):
            raise DataError(
                f"{root}: {first} and {other} do not have the same classes; they differ in {', '.join(differ[:5])}"
            )


def _from_csv(file: Path, image: str, label: str, group: str | None) -> Iterator[_Record]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            table = csv.DictReader(opened)
            columns, lines = table.fieldnames or [], list(enumerate(table, 2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as a table in UTF-8 ({one_line(error)})") from None
    _check_columns(file, columns, image, label, group)
    for number, line in lines:
        where = f"{file}, line {number}"
        if not line[image]:
            raise DataError(f"{where}: has no {image}")
        part = _part(line["split"], where) if line.get("split") else None
        yield f"{where}:", image_file(file.parent / line[image], file.parent), line, part


def _shards(path: Path) -> list[Path]:
    if path.suffix.lower() == ".tar":
        if any(c in str(path) for c in "*?["):
            return sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        return [path] if path.is_file() else []
    return sorted(path.glob("*.tar")) if path.is_dir() else []


def _from_shard(shard: Path, label: str) -> Iterator[_Record]:
    samples: dict[str, dict[str, Any]] = defaultdict(dict)
    try:
        modified = shard.stat().st_mtime_ns
        with tarfile.open(shard, "r:") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                place = PurePosixPath(member.name.removeprefix("./"))
                stem, _, ending = place.name.partition(".")
                sample = samples[str(place.parent / stem)]
                if f".{ending.lower()}" in SUFFIXES:
                    inside = f"{shard.name}/{place}"
                    sample["image"] = ImageSource(inside, str(shard), member.size, modified, member.offset_data)
                elif ending in ("cls", "json"):
                    content = archive.extractfile(member)
                    sample[ending] = content.read() if content is not None else b""
            refuse_damaged(archive)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{shard}: is not an uncompressed webdataset shard ({error})") from None
    for key, sample in samples.items():
        if "image" in sample:
            try:
                values = json.loads(sample.get("json", "{}"))
                if not isinstance(values, dict):
                    raise ValueError(f"its .json must hold an object, found {type(values).__name__}")
                if "cls" in sample:
                    values[label] = sample["cls"].decode().strip()
            except (ValueError, RecursionError) as error:
                raise DataError(f"{shard}: the label of {key} cannot be read ({one_line(error)})") from None
            yield f"{shard}: {key}", sample["image"], values, None


_Table: TypeAlias = tuple[str, Any, Part | None]  # name, Arrow table, part


def _arrow_tables(path: Path) -> list[_Table]:
    with optional_import(f"{path}: reading Arrow and Parquet files needs pyarrow: pip install pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    tables: list[_Table] = []
    try:
        if path.suffix.lower() == ".parquet":
            return [(path.stem, pq.read_table(path), None)]
        folders: list[tuple[Path, Part | None]] = [(path, None)]
        if (path / "dataset_dict.json").is_file():
            names = read_document(path / "dataset_dict.json", error=DataError)["splits"]
            folders = [(path / Path(name).name, _part(name, str(path))) for name in names]
        for folder, part in folders:
            for entry in read_document(folder / "state.json", error=DataError)["_data_files"]:
                with pa.memory_map(str(folder / Path(entry["filename"]).name)) as opened:
                    tables.append((f"{folder.name}/{entry['filename']}", pa.ipc.open_stream(opened).read_all(), part))
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a data set ({one_line(error)})") from None
    return tables


def _tables_of(data_set: Any) -> list[_Table]:
    """Of a `datasets.Dataset` with an undecoded or decoded `Image` column, or of a `DatasetDict` of such."""
    if not isinstance(data_set, Mapping) and not hasattr(data_set, "with_format"):
        raise DataError(f"labelled images come from a path or a datasets.Dataset, got {type(data_set).__name__}")
    if not isinstance(data_set, Mapping):
        return [("data", data_set.with_format("arrow")[:], None)]
    return [(name, one.with_format("arrow")[:], _part(name, "the data set")) for name, one in data_set.items()]


def _from_tables(path: Path, tables: Sequence[_Table], image: str, label: str, group: str | None) -> LabelledImages:
    records: list[_Record] = []
    classes: tuple[str, ...] | None = None
    for name, table, part in tables:
        _check_columns(path, table.column_names, image, label, group)
        classes = _class_names(path, table, label) or classes
        for number, values in enumerate(table.select([image, label, *([group] if group else [])]).to_pylist()):
            where, content = f"{path}, {name}, row {number}:", values[image] if isinstance(values[image], dict) else {}
            if classes is not None and isinstance(values[label], int):
                if not 0 <= values[label] < len(classes):
                    raise DataError(f"{path}: has the label {values[label]}, but only {len(classes)} classes")
                values[label] = classes[values[label]]
            if content.get("bytes"):
                source: Readable = StoredBytes(f"{name}/{number:08d}", content["bytes"])
            elif content.get("path"):
                source = image_file(Path(content["path"]), path)
            else:
                raise DataError(f"{where} has no {image}")
            records.append((where, source, values, part))
    return assemble(str(path), _labelled(records, label, group), classes)


def _class_names(path: Path, table: Any, label: str) -> tuple[str, ...] | None:
    """The names that a `ClassLabel` feature gives its numbers, from the schema's metadata."""
    try:
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", '{"info": {"features": {}}}'))
        names = about["info"]["features"].get(label, {}).get("names")
        return None if names is None else tuple(map(str, names))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its description of the column {label} cannot be read ({one_line(error)})") from None
