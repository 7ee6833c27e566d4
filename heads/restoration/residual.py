"""Diffusion between a clean image and a degraded one: x_t = x_0 + A_t (x_in - x_0) + B_t n, with n normal.

ResShift (arXiv 2307.12348) is this with A = eta and B = kappa sqrt(eta), RDDM (arXiv 2308.13712) with sums of its own;
SinSR (arXiv 2311.14760) makes ResShift deterministic and distils it into one step, TAD-SR (arXiv 2408.06358) with a
distilled score. The networks of their checkpoints are not built here: these are their rules, for any network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Predicts: TypeAlias = Literal["xstart", "residual", "epsilon", "epsilon_scale"]
Objective: TypeAlias = Literal[
    "pred_res_noise", "pred_res", "pred_noise", "pred_x0_noise", "pred_x0_add_noise", "pred_res_add_noise"
]
Network: TypeAlias = Callable[[Tensor, int | Tensor], Tensor]
"""What a network says of a scaled state (B, C, H, W) at an original timestep; it knows the degraded image."""


def _column(values: Tensor, t: int | Tensor, like: Tensor) -> Tensor:
    """values[t] for (B, C, H, W)."""
    return values[t].to(like).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class ResidualDiffusion:
    """The schedule of such a process, and its arithmetic.

    Steps t are an int, or (B,) with one for each image; -1 is the clean image.

    Attributes:
        shift: (T,) float64, A_t, rising from about 0 to about 1.
        spread: (T,) float64, B_t, rising from about 0.
        timesteps: (T,), what the network is told of each step.
        predicts: what its output is: the clean image, the degraded minus the clean one, the noise, or the noise times
            its spread.
        latent: inputs are divided by sqrt(B^2 + 1), as of latents; False: by 3 B + 1, as of pixels.
    """

    shift: Tensor
    spread: Tensor
    timesteps: Tensor
    predicts: Predicts = "xstart"
    latent: bool = True

    def __len__(self) -> int:
        return len(self.shift)

    def respaced(self, steps: int) -> ResidualDiffusion:
        """The process of some of the steps: ``int(T / steps * i)``, never the last one.

        Raises:
            ValueError: more steps than there are.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps must be in 1..{len(self)}, got {steps}")
        chosen = torch.tensor([int(len(self) / steps * i) for i in range(steps)])
        return replace(self, shift=self.shift[chosen], spread=self.spread[chosen], timesteps=self.timesteps[chosen])

    @property
    def increments(self) -> tuple[Tensor, Tensor]:
        """alpha_t = A_t - A_{t-1} and beta_t^2 = B_t^2 - B_{t-1}^2, (T,) each."""
        return tuple(torch.diff(x, prepend=x.new_zeros(1)) for x in (self.shift, self.spread.square()))  # type: ignore[return-value]

    @property
    def posterior(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors of x_t, of the residual and of x_0 in the mean of x_{t-1}, and its variance, (T,) each."""
        alpha, beta2 = self.increments
        before = F.pad(self.shift[:-1], (1, 0)), F.pad(self.spread[:-1].square(), (1, 0))
        total = self.spread.square()
        return (
            before[1] / total, (beta2 * before[0] - before[1] * alpha) / total, beta2 / total, beta2 * before[1] / total
        )  # fmt: skip

    @property
    def log_variance(self) -> Tensor:
        """(T,), that of step 1 in the place of step 0, which is none."""
        variance = self.posterior[-1]
        return torch.cat([variance[1:2], variance[1:]]).log() if len(self) > 1 else variance.clamp(min=1e-20).log()

    def weights(self, predicts: Predicts) -> Tensor:
        """(T,) of the squared error of what is predicted, in the variational bound; of noise for "epsilon_scale"."""
        slope = self.spread / (1 - self.shift) if predicts.startswith("epsilon") else torch.ones_like(self.spread)
        return 0.5 * (self.posterior[2] * slope).square() / self.log_variance.exp()

    def noisy(self, clean: Tensor, degraded: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x_t."""
        shift, spread = _column(self.shift, t, clean), _column(self.spread, t, clean)
        return clean + shift * (degraded - clean) + spread * noise

    def prior(self, degraded: Tensor, noise: Tensor) -> Tensor:
        """Where sampling starts: x_T with the degraded image in the place of the clean one."""
        return self.noisy(degraded, degraded, noise, -1)

    def scaled(self, noisy: Tensor, t: int | Tensor) -> Tensor:
        """The network's input."""
        spread = _column(self.spread, t, noisy)
        return noisy / ((spread.square() + 1).sqrt() if self.latent else 3 * spread + 1)

    def clean(self, output: Tensor, noisy: Tensor, degraded: Tensor, t: int | Tensor) -> Tensor:
        """x_0 from the network's output."""
        if self.predicts == "xstart":
            return output
        if self.predicts == "residual":
            return degraded - output
        shift, spread = _column(self.shift, t, noisy), _column(self.spread, t, noisy)
        noise = output if self.predicts == "epsilon_scale" else spread * output
        return (noisy - noise - shift * degraded) / (1 - shift)

    def ask(self, network: Network, noisy: Tensor, degraded: Tensor, t: int | Tensor) -> Tensor:
        """What a network takes for x_0."""
        return self.clean(network(self.scaled(noisy, t), self.timesteps[t]), noisy, degraded, t)

    def losses(
        self, network: Network, clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, *, weighted: bool = False
    ) -> Tensor:
        """ResShift's loss of each image, (B,): the squared error of what is predicted."""
        noisy, spread = self.noisy(clean, degraded, noise, t), _column(self.spread, t, clean)
        targets = {"xstart": clean, "residual": degraded - clean, "epsilon": noise, "epsilon_scale": spread * noise}
        error = network(self.scaled(noisy, t), self.timesteps[t]) - targets[self.predicts]
        if self.predicts == "epsilon_scale":
            error = error / spread
        squares = error.square().flatten(1).mean(1)
        return self.weights(self.predicts)[t].to(squares) * squares if weighted else squares

    def sample(
        self, network: Network, degraded: Tensor, noise: Tensor, step_noise: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """From the prior to the clean image, step by step: (x_{t-1}, the estimate of x_0) of each.

        Args:
            noise: of the prior.
            step_noise: of each step, the last one without effect; None takes SinSR's deterministic steps.
        """
        state = self.prior(degraded, noise)
        for number, t in enumerate(reversed(range(len(self)))):
            clean = self.ask(network, state, degraded, t)
            if step_noise is None:
                state = self.step(state, clean, degraded, t)
            else:
                by_state, by_residual, by_clean, _ = (float(part[t]) for part in self.posterior)
                state = by_state * state + by_residual * (degraded - clean) + by_clean * clean
                if t:
                    state = state + float((0.5 * self.log_variance[t]).exp()) * step_noise[number]
            yield state, clean

    def _factors(self, t: int) -> tuple[float, float, float]:
        """Factors of x_0, x_t and the degraded image in SinSR's step from t to t - 1."""
        shift, before = float(self.shift[t]), float(self.shift[t - 1]) if t else 0.0
        ratio = float(self.spread[t - 1] / self.spread[t]) if t else 0.0
        return 1 - before - ratio * (1 - shift), ratio, before - ratio * shift

    def step(self, noisy: Tensor, clean: Tensor, degraded: Tensor, t: int) -> Tensor:
        """x_{t-1} with the same noise in it as in x_t (SinSR)."""
        by_clean, by_state, by_degraded = self._factors(t)
        return by_clean * clean + by_state * noisy + by_degraded * degraded

    def invert(self, network: Network, clean: Tensor, degraded: Tensor) -> Tensor:
        """The x_T from which deterministic steps lead to a clean image, about: each step asks one step too late."""
        state = clean
        for t in range(1, len(self)):
            by_clean, by_state, by_degraded = self._factors(t)
            estimate = self.ask(network, state, degraded, t)
            state = (state - by_clean * estimate - by_degraded * degraded) / by_state
        return state


def resshift(
    steps: int, *, kappa: float = 2.0, min_noise_level: float = 0.04, power: float = 0.3, etas_end: float = 0.99,
    predicts: Predicts = "xstart", latent: bool = True, sinsr: bool = False,
) -> ResidualDiffusion:  # fmt: skip
    """ResShift's schedule "exponential": B rises geometrically, A = (B / kappa)^2.

    Args:
        etas_end: where sqrt(A) ends.
        sinsr: start as SinSR's and TAD-SR's code does, at sqrt(0.001) at most.

    Raises:
        ValueError: fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    start = min(min_noise_level / kappa, min_noise_level, *([math.sqrt(0.001)] if sinsr else []))
    base = math.exp(math.log(etas_end / start) / (steps - 1))
    exponents = torch.linspace(0, 1, steps, dtype=torch.float64) ** power * (steps - 1)
    roots = start * base**exponents
    return ResidualDiffusion(roots.square(), kappa * roots, torch.arange(steps), predicts, latent)


# -- distillation into one step ------------------------------------------------------------------------------


def sinsr_losses(
    process: ResidualDiffusion, student: Network, teacher: Network, clean: Tensor, degraded: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """SinSR's three losses of each image, (B,): the teacher's result, the way back to x_T, the original.

    All inputs of the student are scaled as those of the last step, also where it is asked at step 0, as released.
    """
    last = len(process) - 1
    start = process.prior(degraded, noise)

    def ask(state: Tensor, t: int) -> Tensor:
        return process.clean(student(process.scaled(state, last), process.timesteps[t]), state, degraded, t)

    with torch.no_grad():
        *_, (taught, _) = process.sample(teacher, degraded, noise)
        inverted = ask(clean, 0)
    pairs = {"mse": (ask(start, last), taught), "xT": (start, ask(taught, 0)), "gt": (clean, ask(inverted, last))}
    return {name: (a - b).square().flatten(1).mean(1) for name, (a, b) in pairs.items()}


def hsd_gradient(
    process: ResidualDiffusion,
    teacher: Network,
    student: Tensor,
    taught: Tensor,
    degraded: Tensor,
    noise: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """TAD-SR's score distillation: what pulls the student's x_0 to the teacher's, and the loss (B,) that carries it.

    Args:
        student, taught: x_0 of both, (B, C, H, W).
        noise: uniform in [0, 1), as released; inputs are scaled twice, as released.
        t: (B,) small steps.
    """
    shift, spread = _column(process.shift, t, student), _column(process.spread, t, student)

    def estimate(clean: Tensor) -> Tensor:
        mixed = process.noisy(clean, degraded, noise, t)
        output = teacher(process.scaled(process.scaled(mixed, t), t), process.timesteps[t])
        predicted = process.clean(output, mixed, degraded, t)
        return (mixed - predicted - shift * (degraded - predicted)) / spread

    with torch.no_grad():
        gradient = estimate(student.detach()) - estimate(taught)
    return gradient, (gradient * student).flatten(1).mean(1)


# -- RDDM ---------------------------------------------------------------------------------------------------


def rddm(steps: int, sum_scale: float = 0.01) -> ResidualDiffusion:
    """RDDM's schedule: residuals removed less and less, noise more and more; B_T^2 is `sum_scale`."""
    ramp = torch.arange(1, steps + 1, dtype=torch.float64) / (steps * (steps + 1) / 2)
    return ResidualDiffusion(ramp.flip(0).cumsum(0), (ramp * sum_scale).cumsum(0).sqrt(), torch.arange(steps))


def rddm_parts(
    process: ResidualDiffusion,
    objective: Objective,
    outputs: Sequence[Tensor],
    noisy: Tensor,
    degraded: Tensor,
    t: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual, noise, x_0) that a network's outputs, (B, C, H, W) one or two, mean; the first and last in [-1, 1]."""
    shift, spread = _column(process.shift, t, noisy), _column(process.spread, t, noisy)
    first, noise = outputs[0], outputs[-1]
    if objective.endswith("add_noise"):
        noise = noise - first
    if objective == "pred_noise":  # as published, the share of the clean image in the last state counts as 1e-6
        left = torch.where(torch.as_tensor(t).view(-1, 1, 1, 1).to(noisy.device) == len(process) - 1, 1e-6, 1 - shift)
        clean = ((noisy - shift * degraded - spread * noise) / left).clamp(-1, 1)
        return (degraded - clean).clamp(-1, 1), noise, clean
    if objective.startswith("pred_x0"):
        return (degraded - first).clamp(-1, 1), noise, first.clamp(-1, 1)
    residual = first.clamp(-1, 1)
    if objective == "pred_res":
        noise = (noisy - degraded - (shift - 1) * residual) / spread
        return residual, noise, (degraded - residual).clamp(-1, 1)
    return residual, noise, (noisy - shift * residual - spread * noise).clamp(-1, 1)


def rddm_sample(
    process: ResidualDiffusion,
    network: Callable[[Tensor, int], Sequence[Tensor]],
    objective: Objective,
    degraded: Tensor,
    noise: Tensor,
    steps: int,
    step_noise: Sequence[Tensor] = (),
) -> Iterator[Tensor]:
    """x_T, then the state after each of the steps; with all steps they are drawn from the posterior.

    Args:
        network: state and step -> its outputs.
        noise: of x_T; step_noise: of each step but the last, where they are drawn.

    Raises:
        ValueError: more steps than the process has.
    """
    total = len(process)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be in 1..{total}, got {steps}")
    state = degraded + float(process.spread[-1]) * noise
    yield state
    times = [int(t) for t in reversed(torch.linspace(-1, total - 1, steps + 1).tolist())]
    factors = process.posterior
    for number, (t, following) in enumerate(itertools.pairwise(times)):
        residual, predicted, clean = rddm_parts(process, objective, network(state, t), state, degraded, t)
        if following < 0:
            state = clean
        elif steps == total:
            by_state, by_residual, by_clean, variance = (float(part[t]) for part in factors)
            state = by_state * state + by_residual * residual + by_clean * clean + variance**0.5 * step_noise[number]
        else:
            shift = float(process.shift[t] - process.shift[following])
            state = state - shift * residual - float(process.spread[t] - process.spread[following]) * predicted
        yield state


def rddm_loss(
    objective: Objective,
    outputs: Sequence[Tensor],
    clean: Tensor,
    degraded: Tensor,
    noise: Tensor,
    *,
    squared: bool = False,
) -> Tensor:
    """The mean absolute (or squared) error, summed over what is predicted."""
    first = {"x0": clean, "res": degraded - clean, "noise": noise}[objective.split("_")[1]]
    targets = [first]
    if len(outputs) == 2:
        targets.append(first + noise if objective.endswith("add_noise") else noise)
    measure = F.mse_loss if squared else F.l1_loss
    return torch.stack([measure(*pair) for pair in zip(outputs, targets, strict=True)]).sum()
