"""Vision transformers of timm, transformers and open_clip, from names, folders, the hub and bare files of weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones import hybrid_vit
from diffrep.backbones.base import BackboneError
from diffrep.backbones.repositories import LoadOptions, Repository, repository
from diffrep.backbones.text import quiet_libraries
from diffrep.backbones.vit import PositionRule, SavedVit, VisionTransformer
from diffrep.backbones.weight_files import read_weights
from diffrep.files import one_line
from diffrep.settings import near_names

DINOV2_KEYS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")  # of the configuration of a checkpoint

Norm = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation
IMAGENET: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: Norm = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SAVED_KINDS = {  # model type of transformers -> the normalisation that it was trained with
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), IMAGENET),
    **dict.fromkeys(("clip", "clip_vision_model"), _CLIP),
    **dict.fromkeys(("vit", "siglip", "siglip_vision_model"), _HALF),
    "radio": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # it normalises inside
}
_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16, 4096: 32}  # channels -> heads, where they are not 64 channels each


# -- timm ---------------------------------------------------------------------------------------------------


def timm_backbone(
    architecture: str,
    *,
    model_args: Mapping[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    stride: int | None = None,
    positions: PositionRule | None = None,
    name: str,
    source: str,
) -> VisionTransformer:
    """Build a ViT by its timm architecture name.

    Args:
        weights: a state dict in timm's or DINOv2's key names; strictly loaded.
        config: timm's ``pretrained_cfg``: mean, std, input size.
        pretrained: fetch the weights that timm names, where `weights` is None.

    Raises:
        BackboneError: the model is no ViT, or the weights do not fit it.
    """
    import timm
    from timm.models import eva, vision_transformer

    arguments = {"dynamic_img_size": True, "num_classes": 0, **(model_args or {})}
    try:
        network: Any = timm.create_model(architecture, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise BackboneError(f"{name}: timm cannot build {architecture} as a ViT of any image size ({error})") from None
    if not hasattr(network, "blocks") or not hasattr(network, "num_prefix_tokens"):
        raise BackboneError(f"{name}: {architecture} is a {type(network).__name__}; only ViTs can be tapped here")
    if weights is not None:
        if "storage_tokens" in weights:  # DINOv3's own key names
            weights = eva.checkpoint_filter_fn(dict(weights), network)
        elif "mask_token" in weights or "register_tokens" in weights:  # DINOv2's
            weights = vision_transformer._convert_dinov2(dict(weights), network)
        _fill(network, weights, architecture, source)
    config = {} if network.pretrained_cfg is None else {**network.pretrained_cfg, **(config or {})}
    if positions is None:
        plain_dino = "dino" in (architecture + str(config.get("tag", ""))) and network.reg_token is None
        positions = PositionRule(antialias=False, offset=0.1) if plain_dino else PositionRule()
    backbone = _timm_transformer(network, config, positions, stride=stride, name=name, source=source)
    if not architecture.startswith("hf-hub:"):  # whose arguments timm keeps to itself
        backbone.record = _record(architecture, model_args or {}, config, positions)
    return backbone


def _record(
    architecture: str, model_args: Mapping[str, Any], config: Mapping[str, Any], positions: PositionRule
) -> dict[str, Any] | None:
    """``config.json`` of timm's layout with the rule of the positions; None where an argument is no JSON."""
    about = {key: config[key] for key in ("mean", "std", "input_size") if key in config}
    record = {"architecture": architecture, "model_args": dict(model_args), "pretrained_cfg": about}
    try:
        json.dumps(record)
    except TypeError:  # a class of layers
        return None
    return record | {"diffrep_positions": asdict(positions)}


def _fill(network: nn.Module, weights: Mapping[str, Tensor], architecture: str, source: str) -> None:
    weights = {k: v for k, v in weights.items() if not k.startswith(("head.", "fc_norm."))}
    # what has no memory yet takes over the file's, mapped
    mapped = next(network.parameters()).is_meta and not any(value.is_meta for value in weights.values())
    missing, unexpected = network.load_state_dict(weights, strict=False, assign=mapped)
    if missing or unexpected:
        raise BackboneError(
            f"{source}: the weights do not fit {architecture}:"
            f" missing {missing[:3]} ({len(missing)}), left over {unexpected[:3]} ({len(unexpected)})"
        )


def _timm_transformer(
    network: Any, config: Mapping[str, Any], positions: PositionRule, **named: Any
) -> VisionTransformer:
    return VisionTransformer(
        network,
        mean=config.get("mean", IMAGENET[0]),
        std=config.get("std", IMAGENET[1]),
        positions=positions,
        size=int((config.get("input_size") or (3, 224, 224))[-1]),
        **named,
    )


