"""What results share: one line that says what they hold, a picture or table in notebooks, `save`, `numpy`, `to_pandas`.

A result is a frozen dataclass (with ``repr=False``) of tensors that inherits from `Result`:

    @dataclass(frozen=True, repr=False)
    class Heights(Result):
        MAIN = "values"  # what `numpy()` gives

        values: Tensor

        def picture(self) -> Image.Image: ...
"""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffrep.files import write_whole

if TYPE_CHECKING:
    import pandas
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
ROWS = 8  # of a table in a notebook


def summary(values: Any) -> str:
    """Type, shape and range of a tensor or array, in a few words; NaN and infinities are left out of the range.

    >>> summary(np.array([[0.5, 2.0, np.nan]], dtype=np.float32))
    'float32 (1, 3) in 0.5 .. 2'
    >>> summary(np.array([True, False, False, False]))
    'bool (4,), 25% true'
    """
    array, kind = to_numpy(values), str(values.dtype).removeprefix("torch.")
    text = f"{kind} {tuple(array.shape)}"
    if array.dtype == bool:
        return f"{text}, {100 * array.mean():.3g}% true" if array.size else text
    if not np.issubdtype(array.dtype, np.number):
        return text
    finite = array[np.isfinite(array)]
    return f"{text} in {finite.min():.4g} .. {finite.max():.4g}" if finite.size else text


def to_numpy(values: Any) -> np.ndarray:
    """A tensor of any device and type as an array; bfloat16, which numpy lacks, as float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        return np.asarray((values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy())
    return np.asarray(values)


class Result:
    """Base of what diffrep returns: it describes, shows and saves itself."""

    MAIN: ClassVar[str | None] = None  # the field that `numpy()` gives; None: all, by name

    def picture(self) -> Image.Image | None:
        """The result as an image; None: it has none."""
        return None

    def columns(self) -> Mapping[str, Any] | None:
        """The result as a table, column by column; None: it is none."""
        return None

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors and arrays of the result's fields, by name."""
        return {name: to_numpy(value) for name, value in self._values() if hasattr(value, "dtype")}

    def numpy(self) -> Any:
        """The result as an array, or as a dict of arrays by name where there are several."""
        arrays = self.arrays()
        return arrays if self.MAIN is None else arrays[self.MAIN]

    def to_pandas(self) -> pandas.DataFrame:
        """The result as a table.

        Raises:
            TypeError: it is no table.
            ImportError: pandas is not installed.
        """
        columns = self.columns()
        if columns is None:
            raise TypeError(f"{type(self).__name__} is no table; numpy() gives its arrays")
        import pandas

        return pandas.DataFrame({name: to_numpy(values) for name, values in columns.items()})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result in the form that the ending of the path names, whole or not at all.

        A picture as ``.png``, ``.jpg``, ``.webp`` or ``.tif``; a table as ``.csv`` or ``.parquet``; arrays as
        ``.npz``, ``.npy`` (one array only) or ``.safetensors``.

        Returns:
            The path.

        Raises:
            ValueError: the result has no such form; the message lists those that it has.
            OSError: the path cannot be written.
        """
        path = Path(os.path.expanduser(path))
        ending = path.suffix.lower()
        forms = self._writers()
        if ending not in forms:
            raise ValueError(f"{path}: a {type(self).__name__} is saved as {', '.join(forms)}, not as {ending!r}")
        write_whole(path, forms[ending])
        return path

    def _writers(self) -> dict[str, Callable[[Path], object]]:
        """ending -> what writes that form."""
        forms: dict[str, Callable[[Path], object]] = {}
        picture, columns, arrays = self.picture(), self.columns(), self.arrays()
        if picture is not None:
            forms |= dict.fromkeys(PICTURES, picture.save)
        if columns is not None:
            forms[".csv"] = lambda path: write_csv(path, columns)
            forms[".parquet"] = lambda path: self.to_pandas().to_parquet(path)
        if arrays:
            forms[".npz"] = lambda path: np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stubs
        if self.MAIN in arrays or len(arrays) == 1:
            forms[".npy"] = lambda path: np.save(path, arrays[self.MAIN or next(iter(arrays))])
        if arrays:
            forms[".safetensors"] = lambda path: write_safetensors(path, arrays)
        return forms

    def _values(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every field; the entries of a mapping or of a tuple of tensors count as fields."""
        assert is_dataclass(self)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Mapping) and any(hasattr(v, "dtype") for v in value.values()):
                yield from value.items()
            elif isinstance(value, tuple) and value and hasattr(value[0], "dtype"):
                yield from ((f"{entry.name}.{i}", part) for i, part in enumerate(value))
            else:
                yield entry.name, value

    def __repr__(self) -> str:
        parts = [f"{name} {summary(value)}" for name, value in self._values() if hasattr(value, "dtype")]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_png_(self) -> bytes | None:
        picture = self.picture()
        if picture is None:
            return None
        content = io.BytesIO()
        picture.save(content, "PNG")
        return content.getvalue()

    def _repr_html_(self) -> str | None:
        columns = self.columns()
        if columns is None or self.picture() is not None:  # a notebook would take the table before the picture
            return None
        return html_table(repr(self), {name: to_numpy(values[:ROWS]).tolist() for name, values in columns.items()})


def html_table(title: str, columns: Mapping[str, Sequence[Any]]) -> str:
    """A line and a table below it, for notebooks."""
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        for row in zip(*columns.values(), strict=True)
    ]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    return f"<p>{html.escape(title)}</p><table><tr>{head}</tr>{body}</table>"


def read_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file, whoever made it; of other files NumPy would say that they are to be trusted and run.

    Raises:
        ValueError: it is none; the message does not name it.
    """
    with path.open("rb") as file:
        if (start := file.read(6)) != b"\x93NUMPY":
            raise ValueError("an archive: name it .npz" if start.startswith(b"PK") else "no .npy file")
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV; the first row has the names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_csv(path: Path, columns: Mapping[str, Any]) -> None:
    """Write a table, column by column, with a line of their names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(to_numpy(values).tolist() for values in columns.values()), strict=True))


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
