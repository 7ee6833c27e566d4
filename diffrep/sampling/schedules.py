"""Noise schedules and the grids of times that samplers step on.

A state at time t is `x = alpha(t) x0 + sigma(t) eps`; everything that a solver needs of t are alpha and sigma, the half
log-SNR `log(alpha / sigma)` in which exponential integrators are polynomial, and in continuous time the rates of the
flow. All numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffrep.settings import check

Array = NDArray[np.float64]
Between = Literal["log-alpha", "abar", "log-sigma"]


class SamplingError(ValueError):
    """A sampler that cannot work with a model, a schedule or these settings."""


def slope(curve: Callable[[Any], Any], t: Any) -> Any:
    """The derivative of a formula in numpy's functions, exact to rounding: the imaginary part of a step of 1e-30 i."""
    return np.imag(curve(np.asarray(t) + 1e-30j)) / 1e-30


class NoiseSchedule:
    """alpha and sigma over time. Time runs from `last` (nearly clean) up to `first` (noise), whatever its unit."""

    first: float
    last: float

    def log_alpha(self, t: Any) -> Any:
        """Of variance preserving schedules, which need say nothing else."""
        raise NotImplementedError

    def alpha(self, t: Any) -> Any:
        return np.exp(self.log_alpha(np.asarray(t)))

    def sigma(self, t: Any) -> Any:
        return np.sqrt(-np.expm1(2 * self.log_alpha(np.asarray(t))))

    def log_snr(self, t: ArrayLike) -> Array:
        """Half the logarithm of the signal to noise ratio, `log(alpha / sigma)`; falls as t rises."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))

    def time_of(self, log_snr: ArrayLike) -> Array:
        """The times with the given half log-SNR, inside `last`..`first`, by bisection."""
        wanted = np.atleast_1d(np.asarray(log_snr, np.float64))
        low, high = np.full_like(wanted, self.last), np.full_like(wanted, self.first)
        for _ in range(100):
            middle = (low + high) / 2
            noisier = self.log_snr(middle) < wanted
            low, high = np.where(noisier, low, middle), np.where(noisier, middle, high)
        return (low + high) / 2

    def rates(self, t: Any) -> tuple[Any, Any]:
        """r and h of the flow `x' = r x + h score` with these marginals; `2 |h|` is the SDE's squared diffusion."""
        rate, sigma = slope(self.alpha, t) / self.alpha(t), self.sigma(t)
        return rate, rate * sigma**2 - sigma * slope(self.sigma, t)


@dataclass(frozen=True)
class LinearVP(NoiseSchedule):
    """The continuous VP SDE with linear beta (Song et al. 2021): `log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2`."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    first: float = 1.0
    last: float = 1e-3

    def __post_init__(self) -> None:
        check(self)

    def log_alpha(self, t: Any) -> Any:
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2


class TableVP(NoiseSchedule):
    """A table of `alphas_cumprod` (T,), as diffusion checkpoints have it; times are its (fractional) indices.

    Linear between the entries is log alpha (DPM-Solver), alphas_cumprod (DEIS), or log sigma / alpha (k-diffusion).

    Raises:
        SamplingError: the table is not falling inside 0..1.
    """

    def __init__(self, alphas_cumprod: ArrayLike, *, between: Between = "log-alpha") -> None:
        table = np.asarray(alphas_cumprod, np.float64)
        if table.ndim != 1 or len(table) < 2 or not np.all(np.diff(table) < 0) or table[-1] < 0 or table[0] > 1:
            raise SamplingError("alphas_cumprod must fall from at most 1 to at least 0")
        self.table = np.clip(table, 1e-7, 1 - 1e-7) if between == "abar" else table
        self.between, self.first, self.last = between, float(len(table) - 1), 0.0

    def log_alpha(self, t: Any) -> Any:
        index = np.arange(len(self.table))
        with np.errstate(divide="ignore"):
            if self.between == "abar":
                return np.log(np.interp(t, index, self.table)) / 2
            if self.between == "log-sigma":
                return -np.logaddexp(0, np.interp(t, index, np.log1p(-self.table) - np.log(self.table))) / 2
            return np.interp(t, index, np.log(self.table) / 2)


@dataclass(frozen=True)
class Exploding(NoiseSchedule):
    """alpha = 1 and sigma = t (Karras et al. 2022; the VE SDE in the time of its sigma)."""

    first: float = 80.0
    last: float = 0.002

    def __post_init__(self) -> None:
        check(self)

    def alpha(self, t: Any) -> Any:
        return np.ones_like(t, np.float64)

    def sigma(self, t: Any) -> Any:
        return np.asarray(t)


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """alpha = 1 - t and sigma = t: rectified flow, SD3, FLUX, SiT's linear path. A network gives `eps - x0`."""

    shift: float = 1.0  # how far times are moved towards noise: `s t / (1 + (s - 1) t)`
    dynamic: tuple[float, float, float, float] | None = None  # two numbers of tokens, log of the shift at both (FLUX)
    first: float = 1.0
    last: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    def alpha(self, t: Any) -> Any:
        return 1 - np.asarray(t)

    def sigma(self, t: Any) -> Any:
        return np.asarray(t)

    def of_tokens(self, tokens: int) -> Flow:
        """The flow of images of some tokens."""
        if self.dynamic is None:
            return self
        few, many, low, high = self.dynamic
        return replace(self, shift=math.exp(low + (high - low) * (tokens - few) / (many - few)), dynamic=None)


