"""SiT in the published key names: features and samples are those of a plain implementation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep import load_backbone, sample
from diffrep.backbones import BackboneError
from diffrep.backbones.base import Conditions
from diffrep.cli import main
from diffrep.painting import diffusion_model

from . import layouts

WIDTH, DEPTH, HEADS, SIDE, PATCH, CLASSES = 24, 2, 3, 8, 2, 5


def published_weights() -> dict[str, Tensor]:
    """Random ones under the names and shapes of a published file."""
    generator, w = torch.Generator().manual_seed(0), WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (w, 4, PATCH, PATCH), "t_embedder.mlp.0": (w, 256), "t_embedder.mlp.2": (w, w),
        "final_layer.linear": (PATCH**2 * 8, w), "final_layer.adaLN_modulation.1": (2 * w, w),
    }  # fmt: skip
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * w, w), f"blocks.{i}.attn.proj": (w, w), f"blocks.{i}.mlp.fc1": (4 * w, w),
            f"blocks.{i}.mlp.fc2": (w, 4 * w), f"blocks.{i}.adaLN_modulation.1": (6 * w, w),
        }  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) / 6 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0], generator=generator) / 6 for name, shape in shapes.items()}
    weights["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, w, generator=generator)
    weights["pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2, w, generator=generator)
    return weights


def plain(weights: dict[str, Tensor], x: Tensor, t: float, label: int) -> tuple[Tensor, list[Tensor]]:
    """SiT written out: its velocity (data minus noise), and the tokens behind each block."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def shifted(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    angles = t * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))))
    c = F.silu(time + weights["y_embedder.embedding_table.weight"][label])
    patches = F.conv2d(x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=PATCH)
    h, tokens = patches.flatten(2).mT + weights["pos_embed"], []
    for i in range(DEPTH):
        a, b, gate, d, e, other = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6)
        q, k, v = linear(f"blocks.{i}.attn.qkv", shifted(h, a, b)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        h = h + gate * linear(f"blocks.{i}.attn.proj", attention.transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"blocks.{i}.mlp.fc1", shifted(h, d, e)), approximate="tanh")
        h = h + other * linear(f"blocks.{i}.mlp.fc2", inner)
        tokens.append(h)
    out = linear("final_layer.linear", shifted(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2)))
    side = SIDE // PATCH
    image = out.view(len(x), side, side, PATCH, PATCH, 8).permute(0, 5, 1, 3, 2, 4).reshape(len(x), 8, SIDE, SIDE)
    return image[:, :4], tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sit")
    layouts.build("sd1.5", path / "sd")
    (path / "sd" / "vae").rename(path / "vae")
    torch.save({"ema": {}, "model": published_weights()}, path / "SiT-S-2.pt")
    write(path)
    return path


def write(path: Path, **changed: Any) -> None:
    config = {"path_type": "Linear", "prediction": "velocity", "num_heads": HEADS, **changed}
    (path / "config.json").write_text(json.dumps(config))


def test_a_published_file_is_sampled_as_a_plain_sit_is(folder: Path) -> None:
    weights, x = published_weights(), torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    painted = sample(folder, 3, sampler="euler", steps=6, guidance=1.0, start=x)
    expected = x
    for step in range(6):  # from noise at t = 0 to data at t = 1
        expected = expected + plain(weights, expected, step / 6, 3)[0] / 6
    torch.testing.assert_close(painted.latents, expected, atol=1e-4, rtol=1e-4)
    guided = sample(folder, 3, sampler="euler", steps=1, guidance=2.5, start=x)
    away, towards = (plain(weights, x, 0.0, label)[0] for label in (CLASSES, 3))
    torch.testing.assert_close(guided.latents, x + away + 2.5 * (towards - away), atol=1e-4, rtol=1e-4)
    noisy = sample(folder, 3, sampler="sit-sde", steps=6, guidance=1.0, start=x)
    assert torch.isfinite(noisy.latents).all()
    assert (noisy.latents - painted.latents).abs().max() > 0.1


def test_features_are_those_of_a_plain_sit(folder: Path) -> None:
    backbone: Any = load_backbone(folder)
    noisy = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    maps = backbone.network_maps(noisy, ["block.0", "block.1"], Conditions(timestep=300, label=2))
    _, tokens = plain(published_weights(), noisy, 0.7, 2)
    for i in range(DEPTH):
        torch.testing.assert_close(maps[f"block.{i}"].flatten(2).mT, tokens[i], atol=1e-4, rtol=1e-4)
    share = backbone.add_noise(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 250)
    torch.testing.assert_close(share, torch.full((1, 4, 2, 2), 0.75))


def test_another_sit_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for changed, message in (
        ({"path_type": "GVP"}, "of the path 'GVP'"),
        ({"prediction": "score"}, "predicts 'score'"),
        ({"num_heads": None}, "needs num_heads in config.json"),
    ):
        write(folder, **changed)
        with pytest.raises(BackboneError, match=message):
            load_backbone(folder)
    write(folder)
    model = diffusion_model(folder, 1, guidance=1.0)
    assert model.prediction == "flow_prediction"
    line = ["sample", "--model", str(folder), "--label", "1", "--sampler", "ghvb", "-o", str(tmp_path / "a.png")]
    assert main(line) == 2
    assert "ghvb does not work on rectified flows" in capsys.readouterr().err
