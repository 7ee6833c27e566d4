"""Depth and surface normals on published benchmarks: predict, align, count; the papers' numbers beside ours.

Depth is counted as Marigold's harness does it, normals as DSINE's, which Lotus and E2E-FT follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.alignment import Space, align_depth
from diffrep.eval.cache import ImageResults
from diffrep.eval.datasets.dense_images import (
    DEPTH_BENCHMARKS,
    PADDING,
    DenseLayout,
    DenseSet,
    DepthSample,
    NormalSample,
    count_images,
    normal_padding,
)
from diffrep.eval.published import PUBLISHED_DEPTH, PUBLISHED_NORMALS, PublishedMaps, published_maps
from diffrep.eval.report import Report, Section
from diffrep.files import claim_folder
from diffrep.heads.sizes import resize, working_size

Predict = Callable[[Tensor], Tensor]
"""Depth: (3, H, W) uint8 image -> (H, W) depth or disparity up to scale and shift. Normals: (3, H, W) float image,
[-1, 1] but for padding -> (3, H, W) normals, x left, y up, z towards the camera."""


@dataclass(frozen=True, kw_only=True)
class DepthProtocol:
    """How depth is predicted and aligned.

    Attributes:
        space: of the predictions, in which scale and shift are fitted.
        side: long side in pixels to which images are brought (up as well as down) before they are predicted; None: as
            they are.
        fit_size: longest side of the map in the fit.
        subsample: how the fit's map is reduced; the official code reduces the width only.
    """

    space: Space = "disparity"
    side: int | None = None
    fit_size: int | None = None
    subsample: Literal["both sides", "width"] = "width"


@dataclass(frozen=True, kw_only=True)
class NormalProtocol:
    """How normals are predicted and counted.

    Attributes:
        pad: "lotus" pads to a multiple of 32 with `PADDING`, "none" leaves images as they are.
        stretch: bring each image's darkest and brightest value to -1 and 1, as E2E-FT does.
        side: long side in pixels to which images are brought; None: as they are.
        average: over all pixels of the data set together ("pixels": DSINE, Lotus, E2E-FT) or over its images
            (Marigold).
    """

    pad: Literal["lotus", "none"] = "lotus"
    stretch: bool = False
    side: int | None = None
    average: Literal["pixels", "images"] = "pixels"


def predict_at(predict: Predict, image: Tensor, side: int | None) -> Tensor:
    """Predict at a working size: the image is resized (8-bit ones are rounded again), the map is resized back.

    Both resizes are bilinear with antialiasing, as in the official harness.

    Args:
        image: (3, H, W).

    Returns:
        (H, W) or (3, H, W) float32.

    Raises:
        ValueError: the prediction is not finite.
    """
    size = (int(image.shape[1]), int(image.shape[2]))
    small = image
    if side is not None:
        small = resize(image[None].float(), working_size(*size, side, "truncate"))[0]
        if image.dtype == torch.uint8:
            small = small.round().clamp(0, 255).to(torch.uint8)
    values = predict(small).float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the prediction is not finite")
    return resize(values.reshape(1, -1, *values.shape[-2:]), size)[0].reshape(*values.shape[:-2], *size)


def measure_depth(
    predict: Predict, sample: DepthSample, protocol: DepthProtocol, bounds: tuple[float, float]
) -> dict[str, float]:
    """Metrics of one image.

    Raises:
        ValueError: it has no valid pixel, or the prediction is not finite.
    """
    prediction = predict_at(predict, sample.image, protocol.side)
    aligned, _, _ = align_depth(
        prediction, sample.depth, sample.valid,
        space=protocol.space, bounds=bounds, fit_size=protocol.fit_size, subsample=protocol.subsample,
    )  # fmt: skip
    return depth_metrics(aligned, sample.depth, sample.valid)


def predict_normals(predict: Predict, image: Tensor, protocol: NormalProtocol) -> Tensor:
    """Predict one image as the protocol says.

    Args:
        image: (3, H, W) uint8.

    Returns:
        (3, H, W) float32.

    Raises:
        ValueError: the prediction is not finite.
    """
    pixels = image.float() / 255
    if protocol.stretch:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-6)
    height, width = int(image.shape[1]), int(image.shape[2])
    left, right, top, bottom = normal_padding(height, width) if protocol.pad == "lotus" else (0, 0, 0, 0)
    padded = torch.tensor(PADDING).view(3, 1, 1).repeat(1, top + height + bottom, left + width + right)
    padded[:, top : top + height, left : left + width] = (pixels - 0.5) / 0.5
    return predict_at(predict, padded, protocol.side)[:, top : top + height, left : left + width]


def measure_normals(predict: Predict, sample: NormalSample, protocol: NormalProtocol) -> Tensor:
    """Angular errors of the pixels of one image that count: (N,) degrees.

    Raises:
        ValueError: no pixel counts, or the prediction is not finite.
    """
    predicted = predict_normals(predict, sample.image, protocol)
    if not bool(sample.mask.any()):
        raise ValueError("no pixel has a known normal")
    return angular_error(predicted[None], sample.normals[None])[0, 0][sample.mask]


@dataclass(frozen=True)
class MapReport(Report):
    """Metrics of a predictor on a benchmark of depth or normals.

    Attributes:
        title: of the benchmark.
        protocol: the settings that made the numbers.
        metrics: of the data set: the unweighted mean over images, or over all pixels where the protocol says so.
        expected: images behind the published numbers.
    """

    benchmark: str
    title: str
    method: str
    protocol: Mapping[str, object]
    metrics: Mapping[str, float]
    expected: int

    def _sections(
        self, counted: int, about: str, cells: Sequence[str], columns: Sequence[str], ours: Sequence[float],
        rows: tuple[PublishedMaps, ...], notes: Sequence[str] = (),
    ) -> Iterator[Section]:  # fmt: skip
        yield Section(
            f"{self.title}: {counted} images (published: {self.expected}), {about}",
            notes=[f"  {self.method}: {', '.join(cells)}"],
        )
        if papers := published_maps(self.benchmark, rows):
            table = [
                (row.method, *(f"{value:.1f}" for value in row.values[self.benchmark]), row.source) for row in papers
            ]
            yield Section("", columns, [(self.method, *(f"{value:.1f}" for value in ours), "here"), *table], notes)


@dataclass(frozen=True)
class DepthReport(MapReport):
    """Metrics of depth on a benchmark; `images` has those of every image."""

    images: Mapping[str, Mapping[str, float]]

    def mean(self) -> dict[str, float]:
        """Unweighted mean over images."""
        return dict(self.metrics)

    def document(self) -> Mapping[str, object]:
        return {
            "benchmark": self.benchmark,
            "method": self.method,
            "protocol": self.protocol,
            "mean": self.metrics,
            "images": self.images,
            "problems": list(map(str, self.problems)),
            "published": published_maps(self.benchmark, PUBLISHED_DEPTH),
        }

    def sections(self) -> Iterator[Section]:
        shares = [name for name in DEPTH_METRICS if name == "abs_rel" or name.startswith("delta")]
        cells = [f"{name} {100 * self.metrics[name]:.2f}%" for name in shares]
        cells += [f"{name} {value:.4g}" for name, value in self.metrics.items() if name not in shares]
        ours = [100 * self.metrics["abs_rel"], 100 * self.metrics["delta1"]]
        return self._sections(
            len(self.images), f"{self.protocol['space']} space", cells, ("AbsRel %", "delta1 %"), ours, PUBLISHED_DEPTH,
            ["  (numbers from different alignment spaces are not comparable)"],
        )  # fmt: skip


@dataclass(frozen=True)
class NormalReport(MapReport):
    """Metrics of normals on a benchmark, over so many `images`."""

    images: int

    def document(self) -> Mapping[str, object]:
        return {
            "benchmark": self.benchmark,
            "method": self.method,
            "protocol": self.protocol,
            "images": self.images,
            "metrics": self.metrics,
            "problems": list(map(str, self.problems)),
            "published": published_maps(self.benchmark, PUBLISHED_NORMALS),
        }

    def sections(self) -> Iterator[Section]:
        over = "all pixels together" if self.protocol["average"] == "pixels" else "images"
        cells = [f"{k} {v:.2f}{'%' * k.startswith('under')}" for k, v in self.metrics.items()]
        ours = [self.metrics.get("mean", math.nan), self.metrics.get("under 11.25", math.nan)]
        columns = ("mean deg", "< 11.25 %")
        return self._sections(self.images, f"mean over {over}", cells, columns, ours, PUBLISHED_NORMALS)


def evaluate_depth(
    predict: Predict,
    data: DenseSet[DepthSample],
    protocol: DepthProtocol,
    *,
    method: str,
    weights: object = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> DepthReport:
    """Evaluate a predictor on a benchmark, one image at a time.

    Args:
        method: what the predictor is called.
        weights: JSON-ready; what tells its weights from others, to recognise the folder.
        folder: keeps the metrics of every image; the same folder again goes on from what is in it.

    Raises:
        ValueError: the folder is of another method, protocol or weights.
    """
    settings, results = _claimed(data.benchmark, method, protocol, weights, folder)
    bounds = DEPTH_BENCHMARKS[data.benchmark.name].bounds

    def count(sample: DepthSample) -> None:
        results.add(sample.name, measure_depth(predict, sample, protocol, bounds), sample.content)

    counted, problems = count_images(data, results, count, progress=progress)
    images = {name: results.rows[name] for name in counted}
    about = (data.benchmark.name, data.benchmark.title, method, settings)
    return DepthReport(
        *about, mean_metrics(list(images.values())), data.benchmark.images, images, problems=(*data.problems, *problems)
    )


def evaluate_normals(
    predict: Predict,
    data: DenseSet[NormalSample],
    protocol: NormalProtocol,
    *,
    method: str,
    weights: object = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> NormalReport:
    """Evaluate a predictor on a benchmark, one image at a time; arguments and errors as of `evaluate_depth`."""
    settings, results = _claimed(data.benchmark, method, protocol, weights, folder)

    def count(sample: NormalSample) -> None:
        errors = measure_normals(predict, sample, protocol)
        results.add(sample.name, {"pixels": len(errors)}, sample.content, errors)

    counted, problems = count_images(data, results, count, progress=progress)
    if protocol.average == "images":
        metrics = mean_of_images([results.errors(name) for name in counted])
    else:
        metrics = PooledAngles.over(map(results.errors, counted))
    about = (data.benchmark.name, data.benchmark.title, method, settings)
    return NormalReport(*about, metrics, data.benchmark.images, len(counted), problems=(*data.problems, *problems))


def _claimed(
    benchmark: DenseLayout[Any],
    method: str,
    protocol: DepthProtocol | NormalProtocol,
    weights: object,
    folder: str | Path | None,
) -> tuple[dict[str, object], ImageResults]:
    """The settings of an evaluation, and the results that a folder keeps of it."""
    settings = {"benchmark": benchmark.name, "method": method, **asdict(protocol)}
    root = None if folder is None else Path(folder)
    if root is not None:
        claim_folder(root, settings if weights is None else {**settings, "weights": weights})
    return settings, ImageResults(root)


# -- metrics --------------------------------------------------------------------------------------------------------

DEPTH_METRICS = (
    "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "delta1", "delta2", "delta3", "irmse", "silog",
)  # fmt: skip
LOWER_IS_BETTER = frozenset(DEPTH_METRICS) - {"delta1", "delta2", "delta3"}


def depth_metrics(prediction: Tensor, reference: Tensor, valid: Tensor) -> dict[str, float]:
    """The usual metrics of one image, over its valid pixels.

    Args:
        prediction, reference: (H, W) metres, positive where valid.
        valid: (H, W) bool.

    Returns:
        abs_rel, sq_rel (metres), rmse (metres), rmse_log, log10, delta1 to delta3 (shares of pixels whose ratio is
        below 1.25 to the power 1 to 3), irmse (1 / metres) and silog (times 100); NaN where nothing is valid.
    """
    p, g = prediction[valid].double(), reference[valid].double()
    if not len(p):
        return dict.fromkeys(DEPTH_METRICS, math.nan)
    difference, logs = p - g, p.log() - g.log()
    ratio = torch.maximum(p / g, g / p)
    values = {
        "abs_rel": (difference.abs() / g).mean(),
        "sq_rel": (difference.square() / g).mean(),
        "rmse": difference.square().mean().sqrt(),
        "rmse_log": logs.square().mean().sqrt(),
        "log10": logs.abs().mean() / math.log(10),
        **{f"delta{k}": (ratio < 1.25**k).double().mean() for k in (1, 2, 3)},
        "irmse": (1 / p - 1 / g).square().mean().sqrt(),
        "silog": 100 * (logs.square().mean() - logs.mean().square()).clamp(min=0).sqrt(),
    }
    return {name: value.item() for name, value in values.items()}


def mean_metrics(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Unweighted mean over images of each metric; NaN where there is no image."""
    if not images:
        return dict.fromkeys(DEPTH_METRICS, math.nan)
    return {name: math.fsum(image[name] for image in images) / len(images) for name in images[0]}


