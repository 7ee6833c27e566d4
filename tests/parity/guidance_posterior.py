"""Cases of posterior samplers: RED-diff's code base, FlowChef, PSLD, AFDPS, DiffusionMBIR."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.guidance import operators
from diffrep.guidance.core import Between, Network, guided
from diffrep.guidance.ensembles import afdps, karras_grid, reconstruct_volume
from diffrep.guidance.operators import Operator
from diffrep.guidance.posterior import (
    dps,
    flowchef,
    flowchef_latent,
    latent_inpainting,
    measured_start,
    optimise,
    pigdm,
    psld,
    red_diff,
    spaced_grid,
    through_decoder,
)
from diffrep.sampling.core import to_forms
from diffrep.sampling.schedules import Flow, TableVP, TimeGrid
from diffrep.sampling.score_sde import ScoreSDE

from . import guidance_released as released
from .cases import each, tensors_of
from .guidance_networks import Prior, load_unet, load_vae, run_tensors, stable_diffusion_schedule
from .guidance_operators import red_operator
from .sampling_mixture import assert_like

SCALE = 0.18215


RED_DIFF = {
    "lr": "lr", "grad_term_weight": "prior", "denoise_term_weight": "weighting", "sigma_x0": "spread",
    "obs_weight": "data_weight",
}  # fmt: skip


def check_red_diff(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    # all of single precision, levels too: where the network's answer is nearly the noise, Adam makes rounding large
    prior, table = Prior(inputs), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).astype(np.float32)

    def network(x: Tensor, t: float) -> Tensor:
        abar = torch.tensor(table[round(t)])
        return prior.noise(x, abar.sqrt(), (1 - abar).sqrt())

    shape = tuple(inputs["gmm.means"].shape[1:])
    for k, run in enumerate(each(case["runs"], describing=("sigma_y",))):  # y has its noise already
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        operator, noise = red_operator(run["deg"], shape, given.get("mask")), given["noise"]
        blank = operator(torch.zeros(len(given["y"]), *shape))
        y, grid = given["y"].view_as(blank), spaced_grid(TableVP(table), run["steps"])
        abars = torch.tensor([*table[grid.labels.astype(int)], np.float32(1)])
        grid = replace(grid, alpha=abars.sqrt().double().numpy(), sigma=(1 - abars).sqrt().double().numpy())
        clean: list[Tensor] = []
        if run["algo"] == "reddiff":
            run.get("eta")  # of the base class; no noise is added between steps that it could be of
            options = {ours: run[theirs] for theirs, ours in RED_DIFF.items() if theirs in run}
            if options.get("weighting") == "trunc_linear":
                options["weighting"] = "trunc"
            guide = red_diff(operator, y, lambda i, n=noise: (n[2 * i], n[2 * i + 1]), **options)
            start = measured_start(operator, y, grid, noise[1], options.get("spread", 0.0) * noise[0])
            tolerance = {"atol": 2e-3, "rtol": 1e-3}
        else:
            guide, start = (
                _pixel_guide(run, operator, y, given.get("mask")),
                measured_start(operator, y, grid, noise[0]),
            )
            tolerance = {"atol": 5e-4, "rtol": 1e-3}

        def watched(between: Any, guide: Any = guide, clean: list[Tensor] = clean) -> Tensor:
            clean.append(between.forms()["data"].detach())
            return guide(between)

        states = [start]
        result = guided(
            network, start, grid, watched, gradient=run["algo"] != "reddiff", noise=noise[1:],
            after_step=lambda i, x, states=states: states.append(x),
        )  # fmt: skip
        if run["algo"] == "reddiff":
            last = (states[-2] - float(grid.sigma[-2]) * noise[2 * grid.steps - 1]) / float(grid.alpha[-2])
            got = {"result": last, "mu": result, "x0_last": last}
        else:
            last = clean[-1]
            if run["algo"] == "pgdm" and run["deg"] == "in2":
                last = given["mask"] * y + (1 - given["mask"]) * last
            got = {"result": result, "x_after_first_step": states[1], "x0_last": last}
        for name, value in wanted.items():
            assert_like(got[name], value, **tolerance, what=f"run {k}: {name}")


def _pixel_guide(run: Any, operator: Operator, y: Tensor, mask: Tensor | None) -> Any:
    if run["algo"] == "dps":
        weight, original = run["grad_term_weight"], run["original"]  # the weight is that of `original` alone
        return dps(operator, y, weight=weight if original else 1.0, eta=run["eta"], normalised=original)
    assert run["algo"] == "pgdm", run["algo"]
    assert run.get("awd", True), "awd False is not described"
    keep = mask if run["deg"] == "in2" else None
    return pigdm(
        operator, y, weight=run["grad_term_weight"], eta=run["eta"], keep=keep, contrast=1500.0 * (run["deg"] == "hdr")
    )


def check_flowchef_pixel(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    prior = Prior(inputs)

    def network(x: Tensor, t: float) -> Tensor:
        return (x - prior.data(x, 1 - t, t)) / t

    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        steps, shape = run["steps"], tuple(given["reference"].shape[1:])
        operator = released.flowchef_operator(run["operator"], shape, run)
        mask = operator(torch.ones(1, *shape)) if run["operator"] == "box" else None
        assert_like(operator(given["reference"]), given["y"], atol=1e-5, what="measurement")
        grid = TimeGrid.of(Flow(), [1 - 1e-5, *(np.arange(steps - 1, -1, -1) / steps)])
        guide = flowchef(operator, given["y"], scale=run["gradient_scale"], mask=mask, mean=not run["no_mean_loss"])
        states, clean = [], []

        def watched(between: Any, guide: Any = guide, clean: list[Tensor] = clean) -> Tensor:
            clean.append(between.forms()["data"])
            return guide(between)

        got = {
            "result": guided(
                network, given["start"], grid, watched, prediction="flow_prediction",
                after_step=lambda i, x, states=states: states.append(x),
            ),
            "x0_first": clean[0],
            "trajectory_1": states[0],
        }  # fmt: skip
        for name, value in wanted.items():
            assert_like(got[name], value, atol=5e-4, rtol=1e-4, what=f"run {k}: {name}")


def check_flowchef_latent(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    unet, vae = load_unet(folder, case), load_vae(folder, case)
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        times = 1 - np.arange(run["steps"] + 1) / run["steps"]
        grid = TimeGrid.of(Flow(), times, labels=1000 * times[:-1])

        def velocity(name: str, given: Any = given) -> Any:
            return lambda x, t: -unet(x, t, given[name])  # the network points to the data

        positive, negative, w = velocity("positive"), velocity("negative"), run["guidance"]
        faint = torch.zeros_like(given["start"], dtype=torch.bool)  # where rounding may choose the sign of a step
        options = {"lr": run["learning_rate"], "rounds": run["optimization_steps"], "until": run["max_steps"]}
        if run["task"] == "edit":
            result = flowchef_edit(
                positive, negative, given["start"], grid, given["source_latent"], given["keep"], guidance=w,
                source_steps=run["full_source_steps"], **options,
            )  # fmt: skip
        else:

            def network(x: Tensor, t: float, w: float = w, towards: Any = positive, away: Any = negative) -> Tensor:
                if w <= 1:
                    return towards(x, t)
                lower = away(x, t)
                return lower + w * (towards(x, t) - lower)

            if run["task"] == "inpaint":
                distance = latent_inpainting(given["masked_latents"], given["mask"])

                def feel(slope: Tensor, faint: Tensor = faint) -> None:
                    faint.logical_or_((slope != 0) & (slope.abs() < 1e-7))

                def loss(data: Tensor, distance: Any = distance, feel: Any = feel) -> Tensor:
                    data.register_hook(feel)
                    return distance(data)
            else:
                image = vae.decode(given["start"] / SCALE).sample
                operator = released.flowchef_operator(run["task"], tuple(image.shape[1:]), run)
                loss = through_decoder(operator, given["y"], lambda z: vae.decode(z / SCALE).sample)
            guide = flowchef_latent(loss, **options)
            result = guided(network, given["start"], grid, guide, prediction="flow_prediction")
        assert not faint.any() or "elements whose gradient is below 1e-7 may differ" in case["tolerance"]["result"]
        assert_like(result[~faint], wanted["result"][~faint], atol=2e-3, rtol=1e-3, what=f"run {k}")
        assert_like(result[faint], wanted["result"][faint], atol=run["learning_rate"], what=f"run {k}, faint")


def flowchef_edit(
    positive: Network,
    negative: Network,
    x: Tensor,
    grid: TimeGrid,
    source: Tensor,
    keep: Tensor,
    *,
    guidance: float = 2.0,
    lr: float = 0.5,
    rounds: int = 5,
    until: int | None = None,
    source_steps: int = 20,
) -> Tensor:
    """FlowChef's editing without inversion: both velocities `eps - x0` are seen, guidance is on the second."""
    seen: dict[str, Tensor] = {}

    def network(state: Tensor, t: float) -> Tensor:
        towards, seen["away"] = positive(state, t), negative(state, t)
        return towards + (1 - keep) * (towards - seen["away"]) * guidance

    def guide(between: Between) -> Tensor:
        if until is not None and between.step > until:
            return between.ahead()
        where = torch.ones_like(keep) if between.step < source_steps else keep
        loss, away = latent_inpainting(source, where, 1e-5), seen["away"]

        def of(state: Tensor) -> Tensor:
            return loss(to_forms("flow_prediction", away, state, *between.now)["data"])

        return between.ahead(optimise(of, between.x, lr=lr, rounds=rounds))

    return guided(network, x, grid, guide, prediction="flow_prediction", name="FlowChef")


