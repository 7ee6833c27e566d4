from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffrep.backbones import (
    BackboneError,
    Conditions,
    LatentDiffusion,
    PositionRule,
    TapError,
    VisionTransformer,
    draw_noise,
    load_backbone,
)
from diffrep.backbones.vit_loading import open_clip_backbone, timm_backbone

PIXELS = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NOISY = Conditions(timestep=200, ensemble=2, posterior="sample", prompt="a cat")


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> LatentDiffusion:
    backbone = load_backbone(sd_folder)
    assert isinstance(backbone, LatentDiffusion)
    return backbone


@pytest.fixture(scope="module")
def vit(vit_folder: Path) -> VisionTransformer:
    backbone = load_backbone(vit_folder)
    assert isinstance(backbone, VisionTransformer)
    return backbone


def modules_that_run(network: nn.Module, run) -> list[str]:
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, _, name=name: order.append(name))
        for name, module in network.named_modules()
    ]
    run()
    for handle in handles:
        handle.remove()
    return order


def test_claimed_channels_and_strides_are_true(sd: LatentDiffusion, vit: VisionTransformer) -> None:
    for backbone in (sd, vit):
        taps = backbone.taps()
        maps = backbone.maps(PIXELS[:1], [t.name for t in taps], Conditions(timestep=10))
        for tap in taps:
            shape = maps[tap.name].shape
            assert shape == (1, tap.channels or shape[1], 64 // tap.stride, 64 // tap.stride), tap


@pytest.mark.parametrize(
    "tap",
    [
        "conv_in",
        "down.1.resnet.0",
        "down.2",
        "mid.attention.0",
        "up.0",
        "up.1.attention.1.block.0",
        "up.1",
        "up.2.resnet.1.increment",
        "up.3",
    ],
)
def test_nothing_runs_behind_the_deepest_tap_and_the_numbers_are_those_of_a_full_pass(
    sd: LatentDiffusion, tap: str
) -> None:
    full = sd.maps(PIXELS[:1], [t.name for t in sd.taps()], NOISY)
    ran = modules_that_run(sd.network, lambda: sd.network_maps(torch.zeros(1, 4, 8, 8), [tap], NOISY))
    whole = modules_that_run(sd.network, lambda: sd.network(torch.zeros(1, 4, 8, 8), 200, sd.embed("a cat").context))
    path = sd.tap(tap).module
    last = max(i for i, name in enumerate(whole) if name == path or name.startswith(f"{path}."))
    assert ran == whole[: last + 1]
    early = sd.maps(PIXELS[:1], [tap, "conv_in"], NOISY)
    assert torch.equal(early[tap], full[tap])


def test_order_and_batch_size_do_not_matter(sd: LatentDiffusion) -> None:
    together = sd.maps(PIXELS, ["mid", "up.1"], NOISY, batch_size=5)
    for i in range(3):
        alone = sd.maps(PIXELS[i : i + 1], ["mid", "up.1"], NOISY, batch_size=1)
        for tap, value in alone.items():
            torch.testing.assert_close(together[tap][i : i + 1], value, rtol=1e-4, atol=1e-5)
    other_seed = sd.maps(PIXELS[:1], ["up.1"], Conditions(timestep=200, seed=1))
    assert not torch.allclose(other_seed["up.1"], sd.maps(PIXELS[:1], ["up.1"], Conditions(timestep=200))["up.1"])


def test_an_ensemble_is_the_mean_of_its_members(sd: LatentDiffusion) -> None:
    members = sd.maps(PIXELS[:2], ["up.1"], NOISY, average=False)["up.1"]
    assert members.shape[0] == 4
    torch.testing.assert_close(sd.maps(PIXELS[:2], ["up.1"], NOISY)["up.1"], members.unflatten(0, (2, 2)).mean(1))
    assert not torch.allclose(members[0], members[1])


def test_keys_and_values_of_a_prompt_are_projected_once_and_change_nothing(sd: LatentDiffusion) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = {}
    handle = sd.network.up_blocks[1].register_forward_hook(lambda m, i, o: plain.update(up=o))
    sd.network(latents, 200, sd.embed("a cat").context.expand(2, -1, -1))
    handle.remove()
    got = sd.network_maps(latents, ["up.1"], NOISY)["up.1"]
    assert torch.equal(got, plain["up"])
    calls = []
    key = sd.network.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
    original = type(key).forward
    type(key).forward = lambda self, x: calls.append(self) or original(self, x)
    try:
        sd.network_maps(latents, ["up.1"], NOISY)
    finally:
        type(key).forward = original
    assert calls
    assert key not in calls


def test_text_encoder_is_loaded_once_for_many_prompts(sd_folder: Path) -> None:
    backbone = load_backbone(sd_folder)
    assert isinstance(backbone, LatentDiffusion)
    assert backbone.text is not None
    backbone.embed_all(["a cat", "a dog", "a cat"])
    for _ in range(3):
        backbone.maps(PIXELS[:1], ["mid"], NOISY)
    assert backbone.text.times_loaded == 1
    assert not torch.equal(backbone.embed("a cat").context, backbone.embed("a dog").context)
    assert not any(type(v).__name__.startswith("CLIP") for v in vars(backbone.text).values())


def test_clean_latents_take_no_noise(sd: LatentDiffusion) -> None:
    first = sd.maps(PIXELS[:1], ["up.1"], Conditions(timestep=261, clean=True, seed=0))["up.1"]
    assert torch.equal(first, sd.maps(PIXELS[:1], ["up.1"], Conditions(timestep=261, clean=True, seed=9))["up.1"])
    no_time = sd.maps(PIXELS[:1], ["up.1"], Conditions(timestep=-1))["up.1"]
    assert torch.equal(no_time, sd.maps(PIXELS[:1], ["up.1"], Conditions(timestep=0, clean=True))["up.1"])


def test_noise_is_a_function_of_seed_and_draw() -> None:
    assert torch.equal(draw_noise((4, 6, 6), 42), torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(42)))
    draws = torch.cat([draw_noise((64,), s, k, stream=r) for s in (0, 1) for k in (0, 1, 2) for r in (0, 1)])
    assert len(draws.unique(dim=0)) == len(draws)


