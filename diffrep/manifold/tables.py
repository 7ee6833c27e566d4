"""Reading feature tables: NPY, NPZ, CSV, TSV, Parquet and AnnData (.h5ad)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_INDEX_NAMES = ("", "index", "Unnamed: 0")  # what a written-out row number is called
_SNIFF_ROWS = 200  # rows of a CSV file that decide which columns are numbers


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
        known = [*self.columns, *self.feature_names]
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise ValueError(f"there is no column {name!r}, only {shown or 'unnamed features'}")


def read_table(path: str | Path, *, features: Sequence[str] = (), exclude: Sequence[str] = ()) -> Table:
    """Read a table of features.

    Args:
        path: .npy holds (n, d) numbers. .npz holds them under the name that `features` gives, or as its only
            two-dimensional array; arrays of n entries become columns. In .csv, .tsv and .parquet every column
            of numbers is a feature, unless it numbers the rows. .h5ad holds them in X, or in the `obsm` entry
            that `features` names, with the columns of `obs`.
        features: the columns to take, or the one array of an .npz or .h5ad file; all where empty.
        exclude: columns that are no features.

    Raises:
        ValueError: the file cannot be read as such a table, or has no such column.
        FileNotFoundError: there is no such file.
        ImportError: the format needs a library that is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    readers = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".h5ad": _read_h5ad,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cannot read {path.suffix or 'a file without ending'}, only {', '.join(readers)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    table = reader(path, tuple(features), tuple(exclude))
    if table.features.ndim != 2 or 0 in table.features.shape:
        raise ValueError(f"{path}: features must be rows by columns, got shape {table.features.shape}")
    return table


def _read_npy(path: Path, features: tuple[str, ...], exclude: tuple[str, ...]) -> Table:
    if features:
        raise ValueError(f"{path}: an .npy file has no named columns, got features={', '.join(features)}")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: is no readable .npy file of numbers ({error})") from None
    return Table(_as_float(values, path))


def _read_npz(path: Path, features: tuple[str, ...], exclude: tuple[str, ...]) -> Table:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: is no readable .npz file of numbers and strings ({error})") from None
    tables = [name for name, array in arrays.items() if array.ndim == 2]
    chosen = list(features) or tables
    if len(chosen) != 1 or chosen[0] not in tables:
        raise ValueError(f"{path}: name one two-dimensional array, it has {', '.join(tables) or 'none'}")
    values = _as_float(arrays[chosen[0]], path)
    columns = {k: v for k, v in arrays.items() if v.shape in ((len(values),), (len(values), 1)) and k not in chosen}
    return Table(values, (), {k: v.reshape(len(values)) for k, v in columns.items()})


def _read_csv(path: Path, features: tuple[str, ...], exclude: tuple[str, ...]) -> Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = [row for row, _ in zip(csv.reader(file, delimiter=delimiter), range(_SNIFF_ROWS), strict=False)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is no text table ({error})") from None
    first = [row for row in first if row]
    if not first:
        raise ValueError(f"{path}: the file has no rows")
    has_header = not all(_is_number(cell) for cell in first[0])
    names = first[0] if has_header else [f"column {k}" for k in range(len(first[0]))]
    body = first[1:] if has_header else first
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path}: column names repeat: {', '.join(sorted(n for n in set(names) if names.count(n) > 1))}"
        )
    if any(len(row) != len(names) for row in body) or not body:
        raise ValueError(f"{path}: rows must have {len(names)} cells like the first, and there must be some")
    numeric = [all(_is_number(row[k]) for row in body) for k in range(len(names))]

    def load(positions: list[int], dtype: Any) -> Array:
        return np.loadtxt(
            path,
            delimiter=delimiter,
            skiprows=int(has_header),
            usecols=positions,
            dtype=dtype,
            ndmin=2,
            quotechar='"',
            comments=None,
            encoding="utf-8-sig",
        )

    numbers = [k for k, is_number in enumerate(numeric) if is_number]
    texts = [k for k, is_number in enumerate(numeric) if not is_number]
    try:
        values = load(numbers, np.float64) if numbers else np.empty((0, 0))
        strings = load(texts, str) if texts else np.empty((0, 0))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found = {names[k]: values[:, i] for i, k in enumerate(numbers)}
    found |= {names[k]: strings[:, i] for i, k in enumerate(texts)}
    return _from_columns(path, {name: found[name] for name in names}, features, exclude)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, features: tuple[str, ...], exclude: tuple[str, ...]) -> Table:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no readable .parquet file ({error})") from None
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    return _from_columns(path, columns, features, exclude)


def _read_h5ad(path: Path, features: tuple[str, ...], exclude: tuple[str, ...]) -> Table:
    try:
        import anndata
    except ImportError:
        raise ImportError('reading .h5ad needs anndata: pip install "diffrep[manifold]"') from None
    try:
        data = anndata.read_h5ad(path)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is no readable .h5ad file ({error})") from None
    if len(features) > 1 or any(name not in data.obsm for name in features):
        known = ", ".join(data.obsm.keys()) or "none"
        raise ValueError(f"{path}: features of an .h5ad file are X or one obsm entry ({known}), got {features}")
    values = data.obsm[features[0]] if features else data.X
    if values is None:
        raise ValueError(f"{path}: has no X; name an obsm entry: {', '.join(data.obsm.keys()) or 'there is none'}")
    names = () if features else tuple(map(str, data.var_names))
    columns = {str(name): np.asarray(data.obs[name]) for name in data.obs.columns}
    return Table(_as_float(values, path), names, {k: _plain(v) for k, v in columns.items()})


def _from_columns(
    path: Path, columns: Mapping[str, Array], features: tuple[str, ...], exclude: tuple[str, ...]
) -> Table:
    """Numbers become features, the rest columns."""
    if missing := [name for name in (*features, *exclude) if name not in columns]:
        raise ValueError(f"{path}: there is no column {', '.join(missing)}, only {', '.join(columns)}")
    chosen = list(features) or [
        name
        for name, values in columns.items()
        if values.dtype.kind in "fiu" and name not in exclude and not _numbers_rows(name, values)
    ]
    if not chosen:
        raise ValueError(f"{path}: no column of numbers is left as a feature, of {', '.join(columns)}")
    if texts := [name for name in chosen if columns[name].dtype.kind not in "fiub"]:
        raise ValueError(f"{path}: features must be numbers, column {', '.join(texts)} is not")
    values = np.stack([columns[name].astype(np.float64) for name in chosen], axis=1)
    rest = {
        name: _plain(column)
        for name, column in columns.items()
        if name not in chosen and not _numbers_rows(name, column)
    }
    return Table(values, tuple(chosen), rest)


def _numbers_rows(name: str, values: Array) -> bool:
    return name in _INDEX_NAMES and np.array_equal(values, np.arange(len(values)))


def _plain(values: Array) -> Array:
    """Numbers as they are, everything else as strings."""
    return values if values.dtype.kind in "fiub" else np.array([str(v) for v in values])


def _as_float(values: Any, path: Path) -> Any:
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{path}: features must be numbers, got {values.dtype}")
    if values.dtype in (np.float32, np.float64):
        return values
    return values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)
