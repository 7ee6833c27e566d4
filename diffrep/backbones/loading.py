"""`load_backbone`: one name or path in, one backbone out.

Nothing is fetched unless the caller names something that lives on a hub. Only safetensors, and tensors in checkpoints
of torch, are read.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffrep.backbones.adm import adm_backbone
from diffrep.backbones.base import Backbone, BackboneError, Conditions, Recommended, check_weights
from diffrep.backbones.diffusion import LatentBackbone
from diffrep.backbones.hyperfeatures import AggregationNetwork, Hyperfeatures
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.pipelines import (
    load_component,
    load_diffusers,
    load_pixel_unet,
    load_transformer,
    local_variant,
    read_json,
)
from diffrep.backbones.pixel_diffusion import PixelDiffusion
from diffrep.backbones.repositories import (
    EMBEDDED,
    HUB,
    MODELS,
    REPOSITORIES,
    Repository,
    expand,
    is_hub_id,
    repository,
    split_options,
    with_options,
)
from diffrep.backbones.transformers import KINDS
from diffrep.backbones.vit import VisionTransformer, timm_backbone
from diffrep.backbones.vit_loading import (
    TIMM,
    load_open_clip,
    load_timm,
    load_vit_folder,
    only_weights,
    open_clip_backbone,
)
from diffrep.backbones.vit_transformers import load_saved_vit
from diffrep.backbones.weight_files import ENDINGS, read_weights
from diffrep.devices import resolve_device, resolve_dtype
from diffrep.files import one_line

__all__ = [
    "EMBEDDED",
    "HUB",
    "MODELS",
    "TIMM",
    "load_backbone",
    "load_component",
    "load_diffusers",
    "load_transformer",
    "local_variant",
    "open_clip_backbone",
    "read_json",
]

CLEANDIFT = {  # short name -> the model whose U-Net it replaces, the file at CompVis/cleandift
    "cleandift-sd1.5": ("sd1.5", "cleandift_sd15_unet.safetensors"),
    "cleandift-sd2.1": ("sd2.1", "cleandift_sd21_unet.safetensors"),
}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of `load_backbone` that its parts need."""

    name: str
    device: torch.device
    dtype: torch.dtype
    stride: int | None = None
    variant: str | None = None
    revision: str | None = None
    lora: tuple[str, ...] = ()
    adm: Mapping[str, Any] | None = None
    weights: bool = True


