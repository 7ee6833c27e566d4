"""What every correspondence benchmark comes to, pairs of annotated images; and what the readers of data sets share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.eval.report import DATA, Problem
from diffrep.files import read_document, read_settings

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
    if empty := [one for one in categories if one not in covered]:
        noted.append(Problem(", ".join(empty), "no usable pair"))
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
    """Read tables from a file of settings or JSON: category -> ``mirror`` (pairs of ids), ``groups`` (lists of ids),
    ``names`` (in the order of the ids, "" where an id is not used), ``order`` (of the ids in a released table).

    Raises:
        ValueError: the file is missing, is none of these, or an entry is no list of different ids; named.
    """
    content = read_document(path) if path.suffix.lower() == ".json" else read_settings(path)
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


# -- TSS: dense flow between images of one category (Taniai, Sinha and Sato 2016) ----------------------------
# Layout: ``TSS_CVPR2016/{FG3DCar,JODS,PASCAL}/<pair>/{image1,image2}.png, flow1.flo, flow2.flo, mask1.png,
# mask2.png``. Every pair counts in both directions: the flow that ends in image k is ``flow{k}.flo``, over
# ``mask{k}``.


SUBSETS = ("FG3DCar", "JODS", "PASCAL")
FLO_MAGIC = 202021.25
_CATEGORIES = {"busd": "bus", "bike": "bicycle", "plane": "aeroplane", "suv": "car"}  # folder's word -> VOC's name
_FILES = (("image", "png"), ("flow", "flo"), ("mask", "png"))


@dataclass(frozen=True)
class FlowItem:
    """One direction of one pair: for each pixel of the target, where it lies in the source."""

    name: str  # subset/folder/direction
    subset: str
    category: str
    source: str  # paths relative to the data set's folder
    target: str
    flow_file: str
    mask_file: str
    source_size: tuple[int, int]  # (H, W)
    target_size: tuple[int, int]

    @property
    def padded_size(self) -> tuple[int, int]:
        """(H, W) that both images have after padding on the right and at the bottom."""
        (h, w), (height, width) = self.source_size, self.target_size
        return max(h, height), max(w, width)

    def flow(self, root: Path) -> Tensor:
        """(2, H, W) float32 in pixels (x, y), padded by repetition: target pixel + flow = source pixel.

        Raises:
            ValueError: the file is no .flo file of the target's size.
        """
        return F.pad(
            self._fitting("flow", self.flow_file, read_flo(root / self.flow_file))[None], self._margins, "replicate"
        )[0]

    def mask(self, root: Path) -> Tensor:
        """(H, W) bool: the object in the target, padded with False."""
        try:
            with Image.open(root / self.mask_file) as image:
                mask = torch.from_numpy(np.asarray(image.convert("L")) > 0)
        except Exception as error:  # whatever a decoder raises for a damaged file
            raise ValueError(f"{self.mask_file}: is not an image ({error})") from None
        return F.pad(self._fitting("mask", self.mask_file, mask), self._margins)

    def _fitting(self, what: str, file: str, values: Tensor) -> Tensor:
        if tuple(values.shape[-2:]) != self.target_size:
            raise ValueError(f"{file}: the {what} is {tuple(values.shape[-2:])}, its image {self.target_size}")
        return values

    @property
    def _margins(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom, as `torch.nn.functional.pad` takes them."""
        bottom, right = (a - b for a, b in zip(self.padded_size, self.target_size, strict=True))
        return 0, right, 0, bottom


@dataclass(frozen=True)
class FlowSet:
    """TSS as read from disk."""

    root: Path
    items: tuple[FlowItem, ...]
    problems: tuple[Problem, ...]


def read_tss(root: str | Path, *, subsets: Sequence[str] | None = None) -> FlowSet:
    """Read TSS as released; `root` is the folder ``TSS_CVPR2016``.

    Raises:
        DatasetError: there is none of the subsets' folders.
        ValueError: there is no such subset.
    """
    root = Path(root)
    wanted = choose("TSS", "subset", SUBSETS, subsets)
    present = [subset for subset in wanted if (root / subset).is_dir()]
    if not present:
        raise DatasetError(f"{root}: none of the folders {', '.join(wanted)} is there")
    problems = [Problem(subset, "the subset's folder is missing") for subset in wanted if subset not in present]
    items: list[FlowItem] = []
    for subset in present:
        for folder in sorted(path for path in (root / subset).iterdir() if path.is_dir()):
            needed = [f"{kind}{k}.{end}" for k in (1, 2) for kind, end in _FILES]
            where = f"{subset}/{folder.name}"
            if missing := [name for name in needed if not (folder / name).is_file()]:
                problems.append(Problem(where, f"{', '.join(missing)} missing"))
                continue
            try:
                items += _directions(folder, subset)
            except (OSError, ValueError) as error:
                problems.append(Problem(where, f"cannot be read ({error})"))
    return FlowSet(root, tuple(items), tuple(problems))


def _directions(folder: Path, subset: str) -> Iterator[FlowItem]:
    sizes = {k: image_size(folder / f"image{k}.png") for k in (1, 2)}
    inside = f"{subset}/{folder.name}"
    for source, target in ((1, 2), (2, 1)):
        images = (f"{inside}/image{source}.png", f"{inside}/image{target}.png")
        truth = (f"{inside}/flow{target}.flo", f"{inside}/mask{target}.png")
        name, category = f"{inside}/{source}to{target}", tss_category(folder.name, subset)
        yield FlowItem(name, subset, category, *images, *truth, sizes[source], sizes[target])


def tss_category(folder: str, subset: str = "") -> str:
    """The VOC category of a pair: everything in FG3DCar is a car, elsewhere the folder's name begins with it.

    >>> tss_category("001_suv", "FG3DCar"), tss_category("plane_12_4", "JODS")
    ('car', 'aeroplane')
    """
    if subset == "FG3DCar":
        return "car"
    word = folder.partition("_")[0].rstrip("0123456789").lower()
    return _CATEGORIES.get(word, word)


def read_flo(path: Path) -> Tensor:
    """(2, H, W) float32 from a Middlebury .flo file.

    Raises:
        ValueError: the file is no .flo file, or is cut off.
    """
    raw = path.read_bytes()
    if len(raw) < 12 or np.frombuffer(raw, "<f4", 1)[0] != np.float32(FLO_MAGIC):
        raise ValueError(f"{path.name}: not a .flo file (it does not begin with {FLO_MAGIC})")
    width, height = (int(v) for v in np.frombuffer(raw, "<i4", 2, offset=4))
    if min(width, height) < 1 or len(raw) < 12 + 8 * width * height:
        raise ValueError(f"{path.name}: cut off, {len(raw)} bytes for a flow of {width} x {height}")
    values = np.frombuffer(raw, "<f4", 2 * width * height, offset=12).reshape(height, width, 2)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())
