"""diffusers schedulers on a canvas that never is in memory as a whole.

A scheduler's step is elementwise, so it may be taken on a few lines at a time, if what it keeps from step to step is
kept per line. `Stepper` does that for any scheduler: its numbers come from one that is stepped with a dummy, its
tensors from the caller.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffrep.sampling.samplers import SAMPLERS

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> diffusers class, its options
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),  # for models distilled for few steps
    "official": ("", {}),
}
NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


# of diffrep.sampling, equal to those of diffusers and free to step at any timesteps
AT_TIMESTEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("dpm++", {}), "dpmpp_2m_sde": ("dpm++-sde", {}), "ddim": ("ddim", {}), "ddpm": ("ddpm", {}),
    "unipc": ("unipc", {}), "deis": ("deis-tab", {"order": 1, "variable": "log-snr"}),
}  # fmt: skip


def build_scheduler(
    name: str, config: Mapping[str, Any], steps: int, *, timesteps: Sequence[float] = (), **options: Any
) -> Any:
    """A scheduler by its short name, ready for `steps` steps.

    Args:
        config: of the model: noise schedule and kind of prediction are taken from it.
        timesteps: falling, in place of even steps; of a sampler of `diffrep.sampling` or of `AT_TIMESTEPS`.
        options: of the diffusers class, in place of trailing spacing and the options in `SCHEDULERS`; or of a sampler
            of `diffrep.sampling`, where diffusers has none of that name.

    Raises:
        ValueError: no such scheduler, or more steps than the schedule has.
    """
    import diffusers

    if name not in SCHEDULERS and name not in SAMPLERS:
        raise ValueError(f"there is no scheduler {name!r}; known are {', '.join({**SCHEDULERS, **SAMPLERS})}")
    schedule = {k: config[k] for k in NOISE_SCHEDULE if config.get(k) is not None}
    trained = int(schedule.get("num_train_timesteps", 1000))
    if not 1 <= steps <= trained:
        raise ValueError(f"steps must be in 1..{trained}, got {steps}")
    if timesteps and name in AT_TIMESTEPS:
        name, fixed = AT_TIMESTEPS[name]
        options = {**fixed, **options}
    elif timesteps and name in SCHEDULERS:
        names = ", ".join([*AT_TIMESTEPS, *(n for n in SAMPLERS if n not in SCHEDULERS)])
        raise ValueError(f"the scheduler {name} takes no timesteps of a search; take one of {names}")
    if timesteps or name not in SCHEDULERS:
        from diffrep.table_scheduler import TableScheduler

        table = TableScheduler.from_config(schedule, sampler=name, timesteps=timesteps or None, **options)
        table.set_timesteps(steps, timesteps=timesteps or None)
        return table
    if name == "official":
        return OfficialScheduler(schedule, time_stride=trained // steps, **options)
    kind, settings = SCHEDULERS[name]
    scheduler: Any = getattr(diffusers, kind)(**{**schedule, "timestep_spacing": "trailing", **settings, **options})
    scheduler.set_timesteps(steps)
    return scheduler


class OfficialScheduler:
    """The sampler of the authors' large-image code: DDIM whose noise comes from the beta of a single step.

    Args:
        schedule: num_train_timesteps, beta_start, ... of the model.
        time_stride: timesteps a step; the first is the noisiest, the last ends at the clean estimate.
        noise_scale: share of the variance; 1 is much less noise than DDIM's eta = 1.
    """

    init_noise_sigma = 1.0
    order = 1

    def __init__(self, schedule: Mapping[str, Any], *, time_stride: int = 20, noise_scale: float = 1.0) -> None:
        from diffusers import DDIMScheduler

        ddim: Any = DDIMScheduler(**schedule)
        self.config = SimpleNamespace(prediction_type=ddim.config.prediction_type)
        if ddim.config.prediction_type != "epsilon":
            raise ValueError(f"the official sampler needs a model that predicts the noise, not {self.config}")
        self.betas, self.alphas_cumprod = ddim.betas, ddim.alphas_cumprod
        self.time_stride, self.noise_scale = time_stride, noise_scale
        self.timesteps = torch.arange(len(self.betas) - 1, -1, -time_stride)

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
    ) -> SimpleNamespace:
        """One step of a batch; see diffusers' DDIMScheduler.step."""
        now, before = int(timestep), int(timestep) - self.time_stride
        alpha = self.alphas_cumprod[now]
        clean = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        if before < 0:
            return SimpleNamespace(prev_sample=clean)
        alpha_before = self.alphas_cumprod[before]
        variance = self.noise_scale * self.betas[now] * (1 - alpha_before) / (1 - alpha)
        stepped = alpha_before.sqrt() * clean + (1 - alpha_before - variance).sqrt() * model_output
        if self.noise_scale > 0:
            if variance_noise is None:
                from diffusers.utils.torch_utils import randn_tensor

                draws = None if generator is None else list(generator)
                variance_noise = randn_tensor(tuple(sample.shape), generator=draws, dtype=sample.dtype)
            stepped = stepped + variance.sqrt() * variance_noise
        return SimpleNamespace(prev_sample=stepped)


