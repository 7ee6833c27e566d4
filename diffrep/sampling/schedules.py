"""Noise schedules and the grids of times that samplers step on.

A state at time t is `x = alpha(t) x0 + sigma(t) eps`; everything that a solver needs of t are alpha and sigma, and the
half log-SNR `log(alpha / sigma)` in which exponential integrators are polynomial. All numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Between = Literal["log-alpha", "abar", "log-sigma"]


class SamplingError(ValueError):
    """A sampler that cannot work with a model, a schedule or these settings; the message says why in one line."""


class NoiseSchedule:
    """alpha and sigma over time. Time runs from `last` (nearly clean) up to `first` (noise), whatever its unit.

    Attributes:
        first, last: the times at which sampling starts and ends when nothing else is said.
        kind: "variance preserving" (alpha^2 + sigma^2 = 1), "exploding" (alpha = 1), "flow" (alpha = 1 - sigma) or
            "mean reverting".
    """

    kind = "variance preserving"
    first: float
    last: float

    def log_alpha(self, t: Array) -> Array:
        raise NotImplementedError

    def alpha(self, t: ArrayLike) -> Array:
        """The factor of the clean sample."""
        return np.exp(self.log_alpha(np.asarray(t, np.float64)))

    def sigma(self, t: ArrayLike) -> Array:
        """The factor of the noise."""
        return np.sqrt(-np.expm1(2 * self.log_alpha(np.asarray(t, np.float64))))

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


@dataclass(frozen=True)
class LinearVP(NoiseSchedule):
    """The continuous VP SDE with linear beta (Song et al. 2021): `log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2`."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    first: float = 1.0
    last: float = 1e-3

    def log_alpha(self, t: Array) -> Array:
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2


@dataclass(frozen=True)
class CosineVP(NoiseSchedule):
    """The continuous cosine schedule, `abar = cos^2((t + s) / (1 + s) pi / 2)` (Nichol & Dhariwal 2021).

    It ends before t = 1, where alpha is 0.
    """

    offset: float = 0.008
    first: float = 0.98
    last: float = 1e-3

    def log_alpha(self, t: Array) -> Array:
        return np.log(np.cos((t + self.offset) / (1 + self.offset) * math.pi / 2))


class TableVP(NoiseSchedule):
    """A table of `alphas_cumprod`, as diffusion checkpoints have it; times are its (fractional) indices.

    Args:
        alphas_cumprod: (T,) falling, in 0..1.
        between: what is linear between the entries: log alpha (DPM-Solver), alphas_cumprod (DEIS), or log sigma / alpha
            (k-diffusion).

    Raises:
        SamplingError: the table is not falling inside 0..1.
    """

    def __init__(self, alphas_cumprod: ArrayLike, *, between: Between = "log-alpha") -> None:
        table = np.asarray(alphas_cumprod, np.float64)
        if table.ndim != 1 or len(table) < 2 or not np.all(np.diff(table) < 0) or table[-1] < 0 or table[0] > 1:
            raise SamplingError("alphas_cumprod must fall from at most 1 to at least 0")
        self.table = np.clip(table, 1e-7, 1 - 1e-7) if between == "abar" else table
        self.between, self.first, self.last = between, float(len(table) - 1), 0.0

    def log_alpha(self, t: Array) -> Array:
        index = np.arange(len(self.table))
        if self.between == "abar":
            return np.log(np.interp(t, index, self.table)) / 2
        with np.errstate(divide="ignore"):
            if self.between == "log-sigma":
                log_ratio = np.interp(t, index, np.log1p(-self.table) - np.log(self.table))
                return -np.logaddexp(0, log_ratio) / 2
            return np.interp(t, index, np.log(self.table) / 2)


