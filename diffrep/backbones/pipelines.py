"""The parts of a Stable Diffusion folder, whole: for what runs the VAE's decoder too, and for wider U-Nets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError
from diffrep.backbones.loading import (
    EMBEDDED,
    HUB,
    MODELS,
    _alphas_cumprod,
    load_component,
    local_variant,
    read_json,
)
from diffrep.backbones.text import TextEncoders


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

    name, device = os.fspath(name), torch.device(device)
    source = str(MODELS / name) if name in EMBEDDED else HUB.get(name, name)
    folder = Path(source) if Path(source).is_dir() else None
    if folder is None and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise BackboneError(f"{name}: no such folder and no known model; known are {', '.join(['tiny', *HUB])}")
    if folder is not None:
        variant = variant or local_variant(folder / "unet")
    scheduler = read_json(source, "scheduler/scheduler_config.json")
    has_text = folder is None or (folder / "text_encoder").is_dir()
    parts = {"text_encoder": "CLIPTextModel"}
    return PipelineParts(
        unet=load_component(UNet2DConditionModel, source, "unet", dtype, variant).to(device),
        vae=load_component(AutoencoderKL, source, "vae", dtype, variant).to(device).requires_grad_(False),
        alphas_cumprod=_alphas_cumprod(scheduler).float().to(device),
        scheduler=scheduler,
        text=TextEncoders(source, parts, device=device, dtype=dtype, variant=variant, pad=pad) if has_text else None,
        source=source,
    )