@dataclass(frozen=True)
class TimeGrid:
    """n + 1 times from noise to data with their alpha and sigma; a solver makes n updates on them.

    Attributes:
        labels: (n,) what the network is called with at the first n times.
        log_snr: (n + 1,) log(alpha / sigma); infinite where sigma is 0.
    """

    times: Array
    alpha: Array
    sigma: Array
    labels: Array
    log_snr: Array

    @classmethod
    def of(cls, schedule: NoiseSchedule, times: ArrayLike, *, labels: ArrayLike | None = None) -> TimeGrid:
        """The grid of given times; they are the network's labels too, unless others are given.

        Raises:
            SamplingError: two times are alike, so that a step would go nowhere.
        """
        t = np.asarray(times, np.float64)
        if t.ndim != 1 or len(t) < 2 or not np.all(np.diff(t) < 0):
            raise SamplingError(f"times must fall from step to step, got {', '.join(f'{v:g}' for v in np.ravel(t))}")
        label = t[:-1] if labels is None else np.asarray(labels, np.float64)
        return cls(t, schedule.alpha(t), schedule.sigma(t), label, schedule.log_snr(t))

    def ending(self) -> TimeGrid:
        """The same grid with a clean end."""
        ends = {"alpha": 1.0, "sigma": 0.0, "log_snr": math.inf}
        return replace(self, **{name: np.append(getattr(self, name)[:-1], end) for name, end in ends.items()})

    def taken(self, indices: list[int]) -> TimeGrid:
        """The grid of some of its times, in order; one may be repeated."""
        t, a, s, log_snr = (values[indices] for values in (self.times, self.alpha, self.sigma, self.log_snr))
        return TimeGrid(t, a, s, np.append(self.labels, self.times[-1])[indices[:-1]], log_snr)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def rho(self) -> Array:
        """(n + 1,) sigma / alpha."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha


def power_spaced(first: float, last: float, count: int, power: float) -> Array:
    """`count` values from first to last, evenly spaced in their `power`-th root (Karras et al. 2022, eq. 5: 7)."""
    return np.linspace(first ** (1 / power), last ** (1 / power), count) ** power


SPACINGS = ("uniform", "quadratic", "power", "log-snr", "karras")


def spaced_times(schedule: NoiseSchedule, spacing: str, steps: int, *, power: float | None = None) -> Array:
    """(steps + 1,) times from the schedule's first to its last.

    "uniform", "quadratic" (of the root of t) or another "power" in t; "log-snr": even half log-SNR; "karras": the 7th
    root of sigma / alpha, or another power.

    Raises:
        SamplingError: no such spacing, no positive number of steps, or a first time without signal.
    """
    if spacing not in SPACINGS:
        raise SamplingError(f"spacing must be one of {', '.join(GRIDS)}, got {spacing!r}")
    if steps < 1:
        raise SamplingError(f"steps must be at least 1, got {steps}")
    first, last, count = schedule.first, schedule.last, steps + 1
    if spacing in ("uniform", "quadratic", "power"):
        return power_spaced(first, last, count, {"uniform": 1.0, "quadratic": 2.0}.get(spacing, power or 2.0))
    start, end = schedule.log_snr([first, last]).tolist()
    if not math.isfinite(start - end):
        raise SamplingError(f"spacing {spacing!r} needs a first time with signal and a last with noise")
    karras = -np.log(power_spaced(math.exp(-start), math.exp(-end), count, power or 7.0))
    inner = karras if spacing == "karras" else np.linspace(start, end, count)
    return np.array([first, *schedule.time_of(inner[1:-1]), last])


def distinct_indices(times: ArrayLike) -> Array:
    """DEIS's rule for falling fractional indices of a table whose integer parts repeat.

    In their place the distinct integer parts, and the smallest missing ones above 0 until there are as many again.
    """
    t = np.asarray(times, np.float64)
    whole = {int(v) for v in t}
    if len(whole) == len(t):
        return t
    free = (i for i in range(1, int(t.max()) + 1) if i not in whole)
    while len(whole) < len(t):
        whole.add(next(free))
    return np.array(sorted(whole, reverse=True), np.float64)


def boundary(t: Any) -> tuple[Any, Any]:
    """c_skip and c_out of f = c_skip x + c_out x0 at timesteps t: the identity at 0 (LCM, arXiv 2310.04378)."""
    scaled = 10.0 * t
    total = scaled**2 + 0.5**2
    return 0.5**2 / total, scaled / total**0.5


@dataclass(frozen=True)
class FewStepGrid:
    """A grid of "Hyperparameters are all you need" (arXiv 2510.02390), tuned on Stable Diffusion's schedule."""

    steps: int
    outer_points: int  # of a Karras grid of the power `outer_rho` with 0 behind it,
    outer_rho: float
    end_index: int  # whose entry of that number is where the last time lies
    inner_rho: float = 1.2  # power by which the times between are spaced

    def times(self, alphas_cumprod: ArrayLike) -> Array:
        """(steps + 1,) fractional timesteps. The last sigma is not 0: that noise stays in the sample."""
        k_diffusion = TableVP(alphas_cumprod, between="log-sigma")
        lowest, highest = (-k_diffusion.log_snr([0, k_diffusion.first])).tolist()
        outer = [*power_spaced(math.exp(highest), math.exp(lowest), self.outer_points, self.outer_rho), 0.0]
        with np.errstate(divide="ignore"):  # 0 lies where the table ends
            ends = k_diffusion.time_of(-np.log([outer[0], outer[self.end_index]]))
        return power_spaced(float(ends[0]), float(ends[1]), self.steps + 1, self.inner_rho)


