"""Pixel diffusion as a backbone: a diffusers `UNet2DModel`, such as a converted ADM.

Beside the names of `unet`, taps are ``block.N``, N = 1, 2, ... in the order of guided-diffusion: the input
blocks, the middle block, the output blocks, each behind its attention and its resampling. With six levels of two
layers that is 1..37; DIFT's index k, which counts output blocks from 0, is ``block.(20 + k)``, see `dift_tap`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import Conditions, Recommended, TapError, TapInfo
from diffrep.backbones.diffusion import DiffusionBackbone
from diffrep.backbones.unet import reading_taps, unet_taps
from diffrep.images import Sizing


def numbered_blocks(unet: Any) -> list[str]:
    """Paths of the modules whose outputs guided-diffusion numbers, in its order."""

    def layers(block: Any, path: str) -> Iterator[str]:
        kind = "attentions" if getattr(block, "attentions", None) else "resnets"
        yield from (f"{path}.{kind}.{r}" for r in range(len(block.resnets)))

    paths = ["conv_in"]
    for i, block in enumerate(unet.down_blocks):
        paths += layers(block, f"down_blocks.{i}")
        if block.downsamplers:
            paths.append(f"down_blocks.{i}.downsamplers.0")
    paths.append("mid_block")
    for i, block in enumerate(unet.up_blocks):
        paths += layers(block, f"up_blocks.{i}")
        if block.upsamplers:
            paths[-1] = f"up_blocks.{i}.upsamplers.0"
    return paths


class PixelDiffusion(DiffusionBackbone):
    """A frozen U-Net that denoises pixels.

    Args:
        unet: diffusers `UNet2DModel`; its pixels run from -1 to 1.
        alphas_cumprod: (T,) the schedule's cumulative product, indexed by the timestep.
    """

    denoises, has_unet = "pixels", True

    def __init__(
        self, unet: Any, alphas_cumprod: Tensor, *, name: str = "pixel diffusion", source: str = "random"
    ) -> None:
        super().__init__()
        self.network = unet.eval().requires_grad_(False)
        self.alphas_cumprod = alphas_cumprod.float()
        self.name, self.source = name, source
        self.classes: int | None = unet.config.num_class_embeds
        self.multiple = 2 ** (len(unet.config.block_out_channels) - 1)
        paths = numbered_blocks(unet)
        self._first_output = paths.index("mid_block") + 2
        self._output_blocks = len(paths) - paths.index("mid_block") - 1
        self._taps = {tap.name: tap for tap in _with_numbers(unet_taps(unet, 1).values(), paths)}
        # DIFT: index 4 at twice the training size, t = 101, eight draws
        self.recommended = Recommended(
            taps=(self.dift_tap(min(4, self._output_blocks - 1)),),
            sizing=Sizing("squash", 2 * int(unet.config.sample_size or 256), multiple=self.multiple),
            conditions=Conditions(timestep=101, ensemble=8),
        )

    def dift_tap(self, index: int) -> str:
        """The tap of DIFT's `up_ft_index`: the output blocks counted from 0.

        Raises:
            TapError: there are fewer output blocks.
        """
        if not 0 <= index < self._output_blocks:
            raise TapError(f"{self.name} has output blocks 0..{self._output_blocks - 1}, got index {index}")
        return f"block.{self._first_output + index}"

    def noisy_pixels(self, pixels: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, x in [-1, 1].

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].
            noise: (B or 1, 3, H, W).
            timestep: one, or (B,) one per image.
        """
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1).to(noise)
        return alpha.sqrt() * (pixels.to(noise) * 2 - 1) + (1 - alpha).sqrt() * noise

    def encode(self, pixels: Tensor, *, batch_size: int = 8) -> tuple[Tensor, None]:
        """The pixels themselves."""
        return pixels.float(), None

    def noisy(self, mean: Tensor, spread: Tensor | None, noise: Tensor | None, timestep: int) -> Tensor:
        return mean * 2 - 1 if noise is None else self.noisy_pixels(mean, noise.to(mean), timestep)

    def network_maps(self, noisy: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]:
        """`unet_maps` at the timestep and with the label of the conditions; gradients flow to hooks inside."""
        labels = None if conditions.label is None else torch.full((len(noisy),), conditions.label)
        return self.unet_maps(noisy, taps, max(conditions.timestep, 0), labels=labels)

    def unet_maps(
        self, noisy: Tensor, taps: Sequence[str], timestep: int | Tensor, *, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the U-Net on (B, 3, H, W) noisy pixels in [-1, 1], up to the deepest tap.

        Args:
            timestep: one, or (B,) one per image.
            labels: (B,) classes; needed by class-conditional networks, ignored by others.
        """
        classes: dict[str, Any] = {}
        if self.classes is not None:
            if labels is None:
                raise ValueError(f"{self.name} is class-conditional: say a label, 0..{self.classes - 1}")
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                got = sorted(set(labels.tolist()))
                raise ValueError(f"{self.name} has the classes 0..{self.classes - 1}, got {got}")
            classes = {"class_labels": labels.to(self.device)}
        if isinstance(timestep, Tensor):
            timestep = timestep.to(self.device)
        with reading_taps(self.network, [self.tap(tap) for tap in taps], noisy.shape) as maps:
            self.network(noisy.to(self.device, self.dtype), timestep, **classes)
        return maps


def _with_numbers(taps: Iterable[TapInfo], paths: Sequence[str]) -> Iterator[TapInfo]:
    for tap in taps:
        yield tap
        if tap.module in paths and tap.name != "in":
            yield replace(tap, name=f"block.{paths.index(tap.module) + 1}")
