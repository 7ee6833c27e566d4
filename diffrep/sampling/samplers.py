"""Samplers by name: which table a name stands for, and on which grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from diffrep.sampling import solvers
from diffrep.sampling.core import SolverTable, Update
from diffrep.sampling.flows import transport_sde
from diffrep.sampling.schedules import Flow, NoiseSchedule, SamplingError, TableVP, TimeGrid, boundary, table_times
from diffrep.settings import NOT_NEGATIVE, check_values

Builder = Callable[..., SolverTable]  # (grid, schedule, **options)
FAINT = 1000.0  # sigma / alpha above which a schedule begins almost without signal


@dataclass(frozen=True)
class Sampler:
    """A name's solver."""

    build: Builder
    about: str  # for people
    options: Mapping[str, Any]  # what `build` takes, with the defaults of this name
    flow: bool = True  # it works on rectified flows, whose first time has no signal
    table: bool = True  # and on noise schedules
    faint: bool = True  # it works where there is almost none; one that does not extrapolates x / alpha
    spacing: str = "trailing"  # where its timesteps lie unless said


def _plain(builder: Builder, **fixed: Any) -> Builder:
    return lambda grid, schedule, **options: builder(grid, **fixed, **options)


def _unipc(grid: TimeGrid, schedule: NoiseSchedule, variant: str, **options: Any) -> SolverTable:
    relaxation = None if variant == "vary" else f"unipc-{variant}"
    return solvers.multistep(grid, relaxation=relaxation, corrected=True, **options)


def _lml(grid: TimeGrid, schedule: NoiseSchedule, damping: float, kappa: float, **options: Any) -> SolverTable:
    return solvers.with_levenberg_marquardt(solvers.multistep(grid, **options), damping, kappa)


def _hb(builder: Builder) -> Builder:
    return lambda grid, schedule, beta, **options: solvers.with_momentum(builder(grid, schedule, **options), beta)


def consistency(grid: TimeGrid) -> SolverTable:
    """LCM: what the consistency function says of the state, with new noise up to the next time."""
    updates = []
    for after, sigma, t in zip(grid.alpha[1:], grid.sigma[1:], grid.labels, strict=True):
        skip, out = boundary(float(t))
        updates.append(Update("data", float(after) * skip, (float(after) * out,), noise=float(sigma)))
    return SolverTable("LCM", grid, tuple(updates))


def pndm(grid: TimeGrid) -> SolverTable:
    """PNDM without its Runge-Kutta steps, "PLMS" (Liu et al. 2022): iPNDM whose first step is made twice.

    The second time with the mean of the noise at both its ends, which later steps do not look back on. As many calls as
    steps and one.
    """
    n = grid.steps
    steps = [solvers.ddim(grid, i, i + 1) for i in range(n)]
    mean = replace(steps[0], direction=(0.5, 0.5), scale=steps[0].direction[0], start=-2)
    updates = [steps[0], *([mean] if n > 1 else [])]
    for i, step in enumerate(steps[1:], 1):
        row = solvers.momentum_weights(min(i + 1, 4), 1.0)
        row = row if i > 3 else (*row[:i], 0.0, row[i])
        updates.append(replace(step, direction=row, scale=step.direction[0]))
    return SolverTable("PNDM", grid.taken([0, *range(1, min(n, 2)), *range(1, n + 1)]), tuple(updates))


def large_image(grid: TimeGrid, schedule: NoiseSchedule, *, noise_scale: float = 1.0) -> SolverTable:
    """The sampler of the authors' large-image code: DDIM with the noise of a single timestep's beta, however long its
    steps. `noise_scale` is the share of that variance.
    """
    updates = []
    for i, (sigma, after) in enumerate(pairwise(grid.sigma.tolist())):
        abar = schedule.alpha([max(grid.times[i] - 1, 0), grid.times[i]]) ** 2
        beta = 1 - float(abar[1] / (abar[0] if grid.times[i] else 1.0))
        updates.append(solvers.ddim(grid, i, i + 1, noise=math.sqrt(noise_scale * beta) * after / sigma))
    return SolverTable("large-image DDIM", grid, tuple(updates))


