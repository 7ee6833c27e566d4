"""Few-shot segmentation as a probe: a few labelled images teach the classes of pixels (DDPM-seg, arXiv 2112.03126)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffrep.backbones import Backbone
from diffrep.draw import point_colours
from diffrep.features import ExtractConfig, FeatureMaps
from diffrep.features import extract as extract_maps
from diffrep.heads.probes.annotated import IGNORED
from diffrep.heads.probes.grid import SEED
from diffrep.heads.probes.probe import MapProbe, SavedKind, uncover
from diffrep.heads.probes.training import ProbeRecipe, train_recipe
from diffrep.images import ImageLike, load_image
from diffrep.results import Result
from diffrep.settings import NOT_NEGATIVE, POSITIVE, check
from diffrep.store.manifest import provenance
from diffrep.training.loop import step_generator

LEAST_PIXELS = 20  # a class that has fewer in an image is left out of it, as published
MOST_MEMBERS = 1000
FEW_CLASSES = 30  # below, the classifier is narrower
Upsampling: TypeAlias = Literal["bilinear", "bicubic", "nearest", "nearest-exact", "area"]


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """How maps are brought to the size of the image, as `torch.nn.functional.interpolate` does it."""

    upsampling: Upsampling = "bilinear"  # published
    align_corners: bool = False  # bilinear, bicubic: the centres of the corner cells lie on those of the corner pixels

    def __post_init__(self) -> None:
        check(self)
        if self.align_corners and self.upsampling not in ("bilinear", "bicubic"):
            raise ValueError(f"align_corners goes with bilinear and bicubic, not with {self.upsampling}")

    def __call__(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W) float32."""
        aligned = self.align_corners if self.upsampling in ("bilinear", "bicubic") else None
        return F.interpolate(maps.float(), size=size, mode=self.upsampling, align_corners=aligned)


def pixel_features(maps: Sequence[Tensor], size: tuple[int, int], resizing: Resizing | None = None) -> Tensor:
    """Maps (B, C_i, h, w), in the order of noise levels then blocks, brought to one size -> (B, sum C_i, H, W)."""
    resize = resizing or Resizing()
    return torch.cat([resize(m, size) for m in maps], dim=1)


class PixelClassifier(nn.Module):
    """Linear, ReLU, batch norm twice, then a linear layer: D-128-32-K, or D-256-128-K from 30 classes on."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        first, second = (128, 32) if classes < FEW_CLASSES else (256, 128)
        layers: list[nn.Module] = []
        for before, after in ((channels, first), (first, second)):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.BatchNorm1d(after)]
        self.layers = nn.Sequential(*layers, nn.Linear(second, classes))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, D) -> logits (N, K)."""
        return self.layers(pixels)


@dataclass(frozen=True, repr=False)
class PixelLabelling(Result):
    """What an ensemble says of an image's pixels.

    Attributes:
        labels: (H, W) int64.
        divergence: (H, W) Jensen-Shannon divergence between the members, 0 where they agree.
        uncertainty: mean of the highest tenth of the divergences.
        classes: how many there are.
    """

    MAIN = "labels"

    labels: Tensor
    divergence: Tensor
    uncertainty: float
    classes: int

    def picture(self) -> Image.Image:
        """Labels as a palette picture: the value of a pixel is its class; class 0 is black."""
        picture = Image.fromarray(self.labels.numpy().astype(np.uint8))
        colours = point_colours(self.classes - 1)
        picture.putpalette([0, 0, 0, *(level for colour in colours for level in colour)])
        return picture


