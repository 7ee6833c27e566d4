"""Vision transformers as backbones: ViTs of timm and transformers (DINO, CLIP, ...), image towers of open_clip.

Taps are ``layer.N``, the raw output of block N without the final norm, and its facets ``layer.N.query``,
``layer.N.key``, ``layer.N.value``: the projections of block N's self-attention, unscaled, with the head index
fastest among the channels, as the extractor of Amir et al. orders them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import (
    Backbone,
    BackboneError,
    Call,
    Conditions,
    Grid,
    Reader,
    Recommended,
    TapInfo,
    reading,
)
from diffrep.files import save_weights, write_document
from diffrep.images import Sizing
from diffrep.settings import check

FACETS = ("query", "key", "value")


@dataclass(frozen=True)
class PositionRule:
    """How a learned position embedding is brought to another grid.

    DINO and DINOv2 resample without antialiasing, by scale factors that carry an offset of 0.1 cells;
    DINOv2 with registers, and timm for all others, antialias to the exact size.
    """

    antialias: bool = True
    offset: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    def resample(self, table: Tensor, size: tuple[int, int]) -> Tensor:
        """(1, M * M, C) trained on a square -> (1, h * w, C)."""
        side = math.isqrt(table.shape[1])
        if size == (side, side):
            return table
        grid = table.float().mT.unflatten(2, (side, side))
        if self.offset:
            scale = [(s + self.offset) / side for s in size]
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=self.antialias)
        else:
            grid = F.interpolate(grid, size=size, mode="bicubic", antialias=self.antialias)
        return grid.flatten(2).mT.to(table.dtype)


class VisionTransformer(Backbone):
    """A frozen ViT.

    Args:
        network: timm `VisionTransformer` or `Eva` built with ``dynamic_img_size=True``, or open_clip's
            `VisionTransformer`.
        mean, std: of the normalisation that the weights were trained with, RGB in [0, 1].
        stride: pixels between patches; smaller than the patch size gives overlapping patches and a finer map.
        positions: how a learned position embedding is resampled.

    Attributes:
        record: ``config.json`` of its folder in timm's layout; None: it cannot be written as one.
    """

    record: Mapping[str, Any] | None = None

    def __init__(
        self,
        network: Any,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        stride: int | None = None,
        positions: PositionRule | None = None,
        name: str = "vision transformer",
        source: str = "random",
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.source = name, source
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        if hasattr(network, "patch_embed"):  # timm
            self._path, self._norm, convolution = "blocks", "norm1", network.patch_embed.proj
            self.prefix, self.channels = int(network.num_prefix_tokens), int(network.embed_dim)
        else:
            self._path, self._norm, convolution = "transformer.resblocks", "ln_1", network.conv1
            self.prefix, self.channels = 1, int(convolution.out_channels)
        self._blocks: Sequence[Any] = list(network.get_submodule(self._path))
        # behind a convolutional stem, the patches are patches of a smaller map
        stem = getattr(getattr(network, "patch_embed", None), "backbone", None)
        shrink = int(network.patch_embed.feature_ratio[0]) if stem is not None else 1
        self.patch = self.multiple = shrink * int(convolution.kernel_size[0])
        self.stride = stride or shrink * int(convolution.stride[0])
        if not shrink <= self.stride <= self.patch or self.stride % shrink:
            steps = f"a multiple of {shrink} in {shrink}" if shrink > 1 else "in 1"
            raise ValueError(f"stride must be {steps}..{self.patch}, the patch size of {name}, got {self.stride}")
        convolution.stride = (self.stride // shrink, self.stride // shrink)
        rule = positions or PositionRule()
        if not hasattr(network, "patch_embed"):
            network._embeds = MethodType(partial(_open_clip_embeds, rule=rule), network)
        elif getattr(network, "pos_embed", None) is not None:
            network._pos_embed = MethodType(partial(_add_positions, rule=rule), network)
        self.recommended = _recommended(len(self._blocks), size or 16 * self.patch)

    def taps(self) -> tuple[TapInfo, ...]:
        names = [(i, suffix) for i in range(len(self._blocks)) for suffix in (*(f".{facet}" for facet in FACETS), "")]
        return tuple(
            TapInfo(f"layer.{i}{suffix}", self.channels, self.stride, f"{self._path}.{i}{'.attn' if suffix else ''}")
            for i, suffix in names
        )

    def _reader(self, block: Any, facet: str | None) -> Reader:
        """Where a block or one of its facets is read."""
        if facet is None:
            return Reader(block)
        # a facet is read behind the norm, before any attention is computed
        return Reader(getattr(block, self._norm), partial(_facet, block, facet))

    def _forward(self, normalised: Tensor) -> None:
        self.network(normalised)

    @property
    def final_norm(self) -> nn.Module:
        """What the tokens of the last block go through at the network's end."""
        network: Any = self.network
        return network.norm if hasattr(network, "patch_embed") else network.ln_post

    def grid(self, tap: str, canvas_size: Sequence[int], map_size: Sequence[int]) -> Grid:
        centre = (self.patch - 1) / 2
        return Grid(origin=(centre, centre), stride=(float(self.stride), float(self.stride)))

    @torch.inference_mode()
    def maps(
        self, pixels: Tensor, taps: Sequence[str], conditions: Conditions | None = None, *, batch_size: int = 8
    ) -> dict[str, Tensor]:
        height, width = (1 + (side - self.patch) // self.stride for side in pixels.shape[-2:])
        tokens = self.tokens(pixels, taps, batch_size=batch_size)
        return {tap: t[:, self.prefix :].mT.unflatten(2, (height, width)) for tap, t in tokens.items()}

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write timm's layout. It has no stride: one other than the patch size is named again in `from_pretrained`."""
        if self.record is None:
            return super()._save_pretrained(save_directory)  # which says that it cannot
        write_document(save_directory / "config.json", self.record)
        save_weights(save_directory / "model.safetensors", self.network.state_dict())

    @torch.inference_mode()
    def tokens(self, pixels: Tensor, taps: Sequence[str], *, batch_size: int = 8) -> dict[str, Tensor]:
        """Read activations with the prefix tokens (class, registers) in front of the patches.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].

        Returns:
            tap -> (B, prefix + patches, C).

        Raises:
            ValueError: a side is smaller than a patch, or no whole number of patches or strides.
        """
        for side in pixels.shape[-2:]:  # of whole patches, a finer stride may leave less than a stride unread (sd-dino)
            if side < self.patch or ((side - self.patch) % self.stride and side % self.patch):
                near = self.patch + max(side - self.patch, 0) // self.stride * self.stride
                raise ValueError(
                    f"{self.name} needs sides of {self.patch} + n * {self.stride} pixels, for example {near}, got"
                    f" {tuple(pixels.shape[-2:])}"
                )
        readers = {}
        for tap in taps:
            self.tap(tap)
            _, layer, *facet = tap.split(".")
            readers[tap] = self._reader(self._blocks[int(layer)], facet[0] if facet else None)

        def run(normalised: Tensor) -> dict[str, Tensor]:
            with reading(readers) as activations:
                self._forward(normalised)
            return activations

        results: dict[str, list[Tensor]] = {tap: [] for tap in taps}
        mean, std = (v[:, None, None].to(self.device) for v in (self.mean, self.std))
        for chunk in pixels.split(batch_size):
            normalised = ((chunk.to(self.device) - mean) / std).to(self.dtype)
            for tap, value in self.graphs(tuple(taps), run, normalised).items():
                results[tap].append(value)
        return {tap: torch.cat(values) for tap, values in results.items()}


class SavedVit(VisionTransformer):
    """A ViT of the library transformers, run by its code, so that features are those of what saved it.

    Args:
        network: the model or its vision tower; it gives tokens of which the last are the patches, row by row.
        mean, std: of the normalisation before it.
        size: pixels, the side of the square that it was trained on.

    Raises:
        BackboneError: its layers are not those of a plain ViT.
    """

    def __init__(
        self,
        network: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        name: str = "vision transformer",
        source: str = "random",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.name, self.source = name, source
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        config = network.config
        self.patch = self.stride = self.multiple = int(config.patch_size)
        self.channels, self.heads = int(config.hidden_size), int(config.num_attention_heads)
        lists = [(p, m) for p, m in network.named_modules() if isinstance(m, nn.ModuleList)]
        layers = [(p, m) for p, m in lists if len(m) == config.num_hidden_layers]
        if len(layers) != 1:
            raise BackboneError(f"{name}: a {type(network).__name__} has no plain list of layers that could be tapped")
        self._path, self._blocks = layers[0][0], list(layers[0][1])
        accepted = inspect.signature(network.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        self.prefix = self._count_prefix()
        self.recommended = _recommended(len(self._blocks), max(1, size // self.patch) * self.patch)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write transformers' layout."""
        self.network.save_pretrained(save_directory)
        about = {"image_mean": self.mean.tolist(), "image_std": self.std.tolist()}
        size = self.recommended.sizing.size
        write_document(save_directory / "preprocessor_config.json", about | {"size": {"height": size, "width": size}})

    @torch.inference_mode()
    def _count_prefix(self) -> int:
        """How many tokens stand before the patches: class and register tokens."""
        side = 2 * self.patch
        with reading({"first": Reader(self._blocks[0])}) as tokens:
            self._forward(torch.zeros(1, 3, side, side, dtype=self.dtype, device=self.device))
        return int(tokens["first"].shape[1]) - 4

    def _forward(self, normalised: Tensor) -> None:
        self.network(pixel_values=normalised, **self._options)

    @property
    def final_norm(self) -> nn.Module:
        """The first norm that is registered behind the layers; the tokens stay as they are where there is none."""
        modules = list(self.network.named_modules())
        behind = modules[[path for path, _ in modules].index(self._path) :]
        outside = (module for path, module in behind if not path.startswith(f"{self._path}."))
        return next((module for module in outside if type(module).__name__.endswith("Norm")), nn.Identity())

    def taps(self) -> tuple[TapInfo, ...]:
        return tuple(replace(tap, module=tap.module.removesuffix(".attn")) for tap in super().taps())

    def _reader(self, block: Any, facet: str | None) -> Reader:
        if facet is None:
            return Reader(block)
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in (facet, f"{facet[0]}_proj"):
                return Reader(module, lambda call: _interleaved(self.heads, call.output))
        raise BackboneError(f"{self.name}: its layers have no projection of their own for {facet}")


def _recommended(layers: int, size: int) -> Recommended:
    """The last layer of squares of that many pixels."""
    return Recommended(taps=(f"layer.{layers - 1}",), sizing=Sizing(mode="squash", size=size, resample="bicubic"))


def _facet(block: Any, facet: str, call: Call) -> Tensor:
    """One third of the joint projection of a block's input behind its norm."""
    index = FACETS.index(facet)
    weight, bias, heads = _qkv(block.attn)
    part = slice(index * weight.shape[0] // 3, (index + 1) * weight.shape[0] // 3)
    return _interleaved(heads, F.linear(call.output, weight[part], None if bias is None else bias[part]))


def _interleaved(heads: int, projected: Tensor) -> Tensor:
    """A projection with the head index fastest among its channels: channel d * heads + head."""
    return projected.unflatten(2, (heads, -1)).mT.flatten(2)


def _qkv(attention: Any) -> tuple[Tensor, Tensor | None, int]:
    """Weight, bias and head count of the joint query, key and value projection."""
    if isinstance(attention, nn.MultiheadAttention):
        assert attention.in_proj_weight is not None
        return attention.in_proj_weight, attention.in_proj_bias, attention.num_heads
    if getattr(attention, "qkv", None) is None:
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [p.bias if p.bias is not None else p.weight.new_zeros(p.weight.shape[0]) for p in parts]
        return torch.cat([p.weight for p in parts]), torch.cat(biases), int(attention.num_heads)
    bias = attention.qkv.bias
    if bias is None and getattr(attention, "q_bias", None) is not None:  # EVA keeps them apart, with no key bias
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    return attention.qkv.weight, bias, int(attention.num_heads)


def _add_positions(network: Any, x: Tensor, *, rule: PositionRule) -> Any:
    """timm's `_pos_embed` with our resampling rule. x is (B, h, w, C) patches."""
    batch, height, width, channels = x.shape
    prefix = [t.expand(batch, -1, -1) for t in (network.cls_token, network.reg_token) if t is not None]
    in_table = 0 if network.no_embed_class else network.num_prefix_tokens
    table = network.pos_embed
    x = x.reshape(batch, -1, channels) + rule.resample(table[:, in_table:], (height, width))
    tokens = torch.cat(prefix, dim=1) if prefix else x[:, :0]
    if in_table:
        tokens = tokens + table[:, :in_table]
    x = network.pos_drop(torch.cat([tokens, x], dim=1))
    if getattr(network, "rope", None) is not None:
        return x, network.rope.get_embed(shape=(height, width))
    return x if type(network).__name__ != "Eva" else (x, None)


def _open_clip_embeds(tower: Any, x: Tensor, *, rule: PositionRule) -> Tensor:
    """open_clip's embedding step for any image size."""
    x = tower.conv1(x)
    size = (int(x.shape[-2]), int(x.shape[-1]))
    x = x.flatten(2).mT
    table = tower.positional_embedding.to(x.dtype)[None]
    x = x + rule.resample(table[:, 1:], size)
    first = tower.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1) + table[:, :1]
    return tower.ln_pre(torch.cat([first, x], dim=1))