def test_explicit_noise_of_another_shape_is_refused(sd: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match="noise must be"):
        sd.maps(PIXELS, ["mid"], NOISY, noise=torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8"):
        sd.maps(PIXELS[..., :60], ["mid"], NOISY)


def test_odd_latents_give_maps_that_cover_the_canvas(sd: LatentDiffusion) -> None:
    maps = sd.maps(torch.rand(1, 3, 120, 136), ["up.0", "up.1", "up.3", "up.1.attention.0.block.0.self.k"], NOISY)
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [(4, 5), (8, 9), (15, 17), (4, 5)]


def test_unknown_taps_name_their_neighbours(sd: LatentDiffusion, vit: VisionTransformer) -> None:
    with pytest.raises(TapError, match=r"up\.1\.resnet\.1"):
        sd.maps(PIXELS, ["up.1.resnt.1"], NOISY)
    with pytest.raises(TapError, match=r"layer\.2"):
        vit.maps(PIXELS, ["layer.9"])


def test_vit_facets_are_those_of_the_joint_projection(vit: VisionTransformer) -> None:
    network = vit.network
    seen = {}
    handle = network.blocks[1].attn.qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o))
    tokens = vit.tokens(PIXELS, ["layer.1.query", "layer.1.key", "layer.1.value", "layer.2"])
    handle.remove()
    for i, facet in enumerate(("query", "key", "value")):
        heads = seen["qkv"].unflatten(2, (3, 3, 8))[:, :, i]  # (B, N, heads, width)
        torch.testing.assert_close(tokens[f"layer.1.{facet}"], heads.mT.flatten(2), rtol=1e-5, atol=1e-5)
    ran = modules_that_run(network, lambda: vit.tokens(PIXELS, ["layer.1.key"]))
    assert "blocks.1.norm1" in ran
    assert "blocks.1.attn" not in ran


def test_vit_takes_any_size_and_a_smaller_stride(vit: VisionTransformer, vit_folder: Path) -> None:
    assert vit.maps(torch.rand(1, 3, 96, 48), ["layer.2"])["layer.2"].shape == (1, 24, 12, 6)
    fine = load_backbone(vit_folder, stride=4)
    fine_map = fine.maps(PIXELS, ["layer.0"], Conditions())["layer.0"]
    assert fine_map.shape == (3, 24, 15, 15)
    assert fine.grid("layer.0", (64, 64), (15, 15)).origin == (3.5, 3.5)
    with pytest.raises(ValueError, match=r"sides of 8 \+ n \* 8"):
        vit.maps(torch.rand(1, 3, 60, 64), ["layer.0"])
    uneven = load_backbone(vit_folder, stride=5)  # 24 = 8 + 3 * 5 + 1: as in the published extractor, 1 + 16 // 5 cells
    pixels = torch.rand(1, 3, 24, 48)
    assert uneven.maps(pixels, ["layer.0"])["layer.0"].shape[2:] == (4, 9)
    with pytest.raises(ValueError, match=r"sides of 8 \+ n \* 5"):
        uneven.maps(pixels[..., :44], ["layer.0"])


