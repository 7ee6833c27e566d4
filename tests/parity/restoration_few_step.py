"""Checkers of system `restoration-and-few-step`: latent consistency models."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import LCMScheduler
from torch import Tensor

from diffrep.backbones.latent_diffusion import guidance_embedding
from diffrep.sampling.schedules import boundary
from diffrep.table_scheduler import TableScheduler
from diffrep.training.consistency import DiffusionPath, Distillation, distillation_terms

from .cases import each
from .diffdis_unet import part, tensors_of
from .restoration_pixels import stable_diffusion_schedule
from .restoration_processes import near

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def check_lcm_scheduler(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    limits = {name: case["tolerance"][name] for name in ("atol", "rtol")}
    for said in ("scaled_linear betas 0.00085..0.012", "sigma_data 0.5", "timestep_scaling 10"):
        assert said in case["parameters"]
    checked = 0

    def check(name: str, value: Tensor, tolerance: dict[str, float] = limits) -> None:
        nonlocal checked
        near(value, expected[name], tolerance, name)
        checked += 1

    for run in each(case["runs"]):
        i = run["index"]
        config = CONFIG | {"prediction_type": run.get("prediction_type", "epsilon")}
        options = {"steps_offset": 1, "original_inference_steps": run["original"]}
        scheduler: Any = LCMScheduler(**config, **options, clip_sample=False, set_alpha_to_one=False)
        scheduler.set_timesteps(run["steps"], strength=run.get("strength", 1.0))
        state, noises = inputs[f"{i}.start"], list(inputs.get(f"{i}.noise", ()))
        states, denoised, scalings = [], [], []
        with patch("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, noises=noises, **n: noises.pop(0)):
            for t, output in zip(scheduler.timesteps, inputs[f"{i}.model_outputs"], strict=True):
                scalings.append(torch.stack([*map(torch.as_tensor, boundary(t.double()))]))
                state, clean = scheduler.step(output, t, state, return_dict=False)
                states.append(state)
                denoised.append(clean)
        assert not noises
        if (run["original"], run.get("strength")) == (50, None):  # the same as a table of ours
            ours = TableScheduler.from_config(config, sampler="lcm")
            ours.set_timesteps(run["steps"])
            assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
            state, noises = inputs[f"{i}.start"], [*inputs.get(f"{i}.noise", ()), None]
            for number, (t, output) in enumerate(zip(ours.timesteps, inputs[f"{i}.model_outputs"], strict=True)):
                state = ours.step(output, t, state, variance_noise=noises[number]).prev_sample
                near(state, expected[f"{i}.prev_sample"][number], limits, f"{i}: our state {number}")
        check(f"{i}.timesteps", scheduler.timesteps)
        check(f"{i}.prev_sample", torch.stack(states))
        check(f"{i}.denoised", torch.stack(denoised))
        for number, name in enumerate(("c_skip", "c_out")):
            check(f"{i}.{name}", torch.stack(scalings)[:, number])
    for name in expected:
        if name.startswith("w_embedding_"):
            check(name, guidance_embedding(inputs["w"], int(name.rsplit("_", 1)[1])), {"atol": 2e-3})
        elif name.startswith("solver_") and name.endswith(".timesteps"):
            steps = int(name.split(".")[0].split("_")[1])
            path = DiffusionPath(stable_diffusion_schedule().alphas_cumprod, "epsilon")
            names = ("timesteps", "alpha_cumprods", "alpha_cumprods_prev")
            for column, values in zip(names, path.teacher_steps(steps), strict=True):
                check(f"solver_{steps}.{column}", values)
    for name, value in zip(
        ("train_c_skip", "train_c_out"), boundary(inputs["scaling_timesteps"].double()), strict=True
    ):
        check(name, value)
    assert "2e-3" in case["tolerance"]["embedding"]
    assert checked == len(expected)


def check_lcm_training(folder: Path, case: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    inputs, expected = tensors_of(folder)
    parameters = case["parameters"]
    case["parameters"]["unet"].read_all()
    dim = int(parameters["student and target"].rsplit(" ", 1)[1])
    assert parameters["schedule"].startswith("scaled_linear 0.00085..0.012")
    assert parameters["context"]
    alphas = stable_diffusion_schedule().alphas_cumprod.float()

    def network(kind: str, conditioned: bool) -> Any:
        weights = {k: v.float() for k, v in part(inputs, f"net.{kind}.").items()}
        if not conditioned:
            weights.pop("time_embedding.cond_proj.weight", None)
        unet = UNet2DConditionModel(**parameters["unet"], **({"time_cond_proj_dim": dim} if conditioned else {}))
        unet.load_state_dict(weights)

        def call(x: Tensor, t: Tensor, context: Tensor, w: Tensor | None) -> Tensor:
            condition = None if w is None else guidance_embedding(w, dim)
            return unet(x, t, encoder_hidden_states=context, timestep_cond=condition).sample

        return unet, call

    checked = 0
    for run in each(case["runs"]):
        i, conditioned = run["index"], run["variant"].startswith("LCM loop")
        assert conditioned or run["variant"].startswith("LCM-LoRA loop")
        (unet, student), (_, teacher) = network("student", conditioned), network("teacher", False)
        target = network("target", True)[1] if conditioned else student
        settings = Distillation(
            ddim_steps=run["num_ddim_timesteps"], w_min=run["w_min"], w_max=run["w_max"], loss=run["loss_type"],
            huber_c=run["huber_c"], raw_noise=True,
        )  # fmt: skip
        batch = tuple(inputs[f"{i}.{name}"] for name in ("latents", "context", "uncond_context"))
        draws = tuple(inputs[f"{i}.{name}"] for name in ("index", "u", "noise"))
        path = DiffusionPath(alphas, run["prediction_type"])
        got = distillation_terms(path, student, target, teacher, batch, draws, settings, conditioned=conditioned)
        start = path.teacher_steps(settings.ddim_steps)[0][draws[0]]
        assert start.tolist() == run["timesteps_start"]
        assert (start - 1000 // settings.ddim_steps).clamp(min=0).tolist() == run["timesteps_end"]
        got["loss"].backward()
        got |= {"loss": got["loss"][None], "grad_conv_in": unet.conv_in.weight.grad}
        for name, value in got.items():
            near(value.detach(), expected[f"{i}.{name}"], case["tolerance"], f"{i}.{name}")
            checked += 1
    assert checked == len(expected)
