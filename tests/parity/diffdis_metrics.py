"""Scores of masks: pysodmetrics' definitions and those of DiffDIS' own script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.morphology import skeletonize

from diffrep.eval.segmentation_metrics import (
    AUTHORS,
    DIS,
    ImageScores,
    e_curve,
    f_curve,
    prepare,
    score_image,
    together,
)

from .cases import assert_within, each, number_in, tensors_of

DEFINITIONS = {  # key in the case -> definition, whether maps are thresholded first
    "pysodmetrics": (DIS, False),
    "authors_soft": (AUTHORS, False),
    "authors_binarized": (AUTHORS, True),
}
PRINTED = {
    "MAE": "mae", "Ber": "ber", "maxF": "maxf", "avgF": "f_adaptive", "wfm": "wfm", "Sm": "sm", "adpEm": "em_adaptive",
    "M_dice": "dice", "M_iou": "iou", "Acc": "accuracy",
}  # fmt: skip


def check_metrics(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    atol = number_in(case["tolerance"])
    totals: dict[str, list[ImageScores]] = {key: [] for key in DEFINITIONS}
    for pair in each(case["pairs"]):
        name = pair["pair"]
        predicted, truth = given[f"{name}/pred"].numpy(), given[f"{name}/gt"].numpy()
        assert [*predicted.shape] == pair["hw"]
        for key, (definition, binarize) in DEFINITIONS.items():
            alone = score_image(predicted, truth, definition, binarize=binarize, hce=True)
            got = {**alone.values, "f_mean": float(alone.f.mean()), "em_max": float(alone.e.max())}
            for score, value in pair[key].items():
                assert abs(got[score] - value) <= (0 if score == "hce" else atol), f"{name} {key} {score}: {got[score]}"
            if pair["kind"] != "empty_gt":
                totals[key].append(alone)
        curves = {"pysod_f_curve": f_curve, "pysod_e_curve": e_curve}
        p, g = prepare(predicted, truth)
        assert np.array_equal(skeletonize(g), expected[f"{name}/gt_skeleton"].numpy()), f"{name}: skeleton of HCE"
        for key, curve in curves.items():
            got_curve = torch.from_numpy(curve(p, g))
            assert_within(got_curve, expected[f"{name}/{key}"], atol=atol, what=f"{name}/{key}")
        if f"{name}/authors_soft_f_curve" in expected:
            got_curve = torch.from_numpy(f_curve(p, g, AUTHORS))
            assert_within(got_curve, expected[f"{name}/authors_soft_f_curve"], atol=atol, what=name)

    whole = case["dataset_all_but_empty_gt"]
    assert len(totals["pysodmetrics"]) == whole["images"]
    got = together(totals["pysodmetrics"])
    for score, value in whole["pysodmetrics_dis_protocol"].items():
        assert abs(got[score] - value) <= atol, f"data set, {score}: {got[score]}"
    printed, got = whole["test_score_script_as_printed"], together(totals["authors_binarized"])
    assert int(got["hce"]) == printed["HCE"]
    for key, value in printed.items():
        if key != "HCE":
            assert abs(np.round(got[PRINTED[key]], 4) - value) < 1e-9, f"as printed, {key}: {got[PRINTED[key]]}"
