"""The parts of diffusers folders: what extraction needs of them, or whole, for what runs the VAE's decoder too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError, Conditions, Recommended
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.pixel_diffusion import PixelDiffusion
from diffrep.backbones.repositories import Repository, repository
from diffrep.backbones.text import PipelineText, TextEncoders, quiet_libraries
from diffrep.backbones.transformers import FLOW, FORMER, KINDS, DiffusionTransformer
from diffrep.devices import resolve_device
from diffrep.files import one_line
from diffrep.images import Sizing

ENCODER_ONLY = ("decoder.", "post_quant_conv.")  # parts of a VAE that extraction does not use


def load_transformer(
    source: str | Repository,
    *,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    name: str | None = None,
    weights: bool = True,
) -> DiffusionTransformer:
    """Load transformer, VAE encoder and schedule of a FLUX, SD3, PixArt or DiT folder or hub id.

    Raises:
        BackboneError: a component is missing or of an unknown kind, or its weights are no safetensors or do not fit.
    """
    import diffusers

    source = repository(source, variant=variant)
    _refuse_missing(source, "transformer/config.json", "vae/config.json")
    index = source.json("model_index.json", required=False)
    config = source.json("transformer/config.json")
    kind = config.get("_class_name")
    if kind == "Transformer2DModel":
        kind = FORMER.get(str(config.get("norm_type")), kind)
    if kind not in KINDS:
        raise BackboneError(f"{source.label}: a {kind} cannot be tapped; known are {', '.join(KINDS)}")
    scheduler = source.json("scheduler/scheduler_config.json", required=kind not in FLOW)
    transformer = load_component(getattr(diffusers, kind), source, "transformer", dtype, weights=weights)
    backbone = DiffusionTransformer(
        transformer,
        _vae_encoder(source, dtype, weights),
        None if kind in FLOW else alphas_cumprod(scheduler),
        text=PipelineText(source, str(index.get("_class_name")), device=device, dtype=dtype)
        if _text_parts(index)
        else None,
        name=name or source.name,
        source=source.label,
    )
    backbone.scheduler = scheduler
    return _as_recommended(backbone, source)


def load_diffusers(
    source: str | Repository,
    *,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    name: str | None = None,
    weights: bool = True,
) -> LatentDiffusion:
    """Load U-Net, VAE encoder and schedule of a Stable Diffusion folder or hub id; text encoders come later.

    Raises:
        BackboneError: a component is missing, or its weights are not safetensors or do not fit its config.
    """
    from diffusers import UNet2DConditionModel

    source = repository(source, variant=variant)
    _refuse_missing(source, "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    config = source.json("unet/config.json")
    channels = int(config.get("in_channels", 4))
    latent = int(source.json("vae/config.json").get("latent_channels", 4))
    refuse_channels(source.label, channels, latent)
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise BackboneError(
            f"{source.label}: the U-Net is conditioned on a class or task vector: it is a dense-prediction model"
            " (`diffrep depth --model`?) or an upscaler, and cannot be tapped this way; give the model that it was"
            " fine-tuned from"
        )
    parts = _text_parts(source.json("model_index.json", required=False))
    if not parts and (source.folder is None or source.has("text_encoder")):
        parts = {"text_encoder": "CLIPTextModel"}
    scheduler = source.json("scheduler/scheduler_config.json")
    backbone = LatentDiffusion(
        load_component(UNet2DConditionModel, source, "unet", dtype, weights=weights),
        _vae_encoder(source, dtype, weights),
        alphas_cumprod(scheduler),
        text=TextEncoders(source, parts, device=device, dtype=dtype) if parts else None,
        predicts=scheduler.get("prediction_type", "epsilon"),
        name=name or source.name,
        source=source.label,
    )
    backbone.scheduler = scheduler
    return _as_recommended(backbone, source)


def load_pixel_unet(source: Repository, *, dtype: torch.dtype, name: str, weights: bool = True) -> PixelDiffusion:
    """A folder of diffusers' DDPM pipelines: a `UNet2DModel` and its schedule."""
    from diffusers import UNet2DModel

    scheduler = source.json("scheduler/scheduler_config.json")
    unet = load_component(UNet2DModel, source, "unet", dtype, weights=weights)
    backbone = PixelDiffusion(unet, alphas_cumprod(scheduler), name=name, source=source.label)
    backbone.scheduler = scheduler
    return _as_recommended(backbone, source)


