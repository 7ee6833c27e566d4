"""Instance swapping: one object keeps its pose and takes another's looks (sd-dino, "A Tale of Two Features").

Every place of the object that keeps its pose is matched with its nearest place in the object that lends its looks (a
dense field), the lending image is read there (a warp), and the result is blended into the first image (a composite).
`diffrep.refinement` can run a diffusion model over it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from diffrep.fusion import Descriptors, lattice
from diffrep.masks import read_mask
from diffrep.settings import Metric, SwapConfig
from diffrep.similarity import nearest


@dataclass(frozen=True)
class SwapField:
    """For each of h x w places that tile the image that keeps its pose: where its look comes from.

    Attributes:
        points: (h, w, 2), (x, y) in pixels of the lending image; NaN where `valid` is not.
        valid: (h, w) bool: the places that are painted.
        image_size: (H, W) of the image that keeps its pose.
        step: pixels of the lending image between the places that points are chosen from.
    """

    points: Tensor
    valid: Tensor
    image_size: tuple[int, int]
    step: float


def swap_appearance(
    image: Image.Image,
    other: Image.Image,
    pose: Descriptors,
    appearance: Descriptors,
    config: SwapConfig | None = None,
    *,
    pose_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Image.Image:
    """Give the object in one image the looks of the object in the other.

    Args:
        image: RGB, keeps its pose and everything outside of its mask.
        other: RGB, lends its looks.
        pose, appearance: descriptors of the two, fused together.
        pose_mask: (H', W') over the whole of `image`, at any resolution: what is painted; everything where None.
        mask: the same for `other`: where looks may come from.

    Returns:
        RGB of the size of `image`.

    Raises:
        ValueError: a mask leaves nothing, or an image is not the one that was described.
    """
    config = config or SwapConfig()
    for picture, descriptors in ((image, pose), (other, appearance)):
        if (picture.height, picture.width) != descriptors.placement.image_size:
            raise ValueError(
                f"the image is {picture.height} x {picture.width}, its descriptors are of one of"
                f" {descriptors.placement.image_size[0]} x {descriptors.placement.image_size[1]}"
            )
    field = swap_field(pose, appearance, config, pose_mask=pose_mask, mask=mask)
    painted = warp(other, smooth_field(field, config.smooth))
    return composite(image, painted, pose_mask, feather=config.feather)


@torch.no_grad()
def swap_field(
    pose: Descriptors,
    appearance: Descriptors,
    config: SwapConfig | None = None,
    *,
    pose_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> SwapField:
    """Match places of one image with their nearest places in the other; masks as in `swap_appearance`.

    Raises:
        ValueError: a mask leaves nothing.
    """
    config = config or SwapConfig()
    size, other_size = (_reduced(d.placement.image_size, config.resolution) for d in (pose, appearance))
    painted, sources, places = _nearest_places(
        pose, appearance, size, other_size, pose_mask=pose_mask, mask=mask, metric=config.metric
    )
    if not bool(painted.any()):
        raise ValueError("there is no place to paint: the mask of the image that keeps its pose is empty")
    points = places.new_full((len(painted), 2), torch.nan)
    points[painted] = places[sources]
    step = max(appearance.placement.image_size) / max(other_size)
    return SwapField(points.unflatten(0, size), painted.unflatten(0, size), pose.placement.image_size, step)


@torch.no_grad()
def swap_colours(
    pose: Descriptors,
    appearance: Descriptors,
    colours: Tensor,
    size: tuple[int, int],
    *,
    pose_mask: Tensor | None = None,
    mask: Tensor | None = None,
    metric: Metric = "euclidean",
) -> Tensor:
    """Paint every place of one image with the colour of its nearest place in the other, as sd-dino's script does.

    The descriptors are read, bilinearly, at the pixels of `size` and of `colours`; the work grows with the product
    of the two numbers of pixels, so these are sizes such as 128 to 512 on a side, not those of photographs.

    Args:
        pose: of the image that is painted.
        appearance: of the image that lends its colours.
        colours: (3, h, w), the appearance image at any resolution.
        size: (h, w) of the result, over the whole pose image.
        pose_mask: (H', W') over the whole pose image, at any resolution: what is painted; everything where None.
        mask: the same for the appearance image: where colours may come from.

    Returns:
        (3, *size), black outside `pose_mask`.

    Raises:
        ValueError: `colours` is no (3, h, w) image, or `mask` leaves nothing.
    """
    if colours.ndim != 3 or colours.shape[0] != 3:
        raise ValueError(f"colours must be (3, h, w), got {tuple(colours.shape)}")
    painted, sources, _ = _nearest_places(
        pose, appearance, size, (colours.shape[1], colours.shape[2]), pose_mask=pose_mask, mask=mask, metric=metric
    )
    result = colours.new_zeros(3, size[0] * size[1])
    result[:, painted.to(colours.device)] = colours.flatten(1)[:, sources.to(colours.device)]
    return result.unflatten(1, size)


def _nearest_places(
    pose: Descriptors,
    appearance: Descriptors,
    size: tuple[int, int],
    other_size: tuple[int, int],
    *,
    pose_mask: Tensor | None,
    mask: Tensor | None,
    metric: Metric,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which of h * w places are painted (bool), from which of the other's places, and where all of those lie."""
    places, painted = _places(pose, size, pose_mask)
    other_places, lending = _places(appearance, other_size, mask)
    best = nearest(pose.at(places[painted]), appearance.at(other_places[lending]), metric)
    return painted, lending.nonzero()[:, 0][best.indices], other_places


