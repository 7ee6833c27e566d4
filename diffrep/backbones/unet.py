"""diffusers' U-Nets: the grammar of their taps, FreeU, and a faster upsampling.

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
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import Call, Reader, TapError, TapInfo, read_input, reading
from diffrep.settings import FreeU

FOLDED_FROM = 512  # cells; smaller maps are bound by reading the weights, of which there are more when they are summed


def unet_taps(unet: Any, vae_stride: int) -> dict[str, TapInfo]:
    """All taps of a `UNet2DConditionModel` or `UNet2DModel` in the order in which they are computed.

    Args:
        vae_stride: image pixels per latent cell; 1 where the U-Net sees the pixels.
    """
    taps: dict[str, TapInfo] = {}
    stride = vae_stride

    def add(name: str, channels: int, path: str) -> None:
        taps[name] = TapInfo(name, channels, stride, path)

    stages = [(f"down.{i}", f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    stages += [("mid", "mid_block", unet.mid_block)] if unet.mid_block is not None else []
    stages += [(f"up.{i}", f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    add("in", unet.config.in_channels, "conv_in")
    add("conv_in", unet.conv_in.out_channels, "conv_in")
    for stage, path, block in stages:
        for layer in _layers(stage, path, block):
            add(*layer)
        channels = block.resnets[-1].out_channels
        if getattr(block, "downsamplers", None):
            stride *= 2
            add(f"{stage}.downsampler", channels, f"{path}.downsamplers.0")
        if getattr(block, "upsamplers", None):
            stride //= 2
            add(f"{stage}.upsampler", channels, f"{path}.upsamplers.0")
        add(stage, channels, path)
    add("out", unet.config.out_channels, "conv_out")
    return taps


def _layers(stage: str, path: str, block: Any) -> Iterator[tuple[str, int, str]]:
    """(tap, channels, module path) of a block's residual blocks and of the attention behind each."""
    attentions = [a for a in getattr(block, "attentions", None) or [] if a is not None]
    for j, resnet in enumerate(block.resnets):
        yield f"{stage}.resnet.{j}.increment", resnet.out_channels, f"{path}.resnets.{j}.conv2"
        yield f"{stage}.resnet.{j}", resnet.out_channels, f"{path}.resnets.{j}"
        if j < len(attentions):
            yield from _attention(f"{stage}.attention.{j}", f"{path}.attentions.{j}", attentions[j])


def _attention(name: str, path: str, transformer: Any) -> Iterator[tuple[str, int, str]]:
    if not hasattr(transformer, "transformer_blocks"):  # the bare self-attention of pixel U-Nets
        yield name, transformer.to_out[0].out_features, path
        return
    for n, block in enumerate(transformer.transformer_blocks):
        inner, where = f"{name}.block.{n}", f"{path}.transformer_blocks.{n}"
        for projection in ("q", "k", "v"):
            linear = getattr(block.attn1, f"to_{projection}")
            yield f"{inner}.self.{projection}", linear.out_features, f"{where}.attn1.to_{projection}"
        yield f"{inner}.self.map", 0, f"{where}.attn1"
        if getattr(block, "attn2", None) is not None:
            yield f"{inner}.cross.q", block.attn2.to_q.out_features, f"{where}.attn2.to_q"
            yield f"{inner}.cross.map", 0, f"{where}.attn2"
        yield f"{inner}.ff", block.ff.net[-1].in_features, f"{where}.ff.net.0"
        yield inner, block.ff.net[-1].out_features, where
    yield name, getattr(transformer, "out_channels", None) or transformer.in_channels, path


