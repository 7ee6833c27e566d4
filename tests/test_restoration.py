"""Restoration: photographs in their files, degradations from seeds, heads on images of any size, files of adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.backbones.pipelines import load_parts
from diffrep.commands.restore import comparison
from diffrep.eval.restoration import evaluate_restoration, paired_files, psnr
from diffrep.heads.head import HeadError
from diffrep.heads.loading import load_head
from diffrep.heads.restoration.families import TINY
from diffrep.heads.restoration.loading import recognise_restorer
from diffrep.heads.restoration.photograph import Photograph
from diffrep.heads.restoration.pixels import blended_rows, low_band
from diffrep.heads.restoration.restorer import RestorationHead, RestoreConfig, resized
from diffrep.heads.training.restoration import PairSettings, RestorationTraining, degraded, restorer_of
from diffrep.scenes import render_scene, scene_seed


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


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_photograph_survives_its_file(tmp_path: Path, deep: bool, grey: bool, transparent: bool) -> None:
    tags = Image.Exif()
    tags[0x010F], tags[0x0112] = "Maker", 1
    one = photograph(deep=deep)
    pixels = np.repeat(one.pixels[..., :1], 3, 2) if grey else one.pixels
    alpha = one.pixels[..., 1].copy() if transparent else None
    one = Photograph(pixels, alpha, tags.tobytes(), b"profile" * 20, grey)
    one.save(tmp_path / "a.png")
    back = Photograph.open(tmp_path / "a.png")
    if not (deep and grey and transparent):  # Pillow and torchvision both open such a file as 8 bits or as colours
        assert np.array_equal(back.pixels, one.pixels)
    assert (back.alpha is None) == (alpha is None)
    assert back.icc == one.icc
    with Image.open(tmp_path / "a.png") as image:
        assert image.getexif()[0x010F] == "Maker"


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
        fixed = head._colours(darker, enlarged, RestoreConfig(colours=colours))  # type: ignore[arg-type]
        values = torch.from_numpy(fixed.astype(np.float32)).permute(2, 0, 1)[None]
        assert float((values.mean((2, 3)) - tensor.mean((2, 3))).abs().max()) < 1.5
        assert float((low_band(values) - low_band(tensor)).abs().max()) < 1.5


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
    bands = list(blended_rows(lambda top, left: whole[:, top : top + 12, left : left + 12], (37, 53), 12, 5))
    assert [start for start, _ in bands] == [0, 7, 14, 21, 25]
    torch.testing.assert_close(torch.cat([band for _, band in bands], 1), whole)


def test_a_degradation_is_a_function_of_its_number() -> None:
    image = torch.from_numpy(photograph(64, 64).pixels).permute(2, 0, 1)
    settings = PairSettings(clean=0.3)
    numbers = [degraded(image, settings, number) for number in range(6)]
    assert all(one.shape == (3, 16, 16) for one in numbers)
    assert torch.equal(numbers[3], degraded(image, settings, 3))
    assert any(not torch.equal(numbers[0], other) for other in numbers[1:])
    assert degraded(image, settings, 3, half=True).shape == (3, 32, 32)


def test_resizing_is_that_of_pillow_and_close_for_sixteen_bits() -> None:
    eight, sixteen = photograph(), photograph(deep=True)
    small, deep = (resized(one.pixels, (30, 33), "bicubic") for one in (eight, sixteen))
    assert float(np.abs(small - deep / 257).max()) < 2


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
    page = comparison("photos/<a>.png", before, Photograph(resized(before.pixels, (80, 104), "bicubic")))
    assert page.count("data:image/jpeg;base64,") == 2
    assert "&lt;a&gt;.png" in page
    assert "104 x 80" in page


def test_a_training_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="half the scale"):
        RestorationTraining(teacher="folder")
    with pytest.raises(ValueError, match="learns from pixels"):
        RestorationTraining(pixel=0.0)
    assert TINY.result == "residual"


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
    (tmp_path / "test_LR" / "b.png").write_bytes((tmp_path / "test_LR" / "a.png").read_bytes())
    with pytest.raises(ValueError, match="without a pair"):
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
