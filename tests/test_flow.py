"""Dense flow and TSS: a known shift is found, counted by hand, and kept between runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.backbones import Grid, load_backbone
from diffrep.eval.datasets.pairs import FlowItem, read_tss
from diffrep.eval.flow import (
    ALPHAS,
    count_flow,
    dense_flow,
    evaluate_flow,
    mean,
    mean_pck,
    nearest_flow,
    padded_image,
)
from diffrep.features import Descriptors, ExtractConfig
from diffrep.fusion import Fusion, Part
from diffrep.images import Placement, Sizing
from diffrep.matching import MatchConfig
from diffrep.recipes import Correspondence, Reading, Recipe

from .benchmark_folders import write_tss


def cells(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, 12, generator=torch.Generator().manual_seed(seed))


def test_a_shift_by_whole_cells_is_found_but_for_the_slip_of_the_released_code() -> None:
    whole = cells(6, 6)
    source, target = Descriptors.from_vectors(whole), Descriptors.from_vectors(whole.roll((-1, -2), (0, 1)))
    flow = nearest_flow(source, target, (12, 12))  # two pixels per cell
    assert flow.shape == (2, 12, 12)
    inside = flow[:, 1:9, 1:7]  # cells that were not rolled over the edge
    torch.testing.assert_close(inside[0], torch.full_like(inside[0], 4.0))
    slip = inside[1] - 2.0
    assert float(slip.min()) >= 0
    assert 0 < float(slip.max()) <= 2 * 5 / 6  # at most the last column over the number of columns, in pixels


def test_flow_is_cropped_out_of_the_square() -> None:
    whole = cells(6, 6)
    flow = nearest_flow(Descriptors.from_vectors(whole), Descriptors.from_vectors(whole), (12, 8))
    assert flow.shape == (2, 12, 8)
    assert float(flow[0].abs().max()) == 0
    with pytest.raises(ValueError, match="must be one square"):
        nearest_flow(Descriptors.from_vectors(cells(6, 5)), Descriptors.from_vectors(cells(6, 5)), (12, 8))


def test_dense_flow_leaves_padding_out() -> None:
    # 8 x 4 pixels in the middle of an 8 x 8 canvas with cells of 2 pixels: the outer columns are padding
    placement = Placement((8, 4), (8, 8), (2.0, 0.0, 6.0, 8.0))
    grid = Grid.covering((8, 8), (4, 4))
    whole = cells(4, 4)
    source = Descriptors((whole,), (1.0,), placement, grid)
    target = Descriptors((whole.roll(-1, 0),), (1.0,), placement, grid)  # what was at row r is at row r - 1
    flow = dense_flow(source, target, MatchConfig())
    assert flow.shape == (2, 8, 4)
    assert bool(torch.isfinite(flow).all())
    torch.testing.assert_close(flow[1, :5], torch.full((5, 4), 2.0))
    torch.testing.assert_close(flow[0], torch.zeros(8, 4))


def item(size: tuple[int, int] = (10, 20)) -> FlowItem:
    return FlowItem("JODS/a/1to2", "JODS", "a", "s.png", "t.png", "flow2.flo", "mask2.png", size, size)


def test_counts_by_hand() -> None:
    truth = torch.zeros(2, 10, 20)
    flow = truth.clone()
    flow[0, :, 10:] = 1.0  # exactly 0.05 of the longer side
    flow[0, :, 15:] = 3.0
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[2:6, 5:20] = True
    count = count_flow(item(), flow, truth, mask)
    assert count.pixels == 60
    assert dict(zip(ALPHAS, count.correct, strict=True))[0.05] == 40
    assert dict(zip(ALPHAS, count.correct, strict=True))[0.01] == 20
    assert count.error == pytest.approx((20 * 0 + 20 * 1 + 20 * 3) / 60)
    assert count.smoothness == pytest.approx((4 * 1 + 4 * 2) / (4 * 14 + 3 * 15))
    assert mean_pck([count], 0.05) == pytest.approx(2 / 3)
    assert math.isnan(mean_pck([], 0.05))
    assert math.isnan(mean([]))
    with pytest.raises(ValueError, match=r"alpha 0\.07 was not counted"):
        mean_pck([count], 0.07)
    with pytest.raises(ValueError, match=r"the mask mask2.png marks no pixel"):
        count_flow(item(), flow, truth, torch.zeros_like(mask))


def test_padding_keeps_the_image_at_the_top_left(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5, 3), 200, np.uint8)).save(tmp_path / "a.png")
    padded = np.asarray(padded_image(tmp_path / "a.png", (6, 7)))
    assert padded.shape == (6, 7, 3)
    assert (padded[:4, :5] == 200).all()
    assert padded[4:].max() == padded[:, 5:].max() == 0


def test_tss_end_to_end_and_again(tmp_path: Path, vit_folder: Path) -> None:
    root = write_tss(tmp_path)
    recipe = Recipe(
        name="small",
        readings=(Reading(backbone="vit", extract=ExtractConfig(taps=("layer.0",), sizing=Sizing("pad", 96))),),
        fusion=Fusion(parts=(Part(taps=("layer.0",)),)),
    )
    whole = Correspondence(recipe, backbones={"vit": load_backbone(vit_folder)})
    (root / "JODS/plane_2_5/flow2.flo").write_bytes(b"nothing")
    report = evaluate_flow(read_tss(root), whole, tmp_path / "out", progress=False)
    assert [count.name for count in report.counts] == [
        "FG3DCar/Car_01/1to2", "FG3DCar/Car_01/2to1", "JODS/plane_2_5/2to1"
    ]  # fmt: skip
    assert any("flow2.flo: not a .flo file" in str(problem) for problem in report.problems)
    assert report.table().count("\n") > 6
    assert json.loads(report.to_json())["pck"].keys() == {"FG3DCar", "JODS"}
    for file in (tmp_path / "out/features").rglob("*.safetensors"):
        file.write_bytes(b"")  # a second run reads the flows' counts, not the features
    again = evaluate_flow(read_tss(root), whole, tmp_path / "out", progress=False)
    assert again.counts == report.counts
    with pytest.raises(ValueError, match="another folder"):
        evaluate_flow(read_tss(root, subsets=["JODS"]), whole, tmp_path / "out", progress=False)
