"""``diffrep swap``: an object keeps its pose and takes the looks of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from torch import Tensor

from diffrep.backbones import Backbone, LatentDiffusion
from diffrep.commands.output import check_writable, write_image
from diffrep.cosegmentation import cosegment
from diffrep.draw import side_by_side
from diffrep.images import load_image
from diffrep.masks import load_mask
from diffrep.recipes import Correspondence, recipe
from diffrep.refinement import RefineConfig, refine
from diffrep.swap import SwapConfig, swap_appearance


@dataclass(frozen=True)
class Swap:
    """Give the object in image A the looks of the object in image B. A keeps its pose and its surroundings.

    For example: diffrep swap cat.jpg dog.jpg --mask-a cat.png --mask-b dog.png -o swap.png
    """

    a: Annotated[Path, tyro.conf.Positional]  # the image that keeps its pose
    b: Annotated[Path, tyro.conf.Positional]  # the image that lends its looks
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("swap.png")  # picture to write, of A's size
    mask_a: Path | None = None  # an image whose bright pixels are the object in A; without one it is found
    mask_b: Path | None = None  # the same for B
    whole: bool = False  # no masks: paint all of A with all of B
    sheet: Path | None = None  # also write a picture of A and B with their masks beside the result
    refine: bool = False  # let the recipe's diffusion model draw the object again from partial noise
    recipe: str = "tiny"  # how features are read and fused
    device: str = "cpu"  # cpu or cuda
    swap: Annotated[SwapConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SwapConfig)
    refinement: RefineConfig = field(default_factory=RefineConfig)

    def run(self) -> None:
        if self.whole and (self.mask_a is not None or self.mask_b is not None):
            raise ValueError("--whole paints everything: it does not go with --mask-a or --mask-b")
        if not self.refine and self.refinement != RefineConfig():
            raise ValueError("the options of the refinement need --refine")
        for path in (self.output, self.sheet):
            if path is not None:
                check_writable(path)
        images = [load_image(path) for path in (self.a, self.b)]
        given = [None if path is None else load_mask(path) for path in (self.mask_a, self.mask_b)]
        correspondence = Correspondence(recipe(self.recipe), device=self.device)
        artist = diffusion_model(correspondence.backbones) if self.refine else None
        pose, appearance = correspondence.describe(*images)
        masks: list[Tensor | None] = list(given)
        if not self.whole and None in [None if mask is None else True for mask in given]:
            found = cosegment(images, (pose, appearance))
            masks = [own if own is not None else other for own, other in zip(given, found, strict=True)]
        result = swap_appearance(images[0], images[1], pose, appearance, self.swap, pose_mask=masks[0], mask=masks[1])
        pictures = [*(outlined(image, mask) for image, mask in zip(images, masks, strict=True)), result]
        titles = ["A keeps its pose", "B lends its looks", "swapped"]
        if artist is not None:
            result = refine(result, artist, self.refinement, mask=masks[0], feather=self.swap.feather)
            pictures, titles = [*pictures, result], [*titles, "refined"]
        write_image(self.output, result)
        if self.sheet is not None:
            write_image(self.sheet, side_by_side(pictures, titles=titles)[0])
        print(f"wrote {self.output}" + (f" and {self.sheet}" if self.sheet is not None else ""))


def diffusion_model(backbones: Sequence[Backbone]) -> LatentDiffusion:
    """The first latent diffusion model with a U-Net among a recipe's backbones.

    Raises:
        ValueError: there is none.
    """
    for backbone in backbones:
        if isinstance(backbone, LatentDiffusion):
            return backbone
    names = ", ".join(backbone.name for backbone in backbones)
    raise ValueError(f"refinement needs a latent diffusion model with a U-Net; the recipe's backbones are {names}")


def outlined(image: Image.Image, mask: Tensor | None) -> Image.Image:
    """The image, paler where the mask is not."""
    if mask is None:
        return image
    inside = Image.fromarray((mask > 0).cpu().numpy().astype(np.uint8) * 255)
    inside = inside.resize(image.size, Image.Resampling.BILINEAR)
    paler = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, (250, 250, 248)), 0.75)
    return Image.composite(image.convert("RGB"), paler, inside)
