"""The machine that every one-step head shares: encode the image, call the U-Net once, decode.

Prompt, timestep and task never change, so what depends on them alone is computed once (`FoldedUNet`). Depth and normals
read what is decoded (`diffrep.heads.dense`); training calls the parts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffrep.backbones import draw_noise
from diffrep.backbones.fused import fused_blocks
from diffrep.backbones.pipelines import alphas_cumprod
from diffrep.backbones.unet import cross_attentions
from diffrep.graphs import Graphs
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.families import Family

Spacing = Literal["trailing", "leading"]
TIMESTEP = 999  # of 1000: where one-step heads are trained and asked


@dataclass(frozen=True)
class Schedule:
    """A DDPM noise schedule and what the network predicts under it.

    Timesteps are an int, or a tensor (B,) with one for each latent of a batch.

    Attributes:
        alphas_cumprod: (T,), indexed by the timestep.
        predicts: "sample", "epsilon" or "v_prediction".
        last_alpha: cumulative alpha behind the last step: 1, or that of timestep 0.
        stated: the spacing of timesteps that the folder's scheduler names.
        offset: added to the timesteps of "leading" spacing.
    """

    alphas_cumprod: Tensor
    predicts: str
    last_alpha: float = 1.0
    stated: str = "trailing"
    offset: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read a diffusers scheduler config, whatever sampler it names."""
        alphas = alphas_cumprod(config)
        last = 1.0 if config.get("set_alpha_to_one", True) else float(alphas[0])
        spacing, offset = str(config.get("timestep_spacing", "leading")), int(config.get("steps_offset", 0))
        if config.get("_class_name") == "LCMScheduler":  # of its timesteps, the last comes first whatever it says
            spacing = "trailing"
        return cls(alphas.double(), str(config.get("prediction_type", "epsilon")), last, spacing, offset)

    @cached_property
    def _numbers(self) -> list[float]:
        """The cumulative alphas as numbers: those that are read from tensors cannot be traced."""
        return self.alphas_cumprod.tolist()

    @property
    def stated_single(self) -> int:
        """The timestep of a single step with the spacing that the folder's scheduler names, as diffusers reads it."""
        return {"leading": self.offset, "linspace": 0}.get(self.stated, len(self.alphas_cumprod) - 1)

    def timesteps(self, steps: int, spacing: Spacing = "trailing") -> list[int]:
        """From noise to image. Trailing: one step is 999, four are 999, 749, 499, 249; leading, with an offset of 1:
        one step is 1, four are 751, 501, 251, 1."""
        total = len(self.alphas_cumprod)
        if spacing == "leading":
            return [i * (total // steps) + self.offset for i in reversed(range(steps))]
        return [round(total - i * total / steps) - 1 for i in range(steps)]

    def levels(self, timestep: int | Tensor) -> tuple[Any, Any]:
        """The shares of signal and noise, sqrt(abar_t) and sqrt(1 - abar_t): numbers, or (B, 1, 1, 1)."""
        if isinstance(timestep, int):
            alpha = self._numbers[timestep]
            return alpha**0.5, (1 - alpha) ** 0.5
        alphas = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise."""
        signal, spread = self.levels(timestep)
        return torch.as_tensor(signal * clean + spread * noise)

    def clean(self, output: Tensor, noisy: Tensor, timestep: int | Tensor) -> Tensor:
        """The network's estimate of the clean latent z_0 from its output and its input z_t."""
        if self.predicts == "sample":
            return output
        signal, spread = self.levels(timestep)
        if self.predicts == "v_prediction":
            return torch.as_tensor(signal * noisy - spread * output)
        return (noisy - spread * output) / torch.as_tensor(signal).clamp(min=1e-4)

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """What the network is trained to put out."""
        if self.predicts == "sample":
            return clean
        signal, spread = self.levels(timestep)
        return noise if self.predicts == "epsilon" else signal * noise - spread * clean

    def step(self, output: Tensor, noisy: Tensor, timestep: int, steps: int) -> Tensor:
        """One deterministic DDIM step (eq. 12 of arXiv 2010.02502, eta 0) of `steps` evenly spaced ones."""
        signal, spread = self.levels(timestep)
        clean = self.clean(output, noisy, timestep)
        if self.predicts == "epsilon":
            noise = output
        elif self.predicts == "v_prediction":
            noise = signal * output + spread * noisy
        else:
            noise = (noisy - signal * clean) / spread
        previous = timestep - len(self.alphas_cumprod) // steps
        if previous >= 0:
            return self.add_noise(clean, noise, previous)
        return self.last_alpha**0.5 * clean + (1 - self.last_alpha) ** 0.5 * noise


class PlainUNet(nn.Module):
    """A diffusers `UNet2DConditionModel` with its context, called as it is.

    Args:
        context: (1, tokens, C), the prompt's embedding.
        padding_channels: zeros that are appended to the latents (E2E-FT's first latent).
    """

    context: Tensor

    def __init__(self, unet: Any, context: Tensor, *, padding_channels: int = 0) -> None:
        super().__init__()
        self.unet, self.padding_channels = unet, padding_channels
        self.register_buffer("context", context, persistent=False)
        self._labels: dict[object, Tensor] = {}

    def prepare(self, latents: Tensor, timestep: int, task: tuple[float, ...] | None = None) -> None:
        """Compute what a call with these settings needs beside the latents."""
        key = (task, latents.dtype, latents.device)
        if task is not None and key not in self._labels:
            self._labels[key] = latents.new_tensor([task])

    def forward(self, latents: Tensor, timestep: int, task: tuple[float, ...] | None = None) -> Tensor:
        """What the network predicts (B, c', h, w) for all that goes into its first convolution (B, c, h, w).

        Args:
            task: class vector, the same for all rows.
        """
        self.prepare(latents, timestep, task)
        labels = None if task is None else self._labels[task, latents.dtype, latents.device]
        return self._call(latents, timestep, labels)

    def _call(self, latents: Tensor, timestep: int, labels: Tensor | None) -> Tensor:
        if self.padding_channels:
            zeros = latents.new_zeros(latents.shape[0], self.padding_channels, *latents.shape[2:])
            latents = torch.cat([latents, zeros], dim=1)
        rows = latents.shape[0]
        labels = None if labels is None else labels.expand(rows, -1)
        # filled on the device: nothing is moved there while a call is recorded
        steps = torch.full((1,), timestep, device=latents.device)
        context = self.context.expand(rows, -1, -1)
        return self.unet(latents, steps, encoder_hidden_states=context, class_labels=labels).sample


class _Constant(nn.Module):
    """In place of a projection of the constant context, or (None) of an embedding that biases already hold."""

    value: Tensor | None

    def __init__(self, value: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self, replaced: Tensor, *unused: Any) -> Tensor | None:
        return None if self.value is None else self.value.expand(replaced.shape[0], -1, -1)


class FoldedUNet(PlainUNet):
    """A diffusers `UNet2DConditionModel` with everything constant folded; it is taken over and changed.

    Keys and values of cross-attention become constants; the embedding of timestep and task becomes part of the biases
    of the residual blocks, computed by the first call with them and stored. Channels that would only see zeros are cut
    from the first convolution. No number changes beyond float rounding.

    Raises:
        ValueError: the U-Net conditions its blocks in another way than by adding an embedding.
    """

    def __init__(self, unet: Any, context: Tensor, *, padding_channels: int = 0) -> None:
        if reason := _not_foldable(unet):
            raise ValueError(f"this U-Net cannot be folded: {reason}")
        super().__init__(unet.requires_grad_(False), context)
        with torch.no_grad():
            for attention in cross_attentions(unet):
                attention.to_k = _Constant(attention.to_k(context))
                attention.to_v = _Constant(attention.to_v(context))
            if padding_channels:
                unet.conv_in = _first_inputs(unet.conv_in, unet.conv_in.in_channels - padding_channels)
        self._resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
        self._projections = nn.ModuleList(resnet.time_emb_proj for resnet in self._resnets)
        self._plain_biases = [resnet.conv1.bias.detach().clone() for resnet in self._resnets]
        self._biases: dict[object, list[Tensor]] = {}
        self._set: object = None
        self._time, self._class = unet.time_embedding, unet.class_embedding
        unet.time_embedding, unet.class_embedding = _Constant(), None
        for resnet in self._resnets:
            resnet.time_emb_proj = None  # without an embedding the block adds none

    def prepare(self, latents: Tensor, timestep: int, task: tuple[float, ...] | None = None) -> None:
        """Set the biases that hold a timestep and a task; they are computed in float32 and rounded once."""
        key = (timestep, task, latents.dtype, latents.device)
        if self._set == key:
            return
        with torch.no_grad():
            self._set_biases(key, latents, timestep, task)

    def _set_biases(self, key: object, latents: Tensor, timestep: int, task: tuple[float, ...] | None) -> None:
        if key not in self._biases:
            wide = latents.new_zeros(1, dtype=torch.float32)
            embedding = _in_float32(self._time)(self.unet.get_time_embed(sample=wide, timestep=timestep))
            if task is not None:
                embedding = embedding + _in_float32(self._class)(wide.new_tensor([task]))
            active = nn.functional.silu(embedding)
            biases = zip(self._plain_biases, self._projections, strict=True)
            self._biases[key] = [
                (bias.to(wide) + _in_float32(projection)(active)[0]).to(latents) for bias, projection in biases
            ]
        for resnet, bias in zip(self._resnets, self._biases[key], strict=True):
            resnet.conv1.bias.data = bias
        self._set = key

    def forward(self, latents: Tensor, timestep: int, task: tuple[float, ...] | None = None) -> Tensor:
        """One pass; see `PlainUNet.forward`."""
        self.prepare(latents, timestep, task)
        return self._call(latents, timestep, None)


def _in_float32(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float()


def _not_foldable(unet: Any) -> str:
    """Why a U-Net cannot be folded; empty where it can."""
    config = unet.config
    if config.resnet_time_scale_shift != "default" or config.resnet_skip_time_act or config.time_embedding_act_fn:
        return "its residual blocks do not add their time embedding"
    if config.class_embed_type not in (None, "projection") or config.class_embeddings_concat:
        return f"its class embedding is of type {config.class_embed_type!r}"
    if config.addition_embed_type or config.encoder_hid_dim_type or config.cross_attention_norm:
        return "it has more conditions than a timestep, a class vector and a context"
    if config.center_input_sample or config.act_fn != "silu":
        return "it centres its input or activates by another function than SiLU"
    return ""


def _first_inputs(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The same convolution for inputs whose later channels are zero."""
    narrow = nn.Conv2d(channels, conv.out_channels, 3, padding=1).to(conv.weight)
    narrow.weight.data, narrow.bias = conv.weight.data[:, :channels].clone(), conv.bias
    return narrow.requires_grad_(False)


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
        self.vae_graphs = Graphs(vae)
        self.channels = int(vae.config.latent_channels)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def _reference(self) -> Any:
        """A tensor or module of the device and dtype in which latents are computed."""
        return self.vae

    @property
    def device(self) -> torch.device:
        return self._reference.device

    @property
    def dtype(self) -> torch.dtype:
        return self._reference.dtype

    def encode(self, pixels: Tensor, posterior_noise: Tensor | None = None, *, batch_size: int = 4) -> Tensor:
        """Image latents, scaled as the U-Net wants them.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].
            posterior_noise: (B or 1, c, h, w) standard normal, for a sample of the posterior; None takes its mean.

        Returns:
            (B, c, H // stride, W // stride).
        """
        latents = []
        noise = None if posterior_noise is None else posterior_noise.expand(len(pixels), -1, -1, -1)
        for start in range(0, len(pixels), batch_size):
            chunk = pixels[start : start + batch_size].to(self.vae.device, self.vae.dtype)
            latent, std = self.vae_graphs("encode", self._posterior, chunk)
            if noise is not None:
                latent = latent + std * noise[start : start + batch_size].to(latent)
            latents.append(latent)
        shift = self.vae.config.shift_factor or 0.0
        scaled: Tensor = (torch.cat(latents).to(self.dtype) - shift) * self.vae.config.scaling_factor
        return scaled.contiguous()

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with fused_blocks(self.vae):
            posterior = self.vae.encode(pixels * 2 - 1).latent_dist
        return posterior.mean, posterior.std

    def _decoded(self, latents: Tensor) -> Tensor:
        with fused_blocks(self.vae):
            return self.vae.decode(latents, return_dict=False)[0]

    def decode(self, latents: Tensor, *, batch_size: int = 2) -> Tensor:
        """(B, c, h, w) scaled latents -> (B, 3, h * stride, w * stride), about [-1, 1], as the VAE decodes them."""
        shift = self.vae.config.shift_factor or 0.0
        unscaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        return torch.cat([self.vae_graphs("decode", self._decoded, chunk) for chunk in unscaled.split(batch_size)])


class OneStep(LatentCodec):
    """A latent diffusion U-Net that turns an image latent into an annotation latent, with its VAE.

    Args:
        unet: diffusers `UNet2DConditionModel`; taken over and changed where `fold` is set.
        vae: diffusers `AutoencoderKL`.
        context: (1, tokens, C), the embedding of the empty prompt.
        fold: compute once what depends on prompt, timestep and task alone; for inference only.
        decoder: draws the annotations in place of the VAE's.

    Raises:
        ValueError: the U-Net's input channels or class embedding are not those of the family.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        context: Tensor,
        schedule: Schedule,
        family: Family,
        *,
        fold: bool = True,
        decoder: DetailDecoder | None = None,
    ) -> None:
        super().__init__(vae)
        self.schedule, self.family, self.decoder = schedule, family, decoder
        self.family_name, self.working_size = family.name, family.working_size
        wanted = self.channels * (1 if family.first_latent == "none" else 2)
        if unet.config.in_channels != wanted:
            raise ValueError(
                f"a {family.name} U-Net on this VAE takes {wanted} channels, this one takes {unet.config.in_channels}"
            )
        if (unet.config.class_embed_type is None) != (family.task_vector is None):
            has = "no class embedding" if unet.config.class_embed_type is None else "a class embedding"
            raise ValueError(f"this U-Net has {has}, which is not how a {family.name} is built")
        zeros = self.channels if family.first_latent == "zeros" else 0
        self.network = (FoldedUNet if fold else PlainUNet)(unet, context, padding_channels=zeros)
        self.graphs = Graphs(self.network)

    @property
    def _reference(self) -> Tensor:
        return self.network.context

    def draw_maps(self, latents: Tensor, pixels: Tensor, *, batch_size: int = 2) -> Tensor:
        """Annotations (B, 1 or 3, H, W), about [-1, 1], of latents (B, c, h, w) and images (B, 3, H, W) in [0, 1].

        Where the head has no decoder of its own the VAE's, which does not look at the images.
        """
        if self.decoder is None:
            return self.decode(latents, batch_size=batch_size)
        looks = pixels.to(self.device, self.dtype).split(batch_size)
        pairs = zip(latents.to(self.dtype).split(batch_size), looks, strict=True)
        return torch.cat([self.decoder(rows, look) for rows, look in pairs])

    def unet_input(self, latents: Tensor, first: Tensor | None) -> Tensor:
        """Image latents (B, c, h, w), then the noise (B or 1, c, h, w) of families that start from it.

        Raises:
            ValueError: noise is missing for a family that starts from it, superfluous, or of another shape.
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
        spacing: Spacing = "trailing",
        switch: tuple[float, ...] | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Annotation latents of image latents, in one pass of the U-Net (Marigold: in `steps`).

        Args:
            latents: (B, c, h, w), of `encode`.
            noise: (B or 1, c, h, w) standard normal, for families that start from it.
            timestep: of the single pass; the family's where None.
            spacing: of Marigold's timesteps.
            switch: class vector instead of the family's, for example Lotus' reconstruction.

        Returns:
            (B, c, h, w), scaled, for `decode`.

        Raises:
            ValueError: noise is missing or superfluous, more steps are asked of a family that has one, or the schedule
                has no such timestep.
        """
        if steps > 1 and self.family.result != "sample":
            raise ValueError(f"a {self.family.name} head predicts in one step, got steps={steps}")
        self.unet_input(latents[:1], None if noise is None else noise[:1])  # refuses before any work
        timesteps, last = self.schedule.timesteps(steps, spacing), len(self.schedule.alphas_cumprod) - 1
        if timestep is None and steps == 1 and spacing == "trailing":
            timestep = min(self.family.timestep, last)
        if timestep is not None:
            if steps > 1 or not 0 <= timestep <= last:
                raise ValueError(
                    f"timestep is of a single step and lies in 0..{last}, got {timestep} for {steps} steps"
                )
            timesteps = [timestep]
        task = self.family.task_vector if switch is None else switch
        noise = None if noise is None else noise.expand(len(latents), -1, -1, -1)
        results = []
        for start in range(0, len(latents), batch_size):
            image = latents[start : start + batch_size]
            current = None if noise is None else noise[start : start + batch_size]
            for t in timesteps:
                output = self._output(self.unet_input(image, current), t, task)
                noisy = torch.zeros_like(output) if current is None else current.to(output)
                if self.family.image_is_noisy:
                    noisy = image
                if self.family.result == "residual":
                    current = image - output
                elif self.family.result == "sample":
                    current = self.schedule.step(output, noisy, t, steps)
                else:
                    current = output if self.family.result == "output" else self.schedule.clean(output, noisy, t)
            assert current is not None
            results.append(current)
        return torch.cat(results)

    def _output(self, inputs: Tensor, timestep: int, task: tuple[float, ...] | None) -> Tensor:
        def run(inputs: Tensor) -> Tensor:
            with fused_blocks(self.network):
                return self.network(inputs, timestep, task)

        self.network.prepare(inputs, timestep, task)
        return self.graphs((timestep, task), run, inputs)

    def draw(self, size: tuple[int, int], seed: int, member: int, *, stream: int = 0) -> Tensor:
        """The noise (1, c, h, w) of an ensemble member: the same for every image of this size, so for all frames of a
        video; stream 1 is that of the posterior."""
        return draw_noise((self.channels, *size), seed, member, stream=stream)