@contextmanager
def reading_taps(unet: nn.Module, taps: Sequence[TapInfo], size: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with tap -> (B, C, h, w) while the U-Net runs in the body on inputs of (..., H, W); see `reading`."""
    readers = {}
    for tap in taps:
        module = unet.get_submodule(tap.module)
        if tap.name == "in":
            readers[tap.name] = Reader(module, read_input, before=True)
        elif tap.name.endswith(".map"):
            readers[tap.name] = Reader(module, partial(_attention_map, module), before=True)
        else:
            readers[tap.name] = Reader(module)
    maps: dict[str, Tensor] = {}
    with reading(readers) as activations:
        yield maps
    maps |= {tap.name: tokens_to_map(activations[tap.name], (int(size[-2]), int(size[-1]))) for tap in taps}


def _attention_map(attention: Any, call: Call) -> Tensor:
    """softmax(q k^T / sqrt(d)), which fused attention never writes down: (B, places, heads * keys)."""
    places, seen = call.inputs[0], call.kwargs.get("encoder_hidden_states")
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
    return (module for name, module in unet.named_modules() if name.endswith(".attn2"))


_BLOCK = r"(up\.\d+|down\.\d+|mid)"
_GDF = {  # a name, with level and block written as here -> the tap
    r"unet-in": "in",
    r"unet-after-conv-in": "conv_in",
    r"unet-out": "out",
    r"((?:up|down)\.\d+)-((?:up|down)sampler)-out": r"\1.\2",
    _BLOCK + r"-repeat(\d+)-res-out": r"\1.resnet.\2",
    _BLOCK + r"-repeat(\d+)-res-increment": r"\1.resnet.\2.increment",
    _BLOCK + r"-attention(\d+)-out": r"\1.attention.\2",
    _BLOCK + r"-attention(\d+)-block(\d+)-out": r"\1.attention.\2.block.\3",
    _BLOCK + r"-attention(\d+)-block(\d+)-ffn-inner": r"\1.attention.\2.block.\3.ff",
    _BLOCK + r"-attention(\d+)-block(\d+)-(self|cross)-(q|map|(?<=self-)[kv])": r"\1.attention.\2.block.\3.\4.\5",
}


def gdf_tap(name: str) -> str:
    """The tap of a layer that generic-diffusion-feature names.

    Source: "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features" (2024).

    >>> gdf_tap("up-level1-repeat1-vit-block0-cross-q")
    'up.1.attention.1.block.0.cross.q'
    >>> gdf_tap("mid-vit-out"), gdf_tap("up-level2-upsampler-out")
    ('mid.attention.0', 'up.2.upsampler')

    Raises:
        TapError: no layer of that project has such a name, or it has no map (keys and values of prompts).
    """
    plain = re.sub(r"^(up|down)-level(\d+)", r"\1.\2", name)
    plain = re.sub(r"^mid-vit-", "mid-attention0-", plain)
    plain = re.sub(r"^((?:up|down)\.\d+)-repeat(\d+)-vit-", r"\1-attention\2-", plain)
    for pattern, tap in _GDF.items():
        if (match := re.fullmatch(pattern, plain)) is not None:
            return match.expand(tap)
    raise TapError(
        f"{name!r} is no layer with a map whose name is such as 'up-level1-repeat0-res-out' or 'mid-vit-block0-self-q'"
    )


@contextmanager
def with_freeu(unet: nn.Module, freeu: FreeU | None) -> Iterator[None]:
    """Run the U-Net in the body with FreeU as GeoAware-SC applies it. Enter it before the taps are read.

    Before a decoder layer joins its input with a skip, half of the input's channels are amplified and the low
    frequencies of the skip damped. Which factors count is decided by the number of channels (1280 or 640 in Stable
    Diffusion), not by the block as diffusers' `enable_freeu` does. The official code scales the input in place, after
    it has been read: so here too a tap whose map is joined with a skip next is read scaled.

    Source: Junyi42/GeoAware-SC, after "FreeU: Free Lunch in Diffusion U-Net" (arXiv:2309.11497).
    """
    handles = []
    try:
        if freeu is not None:
            for feeding, resnet, channels, (amplified, damped) in _joints(unet, freeu):
                handles.append(feeding.register_forward_hook(partial(_amplify, factor=amplified)))
                damp = partial(_damp_skip, channels=channels, factor=damped, threshold=freeu.threshold)
                handles.append(resnet.register_forward_pre_hook(damp))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joints(unet: Any, freeu: FreeU) -> Iterator[tuple[nn.Module, nn.Module, int, tuple[float, float]]]:
    """(module whose output is joined with a skip, residual block that takes both, channels, (b, s))."""
    widths = list(dict.fromkeys(reversed(unet.config.block_out_channels)))
    factors = ((freeu.deep_input, freeu.deep_skip), (freeu.next_input, freeu.next_skip))
    by_width = dict(zip(widths, factors, strict=False))
    feeding, channels = unet.mid_block.resnets[-1], unet.mid_block.resnets[-1].out_channels
    for block in unet.up_blocks:
        attentions = list(getattr(block, "attentions", None) or [])
        for j, resnet in enumerate(block.resnets):
            if channels in by_width:
                yield feeding, resnet, channels, by_width[channels]
            feeding, channels = (attentions[j] if attentions else resnet), resnet.out_channels
        if block.upsamplers:
            feeding = block.upsamplers[0]


def _amplify(module: nn.Module, inputs: Any, output: Any, *, factor: float) -> Any:
    whole = output if isinstance(output, Tensor) else output[0]
    half = whole.shape[1] // 2
    scaled = torch.cat([whole[:, :half] * factor, whole[:, half:]], dim=1)
    return scaled if isinstance(output, Tensor) else (scaled, *output[1:])


def _damp_skip(
    module: nn.Module, inputs: tuple[Any, ...], *, channels: int, factor: float, threshold: int
) -> tuple[Any, ...]:
    joined = inputs[0]
    skip = damp_low_frequencies(joined[:, channels:], factor, threshold)
    return (torch.cat([joined[:, :channels], skip], dim=1), *inputs[1:])


def damp_low_frequencies(maps: Tensor, factor: float, threshold: int) -> Tensor:
    """Multiply the central 2 * threshold frequencies of both axes of (B, C, h, w) by a factor."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(maps.float(), dim=(-2, -1)), dim=(-2, -1))
    rows, columns = (slice(max(side // 2 - threshold, 0), side // 2 + threshold) for side in maps.shape[-2:])
    mask = torch.ones(maps.shape[-2:], device=maps.device)
    mask[rows, columns].fill_(factor)
    damped = torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real
    return damped.to(maps.dtype)


@contextmanager
def folded_upsampling(unet: nn.Module) -> Iterator[None]:
    """Run a U-Net in the body with its upsamplers folded, where that is the same and pays; see `upsample_and_convolve`.

    At 768 px upsampling takes 38 of the 1126 GFLOP that Stable Diffusion 2.1 needs up to ``up.1``, before.
    """
    folded = [module for module in unet.modules() if _can_fold(module)]
    try:
        for module in folded:
            module.forward = partial(_upsample, module, module.forward)
        yield
    finally:
        for module in folded:
            del module.forward  # uncovers that of the class


def _can_fold(module: Any) -> bool:
    if type(module).__name__ != "Upsample2D" or not module.use_conv or module.use_conv_transpose:
        return False
    conv: Any = module.conv if module.name == "conv" else module.Conv2d_0
    plain = (conv.kernel_size, conv.padding, conv.stride, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
    return bool(module.interpolate and module.norm is None and plain)


def _upsample(module: Any, plain: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **named: Any) -> Any:
    height, width = hidden_states.shape[-2:]
    doubled = output_size is None or tuple(output_size) == (2 * height, 2 * width)
    # on CUDA the four small products cost more launches and copies than they save
    if not doubled or height * width < FOLDED_FROM or hidden_states.is_cuda:
        return plain(hidden_states, output_size, *args, **named)
    conv = module.conv if module.name == "conv" else module.Conv2d_0
    return upsample_and_convolve(hidden_states, conv.weight, conv.bias)


def upsample_and_convolve(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d(interpolate(maps, scale_factor=2, mode="nearest"), weight, bias, padding=1)` for 4/9 of the work.

    Nearest-neighbour upsampling repeats every cell, so a 3 x 3 window of the larger map covers only 2 x 2 different
    cells: which of them, and with which sums of the nine weights, depends on whether row and column are even or odd.

    Args:
        maps: (B, C, h, w).
        weight: (C', C, 3, 3).

    Returns:
        (B, C', 2 h, 2 w), equal up to rounding.
    """
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (1, 1, 1, 1))
    rows = []
    for down, by_row in enumerate(_halves(weight, dim=2)):
        columns = [
            F.conv2d(padded[..., down : down + height + 1, right : right + width + 1], kernel, bias)
            for right, kernel in enumerate(_halves(by_row, dim=3))
        ]
        rows.append(torch.stack(columns, dim=-1).flatten(-2))
    return torch.stack(rows, dim=-2).flatten(-3, -2)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The three weights along an axis, summed over the two cells that they meet at an even and at an odd place."""
    first, second, third = weight.unbind(dim)
    return torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)
