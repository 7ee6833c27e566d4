"""Checkers of system `restoration-and-few-step`: ResShift, SinSR, TAD-SR, RDDM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.heads.restoration.residual import (
    Network,
    ResidualDiffusion,
    even_times,
    hsd_gradient,
    rddm,
    resshift,
    sinsr_losses,
)

from .cases import each, tensors_of


def near(got: Tensor, expected: Tensor, tolerance: Mapping[str, float], what: str) -> None:
    limits = {"atol": 0.0, "rtol": 0.0} | tolerance
    torch.testing.assert_close(got.to(expected), expected, **limits, msg=lambda text: f"{what}: {text}")


def compare(
    got: Mapping[str, Tensor], expected: dict[str, Tensor], tolerance: Mapping[str, float], prefix: str = ""
) -> None:
    """Each of a run's tensors is near the expected one, which is taken out of those that are left to compare."""
    for name, value in got.items():
        near(value.detach(), expected.pop(f"{prefix}{name}"), tolerance, f"{prefix}{name}")
    left = [name for name in expected if prefix and name.startswith(prefix)]
    assert not left, f"nothing was computed for {', '.join(left)}"


def process_of(run: Any, **options: Any) -> ResidualDiffusion:
    names = ("min_noise_level", "kappa", "power", "etas_end")
    if predicts := run.get("predict_type"):
        options["predicts"] = predicts
    process = resshift(run["steps"], **{name: run[name] for name in names}, **options)
    if (steps := run.get("respace")) is not None:
        process = process.respaced(steps)
    if "timestep_map" in run:
        assert process.timesteps.tolist() == run["timestep_map"]
    return process


def check_resshift_schedule(folder: Path, case: dict[str, Any]) -> None:
    _, expected = tensors_of(folder)
    for run in each(case["runs"]):
        process, other = process_of(run), process_of(run, sinsr=True)
        by_state, by_residual, by_clean, variance = process.posterior
        assert float(by_residual.abs().max()) < 1e-12
        got = {
            "sqrt_etas": process.spread / run["kappa"],
            "etas": process.shift,
            "alpha": process.increments[0],
            "posterior_mean_coef1": by_state,
            "posterior_mean_coef2": by_clean,
            "posterior_variance": variance,
            "posterior_log_variance_clipped": process.log_variance,
            "weight_loss_mse": process.weights("xstart"),
            "weight_loss_mse_epsilon": process.weights("epsilon"),
            "sinsr_sqrt_etas": other.spread / run["kappa"],
        }
        compare(got, expected, case["tolerance"], f"{run['index']}.")
    assert not expected


def toy(inputs: Mapping[str, Tensor], prefix: str, lq: Tensor) -> Network:
    weight, bias, slope = (inputs[f"{prefix}{name}"] for name in ("W", "b", "v"))

    def network(state: Tensor, t: int | Tensor) -> Tensor:
        times = torch.as_tensor(t).to(state).view(-1, 1, 1, 1)
        return F.conv2d(torch.cat([state, lq], 1), weight, bias, padding=1) + 0.1 * times * slope.view(1, -1, 1, 1)

    return network


def first_stage(inputs: Mapping[str, Tensor], index: int, factor: int) -> tuple[Any, Any]:
    encoder, decoder = inputs[f"{index}.encoder"], inputs[f"{index}.decoder"]
    return (
        lambda image: F.conv2d(image, encoder, stride=factor),
        lambda latent: F.conv_transpose2d(latent, decoder, stride=factor),
    )


