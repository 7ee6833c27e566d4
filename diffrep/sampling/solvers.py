"""The solvers of the field, each as a few lines that fill a table: a function from a `TimeGrid` to a `SolverTable`.

Three ideas make all of them: an exponential integrator over log-SNR with derivatives from earlier predictions
(DPM-Solver, UniPC, USF), Adams-Bashforth and Runge-Kutta rules in other variables (DEIS, iPNDM, momentum), and
increments with a memory (heavy ball, LML).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from diffrep.sampling.core import Clamp, Filter, Form, SolverTable, Update, over_sample
from diffrep.sampling.schedules import Array, NoiseSchedule, SamplingError, TimeGrid

# -- exponential integrators ----------------------------------------------------------------------------------


def phi(order: int, z: float) -> float:
    """The phi functions of exponential integrators: `phi_1(z) = (e^z - 1) / z`, `phi_k+1 = (phi_k - 1/k!) / z`."""
    if abs(z) < 0.5:  # the recursion loses digits near 0
        return sum(z**n / math.factorial(n + order) for n in range(20))
    value = math.expm1(z) / z
    for k in range(1, order):
        value = (value - 1 / math.factorial(k)) / z
    return value


def derivative_weights(distances: Sequence[float], order: int) -> Array:
    """Weights c with which `sum c_i (f(d_i) - f(0))` is the derivative of an order at 0.

    It is exact for polynomials up to as many degrees as there are distances d_i.
    """
    d, powers = np.asarray(distances, np.float64), np.arange(1, len(distances) + 1)
    matrix = d[None] ** powers[:, None] / np.array([math.factorial(j) for j in powers])[:, None]
    return np.linalg.solve(matrix, (powers == order).astype(np.float64))


RELAXATIONS: dict[str, Callable[[float, float, float, float, float], float]] = {
    # of the first derivative's factor (USF, app. B): of (that factor, the newest prediction's, h, z = +-h, coefficient)
    "dpmsolver-2": lambda factor, first, h, z, c: first * h / 2,
    "unipc-bh2": lambda factor, first, h, z, c: first * h / 2,
    "unipc-bh1": lambda factor, first, h, z, c: h**2 / 2,
    "0.5exp": lambda factor, first, h, z, c: factor * (1 + math.expm1(z) / 2),
    "-0.5exp": lambda factor, first, h, z, c: factor * (1 - math.expm1(z) / 2),
    "linear": lambda factor, first, h, z, c: factor * (1 + c * h),
}


@dataclass(frozen=True)
class Derivative:
    """How a derivative of the prediction over log-SNR is estimated."""

    points: tuple[int, ...]  # earlier predictions that it is made of, counted back from the newest, -1
    relaxation: str | None = None  # a name of `RELAXATIONS`
    coefficient: float = 0.0  # of the relaxation "linear"


def exponential(
    grid: TimeGrid, newest: int, target: int, form: Form, derivatives: Sequence[Derivative] = (), *,
    start: int = -1, halved: bool = False, noisy: bool = False,
) -> Update:  # fmt: skip
    """One step of an exponential integrator over log-SNR.

    Noise form: `x_t = (a_t / a_s) x_s - s_t sum_k h^(k+1) phi_k+1(h) N_k`; data form: `x_t = (s_t / s_s) x_s + a_t
    sum_k h^(k+1) phi_k+1(-h) D_k`, with N_k, D_k the k-th derivatives at the start.

    Args:
        newest, target: indices of the times of the newest prediction, and to go to.
        derivatives: of order 1, 2, ...; none: DDIM.
        start: the state and prediction it starts from, counted back from the newest, -1.
        halved: the widespread third-order update, whose second-derivative term is half of the exact one.
        noisy: the reverse SDE's step instead of the ODE's (SDE-DPM-Solver++, first or second order).
    """
    a, s, log_snr, begin = grid.alpha, grid.sigma, grid.log_snr, newest + 1 + start
    h = float(log_snr[target] - log_snr[begin])
    if derivatives and (not math.isfinite(h) or (noisy and len(derivatives) > 1)):
        raise SamplingError("steps without signal, to no noise, or third-order steps with noise must be of lower order")
    if not math.isfinite(h):
        return ddim(grid, begin, target, form)
    z = h if form == "noise" else -h
    factors = [h ** (k + 1) * phi(k + 1, z) / (2 if halved and k == 2 else 1) for k in range(len(derivatives) + 1)]
    if noisy and form == "data":
        factors = [-math.expm1(-2 * h), h + math.expm1(-2 * h) / 2][: len(factors)]
    elif noisy:
        factors = [2 * math.expm1(h), 2 * (math.expm1(h) - h)][: len(factors)]
    weights = np.zeros(newest + 1)
    weights[newest - begin] = factors[0]
    for k, (derivative, factor) in enumerate(zip(derivatives, factors[1:], strict=True), 1):
        if derivative.relaxation:
            factor = RELAXATIONS[derivative.relaxation](factor, factors[0], h, z, derivative.coefficient)
        places = [newest + 1 + point for point in derivative.points]
        shares = factor * derivative_weights([float(log_snr[i] - log_snr[begin]) for i in places], k)
        np.add.at(weights, [newest - i for i in places], shares)
        weights[newest - begin] -= shares.sum()
    if form == "noise":
        carry, scale, spread = a[target] / a[begin], -s[target], math.sqrt(max(math.expm1(2 * h), 0.0))
    else:
        carry, scale, spread = s[target] / s[begin], a[target], math.sqrt(max(-math.expm1(-2 * h), 0.0))
        carry *= math.exp(-h) if noisy else 1
    noise = float(s[target]) * spread if noisy else 0.0
    direction = tuple(np.trim_zeros(weights, "b").tolist())
    return Update(form, float(carry), direction, float(scale), start=start, noise=noise)


def ddim(grid: TimeGrid, begin: int, target: int, form: Form = "noise", *, noise: float = 0.0) -> Update:
    """DDIM's step; `noise` is the standard deviation of what is added in place of as much of the predicted noise."""
    (a, b), (s, t) = (values[[begin, target]].tolist() for values in (grid.alpha, grid.sigma))
    rest = math.sqrt(max(t**2 - noise**2, 0.0))
    if form == "velocity":
        return Update(form, 1.0, (1.0,), t - s)
    carry = rest / s if form == "data" else b / a
    return Update(form, carry, (b - carry * a if form == "data" else rest - carry * s,), noise=noise)


