"""The solvers of the field, each as a few lines that fill a table.

A solver is a function of a `TimeGrid` that returns a `SolverTable`. `SOLVERS` at the end names them; a new one from a
paper goes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffrep.sampling.core import Clamp, Form, SolverTable, Update
from diffrep.sampling.schedules import Array, NoiseSchedule, SamplingError, TimeGrid, integrate, lagrange


def phi(order: int, z: float) -> float:
    """The phi functions of exponential integrators: `phi_1(z) = (e^z - 1) / z`, `phi_k+1 = (phi_k - 1/k!) / z`."""
    if abs(z) < 0.5:  # the recursion loses digits near 0
        return sum(z**n / math.factorial(n + order) for n in range(20))
    value = math.expm1(z) / z
    for k in range(1, order):
        value = (value - 1 / math.factorial(k)) / z
    return value


def derivative_weights(distances: Sequence[float], order: int) -> Array:
    """Weights c with which `sum c_i (f(d_i) - f(0))` is the derivative of an order at 0, exact for polynomials.

    Args:
        distances: d_i, as many as the degree up to which it is exact.
    """
    d = np.asarray(distances, np.float64)
    powers = np.arange(1, len(d) + 1)
    matrix = d[None] ** powers[:, None] / np.array([math.factorial(j) for j in powers])[:, None]
    return np.linalg.solve(matrix, (powers == order).astype(np.float64))


RELAXATIONS: dict[str, Callable[[float, float], float]] = {  # of the first derivative's term, over h (USF, app. B)
    "dpmsolver-2": lambda h, c: h * math.expm1(h) / (2 * (math.expm1(h) - h)),
    "unipc-bh2": lambda h, c: h * math.expm1(h) / (2 * (math.expm1(h) - h)),
    "unipc-bh1": lambda h, c: h**2 / (2 * (math.expm1(h) - h)),
    "0.5exp": lambda h, c: 1 + math.expm1(h) / 2,
    "-0.5exp": lambda h, c: 1 - math.expm1(h) / 2,
    "linear": lambda h, c: 1 + c * h,
}


@dataclass(frozen=True)
class Derivative:
    """How a derivative of the prediction over log-SNR is estimated.

    Attributes:
        points: earlier predictions that it is made of, counted back from the newest, -1.
        relaxation: a name of `RELAXATIONS`: a factor that falls with the step.
        coefficient: of the relaxation "linear".
    """

    points: tuple[int, ...]
    relaxation: str | None = None
    coefficient: float = 0.0


def exponential(
    grid: TimeGrid,
    newest: int,
    target: int,
    form: Form,
    derivatives: Sequence[Derivative] = (),
    *,
    start: int = -1,
    halved: bool = False,
    noisy: bool = False,
) -> Update:
    """One step of an exponential integrator over log-SNR.

    Noise form: `x_t = (a_t / a_s) x_s - s_t sum_k h^(k+1) phi_k+1(h) N_k`; data form: `x_t = (s_t / s_s) x_s + a_t
    sum_k h^(k+1) phi_k+1(-h) D_k`, with N_k, D_k the k-th derivatives at the start.

    Args:
        newest: index of the time of the newest prediction.
        target: index of the time to go to.
        derivatives: of order 1, 2, ...; none: DDIM.
        start: the state and prediction it starts from, counted back from the newest, -1.
        halved: the widespread third-order update, whose second-derivative term is half of the exact one.
        noisy: the reverse SDE's step instead of the ODE's (SDE-DPM-Solver++, first or second order).
    """
    begin = newest + 1 + start
    a, s, log_snr = grid.alpha, grid.sigma, grid.log_snr
    h = float(log_snr[target] - log_snr[begin])
    sign = 1.0 if form == "noise" else -1.0
    if not math.isfinite(h):  # a first step without signal, or a last to no noise
        if derivatives:
            raise SamplingError("a step from no signal or to no noise must be of first order")
        return ddim(grid, begin, target, form)
    weights = np.zeros(newest + 1)
    z = sign * h
    for k, derivative in enumerate([None, *derivatives]):
        factor = h ** (k + 1) * phi(k + 1, z)
        if noisy:
            factor = _sde_factor(k, h, form)
        if derivative is None:
            weights[newest - begin] += factor
            continue
        if derivative.relaxation:
            relax = RELAXATIONS[derivative.relaxation]
            factor *= relax(h if derivative.relaxation == "linear" else z, derivative.coefficient)
        if halved and k == 2:
            factor /= 2
        places = [newest + 1 + point for point in derivative.points]
        coefficients = derivative_weights([float(log_snr[i] - log_snr[begin]) for i in places], k)
        for place, coefficient in zip(places, coefficients, strict=True):
            weights[newest - place] += factor * coefficient
        weights[newest - begin] -= factor * coefficients.sum()
    carry, scale = (a[target] / a[begin], -s[target]) if form == "noise" else (s[target] / s[begin], a[target])
    spread = 0.0
    if noisy:
        carry = carry if form == "noise" else carry * math.exp(-h)
        spread = s[target] * (math.sqrt(math.expm1(2 * h)) if form == "noise" else math.sqrt(-math.expm1(-2 * h)))
    return Update(form, float(carry), trimmed(weights), float(scale), start=start, noise=float(spread))


def _sde_factor(k: int, h: float, form: Form) -> float:
    """The factors of the first two derivatives in a step of the reverse SDE."""
    if k > 1:
        raise SamplingError("steps with noise are of first or second order")
    if form == "data":
        return -math.expm1(-2 * h) if k == 0 else h * (1 + math.expm1(-2 * h) / (2 * h))
    return 2 * math.expm1(h) if k == 0 else 2 * (math.expm1(h) - h)


def trimmed(weights: Sequence[float] | Array) -> tuple[float, ...]:
    """Weights as floats, without the zeros at the end."""
    values = [float(w) for w in weights]
    while len(values) > 1 and values[-1] == 0:
        values.pop()
    return tuple(values)


def ddim(grid: TimeGrid, begin: int, target: int, form: Form = "noise", *, noise: float = 0.0) -> Update:
    """DDIM's step; `noise` is the standard deviation of what is added in place of as much of the predicted noise."""
    a, s = grid.alpha, grid.sigma
    rest = math.sqrt(max(float(s[target]) ** 2 - noise**2, 0.0))
    if form == "velocity":
        return Update(form, 1.0, (1.0,), float(s[target] - s[begin]))
    if form == "data":
        return Update(form, rest / float(s[begin]), (float(a[target] - rest * a[begin] / s[begin]),), noise=noise)
    carry = float(a[target] / a[begin])
    return Update(form, carry, (rest - carry * float(s[begin]),), noise=noise)


