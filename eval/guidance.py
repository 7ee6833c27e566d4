"""``diffrep eval guidance``: posterior samplers on one model, through its decoder, on four measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffrep.backbones.diffusion import draw_noise, keyed_generator
from diffrep.eval.rendering import SceneMapSettings, render_job
from diffrep.eval.report import ScoreTables
from diffrep.eval.restoration import FeatureDistance, score_images, to_levels
from diffrep.files import number_of, write_image
from diffrep.guidance import operators
from diffrep.guidance.core import Guide, Network, guided
from diffrep.guidance.ensembles import afdps, karras_grid, reconstruct_volume
from diffrep.guidance.operators import Operator
from diffrep.guidance.posterior import (
    dps,
    flowchef,
    flowchef_latent,
    measured_start,
    pigdm,
    psld,
    red_diff,
    stsl,
    through_decoder,
)
from diffrep.painting import DiffusionModel
from diffrep.pictures import image_grid
from diffrep.sampling.core import to_forms
from diffrep.sampling.schedules import SamplingError, TableVP, TimeGrid, table_times
from diffrep.sampling.score_sde import ScoreSDE
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
    steps: int = 20  # the weights of the samplers were chosen at 20
    noise: float = 0.02  # standard deviation of the measurements' noise, of colours in -1..1
    seed: int = 0  # of all noise

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, steps="1..1000", noise=NOT_NEGATIVE, seed="[0, 2^31)")


DIGITS = {"psnr": 1, "ssim": 3, "distance": 3, "measurement": 3, "calls": 0}
"""The columns: decibels, SSIM, LPIPS-like distance, root mean square error of the measurement, calls of the network."""


def evaluate_guidance(
    model: DiffusionModel, settings: GuidanceEvaluation | None = None, pictures: Path | None = None
) -> ScoreTables:
    """Restore scenes from measurements; all methods work on the model's latents, through its decoder.

    Args:
        model: under one condition, or the same several times: as many states then pass the network together.
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
    distance, scores = FeatureDistance(), dict[str, dict[str, dict[str, list[float]]]]()
    for number, (name, build) in enumerate(MEASUREMENTS.items()):
        operator, rows = build((3, *images.shape[-2:])), {"scene": images}
        y = operator(2 * images - 1)
        y = y + settings.noise * draw_noise(y.shape[1:], settings.seed, stream=2)
        of = f"{number_of(len(images), 'scene')}, {number_of(settings.steps, 'step')}"
        table = scores[f"{model.name}, {name}: {of}"] = {}
        for method, (_, weights) in METHODS.items():
            parts, table[method] = [], {column: [] for column in DIGITS}
            for image, one in zip(images.split(1), y.split(1), strict=True):
                part, calls = restore(
                    method, model, operator, one, grid, weight=weights[number], seed=settings.seed, sigma=settings.noise
                )
                row = score_images(to_levels(part), to_levels(image), distance)
                row |= {"measurement": float((operator(2 * part - 1) - one).square().mean().sqrt()), "calls": calls}
                for column, values in table[method].items():
                    values.append(row[column])
                parts.append(part)
            rows[method] = torch.cat(parts)
        if pictures is not None:
            write_image(pictures / f"{name.replace(' ', '-')}.png", image_grid([*rows.values()], captions=[*rows]))
    return ScoreTables(settings, scores, DIGITS)


@dataclass(frozen=True)
class Task:
    """One measurement of one image, and what samplers need of the model: all work on its states, through its decoder.

    Attributes:
        network: of the model under its condition; every call counts.
        operator: of images (1, 3, H, W) in -1..1; latent: the same of states, which is not linear.
        noise: standard normal noise (1, c, h, w) of a number.
    """

    model: DiffusionModel
    network: Network
    operator: Operator
    latent: Operator
    y: Tensor
    grid: TimeGrid
    noise: Callable[[int], Tensor]
    sigma: float  # of the measurement's noise

    def encode(self, image: Tensor) -> Tensor:
        """States of images in -1..1."""
        return self.model.encode((image + 1) / 2).clone()  # an encoder may run in inference mode

    def decode(self, z: Tensor) -> Tensor:
        """Images in -1..1 of states, differentiable."""
        return 2 * self.model.decode(z) - 1

    def follow(self, guide: Guide, start: Tensor | None = None, *, gradient: bool = True) -> Tensor:
        """The loop of guides, from noise where nothing else is said."""
        start = float(self.grid.sigma[0]) * self.noise(0) if start is None else start
        return guided(
            self.network, start, self.grid, guide, prediction=self.model.prediction, gradient=gradient,
            noise=lambda i: self.noise(i + 1),
        )  # fmt: skip

    def exploding(self, x: Tensor, sigma: float) -> Tensor:
        """The clean states in `x0 + sigma n`, asked at the nearest time of the table."""
        schedule = self.model.schedule
        assert isinstance(schedule, TableVP)
        times = np.arange(len(schedule.table))
        t = float(np.abs(np.log(schedule.sigma(times) / schedule.alpha(times)) - math.log(sigma)).argmin())
        alpha, spread = float(schedule.alpha(t)), float(schedule.sigma(t))
        scaled = x * alpha
        return to_forms(self.model.prediction, self.network(scaled, t), scaled, alpha, spread)["data"]

    @property
    def sigmas(self) -> tuple[float, float]:
        """The largest and the smallest of the grid, as of an exploding SDE."""
        return float(self.grid.rho[0]), float(self.grid.rho[-2])

    def many(self, count: int, number: int, like: Tensor | None = None) -> Tensor:
        """Standard normal noise (count, ...) of states, or like another tensor's samples."""
        shape = tuple(self.noise(0).shape[1:] if like is None else like.shape[1:])
        return torch.cat([draw_noise(shape, 1000 * number + i, stream=3) for i in range(count)])


