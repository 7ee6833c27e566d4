"""``diffrep match``: point at places in one image, get the same places in another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffrep.commands.output import check_writable, write_image
from diffrep.settings import ExtractConfig, MatchConfig, Sizing

if TYPE_CHECKING:
    from torch import Tensor

    from diffrep.backbones import Backbone
    from diffrep.matching import DenseMatches, Matches
    from diffrep.recipes import Recipe


@dataclass(frozen=True)
class Match:
    """Point at places in image A and get the same places in image B, as a picture and as numbers.

    For example: diffrep match cat.jpg dog.jpg --points 212,130 240,131 -o match.png
    """

    a: Annotated[Path, tyro.conf.Positional]  # the image with the points
    b: Annotated[Path, tyro.conf.Positional]  # the image in which they are looked for
    points: tuple[str, ...] = ()  # places in A as x,y in pixels
    dense: bool = False  # match every location of A
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # picture to write; match.png without --json
    json: bool = False  # print the matches as JSON
    recipe: str = "tiny"  # how features are read, fused and matched
    backbone: str | None = None  # instead of a recipe: one backbone by name, folder or hub id
    size: int | None = None  # with --backbone: long side of what it sees, in pixels, aspect kept
    mask_a: Path | None = None  # an image whose bright pixels are the object in A
    mask_b: Path | None = None  # an image whose bright pixels are where matches in B may lie
    device: str = "cpu"  # cpu or cuda
    extract: Annotated[ExtractConfig, tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes] = field(
        default_factory=ExtractConfig
    )
    matching: MatchConfig = field(default_factory=MatchConfig)

    def run(self) -> None:
        from diffrep.draw import draw_field, draw_matches
        from diffrep.images import load_image
        from diffrep.masks import load_mask
        from diffrep.matching import check_points, match_dense, match_points
        from diffrep.recipes import Correspondence

        if not self.points and not self.dense:
            raise ValueError("say what to match: --points x,y [x,y ...], or --dense")
        output = self.output or (None if self.json else Path("match.png"))
        if output is not None:
            check_writable(output)
        a, b = load_image(self.a), load_image(self.b)
        points = check_points(parse_points(self.points), (a.height, a.width))
        masks = {
            "source_mask": None if self.mask_a is None else load_mask(self.mask_a),
            "mask": None if self.mask_b is None else load_mask(self.mask_b),
        }
        chosen, backbones = self._recipe()
        source, target = Correspondence(chosen, device=self.device, backbones=backbones).describe(a, b)
        matches = match_points(source, target, points, chosen.matching, **masks)
        dense = match_dense(source, target, chosen.matching, **masks) if self.dense else None
        if output is not None:
            picture = draw_field(a, b, dense) if dense is not None else draw_matches(a, b, points, matches)
            write_image(output, picture)
        if self.json:
            result = {"a": str(self.a), "b": str(self.b), "recipe": dataclasses.asdict(chosen)}
            print(json.dumps(result | document(points, matches, dense), indent=2))
        else:
            rows = zip(points.tolist(), matches.points.tolist(), matches.scores.tolist(), strict=True)
            for (x, y), (u, v), score in rows:
                print(f"({x:g}, {y:g}) -> ({u:.1f}, {v:.1f})  score {score:.3f}")
            print(f"wrote {output}")

    def _recipe(self) -> tuple[Recipe, Mapping[str, Backbone]]:
        """The named recipe, or one made for a backbone; options that were given take the place of its own."""
        from diffrep.backbones import VisionTransformer, load_backbone
        from diffrep.recipes import reading_of, recipe

        given = {
            f.name: value
            for f in dataclasses.fields(MatchConfig)
            if (value := getattr(self.matching, f.name)) != f.default
        }
        if self.backbone is None:
            if self.extract != ExtractConfig() or self.size is not None:
                raise ValueError("--size and the extraction options go with --backbone; a recipe has its own")
            chosen = recipe(self.recipe)
            return dataclasses.replace(chosen, matching=dataclasses.replace(chosen.matching, **given)), {}
        backbone = load_backbone(self.backbone, device=self.device)
        extract = self.extract
        if self.size is not None:
            multiple = backbone.patch if isinstance(backbone, VisionTransformer) else 64
            extract = dataclasses.replace(extract, sizing=Sizing("fit", self.size, multiple=multiple))
        return reading_of(backbone, extract, self.matching), {backbone.name: backbone}


def parse_points(texts: tuple[str, ...]) -> Tensor:
    """``x,y`` texts -> (N, 2).

    Raises:
        ValueError: a text is not two numbers.
    """
    import torch

    points = []
    for text in texts:
        try:
            x, y = (float(number) for number in text.split(","))
        except ValueError:
            raise ValueError(f"cannot read the point {text!r}: write x,y in pixels, for example 120,80") from None
        points.append((x, y))
    return torch.tensor(points).reshape(-1, 2)


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
