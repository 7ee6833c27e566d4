"""Cases of multistep solvers: momentum, DEIS, USF, LML, few-step grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling.core import run
from diffrep.sampling.schedules import (
    CosineVP,
    FewStepGrid,
    Flow,
    LinearVP,
    TableVP,
    TimeGrid,
    distinct_indices,
    power_spaced,
    spaced_times,
)
from diffrep.sampling.solvers import (
    Derivative,
    LevenbergMarquardt,
    deis,
    dpm_solver,
    flow_euler,
    ipndm,
    momentum,
    momentum_dpm,
    momentum_unipc,
    momentum_weights,
    rho_runge_kutta,
    unified,
    with_levenberg_marquardt,
    ddim_table,
)

from .cases import each
from .sampling_mixture import Mixture, assert_like, tensors_of


def check_schedule(schedule: Any, table: Tensor) -> None:
    """A case's noise schedule is the table that it has."""
    assert schedule["beta_schedule"] == "scaled_linear"
    betas = torch.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, schedule["num_train_timesteps"]) ** 2
    assert_like((1 - betas).cumprod(0), table, atol=1e-6, what="alphas_cumprod")


def check_ghvb(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, table = case["parameters"], inputs["alphas_cumprod"]
    check_schedule(p["schedule"], table)
    assert p["previous"].startswith("t - 1000//steps; below 0: alphas_cumprod[0]")
    timesteps, steps = p["timesteps"], p["steps"]
    assert len(timesteps) == steps
    previous = [t - len(table) // steps for t in timesteps]
    grid = TimeGrid.of(TableVP(table), [*timesteps, max(previous[-1], 0)]).ending(
        alpha=float(table[max(previous[-1], 0)]) ** 0.5, sigma=float(1 - table[max(previous[-1], 0)]) ** 0.5
    )
    model = Mixture(inputs)

    def check(key: str, method: str, order: float, prediction: str = "epsilon") -> None:
        kind = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data"}[prediction]
        solver = momentum(grid, method=method, order=order, raw_start=prediction != "epsilon")
        seen: dict[int, Tensor] = {}
        got = run(
            solver, model.of_table(table, kind), inputs["x_T"], prediction=prediction, after_step=seen.__setitem__
        )
        assert_like(got, expected[key], atol=2e-4, rtol=2e-4, what=key)
        if f"{key}_after4" in expected:
            assert_like(seen[3], expected[f"{key}_after4"], atol=2e-4, rtol=2e-4, what=f"{key} after 4 steps")

    for one in each(p["runs"]):
        check(one["key"], one["method"], one["order"])
    for key in ("v_official", "sample_official"):
        one = p[key]
        check(f"{one['method']}_{key}", one["method"], one["order"], one.get("prediction_type", "sample"))
    for key in [key for key in expected if key.startswith("mixer_")]:
        _, order, beta = key.split("_")
        oldest_first = momentum_weights(int(order), float(beta.replace("p", ".")))[::-1]
        got = torch.tensor(oldest_first) / (1.0 if MIXER_RAW else float(beta.replace("p", ".")))
        assert_like(got, expected[key], atol=1e-4, what=key)


MIXER_RAW = False
