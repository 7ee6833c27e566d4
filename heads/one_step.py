"""The machine that every one-step head shares: encode the image, call the U-Net once, decode.

Depth and normals read what is decoded (`diffrep.heads.dense`); training calls the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones import draw_noise
from diffrep.heads.families import Family
from diffrep.heads.folding import FoldedUNet, PlainUNet

TIMESTEP = 999  # of 1000: where one-step heads are trained and asked


@dataclass(frozen=True)
class Schedule:
    """A DDPM noise schedule and what the network predicts under it.

    Attributes:
        alphas_cumprod: (T,), indexed by the timestep.
        predicts: "sample", "epsilon" or "v_prediction".
        last_alpha: cumulative alpha behind the last step: 1, or that of timestep 0.
    """

    alphas_cumprod: Tensor
    predicts: str
    last_alpha: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read a diffusers scheduler config, whatever sampler it names."""
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler.from_config(dict(config))
        return cls(
            scheduler.alphas_cumprod.double(),
            str(config.get("prediction_type", "epsilon")),
            float(scheduler.final_alpha_cumprod),
        )

    def timesteps(self, steps: int) -> list[int]:
        """From noise to image with trailing spacing: one step is 999, four are 999, 749, 499, 249."""
        total = len(self.alphas_cumprod)
        return [round(total - i * total / steps) - 1 for i in range(steps)]

    def clean(self, output: Tensor, noisy: Tensor, timestep: int) -> Tensor:
        """The network's estimate of the clean latent z_0 from its output and its input z_t."""
        signal, noise = self._roots(float(self.alphas_cumprod[timestep]))
        if self.predicts == "sample":
            return output
        if self.predicts == "v_prediction":
            return signal * noisy - noise * output
        return (noisy - noise * output) / signal

    def step(self, output: Tensor, noisy: Tensor, timestep: int, steps: int) -> Tensor:
        """One deterministic DDIM step (eq. 12 of arXiv 2010.02502, eta 0) of `steps` evenly spaced ones."""
        signal, noise = self._roots(float(self.alphas_cumprod[timestep]))
        clean = self.clean(output, noisy, timestep)
        epsilon = (
            signal * output + noise * noisy if self.predicts == "v_prediction" else (noisy - signal * clean) / noise
        )
        if self.predicts == "epsilon":
            epsilon = output
        previous = timestep - len(self.alphas_cumprod) // steps
        alpha = float(self.alphas_cumprod[previous]) if previous >= 0 else self.last_alpha
        signal, noise = self._roots(alpha)
        return signal * clean + noise * epsilon

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise."""
        signal, spread = self._roots(float(self.alphas_cumprod[timestep]))
        return signal * clean + spread * noise

    @staticmethod
    def _roots(alpha: float) -> tuple[float, float]:
        return alpha**0.5, (1 - alpha) ** 0.5


class LatentCodec(nn.Module):
    """The VAE of a one-step head: images to scaled latents, latents to images.

    Args:
        vae: diffusers `AutoencoderKL`.

    Attributes:
        channels: of a latent.
        stride: image pixels per latent cell.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.channels = int(vae.config.latent_channels)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vae.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vae.dtype
        return dtype

    def encode(self, pixels: Tensor, posterior_noise: Tensor | None = None, *, batch_size: int = 4) -> Tensor:
        """Image latents, scaled as the U-Net wants them.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].
            posterior_noise: (B or 1, c, h, w) standard normal, for a sample of the posterior; None takes its mean.

        Returns:
            (B, c, H // stride, W // stride).
        """
        latents = []
        for chunk in pixels.split(batch_size):
            posterior = self.vae.encode(chunk.to(self.vae.device, self.vae.dtype) * 2 - 1).latent_dist
            if posterior_noise is None:
                latents.append(posterior.mean)
            else:
                start = sum(map(len, latents))
                noise = posterior_noise.expand(len(pixels), -1, -1, -1)[start : start + len(chunk)]
                latents.append(posterior.mean + posterior.std * noise.to(posterior.mean))
        shift = self.vae.config.shift_factor or 0.0
        scaled: Tensor = (torch.cat(latents).to(self.dtype) - shift) * self.vae.config.scaling_factor
        return scaled.contiguous()

    def decode(self, latents: Tensor, *, batch_size: int = 2) -> Tensor:
        """(B, c, h, w) scaled latents -> (B, 3, h * stride, w * stride), about [-1, 1], as the VAE decodes them."""
        shift = self.vae.config.shift_factor or 0.0
        unscaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        return torch.cat([self.vae.decode(chunk, return_dict=False)[0] for chunk in unscaled.split(batch_size)])


