"""Two conditions in one picture: SuperDiff's superposition, and COW's cycles around an unchanged object.

Steps that diverge and settings that do not go together are a `SamplingError` in one line.

Sources: SuperDiff arXiv 2412.17762, necludov/super-diffusion e3afac2; COW arXiv 2306.08247, wangruoyu02/COW 2943d2f.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.attention
from torch import Tensor

from diffrep.guidance.core import Network, ancestral, check_finite, levels, move
from diffrep.guidance.inversion import invert
from diffrep.sampling.core import over_sample
from diffrep.sampling.schedules import SamplingError, TimeGrid

Method = Literal["and", "or", "avg", "and_ode"]
Superposition = tuple[list[Tensor], list[Tensor]]
"""What SuperDiff leaves beside the states, before the first step and after each: the weights of the first condition
(B, ...), and two running estimates of log-densities (2, B, ...), of an arbitrary start of 1."""


def superpose(
    first: Network,
    second: Network,
    null: Network,
    x: Tensor,
    sigmas: Sequence[float],
    labels: Sequence[float],
    draws: Sequence[Tensor] | Callable[[int], Tensor],
    *,
    method: Method = "and",
    guidance: float = 7.5,
    lift: float = 0.0,
    temperature: float = 1.0,
    bias: float = 0.0,
    official: bool = False,
    sums: Callable[[Tensor], Tensor] = over_sample,
) -> tuple[Tensor, Superposition]:
    """Sample what two conditions of one model say of the same picture.

    Args:
        first, second, null: noise of a variance preserving network under either condition and under none.
        x: (B, ...) the first state `x0 + sigma n`.
        sigmas: sigma / alpha of the times, falling, one more than `labels`; the last is 0.
        labels: what the networks are called with.
        draws: for each step standard normal noise; for "and_ode" signs, -1 and 1.
        method: "and" holds both densities equal, "or" follows the denser, "avg" takes the mean; "and_ode" is "and"
            without noise.
        guidance: scale of classifier-free guidance.
        lift: "and": how much the first density gains over all steps.
        temperature, bias: "or": of the softmax of both densities, and added to the first.
        official: "or" with the wrong sign of the squared term in its densities, as released.
        sums: over what densities are compared, like x where it is broadcast: whole samples, or the surroundings of
            every place of a canvas.

    Returns:
        The last states, and weights and densities.

    Raises:
        SamplingError: another method, an option of another method, or a step diverges.
    """
    if method not in ("and", "or", "avg", "and_ode"):
        raise SamplingError(f"conditions are composed by and, or, avg or and_ode, got {method!r}")
    if (lift and method not in ("and", "and_ode")) or ((temperature, bias) != (1, 0) and method != "or"):
        raise SamplingError(f'lift is of "and", temperature and bias are of "or": not of {method!r}')
    log_a = log_b = torch.ones_like(sums(x))
    kappas, densities, steps = [log_a / 2], [torch.stack([log_a, log_b])], len(labels)
    for step, label in enumerate(labels):
        sigma, d = float(sigmas[step]), float(sigmas[step + 1] - sigmas[step])
        scale, draw = math.sqrt(sigma**2 + 1), draws(step) if callable(draws) else draws[step]
        with torch.no_grad():
            v_null = null(x / scale, label)
            if method == "and_ode":
                (v_a, div_a), (v_b, div_b) = (_with_divergence(n, x, scale, label, draw) for n in (first, second))
                div_a, div_b = -sums(draw * div_a), -sums(draw * div_b)
            else:
                v_a, v_b = (network(x / scale, label) for network in (first, second))
        between, lower = v_a - v_b, v_null + guidance * (v_b - v_null)
        apart = (guidance * sums(between.square())).clamp(min=1e-20)
        if method == "and_ode":
            kappa = sigma * (div_a - div_b) + sums(between * (v_a + v_b))
            kappa = (kappa + lift * sigma / (d * steps) - sums(between * lower)) / apart
            moved = lower + guidance * kappa * between
            dx = d * moved
            gains = [d * (div + sums(v * (v - moved)) / sigma) for div, v in ((div_a, v_a), (div_b, v_b))]
        else:
            shaken = math.sqrt(2 * abs(d) * sigma) * draw
            kappa = torch.full_like(log_a, 0.5)
            if method == "and":
                plain = 2 * d * lower + shaken
                kappa = abs(d) * sums((v_b - v_a) * (v_b + v_a)) - sums(plain * between) + sigma * lift / steps
                kappa = kappa / (2 * d * apart)
            elif method == "or":
                kappa = torch.sigmoid(temperature * (log_a + bias - log_b))
            dx = 2 * d * (lower + guidance * kappa * between) + shaken
            # Ito's formula; the released code's "or" adds the squared term instead of taking it off
            sign = 1 if official and method == "or" else -1
            gains = [(sign * abs(d) * sums(v.square()) - sums(dx * v)) / sigma for v in (v_a, v_b)]
        x, log_a, log_b = x + dx, log_a + gains[0], log_b + gains[1]
        check_finite("SuperDiff", x, step, steps)
        kappas.append(kappa)
        densities.append(torch.stack([log_a, log_b]))
    return x, (kappas, densities)


def _with_divergence(network: Network, x: Tensor, scale: float, label: float, probe: Tensor) -> tuple[Tensor, Tensor]:
    """A network's answer, and its derivative along a probe."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the only one with forward derivatives
        both: Any = torch.func.jvp(lambda v: network(v / scale, label), (x,), (probe,))
    return both[0], both[1]