THRESHOLDS = (5.0, 7.5, 11.25, 22.5, 30.0)  # degrees


def angular_error(prediction: Tensor, reference: Tensor) -> Tensor:
    """Angle between predicted and true normals, degrees.

    Args:
        prediction, reference: (B, 3, H, W), of any length.

    Returns:
        (B, 1, H, W) in [0, 180]; 90 where either is the zero vector.
    """
    cosine = F.cosine_similarity(prediction, reference, dim=1).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosine))[:, None]


def normal_metrics(errors: Tensor) -> dict[str, float]:
    """Metrics of one set of pixels.

    Args:
        errors: (N,) degrees.

    Returns:
        mean, median (of the two middle ones the mean), rmse in degrees, and "under 5" to "under 30", percent of
        pixels strictly below; NaN where there is no pixel.
    """
    count = len(errors)
    if not count:
        return dict.fromkeys(["mean", "median", "rmse", *(f"under {t:g}" for t in THRESHOLDS)], math.nan)
    e = errors.double()
    return {
        "mean": e.mean().item(),
        "median": torch.quantile(e, 0.5).item() if count < 2**24 else e.median().item(),
        "rmse": e.square().mean().sqrt().item(),
        **{f"under {t:g}": 100 * (e < t).double().mean().item() for t in THRESHOLDS},
    }