_dpm = _plain(solvers.multistep)
_sde = _plain(transport_sde)
_data = _plain(solvers.ddim_table, form="data")  # the noise form loses digits where a schedule begins without signal
SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(_data, "Euler on a flow; DDIM elsewhere", {}),
    "ddim": Sampler(_data, "first order; eta > 0 adds noise", {"eta": 0.0}, flow=False),
    "ddpm": Sampler(_data, "ancestral sampling", {"eta": 1.0}, flow=False),
    "dpm": Sampler(_dpm, "DPM-Solver, noise form", {"order": 2, "form": "noise"}, flow=False),
    "dpm++": Sampler(_dpm, "DPM-Solver++, multistep", {"order": 2, "exact": False}),
    "dpm++-sde": Sampler(_dpm, "the same with the SDE's noise", {"order": 2, "noisy": True}),
    "unipc": Sampler(_unipc, "DPM-Solver++ with a free corrector", {"order": 2, "variant": "bh2"}),
    "deis-tab": Sampler(solvers.deis, "Adams-Bashforth in a variable", {"order": 2, "variable": "t"}, flow=False),
    "ipndm": Sampler(_plain(solvers.ipndm), "Adams-Bashforth for even steps", {"order": 4}, flow=False),
    "rho-rk": Sampler(solvers.rho_runge_kutta, "Runge-Kutta", {"method": "2heun"}, flow=False, faint=False),
    "ghvb": Sampler(_plain(solvers.momentum), "for few steps and much guidance", {"order": 1.8}, flow=False),
    "hb": Sampler(_plain(solvers.momentum, method="hb"), "heavy ball", {"order": 1.8}, flow=False),
    "nesterov": Sampler(_plain(solvers.momentum, method="nesterov"), "Nesterov", {"order": 1.8}, flow=False),
    "dpm++-hb": Sampler(_hb(_dpm), "DPM-Solver++ with heavy ball", {"order": 2, "beta": 0.8}),
    "unipc-hb": Sampler(_hb(_unipc), "UniPC with heavy ball", {"order": 2, "variant": "bh2", "beta": 0.8}),
    "lml": Sampler(_lml, "DPM-Solver++ corrected; kappa 0 does nothing", {"damping": 1e-3, "kappa": 0.0, "order": 3}),
    "sit-sde": Sampler(_sde, "SiT's SDE: noise at every step", {"form": "sigma", "norm": 1.0}, table=False),
    "evodiff": Sampler(_plain(solvers.evodiff), "adaptive weights; whole images", {}, flow=False, faint=False),
    "lcm": Sampler(_plain(consistency), "for models distilled by LCM; 1 to 8 steps", {}, flow=False, spacing="lcm"),
    "pndm": Sampler(_plain(pndm), "ipndm with a first step in two calls", {}, flow=False, faint=False),
    "official": Sampler(large_image, "of the authors' large-image code", {"noise_scale": 1.0}, flow=False),
}
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {  # names that diffusers has; its deis and lms end otherwise
    "dpmpp_2m": ("dpm++", {}),
    "dpmpp_2m_sde": ("dpm++-sde", {}),
    "deis": ("deis-tab", {"order": 1, "variable": "log-snr"}),
    "lms": ("deis-tab", {"order": 3, "variable": "rho"}),
    "heun": ("rho-rk", {"method": "2heun"}),
    "euler_ancestral": ("ddpm", {}),
}
ONE_ORDER = ("deis-tab", "ipndm", "ghvb", "hb", "nesterov")  # no order of its own for each step


def named_sampler(name: str) -> tuple[str, dict[str, Any]]:
    """A name, or one of `ALIASES`, as a name of `SAMPLERS` and the options that it stands for.

    Raises:
        SamplingError: no such sampler.
    """
    if name not in {**SAMPLERS, **ALIASES}:
        raise SamplingError(f"there is no sampler {name!r}; known are {', '.join([*SAMPLERS, *ALIASES])}")
    return ALIASES.get(name, (name, {}))


