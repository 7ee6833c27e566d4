"""System `features`: same weights in, same numbers out as the papers' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of, check_case
from .features_adm import check_dift_adm
from .features_backbones import check_dift_sd_taps, check_dinov2_extractor
from .features_ditf import check_ditf
from .features_fusion import check as check_copca_fusion
from .features_hyperfeatures import check_hyperfeatures_aggregation
from .features_protocols import (
    check_flow_sddino_tss,
    check_pck_dift_spair,
    check_pck_geoaware_spair,
    check_pck_hyperfeatures,
    check_pck_sddino_pascal,
    check_pck_sddino_spair,
)
from .features_soft_argmax import check as check_soft_argmax_window
from .features_swap import check as check_swap_nearest_patch
from .features_unets import check_gdf_layer_names, check_sd_taps_tiled

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "dift_sd_taps": check_dift_sd_taps,
    "hyperfeatures_aggregation": check_hyperfeatures_aggregation,
    "ditf": check_ditf,
    "dift_adm": check_dift_adm,
    "sd_taps_tiled": check_sd_taps_tiled,
    "gdf_layer_names": check_gdf_layer_names,
    "dinov2_extractor": check_dinov2_extractor,
    "copca_fusion": check_copca_fusion,
    "soft_argmax_window": check_soft_argmax_window,
    "pck_dift_spair": check_pck_dift_spair,
    "pck_sddino_spair": check_pck_sddino_spair,
    "pck_sddino_pascal": check_pck_sddino_pascal,
    "pck_geoaware_spair": check_pck_geoaware_spair,
    "pck_hyperfeatures": check_pck_hyperfeatures,
    "flow_sddino_tss": check_flow_sddino_tss,
    "swap_nearest_patch": check_swap_nearest_patch,
}


# How the stored tensors were drawn, and figures of what came out: no parameters of the method.
DESCRIBING = frozenset(
    (
        "features", "forward_feat_runs", "index_rule", "min_top1_minus_top2_similarity", "num_patches_hw",
        "preprocessing", "randomness", "result", "seed", "spectrum", "steps",
        "timm_forward_intermediates_rel_diff", "timm_min_cosine",
    )
)  # fmt: skip


@pytest.mark.parametrize(("folder", "case"), cases_of("features", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
