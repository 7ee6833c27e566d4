"""Restoration: photographs in their files, degradations from seeds, heads on images of any size, files of adapters."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from diffrep.backbones.pipelines import load_parts
from diffrep.cli import main
from diffrep.commands.parsing import read_command
from diffrep.commands.restore import comparison
from diffrep.commands.train_heads import TrainRestore
from diffrep.eval.restoration import evaluate_restoration, luma, paired_files, psnr, ssim
from diffrep.heads.head import HeadError
from diffrep.heads.loading import load_head
from diffrep.heads.restoration.adapters import DegradationEstimator
from diffrep.heads.restoration.degrade import blur_kernel, jpeg
from diffrep.heads.restoration.families import PISA_SR, TINY
from diffrep.heads.restoration.loading import read_checkpoint, recognise_restorer
from diffrep.heads.restoration.photograph import Photograph
from diffrep.heads.restoration.pixels import blended_rows, low_band, windows
from diffrep.heads.restoration.residual import PROCESSES, resshift
from diffrep.heads.restoration.restorer import RestorationHead, RestoreConfig, resized
from diffrep.heads.training.restoration import (
    PairSettings,
    RestorationModel,
    RestorationTraining,
    degraded,
    degraded_pairs,
    encoded,
    process_terms,
    restorer_of,
)
from diffrep.images import upright
from diffrep.scenes import render_scene, render_set, scene_seed


def photograph(height: int = 40, width: int = 52, *, deep: bool = False) -> Photograph:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + y / 5), np.cos(x / 6), np.sin(y / 8)], 2) * 0.4 + 0.5
    levels = 65535 if deep else 255
    return Photograph((waves * levels).astype(np.uint16 if deep else np.uint8))


@pytest.fixture(scope="module")
def head() -> RestorationHead:
    """A restorer that has not learnt yet: its decoder adds nothing to the enlarged image."""
    training = RestorationTraining()
    return restorer_of(training.build(load_parts("tiny", pad=False)).eval())


def test_a_profile_of_other_colours_is_not_written_beside_rgb(tmp_path: Path) -> None:
    for mode, kept in (("RGB", b"profile"), ("CMYK", None)):
        Image.new(mode, (8, 8)).save(tmp_path / "a.jpg", icc_profile=b"profile")
        assert Photograph.open(tmp_path / "a.jpg").icc == kept


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_photograph_survives_its_file(tmp_path: Path, deep: bool, grey: bool, transparent: bool, ending: str) -> None:
    tags = Image.Exif()
    tags[0x010F], tags[0x0112] = "Maker", 1
    tags.get_ifd(0x8769)[0x9003] = "2026:11:27 12:00:00"
    one = photograph(deep=deep)
    pixels = np.repeat(one.pixels[..., :1], 3, 2) if grey else one.pixels
    alpha = one.pixels[..., 1].copy() if transparent else None
    one = Photograph(pixels, alpha, tags.tobytes(), b"profile" * 20, grey)
    file = tmp_path / f"a{ending}"
    one.save(file)
    back = Photograph.open(file)
    assert np.array_equal(back.pixels, one.pixels)
    assert (back.alpha is None) == (alpha is None)
    assert alpha is None or np.array_equal(back.alpha, alpha)  # type: ignore[arg-type]
    assert back.icc == one.icc
    assert back.grey == (grey and not (ending == ".tif" and deep and transparent))
    with Image.open(file) as image:
        for exif in (image.getexif(), load_exif(back.exif)):
            assert exif[0x010F] == "Maker"
            assert exif.get_ifd(0x8769)[0x9003] == "2026:11:27 12:00:00"


def load_exif(content: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(content)
    return exif


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("turn", range(2, 9))
def test_every_kind_of_photograph_is_turned_upright(
    tmp_path: Path, ending: str, deep: bool, transparent: bool, turn: int
) -> None:
    tags, one = Image.Exif(), photograph(deep=deep)
    tags[0x0112] = turn
    one = replace(one, alpha=one.pixels[..., 1].copy() if transparent else None, exif=tags.tobytes())
    one.save(tmp_path / f"a{ending}")
    turned = Photograph.open(tmp_path / f"a{ending}")
    plain = Image.fromarray((one.pixels >> (8 if deep else 0)).astype(np.uint8))
    plain.getexif()[0x0112] = turn
    assert np.array_equal(turned.pixels >> (8 if deep else 0), np.asarray(upright(plain)))
    assert (turned.alpha is None) != transparent
    assert not turned.exif


@pytest.mark.parametrize("form", ["separate planes", "strips", "premultiplied"])
def test_other_programs_sixteen_bit_tiffs_are_read(tmp_path: Path, form: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    one, alpha = photograph(deep=True).pixels, np.full((40, 52), 32768, np.uint16)
    options: dict[str, Any] = {"photometric": "rgb"}
    if form == "separate planes":
        tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(one, 2, 0), planarconfig="separate", **options)
    elif form == "strips":
        tifffile.imwrite(tmp_path / "a.tif", one, rowsperstrip=7, compression="zlib", byteorder=">", **options)
    else:
        values = np.dstack([(one / 65535 * alpha[..., None]).round().astype(np.uint16), alpha])
        tifffile.imwrite(tmp_path / "a.tif", values, extrasamples=["assocalpha"], **options)
    back = Photograph.open(tmp_path / "a.tif")
    assert back.pixels.dtype == np.uint16
    assert np.abs(back.pixels.astype(int) - one).max() <= (1 if form == "premultiplied" else 0)
    assert (back.alpha is None) == (form != "premultiplied")


def test_files_that_cannot_hold_a_photograph_are_refused(tmp_path: Path) -> None:
    deep = photograph(deep=True)
    with pytest.raises(ValueError, match="16 bits"):
        deep.save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="transparent"):
        replace(photograph(), alpha=photograph().pixels[..., 0]).save(tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_a_turned_photograph_is_upright_and_says_so(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(photograph().pixels).save(tmp_path / "a.jpg", exif=tags)
    assert Photograph.open(tmp_path / "a.jpg").size == (40, 52)
    assert b"Exif" not in Photograph.open(tmp_path / "a.jpg").exif


def test_damaged_tags_beside_sound_pixels_are_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orientation that is text, tags that cannot be read, tags that cannot be written again."""
    image, turn = Image.fromarray(photograph().pixels), b"\x12\x01\x02\x00\x04\x00\x00\x00ab\x00\x00"
    image.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00" + turn + bytes(4))
    image.save(tmp_path / "b.png", exif=b"no tags")
    for name in ("a.jpg", "b.png"):
        assert Photograph.open(tmp_path / name).size == image.size

    def fail(*arguments: object, **options: object) -> bytes:
        raise TypeError("write_string() takes text")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)  # what some versions of Pillow do with damaged tags
    assert Photograph.open(tmp_path / "a.jpg").exif == b""


