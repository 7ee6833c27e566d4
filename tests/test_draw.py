from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.draw import (
    HEIGHT,
    RIGHT,
    WRONG,
    apart,
    draw_components,
    draw_contact_sheet,
    draw_field,
    draw_heat,
    draw_matches,
    heat_colours,
    point_colours,
    side_by_side,
    spread_over,
)
from diffrep.features import Descriptors
from diffrep.matching import Matches, match_dense

from .fields import generator


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def near(picture: Image.Image, x: float, y: float, colour: tuple[int, int, int], radius: int = 12) -> bool:
    """Whether a colour stands in the picture close to a place."""
    pixels = np.asarray(picture).astype(int)
    top, left = max(0, round(y) - radius), max(0, round(x) - radius)
    patch = pixels[top : round(y) + radius + 1, left : round(x) + radius + 1]
    return bool((np.abs(patch - np.array(colour)).max(-1) < 30).any())


def test_images_stand_in_a_row_at_one_height() -> None:
    picture, places = side_by_side([grey(100, 50), grey(40, 80)], height=200)
    (left_a, top_a, scale_a), (left_b, top_b, scale_b) = places
    assert (scale_a, scale_b) == (4.0, 2.5)
    assert picture.size == (round(left_b) + 100, 200)
    assert (left_a, top_a, top_b) == (0, 0, 0)
    titled, places = side_by_side([grey(100, 50)], titles=["one"], height=200)
    assert titled.height > 200
    assert places[0][1] == titled.height - 200


def test_points_and_matches_stand_where_they_belong() -> None:
    points, found = torch.tensor([[10.0, 10.0], [80.0, 40.0]]), torch.tensor([[90.0, 10.0], [20.0, 30.0]])
    truth = torch.tensor([[92.0, 10.0], [70.0, 45.0]])
    matches = Matches(found, torch.ones(2))
    picture = draw_matches(grey(100, 50), grey(100, 50), points, matches, truth=truth, tolerance=5, height=200)
    _, (_, (left, _, scale)) = side_by_side([grey(100, 50), grey(100, 50)], height=200)
    for point, match, colour in zip(points.tolist(), found.tolist(), point_colours(2), strict=True):
        assert near(picture, scale * point[0], scale * point[1], colour)
        assert near(picture, left + scale * match[0], scale * match[1], colour)
    right, wrong = ((left + scale * x, scale * y) for x, y in found.tolist())
    assert near(picture, *right, RIGHT)
    assert not near(picture, *right, WRONG)
    assert near(picture, *wrong, WRONG)
    assert not near(picture, *wrong, RIGHT)


def test_numbers_of_places_that_coincide_stand_apart_and_others_stay() -> None:
    places = [(50.0, 50.0), (50.0, 50.0), (58.0, 50.0), (2.0, 2.0), (150.0, 90.0)]
    moved = np.array(apart(places, 20, (200, 100)))
    gaps = np.linalg.norm(moved[:, None] - moved[None], axis=-1) + 100 * np.eye(5)
    assert gaps.min() > 19
    assert np.abs(moved[:3] - np.array(places[:3])).max() < 25
    assert moved[3:].tolist() == [list(place) for place in places[3:]]
    assert apart([], 20, (200, 100)) == []


def test_a_field_of_an_image_onto_itself_wears_the_same_colours() -> None:
    one = Descriptors.from_vectors(torch.randn(10, 12, 32, generator=generator()), (100, 120))
    image = grey(120, 100)
    picture = np.asarray(draw_field(image, image, match_dense(one, one), height=100)).astype(int)
    source, target = picture[10:90, 10:110], picture[10:90, -110:-10]
    # near the middle of the wheel the hues turn faster than the cells follow
    assert np.median(np.abs(source - target).max(-1)) < 25
    assert source.std(axis=(0, 1)).min() > 20
    with pytest.raises(ValueError, match="mask of a dense picture is empty"):
        draw_field(image, image, match_dense(one, one), mask=torch.zeros(100, 120, dtype=torch.bool))


def test_components_of_equal_features_have_equal_colours() -> None:
    vectors = torch.randn(6, 6, 8, generator=generator())
    one, mirrored = Descriptors.from_vectors(vectors), Descriptors.from_vectors(vectors.flip(1))
    picture = np.asarray(draw_components([grey(60, 60), grey(60, 60)], [one, mirrored], height=60)).astype(int)
    maps = picture[-60:]
    assert np.abs(maps[:, :60] - maps[:, -60:][:, ::-1]).max() <= 2
    assert maps[:, :60].std(axis=(0, 1)).min() > 20