def ddim_table(grid: TimeGrid, *, form: Form = "noise", eta: float = 0.0) -> SolverTable:
    """DDIM (Song et al. 2021), or with form "velocity" the Euler steps of a flow.

    `eta` is the share of the noise of ancestral sampling that each step adds; 1: DDPM with its smaller variance.
    """
    updates = []
    for i in range(grid.steps):
        now, after = np.exp(2 * grid.log_snr[[i, i + 1]])
        variance = max(float(grid.sigma[i + 1] ** 2 * (1 - now / after)), 0.0)
        updates.append(ddim(grid, i, i + 1, form, noise=eta * math.sqrt(variance)))
    return SolverTable("Euler" if form == "velocity" else "DDIM", grid, tuple(updates))


def multistep(
    grid: TimeGrid, *, order: int | Sequence[int] = 2, form: Form = "data", relaxation: str | None = "dpmsolver-2",
    corrected: bool = False, noisy: bool = False, final: bool | None = None, exact: bool = False,
) -> SolverTable:  # fmt: skip
    """Steps of some order from the newest predictions.

    DPM-Solver (form "noise") and DPM-Solver++ ("data"; Lu et al. 2022) as it is, with the relaxation "dpmsolver-2"
    their "midpoint" variant; UniPC (Zhao et al. 2023) corrected, with the relaxation "unipc-bh1", "unipc-bh2" or none
    ("vary"); MRS with the released orders and no relaxation.

    Args:
        order: of all steps, or one for each step, of a search for example.
        relaxation: of second-order steps, and of correctors of first-order ones.
        corrected: each step but the last is made again with one order more once the network has answered at its end.
        noisy: the reverse SDE's steps.
        final: lower orders in the last steps; None: with fewer than 15 steps, as DPM-Solver, or always, as UniPC.
        exact: the exact third order, as UniPC's, in place of the published one with half its second-derivative term.

    Raises:
        SamplingError: an order that there is not.
    """
    several, largest = (tuple(order) if isinstance(order, Sequence) else grid.steps * (order,)), np.max(order)
    if len(several) != grid.steps or min(several) < 1 or (largest > (2 if noisy else 3) and not corrected):
        raise SamplingError(f"orders are 1 to 3 (2 with noise), one for each of {grid.steps} steps, got {order}")
    final, usable = corrected or grid.steps < 15 if final is None else final, np.isfinite(grid.log_snr).cumsum()
    updates, correctors = [], list[Update | None]()
    for i, wanted in enumerate(several):
        n = max(1, min(wanted, int(usable[i]), grid.steps - i if final else wanted))
        n = 1 if grid.sigma[i + 1] == 0 else n  # as many predictions as there are, those without any signal apart
        derivatives = [Derivative(tuple(range(-2, -1 - n, -1)), relaxation if n == 2 else None)] * (n - 1)
        updates.append(exponential(grid, i, i + 1, form, derivatives, halved=not (exact or corrected), noisy=noisy))
        points = (*range(-3, -2 - n, -1), -1)
        again = [Derivative(points, relaxation if n == 1 else None)] + [Derivative(points)] * (n - 1)
        last = i + 1 == grid.steps or not np.isfinite(grid.log_snr[i])
        correctors.append(None if last or not corrected else exponential(grid, i + 1, i + 1, form, again, start=-2))
    name = f"UniPC-{largest}" if corrected else f"DPM-Solver{'++' if form == 'data' else ''} {largest}M"
    return SolverTable(name, grid, tuple(updates), tuple(correctors) if corrected else ())