@pytest.mark.parametrize("deep", [False, True])
def test_tiles_leave_no_trace_and_sizes_are_those_asked_for(head: RestorationHead, deep: bool) -> None:
    one = photograph(50, 61, deep=deep)
    for config in (RestoreConfig(scale=3, tile=8, overlap=3), RestoreConfig(scale=3, tile=0)):
        result = head.predict(one, config)
        assert result.size == (183, 150)
        assert np.array_equal(result.pixels, head.enlarge(one.pixels, (150, 183)))
    assert head.predict(one, RestoreConfig(scale=2, keep_size=True)).size == one.size


def test_colours_come_from_the_photograph(head: RestorationHead) -> None:
    one = photograph()
    enlarged = head.enlarge(one.pixels, (160, 208))
    assert enlarged.min() > 15
    darker = enlarged - 15
    tensor = torch.from_numpy(enlarged.astype(np.float32)).permute(2, 0, 1)[None]
    for colours in ("wavelet", "adain"):
        fixed = head._colours(darker.copy(), enlarged, RestoreConfig(colours=colours))  # type: ignore[arg-type]
        values = torch.from_numpy(fixed.astype(np.float32)).permute(2, 0, 1)[None]
        assert float((values.mean((2, 3)) - tensor.mean((2, 3))).abs().max()) < 1.5
        assert float((low_band(values) - low_band(tensor)).abs().max()) < 1.5


def low_difference(one: np.ndarray, other: np.ndarray) -> float:
    """How far low frequencies of two images (H, W, 3) are apart at most, in levels of 255."""
    bands = [low_band(torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None]) for x in (one, other)]
    return float((bands[0] - bands[1]).abs().max())


