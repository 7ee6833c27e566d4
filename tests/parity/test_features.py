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
        "api",
        "axes_dim",
        "batch",
        "block",
        "category",
        "channel_discard",
        "context_in_dim",
        "depth",
        "depth_single_blocks",
        "ensemble_size",
        "features",
        "forward_feat_runs",
        "guidance_embed",
        "hidden_size",
        "in_channels",
        "index_rule",
        "latent_channels",
        "massive_channels",
        "min_top1_minus_top2_similarity",
        "mlp_ratio",
        "n_pairs",
        "n_windows",
        "num_heads",
        "num_patches_hw",
        "num_res_blocks",
        "out",
        "preprocessing",
        "qkv_bias",
        "randomness",
        "result",
        "seed",
        "spectrum",
        "steps",
        "t",
        "tap",
        "text_tokens",
        "theta",
        "timm_forward_intermediates_rel_diff",
        "timm_min_cosine",
        "vec_in_dim",
    )
)


@pytest.mark.parametrize(("folder", "case"), cases_of("features", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