FEW_STEP_GRIDS = {  # by their steps; tuned for first order, that of 8 for DPM-Solver++ 2M, for SDXL with outer_rho 12
    grid.steps: grid
    for grid in (FewStepGrid(4, 8, 5, 5), FewStepGrid(5, 8, 5, 6), FewStepGrid(6, 8, 5, 6), FewStepGrid(8, 12, 7, 9))
}
GRIDS = ("trailing", "leading", "linspace", "few-step", "lcm", *SPACINGS)  # where the timesteps of a table lie


def table_times(schedule: TableVP, steps: int, spacing: str = "trailing") -> Array:
    """(steps,) falling timesteps of a table, whole numbers, as diffusers spaces them; "few-step" are fractional.

    Raises:
        SamplingError: no such spacing, or two steps at one timestep.
    """
    total = len(schedule.table)
    if not 1 <= steps <= total:
        raise SamplingError(f"steps must be in 1..{total}, got {steps}")
    if spacing == "few-step":
        if steps not in FEW_STEP_GRIDS:
            raise SamplingError(f"few-step grids have {', '.join(map(str, FEW_STEP_GRIDS))} steps, got {steps}")
        return FEW_STEP_GRIDS[steps].times(schedule.table)[:-1]
    even: dict[str, Callable[[], Any]] = {
        "trailing": lambda: np.arange(total, 0, -total / steps).round() - 1,
        "leading": lambda: np.arange(steps, dtype=np.float64)[::-1] * (total // steps),
        "linspace": lambda: np.linspace(0, total - 1, steps)[::-1].round(),
        # of the 50 steps that a latent consistency model was distilled on
        "lcm": lambda: total // 50 * (50 - np.floor(np.linspace(0, 50, steps, endpoint=False))) - 1,
    }
    times: Array = even[spacing]() if spacing in even else spaced_times(schedule, spacing, steps)[:-1].round()
    if (doubled := times[1:][np.diff(times) == 0]).size:
        raise SamplingError(
            f"spacing {spacing!r} with {steps} steps meets timestep {doubled[0]:g} twice on this schedule; take another"
            " spacing or fewer steps"
        )
    return times
