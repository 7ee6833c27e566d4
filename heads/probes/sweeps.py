"""Which block, which timestep? One probe for every cell, chosen on val; the best one's test score is looked at once.

Every cell's result is a line of ``cells.jsonl`` as soon as it is known, so a sweep that is killed goes on where it
was and ends with the same bytes. ``result.json`` is written last; while it is there, test is not scored again. How
long the last training took is in ``timing.json``, the only file that differs from run to run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffrep.files import JsonLines, number_of, read_document, write_document, write_whole
from diffrep.heads.probes.cells import Cell
from diffrep.heads.probes.experiment import ProbeData, train_probe, wilson
from diffrep.heads.probes.layouts import HeadShape, Kind
from diffrep.heads.probes.probe import Probe
from diffrep.heads.probes.training import ProbeFit, fit_head
from diffrep.results import csv_text

logger = logging.getLogger(__name__)

CELLS, RESULT, TIMING = "cells.jsonl", "result.json", "timing.json"


@dataclass(frozen=True)
class CellScore:
    """One cell of a sweep: accuracy on val of the best setting, with a 95 % Wilson interval."""

    cell: Cell
    val: float
    low: float
    high: float
    choice: dict[str, Any]
    pruned: bool = False  # judged by a quarter of the training images only


@dataclass(frozen=True)
class ProbeSweep:
    """All cells of a sweep, in order, and the refitted best one."""

    cells: tuple[CellScore, ...]
    best: Cell
    result: dict[str, Any]  # what the refitted probe's `about` says
    folder: Path

    @property
    def seconds(self) -> float | None:
        """How long the best cell's last training took; None: not noted."""
        return read_document(self.folder / TIMING).get("seconds") if (self.folder / TIMING).is_file() else None

    def table(self) -> str:
        """Long CSV: one row per cell."""
        rows: list[list[object]] = [["backbone", "tap", "timestep", "pool", "val", "low", "high", "pruned", "choice"]]
        for s in self.cells:
            c = s.cell
            numbers = (f"{v:.4f}" for v in (s.val, s.low, s.high))
            rows.append([c.backbone, c.tap, c.timestep, c.pool, *numbers, int(s.pruned), json.dumps(s.choice)])
        return csv_text(rows)

    def summary(self, rows: int = 5) -> str:
        """The best cells, equals in the order of the blocks, and the test score of the first."""
        ordered = sorted(self.cells, key=lambda s: (s.pruned, -s.val))
        lines = [f"{'val %':>6}  {'95 % interval':>14}  cell"]
        for s in ordered[:rows]:
            lines.append(f"{100 * s.val:>6.1f}  {100 * s.low:>6.1f}..{100 * s.high:<6.1f}  {s.cell}")
        test = self.result["test"]
        lines.append(
            f"test, once, of {self.best} trained on train and val: {100 * test['top1']:.1f} %"
            f" ({100 * test['low']:.1f}..{100 * test['high']:.1f}, {number_of(test['n'], 'image')})"
        )
        return "\n".join(lines)