def texture(height: int, width: int, noise: float = 6.0) -> np.ndarray:
    """Detail of all scales, and noise, (H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    values = sum(
        F.interpolate(torch.randn(1, 3, height // k + 2, width // k + 2, generator=generator), (height, width),
                      mode="bicubic")[0] * k**0.6
        for k in (3, 6, 12, 25, 50)
    )  # fmt: skip
    assert isinstance(values, torch.Tensor)
    values = (values - values.mean()) / values.std() * 45 + 125
    values = values + noise * torch.randn(values.shape, generator=generator)
    return values.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def test_low_frequencies_are_the_photographs_to_a_level(head: RestorationHead) -> None:
    enlarged, (y, x) = texture(160, 208, noise=25), np.mgrid[:160, :208]
    shifted = enlarged + 25 * np.sin(x / 17 + y / 11)[..., None] + 10  # half way between the bands, cut off at 255
    shifted = shifted.clip(0, 255).astype(np.uint8)
    differences = {
        kind: low_difference(head._colours(shifted.copy(), enlarged, RestoreConfig(colours=kind)), enlarged)
        for kind in ("none", "wavelet", "low-band")
    }  # type: ignore[arg-type]
    assert differences["none"] > 10
    assert differences["wavelet"] > 2  # as published
    assert differences["low-band"] < 1


def test_no_border_of_a_tile_is_left_to_see() -> None:
    embedded, one = load_head("tiny-restore", device="cpu"), Photograph(texture(128, 192))

    def steps(**options: Any) -> list[np.ndarray]:
        pixels = embedded.predict(one, RestoreConfig(scale=1, **options)).pixels.astype(float).mean(2)
        return [np.abs(np.diff(pixels, axis=axis)).mean(1 - axis) for axis in (0, 1)]

    def at_borders(lines: np.ndarray, tile: int, overlap: int) -> float:
        """The mean step across borders of tiles to that inside."""
        cells = (len(lines) + 1) // 8
        starts = windows(cells, tile, overlap)
        borders = sorted({8 * s - 1 for s in starts if s} | {8 * (s + tile) - 1 for s in starts if s + tile < cells})
        return float(lines[borders].mean() / np.delete(lines, borders).mean())

    whole = steps(tile=0)
    for tile, overlap, colours in ((8, 4, None), (8, 4, "none"), (10, 3, "none")):
        for lines, plain in zip(steps(tile=tile, overlap=overlap, colours=colours), whole, strict=True):
            ratio = at_borders(lines, tile, overlap) / at_borders(plain, tile, overlap)
            assert abs(ratio - 1) < 0.05, (tile, overlap, colours)
    ratios = [
        at_borders(lines, 4, 0) / at_borders(plain, 4, 0)
        for lines, plain in zip(steps(tile=4, overlap=0, colours="none"), whole, strict=True)
    ]
    assert max(ratios) > 1.05  # without overlap there are borders
    result = embedded.predict(one, RestoreConfig(scale=1, tile=8, overlap=4)).pixels
    assert low_difference(result, one.pixels) < 1


def test_alpha_and_tags_stay(head: RestorationHead) -> None:
    one = replace(photograph(), alpha=photograph().pixels[..., 0], exif=b"Exif\x00\x00MM", icc=b"p")
    result = head.predict(one, RestoreConfig(scale=2))
    assert result.alpha is not None
    assert result.alpha.shape == (80, 104)
    assert (result.exif, result.icc) == (one.exif, one.icc)


def test_settings_that_do_nothing_are_refused(head: RestorationHead) -> None:
    with pytest.raises(ValueError, match="PiSA-SR"):
        head.predict(photograph(), RestoreConfig(pixel=0.5))
    with pytest.raises(ValueError, match="negative prompt"):
        head.predict(photograph(), RestoreConfig(guidance=2.0))
    with pytest.raises(ValueError, match="overlap must be below tile"):
        head.predict(photograph(), RestoreConfig(tile=4, overlap=4))


def test_blending_gives_back_what_all_tiles_agree_on() -> None:
    whole = torch.rand(3, 37, 53, generator=torch.Generator().manual_seed(0))
    bands = list(blended_rows(lambda *place: whole[(..., *place)], (37, 53), 12, 5))
    assert [start for start, _ in bands] == [0, 7, 14, 21, 25]
    torch.testing.assert_close(torch.cat([band for _, band in bands], 1), whole)


@pytest.mark.parametrize(("published", "columns"), [(True, [0, 5, 10, 14]), (False, [0, 8, 11])])
def test_tiles_of_a_narrow_map_stay_squares_as_published(published: bool, columns: list[int]) -> None:
    whole, places = torch.rand(2, 9, 23, generator=torch.Generator().manual_seed(1)), []

    def run(*place: slice) -> torch.Tensor:
        places.append(place)
        return whole[(..., *place)]

    torch.cat([band for _, band in blended_rows(run, (9, 23), 12, 4, published=published)], 1)
    wide = 9 if published else 12
    assert places == [(slice(0, 9), slice(left, left + wide)) for left in columns]


def test_a_degradation_is_a_function_of_its_number() -> None:
    image = torch.from_numpy(photograph(64, 64).pixels).permute(2, 0, 1)
    settings = PairSettings(clean=0.3)
    numbers = [degraded(image, settings, number) for number in range(6)]
    assert all(one.shape == (3, 16, 16) for one in numbers)
    assert torch.equal(numbers[3], degraded(image, settings, 3))
    assert any(not torch.equal(numbers[0], other) for other in numbers[1:])
    assert degraded(image, settings, 3, half=True).shape == (3, 32, 32)


def test_jpeg_of_the_best_quality_loses_colour_alone() -> None:
    grey = torch.rand(1, 1, 20, 23, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    torch.testing.assert_close(jpeg(grey, torch.tensor([100.0])), grey, atol=2e-4, rtol=0)


def test_a_kernel_of_an_even_side_has_its_middle_before_the_half_as_published() -> None:
    assert divmod(int(blur_kernel(8, 1.0, 1.0, 0.0).argmax()), 8) == (3, 3)


def test_pairs_lie_version_by_version_and_are_not_taken_for_others(tmp_path: Path) -> None:
    images = torch.stack([torch.from_numpy(texture(48, 48, noise=n)).permute(2, 0, 1) for n in range(34)])
    settings, file = PairSettings(degradation="s3diff", clean=0.5), tmp_path / "pairs.safetensors"
    pairs = degraded_pairs(images, settings, file, seed=3, half=True, workers=1, progress=False)
    assert (pairs["low"].shape, pairs["half"].shape) == ((68, 3, 12, 12), (68, 3, 24, 24))
    assert torch.equal(pairs["low"][67], degraded(images[33], settings, 67, seed=3))
    assert torch.equal(pairs["half"][65], degraded(images[32], settings, 65, seed=3, half=True))
    with pytest.raises(ValueError, match="holds pairs of"):
        degraded_pairs(images, settings, file, seed=4, half=True, workers=1, progress=False)


def test_the_command_trains_a_restorer_with_defaults_of_its_base(tmp_path: Path) -> None:
    options = "--scenes 8 --validation-scenes 2 --size 80 --steps 1 --batch-size 2 --workers 1 --versions 1"
    assert main(["train", "restore", *options.split(), "--work", str(tmp_path)]) == 0
    said = json.loads((tmp_path / "head" / "head.json").read_text())["training"]
    assert (said["detail"], said["latent"], said["fit"]["minutes"]) == (True, 0.1, None)
    assert load_head(tmp_path / "head", device="cpu").predict(photograph()).size == (208, 160)
    command = read_command(TrainRestore, ["--base", "folder", "--pixel", "2"], "train restore")
    assert (command.training.detail, command.training.latent, command.training.pixel) == (False, 1.0, 2.0)
    command = read_command(TrainRestore, ["--base", "folder", "--detail", "--minutes", "3", "--steps", "9"], "")
    assert (command.training.detail, command.training.latent, command.training.fit.minutes) == (True, 0.1, 3)


def test_resizing_is_that_of_pillow_and_close_for_sixteen_bits() -> None:
    eight, sixteen = photograph(), photograph(deep=True)
    small, deep = (resized(one.pixels, (30, 33), "bicubic") for one in (eight, sixteen))
    assert float(np.abs(small - deep / 257).max()) < 2


def test_published_families_make_sides_multiples_by_lanczos(head: RestorationHead) -> None:
    one = photograph(131, 150)
    assert head.enlarge(one.pixels, (524, 601)).shape == (524, 601, 3)
    machine = RestorationHead(head.model)
    machine.model.family = PISA_SR
    try:
        enlarged = machine.enlarge(one.pixels, (524, 601))
    finally:
        machine.model.family = TINY
    expected = Image.fromarray(one.pixels).resize((601, 524), Image.Resampling.BICUBIC)
    assert np.array_equal(enlarged, np.asarray(expected.resize((600, 520), Image.Resampling.LANCZOS)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("module.input_blocks.0.weight", "x.relative_position_bias_table"), "ResShift, SinSR or TAD-SR"),
        (("layer.weight",), "no checkpoint of a restorer"),
    ],
)
def test_checkpoints_of_other_kinds_are_named(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        recognise_restorer(dict.fromkeys(keys), name="file")


def test_a_pickle_of_anything_else_is_refused_in_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Path("a"), protocol=4))
    with pytest.raises(HeadError, match=r"a\.pkl: is no checkpoint that can be read safely \(torch\.save did not"):
        read_checkpoint(tmp_path / "a.pkl")
    assert not recwarn.list


def osediff(unet: Any, vae: Any, rank: int = 2) -> dict[str, Any]:
    """A checkpoint in OSEDiff's layout for a U-Net and a VAE."""
    generator = torch.Generator().manual_seed(0)

    def factors(weight: torch.Tensor, layer: str, adapter: str) -> dict[str, torch.Tensor]:
        first = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.01
        second = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * 0.01
        return {f"{layer}.lora_A.{adapter}.weight": first, f"{layer}.lora_B.{adapter}.weight": second}

    own, encoder = dict(unet.named_parameters()), dict(vae.named_parameters())
    layers = ["down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"]
    state: dict[str, Any] = {"conv_in.base_layer.weight": own["conv_in.weight"].detach() + 0.01}
    for layer, adapter in zip(layers, ("default_encoder", "default_others"), strict=True):
        state |= factors(own[f"{layer}.weight"], layer, adapter)
    return {
        "rank_unet": rank,
        "rank_vae": rank,
        "unet_lora_encoder_modules": layers[:1],
        "unet_lora_decoder_modules": [],
        "unet_lora_others_modules": layers[1:],
        "vae_lora_encoder_modules": ["encoder.conv_in"],
        "state_dict_unet": state,
        "state_dict_vae": factors(encoder["encoder.conv_in.weight"], "encoder.conv_in", "default_encoder"),
    }


