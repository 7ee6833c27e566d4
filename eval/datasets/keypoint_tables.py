"""Which keypoints are alike: those that change places in a mirror image, and those that are one part in several places.

GeoAware-SC's geometry-aware subset and its pose alignment need both for every category. Those of SPair-71k and AP-10K
lie in ``eval/data/keypoints.toml``; others come from a file in the same form::

    [cat]
    mirror = [[0, 1], [2, 3]]
    groups = [[9, 10, 11, 12]]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from diffrep.eval.published import DATA, read_toml
from diffrep.files import read_document

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
