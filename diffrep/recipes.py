"""Recipes: how a published system goes from two images to matches, as data.

A `Recipe` names the backbones, how each reads an image, how their maps are fused and how descriptors are
matched. `Correspondence` runs one: it holds the loaded backbones and gives descriptors and matches.

Published systems stand in ``recipes.toml``; `RECIPES` has them by name. Those with trained weights beside the backbone
take them behind a colon, "geoaware:best.pth" or "hyperfeatures:FILE". `with_backbones` puts models of one's own into a
recipe. A recipe of one's own is a `Recipe`, or a TOML or YAML file with the same fields:

    name = "mine"

    [[readings]]
    backbone = "sd2.1"
    extract = {taps = ["up.1"], timestep = 261, sizing = {mode = "squash", size = 768}}

    [[fusion.parts]]
    taps = ["up.1"]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from diffrep.backbones import Backbone, load_backbone
from diffrep.features import Descriptors, ExtractConfig, FeatureMaps, extract_each
from diffrep.files import one_line, read_settings
from diffrep.fusion import SD_TAPS, Fusion, Part, aggregated, fuse
from diffrep.images import ImageLike, Sizing, load_image
from diffrep.matching import DenseMatches, MatchConfig, Matches, match_dense, match_points
from diffrep.settings import check, check_keys, near_names

FILE_ENDINGS = (".toml", ".yaml", ".yml")
CATEGORY = "{category}"  # in a prompt: stands for the name of the image's category; without one the prompt is ""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One backbone and how it reads an image."""

    backbone: str  # what `load_backbone` takes
    extract: ExtractConfig = field(default_factory=ExtractConfig)

    def __post_init__(self) -> None:
        check(self)

    @property
    def role(self) -> str:
        """ "vit" where it reads layers of a vision transformer, else "diffusion"."""
        return "vit" if all(tap.startswith("layer.") for tap in self.extract.taps or ()) else "diffusion"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """From two images to matches."""

    name: str
    readings: tuple[Reading, ...]
    fusion: Fusion
    matching: MatchConfig = field(default_factory=MatchConfig)
    source: str = ""  # paper and code that it follows

    def __post_init__(self) -> None:
        check(self)

    def __str__(self) -> str:
        return f"{self.name}: {' + '.join(reading.backbone for reading in self.readings)}. {self.source}"


def recipe(name: str) -> Recipe:
    """A recipe by its name, or from a TOML or YAML file.

    Args:
        name: of `RECIPES`; "geoaware:FILE" and "hyperfeatures:FILE" name the trained aggregation network too.

    Raises:
        ValueError: there is no such recipe (the message lists the near names), or the file is none.
    """
    if not isinstance(name, str):
        raise ValueError(f"a recipe is named by text, got {type(name).__name__}")
    if name.endswith(FILE_ENDINGS):
        return load_recipe(Path(name))
    known, _, weights = name.partition(":")
    if known not in RECIPES:
        raise ValueError(f"there is no recipe {known!r}; {near_names(known, RECIPES, sorted(RECIPES))}")
    if not weights:
        return RECIPES[known]
    if known not in TRAINED:
        raise ValueError(f"{name}: the recipe {known} takes no trained weights; {', '.join(TRAINED)} do")
    return TRAINED[known](weights)


def _geoaware_trained(weights: str) -> Recipe:
    zero_shot = RECIPES["geoaware"]
    return replace(
        zero_shot,
        name=f"geoaware:{weights}",
        fusion=aggregated((*reversed(SD_TAPS), "layer.11"), weights),
        matching=replace(zero_shot.matching, window=7),
        source=zero_shot.source.replace("zero-shot", "trained"),
    )


def _hyperfeatures_trained(weights: str) -> Recipe:
    untrained, name = RECIPES["hyperfeatures"], f"hyperfeatures:{weights}"
    return replace(untrained, name=name, readings=tuple(replace(r, backbone=name) for r in untrained.readings))


