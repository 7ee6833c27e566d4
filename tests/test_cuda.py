"""What runs on a GPU gives what the CPU gives: in float32 within 1e-3 of the largest value, in bfloat16 in a bound.

Each case is a function of device and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import diffrep
from diffrep.backbones import Conditions, load_backbone
from diffrep.features import Descriptors
from diffrep.fusion import joint_pca
from diffrep.graphs import without_graphs
from diffrep.matching import match_dense, match_points, mutual_matches
from diffrep.settings import MatchConfig
from tests.one_step_heads import random_head

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BFLOAT16 = 0.03  # of the largest value, root mean square: 8 bits, rounded after each of some hundred layers
Case = Callable[[str, torch.dtype], list[Tensor]]


@pytest.fixture(autouse=True)
def _plain_float32() -> Iterator[None]:
    """cuDNN rounds the factors of float32 convolutions to TF32 unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def pixels(count: int = 2, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def images(count: int = 2) -> list[np.ndarray]:
    return [(p.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for p in pixels(count, 96)]


def smooth(device: str, dtype: torch.dtype, shift: float) -> Descriptors:
    places = torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij"), -1) + shift
    generator = torch.Generator().manual_seed(0)
    waves, phases = torch.randn(2, 64, generator=generator) * 0.3, torch.rand(64, generator=generator) * 6
    return Descriptors.from_vectors((places @ waves + phases).cos().to(device, dtype), (320, 384))


def features(name: str, *taps: str, **conditions: object) -> Case:
    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        backbone = load_backbone(name, device=device, dtype=dtype)
        maps = backbone.maps(pixels(), list(taps), Conditions(**conditions))  # type: ignore[arg-type]
        return [maps[tap] for tap in taps]

    return run


def head(name: str, *parts: str, **settings: object) -> Case:
    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        results = diffrep.load_head(name, device=device, dtype=dtype)(images(), **settings)
        return [torch.stack([getattr(result, part) for result in results]) for part in parts]

    return run


def matches(device: str, dtype: torch.dtype) -> list[Tensor]:
    source, target = smooth(device, torch.float32, 0.0), smooth(device, torch.float32, 0.4)
    points = torch.tensor([[30.0, 40.0], [200.5, 111.0], [380.0, 300.0]])
    found: list[Tensor] = []
    for mode in ("cell", "pixel", "soft"):
        one = match_points(source, target, points, MatchConfig(mode=mode, mutual=mode == "cell"))
        found += [one.points, one.scores]
    dense = match_dense(source, target, MatchConfig(mutual=True))
    sources, mutual = mutual_matches(source, target)
    assert dense.mutual is not None
    order = (sources[:, 1] * 1000 + sources[:, 0]).argsort()  # scores that nearly agree may change places
    return [*found, dense.points, dense.scores, dense.mutual.float(), sources[order], mutual.points[order]]


def reduced(device: str, dtype: torch.dtype) -> list[Tensor]:
    maps = [smooth(device, torch.float32, shift).parts[0].movedim(-1, 0) for shift in (0.0, 3.0)]
    return joint_pca(maps, 4)


def painted(device: str, dtype: torch.dtype) -> list[Tensor]:
    return [diffrep.sample("tiny", "a red cup", steps=4, seed=1, device=device, dtype=dtype).images]


def embedded(device: str, dtype: torch.dtype) -> list[Tensor]:
    points = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).numpy()
    fitted = diffrep.HeatGeodesicEmbedding(device=device, random_state=0).fit_transform(points)
    return [torch.cdist(*2 * (torch.as_tensor(fitted).double(),))]


CASES: dict[str, Case] = {
    "U-Net": features("tiny", "up.1", "mid", timestep=261, ensemble=2, posterior="sample"),
    "ViT": features("tiny-dino", "layer.2", "layer.3.key"),
    "depth": head("tiny-depth", "values"),
    "segmentation": head("tiny-segmentation", "mask", "edge", edges=True),
    "matches": matches,
    "joint PCA": reduced,
    "sample": painted,
    "embedding": embedded,
}
EXACT = {"matches", "joint PCA", "embedding"}  # of float32 whatever the networks run in


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
def test_cuda_gives_what_the_cpu_gives(name: str, dtype: torch.dtype, device: str) -> None:
    if name in EXACT and dtype != torch.float32:
        pytest.skip("computed in float32")
    expected = CASES[name]("cpu", torch.float32)
    bound = 1e-3 if dtype == torch.float32 else BFLOAT16
    for got, value in zip(CASES[name](device, dtype), expected, strict=True):
        apart = (got.float().cpu() - value.float()).abs()
        assert float(apart.max() if dtype == torch.float32 else apart.square().mean().sqrt()) <= bound * float(
            value.float().abs().max()
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("name", ["tiny", "tiny-dino"])
def test_a_batch_gives_what_its_images_give(name: str, device: str) -> None:
    backbone = load_backbone(name, device=device, dtype=torch.float32)
    taps = backbone.recommended.taps
    together = backbone.maps(pixels(3), taps, backbone.recommended.conditions)
    for number, image in enumerate(pixels(3)):
        for tap, single in backbone.maps(image[None], taps, backbone.recommended.conditions).items():
            torch.testing.assert_close(single[0], together[tap][number], rtol=1e-3, atol=1e-3)


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
    assert sum(call is not None for call in backbone.graphs._calls.values()) == 1  # for both timesteps


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
    for images, channels, height, width in ((2, 64, 9, 7), (1, 320, 24, 31), (3, 2560, 6, 6), (1, 128, 300, 257)):
        x = (torch.randn(images, channels, height, width, generator=generator) * 2 + 5).to(device, dtype)
        weight, bias = (torch.randn(channels, generator=generator).to(device, dtype) for _ in range(2))
        added = torch.randn(images, channels, generator=generator).to(device, dtype)
        shifted = x.double() + added.double()[:, :, None, None]
        exact = torch.nn.functional.group_norm(shifted, 32, weight.double(), bias.double(), 1e-5)
        exact = torch.nn.functional.silu(exact)
        plain = torch.nn.functional.group_norm(x + added[:, :, None, None], 32, weight, bias, 1e-5)
        plain = torch.nn.functional.silu(plain).double()
        ours = group_norm(x, 32, weight, bias, 1e-5, added=added, silu=True).double()
        assert float((ours - exact).abs().max()) <= 1.5 * float((plain - exact).abs().max()) + 1e-6
