"""System `sampling`: the same states as the papers' own samplers on exact networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import sampling_continuous as continuous
from . import sampling_multistep as multistep
from . import sampling_networks as networks
from .cases import cases_of, check_case

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "autodiffusion": multistep.check_autodiffusion,
    "deediff": networks.check_deediff,
    "deepcache": networks.check_deepcache,
    "deis_coefficients": multistep.check_deis_coefficients,
    "deis_discrete": multistep.check_deis_discrete,
    "deis_sampling": multistep.check_deis_sampling,
    "evodiff": multistep.check_evodiff,
    "few_step_grid": multistep.check_few_step_grid,
    "fokker_planck": continuous.check_fokker_planck,
    "ghvb": multistep.check_ghvb,
    "interpolant_sampling": continuous.check_interpolant_sampling,
    "interpolants": continuous.check_interpolants,
    "lml": multistep.check_lml,
    "momentum_dpmpp": multistep.check_momentum_dpmpp,
    "mr_sampler": multistep.check_mr_sampler,
    "score_sde_ode_likelihood": continuous.check_score_sde_ode,
    "score_sde_pc": continuous.check_score_sde_pc,
    "score_sde_schedules": continuous.check_score_sde_schedules,
    "sit_paths": continuous.check_sit_paths,
    "sit_sampling": continuous.check_sit_sampling,
    "usf_decisions": multistep.check_usf,
}
# Words of the cases that say how the networks are called, which the checks' networks do.
DESCRIBING = frozenset(("model_interface",))


@pytest.mark.parametrize(("folder", "case"), cases_of("sampling", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