def unified(
    grid: TimeGrid, *, orders: Sequence[int], forms: Sequence[Form], derivatives: Sequence[Sequence[Derivative]],
    starts: Sequence[int] | None = None, correctors: Sequence[Sequence[Derivative] | None] | None = None,
    clamp: Clamp | None = None, afs: str | None = None,
) -> SolverTable:  # fmt: skip
    """A solver as USF writes it (Liu et al. 2024): decisions of its own for every step.

    Args:
        orders, forms: Taylor order and "noise" or "data" of each step.
        derivatives: for each step, one estimate for each derivative up to its order.
        starts: where each step begins, counted back from the newest state; -1 where left out.
        correctors: for each step the estimates with which it is made again at its end; None: not.
        clamp, afs: see `SolverTable`.

    Raises:
        SamplingError: the lists do not fit the grid's steps, or a step has fewer estimates than its order needs.
    """
    n = grid.steps
    lists = (orders, forms, derivatives, starts or [-1] * n, correctors or [None] * n)
    short = any(len(estimates) < order - 1 for order, estimates in zip(orders, derivatives, strict=False))
    if short or any(len(values) != n for values in lists):
        raise SamplingError(f"each of {n} steps has one decision of a kind, and estimates of its order's derivatives")
    updates, again = [], []
    for i, (order, form, estimates, start, corrector) in enumerate(zip(*lists, strict=True)):
        updates.append(exponential(grid, i, i + 1, form, list(estimates)[: order - 1], start=start))
        again.append(None if corrector is None else exponential(grid, i + 1, i + 1, form, corrector, start=-2))
    return SolverTable("USF", grid, tuple(updates), tuple(again), clamp=clamp, afs=afs)


# -- Adams-Bashforth and Runge-Kutta in other variables -------------------------------------------------------


