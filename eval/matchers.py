"""What correspondence benchmarks compare: functions that carry points from one view to another.

A benchmark extracts features once per image and hands both views of a pair to every matcher. The baselines
here use no network: the same position, the same place in the object's box, and patches of raw colours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import Grid
from diffrep.features import FeatureMaps, extract_each
from diffrep.fusion import Fusion, fuse
from diffrep.images import Placement
from diffrep.matching import MatchConfig, match_points
from diffrep.recipes import Correspondence, alone
from diffrep.settings import check


@dataclass(frozen=True)
class View:
    """One image of a pair, with the features that were read from it."""

    image: np.ndarray  # (H, W, 3) uint8
    box: tuple[float, float, float, float]  # of the object: x0, y0, x1, y1 in pixels
    features: Mapping[str, FeatureMaps] = field(default_factory=dict)  # extractor -> features, batch of one

    @classmethod
    def of(cls, image: np.ndarray, box: Iterable[float]) -> View:
        """A view without features; `box` as x0, y0, x1, y1."""
        x0, y0, x1, y1 = map(float, box)
        return cls(image, (x0, y0, x1, y1))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)"""
        return self.image.shape[0], self.image.shape[1]


Extractor: TypeAlias = Callable[[Sequence[np.ndarray]], Sequence[FeatureMaps]]
"""Images (H, W, 3) uint8 -> their features, one batch of one per image."""

Matcher: TypeAlias = Callable[[View, View, Tensor], Tensor]
"""(source, target, points (N, 2) of the source) -> points (N, 2) of the target, both (x, y) in pixels."""


def describe(
    views: Sequence[View], extractors: Mapping[str, Extractor], described: dict[str, Mapping[str, object]]
) -> list[View]:
    """The views with their features; each extractor is given every image once, its settings go into `described`."""
    read = {name: list(extract([view.image for view in views])) for name, extract in extractors.items()}
    described |= {name: maps[0].settings for name, maps in read.items()}
    return [replace(view, features={name: maps[i] for name, maps in read.items()}) for i, view in enumerate(views)]


FUSED = " + "  # between the parts in the name of a fused matcher


def same_position(source: View, target: View, points: Tensor) -> Tensor:
    """The same place in the frame: what a matcher gets for knowing nothing but the layout of photographs."""
    scale = points.new_tensor([target.size[1] / source.size[1], target.size[0] / source.size[0]])
    return (points + 0.5) * scale - 0.5


def same_place_in_box(source: View, target: View, points: Tensor) -> Tensor:
    """The same place in the object's box. An oracle: it is given both true boxes."""
    (a, b) = (points.new_tensor(view.box).reshape(2, 2) for view in (source, target))
    return (points - a[0]) / (a[1] - a[0]).clamp(min=1) * (b[1] - b[0]) + b[0]


@dataclass(frozen=True)
class FeatureMatcher:
    """Fuses the features of both views and finds each point's best place in the target."""

    extractors: tuple[str, ...]
    fusion: Fusion
    matching: MatchConfig = MatchConfig()  # noqa: RUF009  # frozen

    def __call__(self, source: View, target: View, points: Tensor) -> Tensor:
        a, b = fuse([self._features(view) for view in (source, target)], self.fusion)
        return match_points(a, b, points, self.matching).points.cpu()

    def stride(self, view: View) -> float:
        """Image pixels between neighbouring cells of the fused map, along the coarser axis."""
        (descriptors,) = fuse([self._features(view)], self.fusion)
        cells = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        first, second = descriptors.points(cells)
        return float((second - first).max())

    def _features(self, view: View) -> list[FeatureMaps]:
        return [view.features[name] for name in self.extractors]


@dataclass(frozen=True)
class ColourPatches:
    """An extractor without a network: the raw colours of square patches, in [-1, 1], as one long vector."""

    side: int = 17  # pixels, odd
    stride: int = 4  # pixels between the centres of neighbouring patches

    def __post_init__(self) -> None:
        check(self, side="1..", stride="1..")
        if self.side % 2 == 0:
            raise ValueError(f"side must be odd, got {self.side}")

    def __call__(self, images: Sequence[np.ndarray]) -> list[FeatureMaps]:
        return [self._describe(image) for image in images]

    def _describe(self, image: np.ndarray) -> FeatureMaps:
        size, first, margin = image.shape[:2], self.stride // 2, self.side // 2
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        padded = F.pad(pixels, (margin,) * 4, mode="replicate")[..., first:, first:]
        rows, columns = ((side - first - 1) // self.stride + 1 for side in size)
        patches = F.unfold(padded, self.side, stride=self.stride)
        maps = patches.view(1, -1, rows, columns)
        grid = Grid(origin=(float(first), float(first)), stride=(float(self.stride), float(self.stride)))
        placement = Placement.identity((size[0], size[1]))
        return FeatureMaps({"patch": maps}, (placement,), {"patch": grid}, {"patch": self.side})


def baselines(*, box: bool) -> tuple[dict[str, Matcher], dict[str, Extractor]]:
    """Matchers without a network, by name, and the extractors that they need; `box`: views have an object."""
    patches = FeatureMatcher(("colours",), Fusion.of("patch"), MatchConfig(mode="pixel"))
    oracle: dict[str, Matcher] = {"same place in the box (oracle)": same_place_in_box} if box else {}
    matchers: dict[str, Matcher] = {"same position": same_position, **oracle, "colour patches": patches}
    return matchers, {"colours": ColourPatches()}


def matchers_of(correspondence: Correspondence) -> tuple[dict[str, Matcher], dict[str, Extractor]]:
    """Each backbone of a recipe alone and, where there are several, all of them fused.

    Returns:
        Matchers and extractors by name: a backbone's name is both; the fused one joins them with `FUSED`.
    """
    recipe = correspondence.recipe
    names = [reading.backbone for reading in recipe.readings]
    extractors: dict[str, Extractor] = {}
    matchers: dict[str, Matcher] = {}
    for number, (name, backbone) in enumerate(zip(names, correspondence.backbones, strict=True)):
        config = recipe.readings[number].extract
        extractors[name] = lambda images, b=backbone, c=config: list(extract_each(b, images, c))  # type: ignore[misc]
        single = recipe if len(names) == 1 else alone(recipe, number, name)
        matchers[name] = FeatureMatcher((name,), single.fusion, recipe.matching)
    if len(names) > 1:
        matchers[FUSED.join(names)] = FeatureMatcher(tuple(names), recipe.fusion, recipe.matching)
    return matchers, extractors
