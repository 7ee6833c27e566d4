"""Probes compared on one split: cells alone and fused, with intervals, beside what papers report.

Every row goes through the same selection: hyperparameters on val, training again on train and val, test once. Gains
are bootstrapped over the test images, both rows' answers for the same image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffrep.eval.published_probes import published_rows, published_table
from diffrep.eval.report import Report, Section, with_interval
from diffrep.heads.probes import Cell, ProbeData, ProbeFit, ProbeResult, paired_gain, train_probe
from diffrep.heads.probes.layouts import HeadShape, Kind

FUSED = " + "


@dataclass(frozen=True)
class ProbesReport(Report):
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

    def sections(self) -> Iterable[Section]:
        """The data, every row's scores, gains of fusing, and published numbers."""
        counts = ", ".join(f"{part} {count}" for part, count in self.images.items())
        head = f"{self.data}: {self.classes} classes; {counts} images\nchance {100 / self.classes:.1f} %"
        columns = ("test top-1, % (95 %)", "per class", "top-5", "val")
        rows = [
            (
                name,
                with_interval(result.test.top1, result.test.low, result.test.high, digits=1, percent=True),
                *(f"{100 * v:.1f}" for v in (result.test.mean_per_class, result.test.top5, result.val.top1)),
            )
            for name, result in self.rows.items()
        ]
        yield Section(head, columns, rows)
        if self.gains:
            lines = []
            for (ours, theirs), gain in self.gains.items():
                value, low, high = (100 * g for g in gain)
                lines.append(f"  {ours} over {theirs}: {value:+.1f} ({low:+.1f}..{high:+.1f}) points")
            yield Section("Gains on the same test images (95 % interval)", notes=lines)
        if self.benchmark and (published := published_table(self.benchmark)):
            yield Section(published)

    def document(self) -> Mapping[str, Any]:
        """Everything in the tables as numbers, with the settings that made them."""
        return {
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
