from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.backbones import load_backbone
from diffrep.cli import main
from diffrep.features import Descriptors
from diffrep.settings import RefineConfig
from diffrep.swap import (
    SwapConfig,
    SwapField,
    composite,
    refine,
    smooth_field,
    swap_appearance,
    swap_colours,
    swap_field,
    warp,
)

from .fields import generator


def picture(seed: int, width: int = 48, height: int = 36) -> Image.Image:
    coarse = torch.randint(0, 256, (6, 8, 3), generator=generator(seed), dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)


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
    with pytest.raises(ValueError, match="no place to paint"):
        swap_field(one, one, pose_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="the image is 36 x 48, its descriptors are of one of 4 x 4"):
        swap_appearance(picture(1), picture(2), one, one)
    for wrong in ({"resolution": 1}, {"smooth": 4}, {"feather": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SwapConfig(**wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_an_image_takes_its_own_looks_and_the_rest_stays() -> None:
    image, other = picture(1), picture(2)
    vectors = torch.randn(9, 12, 16, generator=generator(3))
    described = Descriptors.from_vectors(vectors, (36, 48))
    same = swap_appearance(image, image, described, described)
    inside = slice(2, -2)  # beyond the outermost cells' centres all descriptors are alike
    assert np.abs(np.asarray(same).astype(int) - np.asarray(image))[inside, inside].max() <= 1
    mask = torch.zeros(36, 48)
    mask[:, :24] = 1
    half = np.asarray(swap_appearance(image, other, described, described, SwapConfig(feather=0), pose_mask=mask))
    assert np.array_equal(half[:, 24:], np.asarray(image)[:, 24:])
    assert np.abs(half.astype(int) - np.asarray(other))[inside, 2:20].max() <= 1


def test_a_field_is_smoothed_but_not_across_its_jumps() -> None:
    points = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(8.0), indexing="xy"), dim=-1)
    points[3, 4] = 99  # a place that went astray
    valid = torch.ones(8, 12, dtype=torch.bool)
    valid[0] = False
    field = SwapField(torch.where(valid[..., None], points, torch.nan), valid, (8, 12), 1.0)
    smooth = smooth_field(field, 3)
    assert torch.equal(smooth.points[3, 4], torch.tensor([4.0, 3.0]))
    assert torch.equal(smooth.points[1:3], points[1:3])  # the others stay, also at the edge
    assert smooth.points[0].isnan().all()
    # left half from the left, right half from far right: no pixel between may come from the middle
    jump = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(8.0), indexing="xy"), dim=-1)
    jump[:, 6:, 0] += 88
    wide = Image.new("RGB", (100, 8), (255, 0, 0))
    wide.paste((0, 255, 0), (0, 0, 12, 8))
    wide.paste((0, 0, 255), (90, 0, 100, 8))
    read = np.asarray(warp(wide, SwapField(jump, torch.ones(8, 12, dtype=torch.bool), (80, 120), 1.0)))
    assert read[:, :, 0].max() == 0
    assert (read[:, 70:, 2] == 255).all()


def test_compositing_softens_the_edge_only() -> None:
    black, white = (Image.new("RGB", (40, 30), c) for c in ((0, 0, 0), (255, 255, 255)))
    mask = torch.zeros(30, 40)
    mask[:, 20:] = 1
    soft = np.asarray(composite(black, white, mask, feather=2))[15, :, 0]
    assert (np.diff(soft.astype(int)) >= 0).all()
    assert soft[5] == 0
    assert soft[35] == 255
    assert 0 < soft[19] < soft[20] < 255
    assert np.array_equal(np.asarray(composite(black, white, None)), np.asarray(white))


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, seed in (("a.png", 1), ("b.png", 2)):
        picture(seed, 64, 48).save(tmp_path / name)
    mask = Image.new("L", (64, 48))
    mask.paste(255, (16, 12, 48, 40))
    mask.save(tmp_path / "mask.png")
    return str(tmp_path / "a.png"), str(tmp_path / "b.png")


