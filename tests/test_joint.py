"""One U-Net for several maps beside one for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffrep.backbones.pipelines import load_parts
from diffrep.cli import main
from diffrep.eval.joint import TARGETS, JointTraining, joint_maps, score
from diffrep.scenes import render_scene, scene_seed


def test_a_joint_network_begins_as_three_of_its_base() -> None:
    one, three = (
        JointTraining(targets=targets).build(load_parts("tiny", pad=False)) for targets in (("mask",), tuple(TARGETS))
    )
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = load_parts("tiny", pad=False).vae.eval()
    alone, together = (
        joint_maps(one.eval(), vae, pixels, ("mask",)),
        joint_maps(three.eval(), vae, pixels, tuple(TARGETS)),
    )
    assert {name: maps.shape[1] for name, maps in together.items()} == {"disparity": 1, "normals": 3, "mask": 1}
    for name in ("disparity", "mask"):
        assert torch.allclose(together[name], alone["mask"], atol=1e-4)


def test_scores_of_the_truth() -> None:
    scene = render_scene(scene_seed("test", 3), category="car", size=64)
    normals = torch.from_numpy(scene.normals).permute(2, 0, 1) * torch.tensor([-1.0, -1.0, -1.0]).view(3, 1, 1)
    assert score("mask", torch.from_numpy(scene.mask)[None].float(), scene) == pytest.approx(1)
    assert score("normals", normals, scene) < 0.5
    assert score("disparity", 1 / torch.from_numpy(scene.depth)[None].float(), scene) < 0.01


@pytest.mark.slow
def test_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["eval", "joint", "--count", "16", "--steps", "2", "--batch-size", "4", "--held-out", "3", "--device", "cpu"]
    assert main([*call, "--work", str(tmp_path / "work"), "-o", str(tmp_path / "joint.json")]) == 0
    assert "One U-Net for all three together" in capsys.readouterr().out
    (rows,) = json.loads((tmp_path / "joint.json").read_text())["means"].values()
    assert set(rows) == {f"{target}: {measure}" for target, measure in TARGETS.items()}
    mask = rows["mask: max F"]
    assert mask["difference"][0] == pytest.approx(mask["together"][0] - mask["alone"][0])
