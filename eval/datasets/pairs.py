"""What every correspondence benchmark comes to: pairs of annotated images."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Problem:
    """Something in a data set that could not be used."""

    where: str  # file or pair
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class PairSet:
    """A benchmark as read from disk."""

    name: str
    root: Path
    categories: tuple[str, ...]  # that the benchmark has, whether or not they have pairs here
    pairs: tuple[AnnotatedPair, ...]
    problems: tuple[Problem, ...]  # what was left out, and why
    split: str = "test"

    def images(self) -> tuple[str, ...]:
        """Relative paths of all images that any pair uses, each once, sorted."""
        return tuple(sorted({path for pair in self.pairs for path in (pair.source.path, pair.target.path)}))

    def of(self, category: str) -> tuple[AnnotatedPair, ...]:
        """The pairs of one category."""
        return tuple(pair for pair in self.pairs if pair.category == category)


def collect(
    name: str,
    root: Path,
    categories: Sequence[str],
    entries: Collection[tuple[str, Callable[[], AnnotatedPair]]],
    problems: Sequence[Problem] = (),
    *,
    split: str = "test",
) -> PairSet:
    """Read the pairs that can be read and note the others, missing images and empty categories among them.

    Args:
        entries: (what to call it in a message, function that reads it). The function raises KeyError,
            TypeError, ValueError or OSError where the annotation is malformed.
    """
    pairs, noted = [], list(problems)
    present: dict[str, bool] = {}
    for where, read in entries:
        try:
            pair = read()
        except KeyError as error:
            noted.append(Problem(where, f"has no field {error}"))
            continue
        except json.JSONDecodeError as error:
            noted.append(Problem(where, f"is not JSON ({error})"))
            continue
        except FileNotFoundError as error:
            noted.append(Problem(where, f"{error.filename} is missing" if error.filename else str(error)))
            continue
        except (TypeError, ValueError, OSError) as error:
            noted.append(Problem(where, f"malformed annotation ({error})"))
            continue
        missing = [
            path
            for path in (pair.source.path, pair.target.path)
            if not present.setdefault(path, (root / path).is_file())
        ]
        if missing:
            noted.append(Problem(where, f"image {' and '.join(missing)} is missing"))
        elif not pair.ids:
            noted.append(Problem(where, "no keypoint is visible in both images"))
        else:
            pairs.append(pair)
    found = {pair.category for pair in pairs}
    noted += [Problem(category, "the category has no usable pair") for category in categories if category not in found]
    return PairSet(name, root, tuple(categories), tuple(pairs), tuple(noted), split)


def pair_name(file: Path) -> str:
    """What a release calls a pair: the file's name, whose colon may be written ``%3A``, as Windows needs it.

    >>> pair_name(Path("000001-2010_1-2011_2%3Acat.json"))
    '000001-2010_1-2011_2:cat'
    """
    return file.stem.replace("%3A", ":")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ValueError: the file holds something else.
    """
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, this is a {type(value).__name__}")
    return value


def need_folder(root: Path, *parts: str) -> None:
    """Check that a data set has its folders.

    Raises:
        DatasetError: naming the first one that is missing.
    """
    for part in ("", *parts):
        if not (root / part).is_dir():
            raise DatasetError(f"{root / part}: no such folder; the data set needs {', '.join(parts)} below {root}")
