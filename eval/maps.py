"""Depth and surface normals on published benchmarks: predict, align, count; the papers' numbers beside ours.

Depth is counted as Marigold's harness does it, normals as DSINE's, which Lotus and E2E-FT follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.alignment import Space, align_depth
from diffrep.eval.cache import ImageResults
from diffrep.eval.datasets.dense_images import DenseLayout, DenseSample, DenseSet
from diffrep.eval.report import (
    PUBLISHED_DEPTH,
    PUBLISHED_NORMALS,
    Problem,
    PublishedMaps,
    Report,
    Section,
    published_maps,
)
from diffrep.files import claim_folder, words_of
from diffrep.heads.tiling import resize, working_size
from diffrep.settings import check

Predict = Callable[[Tensor], Tensor]
"""Depth: (3, H, W) uint8 image -> (H, W) depth or disparity up to scale and shift. Normals: (3, H, W) float image,
[-1, 1] but for padding -> (3, H, W) normals, x left, y up, z towards the camera."""

PADDING = (-2.1179039478302, -2.0357143878936768, -1.804444432258606)
"""ImageNet's normalised black, which DSINE's harness puts around images whose range is [-1, 1]."""


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

    def __post_init__(self) -> None:
        check(self)

    def measure(
        self, predict: Predict, sample: DenseSample, layout: DenseLayout
    ) -> tuple[dict[str, float], Tensor | None]:
        """Metrics of one image, and None.

        Raises:
            ValueError: it has no valid pixel, or the prediction is not finite.
        """
        aligned, _, _ = align_depth(
            predict_at(predict, sample.image, self.side), sample.truth, sample.valid,
            space=self.space, bounds=layout.bounds, fit_size=self.fit_size, subsample=self.subsample,
        )  # fmt: skip
        return depth_metrics(aligned, sample.truth, sample.valid), None

    def summarise(self, results: ImageResults, counted: Sequence[str]) -> dict[str, float]:
        """The unweighted mean over images."""
        return mean_metrics([results.rows[name] for name in counted])


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

    def __post_init__(self) -> None:
        check(self)

    def measure(
        self, predict: Predict, sample: DenseSample, layout: DenseLayout
    ) -> tuple[dict[str, float], Tensor | None]:
        """The number of pixels of one image that count, and their angular errors: (N,) degrees.

        Raises:
            ValueError: no pixel counts, or the prediction is not finite.
        """
        predicted = predict_normals(predict, sample.image, self)
        if not bool(sample.valid.any()):
            raise ValueError("no pixel has a known normal")
        errors = angular_error(predicted[None], sample.truth[None])[0, 0][sample.valid]
        return {"pixels": len(errors)}, errors

    def summarise(self, results: ImageResults, counted: Sequence[str]) -> dict[str, float]:
        """Metrics over all pixels together, or their mean over images."""
        if self.average == "images":
            return mean_of_images([results.errors(name) for name in counted])
        return PooledAngles.over(map(results.errors, counted))


MapProtocol: TypeAlias = DepthProtocol | NormalProtocol


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


def normal_padding(height: int, width: int, multiple: int = 32) -> tuple[int, int, int, int]:
    """Left, right, top, bottom: centred padding to a multiple, the odd pixel right and below."""
    x, y = -width % multiple, -height % multiple
    return x // 2, x - x // 2, y // 2, y - y // 2


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


@dataclass(frozen=True)
class MapReport(Report):
    """Metrics of a predictor on a benchmark of depth or normals.

    Attributes:
        protocol: the settings that made the numbers.
        metrics: of the data set: the unweighted mean over images, or over all pixels where the protocol says so.
        images: the numbers of every image: of depth its metrics, of normals how many pixels count.
    """

    layout: DenseLayout
    method: str
    protocol: Mapping[str, object]
    metrics: Mapping[str, float]
    images: Mapping[str, Mapping[str, float]]

    def papers(self) -> list[PublishedMaps]:
        """The published rows of this benchmark."""
        return published_maps(self.layout.name, PUBLISHED_DEPTH if self.layout.kind == "depth" else PUBLISHED_NORMALS)

    def document(self) -> Mapping[str, object]:
        depth = self.layout.kind == "depth"
        return {
            "benchmark": self.layout.name,
            "method": self.method,
            "protocol": self.protocol,
            "mean" if depth else "metrics": self.metrics,
            "images": self.images if depth else len(self.images),
            "problems": list(map(str, self.problems)),
            "published": self.papers(),
        }

    def sections(self) -> Iterator[Section]:
        if self.layout.kind == "depth":
            percent = ("abs_rel", "delta1", "delta2", "delta3")
            about, columns = f"{self.protocol['space']} space", ("AbsRel %", "delta1 %")
            cells = [f"{name} {100 * self.metrics[name]:.2f}%" for name in percent]
            cells += [f"{name} {value:.4g}" for name, value in self.metrics.items() if name not in percent]
            ours = [100 * self.metrics[name] for name in ("abs_rel", "delta1")]
            notes = ["  (numbers from different alignment spaces are not comparable)"]
        else:
            over = "all pixels together" if self.protocol["average"] == "pixels" else "images"
            about, columns, notes = f"mean over {over}", ("mean deg", "< 11.25 %"), []
            cells = [f"{name} {value:.2f}{'%' * name.startswith('under')}" for name, value in self.metrics.items()]
            ours = [self.metrics.get(name, math.nan) for name in ("mean", "under 11.25")]
        expected = f"{len(self.images)} images (published: {self.layout.images})"
        yield Section(f"{self.layout.title}: {expected}, {about}", notes=[f"  {self.method}: {', '.join(cells)}"])
        rows = [(self.method, ours, "here")]
        rows += [(row.method, list(row.values[self.layout.name]), row.source) for row in self.papers()]
        if len(rows) > 1:
            table = [(method, *(f"{value:.1f}" for value in values), source) for method, values, source in rows]
            yield Section("", columns, table, notes)


def evaluate_maps(
    predict: Predict,
    data: DenseSet,
    protocol: MapProtocol,
    *,
    method: str,
    weights: object = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> MapReport:
    """Evaluate a predictor on a benchmark of depth or normals, one image at a time.

    Args:
        method: what the predictor is called.
        weights: JSON-ready; what tells its weights from others, to recognise the folder.
        folder: keeps the numbers of every image; the same folder again goes on from what is in it.

    Raises:
        ValueError: the folder is of another method, protocol or weights.
    """
    layout, root = data.layout, None if folder is None else Path(folder)
    settings = {"benchmark": layout.name, "method": method, **asdict(protocol)}
    if root is not None:
        claim_folder(root, settings if weights is None else {**settings, "weights": weights})
    results, counted, problems = ImageResults(root), [], [*data.problems]
    for names in tqdm(data.entries, desc=layout.name, unit="image", disable=not progress):
        try:
            content = data.content(names)
            if not results.holds(names[0], content):
                values, errors = protocol.measure(predict, data.sample(names), layout)
                results.add(names[0], values, content, errors)
            counted.append(names[0])
        except FileNotFoundError as error:
            problems.append(Problem(names[0], f"{error.filename} is missing"))
        except (OSError, ValueError) as error:
            problems.append(Problem(names[0], words_of(error)))
    images = {name: results.rows[name] for name in counted}
    metrics = protocol.summarise(results, counted)
    return MapReport(layout, method, settings, metrics, images, problems=tuple(problems))


DEPTH_METRICS = (
    "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "delta1", "delta2", "delta3", "irmse", "silog",
)  # fmt: skip


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
    """Metrics over all pixels of a data set together (DSINE, Lotus, E2E-FT), from counts.

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
