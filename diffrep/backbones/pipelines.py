"""Folders of diffusers, read and written: networks, VAE encoders, schedules, and whole pipelines for training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError, Conditions, Recommended
from diffrep.backbones.diffusion import DiffusionBackbone
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.layers import Configured
from diffrep.backbones.networks import AutoencoderKL, UNet2DConditionModel
from diffrep.backbones.pixel_diffusion import PixelDiffusion
from diffrep.backbones.repositories import LoadOptions, Repository, repository, weight_files
from diffrep.backbones.text import PROMPTS, PipelineText, PromptEncoder, TextEncoders, quiet_libraries
from diffrep.backbones.transformers import FLOW, FORMER, DiffusionTransformer
from diffrep.backbones.weight_files import describe_weights
from diffrep.devices import resolve_device
from diffrep.files import forget_origin, one_line, read_weights, write_document
from diffrep.images import Sizing
from diffrep.settings import check_keys

ENCODER_ONLY = ("decoder.", "post_quant_conv.")  # parts of a VAE that extraction does not use
PIPELINES = {  # class of a network -> of the pipeline that is written for it
    "UNet2DModel": "DDPMPipeline",
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
}


def load_pipeline(source: Repository, options: LoadOptions) -> DiffusionBackbone:
    """Load network, VAE encoder and schedule of a folder or hub id; text encoders come when prompts do.

    Raises:
        BackboneError: a component is missing or of an unknown kind, or its weights are no safetensors or do not fit.
    """
    part = "transformer" if source.has("transformer") else "unet"
    config = source.json(f"{part}/config.json", required=False)
    kind = network_kind(config)
    if kind not in PIPELINES:
        raise BackboneError(f"{source.label}: a {kind} cannot be tapped; known are {', '.join(PIPELINES)}")
    pixels = kind == "UNet2DModel"
    needed = [f"{part}/config.json", *([] if pixels else ["vae/config.json"])]
    needed += [] if kind in FLOW else ["scheduler/scheduler_config.json"]
    if missing := [file for file in needed if file not in source.files]:
        raise BackboneError(f"{source.label}: is no complete diffusers folder: {', '.join(missing)} missing")
    scheduler = source.json("scheduler/scheduler_config.json", required=False)
    if kind == "UNet2DConditionModel":
        _refuse_conditioned(source, config)
    try:
        network = load_component(_class(kind, config, options), source, part, options.dtype, weights=options.weights)
    except BackboneError:  # tensors that the configuration does not have may say what it is instead
        what, instead = describe_weights(source.tensors(part))
        if what and "alone" not in what:
            raise BackboneError(f"{source.label}: is {what}; {instead}") from None
        raise
    names: dict[str, Any] = {"name": options.name, "source": source.label}
    backbone: DiffusionBackbone
    if pixels:
        backbone = PixelDiffusion(network, alphas_cumprod(scheduler), **names)
    else:
        optional = () if options.decoder else ENCODER_ONLY
        vae_class = _class("AutoencoderKL", source.json("vae/config.json"), options)
        vae = load_component(vae_class, source, "vae", options.dtype, optional=optional, weights=options.weights)
        vae = vae if options.decoder else without_decoder(vae)
        names["text"] = _text(source, kind, options)
        if kind == "UNet2DConditionModel":
            predicts = scheduler.get("prediction_type", "epsilon")
            backbone = LatentDiffusion(network, vae, alphas_cumprod(scheduler), predicts=predicts, **names)
        else:
            alphas = None if kind in FLOW else alphas_cumprod(scheduler)
            backbone = DiffusionTransformer(network, vae, alphas, **names)
    backbone.scheduler = scheduler
    if values := source.json("diffrep.json", required=False):  # which our folders have
        backbone.recommended = _recommended(values, source.label)
    return backbone


def network_kind(config: Mapping[str, Any]) -> str:
    """The class of a network by its configuration, under the name that diffusers has for it today."""
    kind = str(config.get("_class_name", "UNet2DConditionModel"))
    return FORMER.get(str(config.get("norm_type")), kind) if kind == "Transformer2DModel" else kind


def _class(name: str, config: Mapping[str, Any], options: LoadOptions) -> Any:
    if not options.lora:
        return network_class(name, config)
    import diffusers  # whose readers of LoRA files want its own networks

    return getattr(diffusers, name)


def network_class(name: str, config: Mapping[str, Any]) -> Any:
    """The class of a network by its name in diffusers: ours, which loads at once, where it builds the same."""
    ours = next((kind for kind in (UNet2DConditionModel, AutoencoderKL) if kind.__name__ == name), None)
    with suppress(TypeError):  # nonsense in a configuration: diffusers says what
        if ours is not None and ours.fits(config):
            return ours
    import diffusers

    return getattr(diffusers, name)


def without_decoder(vae: Any) -> Any:
    """A VAE that only encodes: the memory of its decoder is given back."""
    vae.decoder = vae.post_quant_conv = None
    return vae


def _text(source: Repository, kind: str, options: LoadOptions) -> PromptEncoder | None:
    index = source.json("model_index.json", required=False)
    where: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    parts = {
        part: str(value[1])
        for part, value in index.items()
        if part.startswith("text_encoder") and isinstance(value, list) and len(value) == 2 and value[0]
    }
    if kind != "UNet2DConditionModel":
        return PipelineText(source, str(index.get("_class_name")), **where) if parts else None
    if not parts and (source.folder is None or source.has("text_encoder")):
        parts = {"text_encoder": "CLIPTextModel"}
    return TextEncoders(source, parts, **where) if parts else None


def _recommended(values: Mapping[str, Any], label: str) -> Recommended:
    """What a ``diffrep.json`` says."""
    try:
        conditions: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.get("conditions", {}).items()
        }
        check_keys(Conditions, conditions, "conditions")
        check_keys(Sizing, values["sizing"], "sizing")
        return Recommended(
            taps=tuple(values["taps"]), sizing=Sizing(**values["sizing"]), conditions=Conditions(**conditions)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackboneError(f"{label}: diffrep.json is damaged ({one_line(error)})") from None


def _refuse_conditioned(source: Repository, config: Mapping[str, Any]) -> None:
    latent = int(source.json("vae/config.json").get("latent_channels", 4))
    refuse_channels(source.label, int(config.get("in_channels", 4)), latent)
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise BackboneError(
            f"{source.label}: the U-Net is conditioned on a class or task vector: it is a dense-prediction model"
            " (`diffrep depth --model` or `normals --model`?) or an upscaler, and cannot be tapped this way; give the"
            " model that it was fine-tuned from"
        )


def refuse_channels(name: str, channels: int, latent: int) -> None:
    """Refuse a U-Net that takes more than the noisy latent.

    Raises:
        BackboneError: naming what such U-Nets are for.
    """
    kinds = {
        latent + 1: "conditioned on a depth map or a mask",
        latent + 3: "an upscaler, conditioned on a small image",
        2 * latent: "an editing or dense-prediction model, conditioned on another latent (`diffrep depth --model` or"
        " `normals --model`?)",
        2 * latent + 1: "an inpainting model, conditioned on a mask and the masked image",
    }
    if channels != latent:
        raise BackboneError(
            f"{name}: the U-Net takes {channels} channels but the VAE gives {latent}: it is"
            f" {kinds.get(channels, 'conditioned on more than the image')}, and cannot be tapped this way; give the"
            " model that it was fine-tuned from"
        )


def load_component(
    kind: Any,
    source: str | os.PathLike[str] | Repository,
    part: str,
    dtype: torch.dtype,
    *,
    optional: tuple[str, ...] = (),
    weights: bool = True,
) -> Any:
    """One part of a diffusers folder or hub id, for example its ``vae``; strictly, from safetensors only.

    Args:
        kind: the class, of diffusers or of `network_class`.
        optional: prefixes of tensors that may be missing altogether.
        weights: False builds it from its configuration alone, on the meta device.

    Raises:
        BackboneError: the weights are missing, no safetensors, or do not fit the part's config.
    """
    source = repository(source)
    config = source.json(f"{part}/config.json")
    needed = part in ("unet", "transformer")
    if not weights:
        if needed:
            source.check_variant(part)
        with torch.device("meta"):
            build = kind if issubclass(kind, Configured) else kind.from_config
            return _built(build, source, part, config)
    folder, chosen = source.part(part, need=needed)
    if issubclass(kind, Configured):
        module, info = _built(_mapped, source, part, kind, config, folder / part, chosen)
        return _complete(module.to(dtype), info, source, part, optional)
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
    return _complete(module, info, source, part, optional)


def _complete(
    module: Any, info: Mapping[str, Any], source: Repository, part: str, optional: tuple[str, ...] = ()
) -> Any:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(
            str(key) for key in info.get(what) or () if not (what[0] == "m" and str(key).startswith(optional))
        )
        if keys:
            raise BackboneError(f"{source.label}: {part} has {what.replace('_', ' ')}: {keys[:3]}")
    return module


_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attentions, before 2023


def _mapped(kind: Any, config: Mapping[str, Any], folder: Path, variant: str | None) -> tuple[Any, dict[str, Any]]:
    """A network whose weights are its files', mapped into memory; and the names that do not fit."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder, variant):
        weights |= read_weights(file, error=OSError)[0]
    for key in [key for key in weights if ".attentions." in key]:
        path, name, ending = key.rsplit(".", 2)
        if name in _FORMER:
            weights[f"{path}.{_FORMER[name]}.{ending}"] = weights.pop(key)
    with torch.device("meta"):
        module = kind(config)
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
    return module.eval(), {"missing_keys": missing, "unexpected_keys": unexpected}