def check_resshift_sampling(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    assert "0.1 * t * v, t = original timestep" in case["parameters"]
    for run in each(case["runs"]):
        i, factor, scale = run["index"], run["sf"], run["scale_factor"]
        process = process_of(run)
        lq = inputs[f"{i}.lq"]
        network, (encode, decode) = toy(inputs, f"{i}.", lq), first_stage(inputs, i, factor)
        degraded = scale * encode(F.interpolate(lq, scale_factor=factor, mode="bicubic"))
        steps = list(process.sample(network, degraded, inputs[f"{i}.prior_noise"], list(inputs[f"{i}.step_noise"])))
        clean, t, noise = scale * encode(inputs[f"{i}.gt"]), inputs[f"{i}.t"], inputs[f"{i}.train_noise"]
        noisy = process.noisy(clean, degraded, noise, t)
        got = {
            "z_y": degraded,
            "samples": torch.stack([state for state, _ in steps]),
            "pred_xstart": torch.stack([estimate for _, estimate in steps]),
            "decoded": decode(1 / scale * steps[-1][0]),
            "train_z_t": noisy,
            "train_pred_x0": process.ask(network, noisy, degraded, t)[-1],
            "train_mse": process.losses(network, clean, degraded, noise, t, weighted=run["weighted_mse"]),
            "scaled_input": process.scaled(noisy, t),
        }
        compare(got, expected, case["tolerance"], f"{i}.")
    assert not expected


def check_sinsr(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    assert "scale_factor 1, clip off" in case["parameters"]
    for run in each(case["runs"]):
        i, factor = run["index"], run["sf"]
        process, lq = process_of(run, sinsr=True), inputs[f"{i}.lq"]
        inputs[f"{i}.student_W"].requires_grad_(True)
        student, teacher = toy(inputs, f"{i}.student_", lq), toy(inputs, f"{i}.teacher_", lq)
        encode, decode = first_stage(inputs, i, factor)
        degraded = encode(F.interpolate(lq, scale_factor=factor, mode="bicubic"))
        clean, noise = encode(inputs[f"{i}.gt"]), inputs[f"{i}.noise"]
        start = process.prior(degraded, noise)
        *_, (taught, _) = process.sample(teacher, degraded, noise)
        losses = sinsr_losses(process, student, taught.detach(), clean, degraded, noise)
        total = torch.stack(list(losses.values())).sum(0)
        (gradient,) = torch.autograd.grad(total.mean(), inputs[f"{i}.student_W"])
        got = {f"loss_{name}": loss for name, loss in losses.items()} | {
            "sqrt_etas": process.spread / run["kappa"],
            "one_step_image": decode(process.ask(student, start, degraded, len(process) - 1)[-1]),
            "teacher_steps": torch.stack([state for state, _ in process.sample(teacher, degraded, noise)]),
            "inverse_zT": process.invert(teacher, clean, degraded),
            "z_T": start,
            "loss": total,
            "grad_W": gradient,
        }
        compare(got, expected, case["tolerance"], f"{i}.")
    assert not expected


def check_tad_sr_hsd(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    assert "called with t unchanged (no respacing)" in case["parameters"]
    for run in each(case["runs"]):
        i = run["index"]
        process, seen = process_of(run, sinsr=True), []
        network = toy(inputs, f"{i}.", inputs[f"{i}.lq"])

        def teacher(state: Tensor, t: Any, network: Network = network, seen: list[Tensor] = seen) -> Tensor:
            seen.append(network(state, t))
            return seen[-1]

        names = ("student_x0", "teacher_x0", "z_y", "noise", "t")
        student, taught, degraded, noise, t = (inputs[f"{i}.{name}"] for name in names)
        gradient, loss = hsd_gradient(process, teacher, student, taught, degraded, noise, t)
        got = {
            "student_mixed": process.noisy(student, degraded, noise, t),
            "teacher_pred_of_student": seen[0],
            "grad": gradient,
            "loss": loss,
        }
        compare(got, expected, case["tolerance"], f"{i}.")
    assert not expected


def check_rddm(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    assert "0.001 * t * v" in case["parameters"]
    for run in each(case["runs"]):
        i, objective, steps = run["index"], run["objective"], run["sampling_timesteps"]
        process = rddm(run["timesteps"], run["sum_scale"], predicts=objective)
        assert run["sampler"] == ("posterior (all steps)" if steps == run["timesteps"] else "ddim, eta 0")
        degraded, clean = (inputs[f"{i}.{name}"] * 2 - 1 for name in ("input", "gt"))
        weight, bias, slope = (inputs[f"{i}.{name}"] for name in ("W", "b", "v"))

        def network(
            state: Tensor, t: Any, *, weight: Tensor = weight, bias: Tensor = bias, slope: Tensor = slope,
            degraded: Tensor = degraded,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            times = torch.as_tensor(t).to(state).view(-1, 1, 1, 1)
            output = F.conv2d(torch.cat([state, degraded], 1), weight, bias, padding=1)
            return (output + 0.001 * times * slope.view(1, -1, 1, 1)).split(3, 1)

        noises = list(inputs[f"{i}.step_noise"]) if f"{i}.step_noise" in inputs else []
        first, times = inputs[f"{i}.first_noise"], even_times(len(process), steps)
        walk = process.sample(network, degraded, first, noises if steps == len(process) else None, times=times)
        states = [process.prior(degraded, first), *(state for state, _ in walk)]
        t, noise = inputs[f"{i}.t"], inputs[f"{i}.train_noise"]
        noisy = process.noisy(clean, degraded, noise, t)
        parts = process.parts(network(noisy, t), noisy, degraded, t)
        squared = {"l1": False, "l2": True}[run["loss_type"]]
        by_state, by_residual, by_clean, variance = process.posterior
        alpha, beta2 = process.increments
        got = {
            "samples": (torch.stack(states) + 1) / 2,
            "q_sample": noisy,
            "pred_res": parts[0],
            "pred_noise": parts[1],
            "pred_x_start": parts[2],
            "loss": process.absolute_loss(network(noisy, t), clean, degraded, noise, squared=squared)[None],
        }
        if f"{i}.alphas" in expected:
            got |= {
                "alphas": alpha, "alphas_cumsum": process.shift, "betas2": beta2, "betas_cumsum": process.spread,
                "posterior_mean_coef1": by_state, "posterior_mean_coef2": by_residual,
                "posterior_mean_coef3": by_clean, "posterior_variance": variance,
            }  # fmt: skip
        compare(got, expected, case["tolerance"], f"{i}.")
    assert not expected