def test_an_osediff_is_merged_into_its_base(tmp_path: Path) -> None:
    parts = load_parts("tiny", pad=False)
    stored = osediff(parts.unet, parts.vae)
    torch.save(stored, tmp_path / "osediff.pkl")
    head = load_head(tmp_path / "osediff.pkl", base="tiny", device="cpu", fold=False)
    layer = "down_blocks.0.resnets.0.conv1"
    first, second = (stored["state_dict_unet"][f"{layer}.lora_{side}.default_encoder.weight"] for side in "AB")
    added = torch.einsum("or,rikl->oikl", second.flatten(1), first) * 8 / 2
    merged = head.model.network.unet.state_dict()[f"{layer}.weight"]
    torch.testing.assert_close(merged, parts.unet.state_dict()[f"{layer}.weight"] + added)
    assert head.family.name == "osediff"
    result = head.predict(photograph(20, 24), RestoreConfig(scale=4))
    assert result.size == (96, 80)
    with pytest.raises(HeadError, match="only a PiSA-SR"):
        load_head(tmp_path / "osediff.pkl", base="tiny", adjustable=True)
    with pytest.raises(HeadError, match=r"tiny-restore: has no adapters whose strengths \(pixel, semantic\)"):
        load_head("tiny-restore", adjustable=True)
    with pytest.raises(HeadError, match="say which base"):
        load_head(tmp_path / "osediff.pkl")


