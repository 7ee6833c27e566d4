"""Extraction: the plain way with hooks against ours, on the same modules, same dtype, same noise.

The plain way is what one writes without this package: a forward hook on the wanted block, a whole U-Net
pass, the image encoded again for every ensemble member and every pair it appears in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from diffrep.backbones import Conditions, LatentDiffusion, PromptEmbedding, draw_noise
from diffrep.eval.benchmarks.timing import PairedBenchmark, Row

ENSEMBLE = 8


@dataclass(frozen=True)
class FeaturesBenchmark(PairedBenchmark):
    """Compare extraction with a plain full forward pass on a random-weight U-Net."""

    size: Literal["small", "sd"] = "small"  # sd: Stable Diffusion 2.1's U-Net and VAE (866 M parameters)
    side: int = 256  # of the images, pixels
    tap: str = "up.1"
    images: int = 4  # of the set that is matched in all pairs
    dtype: Literal["float32", "bfloat16"] = "float32"

    def rows(self) -> Iterator[Row]:
        backbone = random_backbone(self.size, self.device, getattr(torch, self.dtype))
        pixels = torch.rand(self.images, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(self.device)
        one, eight = (Conditions(timestep=261, ensemble=n, posterior="sample") for n in (1, ENSEMBLE))
        pairs = list(itertools.combinations(range(self.images), 2))

        def ours(batch: Tensor, conditions: Conditions) -> Tensor:
            return backbone.maps(batch, [self.tap], conditions)[self.tap]

        def plain(batch: Tensor, conditions: Conditions) -> Tensor:
            return torch.cat([plain_extraction(backbone, image[None], self.tap, conditions) for image in batch])

        def plain_pairs() -> Tensor:
            return torch.cat([plain(pixels[list(pair)], one) for pair in pairs])

        def our_pairs() -> Tensor:
            maps = ours(pixels, one)
            return torch.cat([maps[list(pair)] for pair in pairs])

        sides: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            claim: (partial(plain, batch, conditions), partial(ours, batch, conditions))
            for claim, batch, conditions in (
                ("one image", pixels[:1], one),
                (f"one image, ensemble of {ENSEMBLE}", pixels[:1], eight),
                ("a pair", pixels[:2], one),
            )
        }
        sides[f"{self.images} images in all {len(pairs)} pairs"] = (plain_pairs, our_pairs)
        for claim, (plain_side, our_side) in sides.items():
            about = f"tap {self.tap}, {self.side} px, {self.size} U-Net, {self.dtype} on {self.device}"
            yield self.compare(f"{claim}, {about}", plain_side, our_side)


def random_unet(full: bool, **options: Any) -> Any:
    """Stable Diffusion 2's U-Net with random weights, at full size or with narrow layers."""
    from diffusers import UNet2DConditionModel

    width = 320 if full else 64
    shared = {
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "attention_head_dim": [5, 10, 20, 20] if full else [1, 2, 4, 4],
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**{**shared, **options})


def random_vae(full: bool) -> Any:
    """Stable Diffusion's VAE with random weights, at full size or with narrow layers."""
    from diffusers import AutoencoderKL

    width = 128 if full else 32
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
    )


def random_backbone(size: Literal["small", "sd"], device: str, dtype: torch.dtype) -> LatentDiffusion:
    """Stable Diffusion 2.1's architecture with random weights, at full size or with narrow layers."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)  # the libraries' initialisation draws from the global generator
    with torch.device(device):
        unet, vae = random_unet(size == "sd", cross_attention_dim=1024), random_vae(size == "sd")
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    backbone = LatentDiffusion(unet.to(dtype), vae.to(dtype), scheduler.alphas_cumprod, name=f"random {size}")
    backbone.embed("", PromptEmbedding(torch.randn(1, 77, 1024, device=device, dtype=dtype)))
    return backbone


@torch.inference_mode()
def plain_extraction(backbone: LatentDiffusion, image: Tensor, tap: str, conditions: Conditions) -> Tensor:
    """The published structure: every member encodes the image and runs the whole U-Net, a hook keeps the map."""
    maps: list[Tensor] = []
    module = backbone.network.get_submodule(backbone.tap(tap).module)
    handle = module.register_forward_hook(lambda m, i, output: maps.append(output))
    context = backbone.embed(conditions.prompt).context
    for member in range(conditions.ensemble):
        posterior = backbone.vae.encode(image.to(backbone.dtype) * 2 - 1).latent_dist
        shape = posterior.mean.shape[1:]
        spread = posterior.std * draw_noise(shape, conditions.seed, member, stream=1).to(posterior.std)
        noise = draw_noise(shape, conditions.seed, member)
        latents = backbone.noisy_latents(posterior.mean, spread, noise, conditions.timestep)
        backbone.network(latents, conditions.timestep, encoder_hidden_states=context)
    handle.remove()
    return torch.cat(maps).float().mean(0, keepdim=True).to(backbone.dtype)
