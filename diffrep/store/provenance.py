"""Where features come from, so that features of different origin are never taken for one another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

from diffrep.backbones import Backbone
from diffrep.features import ExtractConfig
from diffrep.images import Sizing

_LIBRARIES = ("torch", "diffusers", "transformers", "timm", "open_clip_torch", "numpy", "Pillow")
_DESCRIPTIVE = frozenset({"source", "batch_size"})  # say where and how, and leave the numbers as they are


def provenance(backbone: Backbone, config: ExtractConfig) -> dict[str, Any]:
    """Everything that features depend on, JSON-ready: the backbone, its weights and every extraction setting."""
    values = {
        "backbone": backbone.name,
        "source": backbone.source,
        "weights_sha256": weights_sha256(backbone),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **dataclasses.asdict(config.resolve(backbone)),
    }
    return dict(json.loads(json.dumps(values)))


def weights_sha256(backbone: Backbone) -> str:
    """SHA-256 over all weights of a backbone, with their names, as they were loaded."""
    digest = hashlib.sha256()
    for part, module in sorted(vars(backbone).items()):
        if isinstance(module, nn.Module):
            for name, values in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name} {values.dtype} {tuple(values.shape)}".encode())
                digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def environment(backbone: Backbone) -> dict[str, Any]:
    """Library versions and the device, JSON-ready."""
    import diffrep

    versions = {"diffrep": diffrep.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "versions": versions}


def extract_config(features: Mapping[str, Any]) -> ExtractConfig:
    """The settings of a provenance, to extract further images in the same way."""
    known = {f.name for f in dataclasses.fields(ExtractConfig)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in features.items() if k in known}
    if isinstance(sizing := values.get("sizing"), Mapping):
        size = tuple(sizing["size"]) if isinstance(sizing["size"], list) else sizing["size"]
        values["sizing"] = Sizing(**{**sizing, "size": size})
    if isinstance(freeu := values.get("freeu"), Mapping):
        from diffrep.backbones import FreeU

        parts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in freeu.items()}
        values["freeu"] = FreeU(**parts)
    return ExtractConfig(**values)


def difference(a: Mapping[str, Any], b: Mapping[str, Any], *, ignore: frozenset[str] = frozenset()) -> str | None:
    """The first setting in which two provenances differ, in words; None: their features can be compared.

    >>> difference({"backbone": "tiny", "seed": 0}, {"backbone": "tiny", "seed": 1})
    'seed 0 against 1'
    """
    for key in {**a, **b}:
        if key not in _DESCRIPTIVE | ignore and a.get(key) != b.get(key):
            return f"{key} {_short(a.get(key))} against {_short(b.get(key))}"
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
