from __future__ import annotations

import pytest
import torch

from diffrep.fusion import Descriptors
from diffrep.swap import swap_colours

from .fields import generator


def test_an_image_swapped_with_its_mirror_is_that_mirror() -> None:
    vectors = torch.randn(9, 12, 16, generator=generator(1))
    colours = torch.rand(3, 9, 12, generator=generator(2))
    one, mirrored = Descriptors.from_vectors(vectors), Descriptors.from_vectors(vectors.flip(1))
    assert torch.equal(swap_colours(mirrored, one, colours, (9, 12)), colours.flip(2))


def test_masks_say_what_is_painted_and_what_lends() -> None:
    vectors = torch.randn(8, 8, 16, generator=generator(1))
    one = Descriptors.from_vectors(vectors, (80, 80))  # masks and colours may have other resolutions
    colours = torch.zeros(3, 16, 16)
    colours[0, :, :8], colours[1, :, 8:] = 1, 1
    left, right = torch.zeros(4, 4), torch.zeros(2, 2)
    left[:, :2], right[:, 1] = 1, 1
    swapped = swap_colours(one, one, colours, (16, 16), pose_mask=left, mask=right)
    assert torch.equal(swapped[:, :, 8:], torch.zeros(3, 16, 8))
    assert torch.equal(swapped[:, :, :8], torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 16, 8))


def test_what_cannot_be_painted_is_named() -> None:
    one = Descriptors.from_vectors(torch.ones(4, 4, 2))
    with pytest.raises(ValueError, match=r"colours must be \(3, h, w\), got \(4, 4\)"):
        swap_colours(one, one, torch.ones(4, 4), (4, 4))
    with pytest.raises(ValueError, match="mask leaves none"):
        swap_colours(one, one, torch.ones(3, 4, 4), (4, 4), mask=torch.zeros(4, 4))
