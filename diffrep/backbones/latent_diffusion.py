"""Latent diffusion as a backbone: Stable Diffusion 1.x, 2.x, Turbo and XL in diffusers' folder layout.

An image is encoded once, noised as often as the ensemble asks, and goes through the U-Net up to the
deepest tap. The VAE decoder and the rest of the U-Net never run; prompts are encoded once per backbone,
and the keys and values of cross-attention once per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.base import Backbone, Conditions, Recommended, TapInfo, reading
from diffrep.backbones.freeu import applying
from diffrep.backbones.noise import draw_noise
from diffrep.backbones.text import PromptEmbedding, TextEncoders
from diffrep.backbones.unet_taps import cross_attentions, tap_readers, tokens_to_map, unet_taps
from diffrep.images import Sizing


class LatentDiffusion(Backbone):
    """A frozen latent diffusion U-Net with the encoder of its VAE.

    Args:
        unet: diffusers `UNet2DConditionModel`.
        vae: diffusers `AutoencoderKL`; its decoder is not used.
        alphas_cumprod: (T,) the schedule's cumulative product, indexed by the timestep.
        text: encodes prompts; or None where `embed` is given prompt embeddings.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        alphas_cumprod: Tensor,
        *,
        text: TextEncoders | None = None,
        name: str = "latent diffusion",
        source: str = "random",
        recommended: Recommended | None = None,
    ) -> None:
        self.network = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.alphas_cumprod = alphas_cumprod.float()
        self.text = text
        self.name, self.source = name, source
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self._taps = unet_taps(unet, self.stride)
        self._prompts: dict[str, PromptEmbedding] = {}
        self._keys_values: dict[str, dict[nn.Module, Tensor]] = {}
        default_tap = "up.1" if "up.1" in self._taps else "mid"
        side = self.stride * int(unet.config.sample_size or 64)
        self.recommended = recommended or Recommended(
            taps=(default_tap,),
            sizing=Sizing(mode="squash", size=side),
            conditions=Conditions(timestep=261, posterior="sample"),
        )

    def taps(self) -> tuple[TapInfo, ...]:
        return tuple(self._taps.values())

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

    def noisy_latents(self, mean: Tensor, std: Tensor | None, noise: Tensor | None, timestep: int) -> Tensor:
        """z_t of a draw: sqrt(abar_t) z + sqrt(1 - abar_t) noise, z = scale (mean + std * posterior draw).

        Args:
            mean: (B, c, h, w) of the posterior.
            std: the posterior's standard deviation times its draw, (B, c, h, w); None for the mean.
            noise: (B or 1, c, h, w); None for the clean latent.
        """
        config = self.vae.config
        latents = (mean if std is None else mean + std) - (getattr(config, "shift_factor", None) or 0.0)
        latents = latents * config.scaling_factor
        if noise is None:
            return latents
        alpha = self.alphas_cumprod[timestep].item()
        return alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise.to(latents)

    # -- prompts --------------------------------------------------------------------------------------------

    def embed(self, prompt: str, embedding: PromptEmbedding | None = None) -> PromptEmbedding:
        """The embedding of a prompt, encoded when it is first asked for and kept.

        Args:
            embedding: use this one for the prompt from now on.
        """
        if embedding is not None:
            self._prompts[prompt] = embedding
            self._keys_values.pop(prompt, None)
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

    @contextmanager
    def _constant_context(self, prompt: str) -> Iterator[Tensor]:
        """Run the U-Net with a prompt whose cross-attention keys and values are computed once and kept."""
        context = self.embed(prompt).context.to(self.device, self.dtype)
        if prompt not in self._keys_values:
            projections = [p for a in cross_attentions(self.network) for p in (a.to_k, a.to_v)]
            self._keys_values[prompt] = {p: p(context) for p in projections}
        kept = self._keys_values[prompt]

        def constant(value: Tensor) -> Any:
            return lambda given: value.expand(given.shape[0], -1, -1)

        try:
            for projection, value in kept.items():
                projection.forward = constant(value)
            yield context
        finally:
            for projection in kept:
                del projection.forward  # uncovers the class's own

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
            ValueError: the canvas is no multiple of the VAE's stride, or a noise tensor has another shape.
        """
        if pixels.shape[-2] % self.stride or pixels.shape[-1] % self.stride:
            raise ValueError(
                f"{self.name} needs sides that are multiples of {self.stride}, got {tuple(pixels.shape[-2:])}"
            )
        mean, std = self.encode(pixels, batch_size=batch_size)
        shape, members = mean.shape[1:], conditions.ensemble
        clean = conditions.clean or conditions.timestep < 0
        if noise is None and not clean:
            noise = torch.cat([draw_noise(shape, conditions.seed, k) for k in range(members)])
        if posterior_noise is None and conditions.posterior == "sample":
            draws = [draw_noise(shape, conditions.seed, k, stream=1) for k in range(members)]
            posterior_noise = torch.cat(draws)
        for given in (noise, posterior_noise):
            if given is not None and given.shape != (members, *shape):
                raise ValueError(f"noise must be {(members, *shape)} for this ensemble, got {tuple(given.shape)}")

        jobs = [(image, member) for image in range(len(mean)) for member in range(members)]
        results: dict[str, list[Tensor]] = {tap: [] for tap in taps}
        for start in range(0, len(jobs), batch_size):
            images, draws = zip(*jobs[start : start + batch_size], strict=True)
            spread = None
            if conditions.posterior == "sample" and posterior_noise is not None:
                spread = std[list(images)] * posterior_noise[list(draws)].to(std)
            latents = self.noisy_latents(
                mean[list(images)],
                spread,
                None if clean or noise is None else noise[list(draws)],
                conditions.timestep,
            )
            for tap, value in self.unet_maps(latents, taps, conditions).items():
                results[tap].append(value)
        maps = {tap: torch.cat(values) for tap, values in results.items()}
        if average and members > 1:
            maps = {tap: m.unflatten(0, (-1, members)).float().mean(1).to(m.dtype) for tap, m in maps.items()}
        return maps

    @torch.inference_mode()
    def unet_maps(self, latents: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]:
        """Run the U-Net on (B, c, h, w) latents, up to the deepest tap."""
        infos = {tap: self.tap(tap) for tap in taps}
        batch, size = latents.shape[0], (int(latents.shape[-2]), int(latents.shape[-1]))
        with self._constant_context(conditions.prompt) as context, applying(self.network, conditions.freeu):
            arguments = self._added_conditions(conditions.prompt, batch, size)
            with reading(tap_readers(self.network, infos)) as found:
                self.network(
                    latents.to(self.device, self.dtype),
                    max(conditions.timestep, 0),
                    encoder_hidden_states=context.expand(batch, -1, -1),
                    **arguments,
                )
        return {tap: tokens_to_map(found[tap], size) for tap in taps}

    def _added_conditions(self, prompt: str, batch: int, size: tuple[int, int]) -> dict[str, object]:
        """SDXL's pooled text and micro-conditioning: original size, crop corner, target size."""
        pooled = self.embed(prompt).pooled
        if pooled is None:
            return {}
        height, width = size[0] * self.stride, size[1] * self.stride
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=self.dtype)
        text = pooled.to(self.device, self.dtype).expand(batch, -1)
        return {"added_cond_kwargs": {"text_embeds": text, "time_ids": ids.expand(batch, -1)}}
