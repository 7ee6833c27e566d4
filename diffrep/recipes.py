"""Recipes: how a published system goes from two images to matches, as data.

A `Recipe` names the backbones, how each reads an image, how their maps are fused and how descriptors are
matched. `Correspondence` runs one: it holds the loaded backbones and gives descriptors and matches.

Published systems have their names in `RECIPES`; those with trained weights beside the backbone take them behind a
colon, "geoaware:best.pth" or "hyperfeatures:FILE". A recipe of one's own is a `Recipe`, or a TOML or YAML file with
the same fields:

    name = "mine"

    [[readings]]
    backbone = "sd2.1"
    extract = {taps = ["up.1"], timestep = 261, sizing = {mode = "squash", size = 768}}

    [[fusion.parts]]
    taps = ["up.1"]
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor

from diffrep.backbones import Backbone, FreeU, load_backbone
from diffrep.features import ExtractConfig, FeatureMaps, extract_each
from diffrep.fusion import GEOAWARE_ZERO_SHOT, SD_DINO, SD_TAPS, Descriptors, Fusion, Part, aggregated, fuse
from diffrep.images import ImageLike, Sizing
from diffrep.matching import DenseMatches, MatchConfig, Matches, match_dense, match_points

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_ENDINGS = (".toml", ".yaml", ".yml")
CATEGORY = "{category}"  # in a prompt: stands for the name of the image's category; without one the prompt is ""


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


PAPERS = {
    "dift": "Emergent Correspondence from Image Diffusion (arXiv:2306.03881), Tsingularity/dift",
    "sd-dino": "A Tale of Two Features (arXiv:2305.15347), Junyi42/sd-dino, without its captioner",
    "geoaware": "Telling Left from Right (arXiv:2311.17034), Junyi42/GeoAware-SC, zero-shot",
    "cleandift": "CleanDIFT (arXiv:2412.03439), CompVis/cleandift",
    "hyperfeatures": "Diffusion Hyperfeatures (arXiv:2305.14334), diffusion-hyperfeatures/diffusion_hyperfeatures",
    "ditf": "DiTF (arXiv:2505.18584), ganchaofan0000/DiTF, without its captioner; sides are padded to multiples of 16",
}
PIXELS = MatchConfig(mode="pixel")
_SQUARE_960 = Sizing("pad", 960, resample="lanczos")
_DINO = Reading(
    backbone="dinov2-base",
    extract=ExtractConfig(taps=("layer.11",), sizing=Sizing("pad", 840, resample="lanczos", multiple=14)),
)


def _windows(backbone: str, **settings: Any) -> Reading:
    """Stable Diffusion over a black square of 960, in four windows of 512, as sd-dino runs it."""
    shared: dict[str, Any] = {"taps": SD_TAPS, "sizing": _SQUARE_960, "window": 512, "posterior": "mean", "seed": 42}
    return Reading(backbone=backbone, extract=ExtractConfig(**{"ensemble": 1, **shared, **settings}))


RECIPES: dict[str, Recipe] = {
    entry.name: entry
    for entry in (
        Recipe(
            name="tiny",
            readings=(
                Reading(backbone="tiny", extract=ExtractConfig(taps=("up.2.resnet.0",))),
                Reading(backbone="tiny-dino", extract=ExtractConfig(taps=("layer.4",))),
            ),
            # weights and full-resolution search chosen on validation pairs, see docs/model-card.md
            fusion=Fusion.of("up.2.resnet.0", "layer.4", weights=(1, 1)),
            matching=MatchConfig(mode="pixel"),
            source="the embedded pair of backbones, side by side",
        ),
        Recipe(
            name="tiny-views",
            readings=(
                Reading(backbone="tiny", extract=ExtractConfig(taps=("up.2.resnet.0", "down.0.resnet.0"))),
                Reading(backbone="tiny-dino", extract=ExtractConfig(taps=("layer.4",))),
            ),
            # the early activation knows colours and edges, which stay where the object is the same
            fusion=Fusion.of("up.2.resnet.0", "down.0.resnet.0", "layer.4"),
            matching=MatchConfig(mode="pixel"),
            source="the embedded pair for other views of the same scene; taps and weights chosen on other views",
        ),
        Recipe(
            name="dift",
            readings=(
                Reading(
                    backbone="sd2.1",
                    extract=ExtractConfig(
                        taps=("up.1",),
                        sizing=Sizing("squash", 768),
                        timestep=261,
                        ensemble=8,
                        posterior="sample",
                        prompt=f"a photo of a {CATEGORY}",
                    ),
                ),
            ),
            fusion=Fusion.of("up.1"),
            matching=PIXELS,
            source=PAPERS["dift"],
        ),
        Recipe(
            name="dift-adm",
            readings=(
                Reading(
                    backbone="256x256_diffusion_uncond.pt",
                    extract=ExtractConfig(taps=("block.24",), sizing=Sizing("squash", 512), timestep=101, ensemble=8),
                ),
            ),
            fusion=Fusion.of("block.24"),
            matching=PIXELS,
            source=PAPERS["dift"],
        ),
        Recipe(
            name="sd-dino",
            readings=(_windows("sd1.5", timestep=100, prompt=f"a photo of {CATEGORY}"), _DINO),
            fusion=SD_DINO,
            source=PAPERS["sd-dino"],
        ),
        Recipe(
            name="geoaware",
            readings=(_windows("sd1.5", timestep=50, freeu=FreeU(), prompt=f"a photo of {CATEGORY}"), _DINO),
            fusion=GEOAWARE_ZERO_SHOT,
            matching=MatchConfig(mode="soft", window=5),
            source=PAPERS["geoaware"],
        ),
        Recipe(
            name="cleandift",
            readings=(
                Reading(
                    backbone="cleandift-sd2.1",
                    extract=ExtractConfig(
                        taps=("up.1",),
                        sizing=Sizing("squash", 768),
                        timestep=261,
                        clean=True,
                        ensemble=1,
                        posterior="mean",
                        prompt=f"A photo of a {CATEGORY}",
                    ),
                ),
            ),
            fusion=Fusion.of("up.1"),
            matching=PIXELS,
            source=PAPERS["cleandift"],
        ),
        Recipe(
            name="cleandift-sd-dino",
            readings=(
                _windows("cleandift-sd1.5", timestep=261, clean=True, prompt=f"A photo of a {CATEGORY}"),
                _DINO,
            ),
            fusion=SD_DINO,
            source=f"{PAPERS['cleandift']}; {PAPERS['sd-dino']}",
        ),
        Recipe(
            name="hyperfeatures",
            readings=(
                Reading(
                    backbone="hyperfeatures",  # recipe("hyperfeatures:FILE") says where the trained weights are
                    extract=ExtractConfig(
                        taps=("hyperfeatures",), sizing=Sizing("squash", 512, resample="bilinear"), posterior="sample"
                    ),
                ),
            ),
            fusion=Fusion.of("hyperfeatures"),
            matching=PIXELS,
            source=PAPERS["hyperfeatures"],
        ),
        Recipe(
            name="ditf",
            readings=(
                Reading(
                    backbone="flux.1-dev",
                    extract=ExtractConfig(
                        taps=("block.28.attn_in",),
                        sizing=Sizing("fit", 640, multiple=16),
                        timestep=260,
                        ensemble=8,
                        posterior="sample",
                        discard=(154, 1446),
                        prompt=f"a photo of a {CATEGORY}",
                    ),
                ),
            ),
            fusion=Fusion.of("block.28.attn_in"),
            matching=PIXELS,
            source=PAPERS["ditf"],
        ),
    )
}


def recipe(name: str) -> Recipe:
    """A recipe by its name, or from a TOML or YAML file.

    Args:
        name: of `RECIPES`; "geoaware:FILE" and "hyperfeatures:FILE" name the trained aggregation network too.

    Raises:
        ValueError: there is no such recipe (the message lists the near names), or the file is none.
    """
    if name.endswith(FILE_ENDINGS):
        return load_recipe(Path(name))
    known, _, weights = name.partition(":")
    if known not in RECIPES:
        near = difflib.get_close_matches(known, RECIPES, n=4) or sorted(RECIPES)
        raise ValueError(f"there is no recipe {known!r}; near names: {', '.join(near)}")
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
        source=PAPERS["geoaware"].replace("zero-shot", "trained"),
    )


def _hyperfeatures_trained(weights: str) -> Recipe:
    untrained = RECIPES["hyperfeatures"]
    readings = tuple(replace(reading, backbone=f"hyperfeatures:{weights}") for reading in untrained.readings)
    return replace(untrained, name=f"hyperfeatures:{weights}", readings=readings)


TRAINED: dict[str, Callable[[str], Recipe]] = {  # name -> its recipe with the weights of a file
    "geoaware": _geoaware_trained,
    "hyperfeatures": _hyperfeatures_trained,
}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML (``.toml``) or YAML file (``.yaml``, ``.yml``).

    Raises:
        ValueError: the file is missing, no TOML or YAML, or has a setting that does not exist; named.
    """
    try:
        text = path.read_text(encoding="utf-8")
        made = _made(Recipe, tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text), "")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, yaml.YAMLError) as error:  # TOML's own errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None
    assert isinstance(made, Recipe)
    return made


