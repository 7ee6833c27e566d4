"""Checkers of system `one-step-depth-normals` for the kinds that are about evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffrep.alignment import align_depth
from diffrep.eval.depth_metrics import depth_metrics
from diffrep.eval.normal_metrics import PooledAngles, angular_error, mean_of_images, normal_metrics

from .cases import assert_within

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
    given, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    tolerance = case["tolerance"]
    for run in case["runs"]:
        i = run["index"]
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
    given, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    atol = case["tolerance"]["metrics"]["atol"]
    pooled, images = PooledAngles(), []
    for run in case["runs"]:
        i = run["index"]
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
