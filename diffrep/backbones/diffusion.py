"""What diffusion backbones share: noise that depends on a seed alone, ensembles of draws, the VAE and prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.base import Backbone, BackboneError, Conditions, TapInfo
from diffrep.backbones.fused import fused_blocks
from diffrep.backbones.text import PromptEmbedding, PromptEncoder
from diffrep.graphs import Graphs


def draw_noise(shape: Sequence[int], seed: int, draw: int = 0, *, stream: int = 0) -> Tensor:
    """Standard normal noise (1, *shape) that depends on the seed and the number of the draw only.

    Drawn contiguously on the CPU, so that it is the same on every device and in every batch. Draw 0 of
    stream 0 is the plain generator seeded with `seed`, as sd-dino draws it.
    """
    return torch.randn(1, *shape, generator=keyed_generator(seed, draw, stream=stream))


def keyed_generator(seed: int, draw: int = 0, *, stream: int = 0) -> torch.Generator:
    """The generator of one draw of one stream."""
    mixed = (seed + draw * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) % 2**63
    return torch.Generator().manual_seed(mixed)


def class_labels(name: str, condition: Any, classes: int | None, negative: str = "") -> list[int]:
    """The classes of a condition as a list; empty for a network without classes.

    Args:
        name: of the network, for messages.
        condition: a class or several, 0 to `classes` - 1; None for a network without classes.
        classes: how many the network knows; None: it has none.

    Raises:
        BackboneError: prompts; a class that the network does not know; or none where it needs one.
    """
    listed = condition if isinstance(condition, Sequence) and not isinstance(condition, str) else [condition]
    if negative or any(isinstance(one, str) for one in listed):
        what = "a class instead (label)" if classes is not None else "no condition"
        raise BackboneError(f"{name} takes no prompts, {what}")
    labels: list[int] = [] if condition is None else torch.as_tensor(condition).flatten().tolist()
    if bool(labels) != bool(classes) or not all(0 <= label < (classes or 0) for label in labels):
        needs = "has no classes" if classes is None else f"needs a class (label), 0..{classes - 1}"
        raise BackboneError(f"{name} {needs}, got {'none' if condition is None else repr(condition)}")
    return labels


class DiffusionBackbone(Backbone, ABC):
    """A frozen network that was trained to take noise out of images or latents.

    Attributes:
        stride: image pixels per cell of what is noised.
        guidance: scale of classifier-free guidance that it is painted with where none is said; 1: none.
        alphas_cumprod: (T,) of the schedule, indexed by the timestep; not used by rectified flow.
        scheduler: configuration of the schedule, where it came from a folder; for saving.
    """

    takes = frozenset(("timestep", "clean", "ensemble"))
    stride: int = 1
    guidance: float = 1.0
    alphas_cumprod: Tensor
    scheduler: Mapping[str, Any] | None = None
    _taps: Mapping[str, TapInfo]

    def __init__(self, network: Any, alphas_cumprod: Tensor, *, name: str, source: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.alphas_cumprod = alphas_cumprod.float()
        self.name, self.source = name, source

    def taps(self) -> tuple[TapInfo, ...]:
        return tuple(self._taps.values())

    @abstractmethod
    def encode(self, pixels: Tensor, *, batch_size: int = 8) -> tuple[Tensor, Tensor | None]:
        """Mean and, where there is one, standard deviation of what is noised, for (B, 3, H, W) pixels in [0, 1]."""

    @abstractmethod
    def noisy(self, mean: Tensor, spread: Tensor | None, noise: Tensor | None, timestep: int) -> Tensor:
        """What the network takes: mean + spread, (B, c, h, w), with noise (B or 1, c, h, w) of a timestep."""

    @abstractmethod
    def network_maps(self, noisy: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]:
        """Run the network on (B, c, h, w) noisy pixels or latents, up to the deepest tap."""

    def painted_under(self, condition: Any, negative: str) -> tuple[list[Any], Any]:
        """The conditions of `predicted` that a prompt, a class or several of them mean, and that for guidance away.

        Raises:
            BackboneError: it cannot be painted under such a condition.
        """
        raise NotImplementedError

    def predicted(self, states: Tensor, timestep: float, conditions: Sequence[Any]) -> Tensor:
        """What the network gives for noisy states, in its own convention.

        Args:
            states: (B, c, h, w).
            timestep: what it is called with; of flows 1000 times the share of noise.
            conditions: B prompts or classes, as the network takes them.

        Returns:
            (B, c, h, w): noise, velocity or clean states, without a learned variance.
        """
        raise NotImplementedError

    def decode(self, states: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [0, 1] of clean states (B, c, h, w), as the network knows them."""
        raise NotImplementedError

    def check_canvas(self, size: Sequence[int]) -> None:
        """Refuse a canvas of (..., H, W) pixels that the network's cells do not cover.

        Raises:
            ValueError: a side is no multiple of `multiple`.
        """
        if size[-2] % self.multiple or size[-1] % self.multiple:
            raise ValueError(f"{self.name} needs sides that are multiples of {self.multiple}, got {tuple(size[-2:])}")

    def draws(self, shape: Sequence[int], conditions: Conditions, **values: Tensor | None) -> dict[str, Tensor]:
        """The noise of each member of an ensemble, (E, *shape): ``noise`` and ``posterior_noise``, as far as needed.

        Args:
            values: instead of drawn noise, where not None.

        Raises:
            ValueError: they have another shape.
        """
        random = conditions.noise == "random" and not conditions.clean and conditions.timestep >= 0
        streams = {"noise": 0} if random else {}
        if self.denoises == "latents" and conditions.posterior == "sample":
            streams["posterior_noise"] = 1
        draws, wanted = {}, (conditions.ensemble, *shape)
        for kind, stream in streams.items():
            value = values.get(kind)
            if value is None:
                numbers = range(conditions.ensemble)
                value = torch.cat([draw_noise(shape, conditions.seed, number, stream=stream) for number in numbers])
            if value.shape != wanted:
                raise ValueError(f"noise must be {wanted} for this ensemble, got {tuple(value.shape)}")
            draws[kind] = value
        return draws

    def check_inversion(self, conditions: Conditions) -> None:
        """Refuse conditions under which no image can be inverted.

        Raises:
            BackboneError: this network does not invert images.
            ValueError: there is no noise to find, or an ensemble of equal members.
        """
        if type(self).inverted is DiffusionBackbone.inverted:
            raise BackboneError(f"{self.name}: noise 'inverted' is for U-Nets of latents")
        if conditions.clean or conditions.timestep < 1 or conditions.ensemble > 1:
            raise ValueError(
                "noise 'inverted' needs a timestep of at least 1, no clean image and no ensemble, whose members"
                f" would be equal; got timestep {conditions.timestep}, clean {conditions.clean},"
                f" ensemble {conditions.ensemble}"
            )

    def inverted(self, clean: Tensor, conditions: Conditions) -> Tensor:
        """Clean (B, c, h, w) with the noise that DDIM inversion says they are made of, at a timestep."""
        raise NotImplementedError

    @torch.inference_mode()
    def maps(
        self,
        pixels: Tensor,
        taps: Sequence[str],
        conditions: Conditions,
        *,
        batch_size: int = 8,
        noise: Tensor | None = None,
        posterior_noise: Tensor | None = None,
        average: bool = True,
    ) -> dict[str, Tensor]:
        """Read activations of images on the canvas; see `Backbone.maps`.

        Args:
            noise: (E, c, h, w), the diffusion noise of each ensemble member instead of drawn noise.
            posterior_noise: (E, c, h, w), the same for `Conditions.posterior` "sample".
            average: over the ensemble, in float32; False keeps the members, (B * E, C, h, w), the members of an image
                next to each other.

        Raises:
            ValueError: the canvas is no multiple of the network's stride, a noise tensor has another shape, or a
                class-conditional network is given no class.
        """
        self.check_canvas(pixels.shape)
        if conditions.noise == "inverted":
            self.check_inversion(conditions)
        mean, std = self.encode(pixels, batch_size=batch_size)
        draws = self.draws(mean.shape[1:], conditions, noise=noise, posterior_noise=posterior_noise)
        added, spread, members = draws.get("noise"), draws.get("posterior_noise"), conditions.ensemble
        jobs = [(image, member) for image in range(len(mean)) for member in range(members)]
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(jobs), batch_size):
            images, numbers = (list(side) for side in zip(*jobs[start : start + batch_size], strict=True))
            noisy = self.noisy(
                mean[images],
                None if spread is None or std is None else std[images] * spread.to(std)[numbers],
                None if added is None else added[numbers],
                conditions.timestep,
            )
            if conditions.noise == "inverted":
                noisy = self.inverted(noisy, conditions)
            for tap, part in self.network_maps(noisy, taps, conditions).items():
                parts.setdefault(tap, []).append(part)
        maps = {tap: torch.cat(chunks).contiguous() for tap, chunks in parts.items()}
        if average and members > 1:
            maps = {tap: m.unflatten(0, (-1, members)).float().mean(1).to(m.dtype) for tap, m in maps.items()}
        return maps


