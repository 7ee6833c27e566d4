"""Stochastic interpolants (Albergo et al. 2023) and SiT's transport (Ma et al. 2024): ODE and SDE over a path.

A path joins noise (or another sample) x0 at t = 0 with data x1 at t = 1, `x_t = a(t) x0 + b(t) x1 + gamma(t) z`. Its
velocity gives an ODE, its score lets one add noise of any strength. Rectified flows (SD3, FLUX) are the path
"linear" with Gaussian x0, read backwards: their time is 1 - t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffrep.sampling.schedules import SamplingError

Curve = Callable[[Tensor], Tensor]
Field = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> like x; t is a scalar or (B,)


def derivative(curve: Curve, t: Tensor) -> Tensor:
    """The derivative of an elementwise function of time."""
    with torch.enable_grad():
        t = t.detach().requires_grad_(True)
        value = curve(t)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), t)
    return slope


def _like(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values, or a scalar, to multiply a batch with."""
    return values.view(-1, *[1] * (x.ndim - 1)) if values.ndim else values


@dataclass(frozen=True)
class Path:
    """The curves of an interpolant.

    Attributes:
        x0, x1: factors of the two ends.
        variance: gamma^2, of the latent noise in the middle; None: one-sided, x0 is the noise.
    """

    x0: Curve
    x1: Curve
    variance: Curve | None = None

    def gamma(self, t: Tensor) -> Tensor:
        """Factor of the latent noise; of one-sided paths that of x0."""
        return self.x0(t) if self.variance is None else self.variance(t).sqrt()

    def gamma_slope(self, t: Tensor) -> Tensor:
        """gamma times its derivative, finite at the ends where the derivative is not."""
        return derivative(lambda u: self.gamma(u) ** 2 / 2 if self.variance is None else self.variance(u) / 2, t)

    def at(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """`a x0 + b x1`."""
        return _like(self.x0(t), x0) * x0 + _like(self.x1(t), x1) * x1

    def slope(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """`a' x0 + b' x1`."""
        return _like(derivative(self.x0, t), x0) * x0 + _like(derivative(self.x1, t), x1) * x1


def _sigmoid_gamma(t: Tensor) -> Tensor:
    rise = (10 * (t - 0.5) + 1).sigmoid() - (10 * (t - 0.5) - 1).sigmoid()
    ends = (torch.tensor(-4.0).sigmoid() - torch.tensor(-6.0).sigmoid()).to(t)
    return rise - ends


GAMMA_SQUARED: dict[str, Curve] = {
    "brownian": lambda t: t * (1 - t),
    "bsquared": lambda t: (t * (1 - t)) ** 2,
    "sinesquared": lambda t: torch.sin(math.pi * t) ** 4,
    "sigmoid": lambda t: _sigmoid_gamma(t) ** 2,
}
PATHS = ("linear", "trig", "encoding-decoding", "one-sided-linear", "one-sided-trig", "mirror")


def interpolant(path: str, gamma: str | None = None) -> Path:
    """An interpolant by its names in the paper.

    Args:
        path: one of `PATHS`.
        gamma: a name of `GAMMA_SQUARED`; None for one-sided paths.

    Raises:
        SamplingError: no such path or gamma, or they do not go together.
    """
    if path not in PATHS or (gamma is not None and gamma not in GAMMA_SQUARED):
        raise SamplingError(f"paths are {', '.join(PATHS)} with gamma {', '.join(GAMMA_SQUARED)}: got {path}, {gamma}")
    if path.startswith("one-sided") != (gamma is None):
        raise SamplingError(f"path {path} {'has no gamma' if gamma else 'needs a gamma'}")
    squared = GAMMA_SQUARED[gamma] if gamma else None

    def rest(t: Tensor) -> Tensor:
        return 1.0 if squared is None else (1 - squared(t)).sqrt()  # type: ignore[return-value]

    def bump(t: Tensor, second: bool) -> Tensor:
        return torch.where((t > 0.5) == second, torch.cos(math.pi * t) ** 2, torch.zeros_like(t))

    if path in ("linear", "one-sided-linear"):
        return Path(lambda t: 1 - t, lambda t: t, squared)
    if path in ("trig", "one-sided-trig"):
        quarter = math.pi / 2
        return Path(lambda t: rest(t) * torch.cos(quarter * t), lambda t: rest(t) * torch.sin(quarter * t), squared)
    if path == "mirror" and squared is not None:  # data alone, with x0 as the noise
        return Path(lambda t: squared(t).sqrt(), torch.ones_like)
    return Path(lambda t: bump(t, False), lambda t: bump(t, True), squared)


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

    middle, slope, gamma = path.at(t, x0, x1), path.slope(t, x0, x1), path.gamma(t)
    noise, one_sided = (x0, True) if path.variance is None else (z, False)

    def at(sign: float) -> Tensor:
        if one_sided:
            return middle if sign > 0 else middle - 2 * _like(gamma, x0) * x0
        return middle + sign * _like(gamma, z) * z

    if kind in ("eta", "v"):
        value = field(at(1.0), t)
        return inner(value, value) / 2 + (inner(value, noise) if kind == "eta" else -inner(value, slope))
    total = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    for sign in (1.0,) if one_sided and kind == "b" else (1.0, -1.0):
        value = field(at(sign), t)
        if kind == "s":
            aim = -sign * noise / _like(gamma, noise)
        else:
            aim = slope if one_sided else slope + sign * _like(path.gamma_slope(t) / gamma, z) * z
        total = total + inner(value, value) / 2 - inner(aim, value)
    return total


# -- integration ----------------------------------------------------------------------------------------------


def divergence(field: Field, x: Tensor, t: Tensor, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The field's value, and its divergence (B,): exact, or Hutchinson's estimate with a probe like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = field(x, t)
        if probe is not None:
            (product,) = torch.autograd.grad((value * probe).sum(), x)
            return value.detach(), (product * probe).flatten(1).sum(1)
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        flat = value.flatten(1)
        for j in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, j].sum(), x, retain_graph=True)
            total = total + row.flatten(1)[:, j]
    return value.detach(), total


def integrate_ode(field: Field, x: Tensor, times: Tensor, method: str = "heun2") -> Tensor:
    """Integrate `dx / dt = field(x, t)` with one step between any two times.

    Args:
        method: "euler", "midpoint", "heun2" or "rk4" (the 3/8 rule, as torchdiffeq's).

    Raises:
        SamplingError: no such method.
    """
    for t, end in pairwise(times):
        h = end - t
        k1 = field(x, t)
        if method == "euler":
            x = x + h * k1
        elif method == "midpoint":
            x = x + h * field(x + h / 2 * k1, t + h / 2)
        elif method == "heun2":
            x = x + h / 2 * (k1 + field(x + h * k1, end))
        elif method == "rk4":
            k2 = field(x + h * k1 / 3, t + h / 3)
            k3 = field(x + h * (k2 - k1 / 3), t + 2 * h / 3)
            k4 = field(x + h * (k1 - k2 + k3), end)
            x = x + h * (k1 + 3 * (k2 + k3) + k4) / 8
        else:
            raise SamplingError(f"method must be euler, midpoint, heun2 or rk4, got {method!r}")
    return x


def integrate_with_density(field: Field, x: Tensor, times: Tensor, method: str = "rk4") -> tuple[Tensor, Tensor]:
    """`integrate_ode`, and the change (B,) of the log-density along it: minus the integral of the divergence."""
    shape = x.shape

    def joint(state: Tensor, t: Tensor) -> Tensor:
        value, trace = divergence(field, state[:, :-1].reshape(shape), t)
        return torch.cat([value.flatten(1), -trace[:, None]], dim=1)

    start = torch.cat([x.flatten(1), torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)], dim=1)
    end = integrate_ode(joint, start, times, method)
    return end[:, :-1].reshape(shape), end[:, -1]


