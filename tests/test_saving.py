"""`save_pretrained` of diffusion backbones: folders that load again, with equal features."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file

from diffrep.backbones import BackboneError, Conditions, VisionTransformer, load_backbone
from diffrep.backbones.repositories import MODELS
from diffrep.heads.loading import load_head
from diffrep.heads.probes import Cell, DenseProbe, FeatureHead, Layout, Probe, load_probe
from diffrep.settings import ExtractConfig
from diffrep.store import provenance
from diffrep.synthesis import load_synthesis
from diffrep.synthesis.model import SynthesisModel

from . import layouts
from .test_saved_vits import SAVED, SIZES

PIXELS = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["sd1.5", "sdxl", "sd3"])
def test_a_saved_backbone_loads_again_with_equal_features(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(layouts.build(kind, tmp_path / kind))
    backbone.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()  # it would make a ViT of it
    again = type(backbone).from_pretrained(tmp_path / "saved")
    assert again.recommended == backbone.recommended
    taps, conditions = backbone.recommended.taps, Conditions(timestep=200, prompt="a cat")
    for tap, value in backbone.maps(PIXELS, taps, conditions).items():
        assert torch.equal(again.maps(PIXELS, taps, conditions)[tap], value)


def test_push_to_hub_uploads_the_folder_that_loads_again(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeApi:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, *, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            assert private
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: object) -> str:
            shutil.copytree(folder_path, tmp_path / "hub")
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    backbone = load_backbone(sd_folder)
    assert backbone.push_to_hub("mine", private=True, token="secret") == "https://huggingface.co/me/mine"
    again, weights = load_backbone(tmp_path / "hub").state_dict(), backbone.state_dict()
    assert all(torch.equal(again[key], value) for key, value in weights.items())
    assert str(sd_folder) not in "".join(file.read_text() for file in (tmp_path / "hub").rglob("*.json"))


def test_a_lora_is_saved_with_the_weights(sd_folder: Path, tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.ones(4, 32), torch.ones(32, 4)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "style.safetensors")
    styled = load_backbone(sd_folder, lora=tmp_path / "style.safetensors")
    styled.save_pretrained(tmp_path / "saved")
    saved, weights = load_backbone(tmp_path / "saved").state_dict(), styled.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())


@pytest.mark.parametrize("kind", ["timm", "tiny-dino", "dinov2", "clip", "siglip"])
def test_a_saved_vision_transformer_loads_again_with_equal_features(
    kind: str, vit_folder: Path, tmp_path: Path
) -> None:
    if kind in SAVED:
        name, sizes, _ = SAVED[kind]
        torch.manual_seed(0)
        transformers.AutoModel.from_config(getattr(transformers, name)(**SIZES, **sizes)).save_pretrained(
            tmp_path / "a"
        )
    vit = load_backbone({"timm": vit_folder, "tiny-dino": "tiny-dino"}.get(kind, tmp_path / "a"), device="cpu")
    assert isinstance(vit, VisionTransformer)
    vit.save_pretrained(tmp_path / "saved")
    again = VisionTransformer.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.recommended == vit.recommended
    pixels = torch.rand(2, 3, 2 * vit.patch, 3 * vit.patch)
    for tap, value in vit.maps(pixels, ["layer.1", "layer.1.key"]).items():
        assert torch.equal(again.maps(pixels, ["layer.1", "layer.1.key"])[tap], value)


def test_a_painter_goes_out_and_comes_back(tmp_path: Path) -> None:
    painter = load_synthesis("tiny-synthesis")
    painter.save_pretrained(tmp_path / "painter")
    again = SynthesisModel.from_pretrained(tmp_path / "painter")
    assert again.checksum() == painter.checksum() == load_synthesis(tmp_path / "painter").checksum()
    assert (again.about.encoder, again.about.autoencoder) == (painter.about.encoder, None)
    painter.save_pretrained(tmp_path / "painter")  # once more, over it
    with pytest.raises(ValueError, match="no such folder"):
        SynthesisModel.from_pretrained(tmp_path / "gone")


def test_a_probe_goes_out_and_comes_back(tmp_path: Path) -> None:
    vit = load_backbone("tiny-dino")
    layout = Layout(kind="linear", cells=(Cell("tiny-dino", 0, "layer.4", 1),), channels=(192,), classes=2)
    features = {"tiny-dino": provenance(vit, ExtractConfig(taps=("layer.4",), sizing=vit.recommended.sizing))}
    probe = Probe(layout=layout, classes=("a", "b"), features=features, network=FeatureHead(layout))
    probe.save_pretrained(tmp_path / "probe")
    for again in (Probe.from_pretrained(tmp_path / "probe"), load_probe(tmp_path / "probe")):
        assert repr(again) == repr(probe)
        for key, value in probe.network.state_dict().items():
            assert torch.equal(again.network.state_dict()[key], value)
    probe.save_pretrained(tmp_path / "probe")
    with pytest.raises(ValueError, match="is a Probe, no DenseProbe"):
        DenseProbe.from_pretrained(tmp_path / "probe")


@pytest.mark.parametrize("name", ["tiny-normals", "tiny-segmentation", "tiny-restore"])
def test_a_head_goes_out_and_comes_back(name: str, tmp_path: Path) -> None:
    head = load_head(name)
    head.save_pretrained(tmp_path / "head")
    again, weights = type(head).from_pretrained(tmp_path / "head"), head.state_dict()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in weights.items())
    written = "".join(file.read_text() for file in (tmp_path / "head").rglob("*.json"))
    assert str(MODELS) not in written  # the paths of this machine stay here


def test_what_cannot_be_saved_says_so(vit_folder: Path, tmp_path: Path) -> None:
    vit = load_backbone(vit_folder)
    assert isinstance(vit, VisionTransformer)
    vit.record = None  # as of a tower of open_clip
    with pytest.raises(BackboneError, match="a VisionTransformer cannot be saved"):
        vit.save_pretrained(tmp_path / "vit")
