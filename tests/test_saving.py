"""`save_pretrained` of diffusion backbones: folders that load again, with equal features."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from diffrep.backbones import BackboneError, Conditions, VisionTransformer, load_backbone

from . import layouts

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


def test_what_cannot_be_saved_says_so(vit_folder: Path, tmp_path: Path) -> None:
    vit = load_backbone(vit_folder)
    assert isinstance(vit, VisionTransformer)
    with pytest.raises(BackboneError, match="a VisionTransformer cannot be saved"):
        vit.save_pretrained(tmp_path / "vit")