def integrate_sde(
    field: Field,
    x: Tensor,
    times: Tensor,
    spread: Curve,
    noise: Sequence[Tensor],
    *,
    method: Literal["euler", "heun"] = "euler",
    ahead: bool = False,
) -> Tensor:
    """Integrate `dx = field dt + spread(t) dW`, forwards or, with falling times, backwards.

    Args:
        field: the drift, with what the noise adds to it.
        spread: standard deviation of the noise per root of time.
        noise: standard normal noise like x for each step.
        method: Euler-Maruyama, or Heun's method after the noise was added (Karras et al. 2022).
        ahead: Heun's first slope is taken at the step's end (the interpolants' code) instead of its start (SiT's).
    """
    for i, (t, end) in enumerate(pairwise(times)):
        h = end - t
        jump = spread(t) * h.abs().sqrt() * noise[i]
        if method == "euler":
            x = x + h * field(x, t) + jump
            continue
        x = x + jump
        k1 = field(x, end if ahead else t)
        x = x + h / 2 * (k1 + field(x + h * k1, end))
    return x


# -- SiT ------------------------------------------------------------------------------------------------------

FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing")  # spelt as SiT spells them


@dataclass(frozen=True)
class Transport:
    """SiT's transport of Gaussian noise (t = 0) to data (t = 1).

    Attributes:
        path: "Linear", "GVP" or "VP".
        prediction: what the network gives: "velocity", "noise" or "score".
        beta_0, beta_1: of the path "VP".
    """

    path: str = "Linear"
    prediction: str = "velocity"
    beta_0: float = 0.1
    beta_1: float = 20.0

    def __post_init__(self) -> None:
        if self.path not in ("Linear", "GVP", "VP") or self.prediction not in ("velocity", "noise", "score"):
            raise SamplingError(
                "a transport has a path Linear, GVP or VP and predicts velocity, noise or score, "
                f"got {self.path!r}, {self.prediction!r}"
            )

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data."""
        if self.path == "Linear":
            return t
        if self.path == "GVP":
            return torch.sin(math.pi / 2 * t)
        return torch.exp(-((1 - t) ** 2) * (self.beta_1 - self.beta_0) / 4 - (1 - t) * self.beta_0 / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise."""
        if self.path == "Linear":
            return 1 - t
        return torch.cos(math.pi / 2 * t) if self.path == "GVP" else (1 - self.alpha(t) ** 2).sqrt()

    def interval(self, *, sde: bool = False, last_step: float = 0.04) -> tuple[float, float]:
        """The times between which the samplers run, away from the singular ends."""
        singular = self.prediction != "velocity" or self.path == "VP"
        first = 1e-3 if singular and self.path != "VP" else 0.0
        return first, 1 - (last_step if sde else 1e-3 if singular else 0.0)

    def at(self, t: Tensor, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """The state between noise and data, and its velocity."""
        path = Path(self.sigma, self.alpha)
        return path.at(t, noise, data), path.slope(t, noise, data)

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`-f(x)` and `g^2 / 2` of the forward SDE with the same marginals (SBDM)."""
        ratio = derivative(self.alpha, t) / self.alpha(t)
        half = ratio * self.sigma(t) ** 2 - self.sigma(t) * derivative(self.sigma, t)
        return -_like(ratio, x) * x, _like(half, x)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The predicted noise."""
        ratio = self.alpha(t) / derivative(self.alpha, t)
        return (_like(ratio, x) * velocity - x) / _like(ratio * derivative(self.sigma, t) - self.sigma(t), x)

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score."""
        return -self.noise_from_velocity(velocity, x, t) / _like(self.sigma(t), x)

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the probability flow."""
        minus_f, half = self.drift(x, t)
        return half * score - minus_f

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score that a network's output means."""
        if self.prediction == "noise":
            return -output / _like(self.sigma(t), x)
        return output if self.prediction == "score" else self.score_from_velocity(output, x, t)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity that a network's output means."""
        return output if self.prediction == "velocity" else self.velocity_from_score(self.score(output, x, t), x, t)

    def diffusion(self, form: str, t: Tensor, *, norm: float = 1.0) -> Tensor:
        """w(t), half the squared diffusion that an SDE sampler adds.

        Raises:
            SamplingError: no such form.
        """
        forms: dict[str, Callable[[], Tensor]] = {
            "constant": lambda: torch.full_like(t, norm),
            "SBDM": lambda: norm * self.drift(t, t)[1].reshape(t.shape),
            "sigma": lambda: norm * self.sigma(t),
            "linear": lambda: norm * (1 - t),
            "decreasing": lambda: (norm * torch.cos(math.pi * t) + 1) ** 2 / 4,
            "inccreasing-decreasing": lambda: norm * torch.sin(math.pi * t) ** 2,
        }
        if form not in forms:
            raise SamplingError(f"diffusion must be one of {', '.join(forms)}, got {form!r}")
        return forms[form]()

    def loss(self, output: Tensor, x: Tensor, t: Tensor, noise: Tensor, velocity: Tensor, weight: str | None) -> Tensor:
        """(B,) the training loss of an output at a state of `at`.

        Args:
            weight: None, "velocity" or "likelihood"; networks of the velocity have no weight.
        """
        if self.prediction == "velocity":
            return (output - velocity).square().flatten(1).mean(1)
        sigma, half = _like(self.sigma(t), x), self.drift(x, t)[1]
        factors = {None: torch.ones_like(half), "velocity": (half / sigma) ** 2, "likelihood": half / sigma**2}
        error = output - noise if self.prediction == "noise" else output * sigma + noise
        return (factors[weight] * error.square()).flatten(1).mean(1)

    def sample_ode(self, network: Field, x: Tensor, points: int, method: str = "euler") -> Tensor:
        """From noise to data along the probability flow, over `points` times."""
        times = torch.linspace(*self.interval(), points, dtype=x.dtype, device=x.device)
        return integrate_ode(lambda y, t: self.velocity(network(y, t), y, t), x, times, method)

    def sample_sde(
        self,
        network: Field,
        x: Tensor,
        points: int,
        noise: Sequence[Tensor],
        *,
        method: Literal["euler", "heun"] = "euler",
        form: str = "sigma",
        norm: float = 1.0,
        last_step: Literal["Mean", "Tweedie", "Euler"] | None = "Mean",
        last_step_size: float = 0.04,
    ) -> Tensor:
        """From noise to data along an SDE with the same marginals.

        Args:
            noise: points - 1 draws like x.
            form, norm: how much noise is added, see `diffusion`.
            last_step: how the last stretch to t = 1 is gone, without noise.

        Raises:
            SamplingError: the SBDM form with a velocity network, which divides by zero at t = 0.
        """
        if form == "SBDM" and self.prediction == "velocity" and self.path != "VP":
            raise SamplingError("the diffusion form SBDM is infinite at t = 0 for velocity networks; take sigma")
        last = last_step_size if last_step else 0.0
        first, end = self.interval(sde=True, last_step=last)
        times = torch.linspace(first, end, points, dtype=x.dtype, device=x.device)

        def drift(y: Tensor, t: Tensor) -> Tensor:
            output = network(y, t)
            weight = self.diffusion(form, t, norm=norm)
            return self.velocity(output, y, t) + weight * self.score(output, y, t)

        x = integrate_sde(
            drift, x, times, lambda t: (2 * self.diffusion(form, t, norm=norm)).sqrt(), noise, method=method
        )
        t = times[-1]
        if last_step == "Mean":
            return x + last * drift(x, t)
        if last_step == "Euler":
            return x + last * self.velocity(network(x, t), x, t)
        if last_step == "Tweedie":
            return (x + self.sigma(t) ** 2 * self.score(network(x, t), x, t)) / self.alpha(t)
        return x