def _made(kind: Any, value: Any, where: str) -> Any:
    """What TOML and YAML give, tables and lists, as the type that a field has."""
    if get_origin(kind) in (Union, UnionType):
        if isinstance(value, list | dict):  # the tuple or dataclass among the types, which differ in nothing else
            kind = next((k for k in get_args(kind) if is_dataclass(k) or get_origin(k) is tuple), kind)
            return value if get_origin(kind) in (Union, UnionType) else _made(kind, value, where)
        kinds = [k for k in get_args(kind) if k not in (NoneType,)]
        return _made(kinds[0], value, where) if len(kinds) == 1 else value
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the file'} must be a table of the settings of {kind.__name__}, got {value!r}")
        known = {f.name: f for f in fields(kind)}
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"{where or kind.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}")
        hints = get_type_hints(kind)
        return kind(**{key: _made(hints[key], v, f"{where}.{key}".lstrip(".")) for key, v in value.items()})
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        kinds = list(get_args(kind))
        inner = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(inner) != len(value):
            raise ValueError(f"{where} must have {len(inner)} entries, got {value!r}")
        return tuple(_made(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is not kind:
        raise ValueError(f"{where} must be of type {kind.__name__}, got {value!r}")
    choices = get_args(kind)
    if choices and value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


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
            given.get(r.backbone) or load_backbone(r.backbone, device=device, dtype=dtype) for r in self.recipe.readings
        ]

    def features(self, images: Sequence[ImageLike], *, progress: bool = False) -> Iterator[tuple[FeatureMaps, ...]]:
        """All features of each image, one entry per backbone; every image is read once."""
        streams = [
            extract_each(backbone, images, _without_category(reading.extract), progress=progress)
            for backbone, reading in zip(self.backbones, self.recipe.readings, strict=True)
        ]
        return zip(*streams, strict=True)

    def describe(self, *images: ImageLike) -> tuple[Descriptors, ...]:
        """Descriptors of images that are compared with each other (a joint PCA sees all of them)."""
        return fuse(list(self.features(images)), self.recipe.fusion)

    def match(self, source: ImageLike, target: ImageLike, points: Tensor | Sequence[Sequence[float]]) -> Matches:
        """Where points of one image lie in the other.

        Args:
            points: (N, 2) as (x, y) in pixels of `source`.

        Raises:
            ImageError: an image cannot be read.
            ValueError: a point lies outside of the source.
        """
        a, b = self.describe(source, target)
        return match_points(a, b, points, self.recipe.matching)

    def match_dense(self, source: ImageLike, target: ImageLike) -> DenseMatches:
        """Where every location of one image lies in the other."""
        a, b = self.describe(source, target)
        return match_dense(a, b, self.recipe.matching)


def _without_category(extract: ExtractConfig) -> ExtractConfig:
    return replace(extract, prompt="") if CATEGORY in extract.prompt else extract


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