class Stepper:
    """Steps any scheduler on batches of lines.

    Args:
        scheduler: with its timesteps set.
        eta: of DDIM, in its usual meaning.

    Raises:
        ValueError: the scheduler has no eta.
    """

    def __init__(self, scheduler: Any, *, eta: float = 0.0) -> None:
        self.scheduler = scheduler
        self.accepts = set(inspect.signature(scheduler.step).parameters)
        if eta and "eta" not in self.accepts:
            raise ValueError(f"eta belongs to the ddim scheduler; {type(scheduler).__name__} has none")
        self.options = {"eta": eta} if "eta" in self.accepts else {}
        self.timesteps: Tensor = scheduler.timesteps
        self.position = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def whole(self) -> bool:
        """Whether a step needs whole images, so that it cannot be taken by strips."""
        return bool(getattr(getattr(self.scheduler, "table", None), "whole", False))

    @property
    def timestep(self) -> Tensor:
        """Of the step that comes next."""
        return self.timesteps[self.position]

    @property
    def carried(self) -> tuple[str, ...]:
        """Names of the tensors that must be given to `step` for each line."""
        return tuple(_carried_tensors(self.scheduler))

    def scale(self, sample: Tensor) -> Tensor:
        """What the network is shown of a sample."""
        scaled: Tensor = self.scheduler.scale_model_input(sample, self.timestep)
        return scaled

    def step(
        self, predicted: Tensor, sample: Tensor, carried: Mapping[str, Tensor], noise: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Step a batch of lines (n, c, h, w); returns their next sample and what to keep for them.

        Args:
            predicted: by the network.
            carried: name -> (n, c, h, w), what the last step returned; see `carried`.
            noise: arguments of the scheduler's step; see `Noise.arguments`.

        Raises:
            ValueError: noise is given that the scheduler cannot take.
        """
        if "variance_noise" in noise and "variance_noise" not in self.accepts:
            raise ValueError(f"{type(self.scheduler).__name__} draws its own noise: it cannot be given")
        arguments = {**self.options, **{k: v for k, v in noise.items() if k in self.accepts}}
        scheduler = _with_tensors(self.scheduler, carried)
        stepped: Tensor = scheduler.step(predicted, self.timestep, sample, **arguments).prev_sample
        return stepped, _carried_tensors(scheduler)

    def advance(self) -> None:
        """Go on to the next step, when all lines have been stepped."""
        dummy = torch.zeros(1, 1, 1, 1)
        arguments = {"generator": [torch.Generator().manual_seed(0)]} if "generator" in self.accepts else {}
        self.scheduler.step(dummy, self.timestep, self.scale(dummy), **self.options, **arguments)
        self.position += 1


def _carried_tensors(scheduler: Any) -> dict[str, Tensor]:
    """What a scheduler keeps of the sample: its four-dimensional tensors, also in lists."""
    carried = {}
    for key, value in vars(scheduler).items():
        for index, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, Tensor) and entry.ndim == 4:
                carried[f"{key}.{index}" if isinstance(value, list) else key] = entry
    return carried


def _with_tensors(scheduler: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of a scheduler that keeps other tensors."""
    copied = copy.copy(scheduler)
    for key, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(copied, key, list(value))
    for name, tensor in tensors.items():
        key, _, index = name.partition(".")
        if index:
            getattr(copied, key)[int(index)] = tensor
        else:
            setattr(copied, key, tensor)
    return copied
