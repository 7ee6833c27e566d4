from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffrep.backbones import Backbone, Grid, TapError, load_backbone
from diffrep.features import ExtractConfig, FeatureMaps, extract, extract_each, window_origins
from diffrep.images import ImageError, Placement, Sizing, fit_image

RANDOM = np.random.default_rng(0)


def picture(height: int, width: int) -> Image.Image:
    small = RANDOM.integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> Backbone:
    return load_backbone(sd_folder)


@pytest.fixture(scope="module")
def vit(vit_folder: Path) -> Backbone:
    return load_backbone(vit_folder)


CONFIG = ExtractConfig(taps=("up.1", "mid"), sizing=Sizing("pad", 64), timestep=100, ensemble=2, seed=3)


def pixels_as_features(height: int, width: int, cells: tuple[int, int], sizing: Sizing) -> FeatureMaps:
    """A map whose two channels are the canvas coordinates of its cell centres."""
    _, placement = fit_image(Image.new("RGB", (width, height)), sizing)
    grid = Grid.covering(placement.canvas_size, cells)
    rows, columns = torch.meshgrid(torch.arange(cells[0]), torch.arange(cells[1]), indexing="ij")
    centres = torch.stack([columns * grid.stride[0] + grid.origin[0], rows * grid.stride[1] + grid.origin[1]])
    return FeatureMaps({"xy": centres[None].float()}, (placement,), {"xy": grid})