def _built(build: Any, source: Repository, part: str, *arguments: Any, **named: Any) -> Any:
    try:
        return build(*arguments, **named)
    except OSError as error:
        raise BackboneError(f"{source.label}: {part} cannot be loaded as safetensors ({one_line(error)})") from None
    except Exception as error:  # sizes that do not match, damaged files, nonsense in the configuration: many kinds
        raise BackboneError(
            f"{source.label}: the weights of {part} do not fit its config or are damaged ({one_line(error)})"
        ) from None


_MOST_TIMESTEPS = 100_000  # of a schedule; models have 1,000


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """(T,) the schedule of a scheduler's configuration, whatever sampler it names."""
    try:
        return torch.cumprod(1 - _betas(config), dim=0)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(f"scheduler_config.json describes no schedule ({one_line(error)})") from None


def _betas(config: Mapping[str, Any]) -> Tensor:
    """(T,) as diffusers' schedulers compute them, in float32 and in the same order."""
    count, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif not isinstance(count, int) or not 1 <= count <= _MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must lie in 1..{_MOST_TIMESTEPS:,}, got {count!r}")
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        levels = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = torch.tensor([min(1 - after / now, 0.999) for now, after in itertools.pairwise(levels)])
    else:
        raise ValueError(f"beta_schedule {kind!r} is none of linear, scaled_linear, squaredcos_cap_v2")
    if not config.get("rescale_betas_zero_snr"):
        return betas
    # "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891), algorithm 1
    roots = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    shifted = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([shifted[:1], shifted[1:] / shifted[:-1]])


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
    pad: bool = True,
) -> PipelineParts:
    """Load U-Net, VAE and schedule of an embedded model, a folder or a hub id; text encoders come when asked.

    Args:
        pad: see `TextEncoders`.

    Raises:
        BackboneError: a component is missing, or its weights are not safetensors or do not fit its config.
    """
    import diffusers  # whose networks can be trained in all of its ways

    source, device = repository(name), resolve_device(device)
    scheduler = source.json("scheduler/scheduler_config.json")
    text = TextEncoders(source, device=device, dtype=dtype, pad=pad)
    return PipelineParts(
        unet=load_component(diffusers.UNet2DConditionModel, source, "unet", dtype).to(device),
        vae=load_component(diffusers.AutoencoderKL, source, "vae", dtype).to(device).requires_grad_(False),
        alphas_cumprod=alphas_cumprod(scheduler).float().to(device),
        scheduler=scheduler,
        text=text if source.has("text_encoder") else None,
        source=source.label,
    )


