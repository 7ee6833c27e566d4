"""From an image back to the noise it is sampled from: DDIM inversion, null-text inversion, BDIA, EDICT.

All run on the `TimeGrid` of a sampler with leading spacing, of which the last time lies before the first timestep of
the table; a schedule is as clean there as at timestep 0. Networks give noise. Numbers that
mean nothing and steps that diverge are a `SamplingError` in one line.

Sources: DDIM arXiv 2010.02502; null-text arXiv 2211.09794; EDICT arXiv 2211.12446; BDIA arXiv 2307.10829.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffrep.guidance.core import Network, check_finite, levels, move
from diffrep.sampling.schedules import SamplingError, TableVP, TimeGrid

Pair = tuple[Tensor, Tensor]


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


@torch.no_grad()
def invert_ddim(
    network: Network, x: Tensor, grid: TimeGrid, *, label: Literal["target", "before"] = "target"
) -> list[Tensor]:
    """DDIM inversion; not exact, the less the fewer the steps.

    Args:
        x: (B, ...) the clean state.
        label: the timestep that the network is told: the one that the step leads to, as prompt-to-prompt and diffusers'
            inverse scheduler have it, or the one that it starts from, as Diffusion Hyperfeatures.

    Returns:
        The states from clean to noise, one more than steps.
    """
    at, states = levels(grid), [x]
    for i in range(grid.steps - 1, -1, -1):
        noise = network(states[-1], float(grid.times[i if label == "target" else i + 1]))
        states.append(move(states[-1], noise, at[i + 1], at[i]))
        check_finite("DDIM inversion", states[-1], grid.steps - 1 - i, grid.steps)
    return states


@torch.no_grad()
def sample_ddim(network: Network, x: Tensor, grid: TimeGrid) -> Tensor:
    """Down again, step by step."""
    at = levels(grid)
    for i in range(grid.steps):
        x = move(x, network(x, float(grid.times[i])), at[i], at[i + 1])
    return x


# -- null-text inversion --------------------------------------------------------------------------------------


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
    """An unconditional embedding for every step, under which guided sampling stays on the inverted trajectory.

    Args:
        network: from (state, timestep, embedding (B, tokens, C)) to noise; differentiable in the embedding.
        pivots: of `invert_ddim` under the condition alone.
        condition, null: embeddings of the prompt and of the empty one.
        rounds: of Adam, at most, for each step.
        tolerance: of the mean squared distance; it grows by 2e-5 a step. Checked after an update, on the loss before.
        report: sees each step's number, rounds and last loss.

    Returns:
        The embeddings, noisiest step first, and the state that they lead to.
    """
    at, x, embeddings = levels(grid), pivots[-1], []
    for i in range(grid.steps):
        t, goal = float(grid.times[i]), pivots[-2 - i]
        # of 100 whatever the number of steps: the released code was written for 50
        null = null.detach().clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=0.01 * (1 - i / 100))
        with torch.no_grad():
            towards = network(x, t, condition)
        last = 0.0
        for used in range(1, rounds + 1):  # noqa: B007  # reported below
            with torch.enable_grad():
                away = network(x, t, null)
                loss = (move(x, away + guidance * (towards - away), at[i], at[i + 1]) - goal).square().mean()
            (null.grad,) = torch.autograd.grad(loss, null)
            adam.step()
            last = float(loss.detach())
            if last < tolerance + 2e-5 * i:
                break
        if report is not None:
            report(i, used, last)
        embeddings.append(null.detach())
        with torch.no_grad():
            away = network(x, t, embeddings[-1])
            x = move(x, away + guidance * (towards - away), at[i], at[i + 1])
        check_finite("null-text inversion", x, i, grid.steps)
    return embeddings, x


# -- exact inversion ------------------------------------------------------------------------------------------


@torch.no_grad()
def invert_bdia(network: Network, x: Tensor, grid: TimeGrid, *, gamma: float = 0.94) -> Pair:
    """BDIA: exact, by the relation of three neighbouring states; one call a step.

    Rounding errors grow like gamma^-steps: float64 and a gamma near 1.

    Returns:
        The states at the grid's first time and at the one below.
    """
    _share("gamma", gamma)
    # the step up from below the table leads to the same level of noise: it changes nothing and needs no call
    at, before, now = levels(grid), x, x
    for i in range(grid.steps - 1, 0, -1):
        noise = network(now, float(grid.times[i]))
        down, up = (move(now, noise, at[i], at[j]) for j in (i + 1, i - 1))
        before, now = now, (before - down) / gamma + up
        check_finite("BDIA", now, grid.steps - 1 - i, grid.steps)
    return now, before


@torch.no_grad()
def sample_bdia(network: Network, pair: Pair, grid: TimeGrid, *, gamma: float = 0.94) -> Pair:
    """Down again from the pair of `invert_bdia`.

    Returns:
        The clean state, and the one above.
    """
    _share("gamma", gamma)
    at, (above, now) = levels(grid), pair
    for i in range(1, grid.steps):
        noise = network(now, float(grid.times[i]))
        down, up = (move(now, noise, at[i], at[j]) for j in (i + 1, i - 1))
        above, now = now, down + gamma * (above - up)
        check_finite("BDIA", now, i, grid.steps)
    return now, above


@torch.no_grad()
def invert_edict(network: Network, pair: Pair, grid: TimeGrid, *, mix: float = 0.93, leapfrog: bool = True) -> Pair:
    """EDICT: exact, by two states that take turns; two calls a step.

    Args:
        pair: the clean state, two times.
        mix: share of a state that stays when both are mixed.
        leapfrog: the states change roles from step to step.
    """
    _share("mix", mix)
    at, states = levels(grid), list(pair)
    for i in range(grid.steps - 1, -1, -1):
        states[1] = (states[1] - (1 - mix) * states[0]) / mix
        states[0] = (states[0] - (1 - mix) * states[1]) / mix
        for j in reversed(_turns(i, leapfrog)):
            noise = network(states[1 - j], float(grid.times[i]))
            states[j] = move(states[j], noise, at[i + 1], at[i])
        check_finite("EDICT", states[0], grid.steps - 1 - i, grid.steps)
    return states[0], states[1]


@torch.no_grad()
def sample_edict(network: Network, pair: Pair, grid: TimeGrid, *, mix: float = 0.93, leapfrog: bool = True) -> Pair:
    """Down again from the pair of `invert_edict`."""
    _share("mix", mix)
    at, states = levels(grid), list(pair)
    for i in range(grid.steps):
        for j in _turns(i, leapfrog):
            noise = network(states[1 - j], float(grid.times[i]))
            states[j] = move(states[j], noise, at[i], at[i + 1])
        states[0] = mix * states[0] + (1 - mix) * states[1]
        states[1] = mix * states[1] + (1 - mix) * states[0]
        check_finite("EDICT", states[0], i, grid.steps)
    return states[0], states[1]


def _turns(step: int, leapfrog: bool) -> tuple[int, int]:
    """Which of the two states moves first."""
    return (1, 0) if leapfrog and step % 2 else (0, 1)


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise SamplingError(f"{name} must be in (0, 1], got {value}")
