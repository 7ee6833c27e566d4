"""Splitting labelled images into train, val and test without leakage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffrep.heads.probes.labelled import PARTS, DataError, LabelledImages, Part


@dataclass(frozen=True)
class RowSplit:
    """Rows of each part. No row, and no group, lies in two of them."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    def part(self, name: Part) -> tuple[int, ...]:
        """The rows of one part."""
        rows: tuple[int, ...] = getattr(self, name)
        return rows


def split_rows(
    data: LabelledImages, *, shares: tuple[float, float, float] = (0.6, 0.2, 0.2), seed: int = 0
) -> RowSplit:
    """Split stratified by class; a part that the source names stays as it is.

    A source with train and test gives up a part of its train for val; one with train and val is split the other
    way: its val is the test, since it is what published numbers are reported on, and val is taken from train. What
    a class's images are split into depends on the seed and their names only.

    Args:
        shares: of train, val and test in each class.

    Raises:
        DataError: a part would be empty or lack a class; a class that has too few images is named.
    """
    if min(shares) < 0 or not 0.999 < sum(shares) < 1.001 or shares[0] == 0:
        raise ValueError(f"shares of train, val and test must add up to 1, got {shares}")
    rows: dict[Part, list[int]] = {part: [] for part in PARTS}
    if data.parts is None:
        wanted = {part: share for part, share in zip(PARTS, shares, strict=True) if share > 0}
        _divide(data, range(len(data)), wanted, rows, seed)
    else:
        named: dict[Part, list[int]] = {part: [] for part in PARTS}
        for row, part in enumerate(data.parts):
            named[part].append(row)
        if not named["train"]:
            raise DataError(f"{data.name}: names no training images")
        if not named["test"]:
            named["test"], named["val"] = named["val"], []
        rows["test"] = named["test"]
        if named["val"]:
            rows["train"], rows["val"] = named["train"], named["val"]
        else:
            part_of = shares[0] + shares[1]
            wanted = {"train": shares[0] / part_of, "val": shares[1] / part_of}
            _divide(data, named["train"], {k: v for k, v in wanted.items() if v > 0}, rows, seed)
    split = RowSplit(tuple(sorted(rows["train"])), tuple(sorted(rows["val"])), tuple(sorted(rows["test"])))
    _check(data, split)
    return split


def _divide(
    data: LabelledImages, among: Sequence[int], shares: Mapping[Part, float], rows: dict[Part, list[int]], seed: int
) -> None:
    """Deal the groups of each class out to the parts, biggest first, to the part that lacks most."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row in among:
        groups[data.groups[row] if data.groups is not None else data.images[row].name].append(row)
    by_class: dict[int, list[list[int]]] = defaultdict(list)
    for name in sorted(groups):
        members = groups[name]
        majority = int(np.bincount([data.labels[row] for row in members]).argmax())
        by_class[majority].append(members)
    what = "groups" if data.groups is not None else "images"
    for label, lots in sorted(by_class.items()):
        if len(lots) < len(shares):
            count = f"{len(lots)} {what if len(lots) > 1 else what[:-1]}"
            raise DataError(
                f"{data.name}: class {data.classes[label]!r} has {count}; {' and '.join(shares)} need one each"
            )
        order = np.random.default_rng([seed, label]).permutation(len(lots))
        total = sum(map(len, lots))
        filled = dict.fromkeys(shares, 0)
        queue = sorted((lots[i] for i in order), key=len, reverse=True)
        for number, members in enumerate(queue):
            left, empty = len(queue) - number, [part for part in shares if not filled[part]]
            choice = empty if left <= len(empty) else list(shares)  # every part gets one
            part = max(choice, key=lambda p: shares[p] * total - filled[p])
            filled[part] += len(members)
            rows[part] += members


def _check(data: LabelledImages, split: RowSplit) -> None:
    for part in PARTS:
        if not split.part(part):
            raise DataError(f"{data.name}: the {part} split is empty")
    trained = {data.labels[row] for row in split.train}
    for part in ("val", "test"):
        if untrained := sorted({data.labels[row] for row in split.part(part)} - trained):
            names = ", ".join(repr(data.classes[label]) for label in untrained[:5])
            raise DataError(f"{data.name}: {part} has the class {names}, which train lacks")
    if data.groups is not None and data.parts is not None:
        owner: dict[str, Part] = {}
        for part in PARTS:
            for row in split.part(part):
                if owner.setdefault(data.groups[row], part) != part:
                    group, first = data.groups[row], owner[data.groups[row]]
                    raise DataError(f"{data.name}: group {group!r} lies in {first} and in {part}")


def balance(data: LabelledImages, split: RowSplit) -> str:
    """A table of images per class and part, with a warning line where a class is rare."""
    counts = {part: data.counts(split.part(part)) for part in PARTS}
    width = max(map(len, [*data.classes, "class"]))
    shown = list(data.classes) if len(data.classes) <= 30 else []
    lines = [f"{'class':<{width}}" + "".join(f"{part:>8}" for part in PARTS)]
    lines += [f"{name:<{width}}" + "".join(f"{counts[part][name]:>8}" for part in PARTS) for name in shown]
    lines.append(f"{'all':<{width}}" + "".join(f"{len(split.part(part)):>8}" for part in PARTS))
    train = counts["train"]
    low, high = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
    lines.append(
        f"{len(data.classes)} classes; smallest in train {low!r} ({train[low]}), largest {high!r} ({train[high]})"
        + (": unbalanced, see mean per-class accuracy and --balanced" if train[high] > 3 * train[low] else "")
    )
    return "\n".join(lines)
