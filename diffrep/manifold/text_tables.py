"""Text tables (.csv, .tsv) as data frames: what the first line is, which cells are numbers, where the bad ones are.

What is left out or guessed is said in a `TableWarning`; a table that would silently lose a column of numbers is
refused.
"""

from __future__ import annotations

import codecs
import csv
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffrep.files import number_of

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Place = Callable[[int], str]  # where in the file a row stands

ROW_NAMES = "row name"  # what a column without a name is called
_SNIFF_ROWS = 200  # rows of a text file that are looked at before it is read
_MISSING = ("", "na", "n/a", "nan", "null", "none", "#n/a", "<na>")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_QUANTITY = re.compile(r"[^\w\s]{0,2}\s?\d+(?:[.,' \u00a0\u202f]\d+)*\s?[^\w\s]?")  # $1,000  12 %  1.234,5  1'234
_CODE = re.compile(r"[+-]?0\d+")  # 007 is a name, not a number


class TableError(ValueError):
    """A file that cannot be read as a table of features; the message begins with its path."""


class TableWarning(UserWarning):
    """Something about a table was left out or guessed."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into a TableError."""
    try:
        yield
    except (TableError, ImportError, FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # libraries raise zip, struct, attribute and recursion errors, among others
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TableError(f"{path}: is no readable {what} ({reason})") from None


def say(path: Path, text: str) -> None:
    warnings.warn(f"{path}: {text}", TableWarning, stacklevel=2)


def read_text(path: Path, labels: set[str]) -> tuple[DataFrame, Place, str]:
    """Read a .csv or .tsv file.

    Args:
        labels: columns that are no features, whose cells stay as they are.

    Returns:
        The frame; the place of a row in the file, for messages; the column that names the rows, if any.

    Raises:
        TableError: it is no table, or a column of numbers holds something else.
    """
    import pandas

    with reading(path, "text table in UTF-8"):
        layout = _Layout.of(path)
        options: dict[str, Any] = {
            "sep": layout.delimiter,
            "header": None,
            "names": range(len(layout.names)),
            "skiprows": layout.skip,
            "encoding": layout.encoding,
            "index_col": False,
            "skipinitialspace": True,
            "low_memory": False,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # a row with too many cells
            codes = dict.fromkeys(layout.codes, str)
            frame = pandas.read_csv(path, float_precision="round_trip", dtype=codes, **options)
            texts = [k for k in frame.columns if frame[k].dtype.kind not in "fiub"]
            if texts:  # as they stand in the file: a label may be called NA
                raw = pandas.read_csv(path, usecols=texts, dtype=str, keep_default_na=False, **options)
                frame[texts] = raw[texts]
    frame.columns = list(layout.names)
    empty = frame.isna() | (frame == "")
    if (blank := empty.all(axis=1)).any():
        say(path, f"left out {number_of(int(blank.sum()), 'row')} without any cell")
        frame, empty = frame[~blank], empty[~blank]
    if unused := [name for name in frame.columns if empty[name].all()]:
        say(path, f"left out columns without any cell: {', '.join(unused)}")
        frame = frame.drop(columns=unused)
    if frame.empty:
        raise TableError(f"{path}: holds no rows of cells")
    rows = frame.index.to_numpy()

    def place(row: int) -> str:
        return f"line {layout.line_of(int(rows[row]))}"

    frame = frame.reset_index(drop=True)
    for name in frame.columns:
        if frame[name].dtype.kind == "O" and name not in labels and name != layout.row_name:
            frame[name] = _numbers_in_text(path, name, frame[name], layout.delimiter, place)
    return frame, place, layout.row_name


@dataclass(frozen=True)
class _Layout:
    """What the first rows of a text file say about it.

    Attributes:
        names: of its columns.
        skip: rows of the file before the first row of cells, empty ones too; a name in quotes may span lines.
        codes: positions of columns whose digits are no numbers, such as 007.
        row_name: the column that names the rows, if any.
    """

    path: Path
    encoding: str
    delimiter: str
    names: tuple[str, ...]
    skip: int
    codes: tuple[int, ...]
    row_name: str

    @classmethod
    def of(cls, path: Path) -> _Layout:
        encoding = _encoding(path)
        delimiter = _delimiter(path, encoding)
        lines: list[tuple[int, list[str]]] = []  # (rows of the file before this one, its cells)
        with path.open(newline="", encoding=encoding) as file:
            for before, cells in enumerate(csv.reader(file, delimiter=delimiter, skipinitialspace=True)):
                if any(cell.strip() for cell in cells):
                    lines.append((before, [cell.strip() for cell in cells]))
                if len(lines) > _SNIFF_ROWS:
                    break
        if not lines:
            raise TableError(f"{path}: holds no rows of cells")
        (skip, names), body = lines[0], [cells for _, cells in lines[1:]]
        if not _is_header(path, names, body):
            names, body = [f"column {k}" for k in range(len(names))], [names, *body]
        elif body:
            skip += 1
        else:
            raise TableError(f"{path}: has a header, but no rows")
        row_name = ""
        if len(body[0]) == len(names) + 1:  # R leaves out the name of its row names; others end rows with a delimiter
            if all(not cells[-1] for cells in body):
                names = [*names, ""]
            else:
                row_name, names = ROW_NAMES, [ROW_NAMES, *names]
                say(path, "rows have one cell more than the header: the first is taken for the row's name")
        elif names[0] == "" and len(names) > 1:
            row_name, names = ROW_NAMES, [ROW_NAMES, *names[1:]]
        names = [name or f"column {k}" for k, name in enumerate(names)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise TableError(f"{path}: column names repeat: {', '.join(repeated)}")
        codes = [k for k in range(len(names)) if any(k < len(row) and _CODE.fullmatch(row[k]) for row in body)]
        return cls(path, encoding, delimiter, tuple(names), skip, tuple(codes), row_name)

    def line_of(self, row: int) -> int:
        """The physical line on which a row of cells begins, counted from 1."""
        with self.path.open(newline="", encoding=self.encoding) as file:
            reader = csv.reader(file, delimiter=self.delimiter)
            begin = 0
            for before, cells in enumerate(reader):
                if cells and before >= self.skip:
                    if row == 0:
                        return begin + 1
                    row -= 1
                begin = reader.line_num
        return begin


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(1000)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head:
        raise TableError(f"{path}: is no readable text table: UTF-16 without a mark, or no text; save it in UTF-8")
    return "utf-8-sig"


def _delimiter(path: Path, encoding: str) -> str:
    """Tabs in .tsv, commas in .csv; another one where the first line has no comma, which is said."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding=encoding) as file:
        first = next((line for line in file if line.strip()), "")
    for other, name in ((";", "semicolons"), ("\t", "tabs")):
        if other in first and "," not in first:
            say(path, f"cells are taken to be separated by {name}")
            return other
    return ","


def _is_header(path: Path, first: list[str], body: list[list[str]]) -> bool:
    """Whether the first row names the columns."""
    numbers = [_is_number(cell) for cell in first]
    if not any(numbers):
        return any(first)
    if all(numbers):
        count = list(range(len(first)))
        counted = [float(cell) for cell in first] in (count, [k + 1 for k in count])
        whole = all(cell.isdigit() for cell in first)
        if counted:
            names, row = "column names", "a row"
            taken, other = (names, row) if whole else (row, names)
            say(path, f"the first line ({', '.join(first[:4])}...) is taken for {taken}, not for {other}")
        return counted and whole
    if any(number and not cell.isdigit() for number, cell in zip(numbers, first, strict=True)):
        say(path, "the first line holds fractions: it is taken for a row, not for column names")
        return False
    if body and "" not in first:
        say(path, f"the first line ({', '.join(first[:4])}...) is taken for column names")
    return True


def _numbers_in_text(path: Path, name: str, cells: Series, delimiter: str, place: Place) -> Any:
    """A column of text as numbers, where it holds such; refused where some cells of a column of numbers are none."""
    import pandas

    raw = cells.astype(str).str.strip()
    missing = raw.str.lower().isin(_MISSING)
    codes = raw.str.fullmatch(_CODE.pattern)
    numbers = pandas.to_numeric(raw.mask(missing | codes), errors="coerce")
    written = raw[~missing & numbers.isna()]
    commas = [(_THOUSANDS, "thousands", ""), (_DECIMAL_COMMA, "decimals", ".")]
    for pattern, what, instead in commas if delimiter == "," else commas[::-1]:
        if len(written) and written.str.fullmatch(pattern.pattern).all():
            say(path, f"column {name!r}: commas are taken to mark {what}")
            numbers = pandas.to_numeric(raw.mask(missing).str.replace(",", instead), errors="coerce")
            written = written[:0]
            break
    share = float(numbers.notna().mean())
    if not len(written):
        return numbers.to_numpy(dtype=np.float64)
    if share >= 0.5:
        row = int(written.index[0])
        raise TableError(
            f"{path}: {place(row)}, column {name!r} holds {raw[row]!r} where other rows have numbers:"
            f" mend it, or leave the column out (--exclude {name!r})"
        )
    if share > 0:
        say(path, f"column {name!r} is taken for text, though {share:.0%} of its cells are numbers")
    elif (quantities := written.str.fullmatch(_QUANTITY.pattern) & ~codes[written.index]).mean() >= 0.5:
        cell = written[quantities].iloc[0]
        say(path, f"column {name!r} is taken for text, though cells such as {cell!r} look like numbers")
    return cells


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