def ddim_table(grid: TimeGrid, *, form: Form = "noise", eta: float = 0.0) -> SolverTable:
    """DDIM (Song et al. 2021), or with form "velocity" the Euler steps of a flow.

    Args:
        eta: share of the noise of ancestral sampling that each step adds; 1: DDPM with its smaller variance.
    """
    updates = []
    for i in range(grid.steps):
        snr_now, snr_next = np.exp(2 * grid.log_snr[[i, i + 1]])
        variance = grid.sigma[i + 1] ** 2 / grid.sigma[i] ** 2 * (1 - snr_now / snr_next) * grid.sigma[i] ** 2
        updates.append(ddim(grid, i, i + 1, form, noise=eta * math.sqrt(max(float(variance), 0.0))))
    return SolverTable("Euler" if form == "velocity" else "DDIM", grid, tuple(updates))


# -- multistep exponential integrators ------------------------------------------------------------------------


def lowered(grid: TimeGrid, order: int, step: int, *, final: bool) -> int:
    """The order of a step: as many predictions as there are, those without any signal apart; lower again at the end."""
    if grid.sigma[step + 1] == 0:
        return 1
    usable = int(np.isfinite(grid.log_snr[: step + 1]).sum())
    return max(1, min(order, usable, grid.steps - step if final else order))


def dpm_solver(
    grid: TimeGrid, *, order: int = 2, form: Form = "data", midpoint: bool = True, noisy: bool = False,
    final: bool | None = None, exact: bool = False,
) -> SolverTable:  # fmt: skip
    """DPM-Solver (form "noise") and DPM-Solver++ ("data"), multistep, orders 1 to 3 (Lu et al. 2022).

    Args:
        midpoint: the second order's variant of that name, the default of the official code; else the exact phi_2.
        noisy: SDE-DPM-Solver(++).
        final: lower orders in the last steps; None: with fewer than 15 steps, as in the official code.
        exact: the exact third order, in place of the published one with half its second-derivative term.
    """
    if not 1 <= order <= (2 if noisy else 3):
        raise SamplingError(f"DPM-Solver has orders 1 to {'2 with noise' if noisy else 3}, got {order}")
    final = grid.steps < 15 if final is None else final
    updates = []
    for i in range(grid.steps):
        n = lowered(grid, order, i, final=final)
        relaxation = "dpmsolver-2" if n == 2 and midpoint and not noisy else None
        derivatives = [Derivative(tuple(range(-2, -1 - n, -1)), relaxation)] * (n - 1)
        update = exponential(grid, i, i + 1, form, derivatives, halved=not exact, noisy=noisy)
        if n == 2 and midpoint and noisy:
            update = _sde_midpoint(grid, i, form, update)
        updates.append(update)
    return SolverTable(f"DPM-Solver{'++' if form == 'data' else ''} {order}M", grid, tuple(updates))