def _places(descriptors: Descriptors, size: tuple[int, int], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h * w, 2) image points of the pixels of a resized image, and the (h * w,) bool that the mask selects."""
    image_size = descriptors.placement.image_size
    scale = torch.tensor([image_size[1] / size[1], image_size[0] / size[0]], device=descriptors.device)
    points = ((lattice(size, descriptors.device) + 0.5) * scale - 0.5).flatten(0, 1)
    if mask is None:
        return points, torch.ones(len(points), dtype=torch.bool, device=descriptors.device)
    return points, read_mask(mask, points, image_size)


def _reduced(size: tuple[int, int], long: int) -> tuple[int, int]:
    """The size (h, w) with `long` along the longer side, never more than there are pixels."""
    scale = min(1.0, long / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def smooth_field(field: SwapField, side: int) -> SwapField:
    """Replace points that are far from their neighbours' by the median, of x and of y, of a window of valid places.

    Far is more than half a window: a field that follows the object moves about one step per place.
    """
    if side == 1:
        return field
    margin = side // 2
    padded = F.pad(field.points.movedim(-1, 0)[None], (margin,) * 4, value=torch.nan)
    windows = F.unfold(padded, side).view(2, side * side, *field.valid.shape)
    median = windows.nanmedian(1).values.movedim(0, -1)
    outlying = (field.points - median).abs().amax(-1, keepdim=True) > (margin + 1) * field.step
    return replace(field, points=torch.where(outlying, median, field.points))


def warp(other: Image.Image, field: SwapField) -> Image.Image:
    """Read the lending image where the field says, at every pixel of the image that keeps its pose.

    Between the field's places the points are interpolated, but not across a jump of the field: there the nearest
    place alone counts. Pixels outside of the valid places are read as their nearest valid place.

    Returns:
        RGB of the size of the image that keeps its pose.
    """
    h, w = field.valid.shape
    points = _filled(field)
    height, width = field.image_size
    scale = torch.tensor([w / width, h / height])
    cells = (lattice((height, width)) + 0.5) * scale - 0.5
    base, share = cells.floor(), cells - cells.floor()
    total, weights = torch.zeros(height, width, 2), torch.zeros(height, width, 1)
    centre = cells.round().long()
    nearest_place = points[centre[..., 1].clamp(0, h - 1), centre[..., 0].clamp(0, w - 1)]
    for down in (0, 1):
        for right in (0, 1):
            column = (base[..., 0].long() + right).clamp(0, w - 1)
            row = (base[..., 1].long() + down).clamp(0, h - 1)
            near = points[row, column]
            together = (near - nearest_place).abs().amax(-1, keepdim=True) <= 4 * field.step
            corner = torch.tensor([right, down])
            weight = (1 - (share - corner).abs()).prod(-1, keepdim=True) * together
            total += weight * near
            weights += weight
    places = torch.where(weights > 0, total / weights.clamp(min=1e-12), nearest_place)
    pixels = torch.from_numpy(np.array(other.convert("RGB"))).permute(2, 0, 1)[None].float()
    span = torch.tensor([other.width, other.height])
    grid = (places + 0.5) * (2 / span) - 1
    read = F.grid_sample(pixels, grid[None], padding_mode="border", align_corners=False)[0]
    return Image.fromarray(read.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _filled(field: SwapField) -> Tensor:
    """(h, w, 2): the field's points with invalid places as their nearest valid one, on the CPU."""
    invalid = ~field.valid.cpu().numpy()
    rows, columns = ndimage.distance_transform_edt(invalid, return_distances=False, return_indices=True)
    return field.points.cpu()[torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]


def composite(image: Image.Image, painted: Image.Image, mask: Tensor | None, *, feather: float = 1.5) -> Image.Image:
    """Blend a painted image into one of the same size where a mask (H', W') over the whole image says so.

    Args:
        feather: sigma of the Gaussian that softens the mask's edge, pixels.
    """
    if mask is None:
        return painted
    shape = Image.fromarray((mask > 0).cpu().numpy().astype(np.uint8) * 255)
    soft = ndimage.gaussian_filter(np.asarray(shape.resize(image.size, Image.Resampling.BILINEAR), np.float32), feather)
    return Image.composite(painted, image, Image.fromarray(soft.round().astype(np.uint8)))
