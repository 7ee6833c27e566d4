"""What every correspondence benchmark comes to, pairs of annotated images; and what the readers of data sets share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from diffrep.eval.published import DATA, read_toml
from diffrep.eval.report import Problem
from diffrep.files import read_document

Item = TypeVar("Item")


class DatasetError(ValueError):
    """A data set folder that cannot be used at all; the message says what is missing."""


@dataclass(frozen=True)
class AnnotatedImage:
    """One image with its keypoints, as the release has them."""

    path: str  # relative to the data set's folder, with forward slashes
    size: tuple[int, int]  # (H, W)
    keypoints: Mapping[int, tuple[float, float]]  # id -> (x, y) in pixels; only visible ones
    box: tuple[float, float, float, float] | None = None  # of the object: x0, y0, x1, y1; None where there is none

    def points(self, ids: Sequence[int]) -> Tensor:
        """(N, 2) float32: the keypoints of these ids."""
        return torch.tensor([self.keypoints[i] for i in ids], dtype=torch.float32).reshape(-1, 2)


@dataclass(frozen=True)
class AnnotatedPair:
    """Two images of one category and the keypoints that both show."""

    name: str  # as the release calls it
    category: str
    source: AnnotatedImage
    target: AnnotatedImage
    ids: tuple[int, ...]  # keypoints visible in both, in the release's order

    @classmethod
    def of(cls, name: str, category: str, source: AnnotatedImage, target: AnnotatedImage) -> AnnotatedPair:
        """A pair with all keypoints that both images show."""
        return cls(name, category, source, target, tuple(i for i in source.keypoints if i in target.keypoints))


@dataclass(frozen=True)
class PairSet:
    """A benchmark as read from disk."""

    name: str
    root: Path
    categories: tuple[str, ...]  # that the benchmark has, whether or not they have pairs here
    pairs: tuple[AnnotatedPair, ...]
    problems: tuple[Problem, ...]  # what was left out, and why
    split: str = "test"


def read_pairs(
    name: str,
    root: Path,
    categories: Sequence[str],
    items: Iterable[tuple[str, Item]],
    read: Callable[[Item], AnnotatedPair],
    problems: Sequence[Problem] = (),
    *,
    split: str = "test",
) -> PairSet:
    """Read the pairs that can be read and note the others, missing images and empty categories among them.

    Args:
        items: (what to call it in a message, what `read` makes a pair of).
        read: raises KeyError, TypeError, ValueError, OSError and the like where the annotation is malformed.
    """
    pairs, noted = [], list(problems)
    present: dict[str, bool] = {}
    for where, item in items:
        try:
            pair = read(item)
            images = [inside(pair.source.path), inside(pair.target.path)]
            missing = [path for path in images if not present.setdefault(path, (root / path).is_file())]
            if missing:
                raise FileNotFoundError(f"image {' and '.join(missing)} is missing")
        except KeyError as error:
            what = f"has no field {error}"
        except FileNotFoundError as error:
            what = f"{error.filename} is missing" if error.filename else str(error)
        except (TypeError, ValueError, OSError, AttributeError, IndexError, OverflowError) as error:
            what = f"malformed annotation ({error})"
        else:
            if pair.ids:
                pairs.append(pair)
                continue
            what = "no keypoint is visible in both images"
        noted.append(Problem(where, what))
    covered = {pair.category for pair in pairs}
    noted += [Problem(one, "the category has no usable pair") for one in categories if one not in covered]
    return PairSet(name, root, tuple(categories), tuple(pairs), tuple(noted), split)


def choose(benchmark: str, what: str, known: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The categories, or whatever a benchmark has several of, that are asked for; all where None.

    Raises:
        ValueError: the benchmark has none of that name.
    """
    if unknown := sorted(set(asked or ()) - set(known)):
        raise ValueError(f"{benchmark} has no {what} {', '.join(unknown)}; it has {', '.join(known)}")
    return tuple(asked or known)