def _sde_midpoint(grid: TimeGrid, i: int, form: Form, update: Update) -> Update:
    """The noisy second order with half the first factor in place of the exact one."""
    h, before = (float(grid.log_snr[j + 1] - grid.log_snr[j]) for j in (i, i - 1))
    factor = _sde_factor(0, h, form)
    slope = factor / 2 * h / before
    return replace(update, direction=(factor + slope, -slope))


def unipc(
    grid: TimeGrid,
    *,
    order: int = 2,
    form: Form = "data",
    variant: str = "bh2",
    final: bool = True,
    corrected: bool = True,
) -> SolverTable:
    """UniPC (Zhao et al. 2023): DPM-Solver's predictor of an order and a corrector of one more, without further calls.

    Args:
        variant: "bh1", "bh2" or "vary": the B(h) of the second-order predictor.
        corrected: False leaves the corrector out (UniP).
    """
    if order < 1 or variant not in ("bh1", "bh2", "vary"):
        raise SamplingError(f"UniPC has orders from 1 and variants bh1, bh2 and vary, got {order}, {variant!r}")
    updates, correctors = [], list[Update | None]()
    for i in range(grid.steps):
        last = i + 1 == grid.steps or not np.isfinite(grid.log_snr[i])
        n = lowered(grid, order, i, final=final)
        relaxation = f"unipc-{variant}" if n == 2 and variant != "vary" else None
        derivatives = [Derivative(tuple(range(-2, -1 - n, -1)), relaxation)] * (n - 1)
        updates.append(exponential(grid, i, i + 1, form, derivatives))
        points = (*range(-3, -2 - n, -1), -1)
        first = Derivative(points, f"unipc-{variant}" if n == 1 and variant != "vary" else None)
        corrector = [first] + [Derivative(points)] * (n - 1)
        correctors.append(None if last or not corrected else exponential(grid, i + 1, i + 1, form, corrector, start=-2))
    return SolverTable(f"UniPC-{order}", grid, tuple(updates), tuple(correctors))


def unified(
    grid: TimeGrid,
    *,
    orders: Sequence[int],
    forms: Sequence[Form],
    derivatives: Sequence[Sequence[Derivative]],
    starts: Sequence[int] | None = None,
    correctors: Sequence[Sequence[Derivative] | None] | None = None,
    clamp: Clamp | None = None,
    afs: str | None = None,
) -> SolverTable:
    """A solver as USF writes it (Liu et al. 2024): decisions of its own for every step.

    Args:
        orders: Taylor order of each step.
        forms: "noise" or "data" for each step.
        derivatives: for each step, one estimate for each derivative up to its order.
        starts: where each step begins, counted back from the newest state; -1 where left out.
        correctors: for each step the estimates with which it is made again at its end; None: not.
        clamp: see `SolverTable`.
        afs: how the first prediction is had without a call of the network, see `SolverTable`.

    Raises:
        SamplingError: the lists do not fit the grid's steps.
    """
    n = grid.steps
    starts, correctors = starts or [-1] * n, correctors or [None] * n
    for name, values in dict(
        orders=orders, forms=forms, derivatives=derivatives, starts=starts, correctors=correctors
    ).items():
        if len(values) != n:
            raise SamplingError(f"{name} has {len(values)} entries for {n} steps")
    updates = [
        exponential(grid, i, i + 1, forms[i], list(derivatives[i])[: orders[i] - 1], start=starts[i]) for i in range(n)
    ]
    again = [
        None if estimates is None else exponential(grid, i + 1, i + 1, forms[i], estimates, start=-2)
        for i, estimates in enumerate(correctors)
    ]
    return SolverTable("USF", grid, tuple(updates), tuple(again), clamp=clamp, afs=afs)


# -- Adams-Bashforth in other variables -----------------------------------------------------------------------


