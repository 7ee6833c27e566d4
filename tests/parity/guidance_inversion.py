"""Cases of inversion: null-text, BDIA, EDICT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.guidance.core import Network
from diffrep.guidance.inversion import METHODS, Pair, invert, leading_grid, optimise_null, regenerate
from diffrep.sampling.schedules import TimeGrid

from .cases import each, tensors_of
from .guidance_networks import load_unet, run_tensors, stable_diffusion_schedule, under_guidance
from .sampling_mixture import assert_like


def check_null_text(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    # double precision adds nothing to the rounding of the published numbers, which guidance makes large
    unet, schedule = load_unet(folder, case, torch.float64), stable_diffusion_schedule()
    for k, run in enumerate(each(case["runs"], describing=("max_difference_of_diffusers_DDIMInverseScheduler",))):
        given, wanted = {n: v.double() for n, v in run_tensors(inputs, k).items()}, run_tensors(expected, k)
        grid = leading_grid(schedule, run["steps"], offset=run["steps_offset"])
        assert grid.labels.tolist() == run["timesteps"]
        condition, null = given["cond"], given["uncond"]
        pivots = [x for x, _ in invert(lambda x, t, c=condition: unet(x, t, c), given["latent"], grid)]
        assert_like(torch.cat(pivots), wanted["ddim_latents"], atol=1e-4, rtol=1e-4, what="pivots")
        reports: list[tuple[int, float]] = []
        embeddings, final = optimise_null(
            unet, pivots, grid, condition, null, guidance=run["guidance"], rounds=run["inner_steps"],
            tolerance=run["early_stop_epsilon"], report=lambda i, n, loss, seen=reports: seen.append((n, loss)),
        )  # fmt: skip
        assert_like(torch.cat(embeddings), wanted["null_embeddings"], atol=2e-3, what="embeddings")
        assert_like(final, wanted["final"], atol=2e-3, what="final")
        guided = under_guidance(unet, condition, null, run["guidance"])
        plain = regenerate(guided, (pivots[-1], pivots[-1]), grid)[0]
        assert_like(plain, wanted["final_without_optimization"], atol=1e-4, rtol=1e-4, what="without")
        for i, ((used, loss), steps, last) in enumerate(
            zip(reports, wanted["inner_steps_used"].tolist(), wanted["last_loss"].tolist(), strict=True)
        ):
            threshold = run["early_stop_epsilon"] + 2e-5 * i
            near = abs(last - threshold) < 0.01 * threshold
            assert abs(used - steps) <= int(near), f"step {i}: {used} rounds instead of {steps:g}"
            assert near or abs(loss - last) <= 1e-3 + 0.05 * abs(last), f"step {i}: loss {loss} instead of {last}"


def released_grids(table: np.ndarray, steps: int, strength: float) -> list[TimeGrid]:
    """The grid of each step of BDIA and EDICT as released, alike where `steps` divides the table's length.

    Where not, more timesteps than `steps` may fit below the length, and a step leads down by the exact quotient, in
    single precision: past the next timestep, to an abar between two entries with their weights swapped.
    """
    total = len(table)
    times = [*range(0, total, total // steps)][::-1][steps - int(steps * strength) :]
    stride, grids = np.float32(total / steps), []

    def abar(t: np.float32) -> float:
        low, share = int(np.floor(t)), float(t - np.floor(t))
        return float(table[0] if t < 0 else table[low] * share + table[int(np.ceil(t))] * (1 - share))

    for i in range(len(times)):
        places = np.array([*times, 0, 0], np.float32)
        places[i + 1] = places[i] - stride
        places[i + 2] = places[i + 1] - stride
        places = places[:-1]
        abars = np.array([abar(place) for place in places])
        alpha, sigma = abars**0.5, (1 - abars) ** 0.5
        exact = places.astype(np.float64)
        grids.append(TimeGrid(exact, alpha, sigma, exact[:-1], np.log(alpha / sigma)))
    return grids


def walk(network: Network, pair: Pair, grids: list[TimeGrid], method: str, *, down: bool, **options: Any) -> Pair:
    """All steps of a way, each on its grid."""
    for i in range(len(grids)) if down else reversed(range(len(grids))):
        pair = METHODS[method](network, grids[i], **options)[down](pair, i)
    return pair


@torch.no_grad()
def check_exact(folder: Path, case: dict[str, Any]) -> None:
    """BDIA and EDICT, whose cases have one shape."""
    inputs, expected = tensors_of(folder)
    unet, schedule = load_unet(folder, case, torch.float64), stable_diffusion_schedule()
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        latent, null = given["latent"].double(), given["uncond"]
        grids = released_grids(schedule.table, run["steps"], run["strength"])
        source, target = (under_guidance(unet, given[n], null, run["guidance"]) for n in ("source", "target"))
        got: dict[str, tuple[Tensor, ...]] = {}
        method, options = "edict", {}
        if case["kind"] == "bdia_inversion":
            method, options = "bdia", {"gamma": run["gamma"]}
        else:
            options = {"mix": run["mix_weight"], "leapfrog": run["leapfrog"]}
            got["inverted_ddim_baseline"] = (walk(source, (latent, latent), grids, "ddim", down=False)[0],)
        got["inverted"] = pair = walk(source, (latent, latent), grids, method, down=False, **options)
        for name, network in (("reconstructed", source), ("edited", target)):
            got[name] = walk(network, pair, grids, method, down=True, **options)
        if len(schedule.table) % run["steps"] == 0:  # and so do ours, on the grid of all steps
            grid = leading_grid(schedule, run["steps"], strength=run["strength"])
            assert_like(
                torch.cat(invert(source, latent, grid, method, **options)[-1]), torch.cat(pair), atol=1e-9, what="up"
            )
            back = regenerate(target, pair, grid, method, **options)
            assert_like(torch.cat(back), torch.cat(got["edited"]), atol=1e-9, rtol=1e-9, what="down")
        for name, value in wanted.items():
            assert_like(torch.cat(got[name]), value.double(), atol=1e-6, rtol=1e-6, what=name)
