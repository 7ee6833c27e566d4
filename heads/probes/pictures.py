"""The picture of a sweep: accuracy over block and timestep."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from diffrep.heads.probes.sweeps import CellScore


def draw_heat_map(scores: Sequence[CellScore], *, title: str = "", bottleneck: str | None = "mid") -> Image.Image:
    """Accuracy on val over block and timestep: one panel per backbone and pool, all on one colour scale.

    Blocks run from left to right in the order of the scores, which is that of execution; timesteps run upwards. The
    best cell of all is framed, the bottleneck marked, numbers are percent.

    Raises:
        ValueError: there are no scores.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if not scores:
        raise ValueError("a heat map needs at least one cell")
    panels = sorted({(s.cell.backbone, s.cell.pool) for s in scores})
    low, high = min(s.val for s in scores), max(s.val for s in scores)
    best = max((s for s in scores if not s.pruned), key=lambda s: s.val).cell
    shapes = []
    for backbone, pool in panels:
        own = [s for s in scores if (s.cell.backbone, s.cell.pool) == (backbone, pool)]
        taps = list(dict.fromkeys(s.cell.tap for s in own))
        shapes.append((own, taps, sorted({s.cell.timestep for s in own})))
    width = max(4.0, 0.62 * max(len(taps) for _, taps, _ in shapes) + 2.2)
    heights = [0.42 * len(timesteps) + 1.5 for _, _, timesteps in shapes]
    figure = Figure(figsize=(width, sum(heights) + (0.4 if title else 0)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    image = None
    for axis, (backbone, pool), (own, taps, timesteps) in zip(axes, panels, shapes, strict=True):
        grid = [[float("nan")] * len(taps) for _ in timesteps]
        for s in own:
            grid[timesteps.index(s.cell.timestep)][taps.index(s.cell.tap)] = 100 * s.val
        image = axis.imshow(
            grid, cmap="viridis", vmin=100 * low, vmax=100 * max(high, low + 1e-6), aspect="auto", origin="lower"
        )
        for s in own:
            x, y = taps.index(s.cell.tap), timesteps.index(s.cell.timestep)
            dark = s.val < low + 0.6 * (high - low)
            text = f"{100 * s.val:.0f}" + ("*" if s.pruned else "")
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            if s.cell == best:
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#e4572e", linewidth=2.5))
        axis.set_xticks(range(len(taps)), taps, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(timesteps)), [str(t) for t in timesteps], fontsize=8)
        axis.set_ylabel("timestep", fontsize=8)
        axis.set_title(f"{backbone}, pool {pool} x {pool}", fontsize=9)
        if bottleneck in taps:
            axis.get_xticklabels()[taps.index(bottleneck)].set_fontweight("bold")
    assert image is not None  # there is at least one cell
    figure.colorbar(image, ax=list(axes), label="accuracy on val, %", shrink=0.9)
    if title:
        figure.suptitle(title, fontsize=11)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return Image.open(out).convert("RGB")
