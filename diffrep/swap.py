"""Instance swapping: one object keeps its pose and takes the other's colours (sd-dino, section 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffrep.fusion import Descriptors, lattice
from diffrep.matching import read_mask
from diffrep.similarity import Metric, nearest


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
    """Paint every place of one image with the colour of its nearest place in the other.

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
    there, painted = _places(pose, size, pose_mask)
    here, lending = _places(appearance, (colours.shape[1], colours.shape[2]), mask)
    best = nearest(pose.at(there[painted]), appearance.at(here[lending]), metric)
    result = colours.new_zeros(3, size[0] * size[1])
    result[:, painted.to(colours.device)] = colours.flatten(1)[:, lending][:, best.indices]
    return result.unflatten(1, size)


def _places(descriptors: Descriptors, size: tuple[int, int], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h * w, 2) image points of the pixels of a resized image, and the (h * w,) bool that the mask selects."""
    image_size = descriptors.placement.image_size
    scale = torch.tensor([image_size[1] / size[1], image_size[0] / size[0]], device=descriptors.device)
    points = ((lattice(size, descriptors.device) + 0.5) * scale - 0.5).flatten(0, 1)
    if mask is None:
        return points, torch.ones(len(points), dtype=torch.bool, device=descriptors.device)
    return points, read_mask(mask, points, image_size)