def load_timm(architecture: str, options: LoadOptions) -> VisionTransformer:
    """A model that timm knows, with the weights that it names.

    Raises:
        BackboneError: timm has no such model, or the hub cannot be reached.
    """
    import timm

    if architecture.split(".")[0] not in timm.list_models():
        near = near_names(architecture, timm.list_models(pretrained=True))
        raise BackboneError(f"{options.name}: timm has no model {architecture}" + (f"; {near}" if near else ""))
    shared: dict[str, Any] = {"stride": options.stride, "name": options.name, "source": f"timm/{architecture}"}
    if not options.weights:
        with torch.device("meta"):
            return timm_backbone(architecture, **shared)
    known = timm.get_pretrained_cfg(architecture)
    if known is not None and known.hf_hub_id:  # without a connection timm asks for half a minute: ask once before
        repository(known.hf_hub_id + (architecture if known.hf_hub_id.endswith("/") else "")).check()
    try:
        return timm_backbone(architecture, pretrained=True, **shared)
    except RuntimeError as error:
        raise BackboneError(f"{options.name}: {one_line(error)}") from None


def load_timm_model(source: Repository, options: LoadOptions) -> VisionTransformer:
    """A folder or hub id in timm's layout: ``architecture``, ``model_args``, ``pretrained_cfg``."""
    shared: dict[str, Any] = {"stride": options.stride, "name": options.name, "source": source.label}
    if source.folder is None:
        revision = f"@{options.revision}" if options.revision else ""
        return timm_backbone(f"hf-hub:{source.label}{revision}", pretrained=True, **shared)
    config = source.json("config.json")
    architecture, arguments = config["architecture"], config.get("model_args") or {}
    about, weights = config.get("pretrained_cfg") or {}, read_weights(source.only_weights(".safetensors"))
    positions = PositionRule(**config["diffrep_positions"]) if "diffrep_positions" in config else None
    if hybrid_vit.fits(architecture, arguments):
        sizes = {key: value for key, value in arguments.items() if key not in ("num_classes", "dynamic_img_size")}
        with torch.device("meta"):
            network = hybrid_vit.HybridVit(**sizes)
        _fill(network, weights, architecture, source.label)
        backbone = _timm_transformer(network, about, positions or PositionRule(), **shared)
        backbone.record = config
        return backbone
    return timm_backbone(
        architecture, model_args=arguments, weights=weights, config=about, positions=positions, **shared
    )


# -- checkpoints of DINO's programs, bare files of timm -----------------------------------------------------


def dinov2_backbone(
    weights: dict[str, Tensor], config: Mapping[str, Any], *, stride: int | None = None, name: str, source: str
) -> VisionTransformer:
    """A DINOv2 checkpoint with the published key names and its configuration.

    Args:
        config: img_size, patch_size, embed_dim, depth, num_heads, num_register_tokens, interpolate_antialias,
            interpolate_offset.
    """
    from timm.layers import SwiGLUPacked

    registers = int(config.get("num_register_tokens", 0))
    model_args: dict[str, Any] = {key: config[key] for key in DINOV2_KEYS}
    model_args |= {"reg_tokens": registers, "no_embed_class": bool(registers), "init_values": 1.0}
    hidden = next((v.shape[0] for k, v in weights.items() if k.endswith(("mlp.fc1.weight", "mlp.w12.weight"))), None)
    if hidden is not None:
        model_args["mlp_ratio"] = hidden / config["embed_dim"]
    if any(".mlp.w12." in key for key in weights):
        model_args |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return timm_backbone(
        "vit_base_patch14_dinov2",
        model_args=model_args,
        weights=weights,
        config={"input_size": (3, config["img_size"], config["img_size"])},
        stride=stride,
        positions=PositionRule(
            antialias=bool(config.get("interpolate_antialias", False)),
            offset=float(config.get("interpolate_offset", 0.1)),
        ),
        name=name,
        source=source,
    )


def load_dinov2_model(source: Repository, options: LoadOptions) -> VisionTransformer:
    """A DINOv2 checkpoint beside its configuration.

    Raises:
        BackboneError: the configuration lacks a size.
    """
    config = source.json("config.json")
    if missing := sorted(set(DINOV2_KEYS) - set(config)):
        raise BackboneError(f"{source.label}: its config.json is that of a DINOv2 without {', '.join(missing)}")
    weights = read_weights(source.only_weights(".safetensors"))
    return dinov2_backbone(weights, config, stride=options.stride, name=options.name, source=source.label)


