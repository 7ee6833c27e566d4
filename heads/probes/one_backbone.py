"""The backbone whose features a probe reads: its loading, and the refusal of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffrep.backbones import Backbone, load_backbone
from diffrep.store.provenance import weights_sha256


def load_recorded(name: str, features: Mapping[str, Any], device: str = "cpu") -> Backbone:
    """The backbone that a probe was trained on, in the precision that it was trained with.

    Args:
        features: provenance of its features.
    """
    return load_backbone(name, device=device, dtype=getattr(torch, features["dtype"]))


def check_weights_of(name: str, features: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a backbone that is not the one the probe was trained on.

    Args:
        name: of the one that it was trained on.
        features: provenance of its features.

    Raises:
        ValueError: it has other weights.
    """
    if weights_sha256(backbone) != features["weights_sha256"]:
        raise ValueError(f"the probe was trained on the features of {name}; {backbone.name} has other weights")


class OneBackbone:
    """Base of probes whose `features` are the provenance of one backbone's features."""

    features: Mapping[str, Any]

    @property
    def backbone(self) -> str:
        """The name of its backbone."""
        return str(self.features["backbone"])

    def load_own(self, device: str = "cpu") -> Backbone:
        """See `load_recorded`."""
        return load_recorded(self.backbone, self.features, device)

    def check(self, backbone: Backbone) -> None:
        """See `check_weights_of`."""
        check_weights_of(self.backbone, self.features, backbone)
