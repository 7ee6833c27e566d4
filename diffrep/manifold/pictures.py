"""Pictures of an embedding: one to look at, and a page to point at."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

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
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)


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
        axes.set_title(title)
    if legend:
        marks = [Line2D([], [], marker="o", linestyle="", color=c, label=text) for text, c in legend]
        axes.legend(handles=marks, title=name, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    elif values is not None and not is_categorical(values):
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, [0.01, 0.99]) if len(finite) else (0.0, 1.0)
        figure.colorbar(ScalarMappable(Normalize(low, high), "viridis"), ax=axes, label=name)
    return figure


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
    marks = "".join(f'<span><i style="background:{colour}"></i>{html.escape(text)}</span>' for text, colour in legend)
    note = f"{len(shown):,} of {n:,} points" if len(shown) < n else f"{n:,} points"
    data = json.dumps(content, allow_nan=False).replace("</", "<\\/")
    return (
        _PAGE.replace("@TITLE@", html.escape(title))
        .replace("@NOTE@", note)
        .replace("@LEGEND@", (f"<b>{html.escape(name)}</b>" if name and marks else "") + marks)
        .replace("@DATA@", data)
    )


def _cell(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else str(value)
    return value if isinstance(value, (int, str)) else str(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<style>
body { margin: 0; font: 14px system-ui, sans-serif; color: #222; background: #fff; }
header { padding: 8px 14px; display: flex; gap: 14px; flex-wrap: wrap; align-items: center; }
header h1 { font-size: 16px; margin: 0; }
header span i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 4px; }
canvas { display: block; cursor: crosshair; border-top: 1px solid #ddd; }
#tip { position: fixed; pointer-events: none; background: #222d; color: #fff; padding: 6px 9px;
  border-radius: 5px; max-width: 320px; font-size: 12px; white-space: pre-wrap; display: none; }
#tip img { display: block; width: 128px; margin-bottom: 5px; image-rendering: auto; }
.hint { color: #777; font-size: 12px; }
</style></head><body>
<header><h1>@TITLE@</h1><span class="hint">@NOTE@ &middot; wheel zooms, drag moves, double click resets</span>
@LEGEND@</header>
<canvas id="map"></canvas><div id="tip"></div>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const d = JSON.parse(document.getElementById("data").textContent), n = d.x.length;
const canvas = document.getElementById("map"), g = canvas.getContext("2d");
const tip = document.getElementById("tip");
const min = a => a.reduce((p, q) => Math.min(p, q), Infinity);
const max = a => a.reduce((p, q) => Math.max(p, q), -Infinity);
const box = { x: (min(d.x) + max(d.x)) / 2, y: (min(d.y) + max(d.y)) / 2,
  w: Math.max(max(d.x) - min(d.x), 1e-9), h: Math.max(max(d.y) - min(d.y), 1e-9) };
const radius = Math.max(1.2, Math.min(5, 160 / Math.sqrt(n)));
const byShade = d.palette.map(() => []);
for (let i = 0; i < n; i++) byShade[d.shade[i]].push(i);
let view, width, height, drag = null, marked = -1;
function reset() {
  const scale = 0.92 * Math.min(width / box.w, height / box.h);
  view = { scale, x: width / 2 - box.x * scale, y: height / 2 + box.y * scale };
}
const sx = i => view.x + d.x[i] * view.scale, sy = i => view.y - d.y[i] * view.scale;
function draw() {
  g.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  g.clearRect(0, 0, width, height);
  byShade.forEach((points, k) => {
    g.fillStyle = d.palette[k]; g.globalAlpha = 0.8; g.beginPath();
    for (const i of points) {
      const x = sx(i), y = sy(i); g.moveTo(x + radius, y); g.arc(x, y, radius, 0, 6.2832);
    }
    g.fill();
  });
  g.globalAlpha = 1;
  if (marked >= 0) { g.lineWidth = 2; g.strokeStyle = "#000"; g.beginPath();
    g.arc(sx(marked), sy(marked), radius + 3, 0, 6.2832); g.stroke(); }
}
function resize() {
  width = innerWidth; height = innerHeight - document.querySelector("header").offsetHeight - 1;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  canvas.width = width * devicePixelRatio; canvas.height = height * devicePixelRatio;
  reset(); draw();
}
canvas.onmousemove = e => {
  if (drag) {
    view.x += e.offsetX - drag.x; view.y += e.offsetY - drag.y;
    drag = { x: e.offsetX, y: e.offsetY }; tip.style.display = "none"; return draw();
  }
  let best = 144, found = -1;
  for (let i = 0; i < n; i++) { const a = sx(i) - e.offsetX, b = sy(i) - e.offsetY, r = a * a + b * b;
    if (r < best) { best = r; found = i; } }
  if (found !== marked) { marked = found; draw(); }
  if (found < 0) { tip.style.display = "none"; return; }
  const known = Object.keys(d.columns).map(k => k + ": " + d.columns[k][found]);
  tip.textContent = ["row: " + d.row[found], ...known].join("\\n");
  if (d.pictures[found]) {
    const picture = document.createElement("img"); picture.src = d.pictures[found]; tip.prepend(picture);
  }
  tip.style.display = "block";
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(e.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
};
canvas.onmousedown = e => { drag = { x: e.offsetX, y: e.offsetY }; };
onmouseup = () => { drag = null; };
canvas.onmouseleave = () => { marked = -1; tip.style.display = "none"; draw(); };
canvas.ondblclick = () => { reset(); draw(); };
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  const f = Math.exp(-e.deltaY * 0.0015);
  view.x = e.offsetX - (e.offsetX - view.x) * f; view.y = e.offsetY - (e.offsetY - view.y) * f;
  view.scale *= f; draw();
}, { passive: false });
onresize = resize; resize();
</script></body></html>
"""
