"""`load_backbone`: one name or path in, one backbone out.

Nothing is fetched unless the caller names something that lives on a hub. Only safetensors, and tensors in checkpoints
of torch, are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffrep.backbones.base import Backbone, BackboneError, Conditions, check_weights
from diffrep.backbones.diffusion import LatentBackbone
from diffrep.backbones.hyperfeatures import AggregationNetwork, Hyperfeatures
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.pipelines import PIPELINES, load_pipeline, network_kind
from diffrep.backbones.pixel_diffusion import PixelDiffusion, adm_backbone
from diffrep.backbones.repositories import (
    CLEANDIFT,
    EMBEDDED,
    MODELS,
    REPOSITORIES,
    TIMM,
    LoadOptions,
    Repository,
    expand,
    is_hub_id,
    looks_like_path,
    repository,
    split_options,
    whole_of,
    with_options,
)
from diffrep.backbones.single_files import add_lora, load_single_file, parse_lora
from diffrep.backbones.sit import load_sit
from diffrep.backbones.vit import VisionTransformer
from diffrep.backbones.vit_loading import (
    load_dinov2_model,
    load_open_clip,
    load_open_clip_model,
    load_saved_vit,
    load_timm,
    load_timm_model,
)
from diffrep.backbones.weight_files import ENDINGS, read_weights
from diffrep.devices import resolve_device, resolve_dtype
from diffrep.files import one_line, read_document
from diffrep.settings import near_names


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
    decoder: bool = False,
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
        decoder: latent diffusion models only: keep the decoder of the VAE, for painting.

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
        dtype=resolve_dtype(dtype, device, option="dtype"),
        stride=stride,
        variant=variant,
        revision=revision,
        lora=tuple(expand(file) for file in files),
        adm=adm,
        weights=weights,
        decoder=decoder,
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
    if missing := [file for file in options.lora if not parse_lora(file)[0].is_file()]:
        raise BackboneError(f"{missing[0]}: there is no such file")
    if backbone.device.type == "meta":
        return backbone
    for file in options.lora:
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
    kind, _, rest = name.partition(":")
    if name in EMBEDDED or path.is_dir():
        if name in EMBEDDED and not (MODELS / name).is_dir():
            raise BackboneError(f"{name}: the embedded weights are missing at {MODELS / name}; reinstall diffrep")
        return _open_repository(Repository(name, revision=options.revision, variant=options.variant), options)
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise BackboneError(f"{path}: is a file, but no checkpoint ({', '.join(ENDINGS)}); give a folder")
        if options.revision is not None:
            raise BackboneError(f"{path}: is a file, which has no revision {options.revision}")
        if _is_described(path):
            return _open_repository(Repository(path.parent), options)
        return load_single_file(path, options)
    if name in CLEANDIFT:
        base, file = CLEANDIFT[name]
        weights = Repository("CompVis/cleandift", revision=options.revision).fetch([file]) / file
        return load_cleandift(
            base, weights, device=options.device, dtype=options.dtype, variant=options.variant, name=name
        )
    if options.revision is not None and (name in TIMM or kind in ("timm", "open_clip", "hyperfeatures")):
        raise BackboneError(f"{name}: goes by a name, to which a revision does not belong; give the model's hub id")
    if kind == "hyperfeatures":
        return _open_hyperfeatures(rest, options)
    if path.suffix in ENDINGS:
        raise BackboneError(f"{path}: there is no such file")
    if name in TIMM or kind == "timm":
        return load_timm(TIMM.get(name) or rest, options)
    if kind == "open_clip":
        model, _, pretrained = rest.partition("/")
        return load_open_clip(model, pretrained or None, options)
    if name in REPOSITORIES or is_hub_id(name):
        return _open_repository(repository(name, revision=options.revision, variant=options.variant), options)
    if (MODELS / name).is_dir():
        head = (MODELS / name / "head.json").is_file()
        takes = "head, which load_head takes, and export with --head" if head else "model of `diffrep synthesize`"
        raise BackboneError(f"{name}: is no backbone but an embedded {takes}")
    if looks_like_path(name):
        raise BackboneError(f"{name}: there is no such folder or file")
    near = near_names(name, [*EMBEDDED, *REPOSITORIES, *CLEANDIFT, *TIMM])
    raise BackboneError(
        f"{name}: no such folder and no known backbone; "
        + (f"{near}; or" if near else "`diffrep info` lists the names;")
        + " give a folder, a checkpoint in one file, a hub id, timm:NAME or open_clip:MODEL/PRETRAINED"
    )


def _is_described(path: Path) -> bool:
    """Whether a file is the only checkpoint beside a configuration that says what it is: both are one model."""
    beside = [file for file in path.parent.iterdir() if file.suffix in ENDINGS]
    config = path.with_name("config.json")
    if beside != [path] or not config.is_file():
        return False
    keys = {".pt": {"num_res_blocks"}, ".safetensors": _CONFIGS.keys() - {"_class_name"}}.get(path.suffix, set())
    return not keys.isdisjoint(read_document(config, error=BackboneError))


def _open_hyperfeatures(file: str, options: LoadOptions) -> Hyperfeatures:
    if not Path(file).is_file():
        raise BackboneError(
            f"{options.name}: needs the trained aggregation network: hyperfeatures:FILE, with weights for sd1.5"
            + (f"; there is no file {file}" if file else "")
        )
    aggregation = AggregationNetwork.load(Path(file))
    base = load_pipeline(repository("sd1.5", variant=options.variant), replace(options, name="sd1.5"))
    assert isinstance(base, LatentDiffusion)
    return Hyperfeatures(base, aggregation, name=options.name)


def _open_adm(source: Repository, options: LoadOptions) -> PixelDiffusion:
    """guided-diffusion's checkpoint beside its flags."""
    file, flags = source.only_weights(".safetensors", ".pt"), source.json("config.json")
    return adm_backbone(read_weights(file), {**flags, **(options.adm or {})}, name=options.name, source=str(file))


