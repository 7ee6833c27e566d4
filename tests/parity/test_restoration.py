"""System `restoration-and-few-step`: the same numbers as the restorers' and distillers' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import restoration_adapters as adapters
from . import restoration_degradation as degradation
from . import restoration_few_step as few_step
from . import restoration_pixels as pixels
from . import restoration_processes as processes
from .cases import cases_of, check_case

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "bicubic": pixels.check_bicubic,
    "colour_fix": pixels.check_colour_fix,
    "degradation_estimator": adapters.check_degradation_estimator,
    "degradation_parts": degradation.check_degradation_parts,
    "degradation_pipeline": degradation.check_degradation_pipeline,
    "image_metrics": pixels.check_image_metrics,
    "latent_tiles": pixels.check_latent_tiles,
    "lcm_scheduler": few_step.check_lcm_scheduler,
    "lcm_training": few_step.check_lcm_training,
    "pisa_sr": adapters.check_pisa_sr,
    "rddm": processes.check_rddm,
    "resshift_sampling": processes.check_resshift_sampling,
    "resshift_schedule": processes.check_resshift_schedule,
    "s3diff": adapters.check_s3diff,
    "sinsr": processes.check_sinsr,
    "tad_sr_hsd": processes.check_tad_sr_hsd,
}


@pytest.mark.parametrize(("folder", "case"), cases_of("restoration-and-few-step", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case)
