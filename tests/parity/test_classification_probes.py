"""System `classification-probes`: same weights in, same numbers out as the papers' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import cases_of, check_case
from .probes_adm import check_adm_checkpoint_inventory, check_adm_unet_blocks
from .probes_heads import (
    check_diffeed_end_to_end,
    check_difformer_end_to_end,
    check_difformer_from_features,
    check_heads_attention,
    check_heads_linear_mlp,
)
from .probes_protocols import (
    check_ddpm_seg_pixel_features,
    check_knn,
    check_preprocess,
    check_probe3d_heads,
    check_train_recipe,
)

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "adm_checkpoint_inventory": check_adm_checkpoint_inventory,
    "adm_unet_blocks": check_adm_unet_blocks,
    "heads_linear_mlp": check_heads_linear_mlp,
    "heads_attention": check_heads_attention,
    "difformer_from_features": check_difformer_from_features,
    "difformer_end_to_end": check_difformer_end_to_end,
    "diffeed_end_to_end": check_diffeed_end_to_end,
    "ddpm_seg_pixel_features": check_ddpm_seg_pixel_features,
    "knn": check_knn,
    "preprocess": check_preprocess,
    "train_recipe": check_train_recipe,
    "probe3d_heads": check_probe3d_heads,
}


DESCRIBING = frozenset(("classifier", "names", "noise", "token_grid"))  # texts, and a shape that the tensors have


@pytest.mark.parametrize(("folder", "case"), cases_of("classification-probes", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
