"""System `features`: same weights in, same numbers out as the papers' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of
from .features_backbones import check_dift_sd_taps, check_dinov2_extractor

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "dift_sd_taps": check_dift_sd_taps,
    "dinov2_extractor": check_dinov2_extractor,
}


@pytest.mark.parametrize(("folder", "case"), cases_of("features", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    assert case["kind"] in CHECKS, f"{folder}: no check for cases of kind {case['kind']!r}"
    CHECKS[case["kind"]](folder, case)
