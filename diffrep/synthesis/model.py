"""SSL-conditioned latent diffusion: a U-Net that paints patches with the look that an embedding describes.

After Graikos, Yellapragada et al., "Learned representation-guided diffusion models for large-image generation"
(CVPR 2024). On disk a model is a diffusers folder: ``unet``, ``embedder``, ``scheduler``, ``vae`` or ``vqvae``, and
``synthesis.json``, which names the encoder of the embeddings and, where the folder has no autoencoder of its own,
the model whose autoencoder it uses.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones import BackboneError, check_weights
from diffrep.backbones.fused import fused_blocks
from diffrep.backbones.hub import HubFolder
from diffrep.backbones.pipelines import alphas_cumprod, load_component
from diffrep.backbones.repositories import MODELS
from diffrep.devices import resolve_device
from diffrep.files import forget_origin, one_line, read_document, read_weights, save_weights, write_document
from diffrep.graphs import Graphs
from diffrep.settings import check, check_keys

EMBEDDED = ("tiny-synthesis",)
EMBEDDERS = ("embedder", "cond_stage")  # a folder has one of them: ours, or that of the authors
OFFICIAL_TOKENS = ("patch_fc", "region_fc")  # the authors' names of the projections, in the order of the tokens


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
        check(self, unrelated="[-1, 1)")  # a cosine

    @classmethod
    def read(cls, folder: Path) -> About:
        """The record in a model's folder; where it has none, nothing is known.

        Raises:
            BackboneError: it is damaged.
        """
        file = folder / "synthesis.json"
        if not file.is_file():
            return cls()
        values = read_document(file, error=BackboneError)
        try:
            check_keys(cls, values)
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise BackboneError(f"{file}: {one_line(error)}") from None


class ConditionEmbedder(nn.Module):
    """Token k of the context = Linear_k(e_k / ||e_k||), trained together with the U-Net.

    The null condition is the embedding of all zeros, so that its token is the bias (official code).

    Args:
        dims: width of the embedding of each token: (384,) for one patch embedding, (384, 768) where a second token
            tells of a larger region.
        width: of the tokens, the U-Net's ``cross_attention_dim``.
        normalize: divide embeddings by their length first.
    """

    def __init__(self, dims: Sequence[int], width: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.dims, self.width, self.normalize = tuple(int(d) for d in dims), int(width), normalize
        self.tokens = nn.ModuleList(nn.Linear(dim, self.width) for dim in self.dims)

    def forward(self, *embeddings: Tensor) -> Tensor:
        """Embeddings, (B, dim) for each token -> context (B, tokens, width).

        Trailing tokens that are left out get their null, as the large-image code of the authors does with the
        embedding of the region.

        Raises:
            ValueError: an embedding has another width, or there are more than tokens.
        """
        if not 1 <= len(embeddings) <= len(self.dims):
            raise ValueError(f"this model takes 1 to {len(self.dims)} embeddings an image, got {len(embeddings)}")
        rest = [embeddings[0].new_zeros(len(embeddings[0]), dim) for dim in self.dims[len(embeddings) :]]
        tokens = []
        for number, (embedding, dim, project) in enumerate(
            zip([*embeddings, *rest], self.dims, self.tokens, strict=True)
        ):
            if embedding.ndim != 2 or embedding.shape[1] != dim:
                shape = tuple(embedding.shape)
                raise ValueError(f"embedding {number} of this model is {dim} wide: give (B, {dim}), got {shape}")
            tokens.append(project(F.normalize(embedding, dim=1) if self.normalize else embedding))
        return torch.stack(tokens, dim=1)

    def null(self, batch: int = 1) -> Tensor:
        """Context (batch, tokens, width) of the null condition."""
        biases: list[Any] = [linear.bias for linear in self.tokens]
        return torch.stack(biases).expand(batch, -1, -1)

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        config = {"dims": list(self.dims), "width": self.width, "normalize": self.normalize}
        write_document(folder / "config.json", config)
        save_weights(folder / "model.safetensors", self.state_dict())

    @classmethod
    def load(cls, folder: Path) -> ConditionEmbedder:
        """Read what `save` wrote, or a record of the authors' classes (patch_embed_dim, ..., target_dim).

        Raises:
            BackboneError: a file is missing or does not fit.
        """
        config = read_document(folder / "config.json", error=BackboneError)
        weights, _ = read_weights(folder / "model.safetensors", error=BackboneError)
        names = ("patch_embed_dim", "region_embed_dim")
        try:
            if "target_dim" in config:
                dims, width = [config[name] for name in names if config.get(name)], config["target_dim"]
                normalize, weights = config.get("normalize_ssl", True), official_tokens(weights)
            else:
                dims, width, normalize = config["dims"], config["width"], config.get("normalize", True)
            embedder = cls(dims, width, normalize=normalize)
            embedder.load_state_dict({k: v.float() for k, v in weights.items()})
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise BackboneError(f"{folder / 'config.json'}: does not fit the weights ({one_line(error)})") from None
        return embedder


def official_tokens(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' projections: patch_fc -> tokens.0, region_fc -> tokens.1."""
    renamed = {}
    for key, value in weights.items():
        name, _, kind = key.partition(".")
        renamed[f"tokens.{OFFICIAL_TOKENS.index(name)}.{kind}" if name in OFFICIAL_TOKENS else key] = value
    return renamed


