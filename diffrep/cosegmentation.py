"""Co-segmentation: the object that two images have in common, found from their descriptors alone.

A place belongs to the object where the other image shows something like it and the border of its own image does not.
The edges of the masks follow those of the images (guided filter, He, Sun and Tang 2010). No labels, no training: it
takes for granted that the object does not fill the border. Where masks are known, give those instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.fusion import Descriptors
from diffrep.matching import open_cells
from diffrep.similarity import similarities

SIDE = 256  # pixels: the longer side at which masks are refined
BORDER_NEIGHBOURS = 5  # places of the border whose likeness is averaged
MARGIN = 0.3  # standard deviations above the threshold that separates the scores best


@torch.no_grad()
def cosegment(images: Sequence[Image.Image], descriptors: Sequence[Descriptors]) -> tuple[Tensor, Tensor]:
    """Masks of the object that two images share.

    Args:
        images: two RGB images.
        descriptors: of the two, fused together.

    Returns:
        (H, W) bool for each, over the whole image, with its longer side at most `SIDE` pixels.

    Raises:
        ValueError: these are not two images, or nothing in them can be told from their borders.
    """
    if len(images) != 2 or len(descriptors) != 2:
        raise ValueError(f"an object in common takes two images, got {len(images)} and {len(descriptors)} descriptors")
    scores = [_object_scores(own, other) for own, other in zip(descriptors, reversed(descriptors), strict=True)]
    on_image = torch.cat([s[s.isfinite()] for s in scores])
    threshold = otsu_threshold(on_image) + MARGIN * on_image.std()
    masks = []
    for number, (image, described, score) in enumerate(zip(images, descriptors, scores, strict=True)):
        score = torch.where(score.isfinite(), score - threshold, on_image.min() - threshold)
        mask = _refined(image, described, score) > 0
        if not bool(mask.any()):
            raise ValueError(f"no object was found in image {number + 1} of 2: give its mask")
        masks.append(mask)
    return masks[0], masks[1]


def _object_scores(own: Descriptors, other: Descriptors) -> Tensor:
    """(h, w): likeness to the best place of the other image minus that to the own border; -inf on padding."""
    rows, cells = own.rows(), open_cells(own, None)
    inside = own.on_image()
    # the outermost ring of places on the image: those with a neighbour that is not
    ring = inside & (F.max_pool2d(F.pad((~inside)[None, None].float(), (1,) * 4, value=1.0), 3, stride=1)[0, 0] > 0)
    border = ring.flatten().nonzero()[:, 0]
    likeness = similarities(rows, rows[border])
    likeness[border, torch.arange(len(border), device=border.device)] = -1  # a border place is not its own neighbour
    background = likeness.topk(min(BORDER_NEIGHBOURS, len(border)), dim=1).values.mean(1)
    common = similarities(rows, other.rows()[open_cells(other, None)]).amax(1)
    scores = torch.full_like(background, -torch.inf)
    scores[cells] = (common - background)[cells]
    return scores.unflatten(0, own.size).cpu()


def otsu_threshold(values: Tensor) -> Tensor:
    """The value () that splits values (N,) into two classes with the greatest variance between them (Otsu 1979)."""
    ordered = values.flatten().sort().values.double()
    below = torch.arange(1, len(ordered), dtype=torch.float64)
    above = len(ordered) - below
    sums = ordered.cumsum(0)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above).square()
    return ordered[between.argmax()].float()


def _refined(image: Image.Image, described: Descriptors, score: Tensor) -> Tensor:
    """Scores of places -> (H, W) scores of the reduced image's pixels, with edges where the image has them."""
    scale = min(1.0, SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = (torch.stack([x, y], dim=-1) + 0.5) * torch.tensor([image.width / width, image.height / height]) - 0.5
    field = Descriptors((score[..., None],), (1.0,), described.placement, described.grid)
    upsampled = field.at(points.flatten(0, 1).float()).parts[0].view(1, 1, height, width)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    guide = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    return guided_filter(upsampled, guide, radius=max(1, round(0.08 * max(width, height))))[0, 0]


def guided_filter(maps: Tensor, guide: Tensor, *, radius: int, regularity: float = 1e-3) -> Tensor:
    """Smooth a map by local linear functions of a colour image (He, Sun and Tang 2010, equations 19 to 21).

    Args:
        maps: (1, 1, H, W).
        guide: (1, 3, H, W) in [0, 1].
        radius: of the square windows, pixels.
        regularity: the epsilon of the paper, for colours in [0, 1].

    Returns:
        (1, 1, H, W).
    """

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(values, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)

    colour, value = mean(guide), mean(maps)
    products = (guide[:, :, None] * guide[:, None]).flatten(1, 2)
    spread = mean(products).unflatten(1, (3, 3)) - colour[:, :, None] * colour[:, None]
    joint = (mean(guide * maps) - colour * value).permute(0, 2, 3, 1)[..., None]
    spread = spread.permute(0, 3, 4, 1, 2) + regularity * torch.eye(3)
    slope = torch.linalg.solve(spread, joint)[..., 0].permute(0, 3, 1, 2)
    offset = value - (slope * colour).sum(1, keepdim=True)
    return (mean(slope) * guide).sum(1, keepdim=True) + mean(offset)
