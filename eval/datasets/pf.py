"""PF-PASCAL and PF-WILLOW (Ham et al. 2017, arXiv 1703.07144).

PF-PASCAL: ``PF-dataset-PASCAL/JPEGImages/*.jpg`` and
``PF-dataset-PASCAL/{test,val,trn}_pairs_pf_pascal.csv`` with columns source_image, target_image (paths that
begin with the folder's own name), class (1-based, VOC order), XA, YA, XB, YB (numbers separated by ";").
PF-WILLOW: ``PF-dataset/<class folder>/*.png`` and ``PF-dataset/test_pairs_pf.csv`` with the two paths and
ten columns each of XA, YA, XB, YB.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from diffrep.eval.datasets.pairs import (
    AnnotatedImage,
    AnnotatedPair,
    DatasetError,
    PairSet,
    choose,
    collect,
    image_size,
    inside,
    need_folder,
    read_lines,
)

PASCAL_CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
WILLOW_CATEGORIES = ("car", "duck", "motorbike", "winebottle")
WILLOW_POINTS = 10


def read_pf_pascal(
    root: str | Path,
    *,
    split: Literal["trn", "val", "test"] = "test",
    categories: Sequence[str] | None = None,
) -> PairSet:
    """Read PF-PASCAL as released; `root` is the folder ``PF-dataset-PASCAL``.

    Raises:
        DatasetError: the folder or its list of pairs is missing, or the list has other columns.
        ValueError: there is no such category.
    """
    root = Path(root)
    need_folder(root, "JPEGImages")
    wanted = choose("PF-PASCAL", "category", PASCAL_CATEGORIES, categories)
    table = root / f"{split}_pairs_pf_pascal.csv"
    rows = _rows(table, ("source_image", "target_image", "class", "XA", "YA", "XB", "YB"))

    def read(name: str, row: Sequence[str]) -> AnnotatedPair:
        category = PASCAL_CATEGORIES[int(row[2]) - 1]
        return _pair(root, name, category, row[0], row[1], *(_numbers(cell.split(";")) for cell in row[3:7]))

    def category_of(row: Sequence[str]) -> str | None:
        known = len(row) > 2 and row[2].strip().isdigit() and 1 <= int(row[2]) <= len(PASCAL_CATEGORIES)
        return PASCAL_CATEGORIES[int(row[2]) - 1] if known else None

    entries = [
        (name, partial(read, name, row))
        for name, row in rows
        if category_of(row) in (*wanted, None)  # a row without a readable class is a problem, not another class
    ]
    return collect(f"PF-PASCAL {split}", root, wanted, entries, split=split)


def read_pf_willow(root: str | Path, *, categories: Sequence[str] | None = None) -> PairSet:
    """Read PF-WILLOW as released; `root` is the folder ``PF-dataset``. It has no boxes and no splits.

    Raises:
        DatasetError: the folder or its list of pairs is missing.
        ValueError: there is no such category.
    """
    root = Path(root)
    need_folder(root)
    wanted = choose("PF-WILLOW", "category", WILLOW_CATEGORIES, categories)

    def category_of(row: Sequence[str]) -> str:
        return Path(row[0]).parent.name.partition("(")[0]  # "car(G)" -> "car"

    def read(name: str, row: Sequence[str]) -> AnnotatedPair:
        if len(row) != 2 + 4 * WILLOW_POINTS:
            raise ValueError(f"{len(row)} columns, expected {2 + 4 * WILLOW_POINTS}")
        numbers = [row[2 + i * WILLOW_POINTS : 2 + (i + 1) * WILLOW_POINTS] for i in range(4)]
        return _pair(root, name, category_of(row), row[0], row[1], *map(_numbers, numbers))

    entries = [
        (name, partial(read, name, row))
        for name, row in _rows(root / "test_pairs_pf.csv", ("source_image", "target_image"))
        if category_of(row) in wanted
    ]
    return collect("PF-WILLOW", root, wanted, entries)


def _rows(table: Path, columns: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name, cells) of the rows of a CSV file whose header begins with these columns."""
    try:
        head, *rows = [row for row in csv.reader(read_lines(table)) if row] or [[]]
    except csv.Error as error:
        raise DatasetError(f"{table}: is no table of pairs ({error})") from None
    if [cell.strip().lower() for cell in head[: len(columns)]] != [column.lower() for column in columns]:
        raise DatasetError(f"{table}: the columns should begin with {', '.join(columns)}, they are {', '.join(head)}")
    return [(f"{table.name} row {number}", row) for number, row in enumerate(rows, start=1)]


def _numbers(cells: Sequence[str]) -> list[float]:
    return [float(cell) for cell in cells if cell.strip()]


def _pair(
    root: Path,
    name: str,
    category: str,
    source: str,
    target: str,
    xa: Sequence[float],
    ya: Sequence[float],
    xb: Sequence[float],
    yb: Sequence[float],
) -> AnnotatedPair:
    if not len(xa) == len(ya) == len(xb) == len(yb):
        raise ValueError(f"XA, YA, XB, YB have {len(xa)}, {len(ya)}, {len(xb)}, {len(yb)} numbers")
    images = []
    for path, x, y in ((source, xa, ya), (target, xb, yb)):
        name_inside = inside(path.removeprefix(f"{root.name}/"))
        if not (root / name_inside).is_file():
            raise FileNotFoundError(f"image {name_inside} is missing")
        points = dict(enumerate(zip(x, y, strict=True)))
        images.append(AnnotatedImage(name_inside, image_size(root / name_inside), points))
    return AnnotatedPair(name, category, images[0], images[1], tuple(range(len(xa))))
