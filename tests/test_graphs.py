"""Recorded calls: what is recorded, what is not, and that a replay is the call. The recording itself is a fake here."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffrep
from diffrep import similarity
from diffrep.backbones import Conditions, load_backbone
from diffrep.features import Descriptors, Rows
from diffrep.graphs import LIMIT, Graphs, _Recorded, _side_stream, without_graphs
from diffrep.matching import match_dense, match_points
from diffrep.settings import FreeU, MatchConfig

from .replays import Replayed

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
def test_recordings_that_are_in_use_are_not_given_up(graphs: Everywhere) -> None:
    """More shapes than recordings, in turns: all would be recorded again and again, which costs more than it saves."""
    shapes = [torch.ones(size, 2) for size in range(1, LIMIT + 8)]
    for _ in range(4):
        for x in shapes:
            graphs("same", lambda t: t, x)
    assert [rows for rows, _ in RECORDED] == list(range(1, LIMIT + 1))
    for _ in range(4 * LIMIT - len(shapes) + 1):  # and then only one more
        graphs("same", lambda t: t, shapes[-1])
    assert RECORDED[LIMIT:] == []
    graphs("same", lambda t: t, shapes[-1])
    assert RECORDED[LIMIT:] == [(LIMIT + 7, 2)]  # in place of the one that has not come for the longest time
    assert sum(bool(call) for _, call in graphs._calls.values()) == LIMIT


@torch.no_grad()
def test_a_call_that_came_first_can_be_recorded_last(graphs: Everywhere) -> None:
    x = torch.ones(1, 2)
    graphs("first", lambda t: t, x)
    for size in range(2, LIMIT + 1):
        for _ in range(2):
            graphs("same", lambda t: t, torch.ones(size, 2))
    for _ in range(3):
        assert torch.equal(graphs("first", lambda t: t, x), x)
    assert RECORDED[-1] == (1, 2)


@torch.no_grad()
def test_a_recording_is_of_the_parts_that_were_there() -> None:
    """A part put in place of another (an adapter), weights elsewhere, another mode or rounding: another call."""
    RECORDED.clear()
    network, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(1, 2)
    graphs = Everywhere(network, record=fake)

    def three_calls() -> int:
        before = len(RECORDED)
        for _ in range(3):
            graphs("one", network, x)
        return len(RECORDED) - before

    assert three_calls() == 1
    network[2].weight.data = network[2].weight.data.clone()  # not the first of the weights
    assert three_calls() == 1
    network[1] = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    assert three_calls() == 1
    network.train(False)
    assert three_calls() == 1
    handle = network[1][1].register_forward_hook(lambda *call: None)  # a hook on what was put in
    assert three_calls() == 0
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)  # or on all modules there are
    assert three_calls() == 0
    handle.remove()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert three_calls() == 1
    finally:
        torch.set_float32_matmul_precision(before)
    assert three_calls() == 0


@torch.no_grad()
def test_autocast_and_counters_of_operations_see_every_call(graphs: Everywhere) -> None:
    x, network = torch.ones(1, 2), graphs._modules[0]
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert graphs("rounded", network, x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            graphs("counted", network, x)
        assert counter.get_total_flops() == 8
    assert RECORDED == []


# -- replays on the CPU -------------------------------------------------------------------------------------


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffrep.graphs._Recorded", Replayed)
    monkeypatch.setattr(Graphs, "_on_device", lambda self, inputs: True)
    monkeypatch.setattr(similarity, "_GRAPHS", Graphs(record=Replayed))
    monkeypatch.setattr(Replayed, "recordings", 0)


@torch.no_grad()
def test_the_stand_in_refuses_what_a_recording_does() -> None:
    for function in (lambda t: t * t.sum().item(), lambda t: t[t > 0], lambda t: t + torch.tensor([1.0, 2.0])):
        with pytest.raises(RuntimeError, match="not permitted"):
            Replayed(function, (torch.ones(3, 2),))
    saved: list[Tensor] = []

    def remembers(t: Tensor) -> Tensor:
        saved.append(2 * t)
        return saved[min(len(saved) - 1, 1)] + 1  # memory of the recording itself, read after the next replay

    call = Replayed(remembers, (torch.ones(2),))
    assert call(torch.zeros(2)).tolist() == [1, 1]
    assert saved[1].isnan().all()


NETWORKS: dict[str, Callable[[], Callable[[int], list[Tensor]]]] = {}


def network(make: Callable[[], Callable[[int], list[Tensor]]]) -> Callable[[], Callable[[int], list[Tensor]]]:
    """Something that calls recorded networks: made once, then called with the number of its inputs."""
    NETWORKS[make.__name__] = make
    return make


def drawn(number: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(number))


@network
def features() -> Callable[[int], list[Tensor]]:
    backbone = load_backbone("tiny")

    def run(number: int) -> list[Tensor]:
        pixels, maps = drawn(number, 2, 3, 64, 64), []
        for conditions in (
            Conditions(timestep=261 - number, posterior="sample", ensemble=2),
            Conditions(freeu=FreeU()),
        ):
            maps += backbone.maps(pixels, ["up.1", "mid"], conditions).values()
        context = drawn(number, 1, 5, backbone.network.config.cross_attention_dim).expand(2, -1, -1)
        return [*maps, backbone.predict_noise(drawn(number, 2, 8, 8, 8), 500 - number, context)]

    return run


@network
def tokens() -> Callable[[int], list[Tensor]]:
    backbone = load_backbone("tiny-dino")
    return lambda number: list(backbone.maps(drawn(number, 2, 3, 64, 48), ["layer.2", "layer.3.key"]).values())


@network
def annotations() -> Callable[[int], list[Tensor]]:
    depth, masks = (diffrep.load_head(f"tiny-{task}").model for task in ("depth", "segmentation"))

    @torch.inference_mode()
    def run(number: int) -> list[Tensor]:
        pixels = drawn(number, 2, 3, 64, 64)
        latents = depth.encode(pixels)
        noise = drawn(number, *latents.shape) if depth.family.first_latent == "noise" else None
        mask, edge = masks(pixels, masks.draw((64, 64), number), edges=True)
        return [latents, depth.decode(depth.predict(latents, noise)), mask, edge]

    return run


@network
def paintings() -> Callable[[int], list[Tensor]]:
    model = diffrep.load_synthesis()

    @torch.inference_mode()
    def run(number: int) -> list[Tensor]:
        context = model.context(*(drawn(number, 2, dim) for dim in model.embedder.dims))
        return [
            model(drawn(number, 2, model.channels, 8, 8), t, context) for t in (900.0 - number, torch.tensor([5.0]))
        ]

    return run


@network
def matches() -> Callable[[int], list[Tensor]]:
    def run(number: int) -> list[Tensor]:
        one, two = (Descriptors.from_vectors(drawn(number + shift, 8, 9, 16), (80, 90)) for shift in (0, 100))
        few = match_points(one, two, [[10 + number, 20], [80, 3]], MatchConfig(mutual=True))
        dense = match_dense(one, two, MatchConfig(metric="euclidean", mutual=True))
        return [few.points, few.scores, dense.points, dense.scores, dense.mutual]

    return run


@pytest.mark.usefixtures("replays")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_replay_gives_what_the_call_gives(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """With inputs that differ each time, and memory that others write to in between."""
    run = NETWORKS[name]()
    for number in range(4):
        with without_graphs():
            expected = run(number)
        for result, plain in zip(run(number), expected, strict=True):
            torch.testing.assert_close(
                result.float(), plain.float(), rtol=0, atol=1e-6 * float(plain.float().abs().max())
            )
    assert Replayed.recordings >= 1
    assert "cannot be recorded" not in caplog.text


def test_a_recording_runs_on_a_stream_of_its_device_and_gives_the_old_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's calls by name alone: which stream is current, and that a recording that fails does not keep it."""
    ones, current, recorded = torch.ones(1), ["default"], list[Any]()

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            pass

    @contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        before, current[0] = current[0], chosen.name
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            recorded.append("replayed")

    @contextmanager
    def capture(graph: Graph, *, pool: object, stream: Any, capture_error_mode: str) -> Iterator[None]:
        recorded.append((pool, stream.name, capture_error_mode))
        current[0] = stream.name
        yield  # as PyTorch does: where the body failed, ending the recording fails too, and the stream stays
        current[0] = "default"

    fakes = {
        "Stream": lambda device: Stream(f"side of {device}"), "current_stream": lambda device: Stream(current[0]),
        "stream": stream, "device": lambda device: nullcontext(), "CUDAGraph": Graph, "graph": capture,
        "graph_pool_handle": lambda: "new pool",
    }  # fmt: skip
    for name, fake_call in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake_call)
    monkeypatch.setattr(_Recorded, "_alive", WeakSet())
    _side_stream.cache_clear()
    with torch.no_grad():
        first = _Recorded(lambda t: 2 * t, (ones,))
        second = _Recorded(lambda t: 3 * t, (ones.expand(4, 1),))
        assert recorded == [(pool, "side of cpu", "thread_local") for pool in ("new pool", "pool")]
        assert first(ones).tolist() == [2]
        assert second(ones.expand(4, 1)).shape == (4, 1)
        assert recorded[2:] == ["replayed"] * 2
        calls = Everywhere(nn.Linear(2, 2), record=_Recorded)

        def reads(t: Tensor) -> Tensor:
            if current[0] != "default" and len(recorded) > 4:
                raise RuntimeError("not permitted when stream is capturing")
            return t + 1

        for _ in range(3):
            assert calls("reads", reads, ones).tolist() == [2]
            assert current == ["default"]
        assert len(recorded) == 5
        assert [call for _, call in calls._calls.values()] == [False]
    _side_stream.cache_clear()


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
from diffrep.backbones.norm_kernels import gated_gelu, group_norm, join
torch.manual_seed(0)
for images, channels, height, width, groups, added, silu in (
    (2, 64, 9, 7, 32, True, True), (1, 320, 24, 24, 32, False, True), (3, 96, 5, 5, 32, True, False),
    (1, 128, 200, 180, 32, True, True), (2, 12, 1, 1, 4, True, True), (2, 5, 13, 5, 5, False, False),
    (1, 1, 3, 67, 1, True, True), (2, 1300, 3, 5, 1, True, False), (1, 2600, 9, 8, 2, False, True)):
    for dtype in (torch.float32, torch.float16)[: 1 if height > 100 else 2]:
        x = (torch.randn(images, channels, width, height) * 2 + 30).to(dtype).mT  # neither layout
        weight, bias = torch.randn(2, channels)
        extra = torch.randn(channels, images).mT if added else None
        exact = x.double() if extra is None else x.double() + extra.double()[:, :, None, None]
        exact = torch.nn.functional.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
        exact = torch.nn.functional.silu(exact) if silu else exact
        got = group_norm(x, groups, weight, bias, 1e-5, added=extra, silu=silu)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert got.dtype == dtype
        apart = float((got - exact).abs().max() / exact.abs().max())
        assert apart < (2e-5 if dtype == torch.float32 else 2e-3), (apart, dtype, tuple(x.shape), groups)
for shape in ((2, 7, 5, 3), (1, 3, 1, 1), (1, 1, 31, 67)):  # neither of whole blocks
    x, y, bias = torch.randn(2, *shape).mT.unbind() + (torch.randn(1, shape[1]),)
    torch.testing.assert_close(join(x, y, bias), x + y + bias[:, :, None, None])
for shape in ((3, 5, 2 * 13), (1, 2), (700, 2 * 3)):
    x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    value, gate = x.chunk(2, -1)
    torch.testing.assert_close(gated_gelu(x), value * torch.nn.functional.gelu(gate))
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
