"""The original programs' names of the tensors of a diffusers model: Stable Diffusion in one file, small."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

WIDTHS = {"sd1": (32, 64, 64, 64), "sd2": (64, 64, 128, 128), "sdxl": (64, 64, 128)}
TEXT_WIDTH = 64
_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_key(key: str, attended: list[bool]) -> str:
    """diffusers' name -> CompVis' name, for two residual blocks a level; `attended`: the decoder's levels."""
    for ours, theirs in _WHOLE.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    side, rest = key.split(".", 1)
    if side == "mid_block":
        kind, number, inner = rest.split(".", 2)
        place = "1" if kind == "attentions" else str(2 * int(number))
        return f"middle_block.{place}.{_inside(kind, inner)}"
    level, kind, number, inner = rest.split(".", 3)
    if kind == "downsamplers":
        return f"input_blocks.{3 * (int(level) + 1)}.0.op.{inner.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * int(level) + 2}.{2 if attended[int(level)] else 1}.{inner}"
    block = 1 + 3 * int(level) + int(number) if side == "down_blocks" else 3 * int(level) + int(number)
    name = "input_blocks" if side == "down_blocks" else "output_blocks"
    return f"{name}.{block}.{int(kind == 'attentions')}.{_inside(kind, inner)}"


def _inside(kind: str, inner: str) -> str:
    if kind == "attentions":
        return inner
    module, _, end = inner.rpartition(".")
    return f"{_RES[module]}.{end}"


def vae_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        if ".attentions.0." in key:
            module, _, end = key.split(".attentions.0.")[1].rpartition(".")
            side = key.split(".")[0]
            key = f"{side}.mid.attn_1.{_ATTENTION[module]}.{end}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        renamed[f"first_stage_model.{key}"] = value
    return renamed


def clip_weights(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A text encoder under transformers' names of old, as Stable Diffusion 1 and the first one of XL have it."""
    named = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    return {f"{prefix}text_model.{key}": value for key, value in named.items()}


def open_clip_weights(encoder: Any, prefix: str, *, more_layers: int = 0) -> dict[str, Tensor]:
    """A text encoder under open_clip's names; `more_layers`: behind the last one that is used."""
    named = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    whole = {"embeddings.token_embedding.weight": "token_embedding.weight"}
    whole |= {"embeddings.position_embedding.weight": "positional_embedding"}
    result = {prefix + theirs: named[ours] for ours, theirs in whole.items()}
    for end in ("weight", "bias"):
        result[f"{prefix}ln_final.{end}"] = named[f"final_layer_norm.{end}"]
    if "text_projection.weight" in named:
        result[f"{prefix}text_projection"] = named["text_projection.weight"].T.contiguous()
    else:
        result[f"{prefix}text_projection"] = torch.eye(TEXT_WIDTH)
    layers = 1 + max(int(k.split(".")[2]) for k in named if k.startswith("encoder.layers."))
    for number in range(layers + more_layers):
        ours, theirs = f"encoder.layers.{min(number, layers - 1)}.", f"{prefix}transformer.resblocks.{number}."
        for end in ("weight", "bias"):
            joint = torch.cat([named[f"{ours}self_attn.{p}_proj.{end}"] for p in "qkv"])
            result[f"{theirs}attn.in_proj_{end}"] = joint
            result[f"{theirs}attn.out_proj.{end}"] = named[f"{ours}self_attn.out_proj.{end}"]
            for a, b in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                result[f"{theirs}{b}.{end}"] = named[f"{ours}{a}.{end}"]
    return result


def parts(family: str) -> tuple[Any, Any, dict[str, Any]]:
    """Random U-Net, VAE and text encoders of a family, as diffusers and transformers have them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)  # the libraries' initialisation takes its draws from the global generator
    widths = WIDTHS[family]
    levels = len(widths)
    context = 2 * TEXT_WIDTH if family == "sdxl" else TEXT_WIDTH
    down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    sizes: dict[str, Any] = {"attention_head_dim": 8 if family == "sd1" else [w // 64 for w in widths]}
    if family == "sdxl":
        down = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
        sizes |= {"transformer_layers_per_block": (1, 1, 2), "addition_embed_type": "text_time"}
        sizes |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 256}
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=context,
        use_linear_projection=family != "sd1",
        **sizes,
    )
    kinds = ("DownEncoderBlock2D",) * 4
    vae = AutoencoderKL(
        down_block_types=kinds,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
    )
    text = {"vocab_size": 49408, "hidden_size": TEXT_WIDTH, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 1, "projection_dim": TEXT_WIDTH, "bos_token_id": 0, "eos_token_id": 2}
    first = CLIPTextModel(CLIPTextConfig(**text, hidden_act="gelu" if family == "sd2" else "quick_gelu")).eval()
    encoders: dict[str, Any] = {"text_encoder": first}
    if family == "sdxl":
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**text, hidden_act="gelu")).eval()
    return unet.eval(), vae.eval(), encoders


def one_file(family: str, unet: Any, vae: Any, encoders: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the layout of the original programs."""
    attended = ["Cross" in kind for kind in unet.config.up_block_types]
    weights = {f"model.diffusion_model.{unet_key(k, attended)}": v for k, v in unet.state_dict().items()}
    weights |= vae_weights(vae.state_dict())
    if family == "sd1":
        weights |= clip_weights(encoders["text_encoder"], "cond_stage_model.transformer.")
    elif family == "sd2":
        weights |= open_clip_weights(encoders["text_encoder"], "cond_stage_model.model.", more_layers=1)
    else:
        weights |= clip_weights(encoders["text_encoder"], "conditioner.embedders.0.transformer.")
        weights |= open_clip_weights(encoders["text_encoder_2"], "conditioner.embedders.1.model.")
    return {key: value.clone().contiguous() for key, value in weights.items()}
