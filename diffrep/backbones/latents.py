"""What latent diffusion backbones share: the VAE, the prompts, the draws of an ensemble.

An image is encoded once, noised as often as the ensemble asks, and goes through the network up to the deepest tap.
The VAE decoder never runs; prompts are encoded once per backbone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffrep.backbones.base import Backbone, Conditions, TapInfo
from diffrep.backbones.ensembles import ensemble_maps, ensemble_noise
from diffrep.backbones.noise import draw_noise
from diffrep.backbones.text import PromptEmbedding


class PromptEncoder(Protocol):
    """Turns prompts into the context that the network attends to."""

    def encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]: ...


class LatentBackbone(Backbone):
    """A frozen denoiser of latents with the encoder of its VAE.

    Attributes:
        vae: diffusers `AutoencoderKL`; its decoder is not used.
        stride: image pixels per latent cell.
        multiple: the sides of a canvas are multiples of it.
        alphas_cumprod: (T,) of the schedule, indexed by the timestep; not used by rectified flow.
        scheduler: configuration of the schedule, where it came from a folder; for saving.
        text: encodes prompts; or None where `embed` is given prompt embeddings.
    """

    denoises = "latents"
    vae: Any
    stride: int
    alphas_cumprod: Tensor
    scheduler: Mapping[str, Any] | None = None
    text: PromptEncoder | None
    _taps: Mapping[str, TapInfo]
    _prompts: dict[str, PromptEmbedding]

    def taps(self) -> tuple[TapInfo, ...]:
        return tuple(self._taps.values())

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"U-Net" if self.has_unet else "transformer": self.network, "VAE encoder": self.vae}

    @abstractmethod
    def network_maps(self, latents: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]:
        """Run the network on (B, c, h, w) noisy latents, up to the deepest tap."""

    # -- images ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, pixels: Tensor, *, batch_size: int = 8) -> tuple[Tensor, Tensor]:
        """Encode images once.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].

        Returns:
            Mean and standard deviation of the posterior, each (B, c, H / stride, W / stride), before the
            scaling factor.
        """
        # a half precision that overflows in this VAE says so in its config (SDXL)
        half = getattr(self.vae.config, "force_upcast", False) and self.vae.dtype == torch.float16
        if half:
            self.vae.float()
        means, stds = [], []
        for chunk in pixels.split(batch_size):
            posterior = self.vae.encode(chunk.to(self.vae.device, self.vae.dtype) * 2 - 1).latent_dist
            # on CPU a batch can come back channels-last: noise must not follow its memory layout
            means.append(posterior.mean.contiguous())
            stds.append(posterior.std.contiguous())
        return torch.cat(means).to(self.dtype), torch.cat(stds).to(self.dtype)

    def scale(self, latents: Tensor) -> Tensor:
        """What the VAE gives -> what the network was trained on."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        scaled: Tensor = (latents - shift) * self.vae.config.scaling_factor
        return scaled

    def noisy_latents(self, mean: Tensor, std: Tensor | None, noise: Tensor | None, timestep: int) -> Tensor:
        """z_t of a draw: sqrt(abar_t) z + sqrt(1 - abar_t) noise, z = scale (mean + std * posterior draw).

        Args:
            mean: (B, c, h, w) of the posterior.
            std: the posterior's standard deviation times its draw, (B, c, h, w); None for the mean.
            noise: (B or 1, c, h, w); None for the clean latent.
        """
        latents = self.scale(mean if std is None else mean + std)
        return latents if noise is None else self.add_noise(latents, noise.to(latents), timestep)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Noise scaled latents as the network was trained: by the schedule of a DDPM."""
        alpha = self.alphas_cumprod[timestep].item()
        return alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise

    def scaled_latents(self, mean: Tensor, std: Tensor, conditions: Conditions) -> Tensor:
        """The clean latent of each image, for `Conditions.posterior` "sample" with draw 0 of the seed."""
        if conditions.posterior == "mean":
            return self.scale(mean)
        return self.scale(mean + std * draw_noise(mean.shape[1:], conditions.seed, stream=1).to(std))

    # -- prompts --------------------------------------------------------------------------------------------

    def embed(self, prompt: str, embedding: PromptEmbedding | None = None) -> PromptEmbedding:
        """The embedding of a prompt, encoded when it is first asked for and kept.

        Args:
            embedding: use this one for the prompt from now on.
        """
        if embedding is not None:
            self._prompts[prompt] = embedding
        if prompt not in self._prompts:
            self.embed_all([prompt])
        return self._prompts[prompt]

    def embed_all(self, prompts: Sequence[str]) -> None:
        """Encode many prompts while the text encoders are loaded once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        if missing and self.text is None:
            raise ValueError(f"{self.name} has no text encoder: give embed({missing[0]!r}, embedding) first")
        if missing and self.text is not None:
            self._prompts |= self.text.encode(missing)

    # -- features -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def maps(
        self,
        pixels: Tensor,
        taps: Sequence[str],
        conditions: Conditions,
        *,
        batch_size: int = 8,
        posterior_noise: Tensor | None = None,
        noise: Tensor | None = None,
        average: bool = True,
    ) -> dict[str, Tensor]:
        """Read activations of images on the canvas; see `Backbone.maps`.

        Args:
            posterior_noise: (E, c, h, w) instead of drawn noise, for `Conditions.posterior` "sample".
            noise: (E, c, h, w), the diffusion noise of each ensemble member.
            average: over the ensemble; False keeps the members, (B * E, C, h, w), the members of an image
                next to each other.

        Raises:
            ValueError: the canvas is no multiple of the network's stride, or a noise tensor has another shape.
        """
        if pixels.shape[-2] % self.multiple or pixels.shape[-1] % self.multiple:
            raise ValueError(
                f"{self.name} needs sides that are multiples of {self.multiple}, got {tuple(pixels.shape[-2:])}"
            )
        mean, std = self.encode(pixels, batch_size=batch_size)
        shape, members, seed = mean.shape[1:], conditions.ensemble, conditions.seed
        clean, sampled = conditions.clean or conditions.timestep < 0, conditions.posterior == "sample"
        added = None if clean else ensemble_noise(noise, shape, members, seed)
        spread = ensemble_noise(posterior_noise, shape, members, seed, stream=1).to(std) if sampled else None

        def run(images: list[int], numbers: list[int]) -> dict[str, Tensor]:
            latents = self.noisy_latents(
                mean[images],
                None if spread is None else std[images] * spread[numbers],
                None if added is None else added[numbers],
                conditions.timestep,
            )
            return self.network_maps(latents, taps, conditions)

        return ensemble_maps(run, len(mean), members, batch_size=batch_size, average=average)
