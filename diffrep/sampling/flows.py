"""Sampling in continuous time: the flow of any schedule, integration, and SiT's transports (Ma et al. 2024).

With r and h of `NoiseSchedule.rates`, `x' = r x + h score` is the flow with a schedule's marginals, `2 |h|` the squared
diffusion of the SDE with them, and `score = -noise / sigma`. SiT's and stochastic interpolants' time is 1 at the data;
FLUX and SD3 are SiT's path "Linear" read backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling.core import SolverTable, Update
from diffrep.sampling.schedules import LinearVP, NoiseSchedule, SamplingError, TimeGrid, slope
from diffrep.sampling.solvers import RUNGE_KUTTA
from diffrep.settings import check

Field = Callable[[Tensor, float], Tensor]  # (x, t) -> like x
Tolerance = float | tuple[float, float]  # of adaptive steps: relative and absolute; one number is both


def probability_flow(schedule: NoiseSchedule, score: Field) -> Field:
    """The field of the ODE with a schedule's marginals."""

    def field(x: Tensor, t: float) -> Tensor:
        rate, half = schedule.rates(t)
        return float(rate) * x + float(half) * score(x, t)

    return field


def divergence(field: Field, x: Tensor, t: float, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The field's value, and its divergence (B,): exact, or Hutchinson's estimate with a probe like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = field(x, t)
        basis = torch.eye(x[0].numel()).to(x).view(-1, *x.shape[1:]) if probe is None else probe[None]
        rows = [torch.autograd.grad((value * e).sum(), x, retain_graph=True)[0] * e for e in basis]
    return value.detach(), torch.stack([row.flatten(1).sum(1) for row in rows]).sum(0)


def solve_rk45(
    field: Callable[[Tensor, float], Sequence[Tensor]], x: Tensor, start: float, end: float, tolerance: Tolerance,
    *, beside: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adaptive RK45 on x and so many numbers `beside` it, which begin at 0 and count in the error; both at the end."""
    from scipy.integrate import solve_ivp

    def of_time(t: float, state: np.ndarray) -> np.ndarray:
        values = field(torch.from_numpy(state[: x.numel()]).to(x.device, x.dtype).view_as(x), t)
        return np.concatenate([value.detach().cpu().double().numpy().ravel() for value in values])

    first = np.concatenate([x.detach().cpu().double().numpy().ravel(), np.zeros(beside)])
    relative, absolute = np.broadcast_to(tolerance, 2).tolist()
    solution = solve_ivp(of_time, (start, end), first, rtol=relative, atol=absolute, method="RK45")
    final = torch.from_numpy(solution.y[:, -1])
    return final[: x.numel()].to(x.device, x.dtype).view_as(x), final[x.numel() :]


# by torchdiffeq's names
ODE_METHODS = {"euler": "1euler", "midpoint": "2midpoint", "heun2": "2heun", "heun3": "3heun", "rk4": "4three-eighths"}


def integrate_ode(field: Field, x: Tensor, times: Sequence[float], method: str = "heun2") -> Tensor:
    """Integrate `dx / dt = field(x, t)` by one of `ODE_METHODS` with one step between any two times."""
    if method not in ODE_METHODS:
        raise SamplingError(f"method must be one of {', '.join(ODE_METHODS)}, got {method!r}")
    nodes, rows, weights = RUNGE_KUTTA[ODE_METHODS[method]]
    for t, end in pairwise(times):
        slopes = [field(x, t)]
        for node, row in zip(nodes, rows, strict=True):
            inner = sum(((end - t) * w * k for w, k in zip(row, slopes, strict=True)), x)
            slopes.append(field(inner, end if node == 1 else t + node * (end - t)))
        x = sum(((end - t) * w * k for w, k in zip(weights, slopes, strict=True)), x)
    return x


def integrate_with_density(
    field: Field, x: Tensor, times: Sequence[float], method: str = "rk4", probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`integrate_ode`, and the change (B,) of the log-density along it: minus the integral of the `divergence`."""

    def joint(state: Tensor, t: float) -> Tensor:
        value, trace = divergence(field, state[:, :-1].view_as(x), t, probe)
        return torch.cat([value.flatten(1), -trace[:, None]], dim=1)

    end = integrate_ode(joint, torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1), times, method)
    return end[:, :-1].view_as(x), end[:, -1]


def integrate_sde(
    field: Field, x: Tensor, times: Sequence[float], spread: Callable[[float], float], noise: Sequence[Tensor], *,
    method: Literal["euler", "heun"] = "euler", ahead: bool = False,
) -> Tensor:  # fmt: skip
    """Integrate `dx = field dt + spread(t) dW`, forwards or, with falling times, backwards.

    Args:
        field: the drift, with what the noise adds to it.
        spread: standard deviation of the noise per root of time; `noise`: standard normal, like x, for each step.
        method: Euler-Maruyama, or Heun's method after the noise was added (Karras et al. 2022).
        ahead: Heun's first slope is taken at the step's end (the interpolants' code) instead of its start (SiT's).

    Raises:
        SamplingError: no such method.
    """
    if method not in ("euler", "heun"):
        raise SamplingError(f"method must be euler or heun, got {method!r}")
    for i, (t, end) in enumerate(pairwise(times)):
        h, noisy = end - t, x + float(spread(t)) * math.sqrt(abs(end - t)) * noise[i]
        if method == "euler":
            x = noisy + h * field(x, t)
        else:
            k1 = field(noisy, end if ahead else t)
            x = noisy + h / 2 * (k1 + field(noisy + h * k1, end))
    return x


FORMS: dict[str, Callable[[Transport, float], Any]] = {  # w(t), spelt as SiT spells them; see `Transport.diffusion`
    "constant": lambda transport, t: 1.0,
    "SBDM": lambda transport, t: transport.rates(t)[1],
    "sigma": lambda transport, t: transport.sigma(t),
    "linear": lambda transport, t: 1 - t,
    "decreasing": lambda transport, t: np.cos(math.pi * t),
    "inccreasing-decreasing": lambda transport, t: np.sin(math.pi * t) ** 2,
}


@dataclass(frozen=True)
class Transport(NoiseSchedule):
    """SiT's transport of Gaussian noise (t = 0) to data (t = 1) (Ma et al. 2024)."""

    path: str = "Linear"  # "GVP", or "VP", which has the betas
    prediction: str = "velocity"  # what the network gives; or "noise", "score"
    beta_0: float = 0.1
    beta_1: float = 20.0

    def __post_init__(self) -> None:
        check(self)
        if self.path not in ("Linear", "GVP", "VP") or self.prediction not in ("velocity", "noise", "score"):
            raise SamplingError(
                f"paths are Linear, GVP, VP of velocity, noise, score: {self.path!r}, {self.prediction!r}"
            )

    def log_alpha(self, t: Any) -> Any:
        return LinearVP(self.beta_0, self.beta_1).log_alpha(1 - t)

    def alpha(self, t: Any) -> Any:
        return {"Linear": lambda u: u, "GVP": lambda u: np.sin(math.pi / 2 * u)}.get(self.path, super().alpha)(t)

    def sigma(self, t: Any) -> Any:
        return {"Linear": lambda u: 1 - u, "GVP": lambda u: np.cos(math.pi / 2 * u)}.get(self.path, super().sigma)(t)

    def interval(self, *, sde: bool = False, last_step: float = 0.04) -> tuple[float, float]:
        """The times between which the samplers run, away from the singular ends."""
        singular = self.prediction != "velocity" or self.path == "VP"
        first = 1e-3 if singular and self.path != "VP" else 0.0
        return first, 1 - (last_step if sde else 1e-3 if singular else 0.0)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: float) -> Tensor:
        """The predicted noise; finite where nothing of the data is left."""
        ratio = float(self.alpha(t) / slope(self.alpha, t))
        return (ratio * velocity - x) / (ratio * float(slope(self.sigma, t)) - float(self.sigma(t)))

    def score(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The score that a network's output means."""
        if self.prediction == "score":
            return output
        noise = output if self.prediction == "noise" else self.noise_from_velocity(output, x, t)
        return -noise / float(self.sigma(t))

    def velocity(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The velocity that a network's output means."""
        if self.prediction == "velocity":
            return output
        return probability_flow(self, lambda y, u: self.score(output, y, u))(x, t)

    def diffusion(self, form: str, t: float, *, norm: float = 1.0) -> float:
        """w(t), half the squared diffusion that an SDE sampler adds, in one of `FORMS`."""
        if form not in FORMS:
            raise SamplingError(f"diffusion must be one of {', '.join(FORMS)}, got {form!r}")
        value = norm * float(FORMS[form](self, t))
        return (value + 1) ** 2 / 4 if form == "decreasing" else value

    def sample_ode(
        self, network: Field, x: Tensor, points: int = 50, method: str = "euler", *, tolerance: Tolerance = 1e-4
    ) -> Tensor:
        """From noise to data along the probability flow, over `points` times.

        The method "dopri5", SiT's default, chooses its own times by a `Tolerance`.
        """

        def field(y: Tensor, t: float) -> Tensor:
            return self.velocity(network(y, t), y, t)

        if method == "dopri5":
            return solve_rk45(lambda y, t: (field(y, t),), x, *self.interval(), tolerance)[0]
        return integrate_ode(field, x, np.linspace(*self.interval(), points).tolist(), method)

    def sample_sde(
        self, network: Field, x: Tensor, points: int, noise: Sequence[Tensor], *,
        method: Literal["euler", "heun"] = "euler", form: str = "sigma", norm: float = 1.0,
        last_step: Literal["Mean", "Tweedie", "Euler"] | None = "Mean", last_step_size: float = 0.04,
    ) -> Tensor:  # fmt: skip
        """From noise to data along an SDE with the same marginals, with points - 1 draws like x.

        `form` and `norm` say how much noise is added, see `diffusion`; the last stretch to t = 1 goes without noise.

        Raises:
            SamplingError: the SBDM form with a velocity network, which divides by zero at t = 0.
        """
        if form == "SBDM" and self.prediction == "velocity" and self.path != "VP":
            raise SamplingError("the diffusion form SBDM is infinite at t = 0 for velocity networks; take sigma")
        last = last_step_size if last_step else 0.0
        first, end = self.interval(sde=True, last_step=last)

        def drift(y: Tensor, t: float) -> Tensor:
            output = network(y, t)
            return self.velocity(output, y, t) + self.diffusion(form, t, norm=norm) * self.score(output, y, t)

        times = np.linspace(first, end, points).tolist()
        x = integrate_sde(
            drift, x, times, lambda t: math.sqrt(2 * self.diffusion(form, t, norm=norm)), noise, method=method
        )
        steps: dict[str | None, Callable[[], Tensor]] = {
            "Mean": lambda: x + last * drift(x, end),
            "Euler": lambda: x + last * self.velocity(network(x, end), x, end),
            "Tweedie": lambda: (
                (x + float(self.sigma(end)) ** 2 * self.score(network(x, end), x, end)) / float(self.alpha(end))
            ),
        }
        return steps[last_step]() if last_step else x


def transport_sde(grid: TimeGrid, *, form: str = "sigma", norm: float = 1.0) -> SolverTable:
    """SiT's SDE on a rectified flow: `dx = (velocity + w score) dt + sqrt(2 w) dW`; the last step is its mean.

    Raises:
        SamplingError: no such form, or one that is infinite without signal.
    """
    transport, updates = Transport(), []
    for i, (sigma, after) in enumerate(pairwise(grid.sigma.tolist())):
        with np.errstate(divide="ignore"):
            w = transport.diffusion(form, 1 - sigma, norm=norm)
        if not math.isfinite(w) or norm < 0:
            raise SamplingError(f"the diffusion form {form} is infinite without signal, or norm negative; take sigma")
        h, share = sigma - after, w * (sigma - after) / sigma  # the score is -(x + alpha (eps - x0)) / sigma
        spread = math.sqrt(2 * w * h) if after else 0.0
        updates.append(Update("velocity", 1 - share, (-h - share * float(grid.alpha[i]),), noise=spread))
    return SolverTable(f"SiT SDE {form}", grid, tuple(updates))
