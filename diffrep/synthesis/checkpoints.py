"""The authors' latent diffusion checkpoints as diffusers folders, exactly.

Both hold the same networks under other names; every tensor is copied unchanged but the 1 x 1 convolutions of the
autoencoder's attention, which become matrices. Source: cvlab-stonybrook/Large-Image-Diffusion cf810d0 (CompVis'
latent diffusion).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffrep.backbones import BackboneError
from diffrep.backbones.pixel_diffusion import RES_BLOCK
from diffrep.files import one_line, read_settings
from diffrep.synthesis.model import OFFICIAL_TOKENS, About, ConditionEmbedder, SynthesisModel, official_tokens

UNET, AUTOENCODER, EMBEDDER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
AVERAGE = "model_ema.diffusion_model"  # + a U-Net key without its dots

_WHOLE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def read_config(path: Path) -> dict[str, Any]:
    """``model.params`` of the authors' YAML file.

    Raises:
        BackboneError: it is missing or of another kind.
    """
    values = read_settings(path, error=BackboneError)
    try:
        return dict(values["model"]["params"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{path}: is no configuration with model.params ({one_line(error)})") from None


def find_official(folder: Path) -> tuple[Path, Path]:
    """Checkpoint and configuration in a folder as the authors give it: checkpoints/last.ckpt, configs/*-project.yaml.

    Raises:
        BackboneError: one of them is missing.
    """
    checkpoints = sorted(folder.glob("checkpoints/last.ckpt")) or sorted(folder.glob("checkpoints/*.ckpt"))
    configs = sorted(folder.glob("configs/*-project.yaml"))
    if not checkpoints or not configs:
        raise BackboneError(f"{folder}: needs checkpoints/last.ckpt and configs/*-project.yaml")
    return checkpoints[-1], configs[-1]


def convert_official(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    groups: int = 32,
    ema: bool = True,
    about: About | None = None,
) -> SynthesisModel:
    """Build a model from an official state dict.

    Args:
        weights: with the official names; schedule buffers, ``loss``, ``inception`` and the like are left out.
        config: ``model.params`` of the YAML: unet_config, first_stage_config, cond_stage_config, and optionally
            linear_start, linear_end, timesteps, scale_factor. It alone knows the number of attention heads.
        groups: of the group norms, fixed to 32 in the official code.
        ema: take the moving average of the U-Net where there is one.

    Raises:
        BackboneError: an architecture that diffusers does not have, or tensors are missing or left over.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel

    unet_config = official_unet_config(_params(config, "unet_config"), groups)
    first = _params(config, "first_stage_config")
    kind = VQModel if "n_embed" in first else AutoencoderKL
    scale = float(weights["scale_factor"]) if "scale_factor" in weights else float(config.get("scale_factor", 1.0))
    autoencoder_config = official_autoencoder_config(first, groups, scale)
    unet_weights = _part(weights, UNET)
    if ema and any(key.startswith(AVERAGE) for key in weights):
        unet_weights = {key: _average(weights, key) for key in unet_weights}
    layers, levels = unet_config["layers_per_block"], len(unet_config["block_out_channels"])
    tokens = official_tokens({k: v for k, v in _part(weights, EMBEDDER).items() if k.split(".")[0] in OFFICIAL_TOKENS})
    dims = [tokens[f"tokens.{k}.weight"].shape[1] for k in range(len(tokens) // 2)]
    if not dims:
        raise BackboneError(f"the checkpoint has no {EMBEDDER}{OFFICIAL_TOKENS[0]}: its embedder is of another kind")
    unet: Any = UNet2DConditionModel(**unet_config)
    autoencoder: Any = kind(**autoencoder_config)
    embedder = ConditionEmbedder(
        dims, unet.config.cross_attention_dim, normalize=_params(config, "cond_stage_config").get("normalize_ssl", True)
    )
    coder_levels = len(autoencoder_config["block_out_channels"])
    _fill(unet, {unet_name(k, layers, levels): v for k, v in unet_weights.items()}, "U-Net")
    _fill(autoencoder, autoencoder_weights(_part(weights, AUTOENCODER), coder_levels), "autoencoder")
    _fill(embedder, tokens, "embedder")
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": int(config.get("timesteps", 1000)),
        "beta_start": float(config.get("linear_start", 0.0015)),
        "beta_end": float(config.get("linear_end", 0.0195)),
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    model = SynthesisModel(unet, embedder, autoencoder, scheduler, about=about, name="converted model")
    return model.eval().requires_grad_(False)


def official_unet_config(official: Mapping[str, Any], groups: int = 32) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel` from those of the official `UNetModel`.

    Raises:
        BackboneError: an option that diffusers' class does not have, or the number of heads is not told.
    """
    multipliers, width = official["channel_mult"], official["model_channels"]
    attended = [2**level in official["attention_resolutions"] for level in range(len(multipliers))]
    if not official.get("use_spatial_transformer", False) or official.get("resblock_updown", False):
        raise BackboneError("the official U-Net must have use_spatial_transformer and no resblock_updown")
    widths = tuple(width * m for m in multipliers)
    heads: int | list[int]
    if official.get("num_heads", -1) > 0:
        heads = int(official["num_heads"])
    elif official.get("num_head_channels", -1) > 0:
        heads = [w // int(official["num_head_channels"]) for w in widths]
    else:
        raise BackboneError("the configuration tells neither num_heads nor num_head_channels; shapes do not either")
    return {
        "sample_size": official["image_size"],
        "in_channels": official["in_channels"],
        "out_channels": official["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": official["num_res_blocks"],
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        "cross_attention_dim": official["context_dim"],
        "attention_head_dim": heads,  # diffusers means the number of heads
        "transformer_layers_per_block": official.get("transformer_depth", 1),
        "use_linear_projection": official.get("use_linear_in_transformer", False),
        "norm_num_groups": groups,
    }


def official_autoencoder_config(official: Mapping[str, Any], groups: int = 32, scale: float = 1.0) -> dict[str, Any]:
    """Arguments of `VQModel` (with n_embed) or `AutoencoderKL` from those of the official first stage."""
    inner = official["ddconfig"]
    levels = len(inner["ch_mult"])
    attended = [inner["resolution"] // 2**level in inner.get("attn_resolutions", ()) for level in range(levels)]
    config = {
        "in_channels": inner["in_channels"],
        "out_channels": inner["out_ch"],
        "block_out_channels": tuple(inner["ch"] * m for m in inner["ch_mult"]),
        "layers_per_block": inner["num_res_blocks"],
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)),
        "latent_channels": inner["z_channels"],
        "norm_num_groups": groups,
        "sample_size": inner["resolution"],
        "scaling_factor": scale,
    }
    if "n_embed" in official:
        config |= {"num_vq_embeddings": official["n_embed"], "vq_embed_dim": official["embed_dim"]}
    return config


def unet_name(key: str, layers: int, levels: int) -> str:
    """An official name of a U-Net's tensor, without its prefix, as diffusers calls it.

    Args:
        layers: residual blocks a level; levels: how many.

    >>> unet_name("input_blocks.4.0.in_layers.2.weight", 2, 4)
    'down_blocks.1.resnets.0.conv1.weight'
    """
    if (name := _renamed(key, _WHOLE)) != key:
        return name
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", key):
        return f"{_MIDDLE[match[1]]}.{_renamed(match[2], RES_BLOCK)}"
    if not (match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", key)):
        raise BackboneError(f"the checkpoint has {key}, which is no part of the official U-Net")
    side, index, part, rest = match[1], int(match[2]), match[3], match[4]
    if side == "input":
        level, block = divmod(index - 1, layers + 1)
        if block == layers:
            return f"down_blocks.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        name = f"down_blocks.{level}"
    else:
        level, block = divmod(index, layers + 1)
        if rest.startswith("conv."):
            return f"up_blocks.{level}.upsamplers.0.{rest}"
        name = f"up_blocks.{level}"
    if level >= levels:
        raise BackboneError(f"the checkpoint has {key}, but the configuration has {levels} levels of {layers} blocks")
    part, rest = ("resnets", _renamed(rest, RES_BLOCK)) if part == "0" else ("attentions", rest)
    return f"{name}.{part}.{block}.{rest}"


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for official, ours in names.items():
        if key.startswith(f"{official}."):
            return ours + key.removeprefix(official)
    return key


def autoencoder_name(key: str, levels: int) -> str:
    """An official name of an autoencoder's tensor, without its prefix, as diffusers calls it.

    >>> autoencoder_name("decoder.up.0.block.2.nin_shortcut.weight", 3)
    'decoder.up_blocks.2.resnets.2.conv_shortcut.weight'
    """

    def level(match: re.Match[str]) -> str:
        number = int(match[2])
        return f"down_blocks.{number}." if match[1] == "down" else f"up_blocks.{levels - 1 - number}."

    key = re.sub(r"\b(down|up)\.(\d+)\.", level, key, count=1)
    key = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    key = re.sub(r"\.mid\.attn_1\.(\w+)\.", lambda m: f".mid_block.attentions.0.{_ATTENTION[m[1]]}.", key)
    key = re.sub(r"\.attn\.(\d+)\.(\w+)\.", lambda m: f".attentions.{m[1]}.{_ATTENTION[m[2]]}.", key)
    key = key.replace(".downsample.conv.", ".downsamplers.0.conv.").replace(".upsample.conv.", ".upsamplers.0.conv.")
    key = key.replace(".block.", ".resnets.").replace(".nin_shortcut.", ".conv_shortcut.")
    return key.replace(".norm_out.", ".conv_norm_out.")


def autoencoder_weights(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An official autoencoder's tensors under diffusers' names; those of its training loss are left out."""
    renamed = {autoencoder_name(k, levels): v for k, v in weights.items() if not k.startswith("loss.")}
    return {k: v[:, :, 0, 0] if ".attentions." in k and v.ndim == 4 else v for k, v in renamed.items()}


def _params(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in config:
        raise BackboneError(f"the configuration has no {name}")
    values: Mapping[str, Any] = config[name]
    return values.get("params", values)


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _average(weights: Mapping[str, Tensor], key: str) -> Tensor:
    name = AVERAGE + key.replace(".", "")
    if name not in weights:
        raise BackboneError(f"the checkpoint has a moving average, but without {name}")
    return weights[name]


def _fill(module: Any, weights: Mapping[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict({k: v.float() for k, v in weights.items()})
    except RuntimeError as error:
        raise BackboneError(f"the checkpoint's {what} does not fit its configuration: {one_line(error)}") from None