def load_component(
    kind: Any,
    source: str | os.PathLike[str] | Repository,
    part: str,
    dtype: torch.dtype,
    variant: str | None = None,
    *,
    optional: tuple[str, ...] = (),
    weights: bool = True,
) -> Any:
    """One part of a diffusers folder or hub id, for example its ``vae``; strictly, from safetensors only.

    Args:
        kind: the diffusers class.
        optional: prefixes of tensors that may be missing altogether.
        weights: False builds it from its configuration alone, on the meta device.

    Raises:
        BackboneError: the weights are missing, no safetensors, or do not fit the part's config.
    """
    source = repository(source, variant=variant)
    config = source.json(f"{part}/config.json")
    if not weights:
        with torch.device("meta"):
            return _built(kind.from_config, source, part, config)
    folder, chosen = source.part(part, need=part in ("unet", "transformer"))
    with quiet_libraries():
        module, info = _built(
            kind.from_pretrained,
            source,
            part,
            folder,
            subfolder=part,
            torch_dtype=dtype,
            use_safetensors=True,
            variant=chosen,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(
            str(key) for key in info.get(what) or () if not (what[0] == "m" and str(key).startswith(optional))
        )
        if keys:
            raise BackboneError(f"{source.label}: {part} has {what.replace('_', ' ')}: {keys[:3]}")
    return module


def _built(build: Any, source: Repository, part: str, *arguments: Any, **named: Any) -> Any:
    try:
        return build(*arguments, **named)
    except OSError as error:
        raise BackboneError(f"{source.label}: {part} cannot be loaded as safetensors ({one_line(error)})") from None
    except Exception as error:  # sizes that do not match, damaged files, nonsense in the configuration: many kinds
        raise BackboneError(
            f"{source.label}: the weights of {part} do not fit its config or are damaged ({one_line(error)})"
        ) from None


def _vae_encoder(source: Repository, dtype: torch.dtype, weights: bool) -> Any:
    """The VAE without its decoder, which extraction does not use: its memory is given back."""
    from diffusers import AutoencoderKL

    vae = load_component(AutoencoderKL, source, "vae", dtype, optional=ENCODER_ONLY, weights=weights)
    vae.decoder = None
    vae.post_quant_conv = None
    return vae


def _refuse_missing(source: Repository, *files: str) -> None:
    if missing := [file for file in files if file not in source.files]:
        raise BackboneError(f"{source.label}: is no complete diffusers folder: {', '.join(missing)} missing")


def refuse_channels(name: str, channels: int, latent: int) -> None:
    """Refuse a U-Net that takes more than the noisy latent.

    Raises:
        BackboneError: naming what such U-Nets are for.
    """
    kinds = {
        latent + 1: "conditioned on a depth map or a mask",
        latent + 3: "an upscaler, conditioned on a small image",
        2 * latent: "an editing or dense-prediction model, conditioned on another latent (`diffrep depth --model`?)",
        2 * latent + 1: "an inpainting model, conditioned on a mask and the masked image",
    }
    if channels != latent:
        raise BackboneError(
            f"{name}: the U-Net takes {channels} channels but the VAE gives {latent}: it is"
            f" {kinds.get(channels, 'conditioned on more than the image')}, and cannot be tapped this way; give the"
            " model that it was fine-tuned from"
        )


def _text_parts(index: Mapping[str, Any]) -> dict[str, str]:
    """Component folder -> class of the text encoders that an index names."""
    return {
        part: str(value[1])
        for part, value in index.items()
        if part.startswith("text_encoder") and isinstance(value, list) and len(value) == 2 and value[0]
    }


def _as_recommended(backbone: Any, source: Repository) -> Any:
    """Use a backbone as the ``diffrep.json`` in its folder says, which our own folders have."""
    values = source.json("diffrep.json", required=False)
    if values:
        try:
            conditions: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in values.get("conditions", {}).items()
            }
            backbone.recommended = Recommended(
                taps=tuple(values["taps"]), sizing=Sizing(**values["sizing"]), conditions=Conditions(**conditions)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BackboneError(
                f"{source.label}: diffrep.json is damaged ({' '.join(str(error).split())[:160]})"
            ) from None
    return backbone


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """(T,) the schedule of a scheduler's configuration, whatever sampler it names."""
    from diffusers import DDIMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    try:
        scheduler: Any = DDIMScheduler(**{k: config[k] for k in keys if k in config})
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise BackboneError(f"scheduler_config.json describes no schedule ({one_line(error)})") from None
    return scheduler.alphas_cumprod


def local_variant(folder: Path) -> str | None:
    """The variant of a component's weight files, "fp16" where there are no others; None: plain, or none."""
    try:
        return Repository(folder.parent).part(folder.name)[1]
    except BackboneError:
        return None


def read_json(source: str, file: str, *, required: bool = True) -> dict[str, Any]:
    """A JSON file of a folder or hub id; see `Repository.json`."""
    return repository(source).json(file, required=required)


@dataclass(frozen=True)
class PipelineParts:
    """What a diffusers folder holds.

    Attributes:
        unet: `UNet2DConditionModel` with any number of input channels.
        vae: `AutoencoderKL`, encoder and decoder.
        alphas_cumprod: (T,) of the schedule.
        scheduler: its configuration.
        text: encodes prompts; None where the folder has no text encoder.
    """

    unet: Any
    vae: Any
    alphas_cumprod: Tensor
    scheduler: Mapping[str, Any]
    text: TextEncoders | None
    source: str


def load_parts(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    pad: bool = True,
) -> PipelineParts:
    """Load U-Net, VAE and schedule of an embedded model, a folder or a hub id; text encoders come when asked.

    Args:
        pad: see `TextEncoders`.

    Raises:
        BackboneError: a component is missing, or its weights are not safetensors or do not fit its config.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    source, device = repository(name, variant=variant), resolve_device(device)
    scheduler = source.json("scheduler/scheduler_config.json")
    parts = {"text_encoder": "CLIPTextModel"}
    text = TextEncoders(source, parts, device=device, dtype=dtype, pad=pad) if source.has("text_encoder") else None
    return PipelineParts(
        unet=load_component(UNet2DConditionModel, source, "unet", dtype).to(device),
        vae=load_component(AutoencoderKL, source, "vae", dtype).to(device).requires_grad_(False),
        alphas_cumprod=alphas_cumprod(scheduler).float().to(device),
        scheduler=scheduler,
        text=text,
        source=source.label,
    )
