"""Patches that two embeddings describe together: SuperDiff on a synthesis model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffrep.guidance.composition import Method, Superposition, superpose
from diffrep.sampling.core import to_forms
from diffrep.sampling.samplers import model_schedule
from diffrep.sampling.schedules import SamplingError, TableVP
from diffrep.synthesis.model import SynthesisModel
from diffrep.synthesis.sampler import KeyedNoise


@torch.no_grad()
def compose_patches(
    model: SynthesisModel,
    first: Tensor,
    second: Tensor,
    *,
    method: Method = "avg",
    steps: int = 200,
    guidance: float | None = None,
    lift: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Superposition]:
    """Sample patches under two embeddings each.

    Args:
        first, second: (B, dim) raw.
        method: "avg" takes the mean of both predictions, "and" holds both densities equal, "or" follows the denser.
        steps: Euler steps; the densities are estimates that want many.
        guidance: the model's own where left out.
        lift: see `superpose`.

    Returns:
        (B, c, h, w) latents, scaled, for `SynthesisModel.decode`, and what the composition leaves beside them.

    Raises:
        SamplingError: the model is a flow, or a step diverges.
    """
    from diffusers import EulerDiscreteScheduler

    prediction, schedule = model_schedule(model.scheduler)
    if not isinstance(schedule, TableVP):
        raise SamplingError(f"{model.name}: conditions are composed on tables of noise, not on flows")
    scheduler: Any = EulerDiscreteScheduler.from_config(dict(model.scheduler), timestep_spacing="trailing")
    scheduler.set_timesteps(steps)

    def noise_under(context: Tensor) -> Callable[[Tensor, float], Tensor]:
        def noise(x: Tensor, t: float) -> Tensor:
            output = model(x.to(model.device, model.dtype), torch.tensor(t, device=model.device), context)
            return to_forms(prediction, output.to(x), x, float(schedule.alpha(t)), float(schedule.sigma(t)))["noise"]

        return noise

    contexts = [model.context(e.to(model.device, model.dtype)) for e in (first, second)]
    draws, lines = KeyedNoise(seed), range(len(first))
    shape = (model.channels, model.window, model.window)

    def draw(step: int) -> Tensor:
        z = torch.stack([torch.randn(*shape, generator=g) for g in draws.arguments(step, lines)["generator"]])
        return z.sign() if method == "and_ode" else z

    return superpose(
        noise_under(contexts[0]), noise_under(contexts[1]), noise_under(model.null_context(len(first))),
        draws.start(lines, shape) * float(scheduler.init_noise_sigma), scheduler.sigmas.tolist(),
        scheduler.timesteps.tolist(), draw, method=method, lift=lift,
        guidance=model.about.guidance if guidance is None else guidance,
    )  # fmt: skip
