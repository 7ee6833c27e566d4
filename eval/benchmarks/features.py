"""Extraction: the plain way with hooks against ours, on the same modules, same dtype, same noise.

The plain way is what one writes without this package: a forward hook on the wanted block, a whole U-Net
pass, the image encoded again for every ensemble member and every pair it appears in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffrep.backbones import Conditions, LatentDiffusion, PromptEmbedding, draw_noise
from diffrep.eval.benchmarks.timing import Row, interleave, table

ENSEMBLE = 8


@dataclass(frozen=True)
class FeaturesBenchmark:
    """Compare extraction with a plain full forward pass on a random-weight U-Net."""

    size: Literal["small", "sd"] = "small"  # sd: Stable Diffusion 2.1's U-Net and VAE (866 M parameters)
    side: int = 256  # of the images, pixels
    tap: str = "up.1"
    images: int = 4  # of the set that is matched in all pairs
    repeats: int = 5
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def run(self) -> list[Row]:
        """Time and count both sides, print the table and return its rows."""
        torch.set_num_threads(1)
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

        claims: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "one image": (lambda: plain(pixels[:1], one), lambda: ours(pixels[:1], one)),
            f"one image, ensemble of {ENSEMBLE}": (
                lambda: plain(pixels[:1], eight),
                lambda: ours(pixels[:1], eight),
            ),
            "a pair": (lambda: plain(pixels[:2], one), lambda: ours(pixels[:2], one)),
            f"{self.images} images in all {len(pairs)} pairs": (plain_pairs, our_pairs),
        }
        rows = []
        for claim, (plain_side, our_side) in claims.items():
            times = interleave({"plain": plain_side, "ours": our_side}, repeats=self.repeats, device=self.device)
            expected, got = plain_side().float(), our_side().float()
            difference = float((got - expected).abs().max() / expected.abs().max())
            counts = [count_flops(side) / 1e9 for side in (plain_side, our_side)]
            rows.append(
                Row(
                    f"{claim}, tap {self.tap}, {self.side} px, {self.size} U-Net, {self.dtype} on {self.device}",
                    times["plain"],
                    times["ours"],
                    f"largest difference {difference:.1e} of the maximum",
                    f"GFLOP {counts[0]:.1f} against {counts[1]:.1f} ({counts[0] / counts[1]:.2f}x)",
                )
            )
        print(table(rows))
        return rows


def random_backbone(size: Literal["small", "sd"], device: str, dtype: torch.dtype) -> LatentDiffusion:
    """Stable Diffusion 2.1's architecture with random weights, at full size or with narrow layers."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    width = 320 if size == "sd" else 64
    base = 128 if size == "sd" else 32
    torch.manual_seed(0)  # the libraries' initialisation draws from the global generator
    with torch.device(device):
        unet: Any = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20] if size == "sd" else [1, 2, 4, 4],
            use_linear_projection=True,
        )
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(base, 2 * base, 4 * base, 4 * base),
            layers_per_block=2,
        )
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    backbone = LatentDiffusion(unet.to(dtype), vae.to(dtype), scheduler.alphas_cumprod, name=f"random {size}")
    backbone.embed("", PromptEmbedding(torch.randn(1, 77, 1024, device=device, dtype=dtype)))
    return backbone


@torch.inference_mode()
def plain_extraction(backbone: LatentDiffusion, image: Tensor, tap: str, conditions: Conditions) -> Tensor:
    """The published structure: every member encodes the image and runs the whole U-Net, a hook keeps the map."""
    kept: list[Tensor] = []
    module = backbone.network.get_submodule(backbone.tap(tap).module)
    handle = module.register_forward_hook(lambda m, i, output: kept.append(output))
    context = backbone.embed(conditions.prompt).context
    for member in range(conditions.ensemble):
        posterior = backbone.vae.encode(image.to(backbone.dtype) * 2 - 1).latent_dist
        shape = posterior.mean.shape[1:]
        spread = posterior.std * draw_noise(shape, conditions.seed, member, stream=1).to(posterior.std)
        noise = draw_noise(shape, conditions.seed, member)
        latents = backbone.noisy_latents(posterior.mean, spread, noise, conditions.timestep)
        backbone.network(latents, conditions.timestep, encoder_hidden_states=context)
    handle.remove()
    return torch.cat(kept).float().mean(0, keepdim=True).to(backbone.dtype)


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of a function: products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