class OneStep(LatentCodec):
    """A latent diffusion U-Net that turns an image latent into an annotation latent, with its VAE.

    Args:
        unet: diffusers `UNet2DConditionModel`; taken over and changed where `fold` is set.
        vae: diffusers `AutoencoderKL`.
        context: (1, tokens, C), the embedding of the empty prompt.
        fold: compute once what depends on prompt, timestep and task alone; for inference only.

    Raises:
        ValueError: the U-Net's input channels or class embedding are not those of the family.
    """

    def __init__(
        self, unet: Any, vae: Any, context: Tensor, schedule: Schedule, family: Family, *, fold: bool = True
    ) -> None:
        super().__init__(vae)
        self.schedule, self.family = schedule, family
        wanted = self.channels * (1 if family.first_latent == "none" else 2)
        if unet.config.in_channels != wanted:
            raise ValueError(
                f"a {family.name} U-Net on this VAE takes {wanted} channels, this one takes {unet.config.in_channels}"
            )
        if (unet.config.class_embed_type is None) != (family.task_vector is None):
            has = "no class embedding" if unet.config.class_embed_type is None else "a class embedding"
            raise ValueError(f"this U-Net has {has}, which is not how a {family.name} is built")
        zeros = self.channels if family.first_latent == "zeros" else 0
        kind: type[FoldedUNet] | type[PlainUNet] = FoldedUNet if fold else PlainUNet
        self.network: FoldedUNet | PlainUNet = kind(unet, context, padding_channels=zeros)

    @property
    def device(self) -> torch.device:
        return self.network.context.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.context.dtype

    def unet_input(self, latents: Tensor, first: Tensor | None) -> Tensor:
        """What goes into the U-Net: the image latent, then the first latent where the family has one.

        Args:
            latents: (B, c, h, w).
            first: (B or 1, c, h, w), for families that start from noise.

        Raises:
            ValueError: noise is missing for a family that starts from it, given for another, or of another shape.
        """
        if (first is None) == (self.family.first_latent == "noise"):
            verb = "starts from noise: give it" if first is None else "starts from no noise: give none"
            raise ValueError(f"a {self.family.name} head {verb}")
        if first is None:
            return latents
        if first.shape[1:] != latents.shape[1:] or first.shape[0] not in (1, len(latents)):
            raise ValueError(f"noise must be {tuple(latents.shape)}, got {tuple(first.shape)}")
        return torch.cat([latents, first.to(latents).expand(len(latents), -1, -1, -1)], dim=1)

    def predict(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        *,
        steps: int = 1,
        timestep: int | None = None,
        switch: tuple[float, ...] | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Annotation latents of image latents, in one pass of the U-Net (Marigold: in `steps`).

        Args:
            latents: (B, c, h, w), of `encode`.
            noise: (B or 1, c, h, w) standard normal, for families that start from it.
            timestep: of the single pass; the schedule's last where None.
            switch: class vector instead of the family's own, for example Lotus' reconstruction.

        Returns:
            (B, c, h, w), scaled, for `decode`.

        Raises:
            ValueError: noise is missing or superfluous, more steps are asked of a family that has one, or the schedule
                has no such timestep.
        """
        if steps > 1 and self.family.result != "sample":
            raise ValueError(f"a {self.family.name} head predicts in one step, got steps={steps}")
        self.unet_input(latents[:1], None if noise is None else noise[:1])  # refuses before any work
        timesteps = self.schedule.timesteps(steps)
        if timestep is not None:
            if steps > 1 or not 0 <= timestep < len(self.schedule.alphas_cumprod):
                last = len(self.schedule.alphas_cumprod) - 1
                raise ValueError(
                    f"timestep is of a single step and lies in 0..{last}, got {timestep} for {steps} steps"
                )
            timesteps = [timestep]
        task = switch if switch is not None else self.family.task_vector
        results = []
        for start in range(0, len(latents), batch_size):
            image = latents[start : start + batch_size]
            current = None if noise is None else noise.expand(len(latents), -1, -1, -1)[start : start + batch_size]
            for t in timesteps:
                output = self.network(self.unet_input(image, current), t, task)
                noisy = torch.zeros_like(output) if current is None else current.to(output)
                if self.family.result == "output":
                    current = output
                elif self.family.result == "clean":
                    current = self.schedule.clean(output, noisy, t)
                else:
                    current = self.schedule.step(output, noisy, t, steps)
            assert current is not None
            results.append(current)
        return torch.cat(results)

    def draw(self, size: tuple[int, int], seed: int, member: int, *, stream: int = 0) -> Tensor:
        """The noise (1, c, h, w) of an ensemble member: the same for every image of this size, so for all frames of a
        video; stream 1 is that of the posterior."""
        return draw_noise((self.channels, *size), seed, member, stream=stream)
