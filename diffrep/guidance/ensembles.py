"""Many states at once: weighted particles with resampling (AFDPS), and stacks of slices (DiffusionMBIR).

A step that diverges, and why, is a `SamplingError` in one line.

Sources: AFDPS arXiv 2506.03979, the formula also in erichou1/AFDPS fb6a503; DiffusionMBIR arXiv 2211.10655,
HJ-harry/DiffusionMBIR 592ea29.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from diffrep.guidance.core import Between, Guide, check_finite, squares
from diffrep.guidance.operators import Operator
from diffrep.sampling.schedules import Exploding, SamplingError, TimeGrid, power_spaced
from diffrep.sampling.score_sde import ScoreSDE, correct, predict

Draw = Callable[[int, Tensor], Tensor]  # (number, probabilities (P,)) -> (P,) indices


def karras_grid(steps: int, sigma_min: float, sigma_max: float) -> TimeGrid:
    """`steps` sigmas of Karras et al. (power 7), falling, then 0."""
    return TimeGrid.of(Exploding(), [*power_spaced(sigma_max, sigma_min, steps, 7.0), 0.0])


def afdps(
    operator: Operator,
    y: Tensor,
    log_weights: Tensor,
    *,
    sigma_y: float,
    at: Literal["noisy", "denoised"] = "noisy",
    widening: float = 0.0,
    resample: Draw | None = None,
    threshold: float = 0.5,
    probe: Callable[[int], Tensor] | None = None,
) -> Guide:
    """AFDPS: particles along the reverse SDE of p_t exp(-|A x - y|^2 / 2 sigma_y^2), with Feynman-Kac weights.

    Exact in the limit of many particles and steps; no image estimate stands in for the state. The loop's states are the
    particles (P, ...), its grid is `karras_grid`, and it needs noise.

    Args:
        log_weights: (P,) zeros; after each step the particles' log-weights with the maximum 0.
        sigma_y: standard deviation of the measurement's noise.
        at: "denoised" measures the clean estimate instead; no longer exact, and steps may be longer.
        widening: gamma of the variance sigma_y^2 + (gamma sigma)^2 that the measurement is counted with; exact at 0.
        resample: draws the particles that go on; None: never, and a few take all weight.
        threshold: share of effective particles below which they are drawn anew.
        probe: of operators that are not linear: standard normal noise of each step, like the measurements of all
            particles, by which the trace of J^T J is estimated (Hutchinson).
    """
    if at not in ("noisy", "denoised"):
        raise SamplingError(f"particles are measured noisy or denoised, got {at!r}")
    if not sigma_y > 0:
        raise SamplingError(f"particles are weighed by the measurement's noise: sigma_y must be above 0, got {sigma_y}")
    operator.check(y)
    trace, drawn = operator.trace() if probe is None else 0.0, 0

    def guide(between: Between) -> Tensor:
        nonlocal drawn
        x, clean, t = between.x, between.forms()["data"], between.now[1]
        h = t - between.then[1]
        variance = sigma_y**2 + (widening * t) ** 2
        measured, pull, _ = operator.at(clean if at == "denoised" else x)
        gradient = pull(measured - y) / variance
        energy = trace if probe is None else squares(pull(probe(between.step)))
        drift = 2 / t * ((x - clean) * gradient).flatten(1).sum(1)
        log_weights.add_(h * (t * (squares(gradient) - energy / variance) + drift))
        log_weights.sub_(log_weights.max())
        assert between.z is not None
        x = x - 2 * h / t * (x - clean) - 2 * h * t * gradient + math.sqrt(2 * h * t) * between.z
        stiff = 2 * t * h / variance
        why = f": 2 t h / sigma_y^2 is {stiff:.3g} there, and must be below 2; more steps, or a larger sigma_y"
        check_finite("AFDPS", x, between.step, between.steps, why if stiff >= 2 else "")
        shares = log_weights.softmax(0)
        if resample and not between.last and float(1 / (len(x) * shares.square().sum())) < threshold:
            x, drawn = x[resample(drawn, shares)], drawn + 1
            log_weights.zero_()
        return x

    return guide


@torch.no_grad()
def reconstruct_volume(
    sde: ScoreSDE,
    score: Callable[[Tensor, float], Tensor],
    operator: Operator,
    y: Tensor,
    x: Tensor,
    noise: Iterator[Tensor],
    *,
    snr: float = 0.16,
    rho: float = 10.0,
    smoothness: float = 0.04,
    final_consistency: bool = True,
    chunk: int = 12,
    batch_mean: bool = True,
) -> Tensor:
    """DiffusionMBIR: a prior of slices, and total variation between them by one iteration of ADMM a step.

    An operator that is not linear is linearised in each step at the slices as they are.

    Args:
        sde: variance exploding, of the prior.
        score: of slices (B, C, H, W) and a time.
        y: (S, ...) measurements of the slices.
        x: (S, C, H, W) the first state, `sigma_max` times standard normal noise.
        noise: draws like x: of each step the predictor's, then the corrector's.
        rho, smoothness: of ADMM, and the weight of total variation.
        final_consistency: end with a step to the measurement (of linear operators).
        chunk: slices are worked off in `S // chunk + 1` parts.
        batch_mean: the corrector's step size is that of a part, as released: a slice depends on its company.
    """
    if sde.kind != "ve":
        raise SamplingError(f"volumes are reconstructed with a variance exploding SDE, got {sde.kind}")
    operator.check(y)
    parts = len(x) // chunk + 1
    split, dual = torch.zeros_like(x), torch.zeros_like(x)

    def across(v: Tensor, way: int = -1) -> Tensor:  # and its adjoint, the other way
        return v.roll(way, 0) - v

    for step, t in enumerate(torch.linspace(1, 1e-10, sde.steps).tolist()):
        draws = [next(noise).chunk(parts) for _ in range(2)]
        moved = []
        for piece, first, second in zip(x.chunk(parts), *draws, strict=True):
            piece = predict(sde, score, piece, t, first, "reverse_diffusion")[0]
            moved.append(correct(sde, score, piece, t, second, "langevin", snr, batch_mean=batch_mean))
        x = torch.cat(moved)
        measured, pull, push = operator.at(x)
        residual = pull(y - measured) + rho * across(split - dual - across(x), 1)
        normal = pull(push(residual)) + rho * across(across(residual), 1)
        length = residual.square().sum() / (residual * normal).sum().clamp(min=1e-30)
        x = x + length * residual
        jumps = across(x) + dual
        split = jumps.sign() * (jumps.abs() - smoothness / rho).clamp(min=0)
        dual = jumps - split
        check_finite("DiffusionMBIR", x, step, sde.steps)
    if final_consistency:
        x = x + operator.adjoint(y - operator(x)) / operator.adjoint(operator(torch.ones_like(x))).clamp(min=1e-12)
    return x