def integrate(function: Callable[[Array], Array], start: float, stop: float, *, pieces: int = 8) -> Array:
    """The integral over [start, stop] of a function from (n,) places to (..., n) values, by Gauss-Legendre pieces."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(start, stop, pieces + 1)
    half = np.diff(edges)[:, None] / 2
    return function(((edges[:-1, None] + half) + half * nodes).ravel()) @ (half * weights).ravel()


def lagrange(points: Array, places: Array) -> Array:
    """(n, places) values of the n Lagrange polynomials of n points."""
    others = [np.delete(points, j)[:, None] for j in range(len(points))]
    return np.array([np.prod((places - o) / (x - o), axis=0) for x, o in zip(points, others, strict=True)])


def deis(grid: TimeGrid, schedule: NoiseSchedule, *, order: int = 3, variable: str = "t") -> SolverTable:
    """DEIS (Zhang & Chen 2023): `x_t = (a_t / a_s) x_s + a_t sum_j (integral of L_j d rho) eps_j`, exact quadrature.

    Args:
        order: degree of the polynomial; 0 is DDIM.
        variable: what the Lagrange polynomials L_j are polynomials of: "t" (tAB), "rho" (rhoAB) or "log-snr" (the
            variant that diffusers has).
    """
    variables: dict[str, tuple[Array, Callable[[Array], Array]]] = {  # on the grid, and of -log rho
        "t": (grid.times, schedule.time_of),
        "rho": (grid.rho, lambda log_snr: np.exp(-log_snr)),
        "log-snr": (grid.log_snr, lambda log_snr: log_snr),
    }
    if variable not in variables or order < 0:
        raise SamplingError(f"DEIS has orders from 0 and the variables t, rho and log-snr, got {order}, {variable!r}")
    updates, (values, of_log_snr) = [], variables[variable]
    for i in range(grid.steps):
        if grid.sigma[i + 1] == 0:
            updates.append(ddim(grid, i, i + 1))
            continue
        points = values[max(i - order, 0) : i + 1][::-1]

        def weighted(log_rho: Array, points: Array = points) -> Array:
            return lagrange(points, of_log_snr(-log_rho)) * np.exp(log_rho)

        integrals = integrate(weighted, *(-grid.log_snr[i : i + 2]).tolist())
        updates.append(
            Update("noise", float(grid.alpha[i + 1] / grid.alpha[i]), tuple((grid.alpha[i + 1] * integrals).tolist()))
        )
    return SolverTable(f"DEIS {variable}AB-{order}", grid, tuple(updates))


def ipndm(grid: TimeGrid, *, order: int = 4) -> SolverTable:
    """iPNDM: DDIM on an Adams-Bashforth mean of the last noises, whatever the steps' sizes (Liu et al. 2022; DEIS)."""
    if not 1 <= order <= 4:
        raise SamplingError(f"iPNDM has orders 1 to 4, got {order}")
    steps = [ddim(grid, i, i + 1) for i in range(grid.steps)]
    rows = [momentum_weights(min(order, i + 1), 1.0) for i in range(grid.steps)]
    updates = [replace(s, direction=row, scale=s.direction[0]) for s, row in zip(steps, rows, strict=True)]
    return SolverTable(f"iPNDM-{order}", grid, tuple(updates))


