"""Samplers by name: which table a name stands for, on which grid, and a scheduler in diffusers' shape around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling.core import SolverTable, TableStepper
from diffrep.sampling.filters import momentum, with_levenberg_marquardt, with_momentum
from diffrep.sampling.schedules import (
    FEW_STEP_GRIDS,
    SPACINGS,
    Array,
    Flow,
    NoiseSchedule,
    SamplingError,
    TableVP,
    TimeGrid,
    spaced_times,
)
from diffrep.sampling.solvers import ddim_table, deis, dpm_solver, ipndm, rho_runge_kutta, unipc

Builder = Callable[..., SolverTable]


@dataclass(frozen=True)
class Sampler:
    """A name's solver.

    Attributes:
        build: from (grid, schedule, options) to a table.
        about: one line for people.
        options: what `build` takes, with the defaults of this name.
        flow: whether it works on rectified flows, whose first time has no signal.
        calls: network calls of a step.
    """

    build: Builder
    about: str
    options: Mapping[str, Any]
    flow: bool = True
    calls: int = 1


def _plain(builder: Callable[..., SolverTable]) -> Builder:
    return lambda grid, schedule, **options: builder(grid, **options)


def _in_data(grid: TimeGrid, schedule: NoiseSchedule, **options: Any) -> SolverTable:
    return ddim_table(
        grid, form="data", **options
    )  # the noise form loses digits where a schedule begins without signal


def _momentum_on(builder: Callable[..., SolverTable]) -> Builder:
    return lambda grid, schedule, beta, **options: with_momentum(builder(grid, **options), beta)


def _lml(grid: TimeGrid, schedule: NoiseSchedule, *, damping: float, kappa: float, order: int) -> SolverTable:
    return with_levenberg_marquardt(dpm_solver(grid, order=order, form="data"), damping, kappa)


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(_in_data, "Euler on a flow; DDIM elsewhere", {}),
    "ddim": Sampler(_in_data, "first order; eta > 0 adds noise", {"eta": 0.0}, flow=False),
    "ddpm": Sampler(_in_data, "ancestral sampling", {"eta": 1.0}, flow=False),
    "dpm": Sampler(_plain(dpm_solver), "DPM-Solver, noise form", {"order": 2, "form": "noise"}, flow=False),
    "dpm++": Sampler(_plain(dpm_solver), "DPM-Solver++, multistep", {"order": 2, "exact": False}),
    "dpm++-sde": Sampler(_plain(dpm_solver), "the same with the SDE's noise", {"order": 2, "noisy": True}),
    "unipc": Sampler(_plain(unipc), "DPM-Solver++ with a free corrector", {"order": 2, "variant": "bh2"}),
    "deis-tab": Sampler(deis, "Adams-Bashforth in t, rho or log-snr", {"order": 2, "variable": "t"}, flow=False),
    "ipndm": Sampler(_plain(ipndm), "Adams-Bashforth for even steps", {"order": 4}, flow=False),
    "rho-rk": Sampler(rho_runge_kutta, "Runge-Kutta, several calls a step", {"method": "2heun"}, flow=False, calls=2),
    "ghvb": Sampler(_plain(momentum), "generalised heavy ball: few steps, much guidance", {"order": 1.8}, flow=False),
    "hb": Sampler(_plain(momentum), "heavy ball", {"method": "hb", "order": 1.8}, flow=False),
    "nesterov": Sampler(_plain(momentum), "Nesterov", {"method": "nesterov", "order": 1.8}, flow=False),
    "dpm++-hb": Sampler(_momentum_on(dpm_solver), "DPM-Solver++ with heavy ball", {"order": 2, "beta": 0.8}),
    "unipc-hb": Sampler(_momentum_on(unipc), "UniPC with heavy ball", {"order": 2, "beta": 0.8}),
    "lml": Sampler(_lml, "DPM-Solver++ corrected; kappa 0 does nothing", {"damping": 1e-3, "kappa": 0.0, "order": 3}),
}
GRIDS = ("trailing", "leading", "linspace", "few-step", *SPACINGS)  # where the timesteps of a table lie


def table_times(schedule: TableVP, steps: int, spacing: str = "trailing") -> Array:
    """(steps,) falling timesteps of a table, whole numbers, as diffusers spaces them; "few-step" are fractional.

    Raises:
        SamplingError: no such spacing, or two steps at one timestep.
    """
    total = len(schedule.table)
    if not 1 <= steps <= total:
        raise SamplingError(f"steps must be in 1..{total}, got {steps}")
    if spacing == "few-step":
        grids = {grid.steps: grid for name, (grid, _) in FEW_STEP_GRIDS.items() if name.startswith("sd-")}
        if steps not in grids:
            raise SamplingError(f"few-step grids have {', '.join(map(str, grids))} steps, got {steps}")
        return grids[steps].times(schedule.table)[:-1]
    if spacing == "trailing":
        times = np.arange(total, 0, -total / steps).round() - 1
    elif spacing == "leading":
        times = np.arange(steps, dtype=np.float64)[::-1] * (total // steps)
    elif spacing == "linspace":
        times = np.linspace(0, total - 1, steps)[::-1].round()
    else:
        times = spaced_times(schedule, spacing, steps)[:-1].round()
    if len(set(times.tolist())) < len(times):
        doubled = next(t for t in times.tolist() if times.tolist().count(t) > 1)
        raise SamplingError(
            f"spacing {spacing!r} with {steps} steps meets timestep {doubled:g} twice on this schedule; take another "
            "spacing or fewer steps"
        )
    return np.asarray(times, np.float64)


def build_table(
    name: str,
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: str = "trailing",
    timesteps: Sequence[float] | None = None,
    **options: Any,
) -> SolverTable:
    """The table of a sampler on a grid that ends without noise.

    Args:
        name: of `SAMPLERS`.
        steps: how many.
        spacing: one of `GRIDS`; flows have even steps, shifted as the schedule says.
        timesteps: these instead, falling; of a search, for example.
        options: of the sampler, in place of those in `SAMPLERS`.

    Raises:
        SamplingError: no such sampler, spacing or option, or they do not go together.
    """
    if name not in SAMPLERS:
        raise SamplingError(f"there is no sampler {name!r}; known are {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    if unknown := sorted(set(options) - set(sampler.options)):
        known = ", ".join(sampler.options) or "none"
        raise SamplingError(f"the sampler {name} has no option {', '.join(unknown)}; its options are {known}")
    values = {**sampler.options, **options}
    if isinstance(schedule, Flow):
        if not sampler.flow:
            works = ", ".join(key for key, value in SAMPLERS.items() if value.flow)
            raise SamplingError(
                f"{name} does not work on rectified flows, which start without signal; take one of {works}"
            )
        times = np.linspace(1, 0, steps + 1)[:-1] if timesteps is None else np.asarray(timesteps, np.float64)
        times = schedule.shift * times / (1 + (schedule.shift - 1) * times)
        grid = TimeGrid.of(schedule, [*times, 0.0], labels=1000 * times)
        return ddim_table(grid, form="velocity") if name == "euler" else sampler.build(grid, schedule, **values)
    if not isinstance(schedule, TableVP):
        raise SamplingError(f"named samplers work on tables and flows, not on {type(schedule).__name__}")
    times = table_times(schedule, steps, spacing) if timesteps is None else np.asarray(timesteps, np.float64)
    if not np.all(np.diff(times) < 0) or times.min() < 0 or times.max() > schedule.first:
        raise SamplingError(
            f"timesteps must fall inside {schedule.first:g}..0, got {', '.join(f'{t:g}' for t in times)}"
        )
    if not np.isfinite(schedule.log_snr(times[:1])[0]):
        raise SamplingError(
            f"at timestep {times[0]:g} this schedule has no signal left, where noise says nothing; start below it"
            " (spacing leading), or rescale the model"
        )
    return sampler.build(TimeGrid.of(schedule, [*times, times[-1] - 1]).ending(), schedule, **values)


class TableScheduler:
    """A sampler in the shape of a diffusers scheduler, for pipelines of others.

    For example: `pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ghvb", order=1.8)`.

    Args:
        sampler: a name of `SAMPLERS`.
        spacing: one of `GRIDS`.
        config: of a diffusers scheduler: the noise schedule and what the network predicts.
        options: of the sampler.

    Attributes:
        memory: (B, ...) tensors of earlier steps; one's own to set, as a canvas that is stepped by strips does.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self, sampler: str = "unipc", *, spacing: str = "trailing", config: Mapping[str, Any], **options: Any
    ) -> None:
        from diffusers import DDIMScheduler

        self.sampler, self.spacing, self.sampler_options = sampler, spacing, options
        self.prediction, self.schedule = model_schedule(config)
        self.config = SimpleNamespace(**{**dict(config), "prediction_type": self.prediction})
        self.num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        if isinstance(self.schedule, TableVP):
            self.alphas_cumprod = torch.from_numpy(self.schedule.table).float()
            ddim: Any = DDIMScheduler(trained_betas=config.get("trained_betas"), **_noise_schedule(config))
            self.add_noise = ddim.add_noise
        self.memory: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._position = 0
        self.set_timesteps(min(20, self.num_train_timesteps))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, sampler: str = "unipc", **options: Any) -> TableScheduler:
        """The scheduler of a model that another scheduler was configured for."""
        return cls(sampler, config=dict(config), **options)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        *,
        timesteps: Sequence[float] | None = None,
        **_: Any,
    ) -> None:
        """Start anew with a number of steps, or with timesteps.

        Raises:
            SamplingError: see `build_table`.
        """
        steps = len(timesteps) if timesteps is not None else int(num_inference_steps or 20)
        self.table = build_table(
            self.sampler, self.schedule, steps, spacing=self.spacing, timesteps=timesteps, **self.sampler_options
        )
        labels = torch.from_numpy(self.table.grid.labels)
        whole = bool((labels == labels.round()).all())
        self.timesteps = (labels.long() if whole else labels.float()).to(device or "cpu")
        self.stepper = TableStepper(self.table, self.prediction)
        self.num_inference_steps, self.memory, self._names, self._position = len(labels), [], (), 0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """One step; calls must follow `timesteps`.

        Args:
            generator: draws the noise of samplers that add some; one, or one for each sample.
            variance_noise: that noise itself.
        """
        step = self._position
        if variance_noise is None and self.table.updates[step].noise:
            from diffusers.utils.torch_utils import randn_tensor

            variance_noise = randn_tensor(
                tuple(sample.shape), generator=generator, device=sample.device, dtype=sample.dtype
            )
        memory = dict(zip(self._names, self.memory, strict=True))
        moved, state = self.stepper.step(step, model_output.to(sample.dtype), sample, memory, variance_noise)
        self._names, self.memory, self._position = tuple(state), list(state.values()), step + 1
        return SimpleNamespace(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        return self.num_train_timesteps


def _noise_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
    return {name: config[name] for name in names if config.get(name) is not None}


def model_schedule(config: Mapping[str, Any]) -> tuple[str, NoiseSchedule]:
    """What a network predicts, and its noise schedule, of a diffusers scheduler's configuration."""
    from diffusers import DDIMScheduler

    if "FlowMatch" in str(config.get("_class_name", "")) or config.get("prediction_type") == "flow_prediction":
        return "flow_prediction", Flow(shift=float(config.get("shift") or 1.0))
    betas = config.get("trained_betas")
    scheduler: Any = DDIMScheduler(trained_betas=betas, **_noise_schedule(config))
    return str(config.get("prediction_type") or "epsilon"), TableVP(scheduler.alphas_cumprod.double().numpy())
