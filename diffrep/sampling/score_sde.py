"""Score-SDE (Song et al. 2021): forward SDEs, predictor-corrector sampling, the probability flow and its likelihood.

Time is t in (0, 1], 1 is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling.interpolants import divergence
from diffrep.sampling.schedules import SamplingError

Kind = Literal["vp", "subvp", "ve"]
Score = Callable[[Tensor, Tensor], Tensor]  # (x, (B,) times) -> like x


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class ScoreSDE:
    """A forward SDE.

    Attributes:
        kind: "vp" and "subvp" with linear beta, or "ve".
        beta_0, beta_1: of the first two.
        sigma_min, sigma_max: of "ve".
        steps: N of the discretisation; betas above 1 (N below beta_1) are refused where they are used.
    """

    kind: Kind = "vp"
    beta_0: float = 0.1
    beta_1: float = 20.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in ("vp", "subvp", "ve"):
            raise SamplingError(f"an SDE is vp, subvp or ve, got {self.kind!r}")
        if self.steps < 2:
            raise SamplingError(f"an SDE has at least 2 steps, got {self.steps}")

    @property
    def last(self) -> float:
        """The time at which sampling ends: 1e-5 (VE) or 1e-3."""
        return 1e-5 if self.kind == "ve" else 1e-3

    @property
    def betas(self) -> Tensor:
        """(N,) of the discrete chain."""
        return torch.linspace(self.beta_0 / self.steps, self.beta_1 / self.steps, self.steps)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(N,) of the discrete chain."""
        return (1 - self.betas).cumprod(0)

    @property
    def sigmas(self) -> Tensor:
        """(N,) of the discrete VE chain, rising."""
        return torch.linspace(math.log(self.sigma_min), math.log(self.sigma_max), self.steps).exp()

    def marginal(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, like x, and standard deviation (B,) of the state at time t of a clean x."""
        if self.kind == "ve":
            return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        log_mean = -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2
        variance = -torch.expm1(2 * log_mean)
        return _like(log_mean.exp(), x) * x, variance.sqrt() if self.kind == "vp" else variance

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift, like x, and diffusion (B,)."""
        if self.kind == "ve":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** t
            return torch.zeros_like(x), sigma * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        beta = self.beta_0 + t * (self.beta_1 - self.beta_0)
        squared = beta
        if self.kind == "subvp":
            squared = beta * -torch.expm1(-2 * self.beta_0 * t - (self.beta_1 - self.beta_0) * t**2)
        return -_like(beta, x) / 2 * x, squared.sqrt()

    def index(self, t: Tensor) -> Tensor:
        """The entry of the discrete chain that a time falls on."""
        return (t * (self.steps - 1)).long()

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One forward step of the chain: what is added to x, like x, and the noise's standard deviation (B,)."""
        if self.kind == "subvp":
            drift, diffusion = self.drift(x, t)
            return drift / self.steps, diffusion / math.sqrt(self.steps)
        index = self.index(t)
        if self.kind == "vp":
            beta = self.betas.to(t.device)[index]
            return (_like((1 - beta).sqrt(), x) - 1) * x, beta.sqrt()
        sigma, below = self._neighbours(index)
        return torch.zeros_like(x), (sigma**2 - below**2).sqrt()

    def _neighbours(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_i and sigma_i-1, 0 before the first."""
        sigmas = torch.cat([torch.zeros(1), self.sigmas]).to(index.device)
        return sigmas[index + 1], sigmas[index]

    def prior_log_density(self, z: Tensor) -> Tensor:
        """(B,) log-density of states at t = 1."""
        sigma = self.sigma_max if self.kind == "ve" else 1.0
        dims = z[0].numel()
        return -dims / 2 * math.log(2 * math.pi * sigma**2) - z.square().flatten(1).sum(1) / (2 * sigma**2)

    def score(self, network: Callable[[Tensor, Tensor], Tensor], *, continuous: bool = True) -> Score:
        """The score as a function of x and t, of a network in the official convention.

        Args:
            network: called with labels: 999 t (VP), t (N - 1) (discrete VP), sigma (VE) or a number that counts from
                the noisiest (discrete VE). It gives the noise (VP, sub-VP) or the score (VE).
        """

        def of(x: Tensor, t: Tensor) -> Tensor:
            if self.kind == "ve":
                label = self.marginal(x, t)[1] if continuous else ((1 - t) * (self.steps - 1)).round().long()
                return network(x, label)
            if continuous or self.kind == "subvp":
                return -network(x, t * 999) / _like(self.marginal(x, t)[1], x)
            label = t * (self.steps - 1)
            std = (1 - self.alphas_cumprod.to(t.device))[label.long()].sqrt()
            return -network(x, label) / _like(std, x)

        return of


def predict(
    sde: ScoreSDE, score: Score, x: Tensor, t: Tensor, z: Tensor, method: str, *, flow: bool = False
) -> tuple[Tensor, Tensor]:
    """One predictor step; returns the state and the state without the noise of this step.

    Args:
        method: "reverse_diffusion", "ancestral_sampling", "euler_maruyama" or "none".
        flow: the probability flow instead of the SDE; not for ancestral sampling.
    """
    if method == "none":
        return x, x
    if method == "euler_maruyama":
        drift, diffusion = sde.drift(x, t)
        g = _like(diffusion, x)
        mean = x - (drift - g**2 * score(x, t) * (0.5 if flow else 1.0)) / sde.steps
        return mean + (0 if flow else g) * math.sqrt(1 / sde.steps) * z, mean
    if method == "reverse_diffusion":
        f, g = sde.discretize(x, t)
        mean = x - f + _like(g, x) ** 2 * score(x, t) * (0.5 if flow else 1.0)
        return mean + (0 if flow else _like(g, x)) * z, mean
    if method != "ancestral_sampling" or sde.kind == "subvp" or flow:
        raise SamplingError(f"there is no predictor {method!r} for {sde.kind}{' with its probability flow' * flow}")
    index = sde.index(t)
    if sde.kind == "vp":
        beta = _like(sde.betas.to(x.device)[index], x)
        mean = (x + beta * score(x, t)) / (1 - beta).sqrt()
        return mean + beta.sqrt() * z, mean
    sigma, below = (_like(values, x) for values in sde._neighbours(index))
    mean = x + score(x, t) * (sigma**2 - below**2)
    return mean + (below**2 * (sigma**2 - below**2) / sigma**2).sqrt() * z, mean


def correct(
    sde: ScoreSDE, score: Score, x: Tensor, t: Tensor, z: Tensor, method: str, snr: float, *, batch_mean: bool = False
) -> Tensor:
    """One step of a corrector at an unchanged time.

    Args:
        method: "langevin" or "ald" (annealed Langevin dynamics).
        snr: signal to noise ratio that sets the step.
        batch_mean: norms are averaged over the batch, as in the official code, where a sample depends on its company.
    """
    if method not in ("langevin", "ald") or sde.kind == "subvp":
        raise SamplingError(f"there is no corrector {method!r} for {sde.kind}")
    alpha = 1 - sde.betas.to(x.device)[sde.index(t)] if sde.kind == "vp" else torch.ones_like(t)
    gradient = score(x, t)
    if method == "ald":
        ratio = sde.marginal(x, t)[1]
    else:
        norms = [v.flatten(1).norm(dim=1) for v in (z, gradient)]
        ratio = norms[0].mean() / norms[1].mean() if batch_mean else norms[0] / norms[1]
    step = _like(2 * alpha * (snr * ratio) ** 2, x)
    return x + step * gradient + (2 * step).sqrt() * z


def sample_pc(
    sde: ScoreSDE,
    score: Score,
    x: Tensor,
    noise: Iterator[Tensor],
    *,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    snr: float = 0.16,
    corrector_steps: int = 1,
    flow: bool = False,
    batch_mean: bool = False,
    last: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Predictor-corrector sampling over the N steps of an SDE.

    Args:
        x: (B, ...) states at t = 1.
        noise: standard normal draws like x: for each step those of the corrector, then the predictor's one.
        corrector: see `correct`, or "none".
        last: the time of the last step; the SDE's own where left out.

    Returns:
        The states without the last step's noise, and with it.

    Raises:
        SamplingError: VP with fewer steps than beta_1, whose chain is not defined.
    """
    if sde.kind == "vp" and sde.steps < sde.beta_1 and {predictor, corrector} - {"euler_maruyama", "none", "ald"}:
        raise SamplingError(f"a VP chain needs at least {sde.beta_1:g} steps, got {sde.steps}: its betas would pass 1")
    mean = x
    for t in torch.linspace(1, sde.last if last is None else last, sde.steps):
        times = torch.full((len(x),), float(t), device=x.device)
        for _ in range(corrector_steps if corrector != "none" else 0):
            x = correct(sde, score, x, times, next(noise), corrector, snr, batch_mean=batch_mean)
        x, mean = predict(sde, score, x, times, next(noise), predictor, flow=flow)
    return mean, x


# -- probability flow -----------------------------------------------------------------------------------------


def probability_flow(sde: ScoreSDE, score: Score) -> Callable[[Tensor, Tensor], Tensor]:
    """The drift of the ODE with the SDE's marginals, of x and (B,) times."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        drift, diffusion = sde.drift(x, t)
        return drift - _like(diffusion, x) ** 2 * score(x, t) / 2

    return field


def solve_rk45(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    x: Tensor,
    start: float,
    end: float,
    tolerance: float,
) -> tuple[Tensor, Tensor, int]:
    """RK45 on (x, one number per sample); returns both at the end, and the calls."""
    from scipy.integrate import solve_ivp

    count = x.numel()

    def of_time(t: float, state: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(state[:count]).to(x.device, x.dtype).view_as(x)
        value, extra = function(y, torch.full((len(x),), t, device=x.device, dtype=x.dtype))
        rest = torch.zeros(len(x)) if extra is None else extra
        return np.concatenate([value.detach().cpu().double().numpy().ravel(), rest.detach().cpu().double().numpy()])

    first = np.concatenate([x.detach().cpu().double().numpy().ravel(), np.zeros(len(x))])
    solution = solve_ivp(of_time, (start, end), first, rtol=tolerance, atol=tolerance, method="RK45")
    final = torch.from_numpy(solution.y[:, -1])
    return final[:count].to(x.device, x.dtype).view_as(x), final[count:], int(solution.nfev)


def sample_flow(
    sde: ScoreSDE, score: Score, x: Tensor, *, tolerance: float = 1e-5, last: float | None = None, denoise: bool = False
) -> Tensor:
    """Integrate the probability flow from t = 1 with an adaptive RK45.

    Args:
        tolerance: relative and absolute.
        denoise: take one noise-free step of reverse diffusion at the end.
    """
    field, end = probability_flow(sde, score), sde.last if last is None else last
    x, _, _ = solve_rk45(lambda y, t: (field(y, t), None), x, 1.0, end, tolerance)
    if denoise:
        times = torch.full((len(x),), end, device=x.device)
        x = predict(sde, score, x, times, torch.zeros_like(x), "reverse_diffusion")[1]
    return x


def likelihood(
    sde: ScoreSDE,
    score: Score,
    x: Tensor,
    probe: Tensor,
    *,
    tolerance: float = 1e-5,
    first: float = 1e-5,
    offset: float = 7.0,
) -> tuple[Tensor, Tensor]:
    """Bits per dimension by the probability flow, with the Skilling-Hutchinson estimate of the divergence.

    Args:
        x: (B, ...) uniformly dequantised data as the network knows them.
        probe: like x, of -1 and 1.
        offset: bits that the scaling of the data adds: 7 for 8-bit images scaled to -1..1, 0 for a density as it is.

    Returns:
        (B,) bits per dimension, and the states at t = 1.
    """
    field = probability_flow(sde, score)
    z, change, _ = solve_rk45(lambda y, t: divergence(field, y, t, probe), x, first, 1.0, tolerance)
    log_density = sde.prior_log_density(z).double().cpu() + change
    return (-log_density / (x[0].numel() * math.log(2)) + offset).to(x.dtype), z
