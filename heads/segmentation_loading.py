"""Loading DiffDIS: the authors' checkpoints, whatever their config says, and the embedded head.

The authors publish a U-Net beside the config of its base, which knows nothing of DiffDIS: what a folder holds is read
from the names and shapes of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffrep.backbones.base import BackboneError
from diffrep.heads.diffdis import DiffDisUNet, is_diffdis


def diffdis_unet(weights: Mapping[str, Tensor], config: Mapping[str, Any], *, name: str) -> DiffDisUNet:
    """A DiffDIS U-Net from weights and any config of its base.

    Args:
        weights: state dict with the published names.
        config: of a U-Net with the same widths; its input channels and class embedding do not matter.
        name: of the folder or file, for messages.

    Raises:
        BackboneError: these are no DiffDIS weights, or they do not fit the config; the message says which weights are
            missing, left over or of another shape.
    """
    if not is_diffdis(weights):
        raise BackboneError(
            f"{name}: is no DiffDIS U-Net: its weights lack rgb_proj, attn3 or class_embedding;"
            " `diffrep train segmentation` makes one of a plain U-Net"
        )
    network = DiffDisUNet(config)
    own = network.state_dict()
    problems = {
        "missing": sorted(set(own) - set(weights)),
        "left over": sorted(set(weights) - set(own)),
        "of another shape": sorted(k for k in set(own) & set(weights) if own[k].shape != weights[k].shape),
    }
    if found := [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in problems.items() if keys]:
        raise BackboneError(f"{name}: the weights do not fit the config: {'; '.join(found)}")
    network.load_state_dict(dict(weights))
    network.eval().requires_grad_(False)
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        BackboneError: it is missing or damaged.
    """
    if not path.is_file():
        raise BackboneError(f"{path}: is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BackboneError(f"{path}: is damaged or no safetensors file ({error})") from None
