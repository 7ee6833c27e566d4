"""System `large-image-synthesis`: same weights and noise in, same images out as the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of, check_case, tensors_of
from .synthesis_conversion import check_conversion
from .synthesis_model import check_ldm_unet
from .synthesis_sampling import check_embedding_interpolation, check_panorama, check_patch_samplers
from .synthesis_training import check_training_loss


def check_network_and_conversion(folder: Path, case: dict[str, Any]) -> None:
    """The networks as a folder has them, and as they are converted from the authors' checkpoint."""
    given, expected = tensors_of(folder)
    check_ldm_unet(folder, case, given, expected)
    check_conversion(folder, case, given, expected)


CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "ldm_unet": check_network_and_conversion,
    "embedding_interpolation": check_embedding_interpolation,
    "panorama": check_panorama,
    "patch_samplers": check_patch_samplers,
    "training_loss": check_training_loss,
}


# Words for people: what a formula is called elsewhere, which of the inputs holds a parameter.
DESCRIBING = frozenset(("comment", "diffusers_equivalent", "offsets"))


@pytest.mark.parametrize(("folder", "case"), cases_of("large-image-synthesis", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
