"""Feature tables: NPY, NPZ, CSV, TSV, Parquet and AnnData (.h5ad) files, and stores of features.

pandas and the libraries that own the formats do the reading. What is left out of the features or had to be guessed is
said in a `TableWarning`; a table that would silently lose a feature is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffrep.files import optional_import
from diffrep.manifold.text_tables import ROW_NAMES, Place, TableError, TableWarning, read_text, reading, say
from diffrep.results import read_array

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["Table", "TableError", "TableWarning", "read_table", "read_values", "store_table"]

Array = NDArray[Any]

_INDEX_NAMES = ("index", "level_0", "rownames", "unnamed: 0")  # a written-out index, where its numbers grow
_IDENTIFIER = re.compile(r"(?i:(.*[\W_])?(u|uu|gu)?id)|.*[a-z]I[Dd]")  # id, cell_id, patientID, UUID; not grid


@dataclass(frozen=True)
class Table:
    """Features of n rows, and what else is known about the rows.

    Attributes:
        features: (n, d), float32 or float64, array or CSR matrix.
        feature_names: (d,) where the file names its features, otherwise empty.
        columns: name -> (n,) numbers or strings that are no features, to colour by and to show.
    """

    features: Any
    feature_names: tuple[str, ...] = ()
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))

    def column(self, name: str) -> Array:
        """The column (n,) of that name, also one that is a feature."""
        if name in self.columns:
            return self.columns[name]
        if name in self.feature_names:
            values = self.features[:, [self.feature_names.index(name)]]
            return np.asarray(values.todense() if hasattr(values, "todense") else values).ravel()
        raise ValueError(f"there is no column {name!r}, only {_listed([*self.columns, *self.feature_names])}")


def read_table(
    path: str | Path,
    *,
    features: Sequence[str] = (),
    exclude: Sequence[str] = (),
    color: str | None = None,
    id_features: bool = False,
) -> Table:
    """Read a table of features.

    Args:
        path: .npy holds (n, d) numbers. .npz holds them under the name that `features` gives, or as its only
            two-dimensional array; arrays of n entries become columns. In .csv, .tsv and .parquet every column
            of numbers is a feature, unless it names the rows: an index, or integers called ``id``, ``cell_id`` and
            the like. .h5ad holds them in X, or in the `obsm` entry that `features` names (``X_pca``), with the columns
            of `obs`. Text is in UTF-8, or in UTF-16 with a mark.
        features: the columns to take, or the one array of an .npz or .h5ad file; all where empty.
        exclude: columns that are no features.
        color: a column that colours the points, and therefore is no feature unless `features` names it. (A gene of
            an .h5ad file stays one.)
        id_features: columns of identifiers are features too.

    Raises:
        TableError: the file cannot be read as such a table, lacks a number, or has no such column.
        FileNotFoundError: there is no such file.
        ImportError: the format needs a library that is not installed.
    """
    path, choice = Path(path), _Choice(tuple(features), tuple(exclude), color, id_features)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    readers: dict[str, Callable[[Path, _Choice], Table]] = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".h5ad": _read_h5ad,
    }
    if path.suffix.lower() not in readers:
        raise TableError(f"{path}: cannot read {path.suffix or 'a file without ending'}, only {', '.join(readers)}")
    if path.stat().st_size == 0:
        raise TableError(f"{path}: the file is empty")
    if both := set(features) & set(exclude):
        raise TableError(f"{path}: {', '.join(sorted(both))} cannot be both a feature and excluded")
    table = readers[path.suffix.lower()](path, choice)
    shape = table.features.shape
    if len(shape) != 2 or 0 in shape:
        raise TableError(f"{path}: features must be rows by columns, got shape {shape}")
    if shape[0] < 2:
        raise TableError(f"{path}: has one row; a map needs at least two")
    _check_numbers(path, table)
    return table


def store_table(folder: Path, tap: str | None = None) -> Table:
    """The vectors of one tap of a store of features.

    One row per image, or per place where the store keeps places. The columns are ``image``, ``folder`` (of the
    image, relative to the collection), and ``x`` and ``y`` of places.

    Raises:
        StoreError: there is no store, or no such tap.
        ValueError: the store is empty.
    """
    from diffrep.store import open_store

    store = open_store(folder)
    runs = list(store.vectors(tap, "patch" if store.kind == "points" else "image"))
    if not runs:
        raise ValueError(f"{folder}: the store holds no images")
    names = np.array(store.names)[np.concatenate([run.images.numpy() for run in runs])]
    columns = {"image": names, "folder": np.array([str(PurePosixPath(name).parent) for name in names])}
    if points := [run.points.numpy() for run in runs if run.points is not None]:
        columns["x"], columns["y"] = np.concatenate(points).T
    return Table(np.concatenate([run.values.numpy() for run in runs]), (), columns)


def read_values(path: str | Path, rows: int) -> Array:
    """One value for each row of a table, from an .npy file.

    Raises:
        TableError: the file cannot be read, or has another number of values.
        FileNotFoundError: there is no such file.
    """
    values = _load_npy(Path(path))
    if values.shape != (rows,):
        raise TableError(f"{path}: needs one value for each of {rows} rows, got shape {values.shape}")
    return values


@dataclass(frozen=True)
class _Choice:
    """The columns that the caller wants as features, and those that must be none."""

    features: tuple[str, ...]
    exclude: tuple[str, ...]
    color: str | None
    id_features: bool

    @property
    def labels(self) -> set[str]:
        return ({*self.exclude, self.color} if self.color else {*self.exclude}) - {*self.features}

    def check(self, path: Path, names: Sequence[str]) -> None:
        """Raise TableError where a name is none of the file's columns."""
        wanted = dict.fromkeys([*self.features, *self.exclude, *([self.color] if self.color else [])])
        if missing := [name for name in wanted if name not in names]:
            raise TableError(f"{path}: there is no column {', '.join(missing)}, only {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "unnamed ones"


def _load_npy(path: Path) -> Array:
    with reading(path, ".npy file of numbers or strings"):
        return read_array(path, mapped=True)


def _read_npy(path: Path, choice: _Choice) -> Table:
    choice.check(path, [])
    return Table(_as_float(_load_npy(path), path))


def _read_npz(path: Path, choice: _Choice) -> Table:
    arrays = {}
    what = ".npz file of numbers and strings"
    with reading(path, what), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        for name in file.files:
            try:
                arrays[name] = np.asarray(file[name])
            except ValueError as error:  # an array of objects, which only a pickle could bring back
                say(path, f"left out array {name!r} ({error})")
    tables = [name for name, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "fiub"]
    chosen = list(choice.features) or tables
    if len(chosen) != 1 or chosen[0] not in tables:
        raise TableError(f"{path}: name one two-dimensional array of numbers, it has {', '.join(tables) or 'none'}")
    values = _as_float(arrays[chosen[0]], path)
    shapes = ((len(values),), (len(values), 1))
    columns = {k: _plain(v.reshape(-1)) for k, v in arrays.items() if v.shape in shapes and k not in chosen}
    choice.check(path, [*columns, *chosen])
    return Table(values, (), columns)


def _read_h5ad(path: Path, choice: _Choice) -> Table:
    with optional_import('reading .h5ad needs anndata: pip install "diffrep[manifold]"'):
        import anndata
    with reading(path, ".h5ad file"):
        data = anndata.read_h5ad(path)
        known = ", ".join(data.obsm.keys()) or "none"
        if len(choice.features) > 1 or any(name not in data.obsm for name in choice.features):
            got = ", ".join(choice.features)
            raise TableError(f"{path}: features of an .h5ad file are X or one obsm entry ({known}), got {got}")
        values = data.obsm[choice.features[0]] if choice.features else data.X
        if values is None:
            raise TableError(f"{path}: has no X; name an obsm entry with --features: {known}")
        names = () if choice.features else tuple(map(str, data.var_names))
        columns = {str(name): _shown(data.obs[name]) for name in data.obs.columns}
        values = values.to_numpy() if hasattr(values, "to_numpy") else values
        values = values.tocsr() if hasattr(values, "tocsr") else np.asarray(values)
    choice.check(path, [*columns, *names, *choice.features])
    left = [k for k, name in enumerate(names) if name not in choice.exclude]
    if len(left) < len(names):
        values, names = values[:, left], tuple(names[k] for k in left)
    return Table(_as_float(values, path), names, columns)


def _read_parquet(path: Path, choice: _Choice) -> Table:
    with optional_import('reading .parquet needs pyarrow: pip install "diffrep[manifold]"'):
        import pyarrow  # noqa: F401  # pandas would ask for one of two libraries
    import pandas

    with reading(path, ".parquet file"):
        frame = pandas.read_parquet(path, engine="pyarrow")
    frame.columns = [str(name) for name in frame.columns]
    index, name = frame.index, ""
    if not isinstance(index, pandas.RangeIndex):
        name = str(index.name or ROW_NAMES)
        while name in frame.columns:
            name = f"_{name}"
        frame.insert(0, name, index if index.nlevels == 1 else list(map(str, index)))
    return _from_frame(path, frame.reset_index(drop=True), choice, lambda row: f"row {row}", name)


def _read_csv(path: Path, choice: _Choice) -> Table:
    frame, place, row_name = read_text(path, choice.labels)
    return _from_frame(path, frame, choice, place, row_name)


def _from_frame(path: Path, frame: DataFrame, choice: _Choice, place: Place, row_name: str) -> Table:
    """Numbers become features, the rest columns; `row_name` is the column that names the rows, if any."""
    names = list(frame.columns)
    choice.check(path, names)
    integers = [n for n in names if frame[n].dtype.kind in "iu"]
    counts = [n for n in integers if (frame[n].to_numpy() == np.arange(len(frame))).all()]
    indices, identifiers = [], []
    for name in [n for n in names if n not in choice.features]:
        grows = name in integers and name.lower() in _INDEX_NAMES and bool((frame[name].diff().dropna() > 0).all())
        if name == row_name or grows:
            indices.append(name)
            if name not in counts and name not in choice.labels:
                say(path, f"column {name!r} is taken for names of the rows, not for a feature")
        elif _IDENTIFIER.fullmatch(name) and _whole_numbers(frame[name]) and not choice.id_features:
            identifiers.append(name)
    identifiers = [name for name in identifiers if name not in choice.labels]
    if identifiers and not choice.features:
        shown = ", ".join(map(repr, identifiers))
        say(path, f"column {shown} is taken for identifiers, not for a feature (--id-features takes it for one)")
    numeric = [n for n in names if frame[n].dtype.kind in "fiu"]
    chosen = list(choice.features)
    chosen = chosen or [n for n in numeric if n not in {*choice.labels, *indices, *identifiers}]
    if texts := [n for n in chosen if n not in numeric and frame[n].dtype.kind != "b"]:
        raise TableError(f"{path}: features must be numbers, column {', '.join(texts)} is not")
    if not chosen:
        raise TableError(f"{path}: no column of numbers is left as a feature, of {', '.join(names)}")
    values = frame[chosen].to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, k = bad[0]
        what = "no number" if np.isnan(values[row, k]) else f"{values[row, k]:g}"
        raise TableError(
            f"{path}: {place(int(row))}, column {chosen[k]!r} holds {what} ({len({*bad[:, 0].tolist()})} of"
            f" {len(values)} rows lack one): fill them in, or leave the column out (--exclude {chosen[k]!r})"
        )
    left_out = {*chosen, *(n for n in indices if n in counts)}
    return Table(values, tuple(chosen), {n: _shown(frame[n]) for n in names if n not in left_out})


def _whole_numbers(values: Series) -> bool:
    """Whether a column holds whole numbers, of which some may be missing."""
    return values.dtype.kind in "fiu" and bool((values.dropna() % 1 == 0).all())


def _shown(values: Series) -> Array:
    """A column that is no feature: numbers as numbers (missing ones NaN), dates, categories and the rest as text."""
    if hasattr(values, "cat") and values.cat.categories.dtype.kind in "iuf":
        return np.asarray(values)  # numbers, also in order
    if values.dtype.kind in "fiub":
        return values.to_numpy(dtype=np.float64, na_value=np.nan) if values.isna().any() else values.to_numpy()
    return _plain(values.astype(object).where(values.notna(), "").to_numpy())


def _plain(values: Array) -> Array:
    """Numbers as they are, everything else as strings."""
    return values if values.dtype.kind in "fiub" else np.array([str(v) for v in values])


def _as_float(values: Any, path: Path) -> Any:
    if values.dtype.kind not in "fiub":
        raise TableError(f"{path}: features must be numbers, got {values.dtype}")
    if values.dtype in (np.float32, np.float64):
        return values
    return values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)


def _check_numbers(path: Path, table: Table) -> None:
    """Raise TableError for the first feature that is NaN or infinite."""
    values = table.features
    if hasattr(values, "tocsr"):
        bad = values.tocsr(copy=True)
        bad.data = ~np.isfinite(bad.data)
        bad.eliminate_zeros()
    else:
        bad = ~np.isfinite(values)
    for row, column in zip(*bad.nonzero(), strict=True):
        name = repr(table.feature_names[column]) if table.feature_names else str(column)
        raise TableError(
            f"{path}: row {row}, column {name} is {values[row, column]} (counted from 0): features must be numbers"
        )
