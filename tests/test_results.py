"""Results describe, show and save themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.base import clone
from torch import Tensor

from diffrep.features import ExtractConfig
from diffrep.manifold import HeatGeodesicEmbedding
from diffrep.results import Result
from diffrep.store import extract_store, open_store


@dataclass(frozen=True, repr=False)
class Heights(Result):
    MAIN = "values"

    values: Tensor
    title: str = "hills"

    def picture(self) -> Image.Image:
        return Image.fromarray(self.values.clamp(0, 255).byte().numpy())


@dataclass(frozen=True, repr=False)
class Places(Result):
    x: Tensor
    names: tuple[str, ...]

    def columns(self) -> dict[str, object]:
        return {"x": self.x, "name": np.array(self.names)}


def test_a_picture_shows_and_saves_itself(tmp_path: Path) -> None:
    heights = Heights(torch.tensor([[1.0, 2.5]]))
    assert repr(heights) == "Heights(values float32 (1, 2) in 1 .. 2.5)"
    content = heights._repr_png_()
    assert content is not None
    assert content.startswith(b"\x89PNG")
    assert heights._repr_html_() is None
    assert heights.numpy().tolist() == [[1.0, 2.5]]
    for ending in ("png", "npz", "npy", "safetensors"):
        assert heights.save(tmp_path / f"h.{ending}").is_file()
    assert np.load(tmp_path / "h.npy").tolist() == [[1.0, 2.5]]
    assert load_file(tmp_path / "h.safetensors")["values"].tolist() == [[1.0, 2.5]]
    with Image.open(tmp_path / "h.png") as picture:
        assert picture.size == (2, 1)
    with pytest.raises(TypeError, match="no table"):
        heights.to_pandas()
    with pytest.raises(ValueError, match=r"h\.csv: a Heights is saved as \.png"):
        heights.save(tmp_path / "h.csv")
    assert not (tmp_path / "h.csv").exists()


def test_a_table_shows_and_saves_itself(tmp_path: Path) -> None:
    places = Places(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), ("a<b", "c,d"))
    assert "bfloat16 (2,) in 1 .. 2" in repr(places)
    assert "a&lt;b" in str(places._repr_html_())
    assert places._repr_png_() is None
    assert places.save(tmp_path / "p.csv").read_text().splitlines() == ["x,name", "1.0,a<b", '2.0,"c,d"']
    frame = places.to_pandas()
    assert list(frame["name"]) == ["a<b", "c,d"]
    with pytest.raises(ValueError, match=r"\.csv, \.parquet"):
        places.save(tmp_path / "p.png")


def test_a_store_shows_and_saves_itself(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(tmp_path / "a.png")
    config = ExtractConfig(taps=("layer.1", "layer.4"))
    extract_store([tmp_path / "a.png"], tmp_path / "store", "tiny-dino", config)
    store = open_store(tmp_path / "store")
    assert repr(store).endswith("1 image, pooled of layer.1, layer.4)")
    assert "a.png" in str(store._repr_html_())
    assert store._repr_png_() is None
    assert store.save(tmp_path / "s.csv").read_text().splitlines() == ["image,height,width", "a.png,48,64"]
    assert list(store.to_pandas().columns) == ["image", "height", "width"]
    for ending, read in (("npz", np.load), ("safetensors", load_file)):
        saved = read(store.save(tmp_path / f"s.{ending}"))
        np.testing.assert_array_equal(saved["layer.4"], store.numpy("layer.4"))
    with pytest.raises(ValueError, match=r"is saved as \.csv, \.parquet, \.npz, \.safetensors, not as '\.npy'"):
        store.save(tmp_path / "s.npy")  # of one tap only


def test_a_fitted_embedding_shows_and_saves_itself(tmp_path: Path) -> None:
    estimator = HeatGeodesicEmbedding(n_neighbors=5, random_state=0)
    assert repr(estimator) == "HeatGeodesicEmbedding(n_neighbors=5, random_state=0)"
    assert "text/html" in estimator._repr_mimebundle_()  # scikit-learn's diagram of the settings
    assert estimator._repr_png_() is None
    for call in (estimator.numpy, estimator.to_pandas, lambda: estimator.save(tmp_path / "m.csv")):
        with pytest.raises(ValueError, match="not fitted"):
            call()
    estimator.fit(np.random.default_rng(0).normal(size=(40, 3)))
    assert "fitted to 40 points (exact), embedding float64 (40, 2) in" in repr(estimator)
    assert "text/html" not in estimator._repr_mimebundle_()
    assert not hasattr(estimator, "_repr_html_")  # a notebook would take it before the picture
    content = estimator._repr_png_()
    assert content is not None
    assert content.startswith(b"\x89PNG")
    np.testing.assert_array_equal(estimator.numpy(), estimator.embedding_)
    np.testing.assert_array_equal(estimator.to_pandas()["coordinate 2"], estimator.embedding_[:, 1])
    for ending in ("png", "csv", "npy", "npz", "safetensors"):
        assert estimator.save(tmp_path / f"m.{ending}").is_file()
    np.testing.assert_array_equal(np.load(tmp_path / "m.npy"), estimator.embedding_)
    assert clone(estimator).get_params() == estimator.get_params()