@pytest.mark.parametrize("what", ["missing", "left over", "rank"])
def test_what_does_not_fit_a_base_is_named(tmp_path: Path, what: str) -> None:
    parts = load_parts("tiny", pad=False)
    stored = osediff(parts.unet, parts.vae)
    if what == "missing":
        stored["unet_lora_decoder_modules"] = ["up_blocks.0.resnets.0.conv1"]
    elif what == "left over":
        stored["unet_lora_others_modules"] = []
    else:
        stored["rank_unet"] = 4
    torch.save(stored, tmp_path / "osediff.pkl")
    with pytest.raises(HeadError, match=what):
        load_head(tmp_path / "osediff.pkl", base="tiny", device="cpu")


def test_a_comparison_shows_both_and_runs_its_own_script_alone() -> None:
    before = photograph()
    page = comparison("photos/<a>\udcff.png", before, Photograph(resized(before.pixels, (80, 104), "bicubic")))
    assert page.count("data:image/jpeg;base64,") == 2
    assert "&lt;a&gt;\\udcff.png" in page
    assert "104 x 80" in page


def test_a_training_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="a teacher's latents need"):
        RestorationTraining(teacher="folder", latent=0.0)
    with pytest.raises(ValueError, match="size must be at least 74"):
        RestorationTraining(size=64)
    with pytest.raises(ValueError, match="learns from pixels"):
        RestorationTraining(pixel=0.0)
    assert TINY.result == "residual"


