"""Writing diffusion backbones as diffusers folders that `load_backbone` reads: `save_pretrained` and `push_to_hub`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from diffrep.backbones.base import Backbone, BackboneError
from diffrep.backbones.repositories import Repository
from diffrep.files import write_document


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
    index: dict[str, Any] = {"_class_name": _pipeline(backbone), part: ["diffusers", type(network).__name__]}
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
        root = source.fetch(names)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(root / name, folder / name)
        saved = source.json("model_index.json", required=False)
        parts = {key: value for key, value in saved.items() if key.startswith(("text_encoder", "tokenizer"))}
        index |= parts or {"text_encoder": ["transformers", "CLIPTextModel"]}
        index["_class_name"] = saved.get("_class_name", index["_class_name"])
    write_document(folder / "model_index.json", index)
    recommended = json.loads(json.dumps(dataclasses.asdict(backbone.recommended)))
    write_document(folder / "diffrep.json", recommended)


def _pipeline(backbone: Backbone) -> str:
    kinds = {
        "UNet2DModel": "DDPMPipeline",
        "UNet2DConditionModel": "StableDiffusionPipeline",
        "SD3Transformer2DModel": "StableDiffusion3Pipeline",
        "FluxTransformer2DModel": "FluxPipeline",
        "PixArtTransformer2DModel": "PixArtAlphaPipeline",
        "DiTTransformer2DModel": "DiTPipeline",
    }
    return kinds[type(backbone.network).__name__]