def build_table(
    name: str, schedule: NoiseSchedule, steps: int, *, spacing: str | None = None,
    timesteps: Sequence[float] | None = None, **options: Any,
) -> SolverTable:  # fmt: skip
    """The table of a sampler on a grid that ends without noise.

    Args:
        name: of `SAMPLERS`, or an alias.
        steps: how many.
        spacing: one of `GRIDS`, the sampler's where None; flows have even steps, shifted as the schedule says.
        timesteps: what the network is called with instead, falling; of a search, for example. Of flows 1000 sigma.
        options: of the sampler, in place of those in `SAMPLERS`.

    Raises:
        SamplingError: no such sampler, spacing or option, a wrong value of one, or they do not go together.
    """
    name, fixed = named_sampler(name)
    options = {**fixed, **options}
    sampler, flow = SAMPLERS[name], isinstance(schedule, Flow)
    if unknown := sorted(set(options) - set(sampler.options)):
        known = ", ".join(sampler.options) or "none"
        raise SamplingError(f"the sampler {name} has no option {', '.join(unknown)}; its options are {known}")
    choices = {"variant": ("bh1", "bh2", "vary")} | ({"form": ("noise", "data")} if name == "dpm" else {})
    several = () if name in ONE_ORDER else ("order",)
    check_values(
        options,
        sampler.options,
        what=name,
        choices=choices,
        several=several,
        error=SamplingError,
        eta=NOT_NEGATIVE,
        noise_scale=NOT_NEGATIVE,
    )
    if not (sampler.flow if flow else sampler.table):
        kind = "rectified flows, which start without signal" if flow else "noise schedules, only on rectified flows"
        works = ", ".join(key for key, value in SAMPLERS.items() if (value.flow if flow else value.table))
        raise SamplingError(f"{name} does not work on {kind}; take one of {works}")
    grid = sampling_grid(schedule, steps, spacing or sampler.spacing, timesteps)
    if not sampler.faint and grid.rho[0] > FAINT:
        raise SamplingError(
            f"{name} diverges where a schedule begins almost without signal (sigma / alpha {grid.rho[0]:.0f} at"
            f" timestep {grid.times[0]:g}); begin later (spacing leading), or take another sampler"
        )
    build = _plain(solvers.ddim_table, form="velocity") if flow and name == "euler" else sampler.build
    return build(grid, schedule, **{**sampler.options, **options})


def sampling_grid(
    schedule: NoiseSchedule, steps: int, spacing: str = "trailing", timesteps: Sequence[float] | None = None
) -> TimeGrid:
    """The grid of `build_table`.

    Raises:
        SamplingError: the timesteps do not fall, lie outside of the schedule, or begin where no signal is left.
    """
    if not isinstance(schedule, (Flow, TableVP)):
        raise SamplingError(f"named samplers work on tables and flows, not on {type(schedule).__name__}")
    flow = isinstance(schedule, Flow)
    if timesteps is not None:
        labels = np.asarray(timesteps, np.float64)
    elif isinstance(schedule, Flow):
        even = np.linspace(1, 0, max(steps, 1) + 1)[:-1]
        labels = 1000 * (schedule.shift * even / (1 + (schedule.shift - 1) * even))
    else:
        labels = table_times(schedule, steps, spacing)
    first, last = (1000, 1) if flow else (int(schedule.first), 0)
    if not labels.size or not np.all(np.diff(labels) < 0) or labels[0] > first or (labels[-1] < last and not flow):
        raise SamplingError(f"timesteps must fall inside {first}..{last}, got {', '.join(f'{t:g}' for t in labels)}")
    if flow:
        return TimeGrid.of(schedule, [*(labels / 1000), 0.0], labels=labels)
    grid = TimeGrid.of(schedule, [*labels, labels[-1] - 1]).ending()
    if not np.isfinite(grid.log_snr[0]):
        raise SamplingError(
            f"at timestep {labels[0]:g} this schedule has no signal left, where noise says nothing; start below it"
            " (spacing leading), or rescale the model"
        )
    return grid


def model_schedule(config: Mapping[str, Any]) -> tuple[str, NoiseSchedule]:
    """What a network predicts, and its noise schedule, of a diffusers scheduler's configuration.

    Raises:
        SamplingError: it is one of sigmas (EDM, VE), where nothing of a table of betas is said.
    """
    from diffrep.backbones.pipelines import alphas_cumprod

    betas = not config.keys().isdisjoint(("beta_schedule", "trained_betas"))
    flow = "FlowMatch" in str(config.get("_class_name", "")) or config.get("prediction_type") == "flow_prediction"
    if flow or ("shift" in config and not betas):  # a scheduler that was made, not loaded, does not say its class
        if config.get("shift_terminal") or config.get("time_shift_type", "exponential") != "exponential":
            raise SamplingError("flows are shifted exponentially here: no shift_terminal, no linear time_shift_type")
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        ends = tuple(float(config.get(name, usual)) for name, usual in names.items())
        dynamic = ends if config.get("use_dynamic_shifting") else None
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        return "flow_prediction", Flow(shift=shift, dynamic=dynamic)  # type: ignore[arg-type]
    if "sigma_max" in config and not betas:
        raise SamplingError(
            "this scheduler's noise is in sigmas (EDM, VE); samplers take schedules of betas, and flows"
        )
    known = {key: value for key, value in config.items() if value is not None}
    return str(config.get("prediction_type") or "epsilon"), TableVP(alphas_cumprod(known).double().numpy())
