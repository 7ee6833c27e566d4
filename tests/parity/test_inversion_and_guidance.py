"""System `inversion-and-guidance`: what the published codes compute between two steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import guidance_composition as composition
from . import guidance_inversion as inversion
from . import guidance_operators as measured
from . import guidance_posterior as posterior
from .cases import cases_of, check_case

CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "afdps": posterior.check_afdps,
    "bdia_inversion": inversion.check_exact,
    "cow": composition.check_cow,
    "depth_completion": composition.check_completion,
    "diffusion_mbir": posterior.check_mbir,
    "edict_inversion": inversion.check_exact,
    "flowchef_latent": posterior.check_flowchef_latent,
    "flowchef_pixel": posterior.check_flowchef_pixel,
    "measurement_operators": measured.check_operators,
    "null_text_inversion": inversion.check_null_text,
    "posterior_sampling_pixel": posterior.check_red_diff,
    "psld": posterior.check_psld,
    "sara_optimizer": composition.check_sara,
    "superdiff": composition.check_superdiff,
}
# What a case says beside its parameters; the error of its result, of a truth that is not stored.
DESCRIBING = frozenset(("sources", "truth_error"))


@pytest.mark.parametrize(("folder", "case"), cases_of("inversion-and-guidance", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)


def test_steps_that_do_not_divide_the_table() -> None:
    """BDIA and EDICT as released then have one timestep more, and abars between entries under swapped weights."""
    table = inversion.stable_diffusion_schedule().table
    last, grid = (inversion.released_grids(table, 12, 0.5)[i] for i in (-1, 0))
    assert grid.times.astype(int).tolist() == [498, 414, 331, 249, 166, 83, 0, 0]
    assert grid.alpha[1] ** 2 == pytest.approx(table[414] * 2 / 3 + table[415] / 3, abs=1e-6)
    assert last.alpha[-1] ** 2 == pytest.approx(table[0])
    pair = (torch.ones(1, 2).double(), torch.zeros(1, 2).double())
    grids = inversion.released_grids(table, 12, 0.5)
    noise = inversion.walk(lambda x, t: (x + t).sin(), pair, grids, "edict", down=False)
    back = inversion.walk(lambda x, t: (x + t).sin(), noise, grids, "edict", down=True)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(pair, back, strict=True))