# -- this object, unchanged, in that scene --------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Noise under COW's five conditions.

    Attributes:
        empty, prompt: of classifier-free guidance.
        negative: bad quality.
        suppress: what must not appear outside of the object: its kind.
        diverse: good quality.
    """

    empty: Network
    prompt: Network
    negative: Network
    suppress: Network
    diverse: Network

    def guided(self, x: Tensor, t: float, scale: float) -> Tensor:
        """Plain classifier-free guidance."""
        away = self.empty(x, t)
        return away + scale * (self.prompt(x, t) - away)

    def kept_apart(self, x: Tensor, t: float, scale: float, inside: Tensor) -> Tensor:
        """Guidance away from bad quality, and outside of the object away from its kind too."""
        away = self.negative(x, t)
        away = torch.where(inside > 0, away, away + self.suppress(x, t) - self.diverse(x, t))
        return away + scale * (self.prompt(x, t) - away)


@dataclass(frozen=True)
class Cycles:
    """What `cycle` leaves on its way: the object's saved states, noisiest first, and the canvas."""

    upper: list[Tensor]
    lower: list[Tensor]
    inverted: Tensor
    after_cycle: list[Tensor]
    result: Tensor


@torch.no_grad()
def cycle(
    prompts: Prompts,
    seed: Tensor,
    canvas: Tensor,
    mask: Tensor,
    corner: tuple[int, int],
    grid: TimeGrid,
    noise: Callable[[], Tensor],
    *,
    cycles: int = 10,
    guidance: float = 7.5,
    low: float = 0.5,
    high: float = 0.7,
    last: float = 0.4,
    eta: float = 0.1,
) -> Cycles:
    """COW: noise and denoise the canvas between two levels, and write the object's inverted states into it each time.

    Args:
        seed: (1, c, h, w) latent of the object.
        canvas: (1, c, H, W) latent of the canvas with the object pasted in.
        mask: like seed, 1 where the object is.
        corner: (row, column) of the object on the canvas.
        grid: see `diffrep.guidance.inversion.leading_grid`.
        noise: standard normal draws like canvas, one after the other.
        cycles: how many.
        low, high, last: shares of the steps: the lower and the upper level, and where the object is written at last.
        eta: of the last phase.
    """
    count = grid.steps
    bottom, top, final = int(low * count), int(high * count), int(last * count)
    row, column = corner
    height, width = seed.shape[-2:]
    if row < 0 or column < 0 or row + height > canvas.shape[-2] or column + width > canvas.shape[-1]:
        raise SamplingError(f"an object of {height} x {width} at row {row}, column {column} leaves the canvas")
    if not 0 <= final <= bottom <= top < count or not bottom:
        raise SamplingError(
            f"levels must rise, 0 <= last <= low <= high < 1, got {last:g}, {low:g}, {high:g} of {count} steps"
        )
    at, x = levels(grid), canvas
    area = (..., slice(row, row + height), slice(column, column + width))
    inside = torch.zeros_like(canvas)
    inside[area] = mask

    def towards(x: Tensor, t: float) -> Tensor:
        return prompts.guided(x, t, guidance)

    def up(x: Tensor, first: int, end: int) -> list[Tensor]:
        """States from one number of steps to another, noisiest first."""
        part = grid.taken([*range(count - end, count - first + 1)])
        return [state for state, _ in invert(towards, x, part)][::-1]

    def write(x: Tensor, state: Tensor) -> Tensor:
        x = x.clone()
        x[area] = torch.where(mask > 0, state, x[area])
        return x

    def denoise(x: Tensor, index: int, eta: float, predict: Network) -> Tensor:
        now, then = at[count - 1 - index], at[count - index]
        fresh, rest = ancestral(now, then, eta)
        predicted = predict(x, float(grid.times[count - 1 - index]))
        return move(x, predicted, now, (then[0], rest)) + fresh * noise()

    lower = up(seed, 0, bottom)
    upper = up(lower[0], bottom, top)
    x = inverted = up(canvas, 0, bottom)[0]
    # one level above those that the states lie at, as released
    ratio = (at[count - 1 - top][0] / at[count - 1 - bottom][0]) ** 2
    after = []
    for number in range(cycles):
        x = write(math.sqrt(ratio) * x + math.sqrt(1 - ratio) * noise(), upper[0])
        for index in range(top - 1, bottom - 1, -1):
            x = denoise(x, index, 1.0, lambda x, t: prompts.kept_apart(x, t, guidance, inside))
            x = write(x, upper[top - index])
        check_finite("COW", x, number, cycles)
        after.append(x)
    for index in range(bottom, -1, -1):
        x = denoise(x, index, eta, towards) if index < bottom else x
        x = write(x, lower[bottom - index]) if index == final else x
    check_finite("COW", x, cycles - 1, cycles)
    return Cycles(upper, lower, inverted, after, x)
