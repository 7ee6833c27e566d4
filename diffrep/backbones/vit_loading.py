"""Vision transformers from folders, timm and open_clip."""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError
from diffrep.backbones.repositories import repository
from diffrep.backbones.vit import PositionRule, VisionTransformer, dinov2_backbone, timm_backbone
from diffrep.backbones.vit_transformers import IMAGENET, load_saved_vit
from diffrep.backbones.weight_files import read_weights
from diffrep.files import one_line, read_document

TIMM = {  # short name -> timm architecture with its weights
    "dino-small": "vit_small_patch8_224.dino",
    "dino-base": "vit_base_patch8_224.dino",
    "dinov2-small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-large": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-base-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-large-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3-base": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-large": "vit_large_patch16_dinov3.lvd1689m",
}


def only_weights(folder: Path, endings: Sequence[str] = (".safetensors",)) -> Path:
    """The one weight file of a folder; of several kinds, that of the first kind that it has.

    Raises:
        BackboneError: there is none, or there are several.
    """
    files = next((files for ending in endings if (files := sorted(folder.glob(f"*{ending}")))), [])
    if len(files) != 1:
        expected = " or ".join(endings)
        raise BackboneError(f"{folder}: expected one {expected} file beside config.json, found {len(files)}")
    return files[0]


def load_vit_folder(folder: Path, config: Mapping[str, Any], *, name: str, stride: int | None) -> VisionTransformer:
    """timm's hub layout (``architecture``, ``model_args``, ``pretrained_cfg``), transformers' (``model_type``) or a
    DINOv2 checkpoint."""
    if "architecture" in config:
        return timm_backbone(
            config["architecture"],
            model_args=config.get("model_args"),
            weights=read_weights(only_weights(folder)),
            config=config.get("pretrained_cfg"),
            stride=stride,
            positions=PositionRule(**config["diffrep_positions"]) if "diffrep_positions" in config else None,
            name=name,
            source=str(folder),
        )
    if "model_type" in config:
        preprocessor = folder / "preprocessor_config.json"
        values = read_document(preprocessor, error=BackboneError) if preprocessor.is_file() else {}
        return load_saved_vit(folder, config, values, name=name, stride=stride)
    needed = {"img_size", "patch_size", "embed_dim", "depth", "num_heads"}
    if missing := sorted(needed - set(config)):
        raise BackboneError(f"{folder / 'config.json'}: is neither timm's nor DINOv2's: {', '.join(missing)} missing")
    return dinov2_backbone(
        read_weights(only_weights(folder)), dict(config), stride=stride, name=name, source=str(folder)
    )


_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16, 4096: 32}  # channels -> heads, where they are not 64 channels each


def is_vit(names: Container[str]) -> bool:
    """Whether tensors of such names are a ViT of timm or of the published DINO programs."""
    return "patch_embed.proj.weight" in names and "blocks.0.norm1.weight" in names


def vit_from_weights(weights: dict[str, Tensor], path: Path, *, name: str, stride: int | None) -> VisionTransformer:
    """A ViT from its weights alone: a ``.pth`` of DINOv2 or DINOv3 as their programs publish it, or a file of timm.

    A file named after a timm model (``vit_base_patch14_dinov2.lvd142m.safetensors``) is that model. Of others the
    shapes tell the sizes, with heads of 64 channels as in all published small, base and large models.

    Raises:
        BackboneError: the shapes do not tell the model, or the weights do not fit it.
    """
    import timm

    shared: dict[str, Any] = {"weights": weights, "stride": stride, "name": name, "source": str(path)}
    if path.stem.split(".")[0] in timm.list_models():
        return timm_backbone(path.stem, **shared)
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
        return timm_backbone("vit_base_patch16_dinov3", model_args=sizes | _dinov3_arguments(weights), **shared)
    if "pos_embed" not in weights:
        raise BackboneError(f"{path}: is a ViT without position table; name the file after its timm model")
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    cells = weights["pos_embed"].shape[1] - ("cls_token" in weights)
    side = math.isqrt(cells) * patch
    if "mask_token" in weights:
        config = {**sizes, "img_size": side, "num_register_tokens": registers}
        config |= {"interpolate_antialias": bool(registers), "interpolate_offset": 0.0 if registers else 0.1}
        return dinov2_backbone(weights, config, stride=stride, name=name, source=str(path))
    arguments = sizes | {"img_size": side, "qkv_bias": "blocks.0.attn.qkv.bias" in weights}
    arguments["mlp_ratio"] = weights["blocks.0.mlp.fc1.weight"].shape[0] / width
    arguments["init_values"] = 1.0 if "blocks.0.ls1.gamma" in weights else None
    if "dino" in path.name:
        shared |= {
            "positions": PositionRule(antialias=False, offset=0.1),
            "config": {"mean": IMAGENET[0], "std": IMAGENET[1]},
        }
    return timm_backbone("vit_base_patch16_224", model_args=arguments, **shared)


def _dinov3_arguments(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What of a DINOv3 differs between its sizes; takes biases that are zero out of the weights, as timm has them."""
    width = weights["cls_token"].shape[-1]
    gated = "blocks.0.mlp.w1.weight" in weights
    hidden = weights["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"].shape[0]
    biases = [key for key in weights if key.endswith("attn.qkv.bias")]
    used = any(bool(part.any()) for key in biases for part in weights[key].chunk(3)[::2])  # that of the keys is masked
    if not used:
        for key in biases:
            del weights[key]
    return {
        "mlp_ratio": hidden / width,
        "swiglu_mlp": gated,
        "qkv_bias": used,
        "num_reg_tokens": weights["storage_tokens"].shape[1],
    }


def load_timm(architecture: str, *, name: str, stride: int | None, weights: bool = True) -> VisionTransformer:
    import timm

    if architecture.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(architecture, timm.list_models(pretrained=True), n=3)
        raise BackboneError(f"{name}: timm has no model {architecture}; near names: {', '.join(near) or 'none'}")
    build = partial(timm_backbone, architecture, stride=stride, name=name, source=f"timm/{architecture}")
    if not weights:
        with torch.device("meta"):
            return build()
    known = timm.get_pretrained_cfg(architecture)
    if known is not None and known.hf_hub_id:  # without a connection timm asks for half a minute: ask once before
        repository(known.hf_hub_id + (architecture if known.hf_hub_id.endswith("/") else "")).check()
    try:
        return build(pretrained=True)
    except RuntimeError as error:
        raise BackboneError(f"{name}: {one_line(error)}") from None


def load_open_clip(model: str, pretrained: str | None, *, name: str, stride: int | None) -> VisionTransformer:
    import open_clip

    if not model.startswith(("local-dir:", "hf-hub:")) and model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
        raise BackboneError(f"{name}: open_clip has no model {model}; near names: {', '.join(near) or 'none'}")
    if pretrained is None and not model.startswith(("local-dir:", "hf-hub:")):
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise BackboneError(f"{name}: say which weights, open_clip:{model}/TAG; it has {', '.join(tags[:6])}")
    return open_clip_backbone(
        open_clip.create_model(model, pretrained=pretrained), name=name, source=f"open_clip/{model}", stride=stride
    )


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
    size = tower.image_size if hasattr(tower, "image_size") else 224
    return VisionTransformer(
        network,
        mean=tower.image_mean or (0.48145466, 0.4578275, 0.40821073),
        std=tower.image_std or (0.26862954, 0.26130258, 0.27577711),
        stride=stride,
        name=name,
        source=source,
        size=int(size[0] if isinstance(size, tuple | list) else size),
    )
