"""``diffrep match`` and ``diffrep swap``: the same places in two images, and the looks of one on the other."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from diffrep.commands.options import (
    BackboneOptions,
    PrecisionOptions,
    ReadingOptions,
    numbers,
    refuse_conditions,
    refuse_same_files,
)
from diffrep.files import DRAWING, check_folder, check_writable, number_of, one_line, write_image
from diffrep.settings import ExtractConfig, MatchConfig, RefineConfig, Sizing, SwapConfig
from diffrep.tasks import note_embedded

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from diffrep.backbones import Backbone, LatentDiffusion
    from diffrep.features import Descriptors, FeatureMaps
    from diffrep.matching import DenseMatches, Matches
    from diffrep.recipes import Correspondence, Recipe

DEFAULT_RECIPE = "tiny"


@dataclass(frozen=True)
class Match(ReadingOptions, PrecisionOptions):
    """Point at places in image A and get the same places in image B, as a picture and as numbers.

    For example: diffrep match cat.jpg dog.jpg --points 212,130 240,131 -o match.png, or many pairs with the models
    loaded once: diffrep match --pairs pairs.csv -o matches
    """

    FIRST = "points dense output recipe backbone extract.taps extract.timestep size pairs json"

    a: Annotated[Path | None, tyro.conf.Positional] = None  # the image with the points
    b: Annotated[Path | None, tyro.conf.Positional] = None  # the image in which they are looked for
    points: tuple[str, ...] = ()  # places in A as x,y in pixels
    dense: bool = False  # match every location of A
    # picture to write, match.png without --json; with --pairs the folder of the pictures, matches
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    json: bool = False  # print the matches as JSON
    # .csv in the place of A and B: columns source and target, files beside it or with their whole path, and points:
    # "x,y x,y" in columns whose names begin with it; rows without points take --points
    pairs: Path | None = None
    skip_existing: bool = False  # with --pairs: leave pairs out whose pictures exist
    # how features are read, fused and matched, by name or from a .toml or .yaml file; tiny without --backbone
    recipe: str | None = None
    # MODEL alone: only this model, by name, folder or hub id; with --recipe: [ROLE=]MODEL in the place of its own
    backbone: tuple[str, ...] = ()
    size: int | None = None  # long side of what the backbone sees, in pixels
    mask_a: Path | None = None  # the object in A: a mask in any form, or a cut-out; points beside it are named
    mask_b: Path | None = None  # where matches in B may lie, likewise
    extract: Annotated[ExtractConfig, tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes] = field(
        default_factory=ExtractConfig
    )
    matching: MatchConfig = field(default_factory=MatchConfig)

    def defaults(self) -> Match:
        """A recipe matches in its own way."""
        if self.recipe is None and self.backbone:
            return self
        from diffrep.recipes import recipe

        return dataclasses.replace(
            self, matching=recipe(DEFAULT_RECIPE if self.recipe is None else self.recipe).matching
        )

    @property
    def picture(self) -> Path | None:
        """Where the picture goes, or with --pairs their folder; None: nothing is drawn."""
        return self.output or (None if self.json else Path("match.png" if self.pairs is None else "matches"))

    def run(self) -> None:
        from diffrep.images import load_image
        from diffrep.masks import load_mask, read_mask

        if self.pairs is not None:
            return self._run_pairs(self.pairs)
        for name, image in (("A", self.a), ("B", self.b)):
            if image is None:
                raise ValueError(f"{name} is missing: two images, or --pairs FILE")
        assert self.a is not None
        assert self.b is not None
        if self.skip_existing:
            raise ValueError("--skip-existing goes with --pairs")
        if not self.points and not self.dense:
            raise ValueError("say what to match: --points x,y [x,y ...], or --dense")
        check_used(self.typed, self.matching, dense=self.dense)
        if (output := self.picture) is not None:
            check_writable(output)
        images = load_image(self.a), load_image(self.b)
        points = read_points(self.points, images[0])
        masks = {
            "source_mask": None if self.mask_a is None else load_mask(self.mask_a),
            "mask": None if self.mask_b is None else load_mask(self.mask_b),
        }
        if (inside := masks["source_mask"]) is not None:
            for x, y in points[~read_mask(inside, points, (images[0].height, images[0].width))].tolist():
                print(f"{self.mask_a}: the point ({x:g}, {y:g}) does not lie on the object", file=sys.stderr)
        correspondence = self._correspondence()
        described = correspondence.describe(*images)
        result, lines = self._matched(images, described, points, correspondence.recipe, output, masks)
        note_embedded("matching", *(backbone.name for backbone in correspondence.backbones))
        about = {"a": str(self.a), "b": str(self.b), "recipe": dataclasses.asdict(correspondence.recipe)}
        print(json.dumps(about | result, indent=2) if self.json else "\n".join(lines))

    def _run_pairs(self, table: Path) -> None:
        """Match the pairs of a table; what fails is named on stderr, skipped and counted."""
        from diffrep.commands.image_runs import ImageRun
        from diffrep.fusion import fuse
        from diffrep.images import load_image

        if self.a is not None or self.mask_a is not None or self.mask_b is not None:
            raise ValueError("--pairs goes without A, B and their masks")
        check_used(self.typed, self.matching, dense=self.dense)
        if (folder := self.picture) is not None:
            check_folder(folder)
        elif self.skip_existing:
            raise ValueError("--skip-existing looks for pictures: say their folder, -o FOLDER")
        pairs = read_pairs(table, self.points, dense=self.dense)
        jobs = [(pair, None if folder is None else folder / f"{pair.name}.png") for pair in pairs]
        left = [job for job in jobs if not (self.skip_existing and job[1] is not None and job[1].is_file())]
        if len(left) < len(jobs):
            print(f"skipped {number_of(len(jobs) - len(left), 'pair')} whose pictures exist", file=sys.stderr)
        if not left:
            return
        pictures = [picture for _, picture in left if picture is not None]
        refuse_same_files(pictures, [path for pair in pairs for path in (pair.source, pair.target)])
        run, results = ImageRun(len(left), "match", unit="pair"), []
        correspondence = self._correspondence()
        recipe = correspondence.recipe
        image = lru_cache(maxsize=16)(load_image)  # one image is in many pairs, usually in neighbouring ones

        @lru_cache(maxsize=16)
        def features(path: Path) -> tuple[FeatureMaps, ...]:
            return next(correspondence.features([image(path)]))

        with run.bar:
            for pair, output in left:
                try:
                    images = image(pair.source), image(pair.target)
                    points = read_points(pair.points, images[0])
                    described = fuse([features(pair.source), features(pair.target)], recipe.fusion)
                    result, lines = self._matched(images, described, points, recipe, output, {})
                except Exception as error:  # whatever a decoder raises: the other pairs are still to be done
                    run.fail(pair.label, error)
                    continue
                results.append({"a": str(pair.source), "b": str(pair.target), "row": pair.row} | result)
                if not self.json:
                    run.bar.write("\n".join([f"{pair.source} {pair.target}", *lines]), file=sys.stdout)
                run.bar.update()
        note_embedded("matching", *(backbone.name for backbone in correspondence.backbones))
        if self.json:
            print(json.dumps({"recipe": dataclasses.asdict(recipe), "pairs": results}, indent=2))
        run.check()

    def _matched(
        self,
        images: tuple[Image.Image, Image.Image],
        described: Sequence[Descriptors],
        points: Tensor,
        recipe: Recipe,
        output: Path | None,
        masks: Mapping[str, Tensor | None],
    ) -> tuple[dict[str, object], list[str]]:
        """Match a pair and draw it: the result, JSON-ready, and in lines."""
        from diffrep.draw import draw_field, draw_matches
        from diffrep.matching import match_dense, match_points

        source, target = described
        matches = match_points(source, target, points, recipe.matching, **masks)
        dense = match_dense(source, target, recipe.matching, **masks) if self.dense else None
        if output is not None:
            picture = draw_field(*images, dense) if dense is not None else draw_matches(*images, points, matches)
            write_image(output, picture, mark=DRAWING)
        rows = zip(points.tolist(), matches.points.tolist(), matches.scores.tolist(), strict=True)
        lines = [f"({x:g}, {y:g}) -> ({u:.1f}, {v:.1f})  score {score:.3f}" for (x, y), (u, v), score in rows]
        return document(points, matches, dense), [*lines, f"wrote {output}"]

    def _correspondence(self) -> Correspondence:
        from diffrep.recipes import Correspondence

        device, dtype = self.resolved()
        chosen, backbones = self._recipe(device, dtype)
        correspondence = Correspondence(chosen, device=device, dtype=dtype, backbones=backbones)
        refuse_conditions(self.typed, correspondence.backbones)
        return correspondence

    def _recipe(self, device: torch.device, dtype: torch.dtype) -> tuple[Recipe, Mapping[str, Backbone]]:
        """The recipe with what was typed in its place, or one made for a backbone."""
        from diffrep.backbones import load_backbone
        from diffrep.recipes import reading_of

        if self.recipe is not None or not self.backbone:
            models = self.named_alone(self.backbone)
            settings = typed_extraction(self.typed, self.extract) | self.place(self.typed)
            chosen, backbones = chosen_recipe(self.recipe, models, settings, self.size, device, dtype)
            return dataclasses.replace(chosen, matching=self.matching), backbones
        if len(self.backbone) > 1:
            raise ValueError("--backbone takes several models only with --recipe, which says how they are joined")
        backbone = load_backbone(self.named(self.backbone[0]), device=device, dtype=dtype)
        refuse_conditions(self.typed, [backbone])
        extract = dataclasses.replace(self.extract, **self.place(self.typed, backbone))
        if self.size is not None:
            multiple = max(backbone.multiple, 64) if backbone.denoises else backbone.multiple
            extract = dataclasses.replace(extract, sizing=Sizing("fit", self.size, multiple=multiple))
        return reading_of(backbone, extract, self.matching), {backbone.name: backbone}


@dataclass(frozen=True)
class Swap(BackboneOptions, PrecisionOptions):
    """Give the object in image A the looks of the object in image B. A keeps its pose and its surroundings.

    For example: diffrep swap cat.jpg dog.jpg --mask-a cat.png --mask-b dog.png -o swap.png
    """

    a: Annotated[Path, tyro.conf.Positional]  # the image that keeps its pose
    b: Annotated[Path, tyro.conf.Positional]  # the image that lends its looks
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("swap.png")  # picture to write, of A's size
    mask_a: Path | None = None  # the object in A: a mask in any form, or a cut-out; without one it is looked for
    mask_b: Path | None = None  # the same for B
    whole: bool = False  # no masks: paint all of A with all of B
    sheet: Path | None = None  # also write a picture of A and B with their masks beside the result
    refine: bool = False  # let the recipe's diffusion model draw the object again from partial noise
    recipe: str = "tiny"  # how features are read and fused, by name or from a .toml or .yaml file
    backbone: tuple[str, ...] = ()  # [ROLE=]MODEL: a model in the place of the recipe's own
    swap: Annotated[SwapConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SwapConfig)
    refinement: RefineConfig = field(default_factory=RefineConfig)

    def run(self) -> None:
        from diffrep.draw import side_by_side
        from diffrep.images import load_image
        from diffrep.masks import load_mask
        from diffrep.recipes import Correspondence
        from diffrep.swap import cosegment, refine, swap_appearance

        if self.whole and (self.mask_a is not None or self.mask_b is not None):
            raise ValueError("--whole paints everything: it does not go with --mask-a or --mask-b")
        if not self.refine and (
            self.refinement != RefineConfig() or any(option.startswith("refinement.") for option in self.typed)
        ):
            raise ValueError("the options of the refinement need --refine")
        for path in (self.output, self.sheet):
            if path is not None:
                check_writable(path)
        if self.sheet is not None and os.path.realpath(self.sheet) == os.path.realpath(self.output):
            raise ValueError(f"{self.sheet}: --sheet and --output would be one file")
        models = self.named_alone(self.backbone)
        device, dtype = self.resolved()
        images = [load_image(path) for path in (self.a, self.b)]
        masks = [None if path is None else load_mask(path) for path in (self.mask_a, self.mask_b)]
        chosen, backbones = chosen_recipe(self.recipe, models, {}, None, device, dtype)
        correspondence = Correspondence(chosen, device=device, dtype=dtype, backbones=backbones)
        artist = diffusion_model(correspondence.backbones) if self.refine else None
        pose, appearance = correspondence.describe(*images)
        if not self.whole and any(mask is None for mask in masks):
            objects = cosegment(images, (pose, appearance))
            masks = [common if mask is None else mask for mask, common in zip(masks, objects, strict=True)]
        result = swap_appearance(images[0], images[1], pose, appearance, self.swap, pose_mask=masks[0], mask=masks[1])
        pictures = [*(outlined(image, mask) for image, mask in zip(images, masks, strict=True)), result]
        titles = ["A keeps its pose", "B lends its looks", "swapped"]
        if artist is not None:
            result = refine(result, artist, self.refinement, mask=masks[0], feather=self.swap.feather)
            pictures, titles = [*pictures, result], [*titles, "refined"]
        write_image(self.output, result)
        if self.sheet is not None:
            write_image(self.sheet, side_by_side(pictures, titles=titles)[0], mark=DRAWING)
        note_embedded("matching", *(backbone.name for backbone in correspondence.backbones))
        print(f"wrote {self.output}" + (f" and {self.sheet}" if self.sheet is not None else ""))


def diffusion_model(backbones: Sequence[Backbone]) -> LatentDiffusion:
    """The first latent diffusion model with a U-Net among a recipe's backbones.

    Raises:
        ValueError: there is none.
    """
    for backbone in backbones:
        if backbone.denoises == "latents" and backbone.has_unet:
            return cast("LatentDiffusion", backbone)
    names = ", ".join(backbone.name for backbone in backbones)
    raise ValueError(f"refinement needs a latent diffusion model with a U-Net; the recipe's backbones are {names}")


def outlined(image: Image.Image, mask: Tensor | None) -> Image.Image:
    """The image, paler where the mask is not."""
    import numpy as np
    from PIL import Image

    if mask is None:
        return image
    inside = Image.fromarray((mask > 0).cpu().numpy().astype(np.uint8) * 255)
    inside = inside.resize(image.size, Image.Resampling.BILINEAR)
    paler = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, (250, 250, 248)), 0.75)
    return Image.composite(image.convert("RGB"), paler, inside)


def chosen_recipe(
    name: str | None,
    models: tuple[str, ...],
    settings: Mapping[str, Any],
    size: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Recipe, dict[str, Backbone]]:
    """A recipe with other settings and models; the models that were loaded for it, by name."""
    from diffrep.recipes import recipe, with_backbones, with_extraction

    chosen = recipe(DEFAULT_RECIPE if name is None else name)
    if settings or size is not None:
        chosen = with_extraction(chosen, settings, size)
    return with_backbones(chosen, models, device=device, dtype=dtype)


def typed_extraction(typed: frozenset[str], extract: ExtractConfig) -> dict[str, Any]:
    """The extraction settings that were typed."""
    names = [option.removeprefix("extract.") for option in typed if option.startswith("extract.")]
    return {name: getattr(extract, name) for name in names}


def check_used(typed: frozenset[str], matching: MatchConfig, *, dense: bool) -> None:
    """Refuse options of matching that the mode does not use.

    Raises:
        ValueError: the message names the option and what it goes with.
    """
    for name in ("window", "temperature", "outside"):
        if f"matching.{name}" in typed and matching.mode != "soft":
            raise ValueError(f"--matching.{name} goes with --matching.mode soft, the mode is {matching.mode}")
    if "matching.backend" in typed and matching.backend == "faiss" and not (dense or matching.mutual):
        raise ValueError("--matching.backend faiss goes with --dense")


@dataclass(frozen=True)
class Pair:
    """One row of a table of pairs.

    Attributes:
        name: of its picture, without ending.
    """

    label: str
    row: int
    source: Path
    target: Path
    points: tuple[str, ...]
    name: str


def read_pairs(path: Path, points: Sequence[str] = (), *, dense: bool = False) -> list[Pair]:
    """The rows of a .csv with the columns source and target, and points in columns whose names begin with it.

    Args:
        points: of rows that have none.
        dense: rows need no points.

    Raises:
        ValueError: the file is no such table, or a row lacks something; the message names it.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table of pairs ({one_line(error)})") from None
    columns = [name for name in table[0] if name] if table else []
    if not {"source", "target"} <= set(columns):
        listed = ", ".join(columns) or "no rows"
        raise ValueError(f"{path}: needs the columns source and target, for example source,target,points; has {listed}")
    if unknown := [name for name in columns if name not in ("source", "target") and not name.startswith("point")]:
        raise ValueError(f"{path}: has a column {unknown[0]!r}, which is none of source, target and points")
    pairs: list[Pair] = []
    used, taken = set[str](), Counter[str]()
    for number, row in enumerate(table, 1):
        label = f"{path}, row {number}"
        if None in row:  # more cells than columns: a point without quotes
            raise ValueError(f'{label}: has more cells than columns; a point stands in quotes, "120,80"')
        places = [
            place
            for name in columns
            if name.startswith("point")
            for place in (row[name] or "").replace(";", " ").split()
        ]
        for name in ("source", "target"):
            if not row[name] or "\0" in str(row[name]):  # which no path can hold
                raise ValueError(f"{label}: has no {name}")
        if not places and not points and not dense:
            raise ValueError(f"{label}: has no points; give them in a column points, or --points for all rows")
        for place in places:
            try:
                numbers(place, "point")
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None
        source, target = (path.parent / str(row[name]) for name in ("source", "target"))
        stem = name = f"{source.stem}-{target.stem}"
        while name.casefold() in used:
            taken[stem] += 1
            name = f"{stem}-{taken[stem] + 1}"
        used.add(name.casefold())
        pairs.append(Pair(label, number, source, target, tuple(places or points), name))
    return pairs


def read_points(texts: Sequence[str], image: Image.Image) -> Tensor:
    """Points of an image, (N, 2), from what was written for them.

    Raises:
        ValueError: one is no point, or lies outside of the image.
    """
    import torch

    from diffrep.matching import check_points

    places = torch.tensor([numbers(text, "point") for text in texts]).reshape(-1, 2)
    return check_points(places, (image.height, image.width))


def document(points: Tensor, matches: Matches, dense: DenseMatches | None) -> dict[str, object]:
    """Matches as JSON-ready values; places are [x, y] in pixels."""
    values: dict[str, object] = {
        "points": points.tolist(),
        "matches": matches.points.tolist(),
        "scores": matches.scores.tolist(),
    }
    if matches.mutual is not None:
        values["mutual"] = matches.mutual.tolist()
    if dense is not None:
        valid = dense.valid
        values["dense"] = {
            "sources": dense.sources[valid].tolist(),
            "matches": dense.points[valid].tolist(),
            "scores": dense.scores[valid].tolist(),
        }
    return values
