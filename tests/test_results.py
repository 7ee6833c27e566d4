"""Results describe, show and save themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor

from diffrep.results import Result


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