def test_patches_behind_a_convolutional_stem_have_the_stride_of_both() -> None:
    arguments = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 3}
    build = partial(timm_backbone, "vit_tiny_r_s16_p8_224", model_args=arguments, name="hybrid", source="random")
    assert {(tap.channels, tap.stride) for tap in build().taps()} == {(24, 8)}
    assert build().maps(PIXELS, ["layer.1"])["layer.1"].shape[2:] == (PIXELS.shape[2] // 8, PIXELS.shape[3] // 8)
    assert build(stride=4).maps(torch.rand(1, 3, 40, 32), ["layer.0"])["layer.0"].shape[2:] == (9, 7)
    with pytest.raises(ValueError, match=r"multiple of 4 in 4\.\.8.*got 2"):
        build(stride=2)


def test_positions_at_the_trained_size_are_untouched() -> None:
    table = torch.randn(1, 25, 6)
    assert PositionRule(False, 0.1).resample(table, (5, 5)) is table
    assert PositionRule(False, 0.1).resample(table, (7, 9)).shape == (1, 63, 6)
    assert not torch.allclose(
        PositionRule(False, 0.1).resample(table, (10, 10)), PositionRule().resample(table, (10, 10))
    )


def test_open_clip_towers_are_tapped() -> None:
    import open_clip
    from open_clip.transformer import VisionTransformer as Tower

    torch.manual_seed(0)
    tower = Tower(image_size=32, patch_size=8, width=24, layers=3, heads=3, mlp_ratio=2, output_dim=8)
    tower.image_mean, tower.image_std = None, None
    model = nn.Module()
    model.visual = tower.eval()
    with torch.inference_mode():
        pixels = torch.rand(2, 3, 32, 32)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        expected = tower.transformer(tower._embeds(normalised))  # before our embedding step takes its place
    backbone = open_clip_backbone(model, name="tower", source="random")
    torch.testing.assert_close(backbone.tokens(pixels, ["layer.2"])["layer.2"], expected, rtol=1e-5, atol=1e-5)
    assert backbone.maps(torch.rand(1, 3, 64, 48), ["layer.1.key"])["layer.1.key"].shape == (1, 24, 8, 6)


@pytest.mark.parametrize("options", [{"channels_last": True}, {"dtype": torch.bfloat16}])
def test_options_keep_the_features(sd_folder: Path, sd: LatentDiffusion, options: dict) -> None:
    got = load_backbone(sd_folder, **options).maps(PIXELS, ["up.1"], NOISY)["up.1"]
    expected = sd.maps(PIXELS, ["up.1"], NOISY)["up.1"]
    assert got.dtype == options.get("dtype", torch.float32)
    cosine = torch.cosine_similarity(got.float().flatten(1), expected.flatten(1))
    assert cosine.min() > (0.9999 if "channels_last" in options else 0.98)


def test_compiled_blocks_keep_the_features_and_the_early_exit(
    sd_folder: Path, sd: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs that are captured; what a compiler writes for them takes it a minute and is PyTorch's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = load_backbone(sd_folder, compile=True)
    taps = ["down.0.resnet.0", "down.1"]
    got = compiled.maps(PIXELS, taps, NOISY)
    for tap, value in sd.maps(PIXELS, taps, NOISY).items():
        torch.testing.assert_close(got[tap], value, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_features_and_defaults_to_bfloat16(sd_folder: Path, sd: LatentDiffusion) -> None:
    assert load_backbone(sd_folder, device="cuda").dtype == torch.bfloat16
    got = load_backbone(sd_folder, device="cuda", dtype=torch.float32).maps(PIXELS, ["up.1"], NOISY)["up.1"]
    torch.testing.assert_close(got.cpu(), sd.maps(PIXELS, ["up.1"], NOISY)["up.1"], rtol=1e-2, atol=1e-3)


def test_sdxl_is_told_what_its_pipeline_tells_it(sdxl_folder: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    context, _, pooled, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)
    backbone = load_backbone(sdxl_folder)
    assert isinstance(backbone, LatentDiffusion)
    embedding = backbone.embed("a cat")
    torch.testing.assert_close(embedding.context, context)
    assert embedding.pooled is not None
    torch.testing.assert_close(embedding.pooled, pooled)

    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    ids = pipeline._get_add_time_ids((64, 96), (0, 0), (64, 96), torch.float32, text_encoder_projection_dim=16)
    seen = {}
    handle = pipeline.unet.up_blocks[0].register_forward_hook(lambda m, i, o: seen.update(up=o))
    added = {"text_embeds": pooled.expand(2, -1), "time_ids": ids.expand(2, -1)}
    pipeline.unet(latents, 200, context.expand(2, -1, -1), added_cond_kwargs=added)
    handle.remove()
    got = backbone.network_maps(latents, ["up.0", "up.0.attention.1.block.1.cross.q"], NOISY)
    torch.testing.assert_close(got["up.0"], seen["up"])
    assert got["up.0.attention.1.block.1.cross.q"].shape == (2, 32, 2, 3)


def test_dinov3_has_rotary_positions_and_registers() -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model(
        "vit_small_patch16_dinov3", embed_dim=32, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True
    )
    backbone = VisionTransformer(network, name="small dinov3")
    pixels = torch.rand(1, 3, 64, 96)
    normalised = (pixels - backbone.mean[:, None, None]) / backbone.std[:, None, None]
    with torch.inference_mode():
        expected = network.forward_intermediates(normalised, indices=[1], norm=False, intermediates_only=True)[0]
    torch.testing.assert_close(backbone.maps(pixels, ["layer.1"])["layer.1"], expected)
    assert backbone.prefix == 5
    assert backbone.maps(pixels, ["layer.0.key"])["layer.0.key"].shape == (1, 32, 4, 6)


class TestBadFolders:
    @pytest.fixture
    def broken(self, sd_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(sd_folder, tmp_path / "model"))

    def fails(self, name: object, match: str) -> None:
        with pytest.raises(BackboneError, match=match) as caught:
            load_backbone(name)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    def test_unknown_name(self) -> None:
        self.fails("sd21", r"near names: sd2\.1")
        self.fails("./nowhere", "no such folder")
        self.fails("timm:vit_hug", "timm has no model")
        self.fails("open_clip:ViT-B-3", "open_clip has no model")
        self.fails("open_clip:ViT-B-32", "say which weights")

    def test_no_backbone_folder(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        self.fails(tmp_path, r"is no backbone folder.*notes\.txt")

    @pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
    def test_missing_component(self, broken: Path, part: str) -> None:
        shutil.rmtree(broken / part)
        self.fails(broken, f"{part}/.*missing")

    def test_missing_text_encoder(self, broken: Path) -> None:
        shutil.rmtree(broken / "text_encoder")
        with pytest.raises(BackboneError, match="text_encoder/ is missing"):
            load_backbone(broken).maps(PIXELS, ["mid"], NOISY)

    def test_not_finite(self, broken: Path) -> None:
        file = broken / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["conv_in.bias"][3] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
        self.fails(broken, r"conv_in\.bias has NaN")

    def test_truncated_weights(self, broken: Path) -> None:
        file = broken / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
        self.fails(broken, str(broken))

    def test_weights_that_do_not_fit(self, broken: Path) -> None:
        config = json.loads((broken / "unet" / "config.json").read_text())
        (broken / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [16, 16, 32, 64]}))
        self.fails(broken, "unet.*fit")

    def test_missing_keys(self, broken: Path) -> None:
        file = broken / "vae" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights.pop("encoder.conv_in.bias")
        save_file(weights, file, metadata={"format": "pt"})
        self.fails(broken, r"vae.*missing.*encoder\.conv_in\.bias")

    def test_wrong_channels(self, broken: Path) -> None:
        from diffusers import UNet2DConditionModel

        config = json.loads((broken / "unet" / "config.json").read_text()) | {"in_channels": 9}
        UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}).save_pretrained(
            broken / "unet"
        )
        self.fails(broken, "takes 9 channels but the VAE gives 4")

    def test_broken_json(self, broken: Path) -> None:
        (broken / "model_index.json").write_text("{")
        self.fails(broken, "cannot be read as JSON")


def test_what_is_no_backbone_is_named_with_what_takes_it(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"tiny-depth: is no backbone but an embedded head, .*export with --head"):
        load_backbone("tiny-depth")
    with pytest.raises(BackboneError, match="tiny-synthesis: is no backbone but an embedded model of `diffrep synthes"):
        load_backbone("tiny-synthesis")
    (tmp_path / "config.json").write_text(
        '{"architectures": ["RADIOModel"], "auto_map": {"AutoModel": "hf_model.RADIO"}}'
    )
    with pytest.raises(BackboneError, match=r"auto_map\), which diffrep does not run; .*radio, dinov2"):
        load_backbone(str(tmp_path))
