"""LoRA files on top of a diffusion backbone, merged into its weights.

diffusers knows the forms in which they are published (its own, PEFT's, kohya's) and peft the layers; what is merged
costs nothing when features are computed.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from diffrep.backbones.base import Backbone, BackboneError
from diffrep.backbones.diffusion import LatentBackbone
from diffrep.backbones.weight_files import describe_weights, read_weights
from diffrep.files import one_line

_MIXINS = {  # class of the network -> diffusers' reader of its LoRA files
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
}


def parse_lora(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:SCALE``.

    >>> parse_lora("style.safetensors:0.5")
    (PosixPath('style.safetensors'), 0.5)

    Raises:
        BackboneError: there is no such file, or the scale is no finite number.
    """
    if Path(text).is_file():
        return Path(text), 1.0
    name, colon, scale = text.rpartition(":")
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", scale):
        return Path(name), float(scale)
    if colon and Path(name).is_file():
        raise BackboneError(f"{text}: the scale of a LoRA must be a number, got {scale!r}")
    return Path(text), 1.0


def add_lora(backbone: Backbone, text: str) -> None:
    """Merge a LoRA into a diffusion backbone; its part for the text encoders is applied whenever a prompt is encoded.

    Args:
        text: ``FILE`` or ``FILE:SCALE``.

    Raises:
        BackboneError: the file is missing, damaged or no LoRA; it belongs to another model; or peft is missing.
    """
    path, scale = parse_lora(text)
    weights = read_weights(path)
    if "LoRA" not in describe_weights(weights)[0]:
        raise BackboneError(f"{path}: is no LoRA: it holds {', '.join(sorted(weights)[:2])}, ...")
    network = backbone.network
    kind = type(network).__name__
    if not isinstance(backbone, LatentBackbone) or kind not in _MIXINS:
        raise BackboneError(f"{path}: a LoRA goes with {', '.join(_MIXINS)}, {backbone.name} is a {kind}")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise BackboneError(f"{path}: LoRA files need peft: pip install peft") from None
    from diffusers.loaders import lora_pipeline

    large = kind == "UNet2DConditionModel" and network.config.addition_embed_type == "text_time"
    reader: Any = getattr(lora_pipeline, "StableDiffusionXLLoraLoaderMixin" if large else _MIXINS[kind])
    before = sum(1 for _ in network.modules())
    try:
        found = reader.lora_state_dict(dict(weights), **({"unet_config": network.config} if large else {}))
        state, alphas = found if isinstance(found, tuple) else (found, None)
        prefix = "unet" if kind == "UNet2DConditionModel" else "transformer"
        network.load_lora_adapter(dict(state), prefix=prefix, network_alphas=alphas, adapter_name="lora")
        fits = sum(1 for _ in network.modules()) > before
        if fits:
            network.fuse_lora(lora_scale=scale, adapter_names=["lora"])
            network.unload_lora()
    except Exception as error:  # names and shapes of another model: KeyError, RuntimeError, ValueError and others
        raise BackboneError(
            f"{path}: does not fit {backbone.name}, it belongs to another model ({one_line(error)})"
        ) from None
    texts = sorted({key.split(".")[0] for key in state if key.startswith("text_encoder")})
    if not fits and not texts:
        raise BackboneError(f"{path}: holds nothing for a {kind}, it belongs to another kind of model")
    if texts and backbone.text is not None:
        backbone.text.adapters.append(partial(_adapt_text, reader, dict(state), alphas, scale))
    backbone.source = f"{backbone.source} with {path.name}" + (f" x {scale:g}" if scale != 1 else "")


def _adapt_text(reader: Any, state: dict[str, Any], alphas: Any, scale: float, part: str, encoder: Any) -> None:
    if any(key.startswith(f"{part}.") for key in state):
        reader.load_lora_into_text_encoder(state, alphas, encoder, prefix=part, lora_scale=scale)
