"""``diffrep match`` and ``diffrep swap``: the same places in two images, and the looks of one on the other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diffrep.commands.options import BackboneOptions, PrecisionOptions, numbers
from diffrep.files import DRAWING, check_writable, write_image
from diffrep.settings import ExtractConfig, MatchConfig, RefineConfig, Sizing, SwapConfig
from diffrep.tasks import note_embedded

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from diffrep.backbones import Backbone, LatentDiffusion
    from diffrep.matching import DenseMatches, Matches
    from diffrep.recipes import Recipe

DEFAULT_RECIPE = "tiny"


@dataclass(frozen=True)
class Match(BackboneOptions, PrecisionOptions):
    """Point at places in image A and get the same places in image B, as a picture and as numbers.

    For example: diffrep match cat.jpg dog.jpg --points 212,130 240,131 -o match.png
    """

    a: Annotated[Path, tyro.conf.Positional]  # the image with the points
    b: Annotated[Path, tyro.conf.Positional]  # the image in which they are looked for
    points: tuple[str, ...] = ()  # places in A as x,y in pixels
    dense: bool = False  # match every location of A
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # picture to write; match.png without --json
    json: bool = False  # print the matches as JSON
    # how features are read, fused and matched, by name or from a .toml or .yaml file; tiny without --backbone
    recipe: str | None = None
    # MODEL alone: only this model, by name, folder or hub id; with --recipe: [ROLE=]MODEL in the place of its own
    backbone: tuple[str, ...] = ()
    size: int | None = None  # long side of what the backbone sees, in pixels
    mask_a: Path | None = None  # the object in A: a mask in any form, or a cut-out
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

        return dataclasses.replace(self, matching=recipe(self.recipe or DEFAULT_RECIPE).matching)

    def run(self) -> None:
        import torch

        from diffrep.draw import draw_field, draw_matches
        from diffrep.images import load_image
        from diffrep.masks import load_mask
        from diffrep.matching import check_points, match_dense, match_points
        from diffrep.recipes import Correspondence

        if not self.points and not self.dense:
            raise ValueError("say what to match: --points x,y [x,y ...], or --dense")
        check_used(self.typed, self.matching, dense=self.dense)
        output = self.output or (None if self.json else Path("match.png"))
        if output is not None:
            check_writable(output)
        device, dtype = self.resolved()
        a, b = load_image(self.a), load_image(self.b)
        places = torch.tensor([numbers(text, "point") for text in self.points]).reshape(-1, 2)
        points = check_points(places, (a.height, a.width))
        masks = {
            "source_mask": None if self.mask_a is None else load_mask(self.mask_a),
            "mask": None if self.mask_b is None else load_mask(self.mask_b),
        }
        chosen, backbones = self._recipe(device, dtype)
        correspondence = Correspondence(chosen, device=device, dtype=dtype, backbones=backbones)
        source, target = correspondence.describe(a, b)
        matches = match_points(source, target, points, chosen.matching, **masks)
        dense = match_dense(source, target, chosen.matching, **masks) if self.dense else None
        if output is not None:
            picture = draw_field(a, b, dense) if dense is not None else draw_matches(a, b, points, matches)
            write_image(output, picture, mark=DRAWING)
        note_embedded(chosen.name, "matching")
        if self.json:
            result = {"a": str(self.a), "b": str(self.b), "recipe": dataclasses.asdict(chosen)}
            print(json.dumps(result | document(points, matches, dense), indent=2))
        else:
            rows = zip(points.tolist(), matches.points.tolist(), matches.scores.tolist(), strict=True)
            for (x, y), (u, v), score in rows:
                print(f"({x:g}, {y:g}) -> ({u:.1f}, {v:.1f})  score {score:.3f}")
            print(f"wrote {output}")

    def _recipe(self, device: torch.device, dtype: torch.dtype) -> tuple[Recipe, Mapping[str, Backbone]]:
        """The recipe with what was typed in its place, or one made for a backbone."""
        from diffrep.backbones import load_backbone
        from diffrep.recipes import reading_of

        if self.recipe is not None or not self.backbone:
            models = self.named_alone(self.backbone)
            chosen, backbones = chosen_recipe(
                self.recipe, models, typed_extraction(self.typed, self.extract), self.size, device, dtype
            )
            return dataclasses.replace(chosen, matching=self.matching), backbones
        if len(self.backbone) > 1:
            raise ValueError("--backbone takes several models only with --recipe, which says how they are joined")
        backbone = load_backbone(self.named(self.backbone[0]), device=device, dtype=dtype)
        extract = self.extract
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
        note_embedded(chosen.name, "matching")
        print(f"wrote {self.output}" + (f" and {self.sheet}" if self.sheet is not None else ""))


def diffusion_model(backbones: Sequence[Backbone]) -> LatentDiffusion:
    """The first latent diffusion model with a U-Net among a recipe's backbones.

    Raises:
        ValueError: there is none.
    """
    from diffrep.backbones import LatentDiffusion

    for backbone in backbones:
        if isinstance(backbone, LatentDiffusion):
            return backbone
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

    chosen = recipe(name or DEFAULT_RECIPE)
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
