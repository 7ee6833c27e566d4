"""Stochastic interpolants (Albergo et al. 2023) and SiT (Ma et al. 2024): paths, and what networks are trained to give.

A trained drift, with a score for noise of any strength, is sampled by `diffrep.sampling.flows`. Times are (B,), one for
each sample, or a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling.core import per_sample
from diffrep.sampling.flows import Transport
from diffrep.sampling.schedules import SamplingError, slope

Curve = Callable[[Any], Any]  # of a real or complex number or array, in numpy's functions
Field = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> like x


@dataclass(frozen=True)
class Path:
    """An interpolant `x_t = a(t) x0 + b(t) x1 + gamma(t) z` from noise or other data x0 to data x1.

    Attributes:
        x0, x1: a and b.
        variance: gamma^2, of the latent noise in the middle; None: one-sided, x0 is the noise.
    """

    x0: Curve
    x1: Curve
    variance: Curve | None = None

    def gamma(self, t: Any) -> Any:
        """Factor of the latent noise; of one-sided paths that of x0."""
        return self.x0(t) if self.variance is None else np.sqrt(self.variance(t))

    def gamma_slope(self, t: Any) -> Any:
        """gamma times its derivative, finite at the ends where the derivative is not."""
        return slope(lambda u: self.x0(u) ** 2 / 2 if self.variance is None else self.variance(u) / 2, t)


def _logistic(t: Any) -> Any:
    return 1 / (1 + np.exp(-t))


GAMMA_SQUARED: dict[str, Curve] = {
    "brownian": lambda t: t * (1 - t),
    "bsquared": lambda t: (t * (1 - t)) ** 2,
    "sinesquared": lambda t: np.sin(math.pi * t) ** 4,
    "sigmoid": lambda t: (_logistic(10 * t - 4) - _logistic(10 * t - 6) - _logistic(-4.0) + _logistic(-6.0)) ** 2,
}
PATHS: dict[str, Callable[[Curve], tuple[Curve, Curve]]] = {  # of the curve of gamma^2, 0 where there is none
    "linear": lambda g: (lambda t: 1 - t, lambda t: t),
    "trig": lambda g: (
        lambda t: np.sqrt(1 - g(t)) * np.cos(math.pi / 2 * t), lambda t: np.sqrt(1 - g(t)) * np.sin(math.pi / 2 * t)
    ),
    "encoding-decoding": lambda g: (
        lambda t: np.where(np.real(t) > 0.5, 0, np.cos(math.pi * t) ** 2),
        lambda t: np.where(np.real(t) > 0.5, np.cos(math.pi * t) ** 2, 0),
    ),
    "mirror": lambda g: (lambda t: np.sqrt(g(t)), lambda t: 1 + 0 * t),  # data alone, with x0 as the noise
}  # fmt: skip


def interpolant(path: str, gamma: str | None = None) -> Path:
    """An interpolant by its names in the paper.

    Args:
        path: of `PATHS`; or "one-sided-linear", "one-sided-trig".
        gamma: a name of `GAMMA_SQUARED`; None for one-sided paths.

    Raises:
        SamplingError: no such path or gamma, or they do not go together.
    """
    name, one_sided = path.removeprefix("one-sided-"), path in ("one-sided-linear", "one-sided-trig")
    if (path not in PATHS and not one_sided) or (gamma is not None and gamma not in GAMMA_SQUARED):
        known = f"{', '.join(PATHS)}, one-sided-linear and one-sided-trig with gamma {', '.join(GAMMA_SQUARED)}"
        raise SamplingError(f"paths are {known}: got {path}, {gamma}")
    if one_sided != (gamma is None):
        raise SamplingError(f"path {path} {'has no gamma' if gamma else 'needs a gamma'}")
    squared = None if gamma is None else GAMMA_SQUARED[gamma]
    return Path(*PATHS[name](squared or (lambda t: 0 * t)), None if name == "mirror" else squared)


def factor(curve: Curve, t: Tensor, x: Tensor) -> Tensor:
    """A curve's values at (B,) times, to multiply a batch like x with."""
    return per_sample(torch.as_tensor(curve(t.detach().double().cpu().numpy())).to(x), x)


def between(path: Path, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """`a x0 + b x1` and `a' x0 + b' x1`, like x0: the state without latent noise, and its velocity."""
    state, velocity = (
        factor(a, t, x0) * x0 + factor(b, t, x1) * x1
        for a, b in ((path.x0, path.x1), (lambda u: slope(path.x0, u), lambda u: slope(path.x1, u)))
    )
    return state, velocity


def interpolant_loss(
    kind: Literal["b", "s", "eta", "v"], path: Path, field: Field, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor
) -> Tensor:
    """(B,) loss of a field per sample, up to a constant.

    Args:
        kind: "b" (drift) and "s" (score) sum both signs of z; "eta" is the score times gamma, "v" the drift without z.
        t: a scalar, or (B,).
        z: latent noise; of one-sided paths x0 takes its place, with both signs for "s" alone.
    """

    def inner(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).flatten(1).sum(1)

    (middle, velocity), gamma, one_sided = between(path, t, x0, x1), factor(path.gamma, t, x0), path.variance is None
    noise = x0 if one_sided else z

    def at(sign: float) -> Tensor:
        if one_sided:
            return middle if sign > 0 else middle - 2 * gamma * x0
        return middle + sign * gamma * z

    if kind in ("eta", "v"):
        value = field(at(1.0), t)
        return inner(value, value) / 2 + (inner(value, noise) if kind == "eta" else -inner(value, velocity))
    total = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    for sign in (1.0,) if one_sided and kind == "b" else (1.0, -1.0):
        value = field(at(sign), t)
        if kind == "s":
            aim = -sign * noise / gamma
        else:
            aim = velocity if one_sided else velocity + sign * factor(path.gamma_slope, t, x0) / gamma * z
        total = total + inner(value, value) / 2 - inner(aim, value)
    return total


def transport_loss(
    transport: Transport, output: Tensor, x: Tensor, t: Tensor, noise: Tensor, velocity: Tensor, weight: str | None
) -> Tensor:
    """(B,) SiT's loss of an output at a state of `between`, the mean over a sample.

    Args:
        weight: None, "velocity" or "likelihood"; networks of the velocity have no weight.
    """
    if transport.prediction == "velocity":
        return (output - velocity).square().flatten(1).mean(1)
    sigma, half = factor(transport.sigma, t, x), factor(lambda u: transport.rates(u)[1], t, x)
    factors = {None: torch.ones_like(half), "velocity": (half / sigma) ** 2, "likelihood": half / sigma**2}
    error = output - noise if transport.prediction == "noise" else output * sigma + noise
    return (factors[weight] * error.square()).flatten(1).mean(1)