def deis(grid: TimeGrid, schedule: NoiseSchedule, *, order: int = 3, variable: str = "t") -> SolverTable:
    """DEIS (Zhang & Chen 2023): `x_t = (a_t / a_s) x_s + a_t sum_j (integral of L_j d rho) eps_j`, exact quadrature.

    Args:
        order: degree of the polynomial; 0 is DDIM.
        variable: what the Lagrange polynomials L_j are polynomials of: "t" (tAB), "rho" (rhoAB) or "log-snr" (the
            variant that diffusers has).
    """
    of_variable = {"t": grid.times, "rho": grid.rho, "log-snr": grid.log_snr}
    if variable not in of_variable or order < 0:
        raise SamplingError(f"DEIS has orders from 0 and the variables t, rho and log-snr, got {order}, {variable!r}")
    updates = []
    for i in range(grid.steps):
        if grid.sigma[i + 1] == 0:
            updates.append(ddim(grid, i, i + 1))
            continue
        points = of_variable[variable][max(i - order, 0) : i + 1][::-1]

        def weighted(log_rho: Array, points: Array = points) -> Array:
            places = {
                "t": lambda: schedule.time_of(-log_rho),
                "rho": lambda: np.exp(log_rho),
                "log-snr": lambda: -log_rho,
            }
            return lagrange(points, places[variable]()) * np.exp(log_rho)

        integrals = integrate(weighted, -float(grid.log_snr[i]), -float(grid.log_snr[i + 1]))
        carry = float(grid.alpha[i + 1] / grid.alpha[i])
        updates.append(Update("noise", carry, trimmed(grid.alpha[i + 1] * integrals)))
    return SolverTable(f"DEIS {variable}AB-{order}", grid, tuple(updates))


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(grid: TimeGrid, *, order: int = 4) -> SolverTable:
    """iPNDM: DDIM on an Adams-Bashforth mean of the last noises, whatever the steps' sizes (Liu et al. 2022; DEIS)."""
    if not 1 <= order <= 4:
        raise SamplingError(f"iPNDM has orders 1 to 4, got {order}")
    updates = []
    for i in range(grid.steps):
        step = ddim(grid, i, i + 1)
        updates.append(replace(step, direction=ADAMS_BASHFORTH[min(order, i + 1) - 1], scale=step.direction[0]))
    return SolverTable(f"iPNDM-{order}", grid, tuple(updates))


RUNGE_KUTTA: dict[str, tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "1euler": ((), (), (1.0,)),  # nodes after 0, rows of the tableau after the first, weights
    "2heun": ((1.0,), ((1.0,),), (0.5, 0.5)),
    "3kutta": ((0.5, 1.0), ((0.5,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
    "3ral": ((0.5, 0.75), ((0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9)),
    "3heun": ((1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "3vdh": ((8 / 15, 2 / 3), ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "3ssprk": ((1.0, 0.5), ((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "4rk": ((0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def rho_runge_kutta(grid: TimeGrid, schedule: NoiseSchedule, *, method: str = "3kutta") -> SolverTable:
    """rhoRK-DEIS: Runge-Kutta on `d(x / a) / d rho = eps`; the table has one step for each call of the network.

    Args:
        method: a name of `RUNGE_KUTTA`.
    """
    if method not in RUNGE_KUTTA:
        raise SamplingError(f"method must be one of {', '.join(RUNGE_KUTTA)}, got {method!r}")
    nodes, tableau, weights = RUNGE_KUTTA[method]
    times, updates = [float(grid.times[0])], []
    for i in range(grid.steps):
        if grid.sigma[i + 1] == 0:  # no network is called without noise: straight to the clean prediction
            times.append(float(grid.times[i + 1]))
            updates.append(ddim(grid, i, i + 1))
            continue
        jump = float(grid.rho[i + 1] - grid.rho[i])
        begin = float(grid.alpha[i])
        for stage, (node, row) in enumerate(zip((*nodes, 1.0), (*tableau, weights), strict=True)):
            end = stage == len(nodes)
            t = float(grid.times[i + 1]) if end else float(schedule.time_of(-np.log(grid.rho[i] + node * jump))[0])
            times.append(t)
            a = float(schedule.alpha(t))
            slopes = tuple(a * jump * w for w in reversed(row))
            updates.append(Update("noise", a / begin, slopes, start=-1 - stage))
    stages = TimeGrid(
        np.array(times), schedule.alpha(times), schedule.sigma(times), np.array(times[:-1]), schedule.log_snr(times)
    )
    stages = stages.ending() if grid.sigma[-1] == 0 else stages
    return SolverTable(f"rhoRK-{method}", stages, tuple(updates))
