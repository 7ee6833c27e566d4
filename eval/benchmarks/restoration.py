"""One-step restoration on random weights: the released sequence of calls against ours, and the memory of large images.

The released programs run the text encoder for every image, project the prompt to keys and values in every layer of
every tile, hold the weighted sums of all tiles on the device, and encode and decode the image as a whole. Ours folds
what the prompt decides, and takes a tile at a time through all three networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffrep.eval.benchmarks.networks import NetworkBenchmark, RandomParts, random_parts
from diffrep.eval.benchmarks.timing import Claim, Row, peak_memory
from diffrep.heads.restoration.families import PISA_SR
from diffrep.heads.restoration.pixels import blended_rows, tile_window, windows
from diffrep.heads.restoration.restorer import RestorationHead, RestoreConfig, Restorer


@dataclass(frozen=True)
class RestorationBenchmark(NetworkBenchmark):
    """Compare a PiSA-SR's pass with the released one; then peak memory against the side of an enlarged image."""

    side: int = 192  # of the enlarged image that both are timed on, pixels
    tile: int = 16  # latent cells, also of the image's tiles in the encoder and decoder
    overlap: int = 4  # latent cells
    sides: tuple[int, ...] = (256, 512, 1024)  # of the images whose memory is measured, in processes of their own

    def run(self) -> list[Row]:
        """Print both tables; returns the rows of the first."""
        rows = super().run()
        print(f"\n{'pixels':>13}  {'peak MiB, released':>19}  {'ours':>7}")
        for side in self.sides:
            peaks = [self.peak_elsewhere(side, name) for name in ("released", "ours")]
            print(f"{side:>5} x {side:<5}  {peaks[0]:>19.0f}  {peaks[1]:>7.0f}", flush=True)
        return rows

    def claims(self) -> Iterator[Claim]:
        parts, head = self._both()
        latent = torch.randn(1, 4, *[self.side // 8] * 2, generator=torch.Generator().manual_seed(1))
        latent = latent.to(self.device, parts.dtype)
        for tile in (self.side // 8, self.tile):
            what = "one tile" if tile > self.tile else f"tiles of {tile} cells"
            plain, other = partial(released, parts), partial(ours, head)
            options = latent, tile, self.overlap
            yield Claim(
                f"everything but the VAE, {what}, {self.about}", partial(plain, *options), partial(other, *options)
            )

    def _both(self) -> tuple[RandomParts, RestorationHead]:
        """The parts of the released side, and our head with the same random weights."""
        parts, copies = (random_parts(self.size, PISA_SR, self.device, getattr(torch, self.dtype)) for _ in range(2))
        return parts, RestorationHead(Restorer(copies.unet, copies.vae, parts.context(), parts.schedule, PISA_SR))

    def peak(self, side: int, name: str) -> float:
        """MiB that restoring an image of that side takes at its peak beside the networks, in this process."""
        torch.set_num_threads(1)
        parts, head = self._both()
        image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        config = RestoreConfig(tile=self.tile, overlap=self.overlap)

        def restore(pixels: np.ndarray) -> object:
            if name == "ours":
                return head.restore_pixels(pixels, config)
            values = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device, parts.dtype) / 255
            with torch.inference_mode():
                scale = parts.vae.config.scaling_factor
                latent = parts.vae.encode(values * 2 - 1).latent_dist.mean * scale
                clean = released(parts, latent, self.tile, self.overlap)
                return parts.vae.decode(clean / scale).sample

        restore(image[: 8 * self.tile, : 8 * self.tile])  # what a first call allocates once belongs to neither side
        before = peak_memory(self.device)
        restore(image)
        return peak_memory(self.device) - before


@torch.inference_mode()
def released(parts: RandomParts, latent: Tensor, tile: int, overlap: int) -> Tensor:
    """The clean latent of a latent (1, c, h, w), as the programs of OSEDiff and PiSA-SR compute it."""
    context, (height, width) = parts.context(), latent.shape[-2:]
    if height * width <= tile**2:
        return latent - parts.unet(latent, PISA_SR.timestep, encoder_hidden_states=context).sample
    window = tile_window(tile, tile, published=True).to(latent.device)
    total, weights = torch.zeros_like(latent, dtype=torch.float32), torch.zeros(height, width, device=latent.device)
    for top in windows(height, tile, overlap):
        for left in windows(width, tile, overlap):
            place = (..., slice(top, top + tile), slice(left, left + tile))
            output = parts.unet(latent[place], PISA_SR.timestep, encoder_hidden_states=context).sample
            total[place] += output.float() * window
            weights[place] += window
    return latent - (total / weights).to(latent)


@torch.inference_mode()
def ours(head: RestorationHead, latent: Tensor, tile: int, overlap: int) -> Tensor:
    """The same by our head; tiles are blended where they are clean, which is the same since the rule is linear."""

    def run(y: slice, x: slice) -> Tensor:
        return head.model.clean(latent[..., y, x], RestoreConfig())[0]

    if latent.shape[-2] * latent.shape[-1] <= tile**2:
        return run(slice(None), slice(None))[None]
    bands = blended_rows(run, (latent.shape[-2], latent.shape[-1]), tile, overlap, published=True)
    return torch.cat([band for _, band in bands], 1)[None]
