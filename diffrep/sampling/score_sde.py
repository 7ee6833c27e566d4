"""Score-SDE (Song et al. 2021): forward SDEs, predictor-corrector, probability flow. Time 1 is noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling.core import per_sample
from diffrep.sampling.flows import Field, Tolerance, probability_flow, solve_rk45
from diffrep.sampling.schedules import LinearVP, NoiseSchedule, SamplingError
from diffrep.settings import check


@dataclass(frozen=True)
class ScoreSDE(NoiseSchedule):
    """A forward SDE (Song et al. 2021), and its discrete chain."""

    kind: str = "vp"  # and "subvp", with linear beta; or "ve", whose sigma rises exponentially
    beta_0: float = 0.1
    beta_1: float = 20.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    steps: int = 1000  # N of the chain; below beta_1 that of VP is not defined

    def __post_init__(self) -> None:
        check(self)
        if self.kind not in ("vp", "subvp", "ve") or self.steps < 2:
            raise SamplingError(f"an SDE is vp, subvp or ve with 2 steps or more, got {self.kind!r}, {self.steps}")

    def log_alpha(self, t: Any) -> Any:
        return LinearVP(self.beta_0, self.beta_1).log_alpha(t)

    def alpha(self, t: Any) -> Any:
        return np.ones_like(t, np.float64) if self.kind == "ve" else super().alpha(t)

    def sigma(self, t: Any) -> Any:
        if self.kind == "ve":
            return self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        return super().sigma(t) if self.kind == "vp" else super().sigma(t) ** 2

    @property
    def last(self) -> float:  # type: ignore[override]
        """The time at which sampling ends: 1e-5 (VE) or 1e-3."""
        return 1e-5 if self.kind == "ve" else 1e-3

    @property
    def betas(self) -> np.ndarray:
        """(N,) of the discrete chain."""
        return np.linspace(self.beta_0 / self.steps, self.beta_1 / self.steps, self.steps)

    @property
    def sigmas(self) -> np.ndarray:
        """(N,) of the discrete VE chain, rising."""
        return np.geomspace(self.sigma_min, self.sigma_max, self.steps)

    def index(self, t: Any) -> Any:
        """The entry of the discrete chain that a time falls on, in the official code's precision."""
        return (np.asarray(t, np.float32) * np.float32(self.steps - 1)).astype(int)

    def drift(self, t: Any) -> tuple[Any, Any]:
        """Factor of x in the drift, and the diffusion."""
        rate, half = self.rates(t)
        return rate, np.sqrt(-2 * half)

    def discretize(self, t: Any) -> tuple[Any, Any]:
        """One forward step of the chain: factor of x in what is added, and standard deviation of the noise."""
        if self.kind == "subvp":
            rate, diffusion = self.drift(t)
            return rate / self.steps, diffusion / math.sqrt(self.steps)
        if self.kind == "vp":
            beta = self.betas[self.index(t)]
            return np.sqrt(1 - beta) - 1, np.sqrt(beta)
        below = np.append(0, self.sigmas)
        return np.zeros_like(t), np.sqrt(self.sigmas[self.index(t)] ** 2 - below[self.index(t)] ** 2)

    def predictor(self, t: float, method: str, *, flow: bool = False) -> tuple[float, float, float]:
        """c, w and s of a step `c x + w score + s z`, of the SDE or of the probability flow.

        Methods are reverse_diffusion, ancestral_sampling (of the SDEs vp and ve), euler_maruyama and none.
        """
        if method == "none":
            return 1.0, 0.0, 0.0
        if method == "ancestral_sampling" and self.kind != "subvp" and not flow:
            factor, g = self.discretize(t)
            if self.kind == "vp":
                return float(1 / (1 + factor)), float(g**2 / (1 + factor)), float(g)
            sigma = self.sigmas[self.index(t)]
            return 1.0, float(g**2), float(np.sqrt((sigma**2 - g**2) * g**2) / sigma)
        if method == "euler_maruyama":
            rate, diffusion = self.drift(t)
            factor, g = rate / self.steps, diffusion / math.sqrt(self.steps)
        elif method == "reverse_diffusion":
            factor, g = self.discretize(t)
        else:
            raise SamplingError(
                f"there is no predictor {method!r} for {self.kind}{' with its probability flow' * flow}"
            )
        return float(1 - factor), float(g**2) * (0.5 if flow else 1.0), 0.0 if flow else float(g)

    def score(self, network: Callable[[Tensor, Tensor], Tensor], *, continuous: bool = True) -> Field:
        """The score of a network in the official convention: it gives the noise (VP, sub-VP) or the score (VE).

        It is called with (B,) labels: 999 t, t (N - 1) (discrete VP), sigma (VE), or counts from the noisiest
        (discrete VE).
        """

        def of(x: Tensor, t: float) -> Tensor:
            label, std = 999 * t, float(self.sigma(t))
            if self.kind == "ve":
                label = std if continuous else round((1 - t) * (self.steps - 1))
            elif self.kind == "vp" and not continuous:
                label = t * (self.steps - 1)
                std = math.sqrt(1 - float((1 - self.betas).cumprod()[self.index(t)]))
            output = network(x, torch.full((len(x),), label, device=x.device))
            return output if self.kind == "ve" else -output / std

        return of


