"""Vision transformers from folders, timm and open_clip."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrep.backbones.base import BackboneError
from diffrep.backbones.repositories import one_line
from diffrep.backbones.vit import PositionRule, VisionTransformer, dinov2_backbone, timm_backbone
from diffrep.backbones.weight_files import read_weights

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


def only_weights(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise BackboneError(f"{folder}: expected one .safetensors file beside config.json, found {len(files)}")
    return files[0]


def load_vit_folder(folder: Path, config: Mapping[str, Any], *, name: str, stride: int | None) -> VisionTransformer:
    """timm's hub layout (``architecture``, ``model_args``, ``pretrained_cfg``) or a DINOv2 checkpoint."""
    weights = read_weights(only_weights(folder))
    if "architecture" in config:
        return timm_backbone(
            config["architecture"],
            model_args=config.get("model_args"),
            weights=weights,
            config=config.get("pretrained_cfg"),
            stride=stride,
            positions=PositionRule(**config["diffrep_positions"]) if "diffrep_positions" in config else None,
            name=name,
            source=str(folder),
        )
    needed = {"img_size", "patch_size", "embed_dim", "depth", "num_heads"}
    if missing := sorted(needed - set(config)):
        raise BackboneError(f"{folder / 'config.json'}: is neither timm's nor DINOv2's: {', '.join(missing)} missing")
    return dinov2_backbone(weights, dict(config), stride=stride, name=name, source=str(folder))


def load_timm(architecture: str, *, name: str, stride: int | None) -> VisionTransformer:
    import timm

    if architecture.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(architecture, timm.list_models(pretrained=True), n=3)
        raise BackboneError(f"{name}: timm has no model {architecture}; near names: {', '.join(near) or 'none'}")
    try:
        return timm_backbone(architecture, pretrained=True, stride=stride, name=name, source=f"timm/{architecture}")
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
