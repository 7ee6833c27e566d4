"""Diffusion between a clean image and a degraded one: x_t = x_0 + A_t (x_in - x_0) + B_t n, with n normal.

ResShift (arXiv 2307.12348) is this with A = eta and B = kappa sqrt(eta), RDDM (arXiv 2308.13712) with sums of its own;
SinSR (arXiv 2311.14760) makes ResShift deterministic and distils it into one step, TAD-SR (arXiv 2408.06358) with a
distilled score. The networks of their checkpoints are not built here: these are their rules, for any network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Predicts: TypeAlias = Literal[
    "xstart", "residual", "epsilon", "epsilon_scale",  # of ResShift
    "pred_res_noise", "pred_res", "pred_noise", "pred_x0_noise", "pred_x0_add_noise", "pred_res_add_noise",  # of RDDM
]  # fmt: skip
Network: TypeAlias = Callable[[Tensor, int | Tensor], Tensor | Sequence[Tensor]]
"""One or two outputs for a scaled state (B, C, H, W) at an original timestep; it knows the degraded image."""
Parts: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(residual, noise, x_0), (B, C, H, W) each."""


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
        predicts: what its outputs are; the residual is the degraded minus the clean image, "epsilon_scale" the noise
            times its spread, "add_noise" a second output that is the noise plus the first.
        scaling: inputs are divided by sqrt(B^2 + 1), as of latents, by 3 B + 1, as of pixels, or not.
        clips: what it takes for residual and clean image is cut off at -1 and 1.
        drawn: steps come from the posterior, of a respaced process; else the noise stays in the state (RDDM).
    """

    shift: Tensor
    spread: Tensor
    timesteps: Tensor
    predicts: Predicts = "xstart"
    scaling: Literal["latent", "pixel", "none"] = "latent"
    clips: bool = False
    drawn: bool = True

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
        (alpha, beta2), total = self.increments, self.spread.square()
        shift, before = self.shift - alpha, total - beta2  # of the step before
        return before / total, (beta2 * shift - before * alpha) / total, beta2 / total, beta2 * before / total

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
        by = {"latent": (spread.square() + 1).sqrt(), "pixel": 3 * spread + 1, "none": torch.ones_like(spread)}
        return noisy / by[self.scaling]

    def parts(self, output: Tensor | Sequence[Tensor], noisy: Tensor, degraded: Tensor, t: int | Tensor) -> Parts:
        """What a network's outputs mean at x_t."""
        outputs = [output] if isinstance(output, Tensor) else list(output)
        first, second = outputs[0], outputs[1] if len(outputs) > 1 else None
        shift, spread = _column(self.shift, t, noisy), _column(self.spread, t, noisy)
        if second is not None and self.predicts.endswith("add_noise"):
            second = second - first

        def cut(values: Tensor) -> Tensor:
            return values.clamp(-1, 1) if self.clips else values

        kind = self.predicts.removeprefix("pred_")
        if kind.startswith("x"):
            residual, clean = cut(degraded - first), cut(first)
        elif kind.startswith("res"):
            residual = cut(first)
            clean = cut(degraded - residual if second is None else noisy - shift * residual - spread * second)
        else:
            scaled = first if kind == "epsilon_scale" else spread * first
            second = scaled / spread
            left = _column((1 - self.shift).clamp(min=1e-6), t, noisy)  # as RDDM counts the end, where it is none
            clean = cut((noisy - scaled - shift * degraded) / left)
            residual = cut(degraded - clean)
        if second is None:  # in the published order: early steps have little noise, which rounding drowns
            noise = noisy - clean - shift * residual if kind == "xstart" else noisy - degraded + (1 - shift) * residual
            second = noise / spread
        return residual, second, clean

    def ask(self, network: Network, noisy: Tensor, degraded: Tensor, t: int | Tensor) -> Parts:
        """What a network takes for the parts of x_t."""
        return self.parts(network(self.scaled(noisy, t), self.timesteps[t]), noisy, degraded, t)

    def targets(self, clean: Tensor, degraded: Tensor, noise: Tensor, t: int | Tensor) -> list[Tensor]:
        """What the network's outputs should be."""
        kind = self.predicts.removeprefix("pred_")
        if kind == "epsilon_scale":
            return [_column(self.spread, t, noise) * noise]
        first = {"x": clean, "r": degraded - clean}.get(kind[0], noise)
        return [first, noise + first if kind.endswith("add_noise") else noise] if "_" in kind else [first]

    def losses(
        self, network: Network, clean: Tensor, degraded: Tensor, noise: Tensor, t: Tensor, *, weighted: bool = False
    ) -> Tensor:
        """ResShift's loss of each image, (B,): the squared error of what is predicted."""
        output: Any = network(self.scaled(self.noisy(clean, degraded, noise, t), t), self.timesteps[t])
        error = output - self.targets(clean, degraded, noise, t)[0]
        if self.predicts == "epsilon_scale":
            error = error / _column(self.spread, t, clean)
        squares = error.square().flatten(1).mean(1)
        return self.weights(self.predicts)[t].to(squares) * squares if weighted else squares

    def absolute_loss(
        self, outputs: Sequence[Tensor], clean: Tensor, degraded: Tensor, noise: Tensor, *, squared: bool = False
    ) -> Tensor:
        """RDDM's loss: the mean absolute (or squared) error, summed over what is predicted."""
        pairs = zip(outputs, self.targets(clean, degraded, noise, 0), strict=True)
        return torch.stack([(F.mse_loss if squared else F.l1_loss)(*pair) for pair in pairs]).sum()

    def sample(
        self, network: Network, degraded: Tensor, noise: Tensor, step_noise: Sequence[Tensor] | None = None, *,
        times: Sequence[int] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """From the prior to the clean image, step by step: (x_s, the estimate of x_0) of each.

        Args:
            noise: of the prior.
            step_noise: of each step of the posterior, the last one without effect; None takes deterministic steps,
                which are SinSR's and RDDM's with eta 0: the same noise stays in the state.
            times: the steps that are visited, falling, for deterministic ones; all where None.
        """
        state, posterior = self.prior(degraded, noise), self.posterior
        for number, (t, after) in enumerate(itertools.pairwise([*(times or reversed(range(len(self)))), -1])):
            residual, predicted, clean = self.ask(network, state, degraded, t)
            if after < 0:
                state = clean
            elif step_noise is None:
                shift, spread = (float(values[t] - values[after]) for values in (self.shift, self.spread))
                state = state - shift * residual - spread * predicted
            else:
                by_state, by_residual, by_clean, variance = (float(part[t]) for part in posterior)
                state = by_state * state + by_residual * residual + by_clean * clean
                state = state + variance**0.5 * step_noise[number]
            yield state, clean

    def restored(self, network: Network, degraded: Tensor, noise: Sequence[Tensor], steps: int) -> Tensor:
        """The clean image in some steps; in one it is what the network says of the prior (SinSR).

        Args:
            noise: of the prior, then of each step that is drawn.

        Raises:
            ValueError: more steps than there are.
        """
        if steps == 1:
            return self.ask(network, self.prior(degraded, noise[0]), degraded, len(self) - 1)[-1]
        if self.drawn:
            walk = self.respaced(steps).sample(network, degraded, noise[0], noise[1:])
        else:
            walk = self.sample(network, degraded, noise[0], times=even_times(len(self), steps))
        *_, (clean, _) = walk
        return clean

    def invert(self, network: Network, clean: Tensor, degraded: Tensor) -> Tensor:
        """The x_T from which deterministic steps lead to a clean image, about: each step asks one step too late."""
        state = clean
        for t in range(1, len(self)):
            *_, estimate = self.ask(network, state, degraded, t)
            # factors in double precision: residuals of rounding grow from step to step
            stays = float(self.spread[t - 1] / self.spread[t])
            pulled = float(self.shift[t - 1]) - stays * float(self.shift[t])
            state = (state - (1 - pulled - stays) * estimate - pulled * degraded) / stays
        return state


def resshift(
    steps: int, *, kappa: float = 2.0, min_noise_level: float = 0.04, power: float = 0.3, etas_end: float = 0.99,
    predicts: Predicts = "xstart", sinsr: bool = False,
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
    return ResidualDiffusion(roots.square(), kappa * roots, torch.arange(steps), predicts)


def rddm(
    steps: int, sum_scale: float = 0.01, *, predicts: Predicts = "pred_res_noise", clips: bool = True
) -> ResidualDiffusion:
    """RDDM's schedule: residuals removed less and less, noise more and more; B_T^2 is `sum_scale`."""
    ramp = torch.arange(1, steps + 1, dtype=torch.float64) / (steps * (steps + 1) / 2)
    shift, spread = ramp.flip(0).cumsum(0), (ramp * sum_scale).cumsum(0).sqrt()
    return ResidualDiffusion(shift, spread, torch.arange(steps), predicts, "none", clips, drawn=False)


def even_times(total: int, steps: int) -> list[int]:
    """The steps that RDDM visits, falling: ``int(linspace(-1, T - 1, steps + 1))`` without -1.

    Raises:
        ValueError: more steps than there are.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be in 1..{total}, got {steps}")
    return [int(t) for t in reversed(torch.linspace(-1, total - 1, steps + 1).tolist())][:-1]


def sinsr_losses(
    process: ResidualDiffusion, student: Network, taught: Tensor, clean: Tensor, degraded: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """SinSR's three losses of each image, (B,): the teacher's result, the way back to x_T, the original.

    `taught` is what the teacher's deterministic steps lead to from the same noise. All inputs of the student are
    scaled as those of the last step, also where it is asked at step 0, as released.
    """
    last = len(process) - 1
    start = process.prior(degraded, noise)

    def ask(state: Tensor, t: int) -> Tensor:
        return process.parts(student(process.scaled(state, last), process.timesteps[t]), state, degraded, t)[-1]

    with torch.no_grad():
        inverted = ask(clean, 0)
    pairs = {"mse": (ask(start, last), taught), "xT": (start, ask(taught, 0)), "gt": (clean, ask(inverted, last))}
    return {name: (a - b).square().flatten(1).mean(1) for name, (a, b) in pairs.items()}


def hsd_gradient(
    process: ResidualDiffusion, teacher: Network, student: Tensor, taught: Tensor, degraded: Tensor, noise: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """TAD-SR's score distillation: what pulls the student's x_0 to the teacher's, and the loss (B,) that carries it.

    Args:
        student, taught: x_0 of both, (B, C, H, W).
        noise: uniform in [0, 1), as released; inputs are scaled twice, as released.
        t: (B,) small steps.
    """

    def estimate(clean: Tensor) -> Tensor:
        mixed = process.noisy(clean, degraded, noise, t)
        output = teacher(process.scaled(process.scaled(mixed, t), t), process.timesteps[t])
        return process.parts(output, mixed, degraded, t)[1]

    with torch.no_grad():
        gradient = estimate(student.detach()) - estimate(taught)
    return gradient, (gradient * student).flatten(1).mean(1)


PROCESSES: Mapping[str, ResidualDiffusion] = {  # of latents, by the names of their families
    "resshift": resshift(15),
    "resshift-4": resshift(4, min_noise_level=0.2),
    "sinsr": resshift(15, sinsr=True),
    "rddm": rddm(1000, predicts="pred_res", clips=False),
}
