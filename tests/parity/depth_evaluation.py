"""Checkers of system `one-step-depth-normals` for the kinds that are about evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrep.alignment import align_depth
from diffrep.eval.datasets.dense_images import (
    kitti_mask,
    nyu_mask,
    open_benchmark,
)
from diffrep.eval.maps import (
    PADDING,
    DepthProtocol,
    NormalProtocol,
    PooledAngles,
    angular_error,
    depth_metrics,
    evaluate_maps,
    mean_of_images,
    normal_metrics,
    normal_padding,
)
from diffrep.heads.training.datasets import KITTI_SIZE, kitti_crop, vkitti_crop
from diffrep.heads.training.dense_data import distance_to_depth

from .cases import assert_within, each, tensors_of

OFFICIAL_DEPTH = {  # ours -> the name in the papers' code
    "abs_rel": "abs_relative_difference",
    "sq_rel": "squared_relative_difference",
    "rmse": "rmse_linear",
    "rmse_log": "rmse_log",
    "log10": "log10",
    "delta1": "delta1_acc",
    "delta2": "delta2_acc",
    "delta3": "delta3_acc",
    "irmse": "i_rmse",
    "silog": "silog_rmse",
}
DSINE = {
    "mean": "mean",
    "median": "median",
    "rmse": "rmse",
    "under 5": "a1",
    "under 7.5": "a2",
    "under 11.25": "a3",
    "under 22.5": "a4",
    "under 30": "a5",
}
MARIGOLD = {
    "mean": "mean_angular_error",
    "median": "median_angular_error",
    "rmse": "rmse_angular_error",
    **{f"under {t}": f"sub{t.replace('.', '_')}_error" for t in ("5", "7.5", "11.25", "22.5", "30")},
}


def check_depth_metrics(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    tolerance = case["tolerance"]
    for run in each(case["runs"], describing=("lo", "hi", "drop")):
        i = run["index"]
        assert run["space"] in ("depth", "disparity")
        assert given[f"{i}.gt"].shape == (run["h"], run["w"])
        assert run["aligned_dtype"] in ("float32", "float64")  # of the published code; compared within the tolerance
        prediction, reference, valid = (given[f"{i}.{name}"] for name in ("pred", "gt", "valid"))
        assert int(valid.sum()) == run["n_valid"]
        aligned, scale, shift = align_depth(
            prediction,
            reference,
            valid,
            space=run["space"],
            bounds=(run["min_depth"], run["max_depth"]),
            fit_size=run["max_resolution"],
            subsample="width",
        )
        torch.testing.assert_close(aligned, expected[f"{i}.aligned"], **tolerance["aligned"])
        assert (scale, shift) == pytest.approx((run["scale"], run["shift"]), rel=tolerance["aligned"]["rtol"])
        found = depth_metrics(aligned, reference, valid)
        _compare(found, run["metrics"], OFFICIAL_DEPTH, rel=tolerance["metrics"]["rtol"])


def check_normal_metrics(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    atol = case["tolerance"]["metrics"]["atol"]
    pooled, images = PooledAngles(), []
    for run in each(case["runs"], describing=("noise", "drop", "unit")):
        i = run["index"]
        assert given[f"{i}.gt"].shape[-2:] == (run["h"], run["w"])
        errors = angular_error(given[f"{i}.pred"], given[f"{i}.gt"])
        what = f"run {i}, error_deg"
        assert_within(errors, expected[f"{i}.error_deg"], atol=case["tolerance"]["error_deg"]["atol"], what=what)
        counted = errors[given[f"{i}.mask"]]
        pooled.update(counted)
        images.append(counted)
        _compare(normal_metrics(counted), run["dsine_this_image"], DSINE, abs=atol)
        _compare(mean_of_images([counted]), run["marigold"], MARIGOLD, abs=atol)
    _compare(pooled.compute(), case["dataset_pooled"], DSINE, abs=atol)
    _compare(mean_of_images(images), case["dataset_mean_of_images"], MARIGOLD, abs=atol)


def _compare(found: dict[str, float], official: dict[str, float], names: dict[str, str], **tolerance: float) -> None:
    assert set(names.values()) == set(official), "the case has other metrics"
    assert found.keys() == names.keys()
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(official[theirs], **tolerance), ours


def check_crops_and_masks(folder: Path, case: dict[str, Any]) -> None:
    for name, crop in case["kitti_benchmark_crop"].items():
        height, width = _size(name)
        assert kitti_crop(height, width) == (crop["top"], crop["left"])
        assert list(KITTI_SIZE) == crop["shape"]
    for name in [name for name in case if name.endswith("_half_open")]:
        dataset, (height, width) = name.split("_")[0], _size(name.split("_")[-3])
        if dataset == "kitti":
            for kind, box in case[name].items():
                _check_box(kitti_mask(height, width, kind), box)
        else:
            assert dataset == "nyu"
            _check_box(nyu_mask(height, width), case[name])
    for name, sides in case["normal_padding_lrtb_to_multiple_of_32"].items():
        height, width = _size(name)
        assert list(normal_padding(height, width)) == sides, name
    assert pytest.approx(case["normal_padding_value_rgb"], rel=1e-7) == PADDING
    atol = case["tolerance"]["floats"]
    depth = distance_to_depth(torch.ones(768, 1024))
    for name, value in case["hypersim_depth_for_distance_1_at_row_col"].items():
        row, column = map(int, name.split(","))
        assert depth[row, column].item() == pytest.approx(value, abs=atol), name
    for name in [name for name in case if name.startswith("vkitti_train_crop_of_")]:
        crop, (height, width) = case[name], _size(name.removeprefix("vkitti_train_crop_of_"))
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cropped = vkitti_crop(torch.stack([rows, columns, torch.zeros_like(rows)]))
        assert list(cropped.shape[1:]) == crop["shape"]
        assert cropped[:, 0, 0].tolist() == [crop["top"], crop["left"], 0]
        top_left = torch.tensor([crop["top"], crop["left"], 0]) % 256  # of a picture whose colours are its places
        assert crop["image_topleft_rgb"] == top_left.tolist()


def _size(text: str) -> tuple[int, int]:
    """``352x1216`` -> (352, 1216)."""
    height, width = map(int, text.split("x"))
    return height, width


def _check_box(mask: torch.Tensor, box: dict[str, list[int]]) -> None:
    expected = torch.zeros_like(mask)
    expected[slice(*box["rows"]), slice(*box["cols"])] = True
    assert torch.equal(mask, expected)


def _numbers(pattern: str, text: str) -> list[float]:
    """The numbers of a predictor that a case describes."""
    found = re.match(pattern, text)
    assert found, f"the predictor {text!r} does not begin as {pattern!r}"
    return [float(number) for number in found.groups()]


def check_harness(folder: Path, case: dict[str, Any]) -> None:
    rel = case["tolerance"]["rtol"]
    depth, normals = (Path(re.findall(r"data/\w+(?:/\w+)?", case[side]["dataset"])[0]) for side in ("depth", "normals"))
    texts = case["depth"]["predictor"]  # "y = 0.7R+0.2G+0.1B of the ...", "1 - 0.9*y"
    colours = _numbers(r"y = (.+)R\+(.+)G\+(.+)B of the \(resized, integer valued\)", texts["least_square"])
    (slope,) = _numbers(r"1 - (.+)\*y", texts["least_square_disparity"])
    factor, offset = _numbers(r"(.+)\*img\+(\S+)", case["normals"]["predictor"])
    for run in each(case["depth"]["runs"]):
        assert run["alignment"] in ("least_square", "least_square_disparity")
        disparity = run["alignment"] == "least_square_disparity"
        config = run["config"]
        protocol = DepthProtocol(
            space="disparity" if disparity else "depth",
            side=config.get("processing_res") or None,
            fit_size=config.get("alignment_max_res"),
        )

        def predict(image: torch.Tensor, disparity: bool = disparity) -> torch.Tensor:
            y = torch.einsum("c,chw->hw", torch.tensor(colours), image.float()) / 255
            return 1 - slope * y if disparity else y

        data = open_benchmark("depth", depth.name, folder / depth)
        report = evaluate_maps(predict, data, protocol, method="formula", progress=False)
        assert not report.problems
        _compare(dict(report.metrics), run["result"], OFFICIAL_DEPTH, rel=rel)
        for line, values in zip(run["per_sample"], report.images.values(), strict=True):
            official = dict(zip(OFFICIAL_DEPTH.values(), map(float, line.split(",")[1:]), strict=True))
            _compare(dict(values), official, OFFICIAL_DEPTH, rel=rel)
    for run in each(case["normals"]["runs"]):
        data_set = open_benchmark("normals", normals.name, folder / normals.parent)
        found = evaluate_maps(
            lambda image: factor * image + offset,
            data_set,
            NormalProtocol(side=run["processing_res"] or None),
            method="formula",
            progress=False,
        )
        assert not found.problems
        _compare(dict(found.metrics), run["result"], DSINE, rel=rel)