TRAINED: dict[str, Callable[[str], Recipe]] = {  # name -> its recipe with the weights of a file
    "geoaware": _geoaware_trained,
    "hyperfeatures": _hyperfeatures_trained,
}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML (``.toml``) or YAML file (``.yaml``, ``.yml``).

    Raises:
        ValueError: the file is missing, no TOML or YAML, or has a setting that does not exist; named.
    """
    value = read_settings(path)
    try:
        loaded: Recipe = _built(Recipe, value, "")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return loaded


def _built(kind: Any, value: Any, where: str) -> Any:
    """Tables and lists of TOML or YAML as the dataclasses and tuples of a field's type, which check themselves.

    `where` names the field in messages.
    """
    if get_origin(kind) in (Union, UnionType):  # of the types at most one is a dataclass and one a tuple
        parts: list[Any] = list(get_args(kind))
        fitting = [p for p in parts if (is_dataclass(p) if isinstance(value, dict) else get_origin(p) is tuple)]
        return _built(fitting[0], value, where) if fitting else value
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_built(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if not is_dataclass(kind):
        return float(value) if kind is float and type(value) is int else value
    name = getattr(kind, "__name__", "")
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} must be a table of the settings of {name}, got {value!r}")
    check_keys(kind, value, where or name)  # type: ignore[arg-type]  # a class
    hints = get_type_hints(kind)
    values = {key: _built(hints[key], item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    try:
        return kind(**values)  # type: ignore[operator]  # a class
    except ValueError as error:
        raise ValueError(f"{where}.{error}".lstrip(".")) from None


def with_backbones(
    whole: Recipe,
    models: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Recipe, dict[str, Backbone]]:
    """Put other models in the place of a recipe's backbones.

    Args:
        models: each a name, folder or hub id as `load_backbone` takes it, or "ROLE=MODEL". A role is a backbone's name
            in the recipe, or "diffusion" or "vit". Without one, a model takes the place of the one backbone whose taps
            it has.
        device, dtype: of the models.

    Returns:
        The recipe, and the models that were loaded by the name that it now gives them.

    Raises:
        ValueError: there is no such role, it is not clear which backbone is meant, or the model cannot be read as the
            recipe reads its backbone; the message says why.
        BackboneError: a model cannot be loaded.
    """
    readings, loaded, taken = list(whole.readings), {}, set()
    names = [(reading.role, reading.backbone) for reading in readings]  # of the roles
    known = ", ".join(dict.fromkeys(name for pair in names for name in pair))
    for text in models:
        role, _, model = text.partition("=")
        if not model or not any(role in pair for pair in names):
            if model and role.isidentifier() and not Path(text).exists():
                raise ValueError(f"{text}: the recipe {whole.name} has no role {role!r}; it has {known}")
            role, model = "", text
        backbone = load_backbone(model, device=device, dtype=dtype)
        fits = {i: _misfit(whole.readings[i], backbone) for i, pair in enumerate(names) if not role or role in pair}
        possible = [i for i, why in fits.items() if not why]
        if not possible:
            reasons = "; ".join(f"as {whole.readings[i].backbone}: {why}" for i, why in fits.items())
            raise ValueError(f"{model}: does not go with the recipe {whole.name} ({reasons})")
        if len(possible) > 1:
            raise ValueError(f"{model}: say which backbone it replaces, ROLE={model}; roles are {known}")
        (place,) = possible
        if place in taken:
            raise ValueError(f"{model}: another model was given for {whole.readings[place].backbone} already")
        taken.add(place)
        readings[place] = replace(readings[place], backbone=model)
        loaded[model] = backbone
    return replace(whole, readings=tuple(readings)), loaded


def _misfit(reading: Reading, backbone: Backbone) -> str:
    """Why a backbone cannot be read so; nothing where it can."""
    known = {tap.name for tap in backbone.taps()}
    if missing := [tap for tap in reading.extract.taps or () if tap not in known]:
        return f"it has no tap {', '.join(missing)}"
    if reading.extract.posterior is not None and backbone.denoises != "latents":
        return "it is no latent diffusion model"
    if reading.extract.freeu is not None and not backbone.has_unet:
        return "it has no U-Net for FreeU"
    return ""


def with_extraction(whole: Recipe, settings: Mapping[str, Any], size: int | None = None) -> Recipe:
    """Read a recipe's images with some other settings.

    Args:
        settings: of `ExtractConfig`. Those of diffusion (noise, prompt, ...) go to the recipe's diffusion models.
        size: pixels, the long side or the side of the square that the backbone sees.

    Raises:
        ValueError: the recipe's fusion is made for its taps, or several backbones see images of different sizes.
    """
    if "taps" in settings:
        raise ValueError(f"the fusion of the recipe {whole.name} is made for its taps; give a backbone alone instead")
    if ("window" in settings or size is not None) and len(whole.readings) > 1:
        raise ValueError(
            f"size and window: the recipe {whole.name} reads {len(whole.readings)} backbones, each at its size; name"
            " one model without a recipe, or write a recipe file"
        )
    common = {name: value for name, value in settings.items() if name in ("batch_size", "seed", "window")}
    if settings.keys() - common.keys() and all(reading.role == "vit" for reading in whole.readings):
        raise ValueError(f"{', '.join(settings)}: the recipe {whole.name} has no diffusion model to set them for")

    def changed(reading: Reading) -> Reading:
        extract = replace(reading.extract, **(settings if reading.role == "diffusion" else common))
        if size is not None:
            sizing = extract.sizing or Sizing("fit", size, multiple=64)
            extract = replace(extract, sizing=replace(sizing, size=size))
        return replace(reading, extract=extract)

    return replace(whole, readings=tuple(changed(reading) for reading in whole.readings))


class Correspondence:
    """A recipe with its backbones loaded.

        Correspondence("sd2.1-dinov2", diffusion="my-sd", vit="my-dino").match("cat.jpg", "dog.jpg", [(212, 130)])

    Args:
        recipe: a recipe or its name.
        device, dtype: of the backbones; as `load_backbone` has them.
        backbones: loaded ones to use, by the name that the recipe gives them.
        models: names, folders or hub ids in the place of the recipe's backbones, by role: ``diffusion``, ``vit``.

    Raises:
        ValueError: the recipe has no such role, or the model cannot be read as the recipe reads its backbone.
        BackboneError: a model cannot be loaded.
    """

    def __init__(
        self,
        recipe_or_name: Recipe | str = "tiny",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        backbones: Mapping[str, Backbone] | None = None,
        **models: str | os.PathLike[str],
    ) -> None:
        whole = recipe_or_name if isinstance(recipe_or_name, Recipe) else recipe(recipe_or_name)
        texts = [f"{role}={os.fspath(model)}" for role, model in models.items()]
        self.recipe, loaded = with_backbones(whole, texts, device=device, dtype=dtype)
        if not isinstance(backbones, Mapping | None):
            raise ValueError(
                "backbones are loaded ones by the names that the recipe gives them, got"
                f" {type(backbones).__name__}; a model's name goes to its role, diffusion=NAME or vit=NAME"
            )
        loaded |= backbones or {}
        for reading in self.recipe.readings:
            if reading.backbone not in loaded:
                loaded[reading.backbone] = load_backbone(reading.backbone, device=device, dtype=dtype)
        self.backbones = [loaded[reading.backbone] for reading in self.recipe.readings]

    def features(self, images: Sequence[ImageLike], *, progress: bool = False) -> Iterator[tuple[FeatureMaps, ...]]:
        """All features of each image, one entry per backbone; every image is read once."""
        streams = []
        for backbone, reading in zip(self.backbones, self.recipe.readings, strict=True):
            prompt = "" if CATEGORY in reading.extract.prompt else reading.extract.prompt
            config = replace(reading.extract, prompt=prompt)
            streams.append(extract_each(backbone, images, config, progress=progress))
        return zip(*streams, strict=True)

    def describe(self, *images: ImageLike) -> tuple[Descriptors, ...]:
        """Descriptors of images that are compared with each other (a joint PCA sees all of them)."""
        return fuse(list(self.features(images)), self.recipe.fusion)

    def match(
        self,
        source: ImageLike,
        target: ImageLike | None = None,
        points: Tensor | np.ndarray | Sequence[Sequence[float]] | None = None,
    ) -> Matches:
        """Where points of one image lie in the other.

        Args:
            points: (N, 2) as (x, y) in pixels of `source`.

        Raises:
            ImageError: an image cannot be read.
            ValueError: the second image or the points are missing, or a point lies outside of the source.
        """
        if target is None:
            raise ValueError("correspondence takes two images and points of the first: match(source, target, points)")
        if points is None:
            raise ValueError("say which points of the source are matched, (N, 2) as (x, y); match_dense matches all")
        images = (load_image(source), load_image(target))
        a, b = self.describe(*images)
        return replace(match_points(a, b, points, self.recipe.matching), images=images)

    __call__ = match

    def match_dense(self, source: ImageLike, target: ImageLike) -> DenseMatches:
        """Where every location of one image lies in the other."""
        images = (load_image(source), load_image(target))
        a, b = self.describe(*images)
        return replace(match_dense(a, b, self.recipe.matching), images=images)

    def __repr__(self) -> str:
        return f"Correspondence({self.recipe.name!r}, {' + '.join(backbone.name for backbone in self.backbones)})"


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
    return replace(whole, name=name, readings=(reading,), fusion=replace(whole.fusion, parts=parts, reference=None))


_TABLES = read_settings(Path(__file__).with_name("recipes.toml"))
RECIPES: dict[str, Recipe] = {  # a table may give a name of its own, which TOML's bare keys do not allow
    entry.name: entry for entry in (_built(Recipe, {"name": key, **table}, key) for key, table in _TABLES.items())
}
