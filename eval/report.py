"""What every evaluation gives back: tables for people, one JSON document for programs, beside published numbers."""

from __future__ import annotations

import html
import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffrep.files import number_of, read_settings

SHOWN = 20  # problems that the text names; the JSON names all


@dataclass(frozen=True)
class Problem:
    """Something in a data set that could not be used."""

    where: str  # file or pair
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Section:
    """One table of a report.

    Attributes:
        title: the line above it; "" for none.
        columns: headings of the cells. The first column, the names of the rows, has none.
        rows: (name, cell, cell, ...). Cells under a heading are aligned to the right; what a row has beyond the
            headings stands behind them as it is. A plain string is a line of its own.
        notes: lines below the table.
    """

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str] | str] = ()
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        grid = [("", *self.columns), *(row for row in self.rows if not isinstance(row, str))]
        names = max(len(row[0]) for row in grid)
        widths = [
            max((len(row[i]) for row in grid if len(row) > i), default=0) for i in range(1, len(self.columns) + 1)
        ]

        def line(row: Sequence[str]) -> str:
            cells = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths, strict=False))
            rest = "".join(f"  {cell}" for cell in row[1 + len(widths) :])
            return f"  {row[0]:<{names}}{cells}{rest}".rstrip()

        head = [self.title] * bool(self.title) + [line(grid[0])] * bool(self.columns)
        return "\n".join([*head, *(row if isinstance(row, str) else line(row) for row in self.rows), *self.notes])


@dataclass(frozen=True)
class Report(ABC):
    """Results of an evaluation, and what could not be counted.

    A subclass holds the results and says which tables (`sections`) and which JSON (`document`) they make.
    """

    problems: Sequence[Problem | str] = field(default=(), kw_only=True)

    @abstractmethod
    def sections(self) -> Iterable[Section]:
        """The tables, from the most to the least important."""

    @abstractmethod
    def document(self) -> Mapping[str, object]:
        """Everything in the tables as numbers, with the settings that made them."""

    def table(self) -> str:
        """The report as text."""
        parts = [*self.sections()]
        if count := len(self.problems):
            more = [f"  ... and {count - SHOWN} more, all in the JSON"] if count > SHOWN else []
            named = [f"  {problem}" for problem in self.problems[:SHOWN]]
            parts.append(Section(f"{number_of(count, 'problem')}, not counted in any number:", notes=[*named, *more]))
        return "\n\n".join(map(str, parts))

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def to_json(self) -> str:
        """The report as strict JSON: NaN becomes null."""
        return json.dumps(plain(self.document()), indent=2)


def plain(value: Any) -> Any:
    """A value as JSON knows it: settings become objects, NaN and infinity null, anything unknown its text.

    >>> plain({"a": (1, float("nan")), "b": Problem("x.png", "is missing")})
    {'a': [1, None], 'b': {'where': 'x.png', 'what': 'is missing'}}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], count: int, *, draws: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of a statistic over `count` samples, drawn with replacement, seed 0.

    Args:
        statistic: (draws, count) indices of samples -> (draws,) values; NaN values are left out.
    """
    with warnings.catch_warnings():  # a draw may consist of samples that have no value
        warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN slice", RuntimeWarning)
        values = statistic(np.random.default_rng(0).integers(count, size=(draws, count)))
        low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """The mean over samples with its 95 % interval; samples without a value, NaN, are left out."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not len(known):
        return math.nan, math.nan, math.nan
    return float(known.mean()), *bootstrap(lambda rows: known[rows].mean(1), len(known))


def with_interval(value: float, low: float, high: float, *, digits: int = 2, percent: bool = False) -> str:
    """A value and its interval as a cell.

    >>> with_interval(0.5, 0.25, 0.75, digits=1, percent=True)
    '50.0% (25.0..75.0)'
    """
    scale, sign = (100, "%") if percent else (1, "")
    return f"{scale * value:.{digits}f}{sign} ({scale * low:.{digits}f}..{scale * high:.{digits}f})"


@dataclass(frozen=True)
class ScoreTables(Report):
    """Values of every sample, shown as means with 95 % intervals; a mean alone where all samples have one value.

    Attributes:
        settings: that made them.
        scores: title of a table -> row -> column -> values.
        digits: column -> digits; 2 where left out.
    """

    settings: object
    scores: Mapping[str, Mapping[str, Mapping[Any, Sequence[float]]]]
    digits: Mapping[str, int] = field(default_factory=dict)

    def mean(self, title: str, row: str, column: object) -> tuple[float, float, float]:
        """The mean of a cell's values, and the ends of its 95 % interval."""
        return mean_interval(self.scores[title][row][column])

    def sections(self) -> Iterator[Section]:
        for title, rows in self.scores.items():
            columns = [*next(iter(rows.values()))]
            cells = [(row, *(self._cell(column, self.mean(title, row, column)) for column in columns)) for row in rows]
            yield Section(title, [*map(str, columns)], cells)

    def _cell(self, column: object, mean: tuple[float, float, float]) -> str:
        digits = self.digits.get(str(column), 2)
        return with_interval(*mean, digits=digits) if mean[1] < mean[2] else f"{mean[0]:.{digits}f}"

    def document(self) -> Mapping[str, object]:
        means = {
            title: {row: {column: self.mean(title, row, column) for column in cells} for row, cells in rows.items()}
            for title, rows in self.scores.items()
        }
        return {"settings": self.settings, "means": means}


