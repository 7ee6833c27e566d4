"""System `large-image-synthesis`: same weights and noise in, same images out as the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of, check_case
from .synthesis_conversion import check_conversion
from .synthesis_model import check_ldm_unet
from .synthesis_sampling import check_embedding_interpolation, check_panorama, check_patch_samplers
from .synthesis_training import check_training_loss

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "ldm_unet": check_ldm_unet,
    "embedding_interpolation": check_embedding_interpolation,
    "panorama": check_panorama,
    "patch_samplers": check_patch_samplers,
    "training_loss": check_training_loss,
}


# How the stored tensors were drawn, and figures of what came out: no parameters of the method.
DESCRIBING = frozenset(
    (
        "comment",
        "diffusers_equivalent",
        "dot_threshold",
        "grid",
        "groups",
        "guidance_formula",
        "offsets",
        "parameters",
        "scale_factor",
        "use_ema",
        "weights",
        "windows",
    )
)


@pytest.mark.parametrize(("folder", "case"), cases_of("large-image-synthesis", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)


@pytest.mark.parametrize(
    ("folder", "case"), [p for p in cases_of("large-image-synthesis", CHECKS) if p.values[1]["kind"] == "ldm_unet"]
)
def test_conversion(folder: Path, case: dict[str, Any]) -> None:
    check_conversion(folder, case)
