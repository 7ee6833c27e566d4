"""What runs on a GPU gives what the CPU gives: in float32 within 1e-3 of the largest value, in bfloat16 in a bound.

The cases are in `device_cases.py`. ``DIFFREP_TEST_DEVICE=cpu`` runs them on the CPU twice, which tests the tests.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import diffrep
from diffrep.backbones import Conditions, load_backbone
from diffrep.graphs import Graphs, without_graphs

from .device_cases import CASES, Place, images, pixels, share_data
from .one_step_heads import random_head

DEVICE = os.environ.get("DIFFREP_TEST_DEVICE", "cuda")
there = torch.cuda.is_available() or not DEVICE.startswith("cuda")
on_device = [pytest.mark.gpu, pytest.mark.skipif(not there, reason="needs a CUDA device")]
cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BFLOAT16 = 0.03  # of the largest value, root mean square: 8 bits, rounded after each of some hundred layers
ELSEWHERE = {  # what takes a device and has no case, and why
    "index.stored.IndexConfig": "its device is FAISS's: it needs faiss-gpu, and trains what is on the CPU",
    "eval.joint.evaluate_joint": "trains by `train_head`, which has cases",
    "store.extraction.ShardActor.__init__": "lives in Ray's processes; makes what `extract_store` makes",
}


@pytest.fixture(autouse=True)
def _plain_float32() -> Iterator[None]:
    """cuDNN rounds the factors of float32 convolutions to TF32 unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return share_data(tmp_path_factory.mktemp("shared"))


RUNS = [(name, torch.float32) for name in CASES] + [(name, torch.bfloat16) for name in CASES if CASES[name].half]


@pytest.mark.parametrize("device", [pytest.param(DEVICE, marks=on_device)])
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=lambda value: str(value).removeprefix("torch."))
def test_a_device_gives_what_the_cpu_gives(
    name: str, dtype: torch.dtype, device: str, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "device").mkdir()
    case = CASES[name]
    expected = case.run(Place("cpu", torch.float32, tmp_path / "cpu", shared))
    results = case.run(Place(device, dtype, tmp_path / "device", shared))
    assert len(results) == len(expected)
    for number, (got, value) in enumerate(zip(results, expected, strict=True)):
        assert torch.isfinite(value).all()
        apart = (got.detach().double().cpu() - value.detach().double()).abs()
        distance = float(apart.max() if dtype == torch.float32 else apart.square().mean().sqrt())
        share = distance / max(float(value.abs().max()), 1e-30)
        assert share <= (case.bound if dtype == torch.float32 else BFLOAT16), f"result {number}: {share:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "training" not in name])  # which have tests of their own
def test_a_case_runs_on_the_cpu(name: str, shared: Path, tmp_path: Path) -> None:
    """Cases that are compared on a card alone would go stale unseen where there is none."""
    results = CASES[name].run(Place("cpu", torch.float32, tmp_path, shared))
    assert results
    assert all(torch.isfinite(result).all() for result in results)


# -- every device has a case ----------------------------------------------------------------------------------------


def takes_a_device(source: str) -> Iterator[str]:
    """Public functions, methods and option classes of a module that take the name of a device, or move."""

    def named(annotation: ast.expr | None) -> bool:
        text = "" if annotation is None else ast.unparse(annotation)
        return text == "Any" or any(word in text.replace('"', "'").split() or word in text for word in ("str", "'cpu'"))

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
                if any(f.target.id == "device" and named(f.annotation) for f in fields):  # type: ignore[union-attr]
                    yield prefix + node.name
                yield from visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
                parameters = node.args.args + node.args.kwonlyargs
                if node.name == "to" or any(p.arg == "device" and named(p.annotation) for p in parameters):
                    yield prefix + node.name
            elif isinstance(node, ast.FunctionDef) and node.name == "_apply" and "super()._apply" in ast.unparse(node):
                yield f"{prefix}to"  # of a module that moves more than its parameters

    yield from visit(ast.parse(source).body, "")


def test_every_device_has_a_case() -> None:
    """Whoever adds a call that takes a device adds a case here; what a command line takes is not looked at."""
    root = Path(diffrep.__file__).parents[1]
    public = set()
    for folder, package in (("diffrep", ""), ("heads", "heads."), ("eval", "eval.")):
        for file in (root / folder).rglob("*.py"):
            place = file.relative_to(root / folder).with_suffix("")
            if not {"commands", "benchmarks"} & set(place.parts):
                module = ".".join(part for part in place.parts if part != "__init__")
                public |= {f"{package}{module}.{name}" for name in takes_a_device(file.read_text())}
    covered = {name for case in CASES.values() for name in case.covers} | set(ELSEWHERE)
    assert sorted(public - covered) == []
    assert sorted(covered - public - {"painting.DiffusionModel"}) == []
    assert len(public) > 30


