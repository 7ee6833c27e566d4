"""Surface normals on published benchmarks, by the protocol of DSINE that Lotus and E2E-FT follow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.eval.cache import AngleFiles, count_images
from diffrep.eval.datasets.normal_images import PADDING, NormalSample, NormalSet, normal_padding
from diffrep.eval.datasets.pairs import Problem
from diffrep.eval.depth import problem_lines
from diffrep.eval.published_dense import PUBLISHED_NORMALS, normal_rows
from diffrep.files import claim_folder
from diffrep.heads.sizes import working_size

PredictNormals = Callable[[Tensor], Tensor]
"""(3, H, W) float image, [-1, 1] but for padding -> (3, H, W) normals, x left, y up, z towards the camera."""


@dataclass(frozen=True, kw_only=True)
class NormalProtocol:
    """How predictions are made and counted.

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


def predict_normals(predict: PredictNormals, image: Tensor, protocol: NormalProtocol) -> Tensor:
    """Predict one image as the protocol says.

    Args:
        image: (3, H, W) uint8.

    Returns:
        (3, H, W) float32.
    """
    pixels = image.float() / 255
    if protocol.stretch:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-6)
    pixels = (pixels - 0.5) / 0.5
    height, width = int(image.shape[1]), int(image.shape[2])
    left, right, top, bottom = normal_padding(height, width) if protocol.pad == "lotus" else (0, 0, 0, 0)
    padded = torch.tensor(PADDING).view(3, 1, 1).repeat(1, top + height + bottom, left + width + right)
    padded[:, top : top + height, left : left + width] = pixels
    size = (int(padded.shape[1]), int(padded.shape[2]))
    given = padded
    if protocol.side is not None:
        given = _resize(padded, working_size(*size, protocol.side, "truncate"))
    found = _resize(predict(given).float(), size)
    return found[:, top : top + height, left : left + width]


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(values.shape[1:]) == size:
        return values
    return F.interpolate(values[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def measure_normals(predict: PredictNormals, sample: NormalSample, protocol: NormalProtocol) -> Tensor:
    """Angular errors of the pixels of one image that count: (N,) degrees.

    Raises:
        ValueError: no pixel counts, or the prediction is not finite.
    """
    found = predict_normals(predict, sample.image, protocol)
    if not bool(torch.isfinite(found).all()):
        raise ValueError("the prediction is not finite")
    if not bool(sample.mask.any()):
        raise ValueError("no pixel has a known normal")
    return angular_error(found[None], sample.normals[None])[0, 0][sample.mask]


@dataclass(frozen=True)
class NormalReport:
    """Metrics of a benchmark, and what could not be counted."""

    benchmark: str
    title: str
    method: str
    protocol: Mapping[str, object]
    images: int
    metrics: Mapping[str, float]
    problems: tuple[Problem, ...]
    expected: int

    def table(self) -> str:
        """Metrics as text, the published rows below."""
        over = "all pixels together" if self.protocol["average"] == "pixels" else "images"
        values = {k: f"{v:.2f}" + ("%" if k.startswith("under") else "") for k, v in self.metrics.items()}
        lines = [
            f"{self.title}: {self.images} images (published: {self.expected}), mean over {over}",
            f"  {self.method}: " + ", ".join(f"{k} {v}" for k, v in values.items()),
        ]
        if rows := normal_rows(self.benchmark):
            width = max(len(self.method), *(len(row.method) for row in rows))
            lines += ["", f"  {'':<{width}}  mean deg  < 11.25 %  source"]
            ours = self.metrics["mean"], self.metrics["under 11.25"]
            lines.append(f"  {self.method:<{width}}  {ours[0]:8.1f}  {ours[1]:9.1f}  here")
            for row in rows:
                mean, share = row.values[self.benchmark]
                lines.append(f"  {row.method:<{width}}  {mean:8.1f}  {share:9.1f}  {row.source}")
        return "\n".join([*lines, *problem_lines(self.problems)])

    def to_json(self) -> str:
        """Metrics, problems and published rows."""
        return json.dumps(
            {
                "benchmark": self.benchmark,
                "method": self.method,
                "protocol": dict(self.protocol),
                "images": self.images,
                "metrics": dict(self.metrics),
                "problems": [str(problem) for problem in self.problems],
                "published": [asdict(row) for row in PUBLISHED_NORMALS if self.benchmark in row.values],
            },
            indent=2,
        )


def evaluate_normals(
    predict: PredictNormals,
    data: NormalSet,
    protocol: NormalProtocol,
    *,
    method: str,
    folder: str | Path | None = None,
    progress: bool = True,
) -> NormalReport:
    """Evaluate a predictor on a benchmark, one image at a time.

    Args:
        method: what the predictor is called.
        folder: keeps the errors of every image; the same folder again goes on from what is there.

    Raises:
        ValueError: the folder is of another method or protocol.
    """
    settings = {"benchmark": data.benchmark.name, "method": method, **asdict(protocol)}
    if folder is not None:
        claim_folder(Path(folder), settings)
    kept = AngleFiles(Path(folder) if folder is not None else None)

    def count(sample: NormalSample) -> None:
        kept.add(sample.name, measure_normals(predict, sample, protocol))

    done = frozenset(name for name in data.entries if name in kept)
    problems = count_images(data, done, count, title=data.benchmark.name, progress=progress)
    counted = [name for name in data.entries if name in kept]
    if protocol.average == "images":
        metrics = mean_of_images([kept.errors(name) for name in counted])
    else:
        pooled = PooledAngles()
        for name in counted:
            pooled.update(kept.errors(name))
        metrics = pooled.compute()
    benchmark = data.benchmark
    return NormalReport(
        benchmark.name, benchmark.title, method, settings, len(counted), metrics, tuple(problems), benchmark.images
    )


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