def inside(path: str) -> str:
    """A path that a data set names, relative to its folder.

    Raises:
        ValueError: it leads out of the folder.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path:
        raise ValueError(f"the path {path!r} leads out of the data set's folder")
    return path


def image_size(file: Path) -> tuple[int, int]:
    """(H, W) of an image, from its header alone.

    Raises:
        ValueError: it is no image.
    """
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as error:  # whatever a decoder raises for a damaged header
        raise ValueError(f"{file.name} is not an image ({error})") from None


def read_lines(file: Path) -> list[str]:
    """The lines of a list or table, UTF-8.

    Raises:
        DatasetError: the file is missing or no text.
    """
    if not file.is_file():
        raise DatasetError(f"{file}: no such list")
    try:
        return file.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read as text ({error})") from None


def need_folder(root: Path, *parts: str) -> None:
    """Check that a data set has its folders.

    Raises:
        DatasetError: naming the first one that is missing.
    """
    for part in ("", *parts):
        if not (root / part).is_dir():
            raise DatasetError(f"{root / part}: no such folder; the data set needs {', '.join(parts)} below {root}")


# -- which keypoints are alike ----------------------------------------------------------------------------------------
# GeoAware-SC's geometry-aware subset and its pose alignment need to know which keypoints change places in a mirror
# image, and which are one part in several places. Those of SPair-71k and AP-10K lie in ``eval/data/keypoints.toml``;
# others come from a file in the same form:
#
#     [cat]
#     mirror = [[0, 1], [2, 3]]
#     groups = [[9, 10, 11, 12]]

_FIELDS = {"mirror", "groups", "names", "order"}


@dataclass(frozen=True)
class KeypointTable:
    """What is alike among the keypoints of one category.

    Attributes:
        mirror: id -> id of the keypoint that takes its place in a mirror image; those left out stay what they are.
        groups: sets of two or more ids that are one part at several places of the object.
        names: id -> what lies there; empty where nobody has said it.
        order: of the ids in the released table of mirrored keypoints; that of the numbers where empty.
    """

    mirror: Mapping[int, int]
    groups: tuple[frozenset[int], ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    order: tuple[int, ...] = ()


def table_of(benchmark: str, category: str, tables: Mapping[str, KeypointTable] | None = None) -> KeypointTable:
    """The table of a category: that of `tables` where it has one, else the published one.

    Raises:
        ValueError: the benchmark does not say what its keypoints are.
    """
    known = _published()
    if tables is not None and category in tables:
        return tables[category]
    if benchmark == "spair" and category in known:
        return known[category]
    if benchmark == "ap-10k":
        return known["ap-10k"]
    raise ValueError(f"{benchmark} does not name its keypoints: give a table with left, right and parts of {category}")


@cache
def _published() -> dict[str, KeypointTable]:
    return read_keypoint_tables(DATA / "keypoints.toml")


def read_keypoint_tables(path: Path) -> dict[str, KeypointTable]:
    """Read tables from a TOML or JSON file: category -> ``mirror`` (pairs of ids), ``groups`` (lists of ids), ``names``
    (in the order of the ids, "" where an id is not used), ``order`` (of the ids in a released table).

    Raises:
        ValueError: the file is missing, is neither, or an entry is no list of different ids; named.
    """
    content = read_document(path) if path.suffix.lower() == ".json" else read_toml(path)
    return {category: _table(f"{path}: {category}", entry) for category, entry in content.items()}


def _table(where: str, entry: object) -> KeypointTable:
    if not isinstance(entry, dict) or not set(entry) <= _FIELDS:
        raise ValueError(f"{where} must have mirror and groups, got {json.dumps(entry, default=str)}")
    pairs, groups = (_lists(f"{where}.{name}", entry.get(name, [])) for name in ("mirror", "groups"))
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"{where}.mirror must be pairs of ids, got {wrong[0]}")
    if wrong := [group for group in groups if len(group) < 2]:
        raise ValueError(f"{where}.groups must have two or more ids each, got {wrong[0]}")
    names = entry.get("names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}.names must be a list of names, got {names!r}")
    order = _lists(f"{where}.order", [entry.get("order", [])])[0]
    mirror = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    known = {i: name for i, name in enumerate(names) if name}
    return KeypointTable(mirror, tuple(map(frozenset, groups)), known, tuple(order))


def _lists(where: str, value: object) -> Sequence[list[int]]:
    """Check that a value is a list of lists of ids, none of which stands twice."""
    if not isinstance(value, list) or not all(isinstance(ids, list) for ids in value):
        raise ValueError(f"{where} must be a list of lists of ids, got {value!r}")
    flat = [i for ids in value for i in ids]
    if not all(type(i) is int and i >= 0 for i in flat):
        raise ValueError(f"{where} must hold ids, whole numbers from 0, got {value!r}")
    if len(set(flat)) != len(flat):
        raise ValueError(f"{where} names an id twice: {value!r}")
    return value
