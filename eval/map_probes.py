"""Probes of pixels, depth and normals on held-out images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffrep.alignment import align_depth
from diffrep.backbones import Backbone
from diffrep.eval.maps import PooledAngles, angular_error, depth_metrics, mean_metrics
from diffrep.heads.maps import DepthMap
from diffrep.heads.probes.annotated import AnnotatedFiles
from diffrep.heads.probes.dense_probe import Annotation, DenseProbe
from diffrep.heads.probes.labelled import DataError
from diffrep.heads.probes.pixel_labels import PixelClasses
from diffrep.heads.probes.pixel_probe import IGNORED, PixelProbe
from diffrep.images import ImageError, load_image


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
    metric, aligned, angles, images = [], [], PooledAngles(), 0
    rows = list(_readable(data))
    predicted = probe.predict_each(
        [data.images[row] for row in rows], backbone=backbone, batch_size=settings.batch_size
    )
    for row, values in zip(rows, predicted, strict=True):
        size = (int(values.values.shape[-2]), int(values.values.shape[-1]))
        truth = annotation.read(probe.task, data.annotations[row], size)
        if isinstance(values, DepthMap):
            reference = truth[0]
            valid = (reference >= settings.nearest) & (reference <= settings.farthest)
            if not bool(valid.any()):
                continue
            bounds = (settings.nearest, settings.farthest)
            metric.append(depth_metrics(values.values, reference, valid))
            fitted, _, _ = align_depth(values.values, reference, valid, bounds=bounds)
            aligned.append(depth_metrics(fitted, reference, valid))
        else:
            known = (truth != 0).any(0)
            angles.update(angular_error(values.values[None], truth[None])[0, 0][known])
        images += 1
    if not images or (probe.task == "normals" and not angles.count):
        raise DataError(f"{data.name}: no held-out image has known {probe.task}")
    if probe.task == "normals":
        return {"images": images, **angles.compute()}
    return {"images": images, "metric": mean_metrics(metric), "aligned": mean_metrics(aligned)}


def _readable(data: AnnotatedFiles) -> Iterator[int]:
    for row, file in enumerate(data.images):
        try:
            load_image(file)
        except ImageError:
            continue
        yield row


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
    predicted = probe.segment_each(data.images, backbone=backbone)
    for result, (_, truth) in zip(predicted, labels.examples(data), strict=True):
        counts += confusion(result.labels, truth, count)
    return PixelScores(counts, probe.classes)