@given(
    st.integers(20, 200),
    st.integers(20, 200),
    st.sampled_from([(12, 12), (7, 11), (15, 17)]),
    st.sampled_from(
        [Sizing("squash", 96), Sizing("pad", 120), Sizing("fit", 100, multiple=8), Sizing("squash", (90, 61))]
    ),
)
def test_a_point_reads_the_feature_at_its_place(
    height: int, width: int, cells: tuple[int, int], sizing: Sizing
) -> None:
    maps = pixels_as_features(height, width, cells, sizing)
    points = torch.tensor([[width * 0.5, height * 0.5], [width * 0.4, height * 0.6]])[None]
    # interpolation of the coordinates between cell centres gives the coordinates themselves
    torch.testing.assert_close(maps.at("xy", points)[0], maps.placements[0].to_canvas(points[0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(maps.points("xy", maps.cells("xy", points[0])), points[0], rtol=0, atol=1e-3)
    inside = maps.content_mask("xy")
    centres = maps.cell_centres("xy")[inside]
    assert inside.any()
    assert (centres >= -0.5).all()
    assert (centres[:, 0] <= width - 0.5).all()


def test_at_on_a_map_of_the_images_own_size_returns_its_pixels() -> None:
    values = torch.rand(1, 3, 9, 14)
    maps = FeatureMaps({"rgb": values}, (Placement.identity((9, 14)),), {"rgb": Grid.covering((9, 14), (9, 14))})
    points = torch.tensor([[0.0, 0.0], [13.0, 8.0], [5.0, 2.0]])
    torch.testing.assert_close(maps.at("rgb", points[None])[0], values[0, :, [0, 8, 2], [0, 13, 5]].T)


def test_feature_maps_refuse_what_does_not_belong_together() -> None:
    grid, placement = Grid.covering((8, 8), (2, 2)), Placement.identity((8, 8))
    with pytest.raises(ValueError, match="at least one map"):
        FeatureMaps({}, (), {})
    with pytest.raises(ValueError, match="B = 1 placements"):
        FeatureMaps({"a": torch.zeros(2, 3, 2, 2)}, (placement,), {"a": grid})
    with pytest.raises(ValueError, match="but grids"):
        FeatureMaps({"a": torch.zeros(1, 3, 2, 2)}, (placement,), {"b": grid})


def test_extraction_does_not_depend_on_company_order_or_batches(sd: Backbone) -> None:
    images = [picture(50, 70), picture(64, 40), picture(33, 64), picture(64, 64)]
    together = extract(sd, images, CONFIG)
    assert (len(together), together.taps) == (4, ("up.1", "mid"))
    backwards = extract(sd, images[::-1], ExtractConfig(**{**vars(CONFIG), "batch_size": 3}))
    for i, image in enumerate(images):
        alone = extract(sd, [image], ExtractConfig(**{**vars(CONFIG), "batch_size": 1}))
        for tap in together.taps:
            torch.testing.assert_close(together[i].maps[tap], alone.maps[tap], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(backwards[3 - i].maps[tap], alone.maps[tap], rtol=1e-4, atol=1e-5)
        assert together[i].placements == alone.placements


def test_images_are_encoded_once_each(sd: Backbone) -> None:
    seen: list[int] = []
    handle = sd.vae.encoder.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[0]))
    extract(sd, [picture(64, 64)] * 3, ExtractConfig(ensemble=5, sizing=Sizing("squash", 64), batch_size=4))
    handle.remove()
    assert sum(seen) == 3


def test_the_result_says_how_it_was_made(sd: Backbone, sd_folder: Path) -> None:
    settings = extract(sd, [picture(32, 32)], CONFIG).settings
    assert settings["weights"] == str(sd_folder)
    assert (settings["dtype"], settings["timestep"], settings["seed"]) == ("float32", 100, 3)
    assert settings["posterior"] == "sample"  # the backbone's own, filled in


def test_images_of_different_shapes_come_one_by_one(sd: Backbone) -> None:
    config = ExtractConfig(taps=("up.1",), sizing=Sizing("native", None), timestep=50)
    images = [picture(40, 64), picture(40, 64), picture(64, 41)]
    maps = list(extract_each(sd, images, config))
    assert [m.maps["up.1"].shape[-2:] for m in maps] == [(3, 4), (3, 4), (4, 3)]
    assert maps[2].placements[0].canvas_size == (64, 48)
    with pytest.raises(ValueError, match="different sizes"):
        extract(sd, images, config)
    with pytest.raises(ValueError, match="at least one image"):
        extract(sd, [], config)


def test_bad_requests_are_named(sd: Backbone, tmp_path: Path) -> None:
    with pytest.raises(TapError, match=r"no tap 'up\.9'"):
        extract(sd, [picture(32, 32)], ExtractConfig(taps=("up.9",)))
    with pytest.raises(ImageError, match=r"gone\.png"):
        extract(sd, [tmp_path / "gone.png"])
    with pytest.raises(ValueError, match="timestep"):
        extract(sd, [picture(32, 32)], ExtractConfig(timestep=1000))
    with pytest.raises(ValueError, match="batch_size"):
        ExtractConfig(batch_size=0)


@pytest.mark.parametrize(
    ("side", "window", "origins"),
    [(960, 512, [0, 448]), (64, 64, [0]), (40, 64, [0]), (200, 64, [0, 64, 128, 136])],
)
def test_windows_cover_the_side(side: int, window: int, origins: list[int]) -> None:
    assert window_origins(side, window) == origins


def test_windows_are_averaged_where_they_overlap(sd: Backbone) -> None:
    image = picture(96, 96)
    tiled = extract(sd, [image], ExtractConfig(taps=("up.3",), sizing=Sizing("native", None), window=64, timestep=50))
    assert tiled.maps["up.3"].shape[-2:] == (12, 12)
    total, count = torch.zeros(1, tiled.maps["up.3"].shape[1], 12, 12), torch.zeros(12, 12)
    for y in (0, 32):
        for x in (0, 32):
            part = extract(
                sd,
                [image.crop((x, y, x + 64, y + 64))],
                ExtractConfig(taps=("up.3",), sizing=Sizing("native", None), timestep=50),
            ).maps["up.3"]
            total[..., y // 8 : y // 8 + 8, x // 8 : x // 8 + 8] += part
            count[y // 8 : y // 8 + 8, x // 8 : x // 8 + 8] += 1
    torch.testing.assert_close(tiled.maps["up.3"], total / count, rtol=1e-4, atol=1e-5)
    assert tiled.grids["up.3"] == Grid((3.5, 3.5), (8.0, 8.0))
    one = ExtractConfig(taps=("up.3",), sizing=Sizing("native", None), window=96, timestep=50)
    whole = ExtractConfig(taps=("up.3",), sizing=Sizing("native", None), timestep=50)
    torch.testing.assert_close(extract(sd, [image], one).maps["up.3"], extract(sd, [image], whole).maps["up.3"])


def test_windows_between_cells_go_to_the_cell_before(sd: Backbone) -> None:
    tap, image = "mid", picture(96, 72)
    settings = {"taps": (tap,), "sizing": Sizing("native", None), "timestep": 50}
    tiled = extract(sd, [image], ExtractConfig(**settings, window=64)).maps[tap]  # type: ignore[arg-type]
    total, count = torch.zeros_like(tiled), torch.zeros(tiled.shape[-2:])
    for y, x in ((0, 0), (0, 8), (32, 0), (32, 8)):
        part = extract(sd, [image.crop((x, y, x + 64, y + 64))], ExtractConfig(**settings)).maps[tap]  # type: ignore[arg-type]
        side = part.shape[-1]
        stride = 64 // side
        assert stride > 8  # the second column of windows starts between cells
        place = np.s_[..., y // stride : y // stride + side, x // stride : x // stride + side]
        total[place] += part
        count[place] += 1
    assert tiled.shape[-2:] == (96 // stride, 72 // stride)
    torch.testing.assert_close(tiled, total / count, rtol=1e-4, atol=1e-5)


def test_windows_that_cut_cells_are_refused(vit_folder: Path) -> None:
    overlapping = load_backbone(vit_folder, stride=4)  # a window of 64 has 15 cells of 4
    with pytest.raises(ValueError, match="multiples of the stride"):
        extract(
            overlapping, [picture(96, 96)], ExtractConfig(taps=("layer.1",), sizing=Sizing("native", None), window=64)
        )


def test_a_vit_needs_no_conditions(vit: Backbone) -> None:
    maps = extract(
        vit,
        [picture(30, 90)],
        ExtractConfig(taps=("layer.1", "layer.2.key"), sizing=Sizing("squash", (32, 96))),
    )
    assert maps.maps["layer.2.key"].shape == (1, 24, 4, 12)
    assert maps.at("layer.1", torch.tensor([[[44.5, 14.5]]])).shape == (1, 1, 24)
    centre = torch.tensor([[44.5, 14.5]])  # the image's centre lies between the middle cells
    torch.testing.assert_close(maps.cells("layer.1", centre), torch.tensor([[5.5, 1.5]]))