def _open_component(source: Repository, options: LoadOptions) -> Backbone:
    """A component of a diffusers folder: a network stands for the whole folder around it."""
    config = source.json("config.json")
    kind = network_kind(config)
    if source.folder is None or kind not in PIPELINES:
        raise BackboneError(f"{source.label}: is the part {kind} alone, no backbone; give the whole diffusers folder")
    if (parent := whole_of(source.folder)) is not None:
        return load_pipeline(Repository(parent, variant=options.variant), replace(options, name=str(parent)))
    raise BackboneError(
        f"{source.label}: is a {kind} alone, without VAE and schedule; give the diffusers folder that it belongs to"
    )


# What a config.json that has this key belongs to; the first key counts
_CONFIGS: Mapping[str, Callable[[Repository, LoadOptions], Backbone]] = {
    "path_type": load_sit,
    "_class_name": _open_component,
    "num_res_blocks": _open_adm,
    "architecture": load_timm_model,
    "model_type": load_saved_vit,
    "embed_dim": load_dinov2_model,
}


# what diffrep writes beside backbones, and what takes it
_OTHERS = {
    "manifest.json": "a store of features, which open_store, `diffrep index` and `embed` take",
    "index.json": "an index, which open_index and `diffrep query` take",
    "probe.json": "a probe, which load_probe and `diffrep probe predict` take",
}


def _open_repository(source: Repository, options: LoadOptions) -> Backbone:
    """A folder or hub id: diffusers' layout if it looks like one, else whatever its config says."""
    if "model_index.json" in source.files or source.has("unet") or source.has("transformer"):
        return load_pipeline(source, options)
    if "open_clip_config.json" in source.files:
        return load_open_clip_model(source, options)
    for file, what in _OTHERS.items():
        if file in source.files:
            raise BackboneError(f"{source.label}: is no backbone but {what}")
    networks = ("unet", "transformer")
    if source.folder and (whole := whole_of(source.folder)) and source.folder.resolve().name not in networks:
        raise BackboneError(f"{source.label}: is a part of a diffusers folder; give the whole, {whole}")
    if "config.json" not in source.files:
        listed = ", ".join(sorted(file for file in source.files if "/" not in file)[:5])
        raise BackboneError(
            f"{source.label}: is no backbone folder: expected model_index.json (diffusers) or config.json (a ViT),"
            f" found {listed or 'nothing'}"
        )
    config = source.json("config.json")
    if config.get("time_embedding_type") == "adm":
        raise BackboneError(
            f"{source.label}: is an ADM in the layout of a modified diffusers; give openai's original checkpoint"
        )
    for key, load in _CONFIGS.items():
        if key in config:
            return load(source, options)
    if "auto_map" in config:
        raise BackboneError(
            f"{source.label}: runs with Python code of its own repository (auto_map), which diffrep does not run; give"
            " the model in transformers' own form (of a model_type that it knows: radio, dinov2, clip, siglip), or as"
            " timm:NAME"
        )
    raise BackboneError(f"{source.label}: its config.json is of no known backbone; known are {', '.join(_CONFIGS)}")


def load_cleandift(
    base: str | os.PathLike[str],
    weights: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    name: str = "cleandift",
) -> LatentDiffusion:
    """Stable Diffusion with CleanDIFT's U-Net, which wants the image without noise and t = 261.

    Args:
        base: folder or hub id of the model that was fine-tuned.
        weights: state dict of the U-Net, diffusers' names, safetensors.
        variant: of the base's weight files.

    Raises:
        BackboneError: the weights do not fit the base's U-Net.
    """
    place = resolve_device(device)
    options = LoadOptions(name=name, device=place, dtype=resolve_dtype(dtype, place, option="dtype"))
    backbone = load_pipeline(repository(base, variant=variant), options)
    if not isinstance(backbone, LatentDiffusion):
        raise BackboneError(f"{base}: is a {type(backbone).__name__}, no Stable Diffusion")
    try:
        backbone.network.load_state_dict(read_weights(Path(weights)))
    except RuntimeError as error:
        raise BackboneError(f"{weights}: does not fit the U-Net of {base} ({one_line(error)})") from None
    check_weights(backbone.network, str(weights))
    backbone.to(place)
    backbone.source = f"{backbone.source} with {weights.name}"
    conditions = Conditions(timestep=261, clean=True, posterior="mean")
    backbone.recommended = replace(backbone.recommended, conditions=conditions)
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
