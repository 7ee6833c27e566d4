"""Vision transformers as backbones: timm's ViTs (DINO, DINOv2, DINOv3, ...) and open_clip's image towers.

Taps are ``layer.N``, the raw output of block N without the final norm, and its facets ``layer.N.query``,
``layer.N.key``, ``layer.N.value``: the projections of block N's self-attention, unscaled, with the head index
fastest among the channels, as the extractor of Amir et al. orders them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import Backbone, BackboneError, Conditions, Grid, Reader, Recommended, TapInfo, reading
from diffrep.images import Sizing

FACETS = ("query", "key", "value")


@dataclass(frozen=True)
class PositionRule:
    """How a learned position embedding is brought to another grid.

    DINO and DINOv2 resample without antialiasing, by scale factors that carry an offset of 0.1 cells;
    DINOv2 with registers, and timm for all others, antialias to the exact size.
    """

    antialias: bool = True
    offset: float = 0.0

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
    """

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
        self._is_timm = hasattr(network, "patch_embed")
        convolution = network.patch_embed.proj if self._is_timm else network.conv1
        self._blocks: Sequence[Any] = list(network.blocks if self._is_timm else network.transformer.resblocks)
        # behind a convolutional stem, the patches are patches of a smaller map
        shrink = int(network.patch_embed.feature_ratio[0]) if _has_stem(network) else 1
        self.patch = self.multiple = shrink * int(convolution.kernel_size[0])
        self.stride = stride or shrink * int(convolution.stride[0])
        if not shrink <= self.stride <= self.patch or self.stride % shrink:
            steps = f"a multiple of {shrink} in {shrink}" if shrink > 1 else "in 1"
            raise ValueError(f"stride must be {steps}..{self.patch}, the patch size of {name}, got {self.stride}")
        convolution.stride = (self.stride // shrink, self.stride // shrink)
        self.prefix = int(network.num_prefix_tokens) if self._is_timm else 1
        self.channels = int(network.embed_dim if self._is_timm else convolution.out_channels)
        rule = positions or PositionRule()
        if self._is_timm and getattr(network, "pos_embed", None) is not None:
            network._pos_embed = MethodType(partial(_add_positions, rule=rule), network)
        elif not self._is_timm:
            network._embeds = MethodType(partial(_open_clip_embeds, rule=rule), network)
        self.recommended = Recommended(
            taps=(f"layer.{len(self._blocks) - 1}",),
            sizing=Sizing(mode="squash", size=size or 16 * self.patch, resample="bicubic"),
        )

    def taps(self) -> tuple[TapInfo, ...]:
        names = [(i, suffix) for i in range(len(self._blocks)) for suffix in (*(f".{facet}" for facet in FACETS), "")]
        return tuple(
            TapInfo(f"layer.{i}{suffix}", self.channels, self.stride, self._module_path(i, bool(suffix)))
            for i, suffix in names
        )

    def _module_path(self, layer: int, facet: bool) -> str:
        path = f"{'blocks' if self._is_timm else 'transformer.resblocks'}.{layer}"
        return f"{path}.attn" if facet else path

    def _reader(self, layer: int, facet: str | None) -> Reader:
        """Where a layer or one of its facets is read."""
        block = self._blocks[layer]
        if facet is None:
            return Reader(block, self._output)
        # a facet is read behind the norm, before any attention is computed
        return Reader(block.norm1 if self._is_timm else block.ln_1, partial(self._facet, block, facet))

    def _forward(self, normalised: Tensor) -> None:
        self.network(normalised)

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

    @torch.inference_mode()
    def tokens(self, pixels: Tensor, taps: Sequence[str], *, batch_size: int = 8) -> dict[str, Tensor]:
        """Read activations with the prefix tokens (class, registers) in front of the patches.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].

        Returns:
            tap -> (B, prefix + patches, C).

        Raises:
            ValueError: a side is smaller than a patch, or the canvas is not covered by whole patches.
        """
        for side in pixels.shape[-2:]:
            if side < self.patch or (side - self.patch) % self.stride:
                raise ValueError(
                    f"{self.name} needs sides of {self.patch} + n * {self.stride} pixels,"
                    f" got {tuple(pixels.shape[-2:])}"
                )
        readers = {}
        for tap in taps:
            self.tap(tap)
            _, layer, *facet = tap.split(".")
            readers[tap] = self._reader(int(layer), facet[0] if facet else None)
        results: dict[str, list[Tensor]] = {tap: [] for tap in taps}
        mean, std = (v[:, None, None].to(self.device) for v in (self.mean, self.std))
        for chunk in pixels.split(batch_size):
            normalised = ((chunk.to(self.device) - mean) / std).to(self.dtype)
            with reading(readers) as activations:
                self._forward(normalised)
            for tap, value in activations.items():
                results[tap].append(value)
        return {tap: torch.cat(values) for tap, values in results.items()}

    def _output(self, inputs: Any, named: Any, output: Tensor) -> Tensor:
        return output

    def _facet(self, block: Any, facet: str, inputs: Any, named: Any, normalised: Tensor) -> Tensor:
        """One third of the joint projection, its heads interleaved: channel d * heads + head."""
        index = FACETS.index(facet)
        weight, bias, heads = _qkv(block.attn)
        part = slice(index * weight.shape[0] // 3, (index + 1) * weight.shape[0] // 3)
        projected = F.linear(normalised, weight[part], None if bias is None else bias[part])
        return projected.unflatten(2, (heads, -1)).mT.flatten(2)


def _has_stem(network: Any) -> bool:
    """Whether it is one of timm's hybrids, whose patches are cut from the maps of a convolutional network."""
    return hasattr(network, "patch_embed") and hasattr(network.patch_embed, "backbone")


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


def timm_backbone(
    architecture: str,
    *,
    model_args: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    pretrained: bool = False,
    stride: int | None = None,
    positions: PositionRule | None = None,
    name: str,
    source: str,
) -> VisionTransformer:
    """Build a ViT by its timm architecture name.

    Args:
        weights: a state dict in timm's or DINOv2's key names; strictly loaded.
        config: timm's ``pretrained_cfg``: mean, std, input size.
        pretrained: fetch the weights that timm names, where `weights` is None.

    Raises:
        BackboneError: the model is no ViT, or the weights do not fit it.
    """
    import timm
    from timm.models import eva, vision_transformer

    arguments = {"dynamic_img_size": True, "num_classes": 0, **(model_args or {})}
    try:
        network: Any = timm.create_model(architecture, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise BackboneError(f"{name}: timm cannot build {architecture} as a ViT of any image size ({error})") from None
    if not hasattr(network, "blocks") or not hasattr(network, "num_prefix_tokens"):
        raise BackboneError(f"{name}: {architecture} is a {type(network).__name__}; only ViTs can be tapped here")
    if weights is not None:
        if "storage_tokens" in weights:  # DINOv3's own key names
            weights = eva.checkpoint_filter_fn(dict(weights), network)
        elif "mask_token" in weights or "register_tokens" in weights:  # DINOv2's
            weights = vision_transformer._convert_dinov2(dict(weights), network)
        weights = {k: v for k, v in weights.items() if not k.startswith(("head.", "fc_norm."))}
        missing, unexpected = network.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise BackboneError(
                f"{source}: the weights do not fit {architecture}:"
                f" missing {missing[:3]} ({len(missing)}), left over {unexpected[:3]} ({len(unexpected)})"
            )
    config = {**network.pretrained_cfg, **(config or {})} if not isinstance(network.pretrained_cfg, type(None)) else {}
    if positions is None:
        plain_dino = "dino" in (architecture + str(config.get("tag", ""))) and network.reg_token is None
        positions = PositionRule(antialias=False, offset=0.1) if plain_dino else PositionRule()
    side = (config.get("input_size") or (3, 224, 224))[-1]
    return VisionTransformer(
        network,
        mean=config.get("mean", (0.485, 0.456, 0.406)),
        std=config.get("std", (0.229, 0.224, 0.225)),
        stride=stride,
        positions=positions,
        name=name,
        source=source,
        size=int(side),
    )


def dinov2_backbone(
    weights: dict[str, Tensor], config: dict[str, Any], *, stride: int | None = None, name: str, source: str
) -> VisionTransformer:
    """A DINOv2 checkpoint with the published key names and its configuration.

    Args:
        config: img_size, patch_size, embed_dim, depth, num_heads, num_register_tokens, interpolate_antialias,
            interpolate_offset.
    """
    registers = int(config.get("num_register_tokens", 0))
    gated = any(".mlp.w12." in key for key in weights)
    hidden = next((v.shape[0] for k, v in weights.items() if k.endswith(("mlp.fc1.weight", "mlp.w12.weight"))), None)
    model_args: dict[str, Any] = {
        "img_size": config["img_size"],
        "patch_size": config["patch_size"],
        "embed_dim": config["embed_dim"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
        "init_values": 1.0,
    }
    if hidden is not None:
        model_args["mlp_ratio"] = hidden / config["embed_dim"]
    if gated:
        from timm.layers import SwiGLUPacked

        model_args |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return timm_backbone(
        "vit_base_patch14_dinov2",
        model_args=model_args,
        weights=weights,
        config={"input_size": (3, config["img_size"], config["img_size"])},
        stride=stride,
        positions=PositionRule(
            antialias=bool(config.get("interpolate_antialias", False)),
            offset=float(config.get("interpolate_offset", 0.1)),
        ),
        name=name,
        source=source,
    )