def vit_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT under its own names, where a file has prefixes, heads or a decoder (MAE)."""
    marker = "patch_embed.proj.weight"
    prefix = next((key.removesuffix(marker) for key in weights if key.endswith(f".{marker}")), "")
    if prefix and marker not in weights:  # "module.", "backbone.", "module.backbone." of training programs
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if "decoder_embed.weight" in weights:
        weights = {k: v for k, v in weights.items() if not k.startswith("decoder") and k != "mask_token"}
    return weights


def is_vit(names: Container[str]) -> bool:
    """Whether tensors of such names are a ViT of timm or of the published DINO programs."""
    return "patch_embed.proj.weight" in names and "blocks.0.norm1.weight" in names


def vit_from_weights(path: Path, weights: dict[str, Tensor], options: LoadOptions) -> VisionTransformer:
    """A ViT from its weights alone: a ``.pth`` of DINOv2 or DINOv3 as their programs publish it, or a file of timm.

    A file named after a timm model (``vit_base_patch14_dinov2.lvd142m.safetensors``) is that model. Of others the
    shapes tell the sizes, with heads of 64 channels as in all published small, base and large models.

    Raises:
        BackboneError: the shapes do not tell the model, or the weights do not fit it.
    """
    import timm

    shared: dict[str, Any] = {"stride": options.stride, "name": options.name, "source": str(path)}
    if path.stem.split(".")[0] in timm.list_models():
        return timm_backbone(path.stem, weights=weights, **shared)
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    heads = _HEADS.get(width, width // 64 if width % 64 == 0 else 0)
    if not heads:
        raise BackboneError(
            f"{path}: the number of attention heads of a ViT with {width} channels is not known; name the file after"
            " its timm model, or put timm's config.json beside it and give the folder"
        )
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    sizes: dict[str, Any] = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    if "storage_tokens" in weights:
        sizes |= _dinov3_arguments(weights)
        return timm_backbone("vit_base_patch16_dinov3", model_args=sizes, weights=weights, **shared)
    if "pos_embed" not in weights:
        raise BackboneError(f"{path}: is a ViT without position table; name the file after its timm model")
    sizes["img_size"] = math.isqrt(weights["pos_embed"].shape[1] - ("cls_token" in weights)) * patch
    if "mask_token" in weights:
        registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
        sizes |= {"num_register_tokens": registers, "interpolate_antialias": bool(registers)}
        return dinov2_backbone(weights, sizes | {"interpolate_offset": 0.0 if registers else 0.1}, **shared)
    sizes |= {
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
    }
    if "dino" in path.name:
        shared |= {
            "positions": PositionRule(antialias=False, offset=0.1),
            "config": {"mean": IMAGENET[0], "std": IMAGENET[1]},
        }
    elif any(name in path.name.lower() for name in ("deit", "mae", "moco", "ibot")):
        shared["config"] = {"mean": IMAGENET[0], "std": IMAGENET[1]}
    return timm_backbone("vit_base_patch16_224", model_args=sizes, weights=weights, **shared)


def _dinov3_arguments(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What of a DINOv3 differs between its sizes; takes biases that are zero out of the weights, as timm has them."""
    gated = "blocks.0.mlp.w1.weight" in weights
    hidden, width = weights["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"].shape
    biases = [key for key in weights if key.endswith("attn.qkv.bias")]
    used = any(bool(part.any()) for key in biases for part in weights[key].chunk(3)[::2])  # that of the keys is masked
    for key in () if used else biases:
        del weights[key]
    registers = weights["storage_tokens"].shape[1]
    return {"mlp_ratio": hidden / width, "swiglu_mlp": gated, "qkv_bias": used, "num_reg_tokens": registers}


# -- transformers -------------------------------------------------------------------------------------------


