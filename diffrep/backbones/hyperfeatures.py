"""Diffusion Hyperfeatures: activations along a DDIM trajectory, joined by a trained network while they appear.

No map is kept: each step's activations are resized, projected, added and freed.

Source: "Diffusion Hyperfeatures" (arXiv:2305.14334), diffusion-hyperfeatures/diffusion_hyperfeatures 4a5ec2b.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.aggregation import AggregationNetwork
from diffrep.backbones.base import Backbone, Conditions, Recommended, TapInfo
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.images import Sizing

TAPS = tuple(f"up.{i}.resnet.{j}.increment" for i in range(4) for j in range(3))
SAVED = (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)


@dataclass(frozen=True)
class Trajectory:
    """A DDIM trajectory and the steps at which it is read.

    Attributes:
        steps: of the whole trajectory.
        saved: numbers of the steps that are read; 0 is the noisiest, steps - 1 the cleanest.
        mode: inversion (from an image to noise; step by step at the timestep before, the first at -1) or generation.
        guidance: scale of classifier-free guidance; None: only the conditional pass.
    """

    steps: int = 50
    saved: tuple[int, ...] = SAVED
    mode: Literal["inversion", "generation"] = "inversion"
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be in 1..1000, got {self.steps}")
        if not self.saved or len(set(self.saved)) != len(self.saved) or not set(self.saved) <= set(range(self.steps)):
            raise ValueError(f"saved must be different steps of 0..{self.steps - 1}, got {self.saved}")

    def visits(self) -> list[tuple[int, int, int]]:
        """(step, timestep of the pass, timestep it leads to) in the order of the passes; -1 is the clean image.

        >>> Trajectory(steps=4, saved=(3, 0)).visits()
        [(3, -1, 0), (2, 0, 250), (1, 250, 500), (0, 500, 750)]
        >>> Trajectory(steps=2, saved=(0,), mode="generation").visits()
        [(0, 500, 0), (1, 0, -1)]
        """
        times = [-1, *(i * (1000 // self.steps) for i in range(self.steps))]
        pairs = list(pairwise(times))
        if self.mode == "generation":
            pairs = [(after, before) for before, after in reversed(pairs)]
            return [(i, *pair) for i, pair in enumerate(pairs)]
        return [(self.steps - 1 - i, *pair) for i, pair in enumerate(pairs)]


@dataclass(frozen=True)
class Step:
    """One pass of a trajectory.

    Attributes:
        number: of the step, 0 the noisiest.
        maps: the activations, tap -> (B, C, h, w); empty where the step is not read.
        clean: (B, c, h, w) the clean latent that the pass predicts; None where it ended at the deepest tap.
    """

    number: int
    maps: dict[str, Tensor]
    clean: Tensor | None


@torch.inference_mode()
def follow(
    backbone: LatentDiffusion,
    latents: Tensor,
    taps: Sequence[str],
    trajectory: Trajectory,
    *,
    context: Tensor,
    unconditional: Tensor | None = None,
    to_the_end: bool = False,
) -> Iterator[Step]:
    """Follow a DDIM trajectory and read activations on the way.

    Args:
        latents: (B, c, h, w): scaled latents of images for inversion, noise for generation.
        context: (B or 1, tokens, C) of the prompt.
        unconditional: the same of the empty prompt, where the trajectory has guidance.
        to_the_end: visit the steps behind the last one that is read too, and predict in the last pass. Otherwise
            the last pass ends at the deepest tap.

    Raises:
        ValueError: the trajectory has guidance and there is no unconditional context.
    """
    if trajectory.guidance is not None and unconditional is None:
        raise ValueError(f"guidance {trajectory.guidance:g} needs the context of the unconditional prompt")
    visits = trajectory.visits()
    last_read = max(i for i, visit in enumerate(visits) if visit[0] in trajectory.saved)
    here = latents
    for i, (number, before, after) in enumerate(visits if to_the_end else visits[: last_read + 1]):
        wanted = list(taps) if number in trajectory.saved else []
        predicting = to_the_end or i < last_read
        told = context.expand(len(here), -1, -1)
        maps = backbone.context_maps(here, [*wanted, "out"] if predicting else wanted, before, told)
        if not predicting:
            yield Step(number, maps, None)
            return
        noise = backbone.as_noise(here, maps.pop("out"), before)
        if trajectory.guidance is not None and unconditional is not None:
            plain = backbone.predict_noise(here, before, unconditional)
            noise = plain + trajectory.guidance * (noise - plain)
        here, clean = backbone.ddim_step(here, noise, before, after)
        yield Step(number, maps, clean)


class Hyperfeatures(Backbone):
    """A latent diffusion backbone read along a trajectory; its one tap is ``hyperfeatures``.

    Args:
        base: the diffusion backbone.
        aggregation: trained for the channels of `taps` and the saved steps of `trajectory`.

    Raises:
        ValueError: the network was trained for other maps.
    """

    def __init__(
        self,
        base: LatentDiffusion,
        aggregation: AggregationNetwork,
        *,
        taps: Sequence[str] = TAPS,
        trajectory: Trajectory | None = None,
        name: str = "hyperfeatures",
    ) -> None:
        super().__init__()
        self.base, self.aggregation = base, aggregation.to(base.device, base.dtype)
        self.name, self.source, self.multiple = name, base.source, base.multiple
        self.read = tuple(taps)
        if trajectory is None and aggregation.steps == 1:
            trajectory = Trajectory(steps=1, saved=(0,))
        self.trajectory = trajectory or Trajectory()
        channels = tuple(base.tap(tap).channels for tap in taps)
        if channels != aggregation.feature_dims or aggregation.steps != len(self.trajectory.saved):
            raise ValueError(
                f"the aggregation network joins {aggregation.steps} steps of {aggregation.feature_dims} channels;"
                f" {base.name} gives {len(self.trajectory.saved)} steps of {channels}"
            )
        side = base.stride * int(base.network.config.sample_size or 64)
        self.recommended = Recommended(
            taps=("hyperfeatures",),
            sizing=Sizing(mode="squash", size=side, resample="bilinear"),
            conditions=Conditions(posterior="sample"),
        )

    @property
    def network(self) -> Any:
        """The U-Net of the base."""
        return self.base.network

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {**self.base.parts, "aggregation network": self.aggregation}

    def taps(self) -> tuple[TapInfo, ...]:
        return (TapInfo("hyperfeatures", self.aggregation.projection, self.base.stride, "bottleneck_layers"),)

    @torch.inference_mode()
    def maps(
        self, pixels: Tensor, taps: Sequence[str], conditions: Conditions, *, batch_size: int = 8
    ) -> dict[str, Tensor]:
        """Join the activations of every saved step; timestep, noise and ensemble of `conditions` have no part.

        Returns:
            ``hyperfeatures`` -> (B, projection, H / stride, W / stride).
        """
        for tap in taps:
            self.tap(tap)
        mean, std = self.base.encode(pixels, batch_size=batch_size)
        latents = self.base.scaled_latents(mean, std, conditions)
        context = self.base.embed(conditions.prompt).context
        plain = self.base.embed("").context if self.trajectory.guidance is not None else None
        parts = [self.join(chunk, context, plain) for chunk in latents.split(batch_size)]
        return {"hyperfeatures": torch.cat(parts)}

    @torch.inference_mode()
    def join(
        self,
        latents: Tensor,
        context: Tensor,
        unconditional: Tensor | None = None,
        *,
        resolution: tuple[int, int] | None = None,
    ) -> Tensor:
        """(B, c, h, w) scaled latents -> (B, projection, h, w), or of another resolution."""
        size = resolution or (int(latents.shape[-2]), int(latents.shape[-1]))
        positions = {number: i for i, number in enumerate(self.trajectory.saved)}
        total: Tensor | None = None
        context = context.to(latents)
        unconditional = None if unconditional is None else unconditional.to(latents)
        steps = follow(self.base, latents, self.read, self.trajectory, context=context, unconditional=unconditional)
        for step in steps:
            for layer, tap in enumerate(self.read if step.maps else ()):
                resized = F.interpolate(step.maps.pop(tap), size=size, mode="bilinear", align_corners=False)
                part = self.aggregation.share(layer, resized, step=positions[step.number])
                total = part if total is None else total + part
        assert total is not None
        return total
