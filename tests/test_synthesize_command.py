"""``diffrep synthesize`` from the shell."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffrep.cli import main
from diffrep.commands.synthesize import parse_size
from diffrep.synthesis import About

from .test_synthesis_model import small_model


@pytest.fixture(scope="module")
def model_folder(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 16 pixels, embeddings of the small ViT."""
    folder = tmp_path_factory.mktemp("synthesis") / "model"
    small_model(About(encoder=str(vit_folder), pooling="mean"), dims=(24,)).save(folder)
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "reference.png")
    return tmp_path / "reference.png"


def paint(model: Path, output: Path, *options: object) -> int:
    fixed = ["--model", model, "--steps", 2, "--quiet", "-o", output]
    return main(["synthesize", *map(str, [*fixed, *options])])


def test_a_reference_becomes_an_image(model_folder: Path, reference: Path, tmp_path: Path) -> None:
    assert paint(model_folder, tmp_path / "a.png", "--reference", reference) == 0
    with Image.open(tmp_path / "a.png") as image:
        first = np.asarray(image)
    assert first.shape == (48, 32, 3)  # 3 x 2 windows come nearest to 48 x 40 pixels
    # the same again; another seed, another size, another reference are other images
    assert paint(model_folder, tmp_path / "b.png", "--reference", reference) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png").convert("RGB")), first)
    assert paint(model_folder, tmp_path / "c.png", "--reference", reference, "--seed", 1) == 0
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "c.png").convert("RGB")), first)
    assert paint(model_folder, tmp_path / "d.tiff", "--reference", reference, "--size", "50x70", "--tile", 32) == 0
    with Image.open(tmp_path / "d.tiff") as image:
        assert image.size == (70, 50)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png", "d.tiff", "reference.png"]


def test_two_references_and_an_object(
    model_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(1).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "other.png")
    both = ["--reference", reference, "--towards", tmp_path / "other.png", "--size", "32x48"]
    painted = {}
    for how in ("avg", "and", "or"):
        assert paint(model_folder, tmp_path / f"{how}.png", *both, "--compose", how) == 0
        painted[how] = np.asarray(Image.open(tmp_path / f"{how}.png"))
        assert painted[how].shape == (32, 48, 3)
    assert not np.array_equal(painted["avg"], painted["and"])
    Image.fromarray(values[:32, :32]).save(tmp_path / "object.png")
    inside = ["--insert", tmp_path / "object.png", "--steps", 10]
    scene = ["--reference", reference, "--size", "48x64"]
    assert paint(model_folder, tmp_path / "placed.png", *scene, *inside, "--insert-at", "16,8") == 0
    with Image.open(tmp_path / "placed.png") as image:
        assert image.size == (64, 48)
    capsys.readouterr()
    for options, message in (
        ([*scene, "--compose", "and"], "--compose needs --towards"),
        ([*both, "--compose", "and", "--blend", 0.2], "without --blend"),
        ([*both, "--compose", "and", "--scheduler", "ddim"], "a sampler of their own, which takes no --scheduler"),
        ([*scene, "--insert-at", "1,2"], "where --insert goes"),
        ([*scene, *inside, "--insert-at", "40,0"], "leaves the canvas"),
    ):
        assert paint(model_folder, tmp_path / "none.png", *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_a_grid_becomes_an_image(model_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "grid.npy", np.random.default_rng(0).normal(size=(2, 3, 24)).astype(np.float32))
    assert paint(model_folder, tmp_path / "a.png", "--grid", tmp_path / "grid.npy", "--vary", 10) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (48, 32)


def test_bad_input_is_one_line(
    model_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "narrow.npy", np.ones((2, 3, 7), np.float32))
    np.save(tmp_path / "flat.npy", np.ones((2, 24), np.float32))
    broken = np.ones((2, 3, 24), np.float32)
    broken[1, 2, 5] = np.nan
    np.save(tmp_path / "nan.npy", broken)
    cases: list[tuple[list[object], str]] = [
        ([], "say what to paint"),
        (["--reference", reference, "--grid", tmp_path / "nan.npy"], "say what to paint: one of"),
        (["--reference", tmp_path / "nothing.png"], "no such image file"),
        (["--grid", tmp_path / "narrow.npy"], "this model takes embeddings of width 24, the grid has 7"),
        (["--grid", tmp_path / "flat.npy"], "must be (rows, columns, dim), got (2, 24)"),
        (["--grid", tmp_path / "nan.npy"], "the embedding of cell (1, 2) has NaN"),
        (["--reference", reference, "--size", "8x40"], "at least 16 x 16 pixels, not 8 x 40"),
        (["--reference", reference, "--size", "big"], "cannot read the size 'big'"),
        (["--reference", reference, "--stride", 9], "the window stride must be in 1..8, got 9"),
        (["--reference", reference, "--size", "90000x90000"], "use .tiff, .ome.tiff or .zarr"),
        (["--reference", reference, "-o", tmp_path / "a.svs"], "the output must end in .png"),
    ]
    before = sorted(tmp_path.iterdir())
    for options, message in cases:
        assert paint(model_folder, tmp_path / "x.png", *options) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_sizes() -> None:
    assert parse_size("4096", "size") == (4096, 4096)
    assert parse_size("30X20", "size") == (30, 20)
    for bad in ("", "3x", "0x4", "1x2x3", "-3x4"):
        with pytest.raises(ValueError, match="write two whole numbers"):
            parse_size(bad, "size")


def test_what_cannot_be_painted_is_refused_at_once(
    model_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in {
        ("--size", "100000000"): "too many for this kind of file",
        ("--cells", "1000000x1000000"): "cannot be divided into 1000000 x 1000000 cells",
        ("--seed", str(2**70)): "seed must be in [0, 2^63)",
        ("--guidance", "nan"): "guidance must be finite and at least 0",
        ("--decode-sigma", "0"): "decode_sigma must be finite and above 0",
    }.items():
        assert paint(model_folder, tmp_path / "a.png", "--reference", reference, *options) == 2
        assert message in capsys.readouterr().err
    assert paint(model_folder, tmp_path / "a.tiff", "--reference", reference, "--size", "100000000") == 2
    assert "GB are needed" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["reference.png"]


def test_a_damaged_model_is_named(
    model_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("embedder/model.safetensors", "embedder/config.json", "scheduler/scheduler_config.json"):
        model = tmp_path / "model"
        shutil.copytree(model_folder, model)
        (model / file).write_bytes(b"[" * 100_000)
        assert paint(model, tmp_path / "a.png", "--reference", reference) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(model / file) in line
        shutil.rmtree(model)
