"""Few-shot segmentation from the pixels' features: an ensemble of small MLPs (DDPM-seg, arXiv 2112.03126).

The maps of several blocks at several noise levels are resized to the image and concatenated; each pixel is then one
labelled example. Labels are the members' votes, their disagreement is the uncertainty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.training.loop import step_generator

FEW_CLASSES = 30  # below, the classifier is narrower


class PixelClassifier(nn.Module):
    """Linear, ReLU, batch norm twice, then a linear layer: D-128-32-K, or D-256-128-K from 30 classes on."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        first, second = (128, 32) if classes < FEW_CLASSES else (256, 128)
        self.layers = nn.Sequential(
            nn.Linear(channels, first),
            nn.ReLU(),
            nn.BatchNorm1d(first),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.BatchNorm1d(second),
            nn.Linear(second, classes),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, D) -> logits (N, K)."""
        logits: Tensor = self.layers(pixels)
        return logits


def pixel_features(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps (B, C_i, h, w), in the order of noise levels then blocks, resized bilinearly -> (B, sum C_i, H, W)."""
    resized = [F.interpolate(m.float(), size=size, mode="bilinear", align_corners=False) for m in maps]
    return torch.cat(resized, dim=1)


@dataclass(frozen=True)
class Segmentation:
    """Labels (H, W) int64, divergence (H, W) between the members, 0 where they agree, and one number per image."""

    labels: Tensor
    divergence: Tensor
    uncertainty: float  # mean of the highest tenth of the divergences


class PixelEnsemble(nn.ModuleList):
    """Several `PixelClassifier`s that vote; state names start with the number of the member."""

    @classmethod
    def untrained(cls, channels: int, classes: int, *, members: int = 10) -> PixelEnsemble:
        """Members with the published initial weights N(0, 0.02); seeds come with `fit_pixels`."""
        return cls([PixelClassifier(channels, classes) for _ in range(members)])

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, D) -> (members, N, K)."""
        return torch.stack([member(pixels) for member in self])

    @torch.no_grad()
    def segment(self, features: Tensor) -> Segmentation:
        """Label every pixel of one image from its features (D, H, W)."""
        size = features.shape[-2:]
        logits = self.logits(features.flatten(1).T)
        labels = logits.argmax(2).mode(0).values
        # Jensen-Shannon: entropy of the mean minus mean of the entropies
        divergence = _entropy(logits.softmax(2).mean(0)) - _entropy(logits.softmax(2)).mean(0)
        highest = divergence.sort().values[-max(1, len(divergence) // 10) :]
        return Segmentation(labels.view(size), divergence.view(size), float(highest.mean()))


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """How each member is trained; the published values."""

    members: int = 10
    learning_rate: float = 1e-3  # of Adam
    batch_size: int = 64  # pixels
    epochs: int = 100  # at most
    patience: int = 50  # batches without a lower loss after which a member is done, from epoch `patience_from` on
    patience_from: int = 4
    seed: int = 0
    spread: float = field(default=0.02)  # standard deviation of the initial weights


def fit_pixels(pixels: Tensor, labels: Tensor, classes: int, settings: PixelSettings | None = None) -> PixelEnsemble:
    """Train an ensemble on pixels (N, D) with labels (N,) in 0..classes - 1. Members differ in their seed.

    Raises:
        ValueError: there are fewer than two pixels, or a label outside the classes.
    """
    settings = settings or PixelSettings()
    if len(pixels) < 2 or len(pixels) != len(labels):
        raise ValueError(f"at least two labelled pixels are needed, got {len(pixels)} with {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    ensemble = PixelEnsemble.untrained(pixels.shape[1], classes, members=settings.members)
    for number, member in enumerate(ensemble):
        _fit_member(member, pixels, labels, settings, number)
    return ensemble.eval()


def _fit_member(member: nn.Module, pixels: Tensor, labels: Tensor, settings: PixelSettings, number: int) -> None:
    generator = step_generator(settings.seed, number)
    with torch.no_grad():
        for name, parameter in member.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, settings.spread, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    optimiser = torch.optim.Adam(member.parameters(), lr=settings.learning_rate)
    lowest, since = float("inf"), 0
    member.train()
    for epoch in range(settings.epochs):
        for batch in torch.randperm(len(pixels), generator=generator).split(settings.batch_size):
            if len(batch) < 2:  # batch norm has no statistics of one pixel
                continue
            loss = F.cross_entropy(member(pixels[batch].float()), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            lowest, since = (loss.item(), 0) if loss.item() < lowest else (lowest, since + 1)
            if epoch >= settings.patience_from and since > settings.patience:
                return
