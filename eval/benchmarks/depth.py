"""One-step depth and normals: the plain official sequence of calls against ours, on the same modules, same noise.

The plain way is what the released pipelines do for every image: run the text encoder on the empty prompt, embed
timestep and task, project the context to keys and values in every layer, feed E2E-FT's zeros, one image at a time.
"""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffrep.eval.benchmarks.features import count_flops
from diffrep.eval.benchmarks.timing import Row, interleave, table
from diffrep.heads.families import FAMILIES, Family
from diffrep.heads.one_step import TIMESTEP, OneStep, Schedule

TOKENS = 2  # of the empty prompt, begin and end


@dataclass(frozen=True)
class DepthBenchmark:
    """Compare a one-step head with the official sequence of calls, on random weights."""

    size: Literal["small", "sd"] = "small"  # sd: Stable Diffusion 2's U-Net, VAE and text encoder at full width
    side: int = 128  # of the images, pixels
    images: int = 4  # that ours takes in one batch, and the official pipelines one by one
    families: tuple[str, ...] = ("lotus-d", "lotus-g", "e2e-ft")
    repeats: int = 5
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def run(self) -> list[Row]:
        """Time and count both sides, print the table and return its rows."""
        torch.set_num_threads(1)
        rows = []
        for name in self.families:
            rows += self._rows(FAMILIES[name])
        print(table(rows))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory of the process {peak:.0f} MB, of both sides and their weights")
        return rows

    def _rows(self, family: Family) -> list[Row]:
        parts = random_parts(self.size, family, self.device, getattr(torch, self.dtype))
        pixels = torch.rand(self.images, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(self.device)
        latent = self.side // 8
        noise = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(1)).to(
            self.device, parts.dtype
        )
        first = noise if family.first_latent == "noise" else None
        ours = OneStep(copy.deepcopy(parts.unet), parts.vae, parts.context(), parts.schedule, family)

        def plain_side(batch: Tensor) -> Tensor:
            return torch.cat([official(parts, family, image[None], noise) for image in batch])

        @torch.inference_mode()
        def our_side(batch: Tensor) -> Tensor:
            return ours.decode(ours.predict(ours.encode(batch), first))

        def our_unet() -> Tensor:
            return ours.predict(noise, first)

        def plain_unet() -> Tensor:
            return official_latent(parts, family, noise, noise)

        claims: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "everything but the VAE": (plain_unet, our_unet),
            "one image": (lambda: plain_side(pixels[:1]), lambda: our_side(pixels[:1])),
            f"{self.images} images": (lambda: plain_side(pixels), lambda: our_side(pixels)),
        }
        rows = []
        for claim, (plain, our) in claims.items():
            times = interleave({"plain": plain, "ours": our}, repeats=self.repeats, device=self.device)
            expected, got = plain().float(), our().float()
            difference = float((got - expected).abs().max() / expected.abs().max())
            counts = [count_flops(side) / 1e9 for side in (plain, our)]
            rows.append(
                Row(
                    f"{family.name}, {claim}, {self.side} px, {self.size} U-Net, {self.dtype} on {self.device}",
                    times["plain"],
                    times["ours"],
                    f"largest difference {difference:.1e} of the maximum",
                    f"GFLOP {counts[0]:.1f} against {counts[1]:.1f} ({counts[0] / counts[1]:.2f}x);"
                    f" weights {megabytes(parts.unet, parts.vae, parts.text):.0f} MB against"
                    f" {megabytes(ours.network, parts.vae):.0f} MB",
                )
            )
        return rows


@dataclass(frozen=True)
class Parts:
    """The modules of a Stable Diffusion 2 folder, with random weights."""

    unet: Any
    vae: Any
    text: Any
    schedule: Schedule
    dtype: torch.dtype

    @torch.inference_mode()
    def context(self) -> Tensor:
        """The text encoder's output for the two tokens of the empty prompt."""
        tokens = torch.arange(TOKENS, device=self.text.device)[None]
        states: Tensor = self.text(tokens)[0]
        return states


def random_parts(size: Literal["small", "sd"], family: Family, device: str, dtype: torch.dtype) -> Parts:
    """Stable Diffusion 2's architecture for a family, at full size or with narrow layers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    full = size == "sd"
    width, base, text_width = (320, 128, 1024) if full else (64, 32, 128)
    torch.manual_seed(0)  # the libraries' initialisation draws from the global generator
    with torch.device(device):
        unet: Any = UNet2DConditionModel(
            in_channels=4 if family.first_latent == "none" else 8,
            out_channels=4,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=text_width,
            attention_head_dim=[5, 10, 20, 20] if full else [1, 2, 4, 4],
            use_linear_projection=True,
            class_embed_type="projection" if family.task_vector else None,
            projection_class_embeddings_input_dim=4 if family.task_vector else None,
        )
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(base, 2 * base, 4 * base, 4 * base),
            layers_per_block=2,
        )
        text: Any = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                num_hidden_layers=23 if full else 4,
                num_attention_heads=16 if full else 4,
                vocab_size=49408 if full else 512,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    for module in (unet, vae, text):
        module.eval().requires_grad_(False)
        if dtype != torch.float32:  # diffusers warns about a cast even when it is none
            module.to(dtype)
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False}
    predicts = "sample" if family.result == "output" else "v_prediction"
    return Parts(unet, vae, text, Schedule.from_config({**config, "prediction_type": predicts}), dtype)


@torch.inference_mode()
def official_latent(parts: Parts, family: Family, latent: Tensor, noise: Tensor) -> Tensor:
    """The published structure between encoder and decoder: encode the prompt, embed the constants, one U-Net call."""
    context = parts.context()
    inputs = latent
    if family.first_latent != "none":
        first = noise if family.first_latent == "noise" else torch.zeros_like(noise)
        inputs = torch.cat([latent, first], dim=1)
    labels = None if family.task_vector is None else latent.new_tensor([family.task_vector])
    output: Tensor = parts.unet(inputs, TIMESTEP, encoder_hidden_states=context, class_labels=labels).sample
    if family.result == "clean":
        return parts.schedule.clean(output, torch.zeros_like(output), TIMESTEP)
    return output


@torch.inference_mode()
def official(parts: Parts, family: Family, image: Tensor, noise: Tensor) -> Tensor:
    """One image through the published structure; the posterior's mean, so that both sides decode one latent."""
    latent = parts.vae.encode(image.to(parts.dtype) * 2 - 1).latent_dist.mean * parts.vae.config.scaling_factor
    annotation = official_latent(parts, family, latent, noise)
    decoded: Tensor = parts.vae.decode(annotation / parts.vae.config.scaling_factor).sample
    return decoded


def megabytes(*modules: Any) -> float:
    """Memory of the parameters and buffers of modules."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20
