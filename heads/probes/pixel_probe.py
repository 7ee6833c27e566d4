"""Few-shot segmentation as a probe: a few labelled images teach the classes of pixels (DDPM-seg, arXiv 2112.03126)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffrep.backbones import Backbone
from diffrep.features import ExtractConfig
from diffrep.features import extract as extract_maps
from diffrep.files import save_weights, write_whole
from diffrep.heads.probes.probe import OneBackbone
from diffrep.images import ImageLike, load_image
from diffrep.store.manifest import extract_config, provenance
from diffrep.training.loop import step_generator

FORMAT, VERSION = "diffrep-pixel-probe", 1
ABOUT, _WEIGHTS = "pixel_probe.json", "pixel_probe.safetensors"
IGNORED = -1  # label of pixels that are not used
LEAST_PIXELS = 20  # a class that has fewer in an image is left out of it, as published


@dataclass(frozen=True)
class PixelProbe(OneBackbone):
    """An ensemble of pixel classifiers with how its features are read.

    Attributes:
        classes: names of the K classes.
        timesteps: noise levels; the maps of all taps of the first come first.
        features: provenance; its taps are read at every timestep, with one noise for all images.
        about: how it was trained and what it scored, JSON-ready.
    """

    ensemble: PixelEnsemble
    classes: tuple[str, ...]
    timesteps: tuple[int, ...]
    features: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    def segment(self, image: ImageLike, *, backbone: Backbone | None = None, device: str = "cpu") -> Segmentation:
        """Label every pixel of an image of any size; see `segment_each`."""
        return next(self.segment_each([image], backbone=backbone, device=device))

    def segment_each(
        self,
        images: Iterable[ImageLike],
        *,
        backbone: Backbone | None = None,
        checked: bool = False,
        device: str = "cpu",
    ) -> Iterator[Segmentation]:
        """Label every pixel of images of any sizes, one after the other.

        Args:
            checked: the backbone has been through `check` already.

        Raises:
            ImageError: an image cannot be read.
            ValueError: the backbone is not the one the probe was trained on.
        """
        if backbone is None:
            backbone = self.load_own(device)
        if not checked:
            self.check(backbone)
        for image in images:
            yield self.ensemble.segment(_features(backbone, image, extract_config(self.features), self.timesteps))

    def save(self, folder: str | Path) -> None:
        """Write ``pixel_probe.json`` and ``pixel_probe.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v for k, v in self.ensemble.state_dict().items() if not k.endswith("num_batches_tracked")}
        save_weights(folder / _WEIGHTS, state)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "classes": list(self.classes),
            "timesteps": list(self.timesteps),
            "members": len(self.ensemble),
            "channels": int(state["0.layers.0.weight"].shape[1]),
            "features": dict(self.features),
            "about": dict(self.about),
        }
        write_whole(folder / ABOUT, json.dumps(document, indent=1).encode() + b"\n")


def load_pixel_probe(folder: str | Path) -> PixelProbe:
    """Read a probe that `PixelProbe.save` wrote.

    Raises:
        ValueError: the folder holds none, or one that is damaged.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{folder}: holds no pixel probe (no {ABOUT})")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        classes = tuple(about["classes"])
        ensemble = PixelEnsemble.untrained(about["channels"], len(classes), members=about["members"])
        tracked = {k: v for k, v in ensemble.state_dict().items() if k.endswith("num_batches_tracked")}
        ensemble.load_state_dict(load_file(folder / _WEIGHTS) | tracked)
        made = about.get("about", {})
        return PixelProbe(ensemble.eval(), classes, tuple(about["timesteps"]), about["features"], made)
    except (KeyError, TypeError, RuntimeError, OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: the probe cannot be read ({' '.join(str(error).split())[:300]})") from None


def train_pixel_probe(
    examples: Iterable[tuple[ImageLike, Tensor]],
    classes: Sequence[str],
    backbone: Backbone,
    *,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] = (50, 150, 250),
    pixels_per_image: int = 4096,
    extract: ExtractConfig | None = None,
    settings: PixelSettings | None = None,
) -> PixelProbe:
    """Train on a few images with labels of their pixels.

    Args:
        examples: image, and its labels (H, W) int64 in 0..K - 1, `IGNORED` where a pixel is not used. A class with
            fewer than `LEAST_PIXELS` pixels in an image is not used there.
        taps: None: as the backbone recommends.
        timesteps: of noise; the published ones on FFHQ and LSUN.
        pixels_per_image: drawn from each image, so that memory does not grow with its size.

    Raises:
        ValueError: labels are not of the image's size, or no pixel is labelled.
    """
    settings = settings or PixelSettings()
    config = dataclasses.replace(extract or ExtractConfig(), taps=tuple(taps) if taps else None, timestep=timesteps[0])
    config = config.resolve(backbone)
    columns, targets = [], []
    for number, (image, labels) in enumerate(examples):
        picture = load_image(image)
        if tuple(labels.shape) != (picture.height, picture.width):
            size = (picture.height, picture.width)
            raise ValueError(f"labels of image {number} must be {size}, as the image is, got {tuple(labels.shape)}")
        used = _used(labels.flatten()).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(settings.seed * 0x9E3779B9 + number)
        used = used[torch.randperm(len(used), generator=generator)[:pixels_per_image]]
        columns.append(_features(backbone, picture, config, timesteps).flatten(1).T[used])
        targets.append(labels.flatten()[used])
    if not targets or not sum(map(len, targets)):
        raise ValueError("no pixel of the examples is labelled")
    ensemble = fit_pixels(torch.cat(columns), torch.cat(targets), len(classes), settings)
    return PixelProbe(ensemble, tuple(classes), tuple(timesteps), provenance(backbone, config))


def _used(labels: Tensor) -> Tensor:
    """(N,) bool: the pixels that are labelled, with a class that has enough of them."""
    numbers, counts = labels.unique(return_counts=True)
    return torch.isin(labels, numbers[(counts >= LEAST_PIXELS) & (numbers != IGNORED)])


def _features(backbone: Backbone, image: ImageLike, config: ExtractConfig, timesteps: Sequence[int]) -> Tensor:
    """(D, H, W) in the image's own pixels, padding cut away."""
    return torch.cat(list(_each_timestep(backbone, image, config, timesteps)))


def _each_timestep(
    backbone: Backbone, image: ImageLike, config: ExtractConfig, timesteps: Sequence[int]
) -> Iterator[Tensor]:
    for timestep in timesteps:
        maps = extract_maps(backbone, [image], dataclasses.replace(config, timestep=timestep))
        placement = maps.placements[0]
        whole = pixel_features([maps.maps[tap].cpu() for tap in maps.taps], placement.canvas_size)
        x0, y0, x1, y1 = (round(edge) for edge in placement.content_box)
        height, width = placement.image_size
        yield pixel_features([whole[..., y0:y1, x0:x1]], (height, width))[0]


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