# -- Numbers from papers, each with its source, to print beside ours. They lie in `eval/data/*.toml` ---------


Row = TypeVar("Row")
Aggregate = Literal["per image", "per point", "category mean", "pair-weighted category"]  # of PCK: see `protocols`
DATA = Path(__file__).parent / "data"


def read_tables(name: str, kind: Callable[..., Row]) -> tuple[Row, ...]:
    """The rows of ``eval/data/NAME.toml`` in its order; every row has the fields of its table too."""
    tables = read_settings(DATA / f"{name}.toml")["tables"]
    rows = ({**table, **row} for table in tables for row in table["rows"])
    return tuple(kind(**{key: _frozen(value) for key, value in row.items() if key != "rows"}) for row in rows)


def _frozen(value: Any) -> Any:
    """Tuples instead of lists, in dictionaries too."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Published:
    """Correspondence: one row of a paper's table, in percent."""

    method: str
    benchmark: str
    values: Mapping[float, float]  # alpha -> PCK
    source: str
    aggregate: Aggregate | None = None  # what the number averages; None where the paper leaves it open
    categories: Mapping[str, float] = field(default_factory=dict)  # at alpha 0.1
    threshold: str = "box"  # what alpha is a share of: box, image or keypoints
    trained: bool = False  # on the benchmark's own training pairs
    recipe: str = ""  # the recipe here that follows this method
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", {float(alpha): value for alpha, value in self.values.items()})


@dataclass(frozen=True, kw_only=True)
class PublishedFlow:
    """Flow on TSS: PCK@0.05 in percent and smoothness in pixels, by subset."""

    method: str
    pck: Mapping[str, float]
    smoothness: Mapping[str, float]
    source: str
    recipe: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedMaps:
    """Depth or normals.

    Attributes:
        values: benchmark -> (AbsRel, delta1) in percent, or (mean angle in degrees, share under 11.25 in percent).
        quoted: the source ran or quotes another paper's method.
    """

    method: str
    source: str
    values: Mapping[str, tuple[float, float]]
    quoted: bool = False


@dataclass(frozen=True, kw_only=True)
class PublishedMasks:
    """Masks on DIS5K: split ("DIS-VD", or "DIS-TE1-4" for the mean over the four test splits) -> score -> value."""

    method: str
    quoted_in: str
    values: Mapping[str, Mapping[str, float]]


PUBLISHED = read_tables("correspondence", Published)
PUBLISHED_FLOW = read_tables("flow", PublishedFlow)
PUBLISHED_DEPTH = read_tables("depth", PublishedMaps)
PUBLISHED_NORMALS = read_tables("normals", PublishedMaps)
PUBLISHED_DIS = read_tables("masks", PublishedMasks)


def published(benchmark: str, *, threshold: str = "box") -> tuple[Published, ...]:
    """The rows of one correspondence benchmark that count with the same threshold."""
    return tuple(row for row in PUBLISHED if (row.benchmark, row.threshold) == (benchmark, threshold))


def published_maps(benchmark: str, rows: tuple[PublishedMaps, ...]) -> list[PublishedMaps]:
    """The rows of `PUBLISHED_DEPTH` or `PUBLISHED_NORMALS` that have a benchmark."""
    return [row for row in rows if benchmark in row.values]