def load_backbone(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    stride: int | None = None,
    variant: str | None = None,
    revision: str | None = None,
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    channels_last: bool = False,
    compile: bool = False,
    adm: Mapping[str, Any] | None = None,
    weights: bool = True,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: an embedded model ("tiny", "tiny-dino"); a local folder (diffusers layout, a cache folder of the hub,
            timm's hub layout, or a DINOv2 or guided-diffusion checkpoint with its config.json); a checkpoint in one
            file, ``.safetensors``, ``.ckpt``, ``.pt`` or ``.pth``: Stable Diffusion 1.x, 2.x or XL, or guided-diffusion
            (ADM); a short name ("sd2.1", "dinov2-base", ...); "timm:ARCHITECTURE"; "open_clip:MODEL/PRETRAINED"; or the
            hub id of a diffusers or timm model. Variant, revision and lora may stand behind it, as in the name of a
            backbone that was loaded with them: "sd1.5?variant=fp16&lora=style.safetensors:0.5".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: float32 on CPU and bfloat16 on CUDA where None.
        stride: vision transformers only: pixels between patches, smaller than the patch for a finer map.
        variant: of the weight files, for example "fp16"; None: the plain ones, or the only others.
        revision: of a model on the hub: a branch, a tag or a commit.
        lora: LoRA files to add to a diffusion model's weights, each ``FILE`` or ``FILE:SCALE``.
        channels_last: keep convolution weights channels-last (faster on some devices, same numbers up to rounding).
        compile: compile the residual and transformer blocks with `torch.compile`.
        adm: ADM checkpoints only: flags of guided-diffusion for what the tensors' shapes do not tell, for example
            {"num_head_channels": 64, "noise_schedule": "linear"}.
        weights: False builds diffusion models of folders and the hub from their configurations alone, on torch's meta
            device: they list their taps and compute nothing.

    Raises:
        BackboneError: no such backbone, the hub cannot be reached, a component is missing, or weights are unreadable,
            do not fit or are not finite; or an option does not go with this kind of backbone.
        DeviceError: this machine has no such device.
    """
    device = resolve_device(device)
    files = (lora,) if isinstance(lora, (str, os.PathLike)) else tuple(lora)
    base, named = split_options(expand(name))
    variant, revision = variant or named.get("variant"), revision or named.get("revision")
    files = files or named.get("lora", ())
    options = LoadOptions(
        name=base,
        device=device,
        dtype=resolve_dtype(dtype, device),
        stride=stride,
        variant=variant,
        revision=revision,
        lora=tuple(expand(file) for file in files),
        adm=adm,
        weights=weights,
    )
    try:
        backbone = _open(options)
    except BackboneError:
        raise
    except Exception as error:  # a configuration that its library cannot build fails in many ways
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise BackboneError(f"{options.name}: cannot be loaded ({kind}{one_line(error)})") from None
    _refuse_unused(options, backbone)
    backbone.name = with_options(backbone.name, lora=options.lora, variant=variant, revision=revision)
    if backbone.device.type == "meta":
        return backbone
    for file in options.lora:
        from diffrep.backbones.lora import add_lora

        add_lora(backbone, file)
    for part in backbone.parts.values():
        check_weights(part, options.name)
    backbone.to(device, options.dtype)
    if channels_last:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    if compile:
        _compile_blocks(backbone)
    return backbone


def _refuse_unused(options: LoadOptions, backbone: Backbone) -> None:
    """Refuse options that this kind of backbone does not have, so that none is ignored."""
    kind, diffusion = type(backbone).__name__, isinstance(backbone, LatentBackbone)
    for option, value, fits in (
        ("stride", options.stride, isinstance(backbone, VisionTransformer)),
        ("lora", options.lora or None, diffusion),
        ("adm", options.adm, isinstance(backbone, PixelDiffusion)),
        ("variant", options.variant, backbone.denoises is not None and not Path(options.name).is_file()),
    ):
        if value is not None and not fits:
            raise BackboneError(f"{options.name}: {option} does not go with it, a {kind}")


def _open(options: LoadOptions) -> Backbone:
    name, path = options.name, Path(options.name)
    if name not in EMBEDDED and path.is_file():
        return _load_file(path, options)
    if path.is_dir() or name in EMBEDDED:
        if name in EMBEDDED and not (MODELS / name).is_dir():
            raise BackboneError(f"{name}: the embedded weights are missing at {MODELS / name}; reinstall diffrep")
        return _load_folder(Repository(name, revision=options.revision, variant=options.variant), options)
    if name in CLEANDIFT:
        base, file = CLEANDIFT[name]
        weights = Repository("CompVis/cleandift", revision=options.revision).fetch([file]) / file
        return load_cleandift(base, weights, device=options.device, dtype=options.dtype, name=name)
    kind, _, rest = name.partition(":")
    if kind == "hyperfeatures":
        if not Path(rest).is_file():
            raise BackboneError(
                f"{name}: needs the trained aggregation network: hyperfeatures:FILE, with weights for sd1.5"
                + (f"; there is no file {rest}" if rest else "")
            )
        aggregation = AggregationNetwork.load(Path(rest))
        base_model = load_diffusers(HUB["sd1.5"], device=options.device, dtype=options.dtype, variant=options.variant)
        return Hyperfeatures(base_model, aggregation, name=name)
    if path.suffix in ENDINGS:
        raise BackboneError(f"{path}: there is no such file")
    if name in TIMM or kind == "timm":
        return load_timm(TIMM.get(name) or rest, name=name, stride=options.stride, weights=options.weights)
    if kind == "open_clip":
        model, _, pretrained = rest.partition("/")
        return load_open_clip(model, pretrained or None, name=name, stride=options.stride)
    if name in REPOSITORIES or is_hub_id(name):
        return _load_folder(repository(name, revision=options.revision, variant=options.variant), options)
    known = [*EMBEDDED, *REPOSITORIES, *CLEANDIFT, *TIMM]
    near = difflib.get_close_matches(name, known, n=3) or known
    raise BackboneError(
        f"{name}: no such folder and no known backbone; near names: {', '.join(near)}; or give a folder, a checkpoint"
        " in one file, a hub id, timm:NAME or open_clip:MODEL/PRETRAINED"
    )


def _load_file(path: Path, options: LoadOptions) -> Backbone:
    from diffrep.backbones.single_files import load_single_file

    if path.suffix not in ENDINGS:
        raise BackboneError(f"{path}: is a file, but no checkpoint ({', '.join(ENDINGS)}); give a folder")
    if options.revision is not None:
        raise BackboneError(f"{path}: is a file, which has no revision {options.revision}")
    return load_single_file(path, options)


def _load_folder(source: Repository, options: LoadOptions) -> Backbone:
    """A diffusers folder if it looks like one, else whatever its config says."""
    folder, name = source.folder, options.name
    if "model_index.json" in source.files or source.has("unet") or source.has("transformer"):
        return _load_pipeline(source, options)
    if "open_clip_config.json" in source.files:
        texts = (source.json("open_clip_config.json").get("model_cfg") or {}).get("text_cfg") or {}
        if folder and (text := texts.get("hf_model_name")) and not Path(str(text)).exists():
            raise BackboneError(
                f"{folder}: its open_clip_config.json names the text encoder {text}, which would have to be fetched:"
                " nothing is fetched because a file says so; give the model's hub id"
            )
        where = f"local-dir:{folder}" if folder else f"hf-hub:{source.label}"
        return load_open_clip(where, None, name=name, stride=options.stride)
    if "config.json" not in source.files:
        listed = ", ".join(sorted(file for file in source.files if "/" not in file)[:5])
        raise BackboneError(
            f"{source.label}: is no backbone folder: expected model_index.json (diffusers) or config.json (a ViT),"
            f" found {listed or 'nothing'}"
        )
    config = source.json("config.json")
    kind = str(config.get("_class_name", ""))
    if folder is not None and kind in ("UNet2DConditionModel", "UNet2DModel", *KINDS):
        parent = folder.resolve().parent
        if (parent / "model_index.json").is_file():
            return _load_pipeline(Repository(parent, variant=options.variant), replace(options, name=str(parent)))
        raise BackboneError(
            f"{folder}: is a {kind} alone, without VAE and schedule; give the diffusers folder that it belongs to"
        )
    if kind:
        raise BackboneError(f"{source.label}: is a {kind} alone, no backbone; give the whole diffusers folder")
    if config.get("time_embedding_type") == "adm":
        raise BackboneError(
            f"{source.label}: is an ADM in the layout of a modified diffusers; give openai's original checkpoint"
        )
    if folder is not None and "num_res_blocks" in config:
        file = only_weights(folder, (".safetensors", ".pt"))
        return adm_backbone(read_weights(file), {**config, **(options.adm or {})}, name=name, source=str(file))
    if folder is not None:
        return load_vit_folder(folder, config, name=name, stride=options.stride)
    if "model_type" in config:
        preprocessor = source.json("preprocessor_config.json", required=False)
        return load_saved_vit(source.label, config, preprocessor, name=name, stride=options.stride)
    if "architecture" not in config:
        raise BackboneError(f"{name}: is neither a diffusers folder nor a timm or open_clip model")
    hub = f"hf-hub:{source.label}" + (f"@{options.revision}" if options.revision else "")
    return timm_backbone(hub, pretrained=True, stride=options.stride, name=name, source=source.label)


def _load_pipeline(source: Repository, options: LoadOptions) -> Backbone:
    """A diffusers folder or hub id with a U-Net or a transformer."""
    if source.has("transformer"):
        return load_transformer(
            source, device=options.device, dtype=options.dtype, name=options.name, weights=options.weights
        )
    if source.json("unet/config.json", required=False).get("_class_name") == "UNet2DModel":
        return load_pixel_unet(source, dtype=options.dtype, name=options.name, weights=options.weights)
    return load_diffusers(
        source, device=options.device, dtype=options.dtype, name=options.name, weights=options.weights
    )


def load_cleandift(
    base: str | os.PathLike[str],
    weights: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    name: str = "cleandift",
) -> LatentDiffusion:
    """Stable Diffusion with CleanDIFT's U-Net, which wants the image without noise and t = 261.

    Args:
        base: folder or hub id of the model that was fine-tuned.
        weights: state dict of the U-Net, diffusers' names, safetensors.

    Raises:
        BackboneError: the weights do not fit the base's U-Net.
    """
    device = resolve_device(device)
    backbone = load_diffusers(os.fspath(base), device=device, dtype=resolve_dtype(dtype, device), name=name)
    try:
        backbone.network.load_state_dict(read_weights(Path(weights)))
    except RuntimeError as error:
        raise BackboneError(f"{weights}: does not fit the U-Net of {base} ({one_line(error)})") from None
    check_weights(backbone.network, str(weights))
    backbone.to(device)
    backbone.source = f"{backbone.source} with {weights.name}"
    backbone.recommended = Recommended(
        taps=backbone.recommended.taps,
        sizing=backbone.recommended.sizing,
        conditions=Conditions(timestep=261, clean=True, posterior="mean"),
    )
    return backbone


def _compile_blocks(backbone: Backbone) -> None:
    """Compile what is called often and holds no tap inside: residual blocks, transformer blocks, the encoder.

    The tap hooks sit on the modules, outside of what is compiled.
    """
    kinds = {"ResnetBlock2D", "BasicTransformerBlock", "Block", "EvaBlock", "ResidualAttentionBlock"}
    modules = [m for m in backbone.network.modules() if type(m).__name__ in kinds]
    if isinstance(backbone, LatentBackbone):
        modules.append(backbone.vae.encoder)
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)
