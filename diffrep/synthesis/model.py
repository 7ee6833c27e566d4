"""SSL-conditioned latent diffusion: a U-Net that paints patches with the look that an embedding describes.

After Graikos, Yellapragada et al., "Learned representation-guided diffusion models for large-image generation"
(CVPR 2024). On disk a model is a diffusers folder: ``unet``, ``embedder``, ``scheduler``, ``vae`` or ``vqvae``, and
``synthesis.json``, which names the encoder of the embeddings and, where the folder has no autoencoder of its own,
the model whose autoencoder it uses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones import BackboneError, check_weights
from diffrep.backbones.pipelines import load_component
from diffrep.backbones.repositories import MODELS
from diffrep.devices import resolve_device
from diffrep.files import forget_origin, read_document, write_document
from diffrep.synthesis.embedder import ConditionEmbedder

EMBEDDED = ("tiny-synthesis",)
AUTOENCODERS = ("vae", "vqvae")  # where a diffusers folder may keep it


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model was made with; ``synthesis.json`` in its folder.

    Attributes:
        autoencoder: name or folder of the model whose autoencoder is used; None: the folder has its own.
        encoder: backbone that made the embeddings, as `load_backbone` knows it; None: unknown.
        pooling: how the encoder's tokens become one embedding: "class" or "mean" (of the patches).
        guidance: scale that suits the model.
        unrelated: cosine that 19 of 20 pairs of unrelated patches' embeddings stay under; above it cells of a large
            picture flow into each other.
        pixel_size: micrometres a pixel, of the images it was trained on; None: not a length.
    """

    autoencoder: str | None = None
    encoder: str | None = None
    pooling: str = "class"
    guidance: float = 2.0
    unrelated: float = 0.6
    pixel_size: float | None = None

    def __post_init__(self) -> None:
        if not -1 <= self.unrelated < 1:
            raise ValueError(f"unrelated must be a cosine under 1, got {self.unrelated}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> About:
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


class SynthesisModel(nn.Module):
    """Denoises latents under the condition of embeddings.

    Args:
        unet: diffusers `UNet2DConditionModel`.
        embedder: makes its context.
        autoencoder: diffusers `AutoencoderKL` or `VQModel`; never trained here, and no part of this module's
            parameters.
        scheduler: config of a diffusers scheduler: the noise schedule, and what the U-Net predicts.
        name: for messages.

    Attributes:
        window: side of the latents that the U-Net was trained on, in latent pixels.
        factor: image pixels a latent pixel.
        channels: of the latents.
    """

    def __init__(
        self,
        unet: Any,
        embedder: ConditionEmbedder,
        autoencoder: Any,
        scheduler: Mapping[str, Any],
        *,
        about: About | None = None,
        name: str = "synthesis model",
    ) -> None:
        super().__init__()
        if unet.config.cross_attention_dim != embedder.width:
            raise ValueError(
                f"{name}: the U-Net attends to tokens of width {unet.config.cross_attention_dim}, the embedder makes"
                f" {embedder.width}"
            )
        if unet.config.in_channels != autoencoder.config.latent_channels:
            raise ValueError(
                f"{name}: the U-Net takes {unet.config.in_channels} channels, the autoencoder gives"
                f" {autoencoder.config.latent_channels}"
            )
        self.unet, self.embedder = unet, embedder
        self.__dict__["autoencoder"] = autoencoder.eval().requires_grad_(False)  # beside the module, not in it
        self.scheduler = dict(scheduler)
        self.about, self.name = about or About(), name
        self.window = int(unet.config.sample_size)
        self.channels = int(unet.config.in_channels)
        self.factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)

    autoencoder: Any

    @property
    def device(self) -> torch.device:
        return next(self.embedder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.embedder.parameters()).dtype

    def _apply(self, fn: Any, recurse: bool = True) -> SynthesisModel:
        self.autoencoder._apply(fn)  # goes along to another device or dtype
        super()._apply(fn, recurse)
        return self

    # -- denoising ------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, timesteps: Tensor | float, context: Tensor) -> Tensor:
        """What the U-Net predicts: the noise, or v; `scheduler` says which.

        Args:
            latents: (B, c, h, w), noisy, scaled.
            timesteps: () or (B,), 0..999; may be fractional.
            context: (B, tokens, width), from `context` or `null_context`.
        """
        predicted: Tensor = self.unet(latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]
        return predicted

    def context(self, *embeddings: Tensor) -> Tensor:
        """Context of raw embeddings, (B, dim) for each token; see `ConditionEmbedder.forward`."""
        tokens: Tensor = self.embedder(*embeddings)
        return tokens

    def null_context(self, batch: int = 1) -> Tensor:
        """Context of the null condition: all embeddings zero."""
        return self.embedder.null(batch)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32 of the noise schedule, indexed by the timestep."""
        from diffusers import DDIMScheduler

        schedule: Any = DDIMScheduler.from_config(self.scheduler)
        values: Tensor = schedule.alphas_cumprod
        return values

    # -- latents --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> latents (B, c, H / factor, W / factor), scaled.

        The mean of a KL autoencoder; of a VQ autoencoder the latent before it is quantised.
        """
        encoded = self.autoencoder.encode(images.to(self.device, self.dtype) * 2 - 1)
        latents: Tensor = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(self.autoencoder.config, "shift_factor", None) or 0.0
        return (latents - shift) * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, *, quantize: bool = True) -> Tensor:
        """Scaled latents -> images (B, 3, H, W), about [0, 1], not clamped.

        Args:
            quantize: bring the latents of a VQ autoencoder to its codebook first.
        """
        latents = self.unscaled(latents.to(self.device, self.dtype))
        if hasattr(self.autoencoder, "quantize"):
            sample: Tensor = self.autoencoder.decode(latents, force_not_quantize=not quantize).sample
        else:
            sample = self.autoencoder.decode(latents).sample
        return (sample + 1) / 2

    def unscaled(self, latents: Tensor) -> Tensor:
        """Scaled latents as the autoencoder itself has them."""
        shift = getattr(self.autoencoder.config, "shift_factor", None) or 0.0
        found: Tensor = latents / self.autoencoder.config.scaling_factor + shift
        return found

    @torch.no_grad()
    def code_indices(self, latents: Tensor) -> Tensor:
        """Scaled latents -> (B, h, w) int64: the nearest entry of a VQ autoencoder's codebook."""
        latents = self.unscaled(latents.to(self.device, self.dtype))
        _, _, (_, _, indices) = self.autoencoder.quantize(latents)
        codes: Tensor = indices.reshape(len(latents), *latents.shape[-2:])
        return codes

    # -- files ----------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, autoencoder: bool | None = None) -> None:
        """Write the model as a folder that `load_synthesis` reads.

        Args:
            autoencoder: write it too; None: only where `about` names no other model that has it.
        """
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.embedder.save(folder / "embedder")
        scheduler = {"_class_name": "DDIMScheduler", **self.scheduler}
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        if self.about.autoencoder is None if autoencoder is None else autoencoder:
            part = "vqvae" if hasattr(self.autoencoder, "quantize") else "vae"
            self.autoencoder.save_pretrained(folder / part)
        forget_origin(folder)
        about = {k: v for k, v in vars(self.about).items() if v is not None}
        write_document(folder / "synthesis.json", about)

    def checksum(self) -> str:
        """Of all weights, 16 hexadecimal digits: the same for the same numbers, wherever they came from."""
        digest = hashlib.sha256()
        for module in (self.unet, self.embedder, self.autoencoder):
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(key.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_synthesis(
    name: str | os.PathLike[str] = "tiny-synthesis",
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
) -> SynthesisModel:
    """Load a model for synthesis, in eval mode.

    Args:
        name: "tiny-synthesis", or a folder: ours, or one with the authors' ``cond_stage`` record for the embedder.
        device: see `resolve_device`.
        dtype: the sampler's state is float32 whatever this is.

    Raises:
        DeviceError: there is no such device.
        BackboneError: no such folder, a part is missing, or weights do not fit or are not finite.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel

    name = os.fspath(name)
    folder = MODELS / name if name in EMBEDDED else Path(name)
    if not folder.is_dir():
        raise BackboneError(f"{name}: no such folder; give a folder with unet and embedder, or {', '.join(EMBEDDED)}")
    place = resolve_device(device)
    parts = ("unet/config.json", "scheduler/scheduler_config.json")
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise BackboneError(f"{folder}: is no synthesis model: {', '.join(missing)} missing")
    about = _about(folder)
    home, part = _find_autoencoder(folder, about)
    kind = VQModel if _class_name(home / part) == "VQModel" else AutoencoderKL
    embedder = ConditionEmbedder.load(_first(folder, ("embedder", "cond_stage")))
    scheduler = read_document(folder / "scheduler" / "scheduler_config.json", error=BackboneError)
    try:
        model = SynthesisModel(
            load_component(UNet2DConditionModel, str(folder), "unet", torch.float32),
            embedder,
            load_component(kind, str(home), part, torch.float32),
            {k: v for k, v in scheduler.items() if not k.startswith("_")},
            about=about,
            name=name,
        )
    except ValueError as error:
        raise BackboneError(str(error)) from None
    for module in (model.unet, model.embedder, model.autoencoder):
        check_weights(module, name)
    return model.eval().requires_grad_(False).to(place, dtype)


def _about(folder: Path) -> About:
    file = folder / "synthesis.json"
    if not file.is_file():
        return About()
    try:
        return About.from_dict(read_document(file, error=BackboneError))
    except (ValueError, TypeError) as error:
        raise BackboneError(f"{file}: {error}") from None


def _first(folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise BackboneError(f"{folder}: has none of {', '.join(names)}")
    return found


def _find_autoencoder(folder: Path, about: About) -> tuple[Path, str]:
    """The folder that holds the autoencoder, and its part there."""
    home = folder
    if about.autoencoder is not None:
        embedded = MODELS / about.autoencoder
        home = embedded if embedded.is_dir() else folder / about.autoencoder
    if not home.is_dir():
        raise BackboneError(f"{folder}: its autoencoder is that of {about.autoencoder}, which is no folder")
    return home, _first(home, AUTOENCODERS).name


def _class_name(folder: Path) -> str:
    return str(read_document(folder / "config.json", error=BackboneError).get("_class_name", ""))
