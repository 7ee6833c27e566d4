from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.features import Descriptors
from diffrep.swap import cosegment, guided_filter, otsu_threshold

from .fields import generator


def scene(rows: slice, columns: slice, background: Tensor, thing: Tensor) -> tuple[Image.Image, Descriptors, Tensor]:
    """An object on a background that is its image's own: picture, descriptors of 16 x 16 places, mask."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[rows, columns] = True
    noise = 0.1 * torch.randn(16, 16, len(thing), generator=generator(1))
    vectors = torch.where(mask[..., None], thing, background) + noise
    large = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    picture = Image.fromarray((large[..., None] * torch.tensor([200, 60, 30])).byte().numpy())
    return picture, Descriptors.from_vectors(vectors, (128, 128)), large


def test_the_common_object_is_found_on_different_backgrounds() -> None:
    thing, one, two = torch.eye(8)[:3] * 3
    a = scene(slice(3, 9), slice(4, 12), one, thing)
    b = scene(slice(5, 13), slice(2, 7), two, thing)
    for found, (_, _, truth) in zip(cosegment([a[0], b[0]], [a[1], b[1]]), (a, b), strict=True):
        assert found.shape == (128, 128)
        assert float((found & truth).sum() / (found | truth).sum()) > 0.9


def test_two_images_are_asked_for_and_an_object() -> None:
    plain = Descriptors.from_vectors(torch.ones(4, 4, 3), (32, 32))
    image = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="takes two images, got 1"):
        cosegment([image], [plain])
    with pytest.raises(ValueError, match="no object was found in image 1 of 2: give its mask"):
        cosegment([image, image], [plain, plain])


def test_otsu_splits_two_heaps() -> None:
    values = torch.cat([torch.randn(300, generator=generator(0)), 8 + torch.randn(100, generator=generator(1))])
    assert 2 < float(otsu_threshold(values)) < 6


def test_the_guided_filter_keeps_what_is_linear_in_the_guide() -> None:
    guide = torch.rand(1, 3, 20, 24, generator=generator(0))
    maps = (guide * torch.tensor([2.0, -1.0, 0.5])[:, None, None]).sum(1, keepdim=True) + 3
    torch.testing.assert_close(guided_filter(maps, guide, radius=4, regularity=1e-9), maps, atol=1e-3, rtol=0)
    flat = torch.zeros_like(guide)
    noisy = torch.randn(1, 1, 20, 24, generator=generator(1))
    assert guided_filter(noisy, flat, radius=4).std() < 0.3 * noisy.std()  # without edges it is a mean
