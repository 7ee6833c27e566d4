"""Solvers whose increments have a memory: momentum (HB, GHVB, Nesterov) and Levenberg-Marquardt (LML)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from diffrep.sampling.core import Filter, SolverTable, Update
from diffrep.sampling.schedules import SamplingError, TimeGrid

# -- momentum -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeavyBall(Filter):
    """A running mean of the increments with share `beta` of the newest (HB); `nesterov` looks one update ahead."""

    beta: float
    nesterov: bool = False
    from_prediction: bool = True  # the mean begins with the first prediction; else with the first increment

    def first(self, predicted: Tensor) -> Tensor | None:
        return predicted if self.from_prediction else None

    def __call__(self, increment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        mean = (1 - self.beta) * memory + self.beta * increment
        return ((1 - self.beta) * mean + self.beta * increment if self.nesterov else mean), mean


def momentum_weights(order: int, beta: float) -> tuple[float, ...]:
    """Weights of the newest velocities in generalised heavy-ball steps, newest first (GHVB, table 2).

    At beta = 1 they are Adams-Bashforth's.
    """
    b = beta
    rows: dict[int, tuple[float, list[float]]] = {
        1: (1, [b]),
        2: (2, [2 + b, -(2 - b)]),
        3: (12, [18 + 5 * b, -(24 - 8 * b), 6 - b]),
        4: (24, [46 + 9 * b, -(78 - 19 * b), 42 - 5 * b, -(10 - b)]),
        5: (720, [1650 + 251 * b, -(3420 - 646 * b), 2880 - 264 * b, -(1380 - 106 * b), 270 - 19 * b]),
    }
    if order not in rows:
        raise SamplingError(f"momentum has orders up to 5, got {order}")
    divisor, row = rows[order]
    return tuple(value / divisor / b for value in row)


def momentum(grid: TimeGrid, *, method: str = "ghvb", order: float = 2.0, raw_start: bool = False) -> SolverTable:
    """Heavy ball, generalised heavy ball and Nesterov over DDIM's rho (Wizadwongsa et al. 2024).

    Args:
        method: "hb", "ghvb" or "nesterov".
        order: a whole number k is Adams-Bashforth of order k (PLMS); between k - 1 and k, method order k with beta =
            the fraction: smaller damps more.
        raw_start: the velocity starts from the network's raw output whatever it predicts, as in the released code.
    """
    beta = order - math.floor(order) or 1.0
    degree = math.ceil(order)
    if method not in ("hb", "ghvb", "nesterov") or not 1 <= degree <= 5:
        raise SamplingError(f"momentum has methods hb, ghvb and nesterov, orders above 0 to 5, got {method!r}, {order}")
    updates = []
    for i in range(grid.steps):
        scale = float(grid.alpha[i + 1]) * float(grid.rho[i + 1] - grid.rho[i])
        weights = momentum_weights(min(degree, i + 1), beta if method == "ghvb" else 1.0)
        updates.append(Update("noise", float(grid.alpha[i + 1] / grid.alpha[i]), weights, scale))
    table = SolverTable(f"{method.upper()} {order:g}", grid, tuple(updates), raw_start=raw_start)
    if method == "ghvb":
        return replace(table, smoothing=beta)
    return replace(table, filter=HeavyBall(beta, nesterov=method == "nesterov"))


def with_momentum(table: SolverTable, beta: float) -> SolverTable:
    """DPM-Solver++ 2M or UniPC with heavy-ball momentum, as the released code has it.

    DPM-Solver++ averages the increments of its second-order steps, as multiples of the clean sample. Of UniPC only the
    corrector has momentum, and it averages multiples of the clean sample over sigma at the step's end.

    Args:
        table: of `dpm_solver` or `unipc`, data form.
        beta: share of the newest increment; 1: the solver itself.
    """

    def averaged(update: Update, filtered: bool, unit: float) -> Update:
        total = sum(update.direction) * unit
        direction = tuple(w / total for w in update.direction)
        return replace(update, direction=direction, scale=update.scale * total, filtered=filtered)

    corrected = any(table.correctors)
    sigma = table.grid.sigma.tolist()
    return replace(
        table,
        name=f"{table.name} with HB {beta:g}",
        updates=tuple(averaged(u, len(u.direction) > 1 and not corrected, 1.0) for u in table.updates),
        correctors=tuple(c and averaged(c, True, end) for c, end in zip(table.correctors, sigma[1:], strict=False)),
        filter=HeavyBall(beta, from_prediction=False),
    )


# -- Levenberg-Marquardt-Langevin -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LevenbergMarquardt(Filter):
    """LML's correction of an increment (Wang et al. 2025). At the published kappa = 0 it does nothing but round.

    Attributes:
        damping: lambda; kappa: share of the previous raw increment in the direction that is damped.
    """

    damping: float = 1e-3
    kappa: float = 0.0
    whole = True
    watches = True

    def __call__(self, increment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The first increment is its own memory: then, as at kappa 0, the correction only rounds."""

        def product(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

        mixed = increment if memory is increment else self.kappa * memory + (1 - self.kappa) * increment
        turned = increment - mixed * product(mixed, increment) / (self.damping + product(mixed, mixed))
        return turned * product(increment, increment).sqrt() / product(turned, turned).sqrt(), increment


def with_levenberg_marquardt(
    table: SolverTable, damping: float, kappa: float, *, split: bool = False, until: float = math.inf
) -> SolverTable:
    """A solver whose increments LML corrects.

    Args:
        split: only the predicted noise is corrected where it is added, as in DDIM's released version; else the
            increment beside the carried state, or a flow's velocity.
        until: only at labels below this one.
    """
    updates = []
    for i, update in enumerate(table.updates):
        if split:
            clean = -update.carry * float(table.grid.sigma[i])
            update = replace(update, fixed=(clean,), direction=(1.0,), scale=update.direction[0] - clean)
        elif update.form != "velocity":
            update = replace(update, direction=tuple(w * update.scale for w in update.direction), scale=1.0)
        updates.append(replace(update, filtered=float(table.grid.labels[i]) < until))
    return replace(
        table, name=f"{table.name} with LML", updates=tuple(updates), filter=LevenbergMarquardt(damping, kappa)
    )
