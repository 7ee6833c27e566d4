"""Probes compared on one split, with intervals, beside what papers report; probes of pixels on held-out images.

Every row goes through the same selection: hyperparameters on val, training again on train and val, test once. Gains
are bootstrapped over the test images, both rows' answers for the same image. Published accuracies, with their sources
and how they were obtained, are in ``eval/data/probes.toml``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffrep.alignment import align_depth
from diffrep.backbones import Backbone
from diffrep.eval.maps import PooledAngles, angular_error, depth_metrics, mean_metrics
from diffrep.eval.report import Report, Section, read_tables, with_interval
from diffrep.heads.maps import DepthMap
from diffrep.heads.probes import Annotation, Cell, ProbeData, ProbeFit, ProbeResult, paired_gain, train_probe
from diffrep.heads.probes.annotated import IGNORED, AnnotatedFiles, PixelClasses
from diffrep.heads.probes.dense import DenseProbe
from diffrep.heads.probes.labelled import DataError
from diffrep.heads.probes.layouts import HeadShape, Kind
from diffrep.heads.probes.pixels import PixelProbe
from diffrep.images import ImageError, load_image

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
    return ProbesReport(
        prepared.data.name, prepared.split.counts(), len(prepared.data.classes), results, gains, benchmark
    )


def rows_of(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Each backbone's cells as a row, and all of them fused where there are several backbones."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.backbone, []).append(cell)
    if len(rows) > 1:
        rows[FUSED.join(rows)] = list(cells)
    return rows


@dataclass(frozen=True, kw_only=True)
class PublishedProbe:
    """Top-1 accuracy in percent.

    Attributes:
        obtained: "table" printed in the paper; "figure" decoded from its vector figure, exact to about 0.02;
            "bars" read off a bar chart, good to about 0.5.
    """

    benchmark: str
    method: str
    value: float
    source: str
    obtained: Literal["table", "figure", "bars"]
    block: int | None = None  # of the 37 of the 256-pixel ADM network
    timestep: int | None = None
    pool: int | None = None

    def __str__(self) -> str:
        place = "" if self.block is None else f" block {self.block}, t={self.timestep}, pool {self.pool}"
        paper = self.source[self.source.index("arXiv") :].rstrip(")")
        return f"{self.value:>6.2f}  {self.method}{place}  ({paper}, {self.obtained})"


PUBLISHED = read_tables("probes", PublishedProbe)


def published_rows(benchmark: str) -> Sequence[PublishedProbe]:
    """What papers report for a benchmark, best first."""
    return sorted((p for p in PUBLISHED if p.benchmark == benchmark), key=lambda p: -p.value)


def published_table(benchmark: str, rows: int = 12) -> str:
    """The best published rows as text; empty where there are none."""
    published = published_rows(benchmark)[:rows]
    head = f"published top-1 on {benchmark}, % (bars: read off a chart, good to about 0.5)"
    return "\n".join([head, *(f"  {row}" for row in published)]) if published else ""


def score_dense_probe(
    probe: DenseProbe, data: AnnotatedFiles, backbone: Backbone, annotation: Annotation | None = None
) -> dict[str, Any]:
    """Metrics of a probe on annotated images, at the images' own size; images that cannot be read are left out.

    Returns:
        images, and of depth the means over images of `depth_metrics` over pixels within the probe's limits, as
        predicted ("metric") and with scale and shift fitted to each image ("aligned"); of normals `PooledAngles`.

    Raises:
        DataError: no image has a known pixel, or an annotation does not fit its image.
    """
    annotation, settings = annotation or Annotation(), probe.settings
    bounds, metric, aligned, angles, images = (settings.nearest, settings.farthest), [], [], PooledAngles(), 0
    rows = [row for row, file in enumerate(data.images) if _is_readable(file)]
    files = [data.images[row] for row in rows]
    predicted = probe.predict_each(files, backbone=backbone, batch_size=settings.batch_size)
    for row, values in zip(rows, predicted, strict=True):
        height, width = values.values.shape[-2:]
        truth = annotation.read(probe.task, data.annotations[row], (height, width))
        if isinstance(values, DepthMap):
            reference = truth[0]
            valid = (reference >= settings.nearest) & (reference <= settings.farthest)
            if not bool(valid.any()):
                continue
            metric.append(depth_metrics(values.values, reference, valid))
            fitted, _, _ = align_depth(values.values, reference, valid, bounds=bounds)
            aligned.append(depth_metrics(fitted, reference, valid))
        else:
            angles.update(angular_error(values.values[None], truth[None])[0, 0][(truth != 0).any(0)])
        images += 1
    if not images or (probe.task == "normals" and not angles.count):
        raise DataError(f"{data.name}: no held-out image has known {probe.task}")
    if probe.task == "normals":
        return {"images": images, **angles.compute()}
    return {"images": images, "metric": mean_metrics(metric), "aligned": mean_metrics(aligned)}


def _is_readable(file: Path) -> bool:
    try:
        load_image(file)
    except ImageError:
        return False
    return True


@dataclass(frozen=True)
class PixelScores:
    """How often each class was taken for which, over all pixels of a data set together.

    Attributes:
        counts: (K, K) int64, true class by predicted class.
    """

    counts: Tensor
    classes: tuple[str, ...]

    def iou(self) -> dict[str, float]:
        """Intersection over union of each class that occurs in the truth."""
        hit, truth, predicted = self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)
        shares = (hit / (truth + predicted - hit).clamp(min=1)).tolist()
        return {name: shares[i] for i, name in enumerate(self.classes) if truth[i] > 0}

    def document(self) -> dict[str, Any]:
        """mean_iou over the classes that occur, the share of pixels that are right, and the IoU of each class."""
        each = self.iou()
        total = int(self.counts.sum())
        return {
            "mean_iou": math.fsum(each.values()) / len(each) if each else math.nan,
            "pixel_accuracy": int(self.counts.diagonal().sum()) / total if total else math.nan,
            "iou": each,
        }


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(K, K) counts of true by predicted class over the pixels whose truth is not `IGNORED`."""
    used = truth != IGNORED
    pairs = truth[used] * classes + predicted[used]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def score_pixel_probe(probe: PixelProbe, data: AnnotatedFiles, backbone: Backbone, labels: PixelClasses) -> PixelScores:
    """Confusion of a probe's labels on labelled images.

    Raises:
        ImageError, DataError: an image or its labels cannot be read.
    """
    count = len(probe.classes)
    counts = torch.zeros(count, count, dtype=torch.int64)
    predicted = probe.predict_each(data.images, backbone=backbone)
    for result, (_, truth) in zip(predicted, labels.examples(data), strict=True):
        counts += confusion(result.labels, truth, count)
    return PixelScores(counts, probe.classes)
