"""The door for peers' checkouts, tried with stand-ins of the same entry points, written here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffrep.eval.benchmarks.__main__ import main
from diffrep.eval.benchmarks.peer import PeerBenchmark, importing_from

from .one_step_heads import random_head

HEATGEO = """
from sklearn.manifold import Isomap
class HeatGeo:
    def __init__(self, knn):
        self.knn = knn
    def fit_transform(self, points):
        return Isomap(n_neighbors=self.knn + 5).fit_transform(points)
"""
DIFT = """
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
class SDFeaturizer:
    def __init__(self, sd_id):
        self.unet = UNet2DConditionModel.from_pretrained(sd_id, subfolder='unet').eval()
        self.vae = AutoencoderKL.from_pretrained(sd_id, subfolder='vae').eval()
    @torch.no_grad()
    def forward(self, img_tensor, prompt, t, up_ft_index, ensemble_size):
        images = img_tensor[None].repeat(ensemble_size, 1, 1, 1)
        latents = self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor
        maps = []
        block = self.unet.up_blocks[up_ft_index]
        handle = block.register_forward_hook(lambda m, i, o: maps.append(o))
        self.unet(0.9 * latents, t, encoder_hidden_states=torch.zeros(ensemble_size, 2, 16))
        handle.remove()
        return maps[0].mean(0, keepdim=True)
"""
LOTUS = """
from types import SimpleNamespace
import numpy as np
from diffrep.heads.loading import load_head
class LotusDPipeline:
    @classmethod
    def from_pretrained(cls, folder):
        made = cls()
        made.head = load_head(folder)
        return made
    def to(self, device):
        return self
    def __call__(self, rgb_in, prompt, num_inference_steps, timesteps, output_type, task_emb):
        assert task_emb.shape == (1, 4) and timesteps == [999]
        image = ((rgb_in[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        values = self.head(image, size=0, official=True).values.numpy()
        return SimpleNamespace(images=[np.repeat(values[..., None], 3, axis=-1)])
"""


def checkout(folder: Path, file: str, code: str) -> Path:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(code)
    return folder


def test_heatgeo_is_timed_against_both_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = checkout(tmp_path / "HeatGeo", "heatgeo/embedding.py", HEATGEO)
    rows = PeerBenchmark(peer=peer, sizes=(120,), repeats=1).run()
    assert [row.claim for row in rows] == [
        f"HeatGeo, 120 points, against preset {preset!r}" for preset in ("heat-geodesic", "reference")
    ]
    assert all("Spearman with the truth 0." in row.equality for row in rows)
    assert "HeatGeo, 120 points" in capsys.readouterr().out
    assert not [name for name in sys.modules if name.startswith("heatgeo")]
    assert str(peer) not in sys.path
    assert sorted(file.name for file in peer.rglob("*")) == ["embedding.py", "heatgeo"]


def test_dift_and_lotus_load_the_same_weights(sd_folder: Path, tmp_path: Path) -> None:
    dift = checkout(tmp_path / "dift", "src/models/dift_sd.py", DIFT)
    (row,) = PeerBenchmark(peer=dift, model=str(sd_folder), side=64, ensemble=2, repeats=1).run()
    assert "ensemble of 2, 64 px" in row.claim
    assert float(row.equality.rpartition(" ")[2]) > 0.1
    lotus = checkout(tmp_path / "lotus", "pipeline.py", LOTUS)
    (row,) = PeerBenchmark(peer=lotus, model=str(random_head(tmp_path / "head")), side=64, repeats=1).run()
    assert float(row.equality.rpartition(" ")[2]) < 1e-3


def test_other_folders_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, says in (
        (tmp_path, "is no checkout of a known peer"),
        (tmp_path / "gone", "is no checkout of a known peer"),
        (checkout(tmp_path / "sd-dino", "extractor_sd.py", ""), "needs ODISE"),
        (checkout(tmp_path / "lotus", "pipeline.py", LOTUS), "--model FOLDER"),
        (checkout(tmp_path / "broken", "heatgeo/embedding.py", "import nothing_of_that_name"), "ModuleNotFoundError"),
    ):
        assert main(["peer", "--peer", str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert says in line


def test_modules_of_a_checkout_are_forgotten(tmp_path: Path) -> None:
    checkout(tmp_path, "a_peers_module.py", "value = 3")
    with importing_from(tmp_path):
        import a_peers_module  # type: ignore[import-not-found]

        assert a_peers_module.value == 3
    assert "a_peers_module" not in sys.modules
