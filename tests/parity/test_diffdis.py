"""System `diffdis`: same weights in, same numbers out as the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of, check_case
from .diffdis_metrics import check_metrics
from .diffdis_pipeline import check_pipeline, check_tta_image
from .diffdis_training import check_contour, check_init_from_base, check_pyramid_noise, check_train_step
from .diffdis_unet import check_bde, check_dbia, check_swci, check_unet_step

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "bde": check_bde,
    "dbia": check_dbia,
    "swci": check_swci,
    "unet_step": check_unet_step,
    "pipeline": check_pipeline,
    "tta_image": check_tta_image,
    "init_from_base": check_init_from_base,
    "contour": check_contour,
    "pyramid_noise": check_pyramid_noise,
    "train_step": check_train_step,
    "metrics": check_metrics,
}


# How the stored tensors were drawn, and figures of what came out: no parameters of the method.
DESCRIBING = frozenset(("ch", "config", "cross", "groups", "heads", "layers", "seed", "unet", "vae"))


@pytest.mark.parametrize(("folder", "case"), cases_of("diffdis", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
