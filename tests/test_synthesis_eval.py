"""Measures of synthesis: Fréchet distance, seams, agreement with the condition, augmentation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor, nn

from diffrep.eval.painted import consistency, frechet_distance, load_features, seam_ratio
from diffrep.eval.synthesis import (
    AugmentationSettings,
    SynthesisEvaluation,
    accuracy,
    evaluate_synthesis,
    labelled_scenes,
    paint_variations,
    random_crops,
)
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings
from diffrep.synthesis.grids import ImageEncoder
from diffrep.training.synthesis import SynthesisTraining, build_model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 noise of several scales, the same everywhere."""
    layers = []
    for scale in (3, 5, 9, 17):
        noise = draw(1, 3, height + scale - 1, width + scale - 1, seed=100 * seed + scale)
        layers.append(scale**1.5 * F.avg_pool2d(noise, scale, stride=1))
    total = torch.stack(layers).sum(0)[0]
    return ((total / (6 * total.std()) + 0.5).clamp(0.1, 0.9) * 255).byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder.load("tiny-dino", "mean")


@pytest.fixture(scope="module")
def model(encoder: ImageEncoder) -> SynthesisModel:
    return build_model(SynthesisTraining(), encoder).eval().requires_grad_(False)


# -- Fréchet distance ---------------------------------------------------------------------------------------


class Colours(nn.Module):
    """Mean and spread of each channel: six features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def test_the_distance_is_that_of_the_two_gaussians() -> None:
    real = draw(60, 3, 8, 8).sigmoid()
    generated = (draw(50, 3, 8, 8, seed=1) * 0.7 + draw(50, 3, 1, 1, seed=2) * 0.3).sigmoid()
    a, b = (Colours()(x).double().numpy() for x in (real, generated))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    found = frechet_distance(real, generated, Colours(), batch_size=16)
    assert found == pytest.approx(float(expected), rel=1e-3)
    assert frechet_distance(real, real, Colours()) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="at least 2 images on both sides, got 60 and 1"):
        frechet_distance(real, generated[:1], Colours())


def test_feature_spaces_are_found_by_name(tmp_path: Path) -> None:
    features = load_features("tiny-dino@mean")
    assert features(torch.rand(2, 3, 64, 64)).shape == (2, features.num_features)
    with pytest.raises(ValueError, match="nothing is downloaded"):
        load_features("inception")
    with pytest.raises(ValueError, match="no such file"):
        load_features(f"inception:{tmp_path / 'none.pth'}")
    with pytest.raises(ValueError, match="pooling is class or mean"):
        load_features("tiny-dino@max")


# -- large images -------------------------------------------------------------------------------------------


def test_seams_are_found_where_they_are() -> None:
    ratios, controls, clean = [], [], []
    for seed in range(4):
        image = texture(192, 256, seed)
        offsets = draw(6, 8, seed=seed).mul(8).round().repeat_interleave(32, 0).repeat_interleave(32, 1)
        tiled = np.clip(image.astype(int) + offsets.int().numpy()[..., None], 0, 255).astype(np.uint8)
        clean.append(seam_ratio(image, 32))
        ratios.append(seam_ratio(tiled, 32))
        controls.append(seam_ratio(tiled, 32, offset=16))
    assert np.mean(clean) == pytest.approx(1, abs=0.05)
    assert np.mean(controls) == pytest.approx(1, abs=0.05)
    assert min(ratios) > 1.05
    assert np.mean(ratios) > 1.1
    assert seam_ratio(np.full((64, 64, 3), 9, np.uint8), 16) == 1
    with pytest.raises(ValueError, match="period must be at least 3"):
        seam_ratio(image, 2)
    with pytest.raises(ValueError, match="no border every 300 pixels"):
        seam_ratio(image, 300)


def test_an_image_agrees_with_its_own_embeddings(encoder: ImageEncoder) -> None:
    image = labelled_scenes("val", 1, AugmentationSettings().categories[:6], first=7, size=128)
    rows = [torch.cat(list(row), dim=-1) for row in image.unflatten(0, (2, 3))]
    mosaic = (torch.cat(rows, dim=-2).permute(1, 2, 0) * 255).byte().numpy()
    grid = encoder.grid(mosaic, (2, 3))
    found = consistency(mosaic, grid, encoder)
    assert found.right == 1
    assert found.own == pytest.approx(1, abs=1e-4)
    assert found.other < 0.999
    moved = consistency(mosaic, EmbeddingGrid(grid.embeddings.roll(1, 1)), encoder)
    assert moved.right == 0
    assert moved.own <= found.other
    with pytest.raises(ValueError, match="at least 2 cells"):
        consistency(mosaic, EmbeddingGrid(grid.embeddings[:1, :1]), encoder)


def test_crops_lie_inside() -> None:
    image = texture(64, 96)
    crops = random_crops(image, 5, 32, seed=1)
    assert crops.shape == (5, 3, 32, 32)
    whole = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    windows = whole.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    assert all(bool((windows == crop).flatten(1).all(1).any()) for crop in crops)


# -- augmentation -------------------------------------------------------------------------------------------


def test_labelled_scenes_are_disjoint_and_repeatable() -> None:
    first = labelled_scenes("val", 1, ("dog", "car"), first=0, size=32)
    assert first.shape == (2, 3, 32, 32)
    assert torch.equal(first, labelled_scenes("val", 1, ("dog", "car"), first=0, size=32))
    assert not torch.equal(first, labelled_scenes("val", 1, ("dog", "car"), first=100, size=32))


def test_variations_follow_their_embedding_and_seed(model: SynthesisModel) -> None:
    settings = SynthesisSettings(steps=2)
    embeddings = draw(2, model.embedder.dims[0])
    painted = paint_variations(model, embeddings, 2, 15.0, settings)
    assert painted.shape == (4, 3, 128, 128)
    assert 0 <= float(painted.min()) <= float(painted.max()) <= 1
    alone = paint_variations(model, embeddings[:1], 2, 15.0, settings)
    torch.testing.assert_close(alone, painted[:2], atol=1e-3, rtol=0)
    assert not torch.allclose(painted[0], painted[1], atol=1e-2)


def test_the_probe_counts_what_it_gets_right() -> None:
    labels = torch.arange(40) % 2
    separable = draw(40, 3) + 8 * F.one_hot(labels, 3)
    assert accuracy(separable, labels, separable, labels) == 1
    assert accuracy(separable, labels, separable, 1 - labels) == 0


@pytest.mark.slow
def test_a_whole_evaluation(model: SynthesisModel) -> None:
    settings = SynthesisEvaluation(
        patches=4, images=1, rows=2, columns=2,
        augmentation=AugmentationSettings(
            per_class=1, variations=1, test_per_class=1, repeats=1, categories=("dog", "car")
        ),
    )  # fmt: skip
    report = evaluate_synthesis(model, settings, SynthesisSettings(steps=2), progress=False)
    values = json.loads(report.to_json())
    for kind in ("unrelated", "whole"):
        assert 0 <= values[kind]["right"] <= 1
        assert all(value > 0 for value in values[kind]["seams"].values())
    # cells of one scene are more alike than those of several
    assert values["whole"]["other"] > values["unrelated"]["other"]
    assert len(values["augmentation"]["real"]) == 1
    assert "1 image of one scene each" in report.table()
    with pytest.raises(ValueError, match="patches must be at least 2"):
        SynthesisEvaluation(patches=1)
