"""Mean-reverting diffusion (IR-SDE) and its fast samplers (MRS, ICLR 2025): DPM-Solver on the distance to the mean.

The state reverts to a degraded image mu, `x = a x0 + (1 - a) mu + s eps`; so `y = x - (1 - a) mu` is an ordinary
diffusion of x0, and every solver of `diffrep.sampling` samples it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from diffrep.sampling.core import Form, SolverTable, clamped, run, to_forms
from diffrep.sampling.schedules import Array, NoiseSchedule, SamplingError, TimeGrid, power_spaced
from diffrep.sampling.solvers import exponential, multistep


class MeanReverting(NoiseSchedule):
    """The schedule of IR-SDE (Luo et al. 2023); times are indices 0..T of its tables, linear between them.

    Args:
        max_sigma: standard deviation of the noise far from the image, in 1/255 from 1 on, else of images in 0..1.
        steps: T.
        schedule: how the speed of reversion changes: "cosine", "linear" or "constant".
        eps: what is left of the image at T.

    Raises:
        SamplingError: no such schedule.
    """

    def __init__(
        self, max_sigma: float = 50.0, *, steps: int = 100, schedule: str = "cosine", eps: float = 0.005
    ) -> None:
        count = steps + 1
        fall = np.cos((np.linspace(0, 1, count + 2) + 0.008) / 1.008 * math.pi / 2) ** 2
        speeds = {
            "cosine": 1 - (fall / fall[0])[1:-1],
            "linear": np.linspace(1000 / count * 1e-4, 1000 / count * 0.02, count),
            "constant": np.ones(count),
        }
        if schedule not in speeds:
            raise SamplingError(f"schedule must be one of {', '.join(speeds)}, got {schedule!r}")
        self.thetas, reversion = speeds[schedule], np.cumsum(speeds[schedule])
        self.stationary = max_sigma / 255 if max_sigma >= 1 else max_sigma
        self.alphas = np.exp(-reversion * -math.log(eps) / reversion[-1])
        self.sigmas = self.stationary * np.sqrt(1 - self.alphas**2)
        self.first, self.last = float(steps), 0.0

    def alpha(self, t: ArrayLike) -> Array:
        return self._between(t, self.alphas)

    def sigma(self, t: ArrayLike) -> Array:
        return self._between(t, self.sigmas)

    def log_snr(self, t: ArrayLike) -> Array:
        return self._between(t, np.log(self.alphas / self.sigmas))

    def _between(self, t: ArrayLike, values: Array) -> Array:
        return np.interp(np.asarray(t, np.float64), np.arange(len(values)), values)

    def times(self, spacing: str, steps: int, *, lowest: float = -5.0) -> Array:
        """(steps + 1,) fractional indices, falling.

        Args:
            spacing: even in the index ("linspace" from end to end, "leading" in whole indices, "trailing" without the
                last of one more), in the 7th root of sigma / alpha ("karras-n") or of the index down to 1 ("karras-t"),
                or in log-SNR ("linear-lambda").
            lowest: half log-SNR below which no time lies.
        """
        log_snr, index, count = np.log(self.alphas / self.sigmas), np.arange(len(self.alphas)), steps + 1
        first, rho = self.first - int((log_snr < lowest).sum()), np.exp(-log_snr)
        spacings: dict[str, Callable[[], Array]] = {
            "linspace": lambda: np.linspace(first, 0, count),
            "leading": lambda: np.arange(count, dtype=np.float64)[::-1] * (first // count),
            "trailing": lambda: np.arange(first, 0, -self.first / count, dtype=np.float64)[:count],
            "karras-t": lambda: power_spaced(self.first, 1.0, count, 7.0),
            "karras-n": lambda: np.interp(power_spaced(rho[-1], rho[0], count, 7.0), rho, index),
            "linear-lambda": lambda: np.interp(
                np.linspace(max(log_snr[-1], lowest), log_snr[0], count), log_snr[::-1], index[::-1]
            ),
        }
        if spacing not in spacings:
            raise SamplingError(f"mean reversion has the spacings {', '.join(spacings)}, not {spacing!r}")
        return spacings[spacing]()


def mrs_table(grid: TimeGrid, *, order: int = 2, form: Form = "data", noisy: bool = False) -> SolverTable:
    """The table of MRS (ICLR 2025): DPM-Solver(++) with the exact second order and the published third.

    With fewer than 10 steps orders fall behind the first ones, but for the very last, which is of full order, as
    released.
    """
    if not 1 <= order <= (2 if noisy else 3):
        raise SamplingError(f"MRS has orders 1 to {'2 with noise' if noisy else 3}, got {order}")
    n = grid.steps
    falling = range(order - 1, n - 1 if n < 10 else 0)
    orders = [min(order, i + 1, n - i - 1 if i in falling else order) for i in range(n)]
    table = multistep(grid, order=orders, form=form, relaxation=None, noisy=noisy, final=False)
    return replace(table, name=f"MRS-{order}")


def sample_mean_reverting(
    schedule: MeanReverting, table: SolverTable, network: Callable[[Tensor, float], Tensor], mean: Tensor,
    start: Tensor, *, target: Literal["noise", "data", "velocity"] = "noise", noise: Sequence[Tensor] | None = None,
    denoise_last: bool = False, thresholding: bool = False,
) -> Tensor:  # fmt: skip
    """Restore a degraded image: any solver, on the distance to the mean that the state reverts to.

    Args:
        network: from (x, index) to the noise, the clean image, or the velocity `a (x - (1 - a) mu) ...` of IR-SDE.
        mean: (B, C, H, W) the degraded images mu, in 0..1.
        start: `mean` plus the stationary noise.
        target: what the network gives.
        noise: standard normal noise of each step, for tables that add some.
        denoise_last: end at the clean image of the last call instead of the last time.
        thresholding: what the table is linear in, clean images or, as released, the noise, is cut off at its quantile
            of .995, within 1 and 1.5, and divided by it.

    Returns:
        (B, C, H, W) in 0..1.

    Raises:
        SamplingError: no such target.
    """
    grid, form, far = table.grid, table.updates[0].form, schedule.stationary
    kinds = {"noise": "epsilon", "data": "sample"}
    if target not in (*kinds, "velocity"):
        raise SamplingError(f"a mean-reverting network gives noise, data or velocity, not {target!r}")

    def shifted(y: Tensor, t: float) -> Tensor:
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        x = y + (1 - a) * mean
        output = network(x, t)
        if target != "velocity":
            output = to_forms(kinds[target], output, y, a, s)[form]
        elif form == "noise":
            output = (a * output + s / far * (x - mean)) / far
        else:
            output = a * x - s / far * output + (1 - a) * mean
        return clamped(output, "dynamic", most=1.5) if thresholding else output

    if denoise_last:
        clean = exponential(grid.ending(), grid.steps - 1, grid.steps, "data")
        table = replace(table, grid=grid.ending(), updates=(*table.updates[:-1], clean))
    y = run(table, shifted, start - (1 - float(grid.alpha[0])) * mean, prediction=kinds[form], noise=noise)
    return (y + (1 - float(table.grid.alpha[-1])) * mean).clamp(0, 1)
