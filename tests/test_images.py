from __future__ import annotations

import io
import os
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from diffrep import images
from diffrep.files import DRAWING, printable, write_image
from diffrep.images import ImageError, Placement, Sizing, decode_image, find_images, fit_image, load_image


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, 0 * rows + 40], -1).astype(np.uint8)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(gradient(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert loaded.size == (20, 30)
    np.testing.assert_array_equal(np.asarray(loaded), np.rot90(gradient(20, 30), k=-1))


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = np.asarray(load_image(tmp_path / "deep.png"))
    assert loaded.shape == (8, 8, 3)
    np.testing.assert_array_equal(loaded[..., 0], np.round(values / 257).astype(np.uint8))


def test_transparency_is_composited(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 0], rgba[:2, :, 3] = 200, 255
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    loaded = np.asarray(load_image(tmp_path / "cut.png", background=(0, 255, 0)))
    assert (loaded[:2] == (200, 0, 0)).all()
    assert (loaded[2:] == (0, 255, 0)).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    loaded = load_image(
        Image.fromarray(gradient(9, 7)).convert("RGBA").convert(mode)
        if mode != "CMYK"
        else Image.fromarray(gradient(9, 7)).convert(mode)
    )
    assert (loaded.mode, loaded.size) == ("RGB", (7, 9))


def test_arrays_and_tensors_agree() -> None:
    array = gradient(11, 13)
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    for source in (array, array / 255.0, tensor, Image.fromarray(array)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), array)


def test_bad_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    cut, empty, text = tmp_path / "cut.jpg", tmp_path / "empty.png", tmp_path / "text.png"
    cut.write_bytes(whole.read_bytes()[:900])
    empty.touch()
    text.write_text("no image")
    for path, what in (
        (tmp_path / "gone.png", "no such image"),
        (empty, "empty"),
        (cut, "cannot be decoded"),
        (text, "not an image"),
        (tmp_path, "not a file"),
    ):
        with pytest.raises(ImageError, match=what) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ImageError, match="limit of 1,000"):
        load_image(whole, max_pixels=1000)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.full((4, 4), 3.0),
        np.full((4, 4), np.nan),
        np.zeros((4, 4), np.int32),
    ],
)
def test_bad_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError):
        load_image(array)


def test_a_broken_tag_beside_sound_pixels_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(__file__).parent / "cases/broken-exif.jpg"

    def fail(*arguments: object, **options: object) -> bytes:
        raise TypeError("write_string() takes text")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)  # what some versions of Pillow do with its tags
    assert load_image(broken).size == (64, 96)  # turned
    monkeypatch.setattr(Image.Exif, "get", fail)
    assert load_image(broken).size == (96, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient(8, 12)).save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(expected))


def test_photographs_of_telephones_are_read_and_never_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(gradient(48, 64))).save(tmp_path / "a.HEIC", quality=95)
    assert find_images([tmp_path]) == [tmp_path / "a.HEIC"]
    difference = np.asarray(load_image(tmp_path / "a.HEIC")).astype(int) - gradient(48, 64)
    assert np.abs(difference).mean() < 4
    images._readable.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    try:
        assert find_images([tmp_path]) == [tmp_path / "a.HEIC"]
        with pytest.raises(ImageError, match=r"a.HEIC: reading HEIF needs pillow-heif: pip install 'diffrep\[heif\]'"):
            load_image(tmp_path / "a.HEIC")
    finally:
        images._readable.cache_clear()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "DDS", "TGA"])