PARTICLES, SLICES = 4, 3


def follow_particles(task: Task, widening: float) -> Tensor:
    """AFDPS with the likelihood of the clean estimate; the heaviest of a few particles."""
    (high, low), log_weights = task.sigmas, torch.zeros(PARTICLES)
    guide = afdps(
        task.latent, task.y, log_weights, sigma_y=max(task.sigma, 1e-3), at="denoised", widening=widening,
        resample=lambda i, shares: torch.multinomial(shares, PARTICLES, True, generator=keyed_generator(0, i)),
        probe=lambda i: task.many(PARTICLES, i, task.y),
    )  # fmt: skip
    start, grid = high * task.many(PARTICLES, 0), karras_grid(task.grid.steps, low, high)
    x = guided(task.exploding, start, grid, guide, prediction="sample", noise=lambda i: task.many(PARTICLES, i + 1))
    return x[log_weights.argmax()][None]


def follow_slices(task: Task, rho: float) -> Tensor:
    """DiffusionMBIR of a stack of slices that all have the one measurement; the first of them."""
    high, low = task.sigmas
    sde = ScoreSDE("ve", sigma_min=low, sigma_max=high, steps=task.grid.steps)

    def score(x: Tensor, t: float) -> Tensor:
        sigma = float(sde.sigma(t))
        return (task.exploding(x, sigma) - x) / sigma**2

    draws = (task.many(SLICES, i + 1) for i in range(2 * sde.steps))
    y, start = task.y.expand(SLICES, *task.y.shape[1:]), high * task.many(SLICES, 0)
    return reconstruct_volume(sde, score, task.latent, y, start, draws, rho=rho, final_consistency=False)[:1]


METHODS: Mapping[str, tuple[Callable[[Task, float], Tensor], tuple[float, float, float, float]]] = {
    "pseudo-inverse": (lambda t, _: t.latent.pinv(t.y), (0, 0, 0, 0)),
    "DPS": (lambda t, w: t.follow(dps(t.latent, t.y, weight=w)), (0.5, 2, 0.5, 0.5)),
    "PiGDM": (lambda t, w: t.follow(pigdm(t.latent, t.y, weight=w)), (0.5, 1, 1, 1)),
    "PSLD": (
        lambda t, w: t.follow(psld(t.operator, t.y, t.decode, t.encode, weight=w, glue_weight=w / 10)),
        (2, 4, 1, 1),
    ),
    "STSL": (
        lambda t, w: t.follow(stsl(t.network, t.latent, t.y, lambda i: t.noise(1000 + i), weight=w)),
        (3, 6, 3, 3),
    ),
    "RED-diff": (
        lambda t, lr: t.follow(
            red_diff(t.latent, t.y, lambda i: (t.noise(0), t.noise(i)), lr=lr),
            measured_start(t.latent, t.y, t.grid, t.noise(0)), gradient=False,
        ),
        (0.1, 0.1, 0.1, 0.1),
    ),
    "FlowChef, pixels": (
        lambda t, s: t.follow(flowchef(t.latent, t.y, scale=s * t.y.numel() / 2), gradient=False),
        (0.02, 0.2, 0.02, 0.06),
    ),
    "FlowChef, latents": (
        lambda t, lr: t.follow(
            flowchef_latent(through_decoder(t.operator, t.y, t.decode), rounds=2, lr=lr), gradient=False
        ),
        (0.06, 0.06, 0.06, 0.06),
    ),
    f"AFDPS, {PARTICLES} particles": (follow_particles, (2, 2, 2, 2)),
    f"DiffusionMBIR, {SLICES} slices": (follow_slices, (1, 1, 1, 1)),
}  # fmt: skip
"""What a sampler makes of a task under a weight, as states; and its weights for `MEASUREMENTS`: the best in PSNR of two
to four, on two scenes of the training split at 20 steps. PiGDM's was tried on the box alone, those of AFDPS and
DiffusionMBIR on one scene of super-resolution."""


def restore(
    method: str,
    model: DiffusionModel,
    operator: Operator,
    y: Tensor,
    grid: TimeGrid,
    *,
    weight: float,
    seed: int = 0,
    sigma: float = 0.0,
) -> tuple[Tensor, int]:
    """What a method of `METHODS` makes of one measurement: an image (1, 3, H, W) in [0, 1], and its network calls.

    Args:
        weight: the method's: of the measurement's gradient; of RED-diff and FlowChef in latents Adam's rate; of AFDPS
            the widening; of DiffusionMBIR rho.
        sigma: standard deviation of the measurement's noise.

    Raises:
        SamplingError: naming the method where one diverges.
    """
    calls = 0

    def network(x: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += len(x)
        return torch.cat([model.predict(rows, t, slice(0, len(rows))) for rows in x.split(model.count)])

    def measure(z: Tensor) -> Tensor:
        return operator(2 * model.decode(z) - 1)

    def states(m: Tensor) -> Tensor:
        return model.encode((operator.pinv(m) + 1) / 2).clone()

    shape = torch.Size(states(y).shape[1:])
    latent = Operator(operator.name, (shape[0], shape[1], shape[2]), measure, None, states, linear=False)
    task = Task(model, network, operator, latent, y, grid, partial(draw_noise, shape, seed), sigma)
    with torch.no_grad():
        try:
            return model.decode(METHODS[method][0](task, weight)).float().clamp(0, 1).cpu(), calls
        except SamplingError as error:
            raise SamplingError(f"{method} on {operator.name}: {error}") from None
