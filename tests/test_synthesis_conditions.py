"""Where embeddings come from: encoders, files, interpolation, variations, priors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import BackboneError, load_backbone
from diffrep.scenes import CATEGORIES
from diffrep.synthesis import EmbeddingGrid, GridError
from diffrep.synthesis.grids import ImageEncoder, interpolate_grids, load_grid, vary_grid
from diffrep.synthesis.prior import EmbeddingPrior, PriorConfig, cell_positions, embed_texts, load_prior
from diffrep.training.loop import FitSettings, fit
from diffrep.training.prior import PriorObjective, prior_loss
from diffrep.training.synthesis import conditional_batch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random images in [0, 1]."""
    coarse = draw(count, 3, 4, 4, seed=seed)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").sigmoid()


# -- encoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_embeddings_are_those_of_the_network(vit_folder: Path, pooling: str) -> None:
    encoder = ImageEncoder.load(str(vit_folder), pooling)
    shown = images(3, 64)
    network: Any = encoder.backbone.network
    with torch.inference_mode():
        tokens = network.forward_features((shown - 0.5) / 0.5)
    expected = tokens[:, 0] if pooling == "class" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(encoder(shown, batch_size=2), expected.clone(), atol=1e-5, rtol=1e-5)
    assert encoder(shown).shape == (3, encoder.dim)
    assert not encoder(shown).is_inference()  # a network can be trained on them


def test_a_grid_holds_the_embedding_of_each_cell(vit_folder: Path) -> None:
    encoder = ImageEncoder.load(str(vit_folder), "mean")
    pixels = (images(6, 64) * 255).round().byte()
    rows = [torch.cat(list(pixels[r * 3 : r * 3 + 3]), dim=-1) for r in range(2)]
    mosaic = torch.cat(rows, dim=-2).permute(1, 2, 0).numpy()
    grid = encoder.grid(mosaic)
    assert grid.shape == (2, 3)
    assert grid.encoder == encoder.name
    expected = encoder(pixels.float() / 255).unflatten(0, (2, 3))
    torch.testing.assert_close(grid.embeddings, expected, atol=2e-4, rtol=1e-3)
    assert encoder.grid(mosaic, (1, 5)).shape == (1, 5)
    assert encoder.grid(mosaic, patch=32).shape == (4, 6)
    with pytest.raises(GridError, match="cannot be divided into 200 x 2 cells"):
        encoder.grid(mosaic, (200, 2))


def test_encoders_that_are_none_are_refused(vit_folder: Path, sd_folder: Path) -> None:
    with pytest.raises(BackboneError, match="vision transformers"):
        ImageEncoder.load(str(sd_folder))
    backbone: Any = load_backbone(str(vit_folder))
    with pytest.raises(ValueError, match="pooling is class or mean, not 'max'"):
        ImageEncoder(backbone, "max")
    backbone.prefix = 0
    with pytest.raises(ValueError, match="no class token"):
        ImageEncoder(backbone, "class")


# -- files, interpolation, variations -----------------------------------------------------------------------


def test_grids_are_read_from_npy_and_zarr(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    values = draw(2, 3, 5).numpy()
    np.save(tmp_path / "grid.npy", values.astype(np.float64))
    zarr.save_array(str(tmp_path / "grid.zarr"), values)
    for name in ("grid.npy", "grid.zarr"):
        torch.testing.assert_close(load_grid(tmp_path / name).embeddings, torch.from_numpy(values), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3), np.float32), r"must be \(rows, columns, dim\), got \(2, 3\)"),
        (np.full((1, 2, 3), np.nan, np.float32), r"cell \(0, 0\) has NaN"),
        (np.ones((1, 2, 3), np.int32), "floating point"),
        (np.array([{}, {}], dtype=object), "cannot be read as an array"),
    ],
)
def test_files_that_hold_no_grid_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "grid.npy", values, allow_pickle=True)
    with pytest.raises(GridError, match=message):
        load_grid(tmp_path / "grid.npy")


def test_a_missing_grid_is_named(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="there is no such file"):
        load_grid(tmp_path / "none.npy")


@pytest.mark.parametrize(("content", "message"), [(b"text", "no .npy file"), (b"PK\3\4", "name it .npz")])
def test_what_is_no_array_is_never_to_be_trusted(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "grid.npy").write_bytes(content)
    with pytest.raises(GridError, match=rf"cannot be read as an array \(.*{message}\)"):
        load_grid(tmp_path / "grid.npy")