# -- S3Diff, half precision ---------------------------------------------------------------------------------

S3DIFF = Path(__file__).parent / "parity" / "data" / "restoration-and-few-step" / "s3diff"


def s3diff(folder: Path, dtype: torch.dtype = torch.float32) -> RestorationHead:
    """The small S3Diff of the parity case, with a negative prompt."""
    inputs = load_file(S3DIFF / "inputs.safetensors")
    stored: dict[str, Any] = {}
    for key, value in inputs.items():
        if key.startswith("ckpt."):
            *parents, last = key[5:].replace("state_embeddings.", "state_embeddings/").split("/")
            place = stored
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value.float()
    ranks = {"rank_unet": 4, "rank_vae": 3}
    shutil.copytree(S3DIFF / "model", folder / "base", dirs_exist_ok=True)
    context = inputs["0.context"][:1].clone()
    save_file({"context": context, "negative": -context}, folder / "base" / "context.safetensors")
    torch.save(stored | ranks, folder / "s3diff.pkl")
    torch.manual_seed(0)  # the estimator's weights take their draws from the global generator
    torch.save(DegradationEstimator().state_dict(), folder / "de_net.pth")
    head: RestorationHead = load_head(folder / "s3diff.pkl", base=folder / "base", device="cpu", dtype=dtype)
    return head


@torch.no_grad()
def test_s3diff_pulls_away_from_its_negative_prompt(tmp_path: Path) -> None:
    head = s3diff(tmp_path)
    model = head.model
    assert model.negative is not None
    model.look(photograph(16, 16).tensor()[None])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    towards, away = model.network(latents, 999), model.negative(latents, 999)
    assert (towards - away).abs().max() > 1e-4
    for guidance, scale in ((None, 1.07), (1.0, 1.0), (3.0, 3.0)):
        expected = model.schedule.clean(away + scale * (towards - away), latents, 999)
        got = model.clean(latents, RestoreConfig(guidance=guidance))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    pictures = [head.predict(photograph(16, 20), RestoreConfig(guidance=g)).pixels for g in (1.0, 3.0)]
    assert pictures[0].shape == (64, 80, 3)
    assert not np.array_equal(*pictures)
    (tmp_path / "de_net.pth").unlink()
    with pytest.raises(HeadError, match=r"de_net\.pth is missing"):
        load_head(tmp_path / "s3diff.pkl", base=tmp_path / "base", device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_restores_nearly_the_same(tmp_path: Path, head: RestorationHead, dtype: torch.dtype) -> None:
    one, config = photograph(16, 20), RestoreConfig(colours="none", tile=6, overlap=2)
    plain, half = (s3diff(tmp_path, kind).predict(one, config).pixels.astype(int) for kind in (torch.float32, dtype))
    assert np.abs(plain - half).mean() < (8 if dtype == torch.bfloat16 else 2)
    assert plain.std() > 5
    embedded = [load_head("tiny-restore", device="cpu", dtype=kind) for kind in (torch.float32, dtype)]
    plain, half = (model.predict(one, config).pixels.astype(int) for model in embedded)
    assert np.abs(plain - half).mean() < 1


# -- processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_a_network_that_knows_the_answer_restores_it(name: str) -> None:
    process, generator = PROCESSES[name], torch.Generator().manual_seed(0)
    clean, degraded = (torch.randn(2, 4, 6, 5, generator=generator) for _ in range(2))
    noise = [torch.randn(2, 4, 6, 5, generator=generator) for _ in range(4)]

    def network(state: torch.Tensor, t: Any) -> torch.Tensor:
        return degraded - clean if process.predicts == "pred_res" else clean

    for steps in (1, 2, 4):
        got = process.restored(network, degraded, noise, steps)
        torch.testing.assert_close(got, clean, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="steps must be in"):
        process.restored(network, degraded, noise, 5000)


def test_rounding_does_not_drown_the_little_noise_of_an_early_step() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, degraded, noise = (torch.randn(1, 3, 16, 16, generator=generator) for _ in range(3))
    process = resshift(15, min_noise_level=0.001)
    given = clean, process.noisy(clean, degraded, noise, 0), degraded
    found, exact = process.parts(*given, 0)[1], process.parts(*(one.double() for one in given), 0)[1]
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=1e-6)


