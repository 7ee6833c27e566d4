"""The aggregation network of Diffusion Hyperfeatures, which GeoAware-SC and DIY-SC use as well.

Every layer's map goes through a bottleneck of its own; the results are summed with softmax weights, one per step of
the diffusion and layer. The bottlenecks are shared by the steps, so maps can be added one by one and thrown away.

Source: diffusion-hyperfeatures/diffusion_hyperfeatures 4a5ec2b, archs/aggregation_network.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import BackboneError
from diffrep.backbones.weight_files import read_weights

TRAINING_ONLY = ("logit_scale", "self_logit_scale")  # temperatures of losses, kept in checkpoints


class _NormConv(nn.Conv2d):
    """A convolution without bias and the norm behind it, under the names of the published weights."""

    def __init__(self, channels: int, out: int, kernel: int, groups: int) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norm(super().forward(x))
        return normalised


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
    """Maps of several layers and steps -> one map.

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
        weights = {key: value for key, value in weights.items() if key not in TRAINING_ONLY}
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
            raise BackboneError(f"is no aggregation network ({' '.join(str(error).split())[:200]})") from None
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
        total = next(shares)
        for part in shares:
            total = total + part
        return total
