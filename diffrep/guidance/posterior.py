"""Posterior samplers: images that agree with a measurement, as guides between the steps of a diffusion.

Each is what its authors' code computes: a function that makes a `Guide` of an operator A and a measurement y; x0 is the
clean sample that the network predicts. Images are in -1..1. Measurements of another size or not finite, and steps that
diverge, are a `SamplingError` in one line.

Sources: DPS arXiv 2209.14687, PiGDM and RED-diff in NVlabs/RED-diff 66482f2 (arXiv 2305.04391), PSLD arXiv 2307.00619,
STSL arXiv 2312.00852, FlowChef arXiv 2412.00100.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffrep.guidance.core import Between, Guide, Network, squares
from diffrep.guidance.operators import Operator
from diffrep.sampling.core import per_sample, to_forms
from diffrep.sampling.schedules import SamplingError, TableVP, TimeGrid

Decoder = Callable[[Tensor], Tensor]


def spaced_grid(schedule: TableVP, steps: int) -> TimeGrid:
    """Times 0, k, 2k, ... with k = 1000 // steps, falling, and a clean end (RED-diff); may be more than `steps`."""
    total = len(schedule.table)
    if not 1 <= steps <= total:
        raise SamplingError(f"steps must be in 1..{total}, got {steps}")
    return TimeGrid.of(schedule, [*range(0, total, total // steps)][::-1] + [-1]).ending()


def measured_start(operator: Operator, y: Tensor, grid: TimeGrid, z: Tensor, around: Tensor | float = 0.0) -> Tensor:
    """The first state of RED-diff, and of PiGDM and DPS in its code: the pseudo-inverse under noise.

    DPS as its own authors run it begins with noise alone.

    Args:
        z: standard normal noise, like the states.
        around: what is added to the pseudo-inverse: RED-diff's draw from a posterior that has a spread.
    """
    return float(grid.alpha[0]) * (operator.pinv(y) + around) + float(grid.sigma[0]) * z


# -- gradients through the network ----------------------------------------------------------------------------


def _slope(between: Between, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient in the state of a loss of x0, and the loss."""
    with torch.enable_grad():
        value = loss(between.forms()["data"])
        return torch.autograd.grad(value.sum(), between.x, retain_graph=True)[0], value.detach()


def dps(operator: Operator, y: Tensor, *, weight: float = 1.0, eta: float = 1.0, normalised: bool = True) -> Guide:
    """DPS: against the gradient of |y - A x0|^2, divided by the norm itself.

    Args:
        weight: of the gradient, .1 (inpainting) to 1 (super-resolution); two times the step of the original DPS.
        eta: of DDIM's noise.
        normalised: divide by the norm per sample; without, times the product of both alphas.
    """
    operator.check(y)

    def guide(between: Between) -> Tensor:
        gradient, missed = _slope(between, lambda data: squares(y - operator(data)))
        norms = missed.sqrt().clamp(min=1e-12)
        factor = 1 / norms if normalised else torch.full_like(norms, between.now[0] * between.then[0])
        return between.ahead(eta=eta) - weight * per_sample(factor, gradient) * gradient

    return guide


def pigdm(
    operator: Operator,
    y: Tensor,
    *,
    weight: float = 1.0,
    eta: float = 1.0,
    keep: Tensor | None = None,
    contrast: float = 0.0,
) -> Guide:
    """PiGDM, of a measurement without noise: along the transposed Jacobian of what the pseudo-inverse misses.

    Args:
        weight: of the gradient.
        keep: mask of pixels that are seen: they are copied instead of guided (inpainting).
        contrast: weight of the standard deviation of each x0, which the gradient raises; 1500 for HDR.
    """
    operator.check(y)
    start = operator.pinv(y)

    def guide(between: Between) -> Tensor:
        data = between.forms()["data"]
        missed = start - operator.pinv(operator(data.detach()))

        def aim(data: Tensor) -> Tensor:
            along = (missed * data).sum()
            return along + contrast * data.flatten(1).std(1).sum() if contrast else along

        gradient, _ = _slope(between, aim)
        factor = weight * between.now[0] * between.then[0]
        if keep is not None:
            seen = keep.to(data)
            data, gradient = seen * y + (1 - seen) * data, (1 - seen) * gradient
        return between.ahead(data=data, eta=eta) + factor * gradient

    return guide


def psld(
    operator: Operator,
    y: Tensor,
    decode: Decoder,
    encode: Decoder,
    *,
    glue_weight: float = 0.1,
    weight: float = 1.0,
) -> Guide:
    """PSLD: DPS in latent space, and against the distance of a latent from that of the image glued to the measurement.

    Args:
        decode, encode: between latents and images in -1..1; differentiable.
        glue_weight: gamma of the paper; of the second distance.
        weight: omega; of the first.
    """
    operator.check(y)

    def loss(data: Tensor) -> Tensor:
        image = decode(data)
        glued = operator.adjoint(y) + image - operator.adjoint(operator(image))
        return glue_weight * squares(encode(glued) - data).sqrt() + weight * squares(operator(image) - y).sqrt()

    return lambda between: between.ahead() - _slope(between, loss)[0]


def stsl(
    network: Network,
    operator: Operator,
    y: Tensor,
    probe: Callable[[int], Tensor],
    *,
    weight: float = 1.0,
    curvature: float = 1.0,
) -> Guide:
    """STSL as third parties read it, two calls a step: against |y - A x0| and the change of the score along a probe.

    The authors have published no code: the form of the second term is that of a public reading for pixels, and both
    weights are free. The step is that of DDPM, from the moved state and the x0 that was predicted before.

    Args:
        probe: standard normal noise of each step, like the state.
        weight: lambda; of the norm.
        curvature: nu; of the probe's trace of the Hessian, divided by the number of a state's values.
    """
    operator.check(y)

    def guide(between: Between) -> Tensor:
        z = probe(between.step).to(between.x)
        with torch.enable_grad():
            output = network(between.x + z, between.label)
            noises = to_forms(between.prediction, output, between.x + z, *between.now), between.forms()
            turned = (z * (noises[1]["noise"] - noises[0]["noise"])).sum() / between.now[1]
            missed = squares(y - operator(noises[1]["data"])).sqrt().sum()
            loss = weight * missed + curvature / z[0].numel() * turned
            (gradient,) = torch.autograd.grad(loss, between.x)
        data = noises[1]["data"].detach()
        return between.ahead(between.x.detach() - gradient, data=data, eta=1.0)

    return guide


# -- gradients that skip the network --------------------------------------------------------------------------


def flowchef(
    operator: Operator, y: Tensor, *, scale: float = 100.0, mask: Tensor | None = None, mean: bool = True
) -> Guide:
    """FlowChef on pixels: against the gradient of the loss in x0, as if x0 moved as the state does.

    Args:
        scale: of the gradient of a mean over all of y; 500 in the released scripts for 64 x 64.
        mask: of y, what counts.
        mean: without, the measured difference itself times `scale` is taken off, where y is as large as x.
    """
    operator.check(y)

    def guide(between: Between) -> Tensor:
        if between.last:
            return between.ahead()
        measured, pull, _ = operator.at(between.forms()["data"])
        difference = measured - y
        if not mean:
            return between.ahead() - scale * difference
        counted = difference if mask is None else mask * difference
        return between.ahead() - 2 * scale / y.numel() * pull(counted)

    return guide


def flowchef_latent(
    loss: Callable[[Tensor], Tensor], *, lr: float = 0.02, rounds: int = 1, until: int | None = None
) -> Guide:
    """FlowChef in latents: each step moves the state by a new Adam, the velocity fixed.

    A new Adam's first step has the length `lr` wherever the gradient is far above 1e-8: it is the sign that counts.

    Args:
        loss: of a clean latent, differentiable: `latent_inpainting` or `through_decoder`.
        rounds: of Adam in each step.
        until: number of the last step that is guided; None: all.
    """

    def guide(between: Between) -> Tensor:
        if until is not None and between.step > until:
            return between.ahead()
        moved = optimise(lambda x: loss(between.forms(x)["data"]), between.x, lr=lr, rounds=rounds)
        return between.ahead(moved)

    return guide


def optimise(loss: Callable[[Tensor], Tensor], x: Tensor, *, lr: float, rounds: int) -> Tensor:
    """A state after some steps of a new Adam."""
    leaf = x.detach().clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=lr)
    for _ in range(rounds):
        with torch.enable_grad():
            (leaf.grad,) = torch.autograd.grad(loss(leaf), leaf)
        adam.step()
    return leaf.detach()


def latent_inpainting(goal: Tensor, mask: Tensor, factor: float = 0.001) -> Callable[[Tensor], Tensor]:
    """The loss of FlowChef's inpainting and editing: distance from a latent where the mask is 1.

    Args:
        factor: matters against Adam's 1e-8.
    """
    return lambda data: (factor * (data - goal).square() * mask).mean()


def through_decoder(operator: Operator, y: Tensor, decode: Decoder) -> Callable[[Tensor], Tensor]:
    """The loss of FlowChef's other tasks: the measurement of the decoded latent."""
    operator.check(y)
    return lambda data: 1000 * (operator(decode(data)) - y).square().mean()


# -- the image itself as the unknown --------------------------------------------------------------------------

WEIGHTINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda r: r,
    "sqrt": lambda r: r**0.5,
    "square": lambda r: r**2,
    "log": math.log1p,
    "trunc": lambda r: min(r, 1.0),
    "power2over3": lambda r: r ** (2 / 3),
    "const": lambda r: 1.0,
}


def red_diff(
    operator: Operator,
    y: Tensor,
    noise: Callable[[int], tuple[Tensor, Tensor]],
    *,
    lr: float = 0.1,
    prior: float = 0.25,
    weighting: str = "linear",
    data_weight: float = 1.0,
    spread: float = 0.0,
) -> Guide:
    """RED-diff: the mean of a narrow posterior by Adam, drawn to what the network makes of it under noise.

    No gradient runs through the network; one call a step. What the network sees is the mean under fresh noise: the loop
    begins with `measured_start`, under the first draws, and ends with the mean after the last update.

    Args:
        noise: of each step two draws, of the posterior's spread and of the diffusion.
        prior: lambda, the weight of the network.
        weighting: of noise to signal, a name of `WEIGHTINGS`.
        data_weight: of the measurement. Both terms are means, over different sizes: the balance shifts with A.
        spread: standard deviation of the posterior.
    """
    if weighting not in WEIGHTINGS:
        raise SamplingError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    mu = operator.pinv(operator.check(y)).detach().clone().requires_grad_()
    adam = torch.optim.Adam([mu], lr=lr, betas=(0.9, 0.99))

    def guide(between: Between) -> Tensor:
        ratio, (around, z) = between.now[1] / between.now[0], noise(between.step)
        missed = between.forms()["noise"] - z
        with torch.enable_grad():
            current = mu + spread * around
            loss = prior * WEIGHTINGS[weighting](ratio) * (missed * current).mean()
            loss = loss + data_weight * (y - operator(current)).square().mean() / 2
            (mu.grad,) = torch.autograd.grad(loss, mu)
        adam.step()
        if between.last:
            return mu.detach()
        around, z = noise(between.step + 1)
        return between.then[0] * (mu.detach() + spread * around) + between.then[1] * z

    return guide
