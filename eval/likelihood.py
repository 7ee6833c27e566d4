"""How likely a diffusion model finds images: bits per dimension by the probability flow (Song et al. 2021)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffrep.backbones.diffusion import keyed_generator
from diffrep.files import number_of, printable
from diffrep.images import Sizing, fit_image, load_image
from diffrep.painting import DiffusionModel, diffusion_model
from diffrep.sampling.core import to_forms
from diffrep.sampling.flows import Field, Tolerance, divergence, integrate_with_density, probability_flow, solve_rk45
from diffrep.sampling.schedules import SamplingError, TableVP
from diffrep.sampling.score_sde import ScoreSDE
from diffrep.searched import as_candidate

FAR_OFF = 0.1  # bits per dimension, of given steps from adaptive ones
_log = logging.getLogger(__name__)


def normal_log_density(z: Tensor, deviation: float) -> Tensor:
    """(B,) log-density of states under a normal distribution around 0."""
    variance = deviation**2
    return -z[0].numel() / 2 * math.log(2 * math.pi * variance) - z.square().flatten(1).sum(1) / (2 * variance)


def likelihood(
    sde: ScoreSDE, score: Field, x: Tensor, probe: Tensor, *, tolerance: Tolerance = 1e-5, first: float = 1e-5,
    offset: float = 7.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Bits per dimension by the probability flow, with the Skilling-Hutchinson estimate of the divergence.

    Args:
        x: (B, ...) uniformly dequantised data as the network knows them.
        probe: like x, of -1 and 1.
        offset: bits that the scaling of the data adds: 7 for 8-bit images scaled to -1..1, 0 for a density as it is.

    Returns:
        (B,) bits per dimension, and the states at t = 1.
    """
    field = probability_flow(sde, score)
    z, change = solve_rk45(lambda y, t: divergence(field, y, t, probe), x, first, 1.0, tolerance, beside=len(x))
    density = normal_log_density(z, sde.sigma_max if sde.kind == "ve" else 1.0).double().cpu() + change
    return (-density / (x[0].numel() * math.log(2)) + offset).to(x.dtype), z


def model_likelihood(
    model: DiffusionModel, x: Tensor, probe: Tensor, *, tolerance: float = 1e-3, offset: float = 0.0,
    timesteps: Sequence[float] = (),
) -> Tensor:  # fmt: skip
    """(B,) bits per dimension of states under a model with a table of noise.

    In the half log-SNR l the flow of the rho-scaled state y = x / alpha is `dy / d rho = eps`, with rho = e^-l; its
    divergence is estimated with one probe. Fractional timesteps are asked between those of the table.

    Args:
        x: (B, ...) clean states, as the network knows them.
        probe: like x, of -1 and 1.
        tolerance: of the adaptive solver, relative and absolute.
        offset: bits that the scaling of the data adds, see `likelihood`.
        timesteps: where Heun's steps lie instead, those of a search for example; the ends are the table's.

    Raises:
        SamplingError: the model is a flow.
    """
    if not isinstance(model.schedule, TableVP):
        raise SamplingError(f"{model.name}: the likelihood is for models with a table of noise")
    schedule, dims = model.schedule, x[0].numel()
    lowest, highest = (-schedule.log_snr([0.0, schedule.first])).tolist()
    highest = min(highest, math.log(300.0))  # beyond, what is left of the data is below rounding

    def field(y: Tensor, log_rho: float) -> Tensor:
        t = float(schedule.time_of(-log_rho)[0])
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        state = alpha * y
        output = model.predict(state, t, slice(0, len(y)))
        return math.exp(log_rho) * to_forms(model.prediction, output, state, alpha, sigma)["noise"]

    alpha = float(schedule.alpha(0.0))
    if timesteps:
        between = sorted(v for v in (-schedule.log_snr(timesteps)).tolist() if lowest < v < highest)
        end, lost = integrate_with_density(field, x / alpha, [lowest, *between, highest], "heun2", probe)
        change = -lost.double().cpu()
    else:
        end, change = solve_rk45(
            lambda y, t: divergence(field, y, t, probe), x / alpha, lowest, highest, tolerance, beside=len(x)
        )
    # at the noisy end y is normal with a deviation of rho and a little of the data's own; their mean is neglected
    prior = normal_log_density(end, math.sqrt(math.exp(2 * highest) + 1))
    log_density = prior.double().cpu() + change - dims * math.log(alpha)
    return -log_density / (dims * math.log(2)) + offset


def image_likelihood(
    files: Sequence[str | os.PathLike[str]],
    backbone: str = "tiny",
    *,
    prompt: str = "",
    label: int | None = None,
    size: int | None = None,
    tolerance: float = 1e-3,
    probes: int = 1,
    seed: int = 0,
    timesteps: Sequence[float] | str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    skip: Callable[[str | os.PathLike[str], Exception], object] | None = None,
) -> Iterator[tuple[str | os.PathLike[str], float]]:
    """Files of images and how many bits per dimension a diffusion model needs for each.

    Args:
        backbone: a Stable Diffusion 1 or 2, or an ADM, by name, folder or file.
        prompt: of a Stable Diffusion.
        label: of a class-conditional ADM.
        size: side of the square that images are squashed to; that of the model's training where left out.
        probes: draws of the probe, whose mean is taken; they depend on the seed and on the image's number alone.
        timesteps: where Heun's steps lie in place of adaptive ones, or the file of a search for them. The first image
            is measured at adaptive ones too; where they are `FAR_OFF`, one line of the log says so.
        skip: called with a file that is no image, which is left out; None: that is an error.

    Raises:
        BackboneError: the model cannot be loaded, or takes no such condition.
        SamplingError: the model cannot be sampled, or the size does not fit it.
        ImageError: a file is no image.
    """
    searched = as_candidate(timesteps)
    if searched is not None and (searched.orders or searched.skipped):
        raise SamplingError(f"{timesteps}: has orders or skipped units, which a likelihood takes none of")
    if prompt and label is not None:
        raise SamplingError("a prompt and a label are conditions of two kinds of models: give one")
    condition = label if label is not None else prompt or None
    model = diffusion_model(backbone, condition, guidance=1.0, device=device, dtype=dtype)
    steps = () if searched is None else searched.for_model(model.name, model.facts).timesteps
    side = size or model.side
    if side % model.factor:
        raise SamplingError(f"{model.name}: the size must be a multiple of {model.factor}, got {side}")
    measured = not steps  # at adaptive steps too
    for number, file in enumerate(files):
        try:
            pixels, _ = fit_image(load_image(file), Sizing("squash", side))
        except (ValueError, OSError) as error:
            if skip is None:
                raise
            skip(file, error)
            continue
        state = model.encode(pixels[None].to(model.device))
        offset = 7.0 if model.factor == 1 else 0.0
        drawn = []
        for draw in range(probes):
            generator = keyed_generator(seed, number, stream=draw)
            probe = (2 * torch.randint(0, 2, tuple(state.shape), generator=generator) - 1).to(state)
            bits = model_likelihood(model, state, probe, tolerance=tolerance, offset=offset, timesteps=steps)
            drawn.append(float(bits[0]))
            if not measured:
                measured = True
                adaptive = float(model_likelihood(model, state, probe, tolerance=tolerance, offset=offset)[0])
                if abs(drawn[0] - adaptive) > FAR_OFF:
                    _log.warning(
                        "%s: %.2f bits per dimension at the %s given and %.2f at adaptive ones: too few to trust",
                        printable(file), drawn[0], number_of(len(steps), "step"), adaptive,
                    )  # fmt: skip
        yield file, sum(drawn) / probes