Tableau = tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]
RUNGE_KUTTA: dict[str, Tableau] = {
    "1euler": ((), (), (1.0,)),  # nodes after 0, rows of the tableau after the first, weights
    "2midpoint": ((0.5,), ((0.5,),), (0.0, 1.0)),
    "2heun": ((1.0,), ((1.0,),), (0.5, 0.5)),
    "3kutta": ((0.5, 1.0), ((0.5,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
    "3ral": ((0.5, 0.75), ((0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9)),
    "3heun": ((1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "3vdh": ((8 / 15, 2 / 3), ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "3ssprk": ((1.0, 0.5), ((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "4rk": ((0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "4three-eighths": ((1 / 3, 2 / 3, 1.0), ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


def rho_runge_kutta(grid: TimeGrid, schedule: NoiseSchedule, *, method: str = "3kutta") -> SolverTable:
    """rhoRK-DEIS: Runge-Kutta on `d(x / a) / d rho = eps`; the table has one step for each call of the network."""
    if method not in RUNGE_KUTTA:
        raise SamplingError(f"method must be one of {', '.join(RUNGE_KUTTA)}, got {method!r}")
    nodes, tableau, weights = RUNGE_KUTTA[method]
    times, updates, rho, clean = [float(grid.times[0])], list[Update](), grid.rho, grid.sigma[-1] == 0
    for i in range(grid.steps):
        if grid.sigma[i + 1] == 0:  # no network is called without noise: straight to the clean prediction
            times.append(float(grid.times[i + 1]))
            updates.append(ddim(grid, i, i + 1))
            continue
        jump = float(rho[i + 1] - rho[i])
        inner = schedule.time_of(-np.log(rho[i] + np.array(nodes) * jump)).tolist() if nodes else []
        for stage, (t, row) in enumerate(zip((*inner, float(grid.times[i + 1])), (*tableau, weights), strict=True)):
            times.append(t)
            a = float(schedule.alpha(t))
            slopes = tuple(a * jump * w for w in reversed(row))
            updates.append(Update("noise", a / float(grid.alpha[i]), slopes, start=-1 - stage))
    at, t = (np.array(times), schedule.alpha(times), schedule.sigma(times)), np.array(times[:-1])
    stages = TimeGrid(*at, t, schedule.log_snr(times))
    return SolverTable(f"rhoRK-{method}", stages.ending() if clean else stages, tuple(updates))


# -- increments with a memory ---------------------------------------------------------------------------------


def heavy_ball(beta: float, *, nesterov: bool = False, from_prediction: bool = True) -> Filter:
    """A running mean of the increments with share `beta` of the newest (HB); `nesterov` looks one update ahead."""

    def act(increment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        mean = (1 - beta) * memory + beta * increment
        return ((1 - beta) * mean + beta * increment if nesterov else mean), mean

    return Filter(act, from_prediction=from_prediction)


MOMENTUM: dict[int, tuple[int, tuple[tuple[float, float], ...]]] = {  # divisor, and (c, d) of each c + d beta
    1: (1, ((0, 1),)),
    2: (2, ((2, 1), (-2, 1))),
    3: (12, ((18, 5), (-24, 8), (6, -1))),
    4: (24, ((46, 9), (-78, 19), (42, -5), (-10, 1))),
    5: (720, ((1650, 251), (-3420, 646), (2880, -264), (-1380, 106), (270, -19))),
}


def momentum_weights(order: int, beta: float) -> tuple[float, ...]:
    """Weights of the newest velocities in GHVB's steps, newest first (table 2); at beta = 1 Adams-Bashforth's."""
    if order not in MOMENTUM:
        raise SamplingError(f"momentum has orders up to 5, got {order}")
    divisor, row = MOMENTUM[order]
    return tuple((c + d * beta) / divisor / beta for c, d in row)


def momentum(grid: TimeGrid, *, method: str = "ghvb", order: float = 2.0, raw_start: bool = False) -> SolverTable:
    """Heavy ball, generalised heavy ball and Nesterov over DDIM's rho (Wizadwongsa et al. 2024).

    Args:
        method: "hb", "ghvb" or "nesterov".
        order: a whole number k is Adams-Bashforth of order k (PLMS); between k - 1 and k, method order k with beta =
            the fraction: smaller damps more.
        raw_start: the velocity starts from the network's raw output whatever it predicts, as in the released code.
    """
    beta, degree = order - math.floor(order) or 1.0, math.ceil(order)
    if method not in ("hb", "ghvb", "nesterov") or not 1 <= degree <= 5:
        raise SamplingError(f"momentum has methods hb, ghvb and nesterov, orders above 0 to 5, got {method!r}, {order}")
    updates = []
    for i, ((a, rho), (b, rho_after)) in enumerate(pairwise(zip(grid.alpha.tolist(), grid.rho.tolist(), strict=True))):
        weights = momentum_weights(min(degree, i + 1), beta if method == "ghvb" else 1.0)
        updates.append(Update("noise", b / a, weights, b * (rho_after - rho)))
    table = SolverTable(f"{method.upper()} {order:g}", grid, tuple(updates), raw_start=raw_start)
    if method == "ghvb":
        return replace(table, smoothing=beta)
    return replace(table, filter=heavy_ball(beta, nesterov=method == "nesterov"))


def with_momentum(table: SolverTable, beta: float) -> SolverTable:
    """DPM-Solver++ 2M or UniPC with heavy-ball momentum, as the released code has it.

    DPM-Solver++ averages the increments of its second-order steps, as multiples of the clean sample. Of UniPC only the
    corrector has momentum, and it averages multiples of the clean sample over sigma at the step's end. `beta` is the
    share of the newest increment; 1: the solver itself.
    """

    def averaged(update: Update, filtered: bool, unit: float = 1.0) -> Update:
        total = sum(update.direction) * unit
        direction = tuple(w / total for w in update.direction)
        return replace(update, direction=direction, scale=update.scale * total, filtered=filtered)

    corrected, sigmas = any(table.correctors), table.grid.sigma[1:].tolist()
    return replace(
        table,
        name=f"{table.name} with HB {beta:g}",
        updates=tuple(averaged(u, len(u.direction) > 1 and not corrected) for u in table.updates),
        correctors=tuple(c and averaged(c, True, end) for c, end in zip(table.correctors, sigmas, strict=False)),
        filter=heavy_ball(beta, from_prediction=False),
    )


def levenberg_marquardt(damping: float = 1e-3, kappa: float = 0.0, *, released: bool = False) -> Filter:
    """LML's correction of an increment (Wang et al. 2025). At the published kappa = 0 it does nothing but round.

    `damping` is lambda, `kappa` the share of the previous raw increment in the direction e that is damped. The released
    `d - e <d, e> / (lambda + <e, e>)` cancels to rounding, or to nothing; the same is had without cancellation.
    """

    def act(increment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        first = memory is increment  # its own memory: then, as at kappa 0, the correction only rounds
        mixed = increment if first else kappa * memory + (1 - kappa) * increment
        if released:
            turned = increment - mixed * over_sample(mixed * increment) / (damping + over_sample(mixed * mixed))
        elif first:
            return increment, increment
        else:
            turned = (damping + kappa * over_sample(mixed * memory)) * increment
            turned = turned - kappa * over_sample(mixed * increment) * memory
        return turned * over_sample(increment * increment).sqrt() / over_sample(turned * turned).sqrt(), increment

    return Filter(act, whole=True, watches=True)


def with_levenberg_marquardt(
    table: SolverTable, damping: float, kappa: float, *, split: bool = False, until: float = math.inf
) -> SolverTable:
    """A solver whose increments LML corrects.

    Args:
        split: only the predicted noise is corrected where it is added, as in DDIM's released version; else the
            increment beside the carried state, or a flow's velocity.
        until: only at labels below this one.
    """
    updates, guard = [], levenberg_marquardt(damping, kappa)
    for update, sigma, label in zip(table.updates, table.grid.sigma.tolist(), table.grid.labels, strict=False):
        changed: dict[str, Any] = {}
        if split:
            clean = -update.carry * sigma
            changed = {"fixed": (clean,), "direction": (1.0,), "scale": update.direction[0] - clean}
        elif update.form != "velocity":
            changed = {"direction": tuple(w * update.scale for w in update.direction), "scale": 1.0}
        updates.append(replace(update, **changed, filtered=bool(label < until)))
    return replace(table, name=f"{table.name} with LML", updates=tuple(updates), filter=guard)


# -- weights from the predictions themselves ------------------------------------------------------------------


def evodiff(grid: TimeGrid, *, final: bool = True, denoise: bool = False) -> SolverTable:
    """EVODiff (Li et al. 2025): a step goes to a first guess, where the network is called, and is made again with that.

    Its dot products run over the height and width of each channel, so that a canvas cannot be stepped by strips. A
    grid that ends without noise ends at the clean prediction for its last guess, and has none of the published last
    steps: they shrink a sample by sqrt(k_0 k), which is nothing at EDM's last sigma of .002 alone.

    Args:
        final: the last step is of lower order.
        denoise: end at the clean prediction for the last time, one more call (two where `final` is not).

    Raises:
        SamplingError: fewer than two steps, or a first time without signal.
    """
    clean = grid.sigma[-1] == 0
    k, s, n = grid.rho.tolist(), grid.sigma.tolist(), grid.steps - int(clean)
    if n < 2 or not math.isfinite(k[0]):
        raise SamplingError(f"EVODiff takes two steps or more, from a time with signal, before a clean end: got {n}")
    updates, correctors = [], list[Update | None]()
    for i in range(n):
        carry, jump = s[i + 1] / s[i], s[i + 1] * (1 / k[i + 1] - 1 / k[i])  # Euler: carry x + jump D
        guess, again = (None, None) if i == 0 else evodiff_rules(k[: n + 1], i, jump, few=n <= 20)
        last = i + 1 == n and (clean or final)
        if guess is None:
            updates.append(Update("data", carry, (jump,)))
        elif last and not clean:
            ratio, shrink = k[i + 1] / k[i], 1 - math.sqrt(k[i + 1] * k[i])
            c = 1 - math.sqrt(ratio if ratio < 0.5 else ratio - 0.5) / 2
            updates.append(Update("data", shrink * carry, ((shrink + 0.5) * jump, -c * jump / 2)))
        else:
            updates.append(Update("data", carry, (1.0, 1.0), rule=guess))
        correctors.append(None if last or i == 0 else Update("data", carry, (1.0, 1.0, 1.0), start=-2, rule=again))
    if clean:
        return SolverTable("EVODiff", grid, (*updates, Update("data", 0.0, (1.0,))), tuple(correctors))
    if denoise:
        stays = [] if final else [n]  # the last guess is answered, then its correction
        grid = grid.taken([*range(n + 1), *stays, n])
        updates += [*(Update("data", 1.0, ()) for _ in stays), Update("data", 0.0, (1.0,))]
    return SolverTable("EVODiff", grid, tuple(updates), tuple(correctors))


def evodiff_rules(k: list[float], i: int, jump: float, *, few: bool) -> tuple[Any, Any]:
    """What step i adds to the carried state: at its first guess, and with the network's answer to that.

    `k` is sigma / alpha of all times, `jump` Euler's factor of the newest prediction; zeta has a published choice for
    few steps, up to 20.
    """
    old, now, new = k[i - 1 : i + 2]
    h, ratio = 1 / new - 1 / now, math.log(old / now) / math.log(now / new)
    share = (1 - ((new + k[-1]) / (k[0] + k[-1])) ** 2) / 2
    base = (1 - share) * math.sqrt((new / now) / (now / old))

    def along(a: Tensor, b: Tensor) -> Tensor:
        """The projection of a on b, one number per sample and channel, within +-2."""
        return ((a * b).sum((-2, -1), keepdim=True) / (b * b).sum((-2, -1), keepdim=True)).clamp(-2, 2)

    def turned(m0: Tensor, m1: Tensor) -> tuple[Tensor, Tensor]:
        """The first difference, and its factor in the first guess."""
        b = base + share * along(m0, m1)
        return m0 - b * m1, jump / (2 * ((b.abs() / 4).sigmoid() * ratio).clamp(ratio / 4, 1.5 * ratio))

    def guess(data: list[Tensor]) -> Tensor:
        difference, factor = turned(*data)
        return jump * data[0] + factor * difference

    def again(data: list[Tensor]) -> Tensor:
        (m, m0, m1), (d1, factor) = data, turned(*data[1:])
        d2, _ = turned(m, m0)
        before, after = d1 / (ratio * h), ratio * d2 / h
        eta = (along(after + before, after - before).abs() / 2).sigmoid() / 2
        slope = ratio * (1 - eta) * d2 - (eta / ratio) * d1
        q = (along(factor * (d1 - slope), d1) / jump).abs() - 0.5
        late = 1 if few else -(along(m0, (m0 - m1) / h) * (2 - (new / now) ** 2)).sigmoid()
        return jump * m0 + jump / (2 * (q * late).sigmoid()) * slope

    return guess, again
