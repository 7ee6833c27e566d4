"""Depth on published benchmarks: predict, align, count; and the papers' numbers beside ours."""

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

from diffrep.alignment import Space, align_depth
from diffrep.eval.cache import ResultFile, count_images
from diffrep.eval.datasets.depth_images import DepthSample, DepthSet
from diffrep.eval.datasets.pairs import Problem
from diffrep.eval.published_dense import PUBLISHED_DEPTH, depth_rows
from diffrep.files import claim_folder
from diffrep.heads.sizes import working_size

Predict = Callable[[Tensor], Tensor]
"""(3, H, W) uint8 image -> (H, W) depth or disparity up to scale and shift."""


@dataclass(frozen=True, kw_only=True)
class DepthProtocol:
    """How predictions are made and aligned.

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


def predict_at(predict: Predict, image: Tensor, side: int | None) -> Tensor:
    """Predict at a working size: the 8-bit image is resized and rounded, the map is resized back.

    Both resizes are bilinear with antialiasing, as in the official harness.

    Args:
        image: (3, H, W) uint8.

    Returns:
        (H, W) float32.
    """
    size = (int(image.shape[1]), int(image.shape[2]))
    if side is None:
        return predict(image).float()
    small = working_size(*size, side, "truncate")
    if small != size:
        resized = F.interpolate(image[None].float(), small, mode="bilinear", align_corners=False, antialias=True)
        image = resized[0].round().clamp(0, 255).to(torch.uint8)
    found = predict(image).float()
    if tuple(found.shape) == size:
        return found
    return F.interpolate(found[None, None], size, mode="bilinear", align_corners=False, antialias=True)[0, 0]


def measure_depth(
    predict: Predict, sample: DepthSample, protocol: DepthProtocol, bounds: tuple[float, float]
) -> dict[str, float]:
    """Metrics of one image.

    Raises:
        ValueError: it has no valid pixel, or the prediction is not finite.
    """
    prediction = predict_at(predict, sample.image, protocol.side)
    if not bool(torch.isfinite(prediction).all()):
        raise ValueError("the prediction is not finite")
    aligned, _, _ = align_depth(
        prediction, sample.depth, sample.valid,
        space=protocol.space, bounds=bounds, fit_size=protocol.fit_size, subsample=protocol.subsample,
    )  # fmt: skip
    return depth_metrics(aligned, sample.depth, sample.valid)


@dataclass(frozen=True)
class DepthReport:
    """Metrics of every image of a benchmark, and what could not be counted."""

    benchmark: str
    title: str
    method: str
    protocol: Mapping[str, object]
    images: Mapping[str, Mapping[str, float]]
    problems: tuple[Problem, ...]
    expected: int  # images behind the published numbers

    def mean(self) -> dict[str, float]:
        """Unweighted mean over images."""
        return mean_metrics(list(self.images.values()))

    def table(self) -> str:
        """Means as text, the published rows below."""
        mean = self.mean()
        head = f"{self.title}: {len(self.images)} images (published: {self.expected}), {self.protocol['space']} space"
        cells = [f"{name} {100 * mean[name]:.2f}%" for name in ("abs_rel", "delta1", "delta2", "delta3")]
        others = [name for name in DEPTH_METRICS if name != "abs_rel" and not name.startswith("delta")]
        cells += [f"{name} {mean[name]:.4g}" for name in others]
        lines = [head, f"  {self.method}: " + ", ".join(cells)]
        if rows := depth_rows(self.benchmark):
            width = max(len(self.method), *(len(row.method) for row in rows))
            lines += ["", f"  {'':<{width}}  AbsRel %  delta1 %  source"]
            lines.append(f"  {self.method:<{width}}  {100 * mean['abs_rel']:8.1f}  {100 * mean['delta1']:8.1f}  here")
            for row in rows:
                abs_rel, delta = row.values[self.benchmark]
                lines.append(f"  {row.method:<{width}}  {abs_rel:8.1f}  {delta:8.1f}  {row.source}")
            lines.append("  (numbers from different alignment spaces are not comparable)")
        return "\n".join([*lines, *problem_lines(self.problems)])

    def to_json(self) -> str:
        """Means, images, problems and published rows."""
        return json.dumps(
            {
                "benchmark": self.benchmark,
                "method": self.method,
                "protocol": dict(self.protocol),
                "mean": self.mean(),
                "images": {name: dict(values) for name, values in self.images.items()},
                "problems": [str(problem) for problem in self.problems],
                "published": [asdict(row) for row in PUBLISHED_DEPTH if self.benchmark in row.values],
            },
            indent=2,
        )


def problem_lines(problems: tuple[Problem, ...]) -> list[str]:
    """What was left out, by name."""
    if not problems:
        return []
    shown = [f"  {problem}" for problem in problems[:20]]
    more = [f"  and {len(problems) - 20} more"] if len(problems) > 20 else []
    return ["", f"{len(problems)} not counted:", *shown, *more]


def evaluate_depth(
    predict: Predict,
    data: DepthSet,
    protocol: DepthProtocol,
    *,
    method: str,
    folder: str | Path | None = None,
    progress: bool = True,
) -> DepthReport:
    """Evaluate a predictor on a benchmark, one image at a time.

    Args:
        method: what the predictor is called.
        folder: keeps the metrics of every image; the same folder again goes on from what is there.

    Raises:
        ValueError: the folder is of another method or protocol.
    """
    settings = {"benchmark": data.benchmark.name, "method": method, **asdict(protocol)}
    if folder is not None:
        claim_folder(Path(folder), settings)
    kept = ResultFile(Path(folder) / "images.jsonl" if folder is not None else None)
    benchmark = data.benchmark

    def count(sample: DepthSample) -> None:
        kept.add(sample.name, measure_depth(predict, sample, protocol, benchmark.bounds))

    found = count_images(data, frozenset(kept.rows), count, title=benchmark.name, progress=progress)
    problems = [*data.problems, *found]
    ordered = {names[0]: kept.rows[names[0]] for names in data.entries if names[0] in kept.rows}
    return DepthReport(benchmark.name, benchmark.title, method, settings, ordered, tuple(problems), benchmark.images)


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