@dataclass(frozen=True)
class Exploding(NoiseSchedule):
    """alpha = 1 and sigma = t (Karras et al. 2022; the VE SDE in the time of its sigma)."""

    first: float = 80.0
    last: float = 0.002
    kind = "exploding"

    def alpha(self, t: ArrayLike) -> Array:
        return np.ones_like(np.asarray(t, np.float64))

    def sigma(self, t: ArrayLike) -> Array:
        return np.asarray(t, np.float64)


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """alpha = 1 - t and sigma = t: rectified flow, SD3, FLUX, SiT's linear path. A network gives `eps - x0`.

    Attributes:
        shift: how far times are moved towards noise: `s t / (1 + (s - 1) t)`.
    """

    shift: float = 1.0
    first: float = 1.0
    last: float = 0.0
    kind = "flow"

    def alpha(self, t: ArrayLike) -> Array:
        return 1 - np.asarray(t, np.float64)

    def sigma(self, t: ArrayLike) -> Array:
        return np.asarray(t, np.float64)


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

    def ending(self, *, alpha: float = 1.0, sigma: float = 0.0) -> TimeGrid:
        """The same grid with other values at its end, as a scheduler's "final alpha" sets them; 1 and 0 are clean."""
        log_snr = math.log(alpha / sigma) if sigma else math.inf
        ends = ((self.alpha, alpha), (self.sigma, sigma), (self.log_snr, log_snr))
        changed = [np.append(values[:-1], end) for values, end in ends]
        return TimeGrid(self.times, changed[0], changed[1], self.labels, changed[2])

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def rho(self) -> Array:
        """(n + 1,) sigma / alpha."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha


# -- where the times lie --------------------------------------------------------------------------------------


def power_spaced(first: float, last: float, count: int, power: float) -> Array:
    """`count` values from first to last, evenly spaced in their `power`-th root (Karras et al. 2022, eq. 5: 7)."""
    ends = [value ** (1 / power) for value in (first, last)]
    return np.linspace(ends[0], ends[1], count) ** power


def spaced_times(schedule: NoiseSchedule, spacing: str, steps: int, *, power: float | None = None) -> Array:
    """(steps + 1,) times from the schedule's first to its last.

    Args:
        spacing: "uniform", "quadratic" (of the root of t) or "power" in t; "log-snr" (even half log-SNR); "karras" (the
            7th root of sigma / alpha, or another power).

    Raises:
        SamplingError: no such spacing, no positive number of steps, or a first time without signal.
    """
    if steps < 1:
        raise SamplingError(f"steps must be at least 1, got {steps}")
    first, last = schedule.first, schedule.last
    if spacing in ("uniform", "quadratic", "power"):
        return power_spaced(first, last, steps + 1, {"uniform": 1.0, "quadratic": 2.0}.get(spacing, power or 2.0))
    if spacing not in ("log-snr", "karras"):
        raise SamplingError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    ends = schedule.log_snr([first, last])
    if not np.all(np.isfinite(ends)):
        raise SamplingError(f"spacing {spacing!r} needs a first time with signal and a last with noise")
    if spacing == "log-snr":
        inner = np.linspace(ends[0], ends[1], steps + 1)
    else:
        inner = -np.log(power_spaced(math.exp(-ends[0]), math.exp(-ends[1]), steps + 1, power or 7.0))
    return np.array([first, *schedule.time_of(inner[1:-1]), last])


SPACINGS = ("uniform", "quadratic", "power", "log-snr", "karras")


def distinct_indices(times: ArrayLike) -> Array:
    """Falling fractional indices of a table; where their integer parts repeat, distinct integers in their place.

    DEIS's rule: the distinct integer parts, and the smallest missing integers above 0 until there are as many again.
    """
    t = np.asarray(times, np.float64)
    whole = {int(v) for v in t}
    if len(whole) == len(t):
        return t
    free = (i for i in range(1, int(t.max()) + 1) if i not in whole)
    while len(whole) < len(t):
        whole.add(next(free))
    return np.array(sorted(whole, reverse=True), np.float64)


@dataclass(frozen=True)
class FewStepGrid:
    """One of the grids of "Hyperparameters are all you need" (arXiv 2510.02390), tuned on Stable Diffusion's schedule.

    A Karras grid of `outer_points` sigmas with 0 behind it says where the last time lies (its entry `end_index`); the
    times between are spaced by the power `inner_rho`.
    """

    steps: int
    outer_points: int
    outer_rho: float
    end_index: int
    inner_rho: float = 1.2

    def times(self, alphas_cumprod: ArrayLike) -> Array:
        """(steps + 1,) fractional timesteps. The last sigma is not 0: that noise stays in the sample."""
        k_diffusion = TableVP(alphas_cumprod, between="log-sigma")
        lowest, highest = (-k_diffusion.log_snr([0, k_diffusion.first])).tolist()
        outer = power_spaced(math.exp(highest), math.exp(lowest), self.outer_points, self.outer_rho)
        ends = k_diffusion.time_of(-np.log(outer[[0, self.end_index]]))
        return power_spaced(float(ends[0]), float(ends[1]), self.steps + 1, self.inner_rho)


FEW_STEP_GRIDS: dict[str, tuple[FewStepGrid, int]] = {  # with the order of the DPM-Solver++ that it was tuned for
    "sd-4": (FewStepGrid(4, 8, 5, 5), 1),
    "sd-5": (FewStepGrid(5, 8, 5, 6), 1),
    "sd-6": (FewStepGrid(6, 8, 5, 6), 1),
    "sd-8": (FewStepGrid(8, 12, 7, 9), 2),
    "sdxl-8": (FewStepGrid(8, 12, 12, 9), 2),
}


def integrate(function: Callable[[Array], Array], start: float, stop: float, *, pieces: int = 8) -> Array:
    """The integral of a function over [start, stop] by 16 Gauss-Legendre nodes on each of some pieces.

    Args:
        function: takes (n,) places and returns (..., n) values.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(start, stop, pieces + 1)
    half = np.diff(edges)[:, None] / 2
    places = (edges[:-1, None] + half) + half * nodes
    return function(places.ravel()) @ (half * weights).ravel()


def lagrange(points: ArrayLike, places: Array) -> Array:
    """(n, places) values of the n Lagrange polynomials of n points."""
    x = np.asarray(points, np.float64)
    rows = []
    for j, own in enumerate(x):
        others = np.delete(x, j)
        rows.append(np.prod((places[None] - others[:, None]) / (own - others)[:, None], axis=0))
    return np.array(rows)
