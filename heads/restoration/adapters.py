"""Low-rank adapters as restorers publish them: merged into the weights, or turned by what is wrong with an image.

PiSA-SR and OSEDiff add ``(8 / r) B A`` to a layer's weight. S3Diff puts a matrix of r x r between A and B that two
small networks compute for each image from its blur and noise, so that nothing can be merged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.heads.head import HeadError

ALPHA = 8  # peft's default, which the authors left as it is: layers are added with 8 / rank
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?:(?P<adapter>\w+)\.)?weight")
Factors = tuple[Tensor, Tensor]
"""A (r, in, ...) and B (out, r, ...) of a layer."""


def split_adapters(
    weights: Mapping[str, Tensor], *, name: str
) -> tuple[dict[str, dict[str, Factors]], dict[str, Tensor]]:
    """Adapter -> layer -> its factors, and the weights that belong to no adapter.

    Raises:
        HeadError: a layer has one factor alone, or two that do not fit each other.
    """
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    others = {}
    for key, value in weights.items():
        if match := _KEY.fullmatch(key):
            sides.setdefault((match["adapter"] or "", match["layer"]), {})[match["side"]] = value
        else:
            others[key] = value
    adapters: dict[str, dict[str, Factors]] = {}
    for (adapter, layer), pair in sides.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise HeadError(f"{name}: lora_A and lora_B of {layer} ({adapter or 'unnamed'}) are not a pair of one rank")
        adapters.setdefault(adapter, {})[layer] = pair["A"].float(), pair["B"].float()
    return adapters, others


def product(factors: Factors) -> Tensor:
    """What a pair adds to a layer's weight, of the weight's shape: (8 / r) B A."""
    first, second = factors
    added = torch.einsum("or,r...->o...", second.flatten(1), first)
    return added * (ALPHA / len(first))


@torch.no_grad()
def merge(network: nn.Module, adapters: Sequence[Mapping[str, Factors]], *, name: str) -> None:
    """Add adapters to the layers of a network, in place.

    Raises:
        HeadError: the network has no such layer, or one of another shape.
    """
    weights = dict(network.named_parameters())
    for adapter in adapters:
        for layer, factors in adapter.items():
            weight, added = weights.get(f"{layer}.weight"), product(factors)
            if weight is None or weight.shape != added.shape:
                shape = "no such layer" if weight is None else f"one of {tuple(weight.shape)}"
                raise HeadError(f"{name}: adapts {layer} with {tuple(added.shape)}, the base has {shape}")
            weight.add_(added.to(weight))


class DegradationEstimator(nn.Module):
    """How blurred and how noisy an image is: MM-RealSR's ``DEResNet`` (arXiv 2207.04987), with its weights' names.

    Args:
        widths, blocks, strides: of each stage; a convolution leads to the next width behind a stage.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 64, 64, 128), blocks: Sequence[int] = (2, 2, 2, 2),
        strides: Sequence[int] = (1, 1, 2, 1), degradations: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_first, self.body, self.fc_degree = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(degradations):
            layers: list[nn.Module] = []
            for stage, (width, count, stride) in enumerate(zip(widths, blocks, strides, strict=True)):
                layers += [_PlainBlock(width) for _ in range(count)]
                following = widths[min(stage + 1, len(widths) - 1)]
                if stride != 1 or following != width:
                    layers.append(nn.Conv2d(width, following, 3, stride, 1))
            self.conv_first.append(nn.Conv2d(3, widths[0], 3, 1, 1))
            self.body.append(nn.Sequential(*layers))
            head = nn.Sequential(nn.Linear(widths[-1], 512), nn.ReLU(), nn.Linear(512, 1), nn.Sigmoid())
            self.fc_degree.append(head)

    def pooled(self, images: Tensor, degradation: int) -> Tensor:
        """(B, C): the mean of what the network of one degradation sees in images (B, 3, H, W)."""
        return self.body[degradation](self.conv_first[degradation](images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, 2) in (0, 1), blur and noise, of images (B, 3, H, W) in [0, 1] of their own size."""
        return torch.cat([head(self.pooled(images, number)) for number, head in enumerate(self.fc_degree)], 1)


class _PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))

    def forward(self, values: Tensor) -> Tensor:
        return values + self.conv2(torch.relu(self.conv1(values)))


class Modulation(nn.Module):
    """From an image's blur and noise to a matrix for the adapters of each block of a network.

    Attributes:
        current: (B, blocks, r, r) of the images that are in the network; `ModulatedLayer` reads it.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, blocks: Tensor, layers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies.float())
        self.blocks = nn.Parameter(blocks.float())
        parts = {part: layers[f"{part}.weight"].float() for part in ("de_mlp.0", "block_mlp.0", "fuse_mlp")}
        for part, weight in parts.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": layers[f"{part}.bias"].float()})
            self.add_module(part.removesuffix(".0"), layer)
        self.rank = math.isqrt(len(parts["fuse_mlp"]))
        self.current: Tensor | None = None

    def forward(self, scores: Tensor) -> Tensor:
        """(B, blocks, r, r) of scores (B, 2)."""
        phases = 2 * math.pi * scores[..., None] * self.frequencies
        waves = torch.cat([phases.sin(), phases.cos()], -1).flatten(1)
        degraded = torch.relu(self.get_submodule("de_mlp")(waves))
        blocks = torch.relu(self.get_submodule("block_mlp")(self.blocks))
        pairs = torch.cat([
            degraded[:, None].expand(-1, len(blocks), -1), blocks.expand(len(scores), -1, -1)
        ], -1)  # fmt: skip
        return self.get_submodule("fuse_mlp")(pairs).unflatten(-1, (self.rank, self.rank))


