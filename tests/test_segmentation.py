"""DiffDIS heads: laws of the U-Net, loading, masks of any size, cut-outs, the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrep.backbones.layers import Attention
from diffrep.cli import main
from diffrep.eval.benchmarks.networks import published_head
from diffrep.eval.benchmarks.timing import count_flops
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.diffdis import DiffDisUNet, from_base
from diffrep.heads.loading import WEIGHTS, HeadError, load_segmentation
from diffrep.heads.segmentation import SegmentationHead, SegmentConfig, composite, cut_out, finish, foreground_colours

MODEL = Path(__file__).parent / "parity" / "data" / "diffdis" / "pipeline" / "model"


def folder_of(tmp_path: Path) -> Path:
    """A small random DiffDIS in the authors' layout, with the embedding of its prompt and a small working size."""
    folder = tmp_path / "head"
    shutil.copytree(MODEL, folder)
    text = load_file(MODEL.parent / "inputs.safetensors")["text"]
    save_file({"context": text}, folder / "context.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> SegmentationHead:
    found = load_segmentation(folder_of(tmp_path_factory.mktemp("segmentation")))
    found.model.working_size = 128
    return found


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def inputs(unet: DiffDisUNet, images: int = 2, side: int = 16) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(images, 4, side // 2**k, side // 2**k, generator=generator) for k in range(unet.levels + 1)]
    width = unet.config.cross_attention_dim
    return latents, torch.randn(2 * images, 4, side, side, generator=generator), torch.randn(1, 2, width)


# -- the U-Net ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masks_and_edges_meet_only_in_the_attention_of_the_mid_block(head: SegmentationHead) -> None:
    unet = head.model.unet
    latents, noise, context = inputs(unet)
    masks = unet(latents, noise, context)[:2]
    torch.testing.assert_close(unet(latents, noise, context, edges=False), masks, atol=1e-5, rtol=1e-4)
    noise[2:] += 1  # of the edges
    assert (unet(latents, noise, context)[:2] - masks).abs().max() > 1e-3
    for block in unet.mid_block.attentions[0].transformer_blocks:
        block.attn3.to_out[0].weight.data.zero_()
    try:
        alone = unet(latents, noise, context)[:2]
        noise[2:] -= 1
        torch.testing.assert_close(unet(latents, noise, context)[:2], alone)
    finally:
        unet.load_state_dict(load_file(MODEL / "unet" / WEIGHTS))


@torch.no_grad()
def test_attention_as_it_is_trained_leaves_the_swap(head: SegmentationHead) -> None:
    unet = head.model.unet
    latents, noise, context = inputs(unet)
    before = unet(latents, noise, context)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.fused = False
    assert attentions
    torch.testing.assert_close(unet(latents, noise, context), before, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others(head: SegmentationHead) -> None:
    unet = head.model.unet
    latents, noise, context = inputs(unet, images=3)
    both = unet(latents, noise, context)
    alone = unet([x[1:2] for x in latents], noise[[1, 4]], context)
    torch.testing.assert_close(both[[1, 4]], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_new_head_begins_without_injection_and_keeps_its_base() -> None:
    config = json.loads((MODEL / "unet" / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = UNet2DConditionModel.from_config({**config, "in_channels": 4})
    unet = from_base(base, seed=1).eval()
    latents, noise, context = inputs(unet)
    output = unet(latents, noise, context)
    others = [latents[0], *[torch.randn_like(x) for x in latents[1:]]]
    torch.testing.assert_close(unet(others, noise, context), output)  # SWCI is the identity
    torch.testing.assert_close(from_base(base, seed=1).state_dict(), unet.state_dict())
    own = unet.state_dict()
    assert all(torch.equal(own[key], value) for key, value in base.state_dict().items() if key != "conv_in.weight")
    with pytest.raises(ValueError, match="must take latents alone"):
        from_base(unet)


def test_latents_that_do_not_halve_are_refused(head: SegmentationHead) -> None:
    unet = head.model.unet
    latents, noise, context = inputs(unet)
    with pytest.raises(ValueError, match="needs 4 latents, got 3"):
        unet(latents[:3], noise, context)
    latents[1] = latents[1][..., :-1]
    with pytest.raises(ValueError, match=r"latent 1 is \(8, 7\), expected \(8, 8\)"):
        unet(latents, noise, context)


def test_the_mask_alone_costs_a_third_less_at_full_size() -> None:
    head = published_head("meta")
    assert sum(p.numel() for p in head.unet.parameters()) == 912_924_804
    pixels = torch.empty(1, 3, 512, 512, device="meta")
    noise = torch.empty(1, 4, 64, 64, device="meta")
    whole = count_flops(lambda: head.forward(pixels, noise, edges=True))
    alone = count_flops(lambda: head.forward(pixels, noise))
    assert whole == pytest.approx(8.12e12, rel=0.01)
    assert alone < whole * 2 / 3


# -- loading --------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> None:
    weights = load_file(folder / "unet" / WEIGHTS)
    change(weights)
    save_file(weights, folder / "unet" / WEIGHTS)


def test_the_authors_folder_is_recognised_by_its_weights(folder: Path) -> None:
    assert json.loads((folder / "unet" / "config.json").read_text())["class_embed_type"] is None
    assert "recognised by its weights" in load_segmentation(folder).recognised


def test_a_unet_alone_needs_its_base(folder: Path, tmp_path: Path, head: SegmentationHead) -> None:
    alone = tmp_path / "alone"
    (alone / "unet").mkdir(parents=True)
    shutil.copy(folder / "unet" / WEIGHTS, alone / "unet")
    with pytest.raises(HeadError, match="holds a U-Net alone"):
        load_segmentation(alone)
    repacked = tmp_path / "repacked.safetensors"
    save_file({f"model.unet.{k}": v for k, v in load_file(folder / "unet" / WEIGHTS).items()}, repacked)
    for name in (alone, repacked):
        found = load_segmentation(name, base=folder)
        torch.testing.assert_close(found.model.unet.state_dict(), head.model.unet.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("rgb_conv.1.0.bias"), r"1 missing \(rgb_conv.1.0.bias\)"),
        (lambda w: w.update(extra=torch.zeros(1)), r"1 left over \(extra\)"),
        (lambda w: w.update({"conv_out.bias": torch.zeros(5)}), r"1 of another shape \(conv_out.bias\)"),
        (lambda w: [w.pop(k) for k in list(w) if "attn3" in k], "is no DiffDIS U-Net"),
        (lambda w: w["conv_in.weight"].fill_(float("nan")), "conv_in.weight has NaN"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, change: Any, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(HeadError, match=message):
        load_segmentation(folder)


def test_folders_that_are_no_heads(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(HeadError, match="no such folder or file and no known head"):
        load_segmentation("tiny-segmentatoin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeadError, match="is no folder of a head"):
        load_segmentation(tmp_path / "empty")
    (folder / "unet" / WEIGHTS).write_bytes(b"none")
    with pytest.raises(HeadError, match="cannot be read as safetensors"):
        load_segmentation(folder)


def test_a_decoder_survives_its_file(tmp_path: Path) -> None:
    decoder = DetailDecoder(4)
    decoder.save(tmp_path, torch.float32)
    again = DetailDecoder.load(tmp_path)
    assert again is not None
    latents, pixels = torch.randn(2, 4, 3, 5), torch.rand(2, 3, 24, 40)
    torch.testing.assert_close(again(latents, pixels), decoder(latents, pixels))
    assert DetailDecoder.load(tmp_path / "nowhere") is None


# -- masks ----------------------------------------------------------------------------------------------------------


def test_masks_have_the_size_of_their_images_and_do_not_depend_on_company(head: SegmentationHead) -> None:
    images = [picture(90, 120), picture(64, 64, 1), picture(33, 200, 2)]
    for config in (SegmentConfig(edges=True), SegmentConfig(shape="aspect", size=192), SegmentConfig(stretch=False)):
        found = list(head.predict_each(images, config))
        for image, result in zip(images, found, strict=True):
            assert tuple(result.mask.shape) == (image.height, image.width)
            assert 0 <= float(result.mask.min()) <= float(result.mask.max()) <= 1
            assert (result.edge is not None) == config.edges
            alone = head.predict(image, config)
            torch.testing.assert_close(result.mask, alone.mask, atol=1e-4, rtol=0)
    with_edges, without = head.predict(images[0], SegmentConfig(edges=True)), head.predict(images[0])
    torch.testing.assert_close(with_edges.mask, without.mask, atol=1e-4, rtol=0)


def test_the_canvas_keeps_to_what_the_unet_can_halve(head: SegmentationHead) -> None:
    assert head.canvas_size((90, 120), SegmentConfig()) == (128, 128)
    assert head.canvas_size((90, 200), SegmentConfig(shape="aspect", size=256)) == (128, 256)
    assert head.canvas_size((10, 3000), SegmentConfig(shape="aspect")) == (64, 128)
    with pytest.raises(ValueError, match="size must be at least 64 pixels"):
        head.predict(picture(64, 64), SegmentConfig(size=32))
    with pytest.raises(ValueError, match="do not go together"):
        head.predict(picture(64, 64), SegmentConfig(tile=64, ensemble=True))


def test_a_constant_map_stays_finite() -> None:
    flat = finish(torch.full((1, 1, 4, 4), 0.5))
    assert bool(torch.isfinite(flat).all())
    assert float(flat.mean()) == pytest.approx(0.75)
    assert finish(torch.tensor([[[[-3.0, 0.0], [0.5, 0.5]]]])).flatten().tolist() == pytest.approx([0, 2 / 3, 1, 1])


def test_the_ensemble_is_another_mask_and_repeats(head: SegmentationHead) -> None:
    image = picture(128, 128)
    config = SegmentConfig(ensemble=True)
    mask = head.predict(image, config).mask
    torch.testing.assert_close(head.predict(image, config).mask, mask)
    assert (head.predict(image).mask - mask).abs().max() > 1e-3


class Bright(SegmentationHead):
    """A head whose network calls what is bright the object: what it sees coarsely it draws coarsely."""

    def maps(self, pixels: Tensor, config: SegmentConfig) -> tuple[Tensor, Tensor | None]:
        return (pixels.mean(1, keepdim=True) > 0.5).float(), None


def test_windows_draw_outlines_at_the_resolution_of_the_image(head: SegmentationHead) -> None:
    y, x = np.mgrid[:512, :640]
    truth = (np.hypot(y - 250, x - 300) < 150) | (abs(x - y) < 3)
    image = Image.fromarray(np.repeat(truth[..., None] * np.uint8(255), 3, axis=2))
    bright = Bright(head.model)
    coarse, fine = bright.predict(image).mask, bright.predict(image, SegmentConfig(tile=128)).mask
    errors = [float((mask - torch.from_numpy(truth).float()).abs().mean()) for mask in (coarse, fine)]
    assert errors[1] < errors[0] / 4
    far = torch.from_numpy(np.hypot(y - 250, x - 300) < 60)  # from the outline
    torch.testing.assert_close(fine[far], coarse[far], atol=1e-5, rtol=0)


def test_half_precision_on_the_cpu(folder: Path, head: SegmentationHead) -> None:
    half = load_segmentation(folder, dtype=torch.bfloat16)
    half.model.working_size = 128
    mask = half.predict(picture(90, 120)).mask
    assert mask.dtype == torch.float32
    assert (mask - head.predict(picture(90, 120)).mask).abs().mean() < 0.1


# -- cut-outs -------------------------------------------------------------------------------------------------------


def blended(height: int = 60, width: int = 80) -> tuple[Image.Image, Tensor]:
    """A red object that fades into a blue background, and its true mask."""
    mask = ((torch.arange(width) - 30) / 20).clamp(0, 1).expand(height, width)
    red, blue = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.9])
    pixels = mask[..., None] * red + (1 - mask[..., None]) * blue
    return Image.fromarray((pixels * 255).round().byte().numpy()), mask.contiguous()


def test_the_object_keeps_its_own_colour_along_its_outline() -> None:
    image, mask = blended()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    colours = foreground_colours(pixels, mask)
    partly = mask > 0.2
    assert (colours[:, partly] - torch.tensor([0.9, 0.1, 0.1])[:, None]).abs().max() < 0.1
    assert (pixels[:, partly] - torch.tensor([0.9, 0.1, 0.1])[:, None]).abs().max() > 0.5


def test_cut_outs_carry_the_mask_and_composites_cover() -> None:
    image, mask = blended()
    cut = np.asarray(cut_out(image, mask))
    assert cut.shape == (60, 80, 4)
    assert np.array_equal(cut[..., 3], np.round(mask.numpy() * 255).astype(np.uint8))
    plain = np.asarray(cut_out(image, mask, estimate=False))
    assert np.array_equal(plain[..., :3], np.asarray(image))
    assert np.asarray(composite(image, mask, "#20c040"))[0, 0].tolist() == [32, 192, 64]
    behind = picture(30, 30)
    assert composite(image, mask, behind).size == image.size
    with pytest.raises(ValueError, match="no colour 'whit'"):
        composite(image, mask, "whit")
    with pytest.raises(ValueError, match="the mask is 80 x 59 pixels, the image 80 x 60"):
        cut_out(image, mask[1:])


# -- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main(["segment", *map(str, arguments), "--size", "128"])


def test_segment_writes_what_was_asked_for(folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    picture(50, 70).save(source / "a.png")
    picture(64, 40, 1).save(source / "deep" / "b.jpg")
    kinds = ("mask", "binary", "edge", "cutout", "composite")
    assert run(source, "-o", out, "--model", folder, "--outputs", *kinds) == 0
    for name, size in (("a", (70, 50)), ("deep/b", (40, 64))):
        for kind in kinds:
            with Image.open(out / f"{name}_{kind}.png") as image:
                assert image.size == size
                assert image.mode == {"cutout": "RGBA", "composite": "RGB"}.get(kind, "L")
    binary = np.asarray(Image.open(out / "a_binary.png"))
    assert set(np.unique(binary)) <= {0, 255}
    summary = json.loads((out / "summary.json").read_text())
    assert [Path(entry["image"]).name for entry in summary["images"]] == ["a.png", "b.jpg"]
    assert summary["images"][0]["object"] == pytest.approx((binary > 0).mean(), abs=1e-4)


def test_segment_names_and_counts_what_failed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    picture(50, 70).save(source / "a.png")
    (source / "b.png").write_bytes(b"no image")
    (source / "c.png").write_bytes(b"")
    assert run(source, "-o", tmp_path / "out", "--model", folder) == 2
    error = capsys.readouterr().err
    assert "2 of 3 images failed" in error.splitlines()[-1]
    assert (tmp_path / "out" / "a_mask.png").is_file()
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["images"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png"], "no such file"),
        (["a.png", "--threshold", "1.5"], "threshold must be between 0 and 1"),
        (["a.png", "--outputs", "composite", "--background", "whit"], "no colour 'whit'"),
        (["a.png", "--edges"], "name edge among --outputs"),
        (["a.png", "-o", "a.png"], "is a file"),
        (["a.png", "--model", "nowhere"], "no such folder or file and no known head"),
        (["a.png", "--tile", "8"], "tile must be at least"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(50, 70).save("a.png")
    model = [] if "--model" in arguments else ["--model", str(folder)]
    assert main(["segment", *arguments, *model]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_vae_must_belong_to_the_unet(head: SegmentationHead) -> None:
    from diffrep.heads.segmentation import DiffDis

    other = AutoencoderKL(latent_channels=8, block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(ValueError, match="do not belong together"):
        DiffDis(head.model.unet, other, head.model.context, head.model.schedule)