def sweep(
    prepared: ProbeData,
    folder: str | Path,
    *,
    kind: Kind = "linear",
    fit: ProbeFit | None = None,
    shape: HeadShape | None = None,
    prune: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> ProbeSweep:
    """Score every cell on val, train the best again, score test once, and save the probe to ``FOLDER/probe``.

    Args:
        folder: of the results; a finished or interrupted sweep of the same data and settings goes on.
        prune: share of the cells that are dropped after a look with a quarter of the training images.

    Raises:
        ValueError: the folder holds a sweep of other data or settings, or prune is not in [0, 1).
    """
    fit, shape, folder = fit or ProbeFit(), shape or HeadShape(), Path(folder)
    check_prune(prune)
    cells = [cell for features in prepared.features.values() for cell in features.reading.cells()]
    settings = {"kind": kind, "fit": asdict(fit), "shape": asdict(shape), "prune": prune, "seed": seed}
    lines, split = _log(prepared, folder, settings), prepared.split
    scored = _cell_scores(lines)
    scores = {score.cell: score for score in scored}

    def look(cell: Cell, fit: ProbeFit, train: Sequence[int]) -> None:
        scores[cell] = _score(prepared, cell, kind, fit, shape, train)
        scored.append(scores[cell])
        lines.add(asdict(scores[cell]))

    promising = cells
    with tqdm(total=len(cells), desc="cells", unit="cell", disable=not progress) as bar:
        if prune > 0 and len(cells) > 1:
            by_class: dict[int, list[int]] = {}
            for row in split.train:
                by_class.setdefault(prepared.data.labels[row], []).append(row)
            few = sorted(row for rows in by_class.values() for row in rows[: max(1, len(rows) // 4)])
            quick = dataclasses.replace(fit, grid=dataclasses.replace(fit.grid, epochs=max(1, fit.grid.epochs // 2)))
            for cell in cells:
                if cell not in scores:
                    look(cell, quick, few)
            first = {score.cell: score for score in reversed(scored) if score.pruned} or scores
            order = sorted(cells, key=lambda cell: -first[cell].val)[: max(1, len(cells) - int(prune * len(cells)))]
            promising = [cell for cell in cells if cell in set(order)]
            bar.update(len(cells) - len(promising))
        for cell in promising:
            if cell not in scores or scores[cell].pruned:
                look(cell, fit, split.train)
            bar.update()
    ordered = tuple(scores[cell] for cell in cells)
    # equals go to the earlier block; a pruned cell was judged by less
    best = max(promising, key=lambda cell: scores[cell].val)
    if (folder / RESULT).is_file():
        logger.info("%s: test was scored before, its score is repeated", folder)
        best, result = _read_result(folder / RESULT)
    else:
        trained = train_probe(prepared, prepared.layout(kind, [best], shape=shape), fit, seed=seed)
        result = dict(trained.probe.about)
        trained.probe.save(folder / "probe")
        write_document(folder / TIMING, {"seconds": trained.seconds})
        write_document(folder / RESULT, {"best": asdict(best), "result": result})
    done = ProbeSweep(ordered, best, result, folder)
    write_whole(folder / "cells.csv", done.table())
    return done


def check_prune(prune: float) -> None:
    """Refuse what is no share of the cells, before any feature is read.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= prune < 1:  # not a number fails too
        raise ValueError(f"prune is a share of the cells, at least 0 and below 1, got {prune}")


def _score(
    prepared: ProbeData, cell: Cell, kind: Kind, fit: ProbeFit, shape: HeadShape, train: Sequence[int]
) -> CellScore:
    layout = prepared.layout(kind, [cell], shape=shape)
    fitted = fit_head(layout, prepared.rows([cell]), prepared.labels, train, prepared.split.val, fit)
    truth = prepared.labels[list(prepared.split.val)]
    right = int((fitted.scores.argmax(1) == truth).sum())
    low, high = wilson(right, len(truth))
    return CellScore(cell, right / len(truth), low, high, fitted.choice, pruned=len(train) < len(prepared.split.train))


def _log(prepared: ProbeData, folder: Path, settings: Mapping[str, Any]) -> JsonLines:
    """Results of cells, one JSON object a line, behind a line with everything that they depend on."""
    split = prepared.split
    rows = json.dumps([split.train, split.val, split.test, prepared.data.labels])
    features = {}
    for name, one in prepared.features.items():
        settled = {k: v for k, v in one.features.items() if k not in ("source", "batch_size")}
        features[name] = settled | {"cells": list(map(str, one.reading.cells())), "kept_as": one.dtype}
    document = {
        "data": prepared.data.name,
        "images_sha256": {name: one.images_sha256 for name, one in prepared.features.items()},
        "split_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "features": features,
        **settings,
    }
    lines, identity = JsonLines(folder / CELLS), json.loads(json.dumps(document))
    if not lines.rows:
        lines.add(identity)
    if differ := [key for key in identity if lines.rows[0].get(key) != identity[key]]:
        raise ValueError(
            f"{folder} holds a sweep with another {', '.join(differ)}: name another folder or delete this one"
        )
    return lines


def _cell_scores(lines: JsonLines) -> list[CellScore]:
    try:
        return [CellScore(**{**row, "cell": Cell(**row["cell"])}) for row in lines.rows[1:]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{lines.path}: is no log of a sweep's cells ({error})") from None


def load_sweep(folder: str | Path) -> ProbeSweep:
    """A finished sweep.

    Raises:
        ValueError: the folder holds none, or one that is not finished, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / RESULT).is_file():
        raise ValueError(f"{folder}: holds no finished sweep (no {RESULT})")
    best, result = _read_result(folder / RESULT)
    latest = {score.cell: score for score in _cell_scores(JsonLines(folder / CELLS))}
    Probe.load(folder / "probe")
    return ProbeSweep(tuple(latest.values()), best, result, folder)


def _read_result(file: Path) -> tuple[Cell, dict[str, Any]]:
    document = read_document(file)
    try:
        return Cell(**document["best"]), dict(document["result"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is no result of a sweep ({error})") from None


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
    panels: dict[tuple[str, int], list[CellScore]] = {}
    for s in scores:
        panels.setdefault((s.cell.backbone, s.cell.pool), []).append(s)
    axes_of = {
        panel: (list(dict.fromkeys(s.cell.tap for s in shown)), sorted({s.cell.timestep for s in shown}))
        for panel, shown in sorted(panels.items())
    }
    low, high = min(s.val for s in scores), max(s.val for s in scores)
    best = max((s for s in scores if not s.pruned), key=lambda s: s.val).cell
    width = max(4.0, 0.62 * max(len(taps) for taps, _ in axes_of.values()) + 2.2)
    heights = [0.42 * len(timesteps) + 1.5 for _, timesteps in axes_of.values()]
    figure = Figure(figsize=(width, sum(heights) + (0.4 if title else 0)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    image = None
    for axis, ((backbone, pool), (taps, timesteps)) in zip(axes, axes_of.items(), strict=True):
        grid = np.full((len(timesteps), len(taps)), np.nan)
        for s in panels[backbone, pool]:
            x, y = taps.index(s.cell.tap), timesteps.index(s.cell.timestep)
            grid[y, x] = 100 * s.val
            colour = "white" if s.val < low + 0.6 * (high - low) else "black"
            text = f"{grid[y, x]:.0f}" + ("*" if s.pruned else "")
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
            if s.cell == best:
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#e4572e", linewidth=2.5))
        limits = {"vmin": 100 * low, "vmax": 100 * max(high, low + 1e-6)}
        image = axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower", **limits)
        axis.set_xticks(range(len(taps)), taps, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(timesteps)), list(map(str, timesteps)), fontsize=8)
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
