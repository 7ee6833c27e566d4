"""Probes compared on one split: cells alone and fused, with intervals, beside what papers report.

Every row goes through the same selection: hyperparameters on val, training again on train and val, test once. Gains
are bootstrapped over the test images, both rows' answers for the same image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffrep.eval.published_probes import published_rows, published_table
from diffrep.heads.probes import Cell, ProbeData, ProbeFit, ProbeResult, paired_gain, train_probe
from diffrep.heads.probes.layouts import HeadShape, Kind

FUSED = " + "


@dataclass(frozen=True)
class ProbesReport:
    """Results by row, and how they were obtained.

    Attributes:
        gains: (row, other row) -> gain of top-1 on the test images with its 95 % interval.
        benchmark: whose published numbers stand beside; empty where there are none.
    """

    data: str
    images: Mapping[str, int]
    classes: int
    rows: Mapping[str, ProbeResult]
    gains: Mapping[tuple[str, str], tuple[float, float, float]]
    benchmark: str = ""

    def table(self) -> str:
        """The report as text."""
        width = max(map(len, self.rows))
        counts = ", ".join(f"{part} {count}" for part, count in self.images.items())
        lines = [f"{self.data}: {self.classes} classes; {counts} images", f"chance {100 / self.classes:.1f} %", ""]
        lines.append(f"{'':<{width}}  {'test top-1, % (95 %)':>22}  {'per class':>9}  {'top-5':>6}  {'val':>5}")
        for name, result in self.rows.items():
            test = result.test
            cell = f"{100 * test.top1:.1f} ({100 * test.low:.1f}..{100 * test.high:.1f})"
            lines.append(
                f"{name:<{width}}  {cell:>22}  {100 * test.mean_per_class:>9.1f}  {100 * test.top5:>6.1f}"
                f"  {100 * result.val.top1:>5.1f}"
            )
        if self.gains:
            lines += ["", "Gains on the same test images (95 % interval)"]
            for (ours, theirs), gain in self.gains.items():
                value, low, high = (100 * g for g in gain)
                lines.append(f"  {ours} over {theirs}: {value:+.1f} ({low:+.1f}..{high:+.1f}) points")
        if self.benchmark and (published := published_table(self.benchmark)):
            lines += ["", published]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything in the table as numbers, with the settings that made them."""
        document: dict[str, Any] = {
            "data": self.data,
            "images": dict(self.images),
            "classes": self.classes,
            "rows": {name: result.document() for name, result in self.rows.items()},
            "cells": {name: [str(cell) for cell in result.probe.cells] for name, result in self.rows.items()},
            "gains": [
                {"row": ours, "over": theirs, "value": gain[0], "low": gain[1], "high": gain[2]}
                for (ours, theirs), gain in self.gains.items()
            ],
            "published": [vars(p) for p in published_rows(self.benchmark)],
        }
        return json.dumps(document, indent=2)


def compare_probes(
    prepared: ProbeData,
    rows: Mapping[str, Sequence[Cell]],
    *,
    kind: Kind = "linear",
    fit: ProbeFit | None = None,
    shape: HeadShape | None = None,
    seed: int = 0,
    benchmark: str = "",
) -> ProbesReport:
    """Train a probe per row and compare every row of several cells with the rows of its parts.

    Args:
        rows: name -> its cells; several are fused side by side, each channel standardised.
        seed: of the split, to be kept in the report.
    """
    results = {
        name: train_probe(prepared, prepared.layout(kind, list(cells), shape=shape), fit, seed=seed)
        for name, cells in rows.items()
    }
    truth = prepared.labels[list(prepared.split.test)]
    gains = {
        (name, part): paired_gain(results[name].scores, results[part].scores, truth)
        for name, cells in rows.items()
        for part, fewer in rows.items()
        if len(cells) > len(fewer) and set(fewer) < set(cells)
    }
    images = {"train": len(prepared.split.train), "val": len(prepared.split.val), "test": len(prepared.split.test)}
    return ProbesReport(prepared.data.name, images, len(prepared.data.classes), results, gains, benchmark)


def rows_of(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Each backbone's cells as a row, and all of them fused where there are several backbones."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.backbone, []).append(cell)
    if len(rows) > 1:
        rows[FUSED.join(rows)] = list(cells)
    return rows
