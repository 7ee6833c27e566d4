"""A sampler in the shape of a diffusers scheduler, for pipelines of others and for canvases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffrep.sampling.core import TableStepper, per_sample
from diffrep.sampling.samplers import build_table, model_schedule, named_sampler
from diffrep.sampling.schedules import Flow, NoiseSchedule, SamplingError, TableVP
from diffrep.sampling.solvers import RUNGE_KUTTA

HALF = (torch.float16, torch.bfloat16)  # states are stepped in float32


class TableScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases name their file twice
    """A sampler in the place of a pipeline's scheduler, whose noise schedule and kind of prediction it takes over.

    For example: `pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="ghvb", order=1.8)`. The
    timesteps lie by `spacing`, the sampler's own where left out, and not by the configuration's. It is saved and loaded
    with its pipeline.

    Its memory is a list of (B, ...) tensors of earlier steps, which a caller that steps a canvas by strips sets.

    Raises:
        SamplingError: the sampler or its options do not go with the model, or more steps than its schedule has.
    """

    order = 1  # calls of the network a step
    init_noise_sigma = 1.0

    def __init__(
        self, sampler: str = "unipc", *, config: Mapping[str, Any], spacing: str | None = None,
        timesteps: Sequence[float] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        sampler, fixed = named_sampler(sampler)
        self.sampler, self.spacing, self.options = sampler, spacing, {**fixed, **options}
        self.prediction, self.schedule = model_schedule(config)
        about = {"sampler": sampler, "spacing": spacing, "options": self.options, "prediction_type": self.prediction}
        self.register_to_config(**{**config, **about})
        self.num_train_timesteps = int(config.get("num_train_timesteps") or 1000)
        if isinstance(self.schedule, TableVP):
            self.alphas_cumprod = torch.from_numpy(self.schedule.table).float()
        if sampler == "rho-rk":
            self.order = len(RUNGE_KUTTA[self.options.get("method", "2heun")][2])
        self.set_timesteps(min(20, self.num_train_timesteps), timesteps=timesteps)

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, *, sampler: str | None = None,
        spacing: str | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """The scheduler of a model that another scheduler was configured for, or this one again."""
        saved = {name: config.get(name) for name in ("sampler", "spacing", "options")}
        model = {key: value for key, value in config.items() if key not in saved}
        name, fixed = named_sampler(sampler or saved["sampler"] or "unipc")
        options = {**(saved["options"] or {} if name == saved["sampler"] else {}), **fixed, **options}
        made = cls(name, config=model, spacing=spacing or saved["spacing"], **options)
        return (made, {}) if return_unused_kwargs else made

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, *,
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None, mu: float | None = None,
        **_: Any,
    ) -> None:  # fmt: skip
        """Start anew with a number of steps, or with timesteps; see `build_table`.

        Args:
            sigmas: of flows, before they are shifted; `mu`: logarithm of the shift for this size of image (FLUX).

        Raises:
            SamplingError: sigmas of a model that is no flow, or what `build_table` raises.
        """
        schedule = self.schedule
        if isinstance(schedule, Flow) and mu is not None:
            schedule = Flow(shift=float(np.exp(mu)))
        if sigmas is not None:
            if not isinstance(schedule, Flow):
                raise SamplingError("sigmas are of flows; give timesteps")
            even = np.asarray(sigmas, np.float64)
            timesteps = (1000 * schedule.shift * even / (1 + (schedule.shift - 1) * even)).tolist()
        steps = len(timesteps) if timesteps is not None else 20 if num_inference_steps is None else num_inference_steps
        self._build(int(steps), timesteps, schedule)
        labels = torch.from_numpy(self.table.grid.labels)
        whole = bool((labels == labels.round()).all())
        self.timesteps = (labels.long() if whole else labels.float()).to(device or "cpu")
        self.num_inference_steps, self._first = len(labels), 0

    def _build(self, steps: int, timesteps: Sequence[float] | None, schedule: NoiseSchedule) -> None:
        self.table = build_table(
            self.sampler, schedule, steps, spacing=self.spacing, timesteps=timesteps, **self.options
        )
        self.stepper, self._position = TableStepper(self.table, self.prediction), 0
        self.memory, self._names = list[Tensor](), tuple[str, ...]()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later one of the timesteps, as image-to-image pipelines do.

        Raises:
            SamplingError: it lies between the calls of a step.
        """
        if begin_index % self.order:
            raise SamplingError(f"{self.sampler} takes {self.order} calls a step; it cannot begin at {begin_index}")
        self._first = begin_index
        if begin_index:
            later = self.timesteps[begin_index :: self.order].tolist()
            self._build(len(later), later, self.schedule)

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

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by its name for flows."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None,
        variance_noise: Tensor | None = None, return_dict: bool = True, **_: Any,
    ) -> Any:  # fmt: skip
        """One step; calls must follow `timesteps`, of which the first may be any.

        Samplers that add noise take `variance_noise`, or draw it from a generator, or one for each sample.

        Raises:
            SamplingError: the timestep is not one of those that were set, or none is left.
        """
        if self._position == 0 and not self._first and float(timestep) != float(self.timesteps[0]):
            places = (self.timesteps == float(timestep)).nonzero().flatten().tolist()
            if not places:
                raise SamplingError(f"timestep {float(timestep):g} is not among those that were set")
            self.set_begin_index(places[0])
        step = self._position
        if step >= len(self.table.updates):
            raise SamplingError("all timesteps are stepped; call set_timesteps again")
        state = sample.float() if sample.dtype in HALF else sample
        if variance_noise is None and self.table.updates[step].noise:
            from diffusers.utils.torch_utils import randn_tensor

            like: dict[str, Any] = {"device": sample.device, "dtype": state.dtype}
            variance_noise = randn_tensor(tuple(sample.shape), generator=generator, **like)
        memory = dict(zip(self._names, self.memory, strict=True))
        moved, kept = self.stepper.step(step, model_output.to(state.dtype), state, memory, variance_noise)
        self._names, self.memory, self._position = tuple(kept), list(kept.values()), step + 1
        moved = moved.to(sample.dtype)
        return SimpleNamespace(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        return self.num_train_timesteps
