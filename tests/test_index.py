from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from diffrep.index import FAISS_FROM, FaissIndex, TorchIndex, build_index, nearest, search

from .fields import generator, smooth_field


def smooth_gallery(count: int, seed: int = 0) -> torch.Tensor:
    places = torch.rand(count, 2, generator=generator(seed)) * 100
    return F.normalize(smooth_field(places, channels=64, length=100), dim=1)


@pytest.mark.parametrize("k", [1, 5])
def test_both_backends_give_the_same_answers_on_smooth_fields(k: int) -> None:
    gallery, queries = smooth_gallery(3000), smooth_gallery(400, seed=1)
    one, two = (nearest(queries, gallery, k, backend=name) for name in ("torch", "faiss"))
    assert torch.equal(one.indices, two.indices)
    torch.testing.assert_close(one.scores, two.scores, atol=1e-6, rtol=0)
    exact = (queries.double() @ gallery.double().T).topk(k, dim=1)
    assert (one.indices == exact.indices).float().mean() > 0.995
    torch.testing.assert_close(one.scores.double(), exact.values, atol=1e-6, rtol=0)
    reduced = (queries.bfloat16() @ gallery.bfloat16().T).float().argmax(1)
    assert (reduced == exact.indices[:, 0]).float().mean() < 0.9


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equals_go_to_the_lowest_index(backend: str) -> None:
    base = F.normalize(torch.randn(40, 16, generator=generator(2)), dim=1)
    gallery = base.repeat(30, 1)  # every vector thirty times: more copies than spare candidates
    got = nearest(base, gallery, 4, backend=backend)  # type: ignore[arg-type]
    expected = torch.arange(40)[:, None] + 40 * torch.arange(4)
    assert torch.equal(got.indices, expected)
    assert (got.scores.diff(dim=1) == 0).all()


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_best_come_first_and_k_may_be_everything(backend: str) -> None:
    gallery = torch.randn(12, 5, generator=generator(3))
    queries = torch.randn(7, 5, generator=generator(4))
    got = nearest(queries, gallery, 12, backend=backend)  # type: ignore[arg-type]
    scores = queries @ gallery.T
    assert torch.equal(got.indices, scores.argsort(1, descending=True))
    torch.testing.assert_close(got.scores, scores.sort(1, descending=True).values, atol=1e-5, rtol=0)


def test_the_torch_backend_does_not_depend_on_its_memory() -> None:
    gallery, queries = smooth_gallery(500), smooth_gallery(50, seed=1)
    whole = search(TorchIndex(gallery), queries, 3)
    pieces = search(TorchIndex(gallery, memory=1), queries, 3)
    assert torch.equal(whole.indices, pieces.indices)


def test_auto_goes_by_size() -> None:
    assert isinstance(build_index(torch.zeros(10, 2)), TorchIndex)
    assert isinstance(build_index(torch.zeros(FAISS_FROM, 2)), FaissIndex)
    assert isinstance(build_index(torch.zeros(10, 2), "faiss"), FaissIndex)


def test_bad_input_is_named() -> None:
    gallery = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4, the size of the gallery, got 5"):
        nearest(gallery, gallery, 5)
    with pytest.raises(ValueError, match="queries have 2 channels, the gallery 3"):
        nearest(torch.ones(1, 2), gallery)
    with pytest.raises(ValueError, match="gallery has NaN"):
        nearest(gallery, gallery * torch.nan)
    with pytest.raises(ValueError, match="gallery must be a matrix"):
        nearest(gallery, torch.ones(0, 3))
    with pytest.raises(ValueError, match="'auto', 'torch' or 'faiss', got 'annoy'"):
        nearest(gallery, gallery, backend="annoy")  # type: ignore[arg-type]


def test_a_missing_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu, or use backend='torch'"):
        build_index(torch.ones(4, 3), "faiss")
    assert nearest(torch.ones(1, 3), torch.ones(4, 3)).indices.tolist() == [[0]]
