"""Vision transformers as people have them: folders of transformers, files of DINOv2 and DINOv3, bare files of timm."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from diffrep.backbones import BackboneError, VisionTransformer, load_backbone
from diffrep.backbones.vit_loading import IMAGENET
from diffrep.features import extract
from diffrep.synthesis.grids import ImageEncoder

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
SAVED = {
    "dinov2": ("Dinov2Config", {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}, 1),
    "registers": ("Dinov2WithRegistersConfig", {"image_size": 28, "patch_size": 14, "num_register_tokens": 2}, 3),
    "dinov3": ("DINOv3ViTConfig", {"image_size": 32, "patch_size": 16, "num_register_tokens": 2}, 3),
    "vit": ("ViTConfig", {"image_size": 28, "patch_size": 14, "intermediate_size": 48}, 1),
    "clip": ("CLIPVisionConfig", {"image_size": 28, "patch_size": 14, "intermediate_size": 48}, 1),
    "radio": ("RadioConfig", {"image_size": 28, "patch_size": 14, "max_img_size": 56, "num_registers": 2}, 5),
    "siglip": ("SiglipVisionConfig", {"image_size": 28, "patch_size": 14, "intermediate_size": 48}, 0),
}


@pytest.mark.parametrize("kind", list(SAVED))
def test_a_folder_of_transformers_gives_transformers_features(kind: str, tmp_path: Path) -> None:
    name, sizes, prefix = SAVED[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, name)(**SIZES, **sizes)).eval()
    model.save_pretrained(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    backbone = load_backbone(tmp_path, device="cpu")
    assert isinstance(backbone, VisionTransformer)
    assert backbone.prefix == prefix
    patch = sizes["patch_size"]
    pixels = torch.rand(2, 3, 3 * patch, 4 * patch)
    if kind == "radio":  # it normalises inside
        mean, std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    options = {} if kind.startswith(("dino", "reg", "radio")) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = model(normalised, output_hidden_states=True, **options).hidden_states
    for layer in (0, 1):
        tokens = backbone.tokens(pixels, [f"layer.{layer}"])[f"layer.{layer}"]
        torch.testing.assert_close(tokens, states[layer + 1], atol=1e-5, rtol=1e-5)
    maps = backbone.maps(pixels, ["layer.1", "layer.1.key"])
    assert maps["layer.1"].shape == maps["layer.1.key"].shape == (2, 24, 3, 4)
    assert torch.equal(maps["layer.1"][0, :, 1, 2], tokens[0, prefix + 6])
    assert extract(backbone, torch.rand(3, 40, 50)).taps == ("layer.1",)
    encoder = ImageEncoder(backbone, "class" if kind == "clip" else "mean")
    square = torch.rand(2, 3, encoder.size, encoder.size)
    with torch.no_grad():
        whole = model((square - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    end = whole.pooler_output if kind == "clip" else whole.last_hidden_state[:, prefix:].mean(1)
    torch.testing.assert_close(encoder(square), end, atol=1e-5, rtol=1e-5)
    with pytest.raises(BackboneError, match="in steps of"):
        load_backbone(tmp_path, stride=patch // 2, device="cpu")


def test_the_image_tower_of_a_whole_clip(tmp_path: Path) -> None:
    vision = SAVED["clip"][1] | SIZES
    text = {**SIZES, "intermediate_size": 48, "vocab_size": 50, "max_position_embeddings": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, device="cpu")
    assert [tap.name for tap in backbone.taps()][-1] == "layer.1"
    assert extract(backbone, torch.rand(3, 28, 28))["layer.1"].shape[1] == 24


def test_other_models_of_transformers_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BackboneError, match="is a bert of transformers; of those that can be tapped there are dinov2"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": "many"}))
    with pytest.raises(BackboneError):
        load_backbone(tmp_path)


@pytest.mark.parametrize("registers", [0, 2])
def test_a_file_of_dinov2_needs_nothing_beside_it(registers: int, tmp_path: Path) -> None:
    from diffrep.backbones.vit_loading import dinov2_backbone

    arguments = {
        "img_size": 56,
        "patch_size": 14,
        "embed_dim": 128,
        "depth": 2,
        "num_heads": 2,
        "reg_tokens": registers,
    }
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_base_patch14_dinov2", **arguments, no_embed_class=bool(registers), num_classes=0, init_values=1.0
    )
    published = {key.replace("reg_token", "register_tokens"): v for key, v in network.state_dict().items()}
    published["mask_token"] = torch.zeros(1, 128)
    if registers:  # the published table has a place for the class token
        published["pos_embed"] = torch.cat([torch.zeros(1, 1, 128), published["pos_embed"]], dim=1)
    torch.save(published, tmp_path / "dinov2_vitb14_pretrain.pth")
    backbone = load_backbone(tmp_path / "dinov2_vitb14_pretrain.pth", device="cpu")
    config = {**arguments, "num_register_tokens": registers}
    config |= {"interpolate_antialias": bool(registers), "interpolate_offset": 0.0 if registers else 0.1}
    expected = dinov2_backbone(published, config, name="expected", source="")
    pixels = torch.rand(1, 3, 70, 84)
    assert isinstance(backbone, VisionTransformer)
    assert torch.equal(backbone.tokens(pixels, ["layer.1"])["layer.1"], expected.tokens(pixels, ["layer.1"])["layer.1"])


@pytest.mark.parametrize("biased", [False, True])
def test_a_file_of_dinov3_needs_nothing_beside_it(
    biased: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_base_patch16_dinov3", embed_dim=128, depth=2, num_heads=2, num_classes=0, qkv_bias=biased
    ).eval()
    if biased:
        for block in network.blocks:
            torch.nn.init.normal_(block.attn.q_bias)
            torch.nn.init.normal_(block.attn.v_bias)
    published = {}
    for key, value in network.state_dict().items():
        if key.endswith(("q_bias", "v_bias", "k_bias")):
            continue
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens")
        published[key] = value
    for i, block in enumerate(network.blocks):
        parts = [block.attn.q_bias, torch.ones(128), block.attn.v_bias] if biased else [torch.zeros(128)] * 3
        published[f"blocks.{i}.attn.qkv.bias"] = torch.cat([p.detach() for p in parts])
        published[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(384)
    published |= {"mask_token": torch.zeros(1, 128), "rope_embed.periods": torch.ones(16)}
    torch.save(published, tmp_path / "dinov3.pth")
    backbone = load_backbone(tmp_path / "dinov3.pth", device="cpu")
    expected = VisionTransformer(network)
    pixels = torch.rand(1, 3, 64, 48)
    assert isinstance(backbone, VisionTransformer)
    assert torch.equal(backbone.tokens(pixels, ["layer.1"])["layer.1"], expected.tokens(pixels, ["layer.1"])["layer.1"])
    assert not capsys.readouterr().out


def test_a_bare_file_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, dynamic_img_size=True).eval()
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    backbone = load_backbone(tmp_path / "mine.safetensors", device="cpu")
    expected = VisionTransformer(network, mean=(0.5,) * 3, std=(0.5,) * 3)  # as most of timm's own were trained
    pixels = torch.rand(1, 3, 64, 48)
    assert isinstance(backbone, VisionTransformer)
    assert torch.equal(backbone.tokens(pixels, ["layer.1"])["layer.1"], expected.tokens(pixels, ["layer.1"])["layer.1"])
    odd = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3, num_classes=0)
    save_file(odd.state_dict(), tmp_path / "odd.safetensors")
    with pytest.raises(BackboneError, match="attention heads of a ViT with 24 channels is not known"):
        load_backbone(tmp_path / "odd.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("mae_pretrain.pth", lambda w: {"model": w}),
        ("mae_full.pth", lambda w: {"model": w | {"decoder_embed.weight": torch.ones(2), "mask_token": torch.ones(1)}}),
        ("deit.pth", lambda w: {"model": w, "args": argparse.Namespace(epochs=3)}),
        ("moco.pth", lambda w: {"state_dict": {f"module.{key}": value for key, value in w.items()}}),
        ("dino.pth", lambda w: {"teacher": {f"backbone.{k}": v for k, v in w.items()} | {"head.mlp": torch.ones(1)}}),
    ],
)
def test_files_of_training_programs(name: str, wrap: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3, dynamic_img_size=True).eval()
    torch.save(wrap(dict(network.state_dict())), tmp_path / name)
    backbone = load_backbone(tmp_path / name, device="cpu")
    assert isinstance(backbone, VisionTransformer)
    pixels = torch.rand(1, 3, 224, 224)
    mean, std = torch.tensor(IMAGENET)[..., None, None]
    with torch.no_grad():
        tokens = network.forward_intermediates((pixels - mean) / std, output_fmt="NLC", return_prefix_tokens=True)[1]
    ours = backbone.tokens(pixels, ["layer.1"])["layer.1"]
    torch.testing.assert_close(ours, torch.cat([tokens[1][1], tokens[1][0]], 1), atol=1e-5, rtol=1e-5)


def test_pickles_alone_and_programs_are_named(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for layout, config in (("transformers", {"model_type": "dinov2"}), ("timm", {"architecture": "vit_tiny"})):
        (tmp_path / layout).mkdir()
        (tmp_path / layout / "config.json").write_text(json.dumps(config))
        torch.save({"a": torch.zeros(1)}, tmp_path / layout / "pytorch_model.bin")
        with pytest.raises(BackboneError, match=r"it has pytorch_model.bin alone, a pickle, .* as safetensors"):
            load_backbone(tmp_path / layout, device="cpu")
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "ViT-B-32.pt"))
    recwarn.clear()
    with pytest.raises(BackboneError, match=r"is a program \(TorchScript\) .* open_clip:ViT-B-32/openai"):
        load_backbone(tmp_path / "ViT-B-32.pt", device="cpu")
    assert not recwarn.list


def test_a_revision_is_used_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dinov2-base", "timm:vit_tiny_patch16_224", "open_clip:ViT-B-32/openai"):
        with pytest.raises(BackboneError, match="goes by a name, to which a revision does not belong"):
            load_backbone(name, revision="v1", device="cpu")
    config = transformers.Dinov2Config(**SIZES, image_size=28, patch_size=14)
    hub, commits = tmp_path / "models--someone--vit", ("0" * 40, "1" * 40)
    for commit, seed in zip(commits, (0, 1), strict=True):
        torch.manual_seed(seed)
        transformers.Dinov2Model(config).save_pretrained(hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    for reference, commit in zip(("main", "v1"), commits, strict=True):
        (hub / "refs" / reference).write_text(commit)
    for constant in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{constant}", str(tmp_path), raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    pixels = torch.rand(1, 3, 28, 28)
    found = [
        load_backbone("someone/vit", revision=r, device="cpu").maps(pixels, ["layer.1"])["layer.1"]
        for r in ("main", "v1")
    ]
    plain = [
        load_backbone(hub / "snapshots" / commit, device="cpu").maps(pixels, ["layer.1"])["layer.1"]
        for commit in commits
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert not torch.equal(*found)
