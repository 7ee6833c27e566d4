"""Masks of objects, in all the forms in which people and programs keep them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.files import printable
from diffrep.images import ImageError, ImageLike, load_image, upright

_LABELS = 64  # a map of more different values than this holds shades, not labels
_VOID = 255  # the label of the border around objects in palette masks (PASCAL VOC)


def load_mask(source: ImageLike, *, empty: bool = False) -> Tensor:
    """Read the mask of an object.

    An image with transparency (a cut-out) is a mask by its alpha alone. A palette image of colours is a map of labels,
    of which 0 is the background and 255 the undecided border. Of two different values the larger one is the object,
    whatever they are (0 and 255, 0 and 1, 0 and 65535); of a few small ones, labels, all but 0; of shades the bright
    half.

    Args:
        source: an image as `load_image` takes it, or a (H, W) array or tensor of any number type or bool.
        empty: whether a mask without any object is fine.

    Returns:
        (H, W) bool.

    Raises:
        ImageError: the image cannot be read, or the mask is empty or cannot be told from a picture; the message says
            which values it holds.
    """
    name = printable(source) if isinstance(source, (str, os.PathLike)) else "the mask"
    if isinstance(source, (Tensor, np.ndarray)) and source.ndim == 2:
        values = source.detach().cpu().float().numpy() if isinstance(source, Tensor) else source
        inside = _object(values, name)
    else:
        inside = _object_of_image(source, name)
    if not empty and not inside.any():
        raise ImageError(f"{name}: the mask is empty, no pixel of it is an object's")
    return torch.from_numpy(np.array(inside, order="C"))


def _object_of_image(source: ImageLike, name: str) -> np.ndarray:
    colours = load_image(source)  # refuses what cannot be read
    if isinstance(source, (str, os.PathLike)):
        with Image.open(Path(source)) as opened:
            opened.load()
            image = upright(opened).copy()
    elif isinstance(source, Image.Image):
        image = upright(source)
    else:
        array = source.detach().cpu().movedim(0, -1).float().numpy() if isinstance(source, Tensor) else source
        if array.shape[-1] != 4:
            return _object(np.asarray(colours.convert("L")), name)
        scale = 255 if np.issubdtype(array.dtype, np.floating) else 1
        image = Image.fromarray((array * scale).clip(0, 255).astype(np.uint8), "RGBA")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if int(alpha.min()) < 255:
            return np.asarray(alpha > 127)
    if image.mode == "P":
        red, green, blue = (channel.astype(int) for channel in np.moveaxis(np.asarray(image.convert("RGB")), -1, 0))
        if (red != green).any() or (red != blue).any():
            labels = np.asarray(image)
            return np.asarray((labels > 0) & ((labels != _VOID) | (np.unique(labels).size <= 2)))
    single = image.mode == "F" or image.mode.startswith("I") or image.mode in ("1", "L")
    return _object(np.asarray(image if single else colours.convert("L")), name)


def _object(values: np.ndarray, name: str) -> np.ndarray:
    """Which of a map's values are the object's."""
    if values.dtype == bool:
        return values
    different = np.unique(values)
    if different.size and not np.isfinite(different[-1]):
        raise ImageError(f"{name}: the mask holds values that are no numbers")
    if different.size == 2:
        return np.asarray(values == different[-1])
    if different.size < 2:
        return np.full(values.shape, bool(different.size) and bool(different[0] > 0))
    full = next(top for top in (1, 255, 65535, np.inf) if different[-1] <= top)
    if different[-1] > full / 2:
        return np.asarray(values > full / 2)
    if different.size <= _LABELS:
        return np.asarray(values > 0)
    raise ImageError(
        f"{name}: is this a mask? It holds {different.size} different values from {different[0]:g} to"
        f" {different[-1]:g}, none of them bright"
    )


def read_mask(mask: Tensor, points: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Read a mask (H', W') over the whole image of (H, W) pixels at image points (..., 2): bool (...).

    Raises:
        ValueError: it is no such map.
    """
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"a mask must be (height, width) over the whole image, got {tuple(mask.shape)}")
    scale = points.new_tensor([mask.shape[1] / image_size[1], mask.shape[0] / image_size[0]])
    columns, rows = ((points + 0.5) * scale).floor().long().unbind(-1)
    return mask.to(points.device)[rows.clamp(0, mask.shape[0] - 1), columns.clamp(0, mask.shape[1] - 1)] > 0
