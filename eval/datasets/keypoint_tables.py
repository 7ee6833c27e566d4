"""Which keypoints are alike: those that change places in a mirror image, and those that are one part in several places.

GeoAware-SC's geometry-aware subset and its pose alignment need both for every category. Its paper does not print the
tables and SPair-71k's annotations number the keypoints without naming them. Where nothing else is given, they follow
from the names in `spair_keypoints` and of AP-10K; other tables, for instance those of a paper, come from a file::

    [cat]
    mirror = [[0, 1], [2, 3]]
    groups = [[9, 10, 11, 12]]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffrep.eval.datasets.ap10k_release import KEYPOINTS as AP10K_KEYPOINTS
from diffrep.eval.datasets.spair_keypoints import mirror_ids, mirror_name, part_groups

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class KeypointTable:
    """What is alike among the keypoints of one category.

    Attributes:
        mirror: id -> id of the keypoint that takes its place in a mirror image; those left out are their own.
        groups: sets of two or more ids that are one part at several places of the object.
    """

    mirror: Mapping[int, int]
    groups: tuple[frozenset[int], ...] = ()


def table_of(benchmark: str, category: str, tables: Mapping[str, KeypointTable] | None = None) -> KeypointTable:
    """The table of a category: that of `tables` where it has one, else what follows from the keypoints' names.

    Raises:
        ValueError: the benchmark does not say what its keypoints are.
    """
    if tables is not None and category in tables:
        return tables[category]
    if benchmark == "spair":
        return KeypointTable(mirror_ids(category), part_groups(category))
    if benchmark == "ap-10k":
        return KeypointTable({i: AP10K_KEYPOINTS.index(mirror_name(name)) for i, name in enumerate(AP10K_KEYPOINTS)})
    raise ValueError(f"{benchmark} does not name its keypoints: give a table with left, right and parts of {category}")


def read_keypoint_tables(path: Path) -> dict[str, KeypointTable]:
    """Read tables from a TOML or JSON file: category -> ``mirror`` (pairs of ids) and ``groups`` (lists of ids).

    Raises:
        ValueError: the file is missing, is neither, or an entry is no list of different ids; named.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # JSON's and TOML's own errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a table of categories, got {content!r}")
    return {category: _table(f"{path}: {category}", entry) for category, entry in content.items()}


def _table(where: str, entry: object) -> KeypointTable:
    if not isinstance(entry, dict) or not set(entry) <= {"mirror", "groups"}:
        raise ValueError(f"{where} must have mirror and groups, got {entry!r}")
    pairs = _lists(f"{where}.mirror", entry.get("mirror", []))
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"{where}.mirror must be pairs of ids, got {wrong[0]}")
    groups = _lists(f"{where}.groups", entry.get("groups", []))
    if wrong := [group for group in groups if len(group) < 2]:
        raise ValueError(f"{where}.groups must have two or more ids each, got {wrong[0]}")
    mirror = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return KeypointTable(mirror, tuple(frozenset(group) for group in groups))


def _lists(where: str, value: object) -> Sequence[list[int]]:
    """Lists of ids, none of which stands twice.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(value, list) or not all(isinstance(ids, list) for ids in value):
        raise ValueError(f"{where} must be a list of lists of ids, got {value!r}")
    flat = [i for ids in value for i in ids]
    if not all(type(i) is int and i >= 0 for i in flat):
        raise ValueError(f"{where} must hold ids, whole numbers from 0, got {value!r}")
    if len(set(flat)) != len(flat):
        raise ValueError(f"{where} names an id twice: {value!r}")
    return value