def test_damaged_files_of_every_form_are_named(form: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(24, 36)).save(buffer, form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}))
    content, draws = buffer.getvalue(), np.random.default_rng(0)
    if form in ("DDS", "TGA"):  # photographs do not come in these
        with pytest.raises(ImageError, match="JPEG"):
            decode_image(content, "a")
        return
    assert decode_image(content, "a").size in ((36, 24), (24, 36))
    outcomes = Counter()
    for _ in range(60):
        damaged = bytearray(content)
        for at in draws.integers(0, min(len(content), 400), draws.integers(1, 6)):
            damaged[at] = draws.integers(256)
        try:
            decode_image(bytes(damaged), "two\nlines")
            outcomes["read"] += 1
        except ImageError as error:
            outcomes["refused" if str(error).startswith("two\\nlines: ") else "unnamed"] += 1
    assert not outcomes["unnamed"]
    assert sum(outcomes.values()) == 60
    assert outcomes["refused"] or form in ("BMP", "PPM", "JPEG")


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, KeyError, OverflowError, MemoryError, struct.error]
)
def test_whatever_a_decoder_raises_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(gradient(8, 12)).save(tmp_path / "a.png")

    def fail(self: object) -> None:
        raise error("a\nreason")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError, match=r"a\.png: cannot be decoded") as caught:
        load_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_float_files_are_named_and_other_arrays_are_taken(tmp_path: Path) -> None:
    for name, values in (("large", [[0.0, 255.0]]), ("nan", [[0.0, np.nan]])):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / f"{name}.tif")
        with pytest.raises(ImageError, match=rf"{name}\.tif: a float image must lie in \[0, 1\]"):
            load_image(tmp_path / f"{name}.tif")
    array = gradient(8, 12)
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    assert load_image(tensor.bfloat16()).size == (12, 8)
    np.testing.assert_array_equal(np.asarray(load_image(array[::-1, ::-1])), array[::-1, ::-1])


