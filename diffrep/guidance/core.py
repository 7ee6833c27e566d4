"""The loop of a deterministic or ancestral DDIM sampler with something done between prediction and step.

A guide is a function: it is told all that is known between the network's answer and the next state, and returns the
next state. What it remembers from step to step is its own affair. Whether gradients run through the network is said to
the loop; a guide differentiates what it wants, `torch.autograd.grad(loss, between.x)`, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrep.sampling.core import Form, to_forms
from diffrep.sampling.schedules import SamplingError, TimeGrid

Network = Callable[[Tensor, float], Tensor]  # (state, label of the time) -> prediction
Level = tuple[float, float]  # alpha and sigma


def levels(grid: TimeGrid) -> list[Level]:
    """Those of a grid's times."""
    return [*zip(grid.alpha.tolist(), grid.sigma.tolist(), strict=True)]


def move(x: Tensor, noise: Tensor, now: Level, then: Level) -> Tensor:
    """The DDIM step of a state from one level to any other, up or down: denoising and inversion alike."""
    return then[0] * (x - now[1] * noise) / now[0] + then[1] * noise


def ancestral(now: Level, then: Level, eta: float) -> Level:
    """DDIM's fresh noise of a step, and what is left of the predicted noise (arXiv 2010.02502, eq. 12 and 16)."""
    variance = eta**2 * (1 - (now[0] / then[0]) ** 2) * (then[1] / now[1]) ** 2
    return math.sqrt(max(variance, 0.0)), math.sqrt(max(then[1] ** 2 - variance, 0.0))


@dataclass(frozen=True)
class Between:
    """What a guide is told.

    Attributes:
        step: its number, from 0, of `steps`.
        label: what the network was called with.
        now, then: levels of the state and of the next.
        x: the state that the network saw; a leaf with gradient where the loop was asked for that.
        output: what the network answered; `prediction` says what it is.
        z: standard normal noise of this step, or None.
    """

    step: int
    steps: int
    label: float
    now: Level
    then: Level
    prediction: str
    x: Tensor
    output: Tensor
    z: Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether this is the last step."""
        return self.step == self.steps - 1

    def forms(self, x: Tensor | None = None) -> dict[Form, Tensor]:
        """Noise and clean sample that the output says of the state, or of another state with the same output."""
        return to_forms(self.prediction, self.output, self.x if x is None else x, *self.now)

    def ahead(self, x: Tensor | None = None, *, data: Tensor | None = None, eta: float = 0.0) -> Tensor:
        """The next state without guidance.

        Args:
            x: a moved state to go on from, with the output as it is.
            data: a clean sample in place of the predicted one; beside `x` the noise is what lies between the two.
            eta: share of the ancestral noise.

        Raises:
            SamplingError: noise is asked for, and the loop has none.
        """
        forms, rest = self.forms(x), self.then[1]
        if data is not None and x is not None:
            forms["noise"] = (x - self.now[0] * data) / self.now[1]
        moved = self.then[0] * (forms["data"] if data is None else data)
        if eta:
            fresh, rest = ancestral(self.now, self.then, eta)
            if self.z is None:
                raise SamplingError("eta above 0 adds noise, and no noise was passed")
            moved = moved + fresh * self.z
        return moved + rest * forms["noise"]


Guide = Callable[[Between], Tensor]


def guided(
    network: Network,
    x: Tensor,
    grid: TimeGrid,
    guide: Guide,
    *,
    prediction: str = "epsilon",
    gradient: bool = False,
    noise: Sequence[Tensor] | Callable[[int], Tensor] | None = None,
    lands: Sequence[Level] | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
    name: str = "guidance",
) -> Tensor:
    """Sample with a guide between the network's answer and the step.

    Args:
        network: from (state, label) to its prediction; see `to_forms`.
        x: (B, ...) the state at the grid's first time.
        guide: returns the next state.
        gradient: record the network for differentiation.
        noise: standard normal noise of each step, for guides that add some.
        lands: where each step leads, where that is not the next time: diffusers' DDIM goes on from `t - 1000 // N`.
        after_step: sees each finished step's number and state.

    Raises:
        SamplingError: a step's result is not finite; the step is named.
    """
    at = levels(grid)
    for step, label in enumerate(grid.labels.tolist()):
        z = None if noise is None else noise(step) if callable(noise) else noise[step]
        with torch.enable_grad() if gradient else torch.no_grad():
            x = x.detach().requires_grad_(gradient)
            output = network(x, label)
        then = at[step + 1] if lands is None else lands[step]
        x = guide(Between(step, grid.steps, label, at[step], then, prediction, x, output, z)).detach()
        check_finite(name, x, step, grid.steps)
        if after_step is not None:
            after_step(step, x)
    return x


def squares(x: Tensor) -> Tensor:
    """(B,) sums of squares."""
    return x.square().flatten(1).sum(1)


def check_finite(name: str, x: Tensor, step: int, steps: int, why: str = "") -> None:
    """Stop where a state is not finite, or so large that no image is in it any more.

    Raises:
        SamplingError: naming the step.
    """
    largest = float(x.abs().max())
    if not largest < 1e8:
        shown = f"reaches {largest:.1g}" if math.isfinite(largest) else "gives values that are not finite"
        raise SamplingError(f"{name} diverges: step {step + 1} of {steps} {shown}{why}")
