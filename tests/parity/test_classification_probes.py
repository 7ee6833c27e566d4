"""System `classification-probes`: same weights in, same numbers out as the papers' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of
from .probes_adm import check_adm_checkpoint_inventory, check_adm_unet_blocks

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "adm_checkpoint_inventory": check_adm_checkpoint_inventory,
    "adm_unet_blocks": check_adm_unet_blocks,
}


@pytest.mark.parametrize(("folder", "case"), cases_of("classification-probes", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    assert case["kind"] in CHECKS, f"{folder}: no check for cases of kind {case['kind']!r}"
    CHECKS[case["kind"]](folder, case)