def test_folders_take_what_can_be_read_and_nothing_hidden(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient(8, 12))
    for name in ("a.png", "b.avif", "c.jfif", "sub/d.JPG", ".ipynb_checkpoints/a.png", "._a.png", "e.dds"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name, "AVIF" if name.endswith("avif") else "PNG")
    (tmp_path / "notes.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # who opens it waits
    assert [p.name for p in find_images([tmp_path])] == ["a.png", "b.avif", "c.jfif", "d.JPG"]
    assert find_images([tmp_path / "._a.png"]) == [tmp_path / "._a.png"]  # named
    assert [p.name for p in find_images([tmp_path / ".ipynb_checkpoints"])] == ["a.png"]
    assert [p.name for p in find_images([str(tmp_path / "*.png")])] == ["a.png"]
    assert len(find_images([str(tmp_path / ".*" / "*.png")])) == 1


def test_folders_that_cannot_be_opened_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = tmp_path / "closed"
    for path in (closed / "a.png", tmp_path / "b.png"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    scandir = os.scandir

    def refused(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert [path.name for path in find_images([tmp_path])] == ["b.png"]
    assert caplog.messages == [f"{closed}: passed over, the folder cannot be read (Permission denied)"]
    with pytest.raises(ImageError, match=r"closed: the folder cannot be read \(Permission denied\)"):
        find_images([closed])


def test_spellings_of_one_file_are_one_image(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(gradient(8, 12)).save(folder / "a.png")
    (tmp_path / "link").symlink_to(folder)
    spellings = [folder / "a.png", folder / ".." / "photos" / "a.png", tmp_path / "link", folder]
    assert find_images(spellings) == [folder / "a.png"]


def test_names_can_be_printed() -> None:
    assert printable("two\nlines\x1b[31m.png") == r"two\nlines\x1b[31m.png"
    assert printable(os.fsdecode(b"caf\xe9.png")).encode() == rb"caf\udce9.png"
    assert printable("café 图 n\u00a0b.png") == "café 图 n\u00a0b.png"
    assert "\u202e" not in printable("gpj\u202e.exe")


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "notes.txt", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in find_images([tmp_path])] == ["a.jpg", "b.png", "c.webp"]
    assert [p.name for p in find_images([str(tmp_path / "*.png"), tmp_path / "b.png"])] == ["b.png"]
    with pytest.raises(ImageError, match="no such file"):
        find_images([tmp_path / "nothing"])
    with pytest.raises(ImageError, match="no image found"):
        find_images([str(tmp_path / "*.gif")])
    (tmp_path / "maps").mkdir()
    write_image(tmp_path / "maps" / "a_depth.png", Image.new("RGB", (4, 4)))
    write_image(tmp_path / "maps" / "found.png", Image.new("RGB", (4, 4)), mark=DRAWING)
    with pytest.raises(ImageError, match="maps, masks and drawings that diffrep wrote are passed over"):
        find_images([tmp_path / "maps"])
    write_image(tmp_path / "maps" / "swapped.png", Image.new("RGB", (4, 4)))
    assert [p.name for p in find_images([tmp_path / "maps"])] == ["swapped.png"]


SIZINGS = st.sampled_from(
    [
        Sizing("squash", 96),
        Sizing("squash", (64, 120)),
        Sizing("pad", 96),
        Sizing("pad", 77, fill="edge"),
        Sizing("fit", 90, multiple=16),
        Sizing("native", None, multiple=8),
        Sizing("native", None, multiple=1),
    ]
)


@given(st.integers(1, 150), st.integers(1, 150), SIZINGS)
def test_points_survive_the_way_to_the_canvas_and_back(height: int, width: int, sizing: Sizing) -> None:
    canvas, placement = fit_image(Image.fromarray(gradient(height, width)), sizing)
    assert canvas.shape[1:] == placement.canvas_size
    points = torch.tensor([[0.0, 0.0], [width - 1.0, height - 1.0], [width / 3, height / 2]], dtype=torch.float64)
    torch.testing.assert_close(placement.to_image(placement.to_canvas(points)), points)
    x0, y0, x1, y1 = placement.content_box
    corners = torch.tensor([[-0.5, -0.5], [width - 0.5, height - 0.5]], dtype=torch.float64)
    expected = torch.tensor([[x0, y0], [x1, y1]], dtype=torch.float64) - 0.5
    torch.testing.assert_close(placement.to_canvas(corners), expected)  # edges map to edges
    if sizing.mode in ("fit", "native"):
        assert all(side % sizing.multiple == 0 for side in placement.canvas_size)


def test_pad_centres_as_sd_dino_does() -> None:
    canvas, placement = fit_image(Image.fromarray(gradient(97, 200)), Sizing("pad", 60, resample="lanczos"))
    height = round(60 * 97 / 200)
    assert placement.content_box == (0.0, (60 - height) // 2, 60.0, (60 - height) // 2 + height)
    assert (canvas[:, : (60 - height) // 2] == 0).all()


def test_native_repeats_the_edge_and_keeps_the_pixels() -> None:
    array = gradient(13, 21)
    canvas, placement = fit_image(Image.fromarray(array), Sizing("native", None, multiple=8))
    assert placement == Placement((13, 21), (16, 24), (0.0, 0.0, 21.0, 13.0))
    np.testing.assert_array_equal(canvas[:, :13, :21].permute(1, 2, 0).numpy(), array)
    assert (canvas[:, 13:, :21] == canvas[:, 12:13, :21]).all()
    assert Placement.identity((13, 21)).to_canvas(torch.tensor([3.0, 4.0])).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "arguments", [("pad", None), ("squash", 0), ("pad", (8, 8)), ("fit", 8, "bicubic", "black", 0)]
)
def test_impossible_sizings_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"size|multiple"):
        Sizing(*arguments)


def test_maps_that_diffrep_wrote_are_no_photographs(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 12), (200, 30, 90))
    picture.save(tmp_path / "cat.png")
    picture.save(tmp_path / "bear_mask.png")  # somebody's own
    for name in ("cat_depth.png", "cat_depth_preview.png", "cat_mask.png", "swapped.png"):
        write_image(tmp_path / name, picture)
    for name in ("match.png", "match.jpg", "match.webp"):
        write_image(tmp_path / name, picture, mark=DRAWING)
    assert [path.name for path in find_images([tmp_path])] == ["bear_mask.png", "cat.png", "swapped.png"]
    assert find_images([tmp_path / "cat_mask.png"]) == [tmp_path / "cat_mask.png"]


def test_a_name_as_long_as_names_get_is_written(tmp_path: Path) -> None:
    longest = tmp_path / f"{'é' * 125}.png"
    write_image(longest, Image.new("RGB", (4, 4)))
    assert list(tmp_path.iterdir()) == [longest]


def test_a_folder_in_the_place_of_an_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"is not a file but a folder; `diffrep.images.find_images` lists"):
        load_image(tmp_path)
