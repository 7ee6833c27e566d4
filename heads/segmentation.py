"""Segmentation in one step: a soft mask of the object, and its edges where they are asked for (DiffDIS).

The U-Net is `diffrep.heads.diffdis`; VAE, schedule and noise are those of the one-step machine. Sources:
"High-Precision Dichotomous Image Segmentation via Probing Diffusion Capacity" (arXiv 2410.10105) and its authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffrep.backbones import draw_noise
from diffrep.heads.diffdis import DiffDisUNet
from diffrep.heads.one_step import TIMESTEP, LatentCodec, Schedule
from diffrep.images import shrink, stack_pixels

SCALES = (0.75, 1.0, 1.25)  # of the published ensemble over test-time augmentations, each without and with mirror


class DiffDis(LatentCodec):
    """A DiffDIS U-Net with its VAE: images in, raw maps of mask and edge out.

    Args:
        unet: the U-Net.
        vae: diffusers `AutoencoderKL`.
        context: (1, tokens, C), the embedding of the empty prompt (start and end token, no padding).
        schedule: of the diffusion model; the U-Net is asked once, at its last timestep.
        working_size: pixels a side of the square that the U-Net was trained on.
        decoder: draws masks and edges in place of the VAE's decoder: (scaled latents, pixels) -> (B, 1, H, W) logits.

    Attributes:
        multiple: the sides of an image are multiples of it.
    """

    def __init__(
        self,
        unet: DiffDisUNet,
        vae: Any,
        context: Tensor,
        schedule: Schedule,
        *,
        working_size: int = 1024,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__(vae)
        if unet.config.out_channels != self.channels:
            raise ValueError(
                f"the U-Net predicts {unet.config.out_channels} channels but the VAE has {self.channels}: they do not"
                " belong together"
            )
        self.unet, self.schedule, self.decoder, self.working_size = unet, schedule, decoder, working_size
        self.context: Tensor
        self.register_buffer("context", context, persistent=False)
        self.multiple = self.stride * 2**unet.levels

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def dtype(self) -> torch.dtype:
        return self.context.dtype

    def encode_scales(self, pixels: Tensor) -> list[Tensor]:
        """Latents of images and of the same images at 1/2, 1/4, ... of their size, for SWCI.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1]; H and W are multiples of `multiple`.

        Returns:
            (B, c, H / stride / 2^k, W / stride / 2^k) for k = 0, 1, ...

        Raises:
            ValueError: the sides are no multiples of `multiple`.
        """
        height, width = pixels.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"the sides must be multiples of {self.multiple}, got {height} x {width}")
        return [self.encode(image) for image in shrink(pixels, self.unet.levels)]

    def predict_latents(self, latents: Sequence[Tensor], noise: Tensor, *, edges: bool = False) -> Tensor:
        """Clean latents of the masks, and of the edges behind them, in one pass of the U-Net.

        Args:
            latents: of `encode_scales`.
            noise: (B or 1, c, h, w), the same for masks and edges; or (2B, c, h, w), masks and then edges.
            edges: also predict the edges.

        Returns:
            float32 (B, c, h, w), or (2B, c, h, w) with the edges.
        """
        images = len(latents[0])
        if len(noise) == 1:
            noise = noise.expand(images, -1, -1, -1)
        noise = noise.to(latents[0])
        output = self.unet(latents, noise, self.context, timestep=TIMESTEP, edges=edges)
        if edges and len(noise) == images:
            noise = noise.repeat(2, 1, 1, 1)
        return self.schedule.clean(output.float(), noise[: len(output)].float(), TIMESTEP)

    def decode_maps(self, latents: Tensor, pixels: Tensor) -> Tensor:
        """Draw masks or edges; one after the other, to save memory.

        Args:
            latents: (B, c, h, w) of `predict_latents`.
            pixels: (B, 3, H, W) the images they belong to, for a decoder that looks at them.

        Returns:
            (B, 1, H, W) raw maps, about [-1, 1].
        """
        if self.decoder is None:
            return self.decode(latents, batch_size=1).mean(1, keepdim=True)
        return self.decoder(latents.to(self.dtype), pixels.to(self.device, self.dtype)).float().sigmoid() * 2 - 1

    def forward(self, pixels: Tensor, noise: Tensor, *, edges: bool = False) -> tuple[Tensor, Tensor | None]:
        """Raw maps of images: the arithmetic alone.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1]; H and W are multiples of `multiple`.
            noise: (B or 1, c, h, w) standard normal, h = H / stride.

        Returns:
            Mask and edge, each (B, 1, H, W), about [-1, 1]; the edge is None where it is not asked for.
        """
        latents = self.predict_latents(self.encode_scales(pixels), noise, edges=edges)
        mask, *edge = (self.decode_maps(rows, pixels) for rows in latents.split(len(pixels)))
        return mask, edge[0] if edges else None

    def draw(self, size: tuple[int, int], seed: int, number: int = 0) -> Tensor:
        """Latent noise (1, c, h, w) for images of (H, W) pixels: of the seed and the number of the pass alone."""
        return draw_noise((self.channels, size[0] // self.stride, size[1] // self.stride), seed, number)


def image_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB image resized to (H, W) as published, bilinear by Pillow: (1, 3, H, W) in [0, 1]."""
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return stack_pixels([torch.from_numpy(np.array(image)).permute(2, 0, 1)])


