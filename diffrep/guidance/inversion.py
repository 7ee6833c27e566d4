"""From an image back to the noise it is sampled from: DDIM inversion, null-text inversion, BDIA, EDICT.

All run on the `TimeGrid` of a sampler; with leading spacing its last time lies before the first timestep of the table,
where a schedule is as clean as at timestep 0. Networks give noise. Numbers that mean nothing and steps that diverge are
a `SamplingError` in one line.

Sources: DDIM arXiv 2010.02502; null-text arXiv 2211.09794; EDICT arXiv 2211.12446; BDIA arXiv 2307.10829.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from diffrep.guidance.core import Network, check_finite, levels, move
from diffrep.sampling.schedules import SamplingError, TableVP, TimeGrid

Pair = tuple[Tensor, Tensor]
Step = Callable[[Pair, int], Pair]  # between the times i and i + 1 of a grid
Steps = tuple[Step, Step]  # up, from i + 1 to i, and down


def leading_grid(schedule: TableVP, steps: int, *, offset: int = 0, strength: float = 1.0) -> TimeGrid:
    """The sampler's times 0, 1000 // N, ..., falling, and one stride below the lowest, where abar is that of 0.

    Args:
        offset: added to all timesteps; diffusers' Stable Diffusion pipeline has 1.
        strength: share of the steps, counted from the clean end.
    """
    total = len(schedule.table)
    if not 1 <= steps <= total or not 0 < strength <= 1 or int(steps * strength) < 1:
        raise SamplingError(f"{steps} steps at strength {strength:g} leave no step of a schedule of {total}")
    stride = total // steps
    times = [offset + stride * i for i in range(int(steps * strength) - 1, -2, -1)]
    return TimeGrid.of(schedule, times)


# -- one step up and down, of a pair of states: all that the methods differ in ----------------------------------


def ddim(network: Network, grid: TimeGrid, *, label: Literal["target", "before"] = "target") -> Steps:
    """DDIM, whose inversion is not exact, the less the fewer the steps. A pair is a state and the one before it.

    Args:
        label: the timestep that the network is told on the way up: the one that the step leads to, as prompt-to-prompt
            and diffusers' inverse scheduler have it, or the one that it starts from, as Diffusion Hyperfeatures.
    """
    if label not in ("target", "before"):
        raise SamplingError(f"a network is told the target of a step up or the time before, got {label!r}")
    at, times = levels(grid), grid.times.tolist()

    def up(pair: Pair, i: int) -> Pair:
        noise = network(pair[0], times[i if label == "target" else i + 1])
        return move(pair[0], noise, at[i + 1], at[i]), pair[0]

    def down(pair: Pair, i: int) -> Pair:
        return move(pair[0], network(pair[0], times[i]), at[i], at[i + 1]), pair[0]

    return up, down


def bdia(network: Network, grid: TimeGrid, *, gamma: float = 0.94) -> Steps:
    """BDIA: exact, by the relation of three neighbouring states; one call a step. A pair is a state and the one before.

    Rounding errors grow like gamma^-steps: float64 and a gamma near 1. The way down begins with the pair that the way
    up ends with.
    """
    _share("gamma", gamma)
    at, times = levels(grid), grid.times.tolist()

    def up(pair: Pair, i: int) -> Pair:
        x, cleaner = pair
        if at[i + 1] == at[i]:  # below the table, as clean as at 0: the step changes nothing and needs no call
            return x, x
        noise = network(x, times[i + 1])
        above = move(x, noise, at[i + 1], at[i])
        if i + 1 == grid.steps:  # there is no third state: DDIM
            return above, x
        return (cleaner - move(x, noise, at[i + 1], at[i + 2])) / gamma + above, x

    def down(pair: Pair, i: int) -> Pair:
        if i == 0:
            return pair[1], pair[0]
        x, noisier = pair
        noise = network(x, times[i])
        above, below = (move(x, noise, at[i], at[j]) for j in (i - 1, i + 1))
        return below + gamma * (noisier - above), x

    return up, down


def edict(network: Network, grid: TimeGrid, *, mix: float = 0.93, leapfrog: bool = True) -> Steps:
    """EDICT: exact, by two states that take turns; two calls a step. A pair is both at one time.

    Args:
        mix: share of a state that stays when both are mixed.
        leapfrog: the states change roles from step to step.
    """
    _share("mix", mix)
    at, times = levels(grid), grid.times.tolist()

    def turn(pair: Pair, i: int, way: int, now: int, then: int) -> Pair:
        states = list(pair)
        for j in ((1, 0) if leapfrog and i % 2 else (0, 1))[::way]:
            states[j] = move(states[j], network(states[1 - j], times[i]), at[now], at[then])
        return states[0], states[1]

    def up(pair: Pair, i: int) -> Pair:
        y = (pair[1] - (1 - mix) * pair[0]) / mix
        return turn(((pair[0] - (1 - mix) * y) / mix, y), i, -1, i + 1, i)

    def down(pair: Pair, i: int) -> Pair:
        x, y = turn(pair, i, 1, i, i + 1)
        x = mix * x + (1 - mix) * y
        return x, mix * y + (1 - mix) * x

    return up, down


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise SamplingError(f"{name} must be in (0, 1], got {value}")


METHODS: dict[str, Callable[..., Steps]] = {"ddim": ddim, "bdia": bdia, "edict": edict}


@torch.no_grad()
def invert(network: Network, x: Tensor, grid: TimeGrid, method: str = "ddim", **options: Any) -> list[Pair]:
    """Up from a clean state to noise.

    Args:
        x: (B, ...).
        method: of `METHODS`.
        options: its own.

    Returns:
        The pairs from clean to noise, one more than steps.
    """
    (up, _), pairs = METHODS[method](network, grid, **options), [(x, x)]
    for i in reversed(range(grid.steps)):
        pairs.append(up(pairs[-1], i))
        check_finite(f"{method} inversion", pairs[-1][0], grid.steps - 1 - i, grid.steps)
    return pairs


@torch.no_grad()
def regenerate(
    network: Network,
    pair: Pair,
    grid: TimeGrid,
    method: str = "ddim",
    *,
    after_step: Callable[[int, Pair], Pair] | None = None,
    **options: Any,
) -> Pair:
    """Down again from the last pair of `invert`; the first of the result is clean.

    Args:
        after_step: changes the pair at time i + 1, after step i.
    """
    _, down = METHODS[method](network, grid, **options)
    for i in range(grid.steps):
        pair = down(pair, i)
        pair = pair if after_step is None else after_step(i, pair)
        check_finite(method, pair[0], i, grid.steps)
    return pair


def redraw(
    network: Network, pairs: list[Pair], grid: TimeGrid, method: str = "ddim", *, inside: Tensor | None = None
) -> Tensor:
    """The clean state at the end of a way down; what a mask does not select goes the known way.

    Args:
        pairs: the known way, noisiest first: of `invert`, or noised states (twice each).
        inside: like a state, in 0..1: what may change; everything where None.
    """

    def write(i: int, pair: Pair) -> Pair:
        if inside is None:
            return pair
        known = pairs[i + 1] if method == "edict" else (pairs[i + 1][0], pairs[i][0])
        return torch.lerp(known[0], pair[0], inside.to(pair[0])), torch.lerp(known[1], pair[1], inside.to(pair[1]))

    return regenerate(network, pairs[0], grid, method, after_step=write)[0]


def optimise_null(
    network: Callable[[Tensor, float, Tensor], Tensor],
    pivots: list[Tensor],
    grid: TimeGrid,
    condition: Tensor,
    null: Tensor,
    *,
    guidance: float = 7.5,
    rounds: int = 10,
    tolerance: float = 1e-5,
    report: Callable[[int, int, float], None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Null-text inversion: an unconditional embedding for every step, under which guided sampling stays on the way up.

    Args:
        network: from (state, timestep, embedding (B, tokens, C)) to noise; differentiable in the embedding.
        pivots: states of `invert` under the condition alone.
        condition, null: embeddings of the prompt and of the empty one.
        rounds: of Adam, at most, for each step.
        tolerance: of the mean squared distance; it grows by 2e-5 a step. Checked after an update, on the loss before.
        report: sees each step's number, rounds and last loss.

    Returns:
        The embeddings, noisiest step first, and the state that they lead to.

    Raises:
        SamplingError: more than 100 steps, or one that diverges.
    """
    if grid.steps > 100:
        raise SamplingError(f"null-text inversion's rate falls to 0 within 100 steps, got {grid.steps}")
    at, x, embeddings = levels(grid), pivots[-1], []
    for i in range(grid.steps):
        t, goal, used, last = float(grid.times[i]), pivots[-2 - i], 0, 0.0
        # of 100 whatever the number of steps: the released code was written for 50
        null = null.detach().clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=0.01 * (1 - i / 100))
        with torch.no_grad():
            towards = network(x, t, condition)
        while used < rounds and (not used or last >= tolerance + 2e-5 * i):
            with torch.enable_grad():
                away = network(x, t, null)
                loss = (move(x, away + guidance * (towards - away), at[i], at[i + 1]) - goal).square().mean()
            (null.grad,) = torch.autograd.grad(loss, null)
            adam.step()
            used, last = used + 1, float(loss.detach())
        if report is not None:
            report(i, used, last)
        embeddings.append(null.detach())
        with torch.no_grad():
            away = network(x, t, embeddings[-1])
            x = move(x, away + guidance * (towards - away), at[i], at[i + 1])
        check_finite("null-text inversion", x, i, grid.steps)
    return embeddings, x