def predict(
    sde: ScoreSDE, score: Field, x: Tensor, t: float, z: Tensor, method: str, *, flow: bool = False
) -> tuple[Tensor, Tensor]:
    """One predictor step, see `ScoreSDE.predictor`; the state, and the state without the noise of this step."""
    carry, weight, spread = sde.predictor(t, method, flow=flow)
    mean = carry * x + weight * score(x, t) if weight else x
    return mean + spread * z, mean


def correct(
    sde: ScoreSDE, score: Field, x: Tensor, t: float, z: Tensor, method: str, snr: float, *, batch_mean: bool = False
) -> Tensor:
    """One step of a corrector, "langevin" or "ald" (annealed Langevin dynamics), at an unchanged time.

    The signal to noise ratio sets its size. With `batch_mean` norms are averaged over the batch, as in the official
    code, where a sample depends on its company.
    """
    if method not in ("langevin", "ald") or sde.kind == "subvp":
        raise SamplingError(f"there is no corrector {method!r} for {sde.kind}")
    alpha = 1 - float(sde.betas[sde.index(t)]) if sde.kind == "vp" else 1.0
    gradient, ratio = score(x, t), torch.tensor(float(sde.sigma(t))).to(x)
    if method == "langevin":
        of_noise, of_score = (v.flatten(1).norm(dim=1) for v in (z, gradient))
        ratio = of_noise.mean() / of_score.mean() if batch_mean else of_noise / of_score
    step = per_sample(2 * alpha * (snr * ratio) ** 2, x)
    return x + step * gradient + (2 * step).sqrt() * z


def sample_pc(
    sde: ScoreSDE, score: Field, x: Tensor, noise: Iterator[Tensor], *, predictor: str = "reverse_diffusion",
    corrector: str = "langevin", snr: float = 0.16, corrector_steps: int = 1, flow: bool = False,
    batch_mean: bool = False, last: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Predictor-corrector sampling over the N steps of an SDE, see `ScoreSDE.predictor` and `correct`.

    Args:
        x: (B, ...) states at t = 1.
        noise: standard normal draws like x: for each step those of the corrector, then the predictor's one, if there
            is a predictor.
        last: the time of the last step; the SDE's own where left out.

    Returns:
        The states without the last step's noise, and with it.

    Raises:
        SamplingError: VP with fewer steps than beta_1, whose chain is not defined.
    """
    if sde.kind == "vp" and sde.steps < sde.beta_1 and {predictor, corrector} - {"euler_maruyama", "none", "ald"}:
        raise SamplingError(f"a VP chain needs at least {sde.beta_1:g} steps, got {sde.steps}: its betas would pass 1")
    mean = x
    for t in np.linspace(1, sde.last if last is None else last, sde.steps, dtype=np.float32).tolist():
        for _ in range(corrector_steps if corrector != "none" else 0):
            x = correct(sde, score, x, t, next(noise), corrector, snr, batch_mean=batch_mean)
        z = next(noise) if predictor != "none" else x
        x, mean = predict(sde, score, x, t, z, predictor, flow=flow)
    return mean, x


def sample_flow(
    sde: ScoreSDE, score: Field, x: Tensor, *, tolerance: Tolerance = 1e-5, last: float | None = None,
    denoise: bool = False,
) -> Tensor:  # fmt: skip
    """Integrate the probability flow from t = 1 with an adaptive RK45; `denoise` adds one noise-free step."""
    field, end = probability_flow(sde, score), sde.last if last is None else last
    x, _ = solve_rk45(lambda y, t: (field(y, t),), x, 1.0, end, tolerance)
    return predict(sde, score, x, end, torch.zeros_like(x), "reverse_diffusion" if denoise else "none")[1]
