"""Recipes: how a published system goes from two images to matches, as data.

A `Recipe` names the backbones, how each reads an image, how their maps are fused and how descriptors are
matched. `Correspondence` runs one: it holds the loaded backbones and gives descriptors and matches.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffrep.backbones import Backbone, load_backbone
from diffrep.features import ExtractConfig, FeatureMaps, extract_each
from diffrep.fusion import Descriptors, Fusion, Part, fuse
from diffrep.images import ImageLike
from diffrep.matching import DenseMatches, Matches, MatchConfig, match_dense, match_points


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One backbone and how it reads an image."""

    backbone: str  # what `load_backbone` takes
    extract: ExtractConfig = field(default_factory=ExtractConfig)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """From two images to matches."""

    name: str
    readings: tuple[Reading, ...]
    fusion: Fusion
    matching: MatchConfig = field(default_factory=MatchConfig)
    source: str = ""  # paper and code that it follows


RECIPES: dict[str, Recipe] = {}


def recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        ValueError: there is no such recipe; the message lists the near names.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=4) or sorted(RECIPES)
        raise ValueError(f"there is no recipe {name!r}; near names: {', '.join(near)}")
    return RECIPES[name]


class Correspondence:
    """A recipe with its backbones loaded.

    Args:
        recipe: a recipe or its name.
        device, dtype: of the backbones; as `load_backbone` has them.
        backbones: loaded ones to use, by the name that the recipe gives them.
    """

    def __init__(
        self,
        recipe_or_name: Recipe | str = "tiny",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        backbones: Mapping[str, Backbone] | None = None,
    ) -> None:
        self.recipe = recipe(recipe_or_name) if isinstance(recipe_or_name, str) else recipe_or_name
        given = dict(backbones or {})
        self.backbones = [
            given.get(r.backbone) or load_backbone(r.backbone, device=device, dtype=dtype)
            for r in self.recipe.readings
        ]

    def features(
        self, images: Sequence[ImageLike], *, progress: bool = False
    ) -> Iterator[tuple[FeatureMaps, ...]]:
        """All features of each image, one entry per backbone; every image is read once."""
        streams = [
            extract_each(backbone, images, reading.extract, progress=progress)
            for backbone, reading in zip(self.backbones, self.recipe.readings, strict=True)
        ]
        return zip(*streams, strict=True)

    def describe(self, *images: ImageLike) -> tuple[Descriptors, ...]:
        """Descriptors of images that are compared with each other (a joint PCA sees all of them)."""
        return fuse(list(self.features(images)), self.recipe.fusion)

    def match(
        self, source: ImageLike, target: ImageLike, points: Tensor | Sequence[Sequence[float]]
    ) -> Matches:
        """Where points of one image lie in the other.

        Args:
            points: (N, 2) as (x, y) in pixels of `source`.

        Raises:
            ImageError: an image cannot be read.
            ValueError: a point lies outside of the source.
        """
        a, b = self.describe(source, target)
        return match_points(a, b, torch.as_tensor(points, dtype=torch.float32), self.recipe.matching)

    def match_dense(self, source: ImageLike, target: ImageLike) -> DenseMatches:
        """Where every location of one image lies in the other."""
        a, b = self.describe(source, target)
        return match_dense(a, b, self.recipe.matching)


def reading_of(backbone: Backbone, extract: ExtractConfig, matching: MatchConfig) -> Recipe:
    """A recipe for one backbone, loaded already: its taps side by side, each of unit length."""
    taps = extract.taps or backbone.recommended.taps
    reading = Reading(backbone=backbone.name, extract=replace(extract, taps=tuple(taps)))
    return Recipe(name=backbone.name, readings=(reading,), fusion=Fusion.of(*taps), matching=matching)


def alone(whole: Recipe, number: int, name: str) -> Recipe:
    """The recipe with one of its backbones only."""
    reading = whole.readings[number]
    taps = set(reading.extract.taps or ())
    parts: tuple[Part, ...] = tuple(part for part in whole.fusion.parts if set(part.taps) <= taps)
    return replace(
        whole, name=name, readings=(reading,), fusion=replace(whole.fusion, parts=parts, reference=None)
    )
