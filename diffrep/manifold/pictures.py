"""Pictures of an embedding: one to look at, and a page to point at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffrep.pages import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Array = NDArray[Any]

_LONGEST = 40  # letters of a name in the legend
_MOST_CATEGORIES = 20  # more different values than this are a scale, or one colour where they are strings


def is_categorical(values: Array) -> bool:
    """Strings and booleans are categories, and so are a few different integers."""
    if values.dtype.kind in "iu":
        return len(np.unique(values)) <= _MOST_CATEGORIES
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        return len(np.unique(finite)) <= min(_MOST_CATEGORIES, len(values) // 5) and bool((finite % 1 == 0).all())
    return True


def colours(values: Array | None, n: int) -> tuple[Array, list[tuple[str, str]]]:
    """A hex colour for each point, and the legend (name, colour) of categories."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if values is None:
        return np.full(n, "#3b6fb6"), []
    if is_categorical(values):
        names, member = np.unique(values, return_inverse=True)
        if len(names) > _MOST_CATEGORIES:
            return np.full(n, "#3b6fb6"), []
        wheel = colormaps["tab10" if len(names) <= 10 else "tab20"]
        shades = np.array([to_hex(wheel(k)) for k in range(len(names))])
        return shades[member], list(zip(map(_name, names), shades.tolist(), strict=True))
    number = values.astype(np.float64)
    finite = number[np.isfinite(number)]
    low, high = np.quantile(finite, [0.01, 0.99]) if len(finite) else (0.0, 1.0)
    scaled = np.clip((number - low) / max(high - low, 1e-300), 0, 1)
    palette = np.array([to_hex(colormaps["viridis"](k / 255)) for k in range(256)])
    shades = palette[np.round(np.nan_to_num(scaled) * 255).astype(int)]
    shades[~np.isfinite(number)] = "#bbbbbb"
    return shades, []


def _name(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (float, np.floating)) else printable(str(value))


def printable(text: str) -> str:
    """A text, perhaps from a file name, as fonts and files can hold it: bytes that are no text as question marks."""
    return text.encode("utf-8", "replace").decode()


def draw_embedding(
    embedding: Array, values: Array | None = None, *, name: str | None = None, title: str | None = None
) -> Figure:
    """Scatter plot of the first two coordinates, with equal scales.

    Args:
        embedding: (n, k); of one column, the second coordinate is 0.
        values: (n,) numbers or strings that colour the points.
        name: what the values are.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    n = len(embedding)
    x, y = embedding[:, 0], embedding[:, 1] if embedding.shape[1] > 1 else np.zeros(n)
    shades, legend = colours(values, n)
    figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    order = np.random.default_rng(0).permutation(n)  # no class is painted over by a later one
    size = float(np.clip(8000 / max(n, 1), 0.5, 22))
    axes.scatter(x[order], y[order], c=shades[order], s=size, linewidths=0, rasterized=True)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("coordinate 1")
    axes.set_ylabel("coordinate 2")
    if title:
        axes.set_title(title, parse_math=False)  # a dollar sign in a name is no formula
    if legend:
        marks = [Line2D([], [], marker="o", linestyle="", color=c) for _, c in legend]
        numbers = [str(k) for k in range(len(marks))]
        box = axes.legend(marks, numbers, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        box.set_title(name or "")
        box.get_title().set_parse_math(False)
        for text, (label, _) in zip(box.get_texts(), legend, strict=True):  # also names that begin with _
            text.set_text(label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…")
            text.set_parse_math(False)
    elif values is not None and not is_categorical(values):
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, [0.01, 0.99]) if len(finite) else (0.0, 1.0)
        bar = figure.colorbar(ScalarMappable(Normalize(low, high), "viridis"), ax=axes)
        bar.ax.set_ylabel(name or "", parse_math=False)
    return figure


def figure_image(figure: Figure) -> Image.Image:
    """A figure as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def hover_page(
    embedding: Array,
    columns: Mapping[str, Array],
    values: Array | None = None,
    *,
    name: str | None = None,
    title: str = "embedding",
    max_points: int = 50_000,
    pictures: Mapping[int, str] | None = None,
) -> str:
    """One self-contained HTML page: the map on a canvas, to zoom, drag and point at.

    Args:
        embedding: (n, k), of which two coordinates are shown.
        columns: name -> (n,), shown for the point under the mouse.
        values, name: as in `draw_embedding`.
        max_points: of more, so many are drawn at random and the page says so.
        pictures: row -> data URI of a small picture, shown for the point under the mouse.
    """
    n, known = len(embedding), pictures or {}
    shown = np.arange(n)
    if n > max_points:
        shown = np.sort(np.random.default_rng(0).choice(n, max_points, replace=False))
    shades, legend = colours(values, n)
    palette, shade = np.unique(shades[shown], return_inverse=True)
    y = embedding[shown, 1] if embedding.shape[1] > 1 else np.zeros(len(shown))
    content = {
        "x": [float(f"{v:.5g}") for v in embedding[shown, 0]],
        "y": [float(f"{v:.5g}") for v in y],
        "row": shown.tolist(),
        "shade": shade.tolist(),
        "palette": palette.tolist(),
        "pictures": {place: known[row] for place, row in enumerate(shown.tolist()) if row in known},
        "columns": {key: [_cell(v) for v in column[shown]] for key, column in columns.items()},
    }
    note = f"{len(shown):,} of {n:,} points" if len(shown) < n else f"{n:,} points"
    return render(
        "map.html",
        title=title,
        style="map.css",
        script="map.js",
        note=note,
        name=name,
        legend=legend,
        content=content,
    )


def _cell(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else str(value)
    return value if isinstance(value, (int, str)) else str(value)