class PixelEnsemble(nn.ModuleList):
    """Several `PixelClassifier`s that vote; state names start with the number of the member."""

    @classmethod
    def untrained(cls, channels: int, classes: int, *, members: int = 10) -> PixelEnsemble:
        """Members with the published initial weights N(0, 0.02); seeds come with `fit_pixels`.

        Raises:
            ValueError: more members than `MOST_MEMBERS`, or none.
        """
        if not 1 <= members <= MOST_MEMBERS:
            raise ValueError(f"an ensemble has 1 to {MOST_MEMBERS} members, got {members}")
        return cls([PixelClassifier(channels, classes) for _ in range(members)])

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, D) -> (members, N, K)."""
        return torch.stack([member(pixels) for member in self])

    @torch.no_grad()
    def segment(self, features: Tensor) -> PixelLabelling:
        """Label every pixel of one image from its features (D, H, W)."""
        size = features.shape[-2:]
        logits = self.logits(features.flatten(1).T)
        labels = logits.argmax(2).mode(0).values
        # Jensen-Shannon: entropy of the mean minus mean of the entropies
        divergence = _entropy(logits.softmax(2).mean(0)) - _entropy(logits.softmax(2)).mean(0)
        highest = divergence.sort().values[-max(1, len(divergence) // 10) :]
        return PixelLabelling(labels.view(size), divergence.view(size), float(highest.mean()), logits.shape[2])


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
    spread: float = 0.02  # standard deviation of the initial weights

    def __post_init__(self) -> None:
        positive = ("members", "learning_rate", "batch_size", "epochs", "spread")
        check(self, **dict.fromkeys(positive, POSITIVE), patience=NOT_NEGATIVE, patience_from=NOT_NEGATIVE, seed=SEED)


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
        _fit_member(member, pixels, labels, settings, step_generator(settings.seed, number))
    return ensemble.eval()


def _fit_member(
    member: nn.Module, pixels: Tensor, labels: Tensor, settings: PixelSettings, generator: torch.Generator
) -> None:
    with torch.no_grad():
        for name, parameter in member.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, settings.spread, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    lowest, since = float("inf"), 0

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for some in torch.randperm(len(pixels), generator=generator).split(settings.batch_size):
            if len(some) > 1:  # batch norm has no statistics of one pixel
                yield pixels[some].float(), labels[some]

    def done(epoch: int, loss: float) -> bool:
        nonlocal lowest, since
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
        return epoch >= settings.patience_from and since > settings.patience

    recipe = ProbeRecipe(optimiser="adam", learning_rate=settings.learning_rate, epochs=settings.epochs, gamma=1.0)
    train_recipe(member, batches, recipe, done=done)


@dataclass(frozen=True, repr=False, kw_only=True)
class PixelProbe(MapProbe):
    """An ensemble of pixel classifiers: `PixelLabelling` of images.

    Attributes:
        classes: names of the K classes.
        timesteps: noise levels; the maps of all taps of the first come first, with one noise for all images.
        members: of the ensemble.
        channels: of all maps together.
        resizing: of the maps to the image.
    """

    KIND: ClassVar[SavedKind] = "pixels"

    classes: tuple[str, ...]
    timesteps: tuple[int, ...]
    members: int
    channels: int
    resizing: Resizing = field(default_factory=Resizing)

    @property
    def noise_levels(self) -> tuple[int, ...]:
        return self.timesteps

    def untrained(self, backbone: Backbone | None = None) -> nn.Module:
        return PixelEnsemble.untrained(self.channels, len(self.classes), members=self.members)

    def summary(self) -> str:
        return f"{len(self.classes)} classes of pixels"

    def answer(self, maps: Sequence[FeatureMaps]) -> PixelLabelling:
        assert isinstance(self.network, PixelEnsemble)
        return self.network.segment(_features(maps, self.resizing))

    def segment(self, image: ImageLike, *, backbone: Backbone | None = None, device: str = "auto") -> PixelLabelling:
        """Label every pixel of an image of any size; see `predict_each`."""
        return next(self.predict_each([image], backbone=backbone, device=device))


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
    resizing: Resizing | None = None,
) -> PixelProbe:
    """Train on a few images with labels of their pixels.

    Args:
        examples: image, and its labels (H, W) int64 in 0..K - 1, `IGNORED` where a pixel is not used. A class with
            fewer than `LEAST_PIXELS` pixels in an image is not used there.
        taps: None: as the backbone recommends.
        timesteps: of noise; the published ones on FFHQ and LSUN.
        pixels_per_image: drawn from each image, so that memory does not grow with its size.
        resizing: of the maps to the image.

    Raises:
        ValueError: labels are not of the image's size, or no pixel is labelled.
    """
    settings, resizing = settings or PixelSettings(), resizing or Resizing()
    if not timesteps or pixels_per_image < 1:
        raise ValueError("at least one timestep and one pixel per image are needed")
    config = dataclasses.replace(extract or ExtractConfig(), taps=tuple(taps) if taps else None, timestep=timesteps[0])
    config = config.resolve(backbone)
    columns, targets = [], []
    for number, (image, labels) in enumerate(examples):
        picture = load_image(image)
        size = (picture.height, picture.width)
        if tuple(labels.shape) != size:
            raise ValueError(f"labels of image {number} must be {size}, as the image is, got {tuple(labels.shape)}")
        numbers, counts = labels.unique(return_counts=True)
        enough = numbers[(counts >= LEAST_PIXELS) & (numbers != IGNORED)]
        used = torch.isin(labels.flatten(), enough).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(settings.seed * 0x9E3779B9 + number)
        used = used[torch.randperm(len(used), generator=generator)[:pixels_per_image]]
        maps = [extract_maps(backbone, [picture], dataclasses.replace(config, timestep=t)) for t in timesteps]
        columns.append(_features(maps, resizing).flatten(1).T[used])
        targets.append(labels.flatten()[used])
    if not sum(map(len, targets)):
        raise ValueError("no pixel of the examples is labelled")
    pixels, truth = torch.cat(columns), torch.cat(targets)
    return PixelProbe(
        network=fit_pixels(pixels, truth, len(classes), settings),
        features={backbone.name: provenance(backbone, config)},
        classes=tuple(classes),
        timesteps=tuple(timesteps),
        members=settings.members,
        channels=pixels.shape[1],
        resizing=resizing,
    )


def _features(maps: Sequence[FeatureMaps], resizing: Resizing) -> Tensor:
    """(D, H, W) of one image in its own pixels, from its maps at each noise level; padding is cut away."""
    pieces = []
    for of_image in maps:
        placement, read = of_image.placements[0], [of_image.maps[tap].cpu() for tap in of_image.taps]
        pieces.append(uncover(pixel_features(read, placement.canvas_size, resizing), placement, resizing)[0])
    return torch.cat(pieces)


def shares(result: PixelLabelling, classes: Sequence[str]) -> dict[str, object]:
    """The share of the pixels that each class covers, the largest first, and the uncertainty of the whole."""
    counts = torch.bincount(result.labels.flatten(), minlength=len(classes))
    ordered = sorted(zip(classes, (counts / counts.sum()).tolist(), strict=True), key=lambda pair: -pair[1])
    return {
        "classes": list(classes),
        "shares": {name: round(share, 6) for name, share in ordered if share > 0},
        "uncertainty": round(result.uncertainty, 6),
    }
