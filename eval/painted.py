"""How good painted images are: like real ones, without visible windows, and as their embeddings say, cell by cell.

Fréchet distances (FID) are computed by torchmetrics in the feature space of your choice. With the Inception network it
is FID as published; with a CLIP tower, CLIP-FID; with crops of large images against real patches, crop-FID. Distances
of small sets are biased upwards: compare equal counts only, and with the distance between two sets of real images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.files import optional_import
from diffrep.images import LUMINANCE, ImageLike, load_image
from diffrep.synthesis.grids import EmbeddingGrid, ImageEncoder

INCEPTION = "inception"


class Features(nn.Module):
    """Features of images (B, 3, H, W) in [0, 1], (B, num_features), as torchmetrics takes them."""

    def __init__(self, extract: Callable[[Tensor], Tensor], num_features: int) -> None:
        super().__init__()
        self.extract, self.num_features = extract, num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.extract(images)


def inception_features(weights: Path) -> Features:
    """torchmetrics' Inception network (the one of the published numbers), from a weights file on this machine.

    Raises:
        ValueError: there is no such file.
        ImportError: torchmetrics or torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise ValueError(f"{weights}: there is no such file of Inception's weights")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    except ModuleNotFoundError:
        raise ImportError(
            'Inception needs torchmetrics and torch-fidelity: pip install "diffrep[synthesis]" torch-fidelity'
        ) from None
    return Features(lambda images: network((images.clamp(0, 1) * 255).round().byte()), 2048)


def load_features(name: str) -> Features:
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
        return inception_features(Path(rest))
    backbone, _, pooling = name.partition("@")
    encoder = ImageEncoder.load(backbone, pooling or "class")
    return Features(encoder, encoder.dim)


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
    with optional_import('FID needs torchmetrics: pip install "diffrep[synthesis]"'):
        from torchmetrics.image.fid import FrechetInceptionDistance
    metric: Any = FrechetInceptionDistance(feature=features, normalize=True)
    for images, is_real in ((real, True), (generated, False)):
        for part in images.split(batch_size):
            metric.update(part, real=is_real)
    return float(metric.compute())


def seam_ratio(image: ImageLike, period: int, *, offset: int = 0) -> float:
    """Steps across tile borders, relative to the steps right beside them; 1 where no seam is to be seen.

    With c(x) the mean over rows of |L(x + 1) - L(x)|, L the luminance, and X the columns before a border:
    sum c(X) / sum (c(X - 1) + c(X + 1)) / 2, averaged over both axes. Single images of few borders scatter by a few
    percent around 1; average over several.

    Args:
        image: see `load_image`.
        period: pixels between borders, at least 3.
        offset: of the first border, pixels; the image's own edges are none.

    Raises:
        ValueError: the period is too small, or no border lies inside the image.
    """
    if period < 3:
        raise ValueError(f"period must be at least 3 pixels, got {period}")
    pixels = np.asarray(load_image(image)).astype(np.float64) @ np.array(LUMINANCE)
    ratios = []
    for lines in (pixels, pixels.T):
        steps = np.abs(np.diff(lines, axis=1)).mean(0)  # steps[x] lies between columns x and x + 1
        before = np.arange(offset % period, lines.shape[1], period) - 1
        before = before[(before >= 1) & (before <= len(steps) - 2)]
        if not len(before):
            raise ValueError(
                f"no border every {period} pixels lies inside an image of {pixels.shape[0]} x {pixels.shape[1]}"
            )
        beside = (steps[before - 1] + steps[before + 1]).sum() / 2
        ratios.append(float(steps[before].sum() / beside) if beside > 0 else 1.0)
    return float(np.mean(ratios))


@dataclass(frozen=True)
class Consistency:
    """How well the N cells of an image agree with their conditions."""

    own: float  # mean cosine between a cell and its own condition
    other: float  # between a cell and the condition that it resembles most among the others
    right: float  # share of cells that are closer to their own condition than to any other cell's


def consistency(image: ImageLike, grid: EmbeddingGrid, encoder: ImageEncoder) -> Consistency:
    """Embed an image again, cell by cell, and compare with the grid that it was painted from.

    Args:
        image: covers the grid exactly: one cell for each embedding.
        encoder: the one that made the grid.

    Raises:
        ValueError: the grid has a single cell, or embeddings of another width.
    """
    if grid.dim != encoder.dim or grid.shape == (1, 1):
        raise ValueError(
            f"needs at least 2 cells and embeddings as wide as {encoder.name}'s ({encoder.dim}), got a grid of"
            f" {grid.shape[0]} x {grid.shape[1]} of width {grid.dim}"
        )
    painted = F.normalize(encoder.grid(image, grid.shape).embeddings.flatten(0, 1), dim=1)
    wanted = F.normalize(grid.embeddings.flatten(0, 1), dim=1)
    similarity = painted @ wanted.T
    right = similarity.diagonal().clone()
    other = similarity.fill_diagonal_(-torch.inf).amax(1)
    return Consistency(float(right.mean()), float(other.mean()), float((right > other).float().mean()))
