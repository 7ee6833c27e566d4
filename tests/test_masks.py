"""Masks in every form give the same object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.images import ImageError
from diffrep.masks import load_mask

INSIDE = np.zeros((20, 30), bool)
INSIDE[5:15, 10:22] = True


def forms() -> dict[str, Image.Image]:
    inside = INSIDE
    colours = np.full((*inside.shape, 3), 250, np.uint8)
    alpha = np.where(inside, 255, 0).astype(np.uint8)
    palette = Image.fromarray(np.where(inside, 15, 0).astype(np.uint8))
    palette.putpalette([0, 0, 0] * 15 + [128, 0, 0] + [0, 0, 0] * 240)
    void = np.where(inside, 3, 0).astype(np.uint8)
    void[2:4] = 255
    labels = Image.fromarray(void)
    labels.putpalette([0, 0, 0] * 3 + [0, 128, 0] + [0, 0, 0] * 251 + [224, 224, 192])
    several = np.where(inside, 2, 0).astype(np.uint8)
    several[5:8, 10:22] = 1
    shades = np.where(inside, 230, 20).astype(np.uint8)
    shades[0] = np.arange(30)
    return {
        "255": Image.fromarray(alpha),
        "01": Image.fromarray(inside.astype(np.uint8)),
        "bilevel": Image.fromarray(inside),
        "sixteen": Image.fromarray(inside.astype(np.uint16) * 65535),
        "sixteen01": Image.fromarray(inside.astype(np.uint16)),
        "rgb": Image.fromarray(np.where(inside[..., None], [128, 0, 0], 0).astype(np.uint8)),
        "cutout": Image.fromarray(np.dstack([colours, alpha])),
        "alpha": Image.fromarray(np.dstack([np.zeros_like(alpha), alpha])),
        "opaque": Image.fromarray(np.dstack([np.repeat(alpha[..., None], 3, 2), np.full_like(alpha, 255)])),
        "palette": palette,
        "void": labels,
        "several": Image.fromarray(several),
        "shades": Image.fromarray(shades),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_every_form_is_the_same_object(form: str, tmp_path: Path) -> None:
    image = forms()[form]
    image.save(tmp_path / "mask.png")
    assert torch.equal(load_mask(tmp_path / "mask.png"), torch.from_numpy(INSIDE))
    assert torch.equal(load_mask(image), torch.from_numpy(INSIDE))


def test_arrays_are_masks_too() -> None:
    expected = torch.from_numpy(INSIDE)
    for array in (INSIDE, INSIDE.astype(float), INSIDE.astype(np.uint8) * 255, INSIDE[::-1].copy()[::-1]):
        assert torch.equal(load_mask(array), expected)
    assert torch.equal(load_mask(torch.from_numpy(INSIDE).bfloat16()), expected)


def test_no_mask_is_said_to_be_empty(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(ImageError, match=r"black\.png: the mask is empty"):
        load_mask(tmp_path / "black.png")
    assert not load_mask(tmp_path / "black.png", empty=True).any()
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(tmp_path / "dim.png")
    with pytest.raises(ImageError, match=r"dim\.png: is this a mask\? It holds 100 different values from 0 to 99"):
        load_mask(tmp_path / "dim.png")
    with pytest.raises(ImageError, match="no such image"):
        load_mask(tmp_path / "none.png")
