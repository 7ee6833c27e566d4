"""Samplers by name: which table a name stands for, on which grid, and a scheduler in diffusers' shape around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling import solvers
from diffrep.sampling.core import SolverTable, TableStepper, Update, per_sample
from diffrep.sampling.schedules import Flow, NoiseSchedule, SamplingError, TableVP, TimeGrid, boundary, table_times

Builder = Callable[..., SolverTable]  # (grid, schedule, **options)
FAINT = 1000.0  # sigma / alpha above which a schedule begins almost without signal


@dataclass(frozen=True)
class Sampler:
    """A name's solver."""

    build: Builder
    about: str  # for people
    options: Mapping[str, Any]  # what `build` takes, with the defaults of this name
    flow: bool = True  # it works on rectified flows, whose first time has no signal
    faint: bool = True  # it works where there is almost none; one that does not extrapolates x / alpha
    spacing: str = "trailing"  # where its timesteps lie unless said


def _plain(builder: Builder, **fixed: Any) -> Builder:
    return lambda grid, schedule, **options: builder(grid, **fixed, **options)


def _unipc(grid: TimeGrid, schedule: NoiseSchedule, variant: str, **options: Any) -> SolverTable:
    if variant not in ("bh1", "bh2", "vary"):
        raise SamplingError(f"UniPC has the variants bh1, bh2 and vary, got {variant!r}")
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


_dpm = _plain(solvers.multistep)
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
    "evodiff": Sampler(
        _plain(solvers.evodiff), "weights from the predictions; whole images", {}, flow=False, faint=False
    ),
    "lcm": Sampler(
        _plain(consistency),
        "for models and LoRAs distilled by LCM; 1 to 8 steps",
        {},
        flow=False,
        spacing="lcm",
    ),
}


def build_table(
    name: str, schedule: NoiseSchedule, steps: int, *, spacing: str | None = None,
    timesteps: Sequence[float] | None = None, **options: Any,
) -> SolverTable:  # fmt: skip
    """The table of a sampler on a grid that ends without noise.

    Args:
        name: of `SAMPLERS`.
        steps: how many.
        spacing: one of `GRIDS`, the sampler's where None; flows have even steps, shifted as the schedule says.
        timesteps: what the network is called with instead, falling; of a search, for example. Of flows 1000 sigma.
        options: of the sampler, in place of those in `SAMPLERS`.

    Raises:
        SamplingError: no such sampler, spacing or option, or they do not go together.
    """
    if name not in SAMPLERS:
        raise SamplingError(f"there is no sampler {name!r}; known are {', '.join(SAMPLERS)}")
    sampler, flow = SAMPLERS[name], isinstance(schedule, Flow)
    if unknown := sorted(set(options) - set(sampler.options)):
        known = ", ".join(sampler.options) or "none"
        raise SamplingError(f"the sampler {name} has no option {', '.join(unknown)}; its options are {known}")
    if flow and not sampler.flow:
        works = ", ".join(key for key, value in SAMPLERS.items() if value.flow)
        raise SamplingError(f"{name} does not work on rectified flows, which start without signal; take one of {works}")
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
    """What a network predicts, and its noise schedule, of a diffusers scheduler's configuration."""
    from diffrep.backbones.pipelines import alphas_cumprod

    if "FlowMatch" in str(config.get("_class_name", "")) or config.get("prediction_type") == "flow_prediction":
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        ends = tuple(float(config.get(name, usual)) for name, usual in names.items())
        dynamic = ends if config.get("use_dynamic_shifting") else None
        return "flow_prediction", Flow(shift=float(config.get("shift") or 1.0), dynamic=dynamic)  # type: ignore[arg-type]
    known = {key: value for key, value in config.items() if value is not None}
    return str(config.get("prediction_type") or "epsilon"), TableVP(alphas_cumprod(known).double().numpy())


class TableScheduler:
    """A sampler in the shape of a diffusers scheduler, for pipelines of others.

    For example: `pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ghvb", order=1.8)`.

    Its memory is a list of (B, ...) tensors of earlier steps, which a caller that steps a canvas by strips sets.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self, sampler: str = "unipc", *, config: Mapping[str, Any], spacing: str | None = None,
        timesteps: Sequence[float] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.sampler, self.spacing, self.options = sampler, spacing, options
        self.prediction, self.schedule = model_schedule(config)
        self.config = SimpleNamespace(**{**dict(config), "prediction_type": self.prediction})
        self.num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        if isinstance(self.schedule, TableVP):
            self.alphas_cumprod = torch.from_numpy(self.schedule.table).float()
        self.set_timesteps(min(20, self.num_train_timesteps), timesteps=timesteps)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, sampler: str = "unipc", **options: Any) -> TableScheduler:
        """The scheduler of a model that another scheduler was configured for."""
        return cls(sampler, config=dict(config), **options)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, *,
        timesteps: Sequence[float] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Start anew with a number of steps, or with timesteps; see `build_table`."""
        steps = 20 if num_inference_steps is None else int(num_inference_steps)
        self.table = build_table(
            self.sampler, self.schedule, steps, spacing=self.spacing, timesteps=timesteps, **self.options
        )
        labels = torch.from_numpy(self.table.grid.labels)
        whole = bool((labels == labels.round()).all())
        self.timesteps = (labels.long() if whole else labels.float()).to(device or "cpu")
        self.stepper = TableStepper(self.table, self.prediction)
        self.num_inference_steps, self._position = len(labels), 0
        self.memory, self._names = list[Tensor](), tuple[str, ...]()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean samples with the noise of (B,) timesteps."""
        times = timesteps.double().cpu().numpy() / (1000 if isinstance(self.schedule, Flow) else 1)
        alpha, sigma = (
            per_sample(torch.as_tensor(values).to(original_samples), noise)
            for values in (self.schedule.alpha(times), self.schedule.sigma(times))
        )
        return alpha * original_samples + sigma * noise

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None,
        variance_noise: Tensor | None = None, return_dict: bool = True, **_: Any,
    ) -> Any:  # fmt: skip
        """One step; calls must follow `timesteps`.

        Samplers that add noise take `variance_noise`, or draw it from a generator, or one for each sample.
        """
        step = self._position
        if variance_noise is None and self.table.updates[step].noise:
            from diffusers.utils.torch_utils import randn_tensor

            like: dict[str, Any] = {"device": sample.device, "dtype": sample.dtype}
            variance_noise = randn_tensor(tuple(sample.shape), generator=generator, **like)
        memory = dict(zip(self._names, self.memory, strict=True))
        moved, state = self.stepper.step(step, model_output.to(sample.dtype), sample, memory, variance_noise)
        self._names, self.memory, self._position = tuple(state), list(state.values()), step + 1
        return SimpleNamespace(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        return self.num_train_timesteps