def test_values_are_spread_between_their_places() -> None:
    places = torch.stack(torch.meshgrid(torch.arange(4) * 10.0 + 5, torch.arange(3) * 10.0 + 5, indexing="xy"), -1)
    spread = spread_over(places[..., :1].numpy(), places, (40, 30))
    np.testing.assert_allclose(spread[7, :, 0], np.clip(np.arange(40), 5, 35), atol=1e-4)


def test_heat_is_bright_where_values_are_large() -> None:
    one = Descriptors.from_vectors(torch.zeros(5, 8, 1), (100, 160))
    values = torch.zeros(5, 8)
    values[1, 6] = 1
    picture = draw_heat(grey(160, 100), values, one.cell_centres(), points=torch.tensor([[20.0, 80.0]]), height=100)
    light = np.asarray(picture.convert("L")).astype(int)
    row, column = np.unravel_index(light[:60, :160].argmax(), (60, 160))
    assert abs(column - 129.5) <= 6
    assert abs(row - 29.5) <= 6
    assert near(picture, 20, 80, (255, 255, 255), radius=10)
    assert picture.width > 160
    lightness = heat_colours(np.linspace(0, 1, 50)) @ np.array([0.3, 0.6, 0.1])
    assert (np.diff(lightness) > 0).all()
    values[:] = torch.nan
    with pytest.raises(ValueError, match="at least one finite value"):
        draw_heat(grey(160, 100), values, one.cell_centres())
    with pytest.raises(ValueError, match=r"values are \(2, 2\), their places \(5, 8, 2\)"):
        draw_heat(grey(160, 100), torch.zeros(2, 2), one.cell_centres())


@pytest.mark.parametrize("size", [(3000, 1), (100, 1), (1, 3000)])
def test_a_thin_image_is_drawn_within_the_memory_of_another(size: tuple[int, int]) -> None:
    thin = Image.new("RGB", size, (9, 90, 200))
    picture, places = side_by_side([thin, thin], titles=["a", "b"])
    assert picture.width * picture.height <= 10 * 4 * HEIGHT**2
    for left, top, scale in places:  # what is drawn at a point lies on the picture
        assert 0 <= left + scale * (size[0] - 0.5) <= picture.width
        assert 0 <= top + scale * (size[1] - 0.5) <= picture.height


def test_captions_with_control_characters_are_drawn_escaped() -> None:
    image = Image.new("RGB", (40, 30))
    names = ["0.99 two\nlines.png", "0.98 tab\tand \udcff.png"]
    sheet = draw_contact_sheet(image, [(image, name, None) for name in names])
    escaped = draw_contact_sheet(
        image, [(image, name, None) for name in (r"0.99 two\nlines.png", r"0.98 tab\tand \udcff.png")]
    )
    assert sheet.tobytes() == escaped.tobytes()
    side_by_side([image], titles=["two\nlines"])


def test_numbers_lie_over_what_marks_other_matches_and_grow_with_their_marks() -> None:
    """The second match misses, and belongs where the first one's number stands."""
    points, matched = torch.tensor([[10.0, 10.0], [80.0, 40.0]]), torch.tensor([[30.0, 25.0], [80.0, 25.0]])
    truth, sizes = matched[[0, 0]], []
    for marks in (1.0, 2.2):
        matches = Matches(matched, torch.ones(2))
        picture = draw_matches(
            grey(100, 50), grey(100, 50), points, matches, truth=truth, tolerance=5, height=200, marks=marks
        )
        _, (_, (left, _, scale)) = side_by_side([grey(100, 50), grey(100, 50)], height=200)
        x, y = round(left + scale * 30.5), round(scale * 25.5)
        reach = round(5 * marks)
        number = np.asarray(picture).astype(int)[y - reach : y + reach, x - reach : x + reach]
        assert (np.abs(number - np.array(WRONG)).max(-1) > 40).all()
        sizes.append(int((np.abs(np.asarray(picture).astype(int) - point_colours(1)[0]).max(-1) < 10).sum()))
    assert sizes[1] > 3 * sizes[0]
