"""Known homographies: exact geometry, views inside the photograph, errors told right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffrep.eval.homography import (
    HomographySettings,
    carry,
    corners_of,
    evaluate_homographies,
    homography_between,
    photographs,
    queries,
    see_through,
    view_homography,
)
from diffrep.eval.matchers import baselines, same_position


@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 1000))
def test_views_lie_inside_the_photograph(height: int, width: int, seed: int) -> None:
    matrix = view_homography((height, width), HomographySettings(rotation=60, zoom=(0.5, 1.0)), seed)
    seen = carry(torch.linalg.inv(matrix), corners_of((height, width)))
    assert float(seen.min()) >= -1e-6
    assert float((seen - torch.tensor([width - 1.0, height - 1.0])).max()) <= 1e-6


def test_four_points_go_where_they_are_sent() -> None:
    source = corners_of((50, 80))
    target = source + torch.tensor([[3.0, 1.0], [-5.0, 2.0], [1.0, -7.0], [2.0, 2.0]])
    torch.testing.assert_close(carry(homography_between(source, target), source), target.double())


def test_a_view_shows_what_the_homography_says() -> None:
    ramp = np.zeros((60, 90, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(90) * 2, np.arange(60)[:, None] * 3  # colour tells the place
    matrix = view_homography((60, 90), HomographySettings(), 3)
    view = see_through(ramp, matrix)
    points, truth = queries((60, 90), matrix, 9)
    assert len(points) > 20
    for (x, y), (u, v) in zip(points.tolist(), truth.tolist(), strict=True):
        red, green, _ = view[round(v), round(u)].astype(float)
        assert abs(red / 2 - x) < 1.2
        assert abs(green / 3 - y) < 1.2


def test_the_same_seed_takes_the_same_views() -> None:
    a, b, c = (view_homography((40, 40), HomographySettings(seed=seed), 0) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_errors_are_distances_and_strides(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texture = Image.fromarray(generator.integers(0, 255, (12, 16, 3), np.uint8)).resize(
        (128, 96), Image.Resampling.BICUBIC
    )
    texture.save(tmp_path / "texture.png")
    settings = HomographySettings(views=2, rotation=4, zoom=(0.85, 0.9), perspective=0.02, points=6)
    matchers, extractors = baselines(box=False)
    exact = [view_homography((96, 128), settings, view) for view in range(2)]
    calls = iter(exact)
    report = evaluate_homographies(
        {**matchers, "two off": lambda s, t, p: carry(next(calls), p) + torch.tensor([0.0, 2.0])},
        extractors,
        settings,
        images={"texture.png": tmp_path / "texture.png"},
        progress=False,
    )
    two_off = report.rows["two off"].numbers()
    assert [two_off[k] for k in ("median", "q75", "q90")] == pytest.approx([2, 2, 2], abs=1e-4)
    assert "stride" not in two_off
    patches = report.rows["colour patches"].numbers()
    assert patches["stride"] == 4
    assert patches["median_in_strides"] < 1 < report.rows["same position"].numbers()["median"] / 4
    assert 0.5 < patches["within_one_stride"] <= 1
    assert "0." in report.table()
    document = json.loads(report.to_json())
    assert document["rows"]["two off"]["all"]["points"] == two_off["points"] > 30


def test_bad_settings_and_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zoom must be"):
        HomographySettings(zoom=(0.5, 2))
    with pytest.raises(ValueError, match="zoom must be a range"):
        HomographySettings(zoom=(0.7, 0.5))
    with pytest.raises(ValueError, match="views must be at least 1"):
        HomographySettings(views=0)
    with pytest.raises(ValueError, match="perspective must be"):
        HomographySettings(perspective=0.3)
    with pytest.raises(ValueError, match="no such image file"):
        evaluate_homographies({"x": same_position}, {}, images={"a": tmp_path / "a.png"}, progress=False)


def test_the_photographs_are_installed() -> None:
    assert {"china.jpg", "flower.jpg", "grace_hopper.jpg"} == set(photographs())
