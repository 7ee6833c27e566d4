"""Fréchet distances between sets of images (FID), in the feature space of your choice, computed by torchmetrics.

With the Inception network it is FID as published; with a CLIP tower, CLIP-FID; with crops of large images against
real patches, crop-FID. Distances of small sets are biased upwards: compare equal counts only, and with the distance
between two sets of real images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.synthesis.conditions import ImageEncoder

INCEPTION = "inception"


class EncoderFeatures(nn.Module):
    """An `ImageEncoder` as torchmetrics wants feature extractors: images (B, 3, H, W) in [0, 1] -> (B, D)."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder, self.num_features = encoder, encoder.dim

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)


class InceptionFeatures(nn.Module):
    """torchmetrics' Inception network (the one of the published numbers), from a weights file on this machine."""

    num_features = 2048

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError:
            raise ImportError('FID needs torchmetrics: pip install "diffrep[synthesis]"') from None
        if not weights.is_file():
            raise ValueError(f"{weights}: there is no such file of Inception's weights")
        try:
            self.network: Any = NoTrainInceptionV3(
                "inception-v3-compat", [str(self.num_features)], feature_extractor_weights_path=str(weights)
            )
        except ModuleNotFoundError:
            raise ImportError("Inception's network needs torch-fidelity: pip install torch-fidelity") from None

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network((images.clamp(0, 1) * 255).round().byte())
        return features


def load_features(name: str) -> nn.Module:
    """A feature extractor by name.

    Args:
        name: ``inception:FILE`` with the weights that torch-fidelity uses, or any backbone that `ImageEncoder.load`
            takes, ``tiny-dino`` or an open_clip model for example, optionally with ``@mean`` or ``@class``.

    Raises:
        ValueError: another pooling, or Inception without its file.
        BackboneError: there is no such backbone.
    """
    kind, _, rest = name.partition(":")
    if kind == INCEPTION:
        if not rest:
            raise ValueError(f"nothing is downloaded: name the file of Inception's weights as {INCEPTION}:FILE")
        return InceptionFeatures(Path(rest))
    backbone, _, pooling = name.partition("@")
    return EncoderFeatures(ImageEncoder.load(backbone, pooling or "class"))


@torch.no_grad()
def frechet_distance(real: Tensor, generated: Tensor, features: nn.Module, *, batch_size: int = 32) -> float:
    """Fréchet distance between Gaussians fitted to the features of two sets of images.

    Args:
        real, generated: (N, 3, H, W) and (M, 3, H', W') in [0, 1], N and M at least 2.
        features: images -> (B, D), with the attribute ``num_features`` = D.

    Raises:
        ValueError: a set has fewer than two images.
        ImportError: torchmetrics is not installed.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"a distance needs at least 2 images on both sides, got {len(real)} and {len(generated)}")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise ImportError('FID needs torchmetrics: pip install "diffrep[synthesis]"') from None
    metric: Any = FrechetInceptionDistance(feature=features, normalize=True)
    for images, is_real in ((real, True), (generated, False)):
        for part in images.split(batch_size):
            metric.update(part, real=is_real)
    return float(metric.compute())
