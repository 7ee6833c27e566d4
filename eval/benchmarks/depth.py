"""One-step depth and normals: the plain official sequence of calls against ours, on the same modules, same noise.

The plain way is what the released pipelines do for every image: run the text encoder on the empty prompt, embed
timestep and task, project the context to keys and values in every layer, feed E2E-FT's zeros, one image at a time.
"""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffrep.eval.benchmarks.features import random_unet, random_vae
from diffrep.eval.benchmarks.timing import PairedBenchmark, Row, said_flops
from diffrep.heads.families import FAMILIES, Family
from diffrep.heads.one_step import TIMESTEP, OneStep, Schedule

TOKENS = 2  # of the empty prompt, begin and end


@dataclass(frozen=True)
class DepthBenchmark(PairedBenchmark):
    """Compare a one-step head with the official sequence of calls, on random weights."""

    size: Literal["small", "sd"] = "small"  # sd: Stable Diffusion 2's U-Net, VAE and text encoder at full width
    side: int = 128  # of the images, pixels
    images: int = 4  # that ours takes in one batch, and the official pipelines one by one
    families: tuple[str, ...] = ("lotus-d", "lotus-g", "e2e-ft")
    dtype: Literal["float32", "bfloat16"] = "float32"

    def run(self) -> list[Row]:
        """Time and count both sides, print the table and return its rows."""
        rows = super().run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory of the process {peak:.0f} MB, of both sides and their weights")
        return rows

    def rows(self) -> Iterator[Row]:
        for name in self.families:
            yield from self._rows(FAMILIES[name])

    def _rows(self, family: Family) -> Iterator[Row]:
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

        sides: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "everything but the VAE": (
                lambda: official_latent(parts, family, noise, noise),
                lambda: ours.predict(noise, first),
            ),
            "one image": (lambda: plain_side(pixels[:1]), lambda: our_side(pixels[:1])),
            f"{self.images} images": (lambda: plain_side(pixels), lambda: our_side(pixels)),
        }
        weights = [megabytes(parts.unet, parts.vae, parts.text), megabytes(ours.network, parts.vae)]

        def said(plain: float, our: float) -> str:
            return f"{said_flops(plain, our)}; weights {weights[0]:.0f} MB against {weights[1]:.0f} MB"

        about = f"{self.side} px, {self.size} U-Net, {self.dtype} on {self.device}"
        for claim, (plain, our) in sides.items():
            yield self.compare(f"{family.name}, {claim}, {about}", plain, our, flops=said)


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
    from transformers import CLIPTextConfig, CLIPTextModel

    full = size == "sd"
    text_width = 1024 if full else 128
    torch.manual_seed(0)  # the libraries' initialisation draws from the global generator
    with torch.device(device):
        unet = random_unet(
            full,
            in_channels=4 if family.first_latent == "none" else 8,
            cross_attention_dim=text_width,
            class_embed_type="projection" if family.task_vector else None,
            projection_class_embeddings_input_dim=4 if family.task_vector else None,
        )
        vae = random_vae(full)
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