def test_interpolation_goes_from_one_to_the_other() -> None:
    a, b = EmbeddingGrid(draw(2, 3, 8), "x"), EmbeddingGrid(draw(2, 3, 8, seed=1))
    torch.testing.assert_close(interpolate_grids(a, b, 0).embeddings, a.embeddings)
    torch.testing.assert_close(interpolate_grids(a, b, 1).embeddings, b.embeddings)
    half = interpolate_grids(a, b, 0.5)
    unit = [F.normalize(g.embeddings, dim=-1) for g in (a, b)]
    between = interpolate_grids(*(EmbeddingGrid(u) for u in unit), 0.5).embeddings
    to_a, to_b = ((between * u).sum(-1) for u in unit)
    torch.testing.assert_close(to_a, to_b)
    assert half.encoder == "x"
    assert interpolate_grids(a, EmbeddingGrid(draw(5, 1, 8)), 0.3).shape == a.shape
    with pytest.raises(GridError, match="width 8 and 4"):
        interpolate_grids(a, EmbeddingGrid(draw(2, 3, 4)), 0.5)
    with pytest.raises(GridError, match="of x and y"):
        interpolate_grids(a, EmbeddingGrid(draw(2, 3, 8), "y"), 0.5)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        interpolate_grids(a, b, 1.5)


def test_variations_turn_by_the_angle_and_keep_the_length() -> None:
    grid = EmbeddingGrid(3 * draw(3, 4, 16))
    turned = vary_grid(grid, 25, seed=4)
    cosine = F.cosine_similarity(grid.embeddings, turned.embeddings, dim=-1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, float(np.cos(np.radians(25)))))
    torch.testing.assert_close(turned.embeddings.norm(dim=-1), grid.embeddings.norm(dim=-1))
    smaller = vary_grid(EmbeddingGrid(grid.embeddings[:2, :3]), 25, seed=4)
    torch.testing.assert_close(smaller.embeddings, turned.embeddings[:2, :3])  # a cell's place decides, not the size
    assert not torch.allclose(vary_grid(grid, 25, seed=5).embeddings, turned.embeddings)
    torch.testing.assert_close(vary_grid(grid, 0).embeddings, grid.embeddings)


# -- priors -------------------------------------------------------------------------------------------------


def test_a_prior_learns_what_labels_mean(tmp_path: Path) -> None:
    centres = 3 * draw(2, 6)
    kinds = torch.arange(64) % 2
    data = {
        "grids": (centres[kinds][:, None, None] + 0.05 * draw(64, 2, 2, 6)).half(),
        "conditions": F.one_hot(kinds, 2).float(),
    }
    torch.manual_seed(0)
    prior = EmbeddingPrior(PriorConfig(dim=6, condition_dim=2, labels=("left", "right"), width=32, layers=2))
    settings = FitSettings(steps=100, learning_rate=4e-3, warmup=5, ema_decay=0.9, bf16=False)
    batches = partial(conditional_batch, data["grids"], data["conditions"], 1000, 32, 0.1)
    trained = fit(PriorObjective(prior), batches, prior_loss, settings, tmp_path, progress=False).prior.eval()
    drawn = trained.sample(["left", "right", "left"], shape=(1, 3), steps=10, seed=3)
    for grid, kind in zip(drawn, (0, 1, 0), strict=True):
        assert grid.shape == (1, 3)
        distance = torch.cdist(grid.embeddings[0], centres)
        assert bool((distance.argmin(1) == kind).all())
    alone = trained.sample(["left"], shape=(1, 3), steps=10, seed=3)[0]
    torch.testing.assert_close(alone.embeddings, drawn[0].embeddings, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(drawn[2].embeddings, drawn[0].embeddings)

    trained.save(tmp_path / "prior")
    again = load_prior(tmp_path / "prior").sample(["left"], shape=(1, 3), steps=10, seed=3)[0]
    torch.testing.assert_close(again.embeddings, alone.embeddings)
    with pytest.raises(ValueError, match="knows no label up; it knows left, right"):
        trained.sample(["up"])


def test_prior_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no folder of a prior"):
        load_prior(tmp_path)
    EmbeddingPrior(PriorConfig(dim=6, condition_dim=2, labels=("a", "b"), width=16, layers=1)).save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(BackboneError, match="size mismatch"):
        load_prior(tmp_path)
    config.write_text(config.read_text().replace('"width"', '"wide"'))
    with pytest.raises(BackboneError, match="PriorConfig has no wide; did you mean width"):
        load_prior(tmp_path)
    with pytest.raises(ValueError, match="texts or labels"):
        PriorConfig(dim=6, condition_dim=2)


def test_texts_become_unit_vectors_that_tell_them_apart() -> None:
    texts = ["a photo of a red car", "a photo of a blue fish", "a photo of a red car"]
    found = embed_texts("tiny", texts)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found[0], found[2])
    assert float(found[0] @ found[1]) < 0.999
    with pytest.raises(BackboneError, match="no text encoder"):
        embed_texts("tiny-dino", texts)


def test_positions_of_cells_are_their_own() -> None:
    found = cell_positions(4, 5, 16)
    assert found.shape == (20, 16)
    assert len(torch.unique(found, dim=0)) == 20
    assert len(CATEGORIES) > 10  # what a prior of labels is told
