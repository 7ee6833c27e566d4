"""Numbers from papers, each with its source, to print beside ours. They lie in ``eval/data/*.toml``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Row = TypeVar("Row")
Aggregate = Literal["per image", "per point", "category mean", "pair-weighted category"]  # of PCK: see `protocols`
DATA = Path(__file__).parent / "data"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, whoever made it.

    Raises:
        ValueError: it is missing or no TOML; the message begins with its path.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # TOML's own errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None


def read_tables(name: str, kind: Callable[..., Row]) -> tuple[Row, ...]:
    """The rows of ``eval/data/NAME.toml`` in its order; every row has the fields of its table too."""
    tables = read_toml(DATA / f"{name}.toml")["tables"]
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
