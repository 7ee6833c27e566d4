"""System `features`: same weights in, same numbers out as the papers' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of
from .features_backbones import check_dift_sd_taps, check_dinov2_extractor
from .features_fusion import check as check_copca_fusion
from .features_soft_argmax import check as check_soft_argmax_window

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "dift_sd_taps": check_dift_sd_taps,
    "dinov2_extractor": check_dinov2_extractor,
    "copca_fusion": check_copca_fusion,
    "soft_argmax_window": check_soft_argmax_window,
}


@pytest.mark.parametrize(("folder", "case"), cases_of("features", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    assert case["kind"] in CHECKS, f"{folder}: no check for cases of kind {case['kind']!r}"
    CHECKS[case["kind"]](folder, case)
