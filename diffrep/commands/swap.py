"""``diffrep swap``: an object keeps its pose and takes the looks of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffrep.commands.match import chosen_recipe
from diffrep.commands.options import BackboneOptions, PrecisionOptions
from diffrep.commands.output import check_writable, write_image
from diffrep.settings import RefineConfig, SwapConfig
from diffrep.tasks import note_embedded

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from diffrep.backbones import Backbone, LatentDiffusion


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
            write_image(self.sheet, side_by_side(pictures, titles=titles)[0])
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
