"""Diffusion Hyperfeatures: activations along a DDIM trajectory, joined by a trained network while they appear.

No map is kept: each step's activations are resized, projected, added and freed.

Source: "Diffusion Hyperfeatures" (arXiv:2305.14334), diffusion-hyperfeatures/diffusion_hyperfeatures 4a5ec2b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import Backbone, BackboneError, Conditions, Recommended, TapInfo
from diffrep.backbones.diffusion import draw_noise
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.weight_files import read_weights
from diffrep.files import one_line
from diffrep.images import Sizing
from diffrep.settings import check

TAPS = tuple(f"up.{i}.resnet.{j}.increment" for i in range(4) for j in range(3))
_TRAINING_ONLY = ("logit_scale", "self_logit_scale")  # temperatures of losses, kept in checkpoints


class _NormConv(nn.Conv2d):
    """A convolution without bias and the norm behind it, under the names of the published weights."""

    def __init__(self, channels: int, out: int, kernel: int, groups: int) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        inner = out // 4
        self.conv1 = _NormConv(channels, inner, 1, groups)
        self.conv2 = _NormConv(inner, inner, 3, groups)
        self.conv3 = _NormConv(inner, out, 1, groups)
        self.shortcut = _NormConv(channels, out, 1, groups) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        deep = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(deep + (x if self.shortcut is None else self.shortcut(x)))


class AggregationNetwork(nn.Module):
    """Maps of several layers and steps -> one map; of Diffusion Hyperfeatures, GeoAware-SC and DIY-SC.

    Every layer's map goes through a bottleneck of its own; the results are summed with softmax weights, one per step
    of the diffusion and layer. The bottlenecks are shared by the steps, so maps can be added one by one and thrown
    away.

    Args:
        feature_dims: channels of each layer's map.
        projection: channels of the result.
        steps: of the diffusion whose maps are joined.
        groups: of every norm.
        blocks: bottlenecks behind each other, per layer.
    """

    def __init__(
        self, feature_dims: Sequence[int], *, projection: int = 384, steps: int = 1, groups: int = 32, blocks: int = 1
    ) -> None:
        super().__init__()
        self.feature_dims, self.projection, self.steps = tuple(feature_dims), projection, steps
        self.bottleneck_layers = nn.ModuleList(
            nn.Sequential(*(_Bottleneck(projection if b else dim, projection, groups) for b in range(blocks)))
            for dim in feature_dims
        )
        self.mixing_weights = nn.Parameter(torch.ones(steps * len(self.feature_dims)))

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor], *, groups: int = 32) -> AggregationNetwork:
        """Build the network that some weights belong to; its sizes are read off their shapes.

        Raises:
            BackboneError: the weights are not those of such a network.
        """
        weights = {key: value for key, value in weights.items() if key not in _TRAINING_ONLY}
        layers = {int(key.split(".")[1]) for key in weights if key.startswith("bottleneck_layers.")}
        first = "bottleneck_layers.{}.0.conv1.weight"
        if not layers or "mixing_weights" not in weights or first.format(max(layers)) not in weights:
            raise BackboneError(f"is no aggregation network: it holds {', '.join(sorted(weights)[:3]) or 'nothing'}")
        projection = int(weights["bottleneck_layers.0.0.conv3.weight"].shape[0])
        network = cls(
            [int(weights[first.format(layer)].shape[1]) for layer in sorted(layers)],
            projection=projection,
            steps=weights["mixing_weights"].numel() // len(layers),
            groups=groups,
            blocks=1 + max(int(key.split(".")[2]) for key in weights if key.startswith("bottleneck_layers.")),
        )
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise BackboneError(f"is no aggregation network ({one_line(error)})") from None
        return network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, *, groups: int = 32) -> AggregationNetwork:
        """Read safetensors, or a published ``.pt`` or ``.pth`` (tensors only, no code is run).

        Raises:
            BackboneError: the file holds something else; named.
        """
        weights = read_weights(path)
        try:
            return cls.from_state_dict(weights, groups=groups)
        except BackboneError as error:
            raise BackboneError(f"{path}: {error}") from None

    def share(self, layer: int, features: Tensor, *, step: int = 0) -> Tensor:
        """What one map adds to the result: (B, C, h, w) -> (B, projection, h, w)."""
        weight = self.mixing_weights.softmax(0)[step * len(self.feature_dims) + layer]
        projected: Tensor = self.bottleneck_layers[layer](features)
        return weight * projected

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Join maps of one size, steps outer and layers inner: each (B, C, h, w) -> (B, projection, h, w).

        Raises:
            ValueError: there are more or fewer maps than the network joins.
        """
        layers = len(self.feature_dims)
        if len(maps) != self.steps * layers:
            raise ValueError(f"this network joins {self.steps} steps of {layers} maps each, got {len(maps)} maps")
        shares = (self.share(i % layers, features, step=i // layers) for i, features in enumerate(maps))
        return reduce(torch.add, shares)


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
    saved: tuple[int, ...] = (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)
    mode: Literal["inversion", "generation"] = "inversion"
    guidance: float | None = None

    def __post_init__(self) -> None:
        check(self, steps="1..1000")
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
        maps = backbone.context_maps(
            here, [*wanted, "out"] if predicting else wanted, before, context.expand(len(here), -1, -1)
        )
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

    takes = frozenset(("prompt", "posterior"))

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
        sampled = conditions.posterior == "sample"
        spread = std * draw_noise(mean.shape[1:], conditions.seed, stream=1).to(std) if sampled else None
        latents = self.base.noisy(mean, spread, None, 0)
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
        unconditional = None if unconditional is None else unconditional.to(latents)
        steps = follow(
            self.base, latents, self.read, self.trajectory, context=context.to(latents), unconditional=unconditional
        )

        def shares() -> Iterator[Tensor]:
            for step in steps:
                for layer, tap in enumerate(self.read if step.maps else ()):
                    resized = F.interpolate(step.maps.pop(tap), size=size, mode="bilinear", align_corners=False)
                    yield self.aggregation.share(layer, resized, step=self.trajectory.saved.index(step.number))

        return reduce(torch.add, shares())
