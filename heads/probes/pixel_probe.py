"""Few-shot segmentation as a probe: a few labelled images teach the classes of pixels (DDPM-seg, arXiv 2112.03126)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffrep.backbones import Backbone
from diffrep.draw import point_colours
from diffrep.features import ExtractConfig
from diffrep.features import extract as extract_maps
from diffrep.heads.probes.recipe import ProbeRecipe, check_settings, train_recipe
from diffrep.heads.probes.saved import OneBackboneProbe, SavedKind, as_list
from diffrep.images import ImageLike, load_image
from diffrep.results import Result
from diffrep.store.manifest import extract_config, provenance
from diffrep.training.loop import step_generator

IGNORED = -1  # label of pixels that are not used
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
        if self.upsampling not in get_args(Upsampling):
            raise ValueError(f"upsampling must be {', '.join(get_args(Upsampling))}, got {self.upsampling!r}")
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
        check_settings(
            self,
            positive=("members", "learning_rate", "batch_size", "epochs", "spread"),
            not_negative=("patience", "patience_from", "seed"),
        )


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


@dataclass(frozen=True, repr=False)
class PixelProbe(OneBackboneProbe):
    """An ensemble of pixel classifiers with how its features are read.

    Attributes:
        classes: names of the K classes.
        timesteps: noise levels; the maps of all taps of the first come first.
        features: provenance; its taps are read at every timestep, with one noise for all images.
        about: how it was trained and what it scored, JSON-ready.
        resizing: of the maps to the image.
    """

    KIND: ClassVar[SavedKind] = "pixels"

    ensemble: PixelEnsemble
    classes: tuple[str, ...]
    timesteps: tuple[int, ...]
    features: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    resizing: Resizing = field(default_factory=Resizing)

    @property
    def network(self) -> nn.Module:
        """The same as `ensemble`."""
        return self.ensemble

    def document(self) -> dict[str, Any]:
        """Classes, timesteps, and the shapes of the ensemble."""
        return {
            "classes": list(self.classes),
            "timesteps": list(self.timesteps),
            "members": len(self.ensemble),
            "channels": int(self.ensemble.get_parameter("0.layers.0.weight").shape[1]),
            "resizing": asdict(self.resizing),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], backbone: Backbone | None) -> Self:
        """An ensemble of the document's shapes."""
        classes = tuple(map(str, document["classes"]))
        ensemble = PixelEnsemble.untrained(document["channels"], len(classes), members=document["members"])
        ((_, features),) = document["features"].items()
        timesteps, resizing = tuple(map(int, document["timesteps"])), Resizing(**document.get("resizing", {}))
        return cls(ensemble, classes, timesteps, features, document["about"], resizing)

    def summary(self) -> str:
        """How many classes it tells apart."""
        return f"{len(self.classes)} classes of pixels"

    def predict(
        self, images: Iterable[ImageLike], *, backbone: Backbone | None = None, device: str = "auto"
    ) -> list[PixelLabelling]:
        """Label every pixel of images of any sizes; see `segment_each`."""
        return list(self.segment_each(images, backbone=backbone, device=device))

    def segment(self, image: ImageLike, *, backbone: Backbone | None = None, device: str = "auto") -> PixelLabelling:
        """Label every pixel of an image of any size; see `segment_each`."""
        return next(self.segment_each([image], backbone=backbone, device=device))

    def segment_each(
        self,
        images: Iterable[ImageLike],
        *,
        backbone: Backbone | None = None,
        checked: bool = False,
        device: str = "auto",
    ) -> Iterator[PixelLabelling]:
        """Label every pixel of images of any sizes, one after the other.

        Args:
            checked: the backbone has been through `check` already.

        Raises:
            ImageError: an image cannot be read.
            ValueError: the backbone is not the one the probe was trained on.
        """
        backbone, config = self.usable(backbone, device, checked=checked), extract_config(self.features)
        for image in as_list(images):
            yield self.ensemble.segment(_features(backbone, image, config, self.timesteps, self.resizing))


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
        if tuple(labels.shape) != (picture.height, picture.width):
            size = (picture.height, picture.width)
            raise ValueError(f"labels of image {number} must be {size}, as the image is, got {tuple(labels.shape)}")
        used = _used(labels.flatten()).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(settings.seed * 0x9E3779B9 + number)
        used = used[torch.randperm(len(used), generator=generator)[:pixels_per_image]]
        columns.append(_features(backbone, picture, config, timesteps, resizing).flatten(1).T[used])
        targets.append(labels.flatten()[used])
    if not targets or not sum(map(len, targets)):
        raise ValueError("no pixel of the examples is labelled")
    ensemble = fit_pixels(torch.cat(columns), torch.cat(targets), len(classes), settings)
    features = provenance(backbone, config)
    return PixelProbe(ensemble, tuple(classes), tuple(timesteps), features, resizing=resizing)


def _used(labels: Tensor) -> Tensor:
    """(N,) bool: the pixels that are labelled, with a class that has enough of them."""
    numbers, counts = labels.unique(return_counts=True)
    return torch.isin(labels, numbers[(counts >= LEAST_PIXELS) & (numbers != IGNORED)])


def _features(
    backbone: Backbone, image: ImageLike, config: ExtractConfig, timesteps: Sequence[int], resizing: Resizing
) -> Tensor:
    """(D, H, W) in the image's own pixels, padding cut away."""
    pieces = []
    for timestep in timesteps:
        maps = extract_maps(backbone, [image], dataclasses.replace(config, timestep=timestep))
        placement = maps.placements[0]
        whole = pixel_features([maps.maps[tap].cpu() for tap in maps.taps], placement.canvas_size, resizing)
        x0, y0, x1, y1 = (round(edge) for edge in placement.content_box)
        pieces.append(pixel_features([whole[..., y0:y1, x0:x1]], placement.image_size, resizing)[0])
    return torch.cat(pieces)
