"""FreeU as GeoAware-SC applies it: by channel count, on the taps themselves.

Before a decoder layer joins its input with a skip, half of the input's channels are amplified and the low
frequencies of the skip damped. Which factors count is decided by the number of channels (1280 or 640 in Stable
Diffusion), not by the block as diffusers' `enable_freeu` does. The official code scales the input in place, after
it has been read: so here too a tap whose map is joined with a skip next is read scaled.

Source: Junyi42/GeoAware-SC, after "FreeU: Free Lunch in Diffusion U-Net" (arXiv:2309.11497).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.settings import FreeU


@contextmanager
def applying(unet: nn.Module, freeu: FreeU | None) -> Iterator[None]:
    """Run the U-Net in the body with FreeU. Enter it before the taps' hooks are set: hooks run in order."""
    handles = []
    try:
        joints = () if freeu is None else _joints(unet, freeu)
        for feeding, resnet, channels, factors in joints:
            assert freeu is not None
            handles.append(feeding.register_forward_hook(partial(_amplify, factor=factors[0])))
            damp = partial(_damp_skip, channels=channels, factor=factors[1], threshold=freeu.threshold)
            handles.append(resnet.register_forward_pre_hook(damp))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joints(unet: Any, freeu: FreeU) -> Iterator[tuple[nn.Module, nn.Module, int, tuple[float, float]]]:
    """(module whose output is joined with a skip, residual block that takes both, channels, (b, s))."""
    widths = list(dict.fromkeys(reversed(unet.config.block_out_channels)))
    of = {widths[0]: (freeu.deep_input, freeu.deep_skip)}
    if len(widths) > 1:
        of[widths[1]] = (freeu.next_input, freeu.next_skip)
    feeding, channels = unet.mid_block.resnets[-1], unet.mid_block.resnets[-1].out_channels
    for block in unet.up_blocks:
        attentions = list(getattr(block, "attentions", None) or [])
        for j, resnet in enumerate(block.resnets):
            if channels in of:
                yield feeding, resnet, channels, of[channels]
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
    height, width = maps.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fftn(maps.float(), dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones(height, width, device=maps.device)
    rows = slice(max(height // 2 - threshold, 0), height // 2 + threshold)
    columns = slice(max(width // 2 - threshold, 0), width // 2 + threshold)
    mask[rows, columns] = factor
    damped = torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real
    return damped.to(maps.dtype)