def save_backbone(backbone: Any, folder: Path) -> None:
    """Write network, VAE encoder, schedule, text encoders and recommended settings.

    What was merged into the weights, a LoRA for example, is written with them. Text encoders are copied from the folder
    or repository that the backbone came from.

    Raises:
        BackboneError: the backbone knows no configuration of its schedule, or heads of attention that diffusers' class
            cannot have; or its text encoders do not lie in a folder.
    """
    network, scheduler = backbone.network, backbone.scheduler
    if scheduler is None:
        raise BackboneError(
            f"{backbone.name}: was built without the configuration of its schedule, and cannot be saved"
        )
    part = "unet" if backbone.has_unet else "transformer"
    index: dict[str, Any] = {
        "_class_name": PIPELINES[type(network).__name__],
        part: ["diffusers", type(network).__name__],
    }
    network.save_pretrained(folder / part)
    if backbone.denoises == "latents":
        backbone.vae.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", type(backbone.vae).__name__]
    if scheduler:
        write_document(folder / "scheduler" / "scheduler_config.json", scheduler)
        index["scheduler"] = ["diffusers", scheduler.get("_class_name", "DDIMScheduler")]
    if (text := getattr(backbone, "text", None)) is not None:
        source = getattr(text, "source", None)
        if not isinstance(source, Repository):
            raise BackboneError(f"{backbone.name}: its text encoders came in one file, and cannot be saved as a folder")
        if text.adapters:
            raise BackboneError(f"{backbone.name}: its LoRA changes the text encoders too, which are copied unchanged")
        names = [name for name in source.files if name.startswith(("text_encoder", "tokenizer")) and "/" in name]
        names += [PROMPTS] if PROMPTS in source.files else []
        root = source.fetch(names)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(root / name, folder / name)
        saved = source.json("model_index.json", required=False)
        parts = {key: value for key, value in saved.items() if key.startswith(("text_encoder", "tokenizer"))}
        index |= parts or {"text_encoder": ["transformers", "CLIPTextModel"]}
        index["_class_name"] = saved.get("_class_name", index["_class_name"])
    forget_origin(folder)
    write_document(folder / "model_index.json", index)
    recommended = json.loads(json.dumps(dataclasses.asdict(backbone.recommended)))
    write_document(folder / "diffrep.json", recommended)