def test_the_command_writes_the_swapped_image(
    files: tuple[str, str], tmp_path: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.yaml"
    own = {
        "name": "own",
        "readings": [{"backbone": str(sd_folder), "extract": {"taps": ["up.2"], "sizing": {"size": 64}}}],
        "fusion": {"parts": [{"taps": ["up.2"]}]},
    }
    recipe.write_text(json.dumps(own))  # JSON is YAML
    mask = str(tmp_path / "mask.png")
    common = ["swap", *files, "--recipe", str(recipe), "--mask-a", mask, "--mask-b", mask]
    plain, refined, sheet = (tmp_path / "out" / f"{name}.png" for name in ("plain", "refined", "sheet"))
    assert main([*common, "-o", str(plain)]) == 0
    assert f"wrote {plain}" in capsys.readouterr().out
    options = ["--refine", "--refinement.steps", "2", "--refinement.strength", "0.5", "--sheet", str(sheet)]
    assert main([*common, "-o", str(refined), *options]) == 0
    image, swapped, drawn = (np.asarray(Image.open(f)) for f in (files[0], plain, refined))
    assert image.shape == swapped.shape == drawn.shape
    assert np.array_equal(swapped[:6], image[:6])  # outside of the mask nothing changes
    assert np.array_equal(drawn[:6], image[:6])
    assert not np.array_equal(swapped[20:30, 20:40], image[20:30, 20:40])
    assert not np.array_equal(swapped[20:30, 20:40], drawn[20:30, 20:40])
    with Image.open(sheet) as overview:
        assert overview.width > 4 * 360
    assert main(["swap", *files, "--recipe", str(recipe), "--whole", "-o", str(plain)]) == 0
    assert not np.array_equal(np.asarray(Image.open(plain))[:6], image[:6])


def test_a_swap_refined_by_an_exact_inversion_changes_nothing(sd_folder: Path) -> None:
    """However far it goes up, without a prompt it comes back to what encoder and decoder make of the image."""
    backbone, image = load_backbone(str(sd_folder), device="cpu"), picture(1, 64, 64)
    drawn: dict[str, list[np.ndarray]] = {}
    for method in ("none", "ddim", "bdia", "edict"):
        settings = (RefineConfig(strength=share, steps=5, inversion=method) for share in (0.2, 0.7))
        drawn[method] = [np.asarray(refine(image, backbone, one)).astype(int) for one in settings]
    apart = {method: int(np.abs(low - high).max()) for method, (low, high) in drawn.items()}
    assert apart["bdia"] <= 1
    assert apart["edict"] <= 1
    assert apart["none"] > 5
    assert np.abs(drawn["bdia"][0] - drawn["edict"][0]).max() <= 1


def test_null_text_brings_guided_sampling_nearer_to_the_image(sd_folder: Path) -> None:
    backbone, image = load_backbone(str(sd_folder), device="cpu"), picture(1, 64, 64)
    plain = np.asarray(refine(image, backbone, RefineConfig(strength=0.7, steps=5, inversion="bdia"))).astype(float)
    errors = {}
    for method in ("ddim", "null-text"):
        config = RefineConfig(strength=0.7, steps=5, inversion=method, prompt="a cat", guidance=5.0)
        errors[method] = float(np.square(np.asarray(refine(image, backbone, config)) - plain).mean())
    assert errors["null-text"] < errors["ddim"]
    with pytest.raises(ValueError, match="needs a guidance other than 1"):
        RefineConfig(inversion="null-text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--whole", "--mask-a", "a.png"], "--whole paints everything"),
        (["--refinement.steps", "3"], "need --refine"),
        (["--mask-a", "none.png"], "no such image file"),
        (["-o", "out.txt"], "the output must end in"),
        (["--sheet", "sheet.txt"], "the output must end in"),
        (["--recipe", "twip"], "no recipe 'twip'"),
        (["--mask-b", "EMPTY"], "the mask is empty, no pixel of it"),
    ],
)
def test_bad_input_is_one_line(
    files: tuple[str, str], tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (64, 48)).save(tmp_path / "empty.png")
    options = [str(tmp_path / "empty.png") if o == "EMPTY" else o for o in options]
    output = tmp_path / "out.png"
    arguments = options if "-o" in options else [*options, "-o", str(output)]
    assert main(["swap", *files, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not output.exists()
