"""Recorded calls: what is recorded, what is not, and that a replay is the call. The recording itself is a fake here."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrep import similarity
from diffrep.features import Rows
from diffrep.graphs import LIMIT, Graphs, without_graphs

RECORDED: list[tuple[int, ...]] = []


def fake(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    RECORDED.append(tuple(inputs[0].shape))
    return lambda *values: function(*values)


class Everywhere(Graphs):
    """Records calls on the CPU too."""

    def _on_device(self, inputs: tuple[Tensor, ...]) -> bool:
        return True


@pytest.fixture
def graphs() -> Everywhere:
    RECORDED.clear()
    return Everywhere(nn.Linear(2, 2), record=fake)


@torch.no_grad()
def test_a_call_is_recorded_when_it_comes_again(graphs: Everywhere) -> None:
    x = torch.ones(1, 2)
    for turn in range(4):
        assert graphs("double", lambda t: 2 * t, x + turn).tolist() == [[2.0 + 2 * turn] * 2]
    assert RECORDED == [(1, 2)]
    graphs("triple", lambda t: 3 * t, x)
    graphs("double", lambda t: 2 * t, torch.ones(5, 2))
    assert RECORDED == [(1, 2)]  # both came once
    graphs.clear()
    graphs("double", lambda t: 2 * t, x)
    assert RECORDED == [(1, 2)]


def test_matching_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = Everywhere(record=fake)
    monkeypatch.setattr(similarity, "_GRAPHS", recordings)
    RECORDED.clear()
    generator = torch.Generator().manual_seed(0)
    sources, targets = (
        Rows(tuple(torch.randn(n, width, generator=generator) for width in (8, 4)), (1.0, 0.5)) for n in (30, 40)
    )
    with without_graphs():
        plain = similarity.nearest(sources, targets, mutual=True)
    assert plain.mutual is not None
    for _ in range(3):
        again = similarity.nearest(sources, targets, mutual=True)
        assert torch.equal(again.indices, plain.indices)
        assert torch.equal(again.scores, plain.scores)
        assert again.mutual is not None
        assert torch.equal(again.mutual, plain.mutual)
    similarity.nearest(sources, Rows(targets.parts, (1.0, 1.0)))  # other weights are another call
    assert RECORDED == [(30, 8)]


@torch.no_grad()
def test_old_recordings_make_room(graphs: Everywhere) -> None:
    for size in range(1, LIMIT + 4):
        for _ in range(2):
            graphs("same", lambda t: t, torch.ones(size, 2))
    assert len(RECORDED) == LIMIT + 3
    assert sum(call is not None for call in graphs._calls.values()) == LIMIT
    graphs("same", lambda t: t, torch.ones(LIMIT + 3, 2))
    assert len(RECORDED) == LIMIT + 3  # the newest is there still


def test_gradients_hooks_and_a_person_prevent_it(graphs: Everywhere) -> None:
    x = torch.ones(1, 2)
    module = graphs._modules[0]
    for _ in range(3):
        graphs("with gradients", lambda t: t, x)
        with torch.no_grad(), without_graphs():
            graphs("switched off", lambda t: t, x)
    with torch.no_grad():
        handle = module.register_forward_hook(lambda *call: None)
        for _ in range(3):
            graphs("hooked", lambda t: t, x)
        handle.remove()
        module.forward = lambda t: t
        for _ in range(3):
            graphs("patched", lambda t: t, x)
        del module.forward
        assert RECORDED == []
        for _ in range(3):
            graphs("hooked", lambda t: t, x)
        module.weight.data = module.weight.data.clone()  # the weights lie elsewhere now: a recording reads the old ones
        graphs("hooked", lambda t: t, x)
    assert RECORDED == [(1, 2)]


@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_it_is(graphs: Everywhere) -> None:
    def refuse(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        RECORDED.append(())
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs._record = refuse
    for _ in range(4):
        assert graphs("stubborn", lambda t: t + 1, torch.zeros(1)).item() == 1
    assert RECORDED == [()]


def test_a_copy_of_a_model_has_recordings_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.graphs = Graphs(model[0])  # type: ignore[assignment]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.graphs, Graphs)
        assert other.graphs._modules == (other[0],)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with PyTorch for CUDA"
)
def test_the_kernels_in_tritons_interpreter() -> None:
    program = """
import torch
from diffrep.backbones.norm_kernels import group_norm
torch.manual_seed(0)
for images, channels, height, width, added, silu in ((2, 64, 9, 7, True, True), (1, 320, 24, 24, False, True),
                                                     (3, 96, 5, 5, True, False), (1, 128, 200, 180, True, True)):
    x = torch.randn(images, channels, height, width) * 2 + 30
    weight, bias = torch.randn(2, channels)
    extra = torch.randn(images, channels) if added else None
    exact = x.double() if extra is None else x.double() + extra.double()[:, :, None, None]
    exact = torch.nn.functional.group_norm(exact, 32, weight.double(), bias.double(), 1e-5)
    exact = torch.nn.functional.silu(exact) if silu else exact
    got = group_norm(x, 32, weight, bias, 1e-5, added=extra, silu=silu)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert float((got - exact).abs().max()) < 5e-5, float((got - exact).abs().max())
print("equal")
"""
    assert interpreted(program) == "equal"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_fused_blocks_give_what_the_plain_ones_give() -> None:
    """Of our own networks, and of diffusers', whose VAE decoder and projections are others."""
    program = """
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffrep.backbones import fused, load_backbone
torch.manual_seed(0)
torch.set_grad_enabled(False)

def check(network, run, least):
    plain, ways = run(), list(fused._fused(network))
    for module, forward in ways:
        module.forward = forward
    ours = run()
    for module, _ in ways:
        del module.forward
    assert len(ways) >= least, (type(network), len(ways))
    apart = float((plain - ours).abs().max() / plain.abs().max())
    assert apart < 1e-5, (type(network), apart)

tiny = load_backbone("tiny")
step, config = torch.tensor([261]), tiny.network.config
x, context = torch.randn(1, config.in_channels, 8, 8), torch.randn(1, 5, config.cross_attention_dim)
check(tiny.network, lambda: tiny.network(x, step, encoder_hidden_states=context).sample, 20)
pixels = torch.rand(1, 3, 32, 32)
check(tiny.vae, lambda: tiny.vae.encode(pixels).latent_dist.mean, 5)
shared = dict(block_out_channels=(32, 64), layers_per_block=1)
for linear in (True, False):
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, use_linear_projection=linear, **shared).eval()
    y, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    check(unet, lambda: unet(y, step, encoder_hidden_states=prompt).sample, 15)
vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                    norm_num_groups=8, **shared).eval()
latents = torch.randn(1, 4, 6, 6)
check(vae, lambda: vae.decode(latents).sample, 10)
print("equal")
"""
    assert interpreted(program) == "equal"


def interpreted(program: str) -> str:
    """What a program prints that runs Triton's kernels on the CPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.strip()
