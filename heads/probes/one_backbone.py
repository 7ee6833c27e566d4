"""What probes on the features of one backbone share: its name, its loading, and the refusal of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffrep.backbones import Backbone, load_backbone
from diffrep.store.provenance import weights_sha256


class OneBackbone:
    """Base of probes whose `features` are the provenance of one backbone's features."""

    features: Mapping[str, Any]

    @property
    def backbone(self) -> str:
        """The name of its backbone."""
        return str(self.features["backbone"])

    def load_own(self, device: str = "cpu") -> Backbone:
        """The backbone that it was trained on, in the precision that it was trained with."""
        return load_backbone(self.backbone, device=device, dtype=getattr(torch, self.features["dtype"]))

    def check(self, backbone: Backbone) -> None:
        """Refuse a backbone that is not the one the probe was trained on.

        Raises:
            ValueError: it has other weights.
        """
        if weights_sha256(backbone) != self.features["weights_sha256"]:
            raise ValueError(
                f"the probe was trained on the features of {self.backbone}; {backbone.name} has other weights"
            )
