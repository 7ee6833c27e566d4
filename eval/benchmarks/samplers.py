"""The samplers' machine against diffusers' schedulers: the same numbers, and the time of steps beside the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffrep.eval.benchmarks.timing import Claim, PairedBenchmark
from diffrep.table_scheduler import TableScheduler

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {  # our sampler -> class of diffusers that gives the same, its options
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True)
class SamplersBenchmark(PairedBenchmark):
    """Time whole runs, their tables included, with a network that costs nothing."""

    repeats: int = 5
    side: int = 64  # of the latents
    batch: int = 1
    steps: int = 20

    def claims(self) -> Iterator[Claim]:
        import diffusers

        start = torch.randn(self.batch, 4, self.side, self.side, generator=torch.Generator().manual_seed(0))
        start = start.to(self.device)
        for name, (kind, options) in PAIRS.items():
            theirs = getattr(diffusers, kind)(**SCHEDULE, timestep_spacing="trailing", **options)
            ours = TableScheduler.from_config(SCHEDULE, sampler=name)

            theirs.set_timesteps(self.steps, device=self.device)
            ours.set_timesteps(self.steps, device=self.device)
            what = f"{name}, {self.steps} steps of {self.side} x {self.side} against {kind}"
            yield Claim(what, partial(paint, theirs, start), partial(paint, ours, start), said=lambda *_: "")


def paint(scheduler: Any, start: Tensor) -> Tensor:
    """A run with the timesteps that are set; the network is a factor."""
    scheduler.set_timesteps(len(scheduler.timesteps), device=start.device)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * x, t, x).prev_sample
    return x
