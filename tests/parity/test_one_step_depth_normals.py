"""System `one-step-depth-normals`: same weights in, same numbers out as Lotus', Marigold's and E2E-FT's code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of, check_case
from .depth_evaluation import check_crops_and_masks, check_depth_metrics, check_harness, check_normal_metrics
from .depth_training import (
    check_conv_in_expansion,
    check_e2e_losses,
    check_lotus_train,
    check_lr_schedule,
    check_training_targets,
)
from .one_step_inference import check_ensembles, check_lotus_pipeline, check_marigold_e2e

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "crops_and_masks": check_crops_and_masks,
    "depth_metrics": check_depth_metrics,
    "harness": check_harness,
    "normal_metrics": check_normal_metrics,
    "conv_in_expansion": check_conv_in_expansion,
    "e2e_losses": check_e2e_losses,
    "lotus_train": check_lotus_train,
    "lr_schedule": check_lr_schedule,
    "training_targets": check_training_targets,
    "ensembles": check_ensembles,
    "lotus_pipeline": check_lotus_pipeline,
    "marigold_e2e": check_marigold_e2e,
}


# How the stored tensors were drawn, and figures of what came out: no parameters of the method.
DESCRIBING = frozenset(
    (
        "a1",
        "a2",
        "a3",
        "a4",
        "a5",
        "names",
        "optimizer",
        "solver",
    )
)


@pytest.mark.parametrize(("folder", "case"), cases_of("one-step-depth-normals", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