# -- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=on_device)])
@pytest.mark.parametrize("name", ["tiny", "tiny-dino"])
def test_a_batch_gives_what_its_images_give(name: str, device: str) -> None:
    backbone = load_backbone(name, device=device, dtype=torch.float32)
    taps = backbone.recommended.taps
    together = backbone.maps(pixels(3), taps, backbone.recommended.conditions)
    for number, image in enumerate(pixels(3)):
        for tap, single in backbone.maps(image[None], taps, backbone.recommended.conditions).items():
            torch.testing.assert_close(single[0], together[tap][number], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=on_device)])
@pytest.mark.parametrize("name", ["tiny-depth", "tiny-normals", "tiny-segmentation"])
def test_a_head_gives_images_of_a_batch_what_it_gives_each(name: str, device: str) -> None:
    head = diffrep.load_head(name, device=device, dtype=torch.float32)
    for one, image in zip(head(images(3)), images(3), strict=True):
        (alone,) = head([image])
        part = one.MAIN
        torch.testing.assert_close(getattr(one, part), getattr(alone, part), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=on_device)])
def test_a_sample_does_not_depend_on_its_batch(device: str) -> None:
    prompts, options = ["a cat", "a red cup", "a chair"], {"steps": 2, "size": (32, 32), "device": device}
    together = diffrep.sample("tiny", prompts, batch_size=3, **options).latents  # type: ignore[arg-type]
    alone = diffrep.sample("tiny", prompts, batch_size=1, **options).latents  # type: ignore[arg-type]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


# -- what only CUDA has ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_calls_repeat_the_plain_ones(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    backbone = load_backbone("tiny", device=device, dtype=dtype)
    machine = diffrep.load_head(random_head(tmp_path / "head"), device=device, dtype=dtype)
    for timestep in (261, 101):
        conditions = Conditions(timestep=timestep, posterior="sample")
        with without_graphs():
            plain, depth = backbone.maps(pixels(), ["up.1"], conditions)["up.1"], machine(images())
        for turn in range(4):
            again = backbone.maps(pixels(), ["up.1"], conditions)["up.1"]
            torch.testing.assert_close(again, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))
            assert again.is_contiguous()
            for one, other in zip(machine(images()), depth, strict=True):
                torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-5, msg=f"turn {turn}")
    assert sum(bool(call) for _, call in backbone.graphs._calls.values()) == 1  # for both timesteps


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
@torch.no_grad()
def test_what_cannot_be_recorded_leaves_the_rest_alone(device: str, caplog: pytest.LogCaptureFixture) -> None:
    graphs, x = Graphs(torch.nn.Linear(2, 2).to(device)), torch.ones(2, device=device)
    for _ in range(3):
        assert graphs("reads", lambda t: t * t.sum().item(), x).tolist() == [2, 2]
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert "cannot be recorded" in caplog.text
    for turn in range(4):
        assert graphs("doubles", lambda t: 2 * t, (x + turn)[:1].expand(3)).tolist() == [2 + 2 * turn] * 3
    assert [bool(call) for _, call in graphs._calls.values()] == [False, True]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
def test_a_hook_that_somebody_set_is_called_each_time(device: str) -> None:
    backbone, calls = load_backbone("tiny", device=device), []
    handle = backbone.network.conv_in.register_forward_hook(lambda m, i, o: calls.append(1))
    for _ in range(4):
        backbone.maps(pixels(), ["mid"], Conditions())
    handle.remove()
    assert len(calls) == 4


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_fused_norm_is_nearer_to_float64_than_the_plain_one(device: str, dtype: torch.dtype) -> None:
    from diffrep.backbones.norm_kernels import group_norm

    generator = torch.Generator().manual_seed(0)
    for batch, channels, height, width in ((2, 64, 9, 7), (1, 320, 24, 31), (3, 2560, 6, 6), (1, 128, 300, 257)):
        x = (torch.randn(batch, channels, height, width, generator=generator) * 2 + 5).to(device, dtype)
        weight, bias = (torch.randn(channels, generator=generator).to(device, dtype) for _ in range(2))
        added = torch.randn(batch, channels, generator=generator).to(device, dtype)
        shifted = x.double() + added.double()[:, :, None, None]
        exact = torch.nn.functional.group_norm(shifted, 32, weight.double(), bias.double(), 1e-5)
        exact = torch.nn.functional.silu(exact)
        plain = torch.nn.functional.group_norm(x + added[:, :, None, None], 32, weight, bias, 1e-5)
        plain = torch.nn.functional.silu(plain).double()
        ours = group_norm(x, 32, weight, bias, 1e-5, added=added, silu=True).double()
        assert float((ours - exact).abs().max()) <= 1.5 * float((plain - exact).abs().max()) + 1e-6
