"""Files of large images: every level of every kind reads back, and nothing half-written stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffrep.synthesis.canvas import Lines
from diffrep.synthesis.large import FileSettings, check_output, pyramid, write_pixels

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")

SIZE = (133, 210)
SMALL = FileSettings(tile=32, pixel_size=0.5)


@pytest.fixture
def pixels() -> Lines:
    lines = Lines((*SIZE, 3), "uint8")
    lines.write(0, np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    return lines


def halved(image: np.ndarray) -> np.ndarray:
    """The mean of 2 x 2 pixels, in plain floating point."""
    padded = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge").astype(float)
    blocks = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, 3)
    return np.floor(blocks.mean((1, 3)) + 0.5).astype(np.uint8)


def expected_levels(pixels: Lines) -> list[np.ndarray]:
    levels = [pixels.read(0, SIZE[0])]
    while max(levels[-1].shape[:2]) > SMALL.tile:
        levels.append(halved(levels[-1]))
    return levels


def test_pyramid(pixels: Lines, tmp_path: Path) -> None:
    found = pyramid(pixels, 32, lambda name, shape: Lines(shape, "uint8", tmp_path / name))
    expected = expected_levels(pixels)
    assert [level.shape for level in found] == [level.shape for level in expected]
    assert len(expected) == 4
    for ours, plain in zip(found, expected, strict=True):
        assert np.array_equal(ours.read(0, len(plain)), plain)


def test_ome_tiff_has_its_levels_as_sub_images(pixels: Lines, tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, pixels, SMALL, about={"seed": 3})
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        assert 'PhysicalSizeX="0.5"' in file.ome_metadata
        assert len(file.pages) == 1
        levels = file.series[0].levels
        for ours, plain in zip(levels, expected_levels(pixels), strict=True):
            assert np.array_equal(ours.asarray(), plain)
        assert levels[0].pages[0].tile == (32, 32)
        assert "&quot;seed&quot;: 3" in file.ome_metadata or '"seed": 3' in file.ome_metadata


def test_tiff_has_its_levels_as_pages(pixels: Lines, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_pixels(path, pixels, SMALL, about={"seed": 3})
    with tifffile.TiffFile(path) as file:
        assert not file.is_ome
        expected = expected_levels(pixels)
        assert len(file.pages) == len(expected)
        for number, (page, plain) in enumerate(zip(file.pages, expected, strict=True)):
            assert np.array_equal(page.asarray(), plain)
            assert page.is_reduced == (number > 0)
        assert json.loads(file.pages[0].description) == {"seed": 3}
        assert file.pages[0].get_resolution("CENTIMETER")[0] == pytest.approx(20000)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), expected[0])


def test_zarr_is_ome_zarr(pixels: Lines, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write_pixels(path, pixels, SMALL, about={"seed": 3})
    group = zarr.open_group(str(path), mode="r")
    attributes = dict(group.attrs)
    (scales,) = attributes["ome"]["multiscales"] if "ome" in attributes else attributes["multiscales"]
    assert [axis["name"] for axis in scales["axes"]] == ["c", "y", "x"]
    assert scales["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 0.5, 0.5]
    assert attributes["diffrep"] == {"seed": 3}
    for data_set, plain in zip(scales["datasets"], expected_levels(pixels), strict=True):
        assert np.array_equal(np.asarray(group[data_set["path"]][:]).transpose(1, 2, 0), plain)


def test_nothing_half_written_stays(pixels: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tiff", "a.ome.tiff", "a.png", "a.zarr"):
        left = [0 if name == "a.png" else 6]

        def fail(start: int, stop: int, left: list[int] = left) -> np.ndarray:
            if not left[0]:
                raise OSError("the disk broke")
            left[0] -= 1
            return Lines.read(pixels, start, stop)

        monkeypatch.setattr(pixels, "read", fail)
        (tmp_path / "old.txt").write_text("")
        with pytest.raises(OSError, match="the disk broke"):
            write_pixels(tmp_path / name, pixels, SMALL)
        assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]


def test_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png"):
        check_output(tmp_path / "a.svs", SIZE)
    with pytest.raises(ValueError, match=r"too many for this kind of file; use \.tiff"):
        check_output(tmp_path / "a.png", (20000, 20000))
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ValueError, match="is already there"):
        check_output(tmp_path / "a.zarr", SIZE)
    for bad in ({"tile": 100}, {"quality": 0}, {"pixel_size": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            FileSettings(**bad)
