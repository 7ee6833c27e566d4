"""Schedulers, of `diffrep.sampling` and of diffusers, on a canvas that never is in memory as a whole.

A scheduler's step is elementwise, so it may be taken on a few lines at a time, if what it keeps from step to step is
kept per line. `Stepper` does that for any scheduler: its numbers come from one that is stepped with a dummy, its
tensors from the caller.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffrep.table_scheduler import TableScheduler

NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def build_scheduler(
    name: str, config: Mapping[str, Any], steps: int, *, timesteps: Sequence[float] = (), **options: Any
) -> TableScheduler:
    """A sampler of `diffrep.sampling` by its name, ready for `steps` steps.

    Args:
        config: of the model: noise schedule and kind of prediction are taken from it.
        timesteps: falling, in place of even steps.
        options: of the sampler, and `spacing`.

    Raises:
        SamplingError: no such sampler, or it does not go with the model, the options or the steps.
    """
    schedule = {k: config[k] for k in NOISE_SCHEDULE if config.get(k) is not None}
    table = TableScheduler.from_config(schedule, sampler=name, timesteps=timesteps or None, **options)
    table.set_timesteps(steps, timesteps=timesteps or None)
    return table


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
        return self.scheduler.scale_model_input(sample, self.timestep)

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