def process_batch(model: RestorationModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    generator, shape = torch.Generator().manual_seed(1), encoded(model.vae, images).shape
    assert model.process is not None
    return {
        "noise": torch.randn(shape, generator=generator),
        "mixed": torch.rand(shape, generator=generator),
        "step": torch.randint(len(model.process), (len(images),), generator=generator),
    }


@pytest.mark.parametrize("family", ["resshift", "resshift-4", "rddm", "sinsr"])
def test_a_process_learns_and_restores_in_steps(tmp_path: Path, family: Any) -> None:
    parts = load_parts("tiny", pad=False)
    teacher = None
    if family == "sinsr":
        first = RestorationTraining(family="resshift")
        teacher = first.build(load_parts("tiny", pad=False)).eval().requires_grad_(False)
        first.write(tmp_path / "teacher", teacher)
        training = RestorationTraining(family=family, teacher=str(tmp_path / "teacher"), score=1.0)
    else:
        training = RestorationTraining(family=family)
    model = training.build(parts)
    assert model.unet.config.in_channels == 2 * model.vae.config.latent_channels
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch, target = process_batch(model, images), encoded(model.vae, images.flip(-1)).detach()
    losses = []
    optimiser = torch.optim.Adam(model.unet.parameters(), lr=1e-3)
    for _ in range(4):
        terms, decoded = process_terms(model, batch, images, target, teacher, training.score)
        assert decoded.shape == images.shape
        optimiser.zero_grad()
        terms["latent"].backward()
        optimiser.step()
        losses.append(float(terms["latent"].detach()))
    assert losses[-1] < losses[0]
    training.write(tmp_path / "head", model)
    head = load_head(tmp_path / "head", device="cpu")
    assert head.family.name == family
    one = photograph(20, 24)
    config = RestoreConfig(scale=2, tile=4, overlap=1, colours="none")
    assert head.predict(one, config).size == (48, 40)
    assert np.array_equal(head.predict(one, config).pixels, head.predict(one, config).pixels)
    with pytest.raises(ValueError, match="steps must be in"):
        head.predict(one, replace(config, steps=5000))


def test_processes_refuse_what_they_do_not_learn(tmp_path: Path, head: RestorationHead) -> None:
    for options in (
        {"family": "sinsr"},
        {"family": "rddm", "teacher": "x"},
        {"score": 1.0},
        {"family": "rddm", "pixel": 0},
    ):
        with pytest.raises(ValueError, match="learns"):
            RestorationTraining(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes one"):
        head.predict(photograph(), RestoreConfig(steps=2))
    with pytest.raises(ValueError, match="does not learn from"):
        RestorationTraining(family="sinsr", teacher="tiny-restore").build(load_parts("tiny", pad=False))


def test_luma_is_rounded_as_published() -> None:
    image = torch.randint(0, 256, (3, 8, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shares = image.permute(1, 2, 0).numpy().astype(np.float32) / 255
    published = ((shares @ np.array([65.481, 128.553, 24.966]) + 16) / 255).astype(np.float32) * 255
    assert np.array_equal(luma(image)[0].numpy(), published)


def test_an_image_below_the_window_of_ssim_is_refused() -> None:
    image = torch.zeros(3, 18, 40, dtype=torch.uint8)
    assert ssim(image, image, crop=3) == 1
    with pytest.raises(ValueError, match=r"a border of 4 pixels leaves less than 11 of an image of \(18, 40\) pixels"):
        ssim(image, image, crop=4)


def test_a_released_test_set_is_measured_beside_a_bicubic_and_the_papers(tmp_path: Path, head: RestorationHead) -> None:
    for name in ("test_LR", "test_HR"):
        (tmp_path / name).mkdir()
    one = photograph(64, 64)
    one.save(tmp_path / "test_HR" / "a.png")
    Photograph(resized(one.pixels, (16, 16), "bicubic")).save(tmp_path / "test_LR" / "a.png")
    report = evaluate_restoration(head, paired_files(tmp_path), RestoreConfig(), benchmark="realsr")
    assert report.rows["head"] == pytest.approx(report.rows["bicubic"])
    assert report.rows["head"]["psnr"] > 30
    assert "OSEDiff" in report.table()
    for folder, name in (("test_LR", "a_LR4.png"), ("test_HR", "a_HR.png")):  # as RealSR names a pair
        (tmp_path / folder / "a.png").rename(tmp_path / folder / name)
    assert paired_files(tmp_path) == [(tmp_path / "test_LR" / "a_LR4.png", tmp_path / "test_HR" / "a_HR.png")]
    (tmp_path / "test_LR" / "b.png").write_bytes((tmp_path / "test_LR" / "a_LR4.png").read_bytes())
    with pytest.raises(ValueError, match="without a pair"):
        paired_files(tmp_path)
    (tmp_path / "test_LR" / "b.png").rename(tmp_path / "test_LR" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png and a_LR4\.png are versions of one image, a"):
        paired_files(tmp_path)


def test_the_embedded_restorer_is_better_than_a_bicubic() -> None:
    embedded = load_head("tiny-restore", device="cpu")
    scene = render_scene(scene_seed("test", 3), category="dog", size=128)
    original = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)
    for clean in (0.0, 1.0):
        gains = []
        for number in range(4):
            low = degraded(original, PairSettings(clean=clean), number).permute(1, 2, 0).numpy()
            images = embedded.predict(Photograph(low)).pixels, resized(low, (128, 128), "bicubic")
            restored, enlarged = (psnr(torch.from_numpy(x).permute(2, 0, 1), original) for x in images)
            gains.append(restored - enlarged)
        assert np.mean(gains) > 0.7


def test_a_photograph_is_read_and_written_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Photograph(texture(16, 24)).save("~/a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert np.array_equal(Photograph.open("~/a.png").pixels, texture(16, 24))


def test_scenes_to_restore_have_the_size_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_set(tmp_path / "set", "train", 2, size=96, workers=1)
    line = ["train", "restore", "--data", f"scenes={tmp_path / 'set'}", "--work", str(tmp_path / "work")]
    assert main([*line, "--scenes", "2"]) == 2
    assert "--scenes counts what is rendered" in capsys.readouterr().err
    assert main([*line, "--validation-scenes", "1", "--workers", "1", "--steps", "1"]) == 2
    assert "size must be that of the originals, 96 x 96, got 128" in capsys.readouterr().err


def test_a_photograph_describes_and_shows_itself_as_other_results_do(tmp_path: Path) -> None:
    one = Photograph(texture(16, 24).astype(np.uint16) * 257)
    assert repr(one).startswith("Photograph(pixels uint16 (16, 24, 3) in ")
    assert np.array_equal(one.numpy(), one.pixels)
    shown = one._repr_png_()
    assert shown is not None
    assert Image.open(io.BytesIO(shown)).size == (24, 16)
    assert one.save(tmp_path / "a.png") == tmp_path / "a.png"
    assert Photograph(texture(16, 24)).save(tmp_path / "a.jpg") == tmp_path / "a.jpg"


@pytest.mark.parametrize(("task", "given"), [("restore", "a restorer is"), ("segmentation", "a head for segmentation"),
                                             ("depth", "a head for depth")])  # fmt: skip
def test_the_refusal_of_a_file_names_the_task_that_was_asked_for(tmp_path: Path, task: str, given: str) -> None:
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "style.safetensors")
    with pytest.raises(HeadError, match=f"; {given}"):
        load_head(tmp_path / "style.safetensors", task=task, device="cpu")
