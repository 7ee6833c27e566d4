"""Surface normals on published benchmarks, by the protocol of DSINE that Lotus and E2E-FT follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.eval.cache import claim_folder
from diffrep.eval.datasets.normal_images import PADDING, NormalSample, NormalSet, normal_padding
from diffrep.eval.datasets.pairs import Problem
from diffrep.eval.depth import problem_lines
from diffrep.eval.normal_metrics import PooledAngles, angular_error, mean_of_images
from diffrep.eval.published_dense import PUBLISHED_NORMALS, normal_rows
from diffrep.eval.resume import AngleFiles, count_images
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