def finish(raw: Tensor, *, stretch: bool = True) -> Tensor:
    """Raw maps (B, 1, H, W) in about [-1, 1] -> (B, 1, H, W) in [0, 1].

    Args:
        stretch: each map to its full range, as published: an image without an object then still gets a mask that
            reaches 1. A constant map stays as it is.
    """
    maps = raw.clamp(-1, 1) / 2 + 0.5
    if not stretch:
        return maps
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-12), maps)


def ensemble(
    head: DiffDis, pixels: Tensor, noises: Sequence[Tensor], *, edges: bool = False, stretch: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The published test-time ensemble: mean of six passes, without and with mirror at three scales.

    Args:
        pixels: (B, 3, H, W), RGB in [0, 1].
        noises: of the six passes, at the sizes of `ensemble_sizes`; the three without mirror first.

    Returns:
        Mask and edge, each (B, 1, H, W) in [0, 1].
    """
    height, width = pixels.shape[-2:]
    sizes = ensemble_sizes((height, width), head.multiple)
    total: list[Tensor] = []
    for number, noise in enumerate(noises):
        mirrored, size = number >= len(SCALES), sizes[number % len(SCALES)]
        view = pixels.flip(-1) if mirrored else pixels
        if size != (height, width):
            view = F.interpolate(view, size=size, mode="bilinear", align_corners=False)
        found = [finish(raw, stretch=stretch) for raw in head.forward(view, noise, edges=edges) if raw is not None]
        for index, maps in enumerate(found):
            if size != (height, width):
                maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
            maps = (maps.flip(-1) if mirrored else maps) / len(noises)
            if number == 0:
                total.append(maps)
            else:
                total[index] = total[index] + maps
    return total[0], total[1] if edges else None


def ensemble_sizes(size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """(H, W) of the ensemble's three scales, rounded to what the network takes."""
    return [
        (max(1, round(size[0] * s / multiple)) * multiple, max(1, round(size[1] * s / multiple)) * multiple)
        for s in SCALES
    ]


def published_grey(maps: Tensor, size: tuple[int, int]) -> Image.Image:
    """A map as the authors' script writes it: 255 * x cut to 8 bits, then enlarged bilinearly by Pillow.

    Args:
        maps: (H, W) in [0, 1].
        size: (height, width) of the original image.
    """
    grey = Image.fromarray((maps.float() * 255).to(torch.uint8).cpu().numpy())
    return grey.resize(size[::-1], Image.Resampling.BILINEAR)