def check_psld(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    unet, vae, schedule = load_unet(folder, case), load_vae(folder, case), stable_diffusion_schedule()
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        image = tuple(vae.decode(given["start"] / SCALE).sample.shape[1:])
        if run["operator"] == "inpaint":  # goes back through the identity
            mask = given["mask"]
            operator = Operator("DPS's inpainting", image, lambda x, m=mask: m * x, lambda y: y)
        elif run["operator"] == "sr":
            # the case's super-resolution averages; it goes back by nearest upsampling
            operator = released.flowchef_super_resolution(image, run["factor"])
        else:
            assert run["operator"] == "gauss", run["operator"]
            operator = released.dps_blur(image, run["kernel_size"], run["sigma"])
        stride = 1000 // run["steps"]
        grid = TimeGrid.of(schedule, [*(1 + np.arange(0, 1000, stride))[::-1], 0])
        guide = psld(
            operator, given["y"], lambda z: vae.decode(z / SCALE).sample,
            lambda x: SCALE * vae.encode(x).latent_dist.mean, glue_weight=run["gamma"], weight=run["omega"],
        )  # fmt: skip
        states, clean = [], []

        def watched(between: Any, guide: Any = guide, clean: list[Tensor] = clean) -> Tensor:
            clean.append(between.forms()["data"].detach())
            return guide(between)

        guided(
            lambda x, t, c=given["cond"]: unet(x, t, c), given["start"], grid, watched, gradient=True,
            after_step=lambda i, x, states=states: states.append(x),
        )  # fmt: skip
        assert_like(torch.cat(states), wanted["latents"], atol=2e-3, rtol=1e-3, what=f"run {k}: latents")
        assert_like(clean[-1], wanted["x0_last"], atol=2e-3, rtol=1e-3, what=f"run {k}: x0")


def check_afdps(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        prior, indices = Prior(given, double=True), given.get("resampled_indices")
        operator = operators.inpainting(given["mask"][0], channels=given["mask"].shape[1])
        assert given["start"].shape[0] == run["particles"]
        assert given["start"].shape[-1] == run["size"]
        grid, drawn = karras_grid(run["steps"], run["sigma_min"], run["sigma_max"]), []

        def resample(number: int, shares: Tensor, indices: Any = indices, drawn: list[int] = drawn) -> Tensor:
            drawn.append(number)
            return indices[number].long()

        log_weights = given["start"].new_zeros(run["particles"])
        guide = afdps(
            operator, given["y"], log_weights, sigma_y=run["sigma_y"], at=run["likelihood_at"],
            widening=run["guidance_gamma"], resample=resample if run["resample"] else None, threshold=run["threshold"],
        )  # fmt: skip
        particles = guided(
            lambda x, t, p=prior: p.data(x, 1.0, t), given["start"], grid, guide, prediction="sample",
            noise=given["noise"],
        )  # fmt: skip
        assert len(drawn) == (0 if indices is None else len(indices)), f"run {k}: resampled {len(drawn)} times"
        assert_like(torch.from_numpy(grid.times), wanted["times"], atol=1e-5, rtol=1e-5, what="times")
        assert_like(particles, wanted["particles"], atol=1e-3, rtol=1e-3, what=f"run {k}: particles")
        assert_like(log_weights, wanted["log_weights"], atol=1e-2, rtol=1e-3, what=f"run {k}: log-weights")


def check_mbir(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        sde = ScoreSDE("ve", sigma_min=run["sigma_min"], sigma_max=run["sigma_max"], steps=run["steps"])
        prior, side = Prior(given), run["size"]
        # two views: sums of the rows, then of the columns
        operator = operators.projections((1, side, side), (-90, 0), scale=side**-0.5)
        assert given["y"].shape == (run["slices"], 1, 2, side)

        def score(x: Tensor, t: float, sde: ScoreSDE = sde, prior: Prior = prior) -> Tensor:
            sigma = float(sde.sigma(t))
            return -prior.noise(x, 1.0, sigma) / sigma

        start = given["prior"] * run["sigma_max"]
        result = reconstruct_volume(
            sde, score, operator, given["y"], start, iter(given["noise"].flatten(0, 1)), snr=run["snr"],
            rho=run["rho"], smoothness=run["lambda"], final_consistency=run["final_consistency"],
        )  # fmt: skip
        assert_like(result, wanted["result"], atol=2e-3, rtol=1e-3, what=f"run {k}")