class SynthesisModel(HubFolder, nn.Module):
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
        self.graphs = Graphs(unet)
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

    def forward(self, latents: Tensor, timesteps: Tensor | float, context: Tensor) -> Tensor:
        """What the U-Net predicts: the noise, or v; `scheduler` says which.

        Args:
            latents: (B, c, h, w), noisy, scaled.
            timesteps: () or (B,), 0..999; may be fractional.
            context: (B, tokens, width), from `context` or `null_context`.
        """

        def run(latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            with fused_blocks(self.unet):
                return self.unet(latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]

        if not isinstance(timesteps, Tensor):
            timesteps = torch.full((1,), timesteps, device=latents.device)
        return self.graphs("unet", run, latents, timesteps.to(latents.device), context)

    def context(self, *embeddings: Tensor) -> Tensor:
        """Context of raw embeddings, (B, dim) for each token; see `ConditionEmbedder.forward`."""
        return self.embedder(*embeddings)

    def null_context(self, batch: int = 1) -> Tensor:
        """Context of the null condition: all embeddings zero."""
        return self.embedder.null(batch)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32 of the noise schedule, indexed by the timestep."""
        return alphas_cumprod(self.scheduler)

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
        return latents / self.autoencoder.config.scaling_factor + shift

    @torch.no_grad()
    def code_indices(self, latents: Tensor) -> Tensor:
        """Scaled latents -> (B, h, w) int64: the nearest entry of a VQ autoencoder's codebook."""
        latents = self.unscaled(latents.to(self.device, self.dtype))
        _, _, (_, _, indices) = self.autoencoder.quantize(latents)
        return indices.reshape(len(latents), *latents.shape[-2:])

    def save(self, folder: str | os.PathLike[str], *, autoencoder: bool | None = None) -> None:
        """Write the model as a folder that `load_synthesis` reads.

        Args:
            autoencoder: write it too, so that no other model is named; None: only where `about` names none that has it.
        """
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.embedder.save(folder / "embedder")
        scheduler = {"_class_name": "DDIMScheduler", **self.scheduler}
        write_document(folder / "scheduler" / "scheduler_config.json", scheduler)
        if self.about.autoencoder is None if autoencoder is None else autoencoder:
            part = "vqvae" if hasattr(self.autoencoder, "quantize") else "vae"
            self.autoencoder.save_pretrained(folder / part)
        forget_origin(folder)
        about = vars(self.about) | ({"autoencoder": None} if autoencoder else {})
        write_document(folder / "synthesis.json", {k: v for k, v in about.items() if v is not None})

    def save_folder(self, folder: Path) -> None:
        self.save(folder, autoencoder=True)

    @classmethod
    def open_folder(cls, folder: Path, **options: Any) -> SynthesisModel:
        return load_synthesis(folder, **options)

    def checksum(self) -> str:
        """Of all weights, 16 hexadecimal digits: the same for the same numbers, wherever they came from."""
        digest = hashlib.sha256()
        for module in (self.unet, self.embedder, self.autoencoder):
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(key.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def is_synthesis(name: str) -> bool:
    """Whether a name or folder is that of a model for synthesis."""
    return name in EMBEDDED or any((Path(name) / part).is_dir() for part in EMBEDDERS)


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
    about = About.read(folder)
    embedder = ConditionEmbedder.load(_first(folder, EMBEDDERS))
    autoencoder = _first(_autoencoder_home(folder, about), ("vae", "vqvae"))
    kind = read_document(autoencoder / "config.json", error=BackboneError).get("_class_name")
    scheduler = read_document(folder / "scheduler" / "scheduler_config.json", error=BackboneError)
    try:
        model = SynthesisModel(
            load_component(UNet2DConditionModel, str(folder), "unet", torch.float32),
            embedder,
            load_component(
                VQModel if kind == "VQModel" else AutoencoderKL,
                str(autoencoder.parent), autoencoder.name, torch.float32,
            ),
            {k: v for k, v in scheduler.items() if not k.startswith("_")},
            about=about,
            name=name,
        )  # fmt: skip
    except ValueError as error:
        raise BackboneError(str(error)) from None
    for module in (model.unet, model.embedder, model.autoencoder):
        check_weights(module, name)
    return model.eval().requires_grad_(False).to(place, dtype)


def _first(folder: Path, names: Sequence[str]) -> Path:
    part = next((folder / name for name in names if (folder / name).is_dir()), None)
    if part is None:
        raise BackboneError(f"{folder}: has none of {', '.join(names)}")
    return part


def _autoencoder_home(folder: Path, about: About) -> Path:
    """The folder of the model that has the autoencoder."""
    if about.autoencoder is None:
        return folder
    embedded = MODELS / about.autoencoder
    home = embedded if embedded.is_dir() else folder / about.autoencoder
    if not home.is_dir():
        raise BackboneError(f"{folder}: its autoencoder is that of {about.autoencoder}, which is no folder")
    return home
