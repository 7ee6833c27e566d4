"""``diffrep eval guidance``: posterior samplers on one model, through its decoder, on four measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffrep.backbones.diffusion import draw_noise
from diffrep.eval.rendering import SceneMapSettings, render_job
from diffrep.eval.report import Report, Section
from diffrep.eval.restoration import FeatureDistance, score_images, to_levels
from diffrep.files import write_image
from diffrep.guidance import operators
from diffrep.guidance.core import guided
from diffrep.guidance.operators import Operator
from diffrep.guidance.posterior import dps, flowchef_latent, pigdm, red_diff, through_decoder
from diffrep.painting import DiffusionModel
from diffrep.pictures import image_grid
from diffrep.sampling.schedules import SamplingError, TableVP, TimeGrid, table_times
from diffrep.settings import NOT_NEGATIVE, check_ranges

MEASUREMENTS: dict[str, Callable[[tuple[int, int, int]], Operator]] = {
    "box": lambda shape: operators.box(shape, shape[1] // 3),
    "super-resolution by 4": lambda shape: operators.averaging(shape, 4),
    # cut where the pseudo-inverse would blow the measurements' noise up into all there is
    "Gaussian blur": lambda shape: operators.gaussian(shape, shape[1] / 64, cut=0.2),
    "colourisation": operators.colours,
}


@dataclass(frozen=True, kw_only=True)
class GuidanceEvaluation(SceneMapSettings):
    """Which scenes are measured, and how they are sampled."""

    count: int = 4  # scenes
    steps: int = 50
    noise: float = 0.02  # standard deviation of the measurements' noise, of colours in -1..1
    seed: int = 0  # of all noise

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, steps="1..1000", noise=NOT_NEGATIVE, seed="[0, 2^31)")


@dataclass(frozen=True)
class GuidanceReport(Report):
    """Scores: measurement -> method -> name -> mean over the scenes."""

    model: str
    settings: GuidanceEvaluation
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]

    def sections(self) -> Iterator[Section]:
        columns = ("psnr", "ssim", "distance", "measurement", "calls")
        for measurement, rows in self.scores.items():
            cells = [(m, *(f"{row[c]:.{0 if c == 'calls' else 3}f}" for c in columns)) for m, row in rows.items()]
            yield Section(
                f"{self.model}, {measurement}: {self.settings.count} scenes, {self.settings.steps} steps",
                columns,
                cells,
            )

    def document(self) -> Mapping[str, object]:
        return {"model": self.model, "settings": self.settings, "scores": self.scores}


def evaluate_guidance(
    model: DiffusionModel, settings: GuidanceEvaluation | None = None, pictures: Path | None = None
) -> GuidanceReport:
    """Restore scenes from measurements; all methods work on the model's latents, through its decoder.

    Args:
        model: under one condition.
        pictures: folder for a picture of each measurement: scenes, then what each method made of them, row by row.

    Raises:
        SamplingError: the model is a flow, or a sampler diverges.
    """
    settings = settings or GuidanceEvaluation()
    if not isinstance(model.schedule, TableVP):
        raise SamplingError(f"{model.name}: posterior samplers are compared on tables of noise, not on flows")
    grid = TimeGrid.of(model.schedule, [*table_times(model.schedule, settings.steps, "leading"), -1]).ending()
    scenes = [scene for batch in settings.batches(render_job, settings.jobs()) for scene in batch]
    images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes]).float() / 255
    distance, scores = FeatureDistance(), dict[str, dict[str, dict[str, float]]]()
    for name, build in MEASUREMENTS.items():
        operator, rows = build((3, *images.shape[-2:])), {"scene": images}
        y = operator(2 * images - 1)
        y = y + settings.noise * draw_noise(y.shape[1:], settings.seed, stream=2)
        for method in METHODS:
            each = [restore(method, model, operator, one, grid, settings.seed) for one in y.split(1)]
            rows[method] = torch.cat([image for image, _ in each])
            missed = float((operator(2 * rows[method] - 1) - y).square().mean().sqrt())
            row = score_images(to_levels(rows[method]), to_levels(images), distance)
            scores.setdefault(name, {})[method] = {**row, "measurement": missed, "calls": float(each[0][1])}
        if pictures is not None:
            write_image(pictures / f"{name.replace(' ', '-')}.png", image_grid([*rows.values()]))
    return GuidanceReport(model.name, settings, scores)


METHODS = ("pseudo-inverse", "DPS", "PiGDM", "RED-diff", "FlowChef")


def restore(
    method: str, model: DiffusionModel, operator: Operator, y: Tensor, grid: TimeGrid, seed: int
) -> tuple[Tensor, int]:
    """What a method of `METHODS` makes of one measurement: an image (1, 3, H, W) in [0, 1], and its network calls."""
    calls = 0

    def network(x: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        return model.predict(x, t, slice(0, 1))

    def encode(image: Tensor) -> Tensor:
        return model.encode((image + 1) / 2).clone()  # an encoder may run in inference mode

    def decode(z: Tensor) -> Tensor:
        return 2 * model.decode(z) - 1

    channels, height, width = encode(y.new_zeros(1, *operator.shape)).shape[1:]
    shape = (int(channels), int(height), int(width))
    latent = Operator(
        operator.name, shape, lambda z: operator(decode(z)), None, lambda m: encode(operator.pinv(m)), linear=False
    )
    noise = partial(draw_noise, shape, seed)
    follow = partial(
        guided,
        network,
        float(grid.sigma[0]) * noise(0),
        grid,
        prediction=model.prediction,
        noise=lambda i: noise(i + 1),
    )
    ways: dict[str, Callable[[], Tensor]] = {
        "pseudo-inverse": lambda: latent.pinv(y),
        "DPS": lambda: follow(dps(latent, y, weight=0.5), gradient=True, name=method),
        "PiGDM": lambda: follow(pigdm(latent, y), gradient=True, name=method),
        "RED-diff": lambda: red_diff(
            network, latent, y, grid, lambda i: (noise(0), noise(i + 1)), prediction=model.prediction
        )[1],
        "FlowChef": lambda: follow(flowchef_latent(through_decoder(operator, y, decode), rounds=2), name=method),
    }
    with torch.no_grad():
        return model.decode(ways[method]()).float().clamp(0, 1).cpu(), calls