class PooledAngles:
    """Metrics over all pixels of a data set together (DSINE, Lotus, E2E-FT), from counts that merge exactly.

    The median comes from a histogram of cells `WIDTH` degrees wide and is right to that.
    """

    WIDTH = 5e-4

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        self.squares = 0.0
        self.under = torch.zeros(len(THRESHOLDS), dtype=torch.int64)
        self.histogram = torch.zeros(round(180 / self.WIDTH) + 1, dtype=torch.int64)

    def update(self, errors: Tensor) -> None:
        """Count the pixels of one image: (N,) degrees."""
        e = errors.double()
        self.count += len(e)
        self.sum += e.sum().item()
        self.squares += e.square().sum().item()
        self.under += torch.stack([(e < t).sum() for t in THRESHOLDS])
        self.histogram += torch.bincount((e / self.WIDTH).long(), minlength=len(self.histogram))

    @classmethod
    def over(cls, images: Iterable[Tensor]) -> dict[str, float]:
        """`compute` over images, the errors of each (N,) degrees."""
        pooled = cls()
        for errors in images:
            pooled.update(errors)
        return pooled.compute()

    def merge(self, other: PooledAngles) -> None:
        """Add what another process counted."""
        self.count += other.count
        self.sum += other.sum
        self.squares += other.squares
        self.under += other.under
        self.histogram += other.histogram

    def compute(self) -> dict[str, float]:
        """As `normal_metrics`, over everything counted."""
        if not self.count:
            return normal_metrics(torch.zeros(0))
        total = self.histogram.cumsum(0)
        middle = torch.tensor([(self.count - 1) // 2, self.count // 2]) + 1
        cells = torch.searchsorted(total, middle)
        return {
            "mean": self.sum / self.count,
            "median": (cells.double().mean().item() + 0.5) * self.WIDTH,
            "rmse": math.sqrt(self.squares / self.count),
            **{f"under {t:g}": 100 * n / self.count for t, n in zip(THRESHOLDS, self.under.tolist(), strict=True)},
        }


def mean_of_images(images: Sequence[Tensor]) -> dict[str, float]:
    """Marigold's protocol: metrics of each image, each rounded to 4 digits, then their mean.

    Args:
        images: the errors of each image, (N,) degrees.
    """
    each = [{k: round(v, 4) for k, v in normal_metrics(errors).items()} for errors in images]
    return {name: math.fsum(image[name] for image in each) / len(each) for name in each[0]} if each else {}
