"""Vision transformers that the library transformers saved: DINOv2, DINOv3, CLIP, SigLIP, ViT, RADIO.

They run through transformers' own code, so that features are those of the implementation they were saved by. Taps are
those of `VisionTransformer`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.base import BackboneError, Reader, Recommended, reading
from diffrep.backbones.vit import VisionTransformer
from diffrep.files import one_line
from diffrep.images import Sizing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # RADIO normalises inside

KINDS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # model type -> mean and std it was trained with
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "dinov3_vit": IMAGENET,
    "vit": _HALF,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _HALF,
    "siglip_vision_model": _HALF,
    "radio": _NONE,
}
_FACETS = {"query": ("q_proj", "query"), "key": ("k_proj", "key"), "value": ("v_proj", "value")}


class SavedVit(VisionTransformer):
    """A ViT of transformers.

    Args:
        network: the model or its vision tower; it gives tokens of which the last are the patches, row by row.
        mean, std: of the normalisation before it.
        size: pixels, the side of the square that it was trained on.

    Raises:
        BackboneError: its layers are not those of a plain ViT.
    """

    def __init__(
        self,
        network: Any,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int,
        name: str = "vision transformer",
        source: str = "random",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.name, self.source = name, source
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        config = network.config
        self.patch = self.stride = self.multiple = int(config.patch_size)
        self.channels = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        lists = [(p, m) for p, m in network.named_modules() if isinstance(m, nn.ModuleList)]
        layers = [(p, m) for p, m in lists if len(m) == config.num_hidden_layers]
        if len(layers) != 1:
            raise BackboneError(f"{name}: a {type(network).__name__} has no plain list of layers that could be tapped")
        self._path, self._blocks = layers[0][0], list(layers[0][1])
        accepted = inspect.signature(network.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        self.prefix = self._count_prefix()
        self.recommended = Recommended(
            taps=(f"layer.{len(self._blocks) - 1}",),
            sizing=Sizing(mode="squash", size=max(1, size // self.patch) * self.patch, resample="bicubic"),
        )

    @torch.inference_mode()
    def _count_prefix(self) -> int:
        """How many tokens stand before the patches: class and register tokens."""
        side = 2 * self.patch
        with reading({"first": Reader(self._blocks[0], _first)}) as tokens:
            self._forward(torch.zeros(1, 3, side, side, dtype=self.dtype, device=self.device))
        return int(tokens["first"].shape[1]) - 4

    def _forward(self, normalised: Tensor) -> None:
        self.network(pixel_values=normalised, **self._options)

    def _module_path(self, layer: int, facet: bool) -> str:
        return f"{self._path}.{layer}"

    def _reader(self, layer: int, facet: str | None) -> Reader:
        if facet is None:
            return Reader(self._blocks[layer], _first)
        for path, module in self._blocks[layer].named_modules():
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in _FACETS[facet]:
                return Reader(module, partial(_interleaved, self.heads))
        raise BackboneError(f"{self.name}: layer {layer} has no projection of its own for {facet}")


def _first(inputs: Any, named: Any, output: Any) -> Tensor:
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens


def _interleaved(heads: int, inputs: Any, named: Any, output: Tensor) -> Tensor:
    """A projection with the head index fastest among its channels."""
    return output.unflatten(2, (heads, -1)).mT.flatten(2)


def load_saved_vit(
    source: str | os.PathLike[str],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    *,
    name: str,
    stride: int | None = None,
) -> SavedVit:
    """A folder or hub id with a ViT that transformers saved.

    Args:
        config: its ``config.json``.
        preprocessor: its ``preprocessor_config.json``; empty where there is none.

    Raises:
        BackboneError: it is another kind of model, weights are missing, no safetensors or do not fit, or this version
            of transformers does not know it.
    """
    import transformers

    kind = str(config.get("model_type"))
    if kind not in KINDS:
        raise BackboneError(
            f"{name}: is a {kind} of transformers; of those that can be tapped there are {', '.join(KINDS)}"
        )
    version = transformers.__version__
    try:
        model, info = transformers.AutoModel.from_pretrained(
            os.fspath(source), use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (KeyError, ValueError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        raise BackboneError(f"{name}: transformers {version} cannot load this {kind} ({one_line(error)})") from None
    except OSError as error:
        raise BackboneError(f"{name}: cannot be loaded as safetensors ({one_line(error)})") from None
    network = getattr(model, "vision_model", model)
    missing = [k for k in info["missing_keys"] if not any(word in k for word in ("pooler", "head.", "text", "logit"))]
    if missing or info.get("mismatched_keys"):
        raise BackboneError(
            f"{name}: the weights do not fit the config: {sorted(missing or info['mismatched_keys'])[:3]}"
        )
    mean, std = KINDS[kind]
    backbone = SavedVit(
        network,
        mean=tuple(preprocessor.get("image_mean") or mean) if kind != "radio" else mean,
        std=tuple(preprocessor.get("image_std") or std) if kind != "radio" else std,
        size=_trained_size(network.config, preprocessor),
        name=name,
        source=os.fspath(source),
    )
    if stride not in (None, backbone.patch):
        raise BackboneError(f"{name}: a {kind} of transformers has patches in steps of {backbone.patch}, not {stride}")
    return backbone


def _trained_size(config: Any, preprocessor: Mapping[str, Any]) -> int:
    crop = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(crop, Mapping):
        crop = crop.get("height") or crop.get("shortest_edge")
    return int(crop or getattr(config, "image_size", None) or 224)
