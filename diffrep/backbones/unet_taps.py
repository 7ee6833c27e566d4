"""The tap grammar of diffusers' U-Nets.

==============================  =====================================================================
``in``, ``out``                 what goes into the U-Net, and what comes out
``conv_in``                     the first convolution
``down.2``, ``mid``, ``up.1``   output of a whole block, with its down- or upsampler
``up.1.resnet.2``               output of a residual block
``up.1.resnet.2.increment``     its residual branch before the shortcut is added
``up.1.attention.0``            output of a transformer, with its outer residual
``up.1.attention.0.block.0``    output of one of its transformer blocks
``...block.0.self.q``           queries of self-attention before the heads are split; also ``k``, ``v``
``...block.0.cross.q``          queries of cross-attention (its keys and values have no place in the image)
``...block.0.self.map``         attention of every place (cell) to every place: channel head * places + place;
                                ``cross.map``: to every token of the prompt
``...block.0.ff``               inner activation of the feed-forward network
``down.0.downsampler``          the resampling convolution; also ``up.0.upsampler``
==============================  =====================================================================

Blocks count as diffusers counts them: ``up.0`` is the coarsest. DIFT's ``up_ft_index`` N is ``up.N``;
sd-dino's s5, s4, s3 are ``up.0.resnet.1``, ``up.1.attention.1``, ``up.2.attention.1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from diffrep.backbones.base import Reader, TapInfo


def unet_taps(unet: Any, vae_stride: int) -> dict[str, TapInfo]:
    """All taps of a `UNet2DConditionModel` or `UNet2DModel` in the order in which they are computed.

    Args:
        vae_stride: image pixels per latent cell; 1 where the U-Net sees the pixels.
    """
    taps: dict[str, TapInfo] = {}
    stride = vae_stride

    def add(name: str, channels: int, path: str) -> None:
        taps[name] = TapInfo(name, channels, stride, path)

    def add_layers(stage: str, block: Any, path: str) -> int:
        """Resnets with the attention behind each (in the mid block: resnet, attention, resnet)."""
        channels = 0
        attentions = [a for a in getattr(block, "attentions", None) or [] if a is not None]
        offset = 1 if stage == "mid" else 0
        for j, resnet in enumerate(block.resnets):
            if stage == "mid" and j > 0 and j <= len(attentions):
                _add_attention(add, f"{stage}.attention.{j - 1}", attentions[j - 1], f"{path}.attentions.{j - 1}")
            channels = resnet.out_channels
            add(f"{stage}.resnet.{j}.increment", channels, f"{path}.resnets.{j}.conv2")
            add(f"{stage}.resnet.{j}", channels, f"{path}.resnets.{j}")
            if not offset and j < len(attentions):
                _add_attention(add, f"{stage}.attention.{j}", attentions[j], f"{path}.attentions.{j}")
        return channels

    add("in", unet.config.in_channels, "conv_in")
    add("conv_in", unet.conv_in.out_channels, "conv_in")
    for i, block in enumerate(unet.down_blocks):
        channels = add_layers(f"down.{i}", block, f"down_blocks.{i}")
        if getattr(block, "downsamplers", None):
            stride *= 2
            add(f"down.{i}.downsampler", channels, f"down_blocks.{i}.downsamplers.0")
        add(f"down.{i}", channels, f"down_blocks.{i}")
    if unet.mid_block is not None:
        add("mid", add_layers("mid", unet.mid_block, "mid_block"), "mid_block")
    for i, block in enumerate(unet.up_blocks):
        channels = add_layers(f"up.{i}", block, f"up_blocks.{i}")
        if getattr(block, "upsamplers", None):
            stride //= 2
            add(f"up.{i}.upsampler", channels, f"up_blocks.{i}.upsamplers.0")
        add(f"up.{i}", channels, f"up_blocks.{i}")
    add("out", unet.config.out_channels, "conv_out")
    return taps


def _add_attention(add: Callable[[str, int, str], None], name: str, transformer: Any, path: str) -> None:
    if not hasattr(transformer, "transformer_blocks"):  # the bare self-attention of pixel U-Nets
        add(name, transformer.to_out[0].out_features, path)
        return
    for n, block in enumerate(transformer.transformer_blocks):
        inner, where = f"{name}.block.{n}", f"{path}.transformer_blocks.{n}"
        for projection in ("q", "k", "v"):
            linear = getattr(block.attn1, f"to_{projection}")
            add(f"{inner}.self.{projection}", linear.out_features, f"{where}.attn1.to_{projection}")
        add(f"{inner}.self.map", 0, f"{where}.attn1")
        if getattr(block, "attn2", None) is not None:
            add(f"{inner}.cross.q", block.attn2.to_q.out_features, f"{where}.attn2.to_q")
            add(f"{inner}.cross.map", 0, f"{where}.attn2")
        add(f"{inner}.ff", block.ff.net[-1].in_features, f"{where}.ff.net.0")
        add(inner, block.ff.net[-1].out_features, where)
    add(name, getattr(transformer, "out_channels", None) or transformer.in_channels, path)


def tap_readers(unet: nn.Module, taps: Mapping[str, TapInfo]) -> dict[str, Reader]:
    """tap -> where it is read."""
    readers = {}
    for name, tap in taps.items():
        module = unet.get_submodule(tap.module)
        if name == "in":
            readers[name] = Reader(module, _read_input, before=True)
        elif name.endswith(".map"):
            readers[name] = Reader(module, partial(_attention_map, module), before=True)
        else:
            readers[name] = Reader(module, _read_output)
    return readers


def _read_input(inputs: tuple[Any, ...], named: Mapping[str, Any], output: None) -> Tensor:
    value: Tensor = inputs[0]
    return value


def _read_output(inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    value: Tensor = output.sample if hasattr(output, "sample") else output[0]  # down blocks also return their skips
    return value


def _attention_map(attention: Any, inputs: tuple[Any, ...], named: Mapping[str, Any], output: None) -> Tensor:
    """softmax(q k^T / sqrt(d)), which fused attention never writes down: (B, places, heads * keys)."""
    places = inputs[0]
    seen = named.get("encoder_hidden_states")
    queries, keys = attention.to_q(places), attention.to_k(places if seen is None else seen)
    queries, keys = (t.float().unflatten(2, (attention.heads, -1)).transpose(1, 2) for t in (queries, keys))
    weights = (queries @ keys.mT * attention.scale).softmax(-1)
    return weights.transpose(1, 2).flatten(2).to(places.dtype)


def tokens_to_map(tokens: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """(B, N, C) tokens, row by row -> (B, C, h, w), for a grid of N cells over a latent of that size.

    Every downsampling of the U-Net rounds up, so the grid is the latent halved some times.
    """
    if tokens.ndim != 3:
        return tokens
    height, width = latent_size
    while height * width > tokens.shape[1] and (height > 1 or width > 1):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not form a grid over a latent of {latent_size}")
    return tokens.mT.unflatten(2, (height, width))


def cross_attentions(unet: nn.Module) -> Iterator[Any]:
    """The cross-attention layers of a U-Net."""
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            yield module