class ModulatedLayer(nn.Module):
    """A layer with S3Diff's adapter: ``y = W x + (8 / r) B (C^T A x)``, C of the image and of the layer's block."""

    def __init__(self, base: Any, factors: Factors, modulation: Modulation, block: int) -> None:
        super().__init__()
        first, second = factors
        self.base, self.block, self.scale = base, block, ALPHA / len(first)
        self.first = nn.Parameter(first.to(base.weight))
        self.second = nn.Parameter(second.flatten(1).to(base.weight))
        self._modulation = [modulation]  # in a list: it belongs to the machine, not to each of its layers

    def forward(self, values: Tensor, *others: Any) -> Tensor:
        matrices = self._modulation[0].current
        assert matrices is not None
        matrix = matrices[:, self.block].to(values).expand(len(values), -1, -1)
        if isinstance(self.base, nn.Conv2d):
            low = nn.functional.conv2d(values, self.first, None, self.base.stride, self.base.padding)
            low = torch.einsum("bkhw,bkr->brhw", low, matrix)
            added = torch.einsum("brhw,or->bohw", low, self.second)
        else:
            added = torch.einsum("bnk,bkr->bnr", values @ self.first.T, matrix) @ self.second.T
        return self.base(values) + self.scale * added


def modulate(network: nn.Module, adapter: Mapping[str, Factors], modulation: Modulation, *, name: str) -> None:
    """Put `ModulatedLayer` in the place of each layer that an adapter names, in place.

    Raises:
        HeadError: the network has no such layer, or one of another shape.
    """
    modules = dict(network.named_modules())
    for layer, factors in adapter.items():
        base: Any = modules.get(layer)
        if not isinstance(base, (nn.Linear, nn.Conv2d)) or base.weight.shape != product(factors).shape:
            raise HeadError(
                f"{name}: adapts {layer} with {tuple(product(factors).shape)}, which the base does not have"
            )
        parent, _, attribute = layer.rpartition(".")
        setattr(network.get_submodule(parent), attribute, ModulatedLayer(base, factors, modulation, block_of(layer)))


def block_of(layer: str) -> int:
    """The row of a layer in the table of blocks that `Modulation` has for its network.

    >>> [block_of(layer) for layer in ("down_blocks.2.x", "mid_block.x", "up_blocks.1.x", "conv_out")]
    [2, 4, 6, 9]
    >>> [block_of(f"encoder.{layer}") for layer in ("down_blocks.3.x", "mid_block.x", "conv_in")]
    [3, 4, 5]
    """
    encoder, layer = layer.startswith("encoder."), layer.removeprefix("encoder.")
    part, number = (*layer.split("."), "0")[:2]
    if part == "down_blocks":
        return int(number)
    if part == "up_blocks":
        return 5 + int(number)
    return 4 if part == "mid_block" else 5 if encoder else 9