def load_saved_vit(source: Repository, options: LoadOptions) -> SavedVit:
    """A folder or hub id with a ViT that transformers saved.

    Raises:
        BackboneError: it is another kind of model, weights are missing, no safetensors or do not fit, or this version
            of transformers does not know it.
    """
    import transformers

    name, config = options.name, source.json("config.json")
    preprocessor = source.json("preprocessor_config.json", required=False)
    kind = str(config.get("model_type"))
    if kind not in SAVED_KINDS:
        raise BackboneError(
            f"{name}: is a {kind} of transformers; of those that can be tapped there are {', '.join(SAVED_KINDS)}"
        )
    source.refuse_pickles("")
    revision = {} if source.folder is not None or options.revision is None else {"revision": options.revision}
    try:
        with quiet_libraries():
            model, info = transformers.AutoModel.from_pretrained(
                source.label, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **revision
            )
    except (KeyError, ValueError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        version = transformers.__version__
        raise BackboneError(f"{name}: transformers {version} cannot load this {kind} ({one_line(error)})") from None
    except OSError as error:
        raise BackboneError(f"{name}: cannot be loaded as safetensors ({one_line(error)})") from None
    network = getattr(model, "vision_model", model)
    missing = [k for k in info["missing_keys"] if not any(word in k for word in ("pooler", "head.", "text", "logit"))]
    if missing or info.get("mismatched_keys"):
        raise BackboneError(
            f"{name}: the weights do not fit the config: {sorted(missing or info['mismatched_keys'])[:3]}"
        )
    mean, std = SAVED_KINDS[kind]
    if kind != "radio":
        mean, std = preprocessor.get("image_mean") or mean, preprocessor.get("image_std") or std
    size = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    size = int(size or getattr(network.config, "image_size", None) or 224)
    backbone = SavedVit(network, mean=mean, std=std, size=size, name=name, source=source.label)
    if options.stride not in (None, backbone.patch):
        raise BackboneError(
            f"{name}: a {kind} of transformers has patches in steps of {backbone.patch}, not {options.stride}"
        )
    return backbone


# -- open_clip ----------------------------------------------------------------------------------------------


def load_open_clip(model: str, pretrained: str | None, options: LoadOptions) -> VisionTransformer:
    """The image tower of a model that open_clip knows, or of a folder or hub id (``local-dir:``, ``hf-hub:``).

    Raises:
        BackboneError: open_clip has no such model, no weights were named, or the tower is no ViT.
    """
    import open_clip

    if not model.startswith(("local-dir:", "hf-hub:")):
        if model not in open_clip.list_models():
            near = near_names(model, open_clip.list_models())
            raise BackboneError(f"{options.name}: open_clip has no model {model}" + (f"; {near}" if near else ""))
        if pretrained is None:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)[:6])
            raise BackboneError(f"{options.name}: say which weights, open_clip:{model}/TAG; it has {tags}")
    silenced = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what it says there is said below
    try:
        with quiet_libraries():
            loaded = open_clip.create_model(model, pretrained=pretrained)
    except RuntimeError as error:
        if "download" not in str(error):
            raise
        raise BackboneError(
            f"{options.name}: its weights are not in the local cache and cannot be fetched (no connection, or"
            " HF_HUB_OFFLINE is set); where there is one, fetch the model and give its folder here instead"
        ) from None
    finally:
        logging.disable(silenced)
    return open_clip_backbone(loaded, name=options.name, source=f"open_clip/{model}", stride=options.stride)


def load_open_clip_model(source: Repository, options: LoadOptions) -> VisionTransformer:
    """A folder or hub id in open_clip's layout.

    Raises:
        BackboneError: a folder names a text encoder that would have to be fetched.
    """
    if source.folder is None and options.revision is not None:
        raise BackboneError(f"{source.label}: open_clip reads no revision of a model; fetch it and give its folder")
    texts = (source.json("open_clip_config.json").get("model_cfg") or {}).get("text_cfg") or {}
    if source.folder and (text := texts.get("hf_model_name")) and not Path(str(text)).exists():
        raise BackboneError(
            f"{source.label}: its open_clip_config.json names the text encoder {text}, which would have to be fetched:"
            " nothing is fetched because a file says so; give the model's hub id"
        )
    where = f"local-dir:{source.folder}" if source.folder else f"hf-hub:{source.label}"
    return load_open_clip(where, None, options)


def open_clip_backbone(model: Any, *, name: str, source: str, stride: int | None = None) -> VisionTransformer:
    """The image tower of an open_clip model.

    Raises:
        BackboneError: the tower is no ViT.
    """
    tower = model.visual
    network = getattr(tower, "trunk", tower)
    if not (hasattr(network, "transformer") or hasattr(network, "patch_embed")):
        raise BackboneError(f"{name}: its image tower is a {type(network).__name__}; only ViTs can be tapped here")
    if hasattr(network, "patch_embed"):  # a timm tower: let it take any size
        network.dynamic_img_size = True
        network.patch_embed.strict_img_size = False
        network.patch_embed.flatten = False
        network.patch_embed.output_fmt = type(network.patch_embed.output_fmt)("NHWC")
    size = getattr(tower, "image_size", 224)
    return VisionTransformer(
        network,
        mean=tower.image_mean or _CLIP[0],
        std=tower.image_std or _CLIP[1],
        stride=stride,
        name=name,
        source=source,
        size=int(size[0] if isinstance(size, tuple | list) else size),
    )