class LatentBackbone(DiffusionBackbone):
    """A frozen denoiser of latents with the encoder of its VAE.

    An image is encoded once, noised as often as the ensemble asks, and goes through the network up to the deepest tap.
    The VAE's decoder never runs; prompts are encoded once per backbone.

    Attributes:
        vae: diffusers `AutoencoderKL`; its decoder is not used.
        text: encodes prompts; or None where `embed` is given prompt embeddings.
    """

    denoises = "latents"
    takes = DiffusionBackbone.takes | {"posterior", "prompt"}

    def __init__(
        self, network: Any, vae: Any, alphas_cumprod: Tensor, text: PromptEncoder | None, *, name: str, source: str
    ) -> None:
        super().__init__(network, alphas_cumprod, name=name, source=source)
        self.vae, self.text = vae.eval().requires_grad_(False), text
        self.vae_graphs = Graphs(self.vae)
        self.stride = self.multiple = 2 ** (len(vae.config.block_out_channels) - 1)
        self._prompts: dict[str, PromptEmbedding] = {}

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"U-Net" if self.has_unet else "transformer": self.network, "VAE encoder": self.vae}

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
        if getattr(self.vae.config, "force_upcast", False) and self.vae.dtype == torch.float16:
            self.vae.float()
        means, stds = [], []
        for chunk in pixels.split(batch_size):
            mean, std = self.vae_graphs("encode", self._posterior, chunk.to(self.vae.device, self.vae.dtype))
            means.append(mean)
            stds.append(std)
        return torch.cat(means).to(self.dtype), torch.cat(stds).to(self.dtype)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with fused_blocks(self.vae):
            posterior = self.vae.encode(pixels * 2 - 1).latent_dist
        # a batch can come back channels-last: noise must not follow its memory layout
        return posterior.mean.contiguous(), posterior.std.contiguous()

    def painted_under(self, condition: Any, negative: str) -> tuple[list[Any], Any]:
        prompts: list[Any] = [condition] if isinstance(condition, (str, int)) else list(condition or [""])
        if any(isinstance(prompt, int) for prompt in prompts):
            raise BackboneError(f"{self.name} takes prompts and no class (label)")
        if self.text is None or not all(isinstance(prompt, str) for prompt in prompts):
            raise BackboneError(
                f"{self.name}: is painted by prompts, and needs its text_encoder and tokenizer for them"
            )
        self.embed_all([*prompts, negative])
        return prompts, negative

    def decode(self, states: Tensor) -> Tensor:
        if self.vae.decoder is None:
            raise BackboneError(f"{self.name}: was loaded without the decoder of its VAE; load_backbone(decoder=True)")
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = states.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + shift
        return self.vae.decode(latents).sample / 2 + 0.5

    def scale(self, latents: Tensor) -> Tensor:
        """What the VAE gives -> what the network was trained on."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * self.vae.config.scaling_factor

    def noisy(self, mean: Tensor, spread: Tensor | None, noise: Tensor | None, timestep: int) -> Tensor:
        """z_t of a draw: sqrt(abar_t) z + sqrt(1 - abar_t) noise, z = scale (mean + spread).

        Args:
            mean: (B, c, h, w) of the posterior.
            spread: the posterior's standard deviation times its draw, (B, c, h, w); None for the mean.
            noise: (B or 1, c, h, w); None for the clean latent.
        """
        latents = self.scale(mean if spread is None else mean + spread)
        return latents if noise is None else self.add_noise(latents, noise.to(latents), timestep)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Noise scaled latents as the network was trained: by the schedule of a DDPM."""
        alpha = self.alphas_cumprod[timestep].item()
        return alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise

    def embed(self, prompt: str, embedding: PromptEmbedding | None = None) -> PromptEmbedding:
        """The embedding of a prompt, encoded once.

        Args:
            embedding: use this one for the prompt from now on.
        """
        if embedding is not None:
            self._prompts[prompt] = embedding
        self.embed_all([prompt])
        return self._prompts[prompt]

    def embed_all(self, prompts: Sequence[str]) -> None:
        """Encode many prompts while the text encoders are loaded once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        if missing and self.text is None:
            raise ValueError(f"{self.name} has no text encoder: give embed({missing[0]!r}, embedding) first")
        if missing and self.text is not None:
            self._prompts |= self.text.encode(missing)
