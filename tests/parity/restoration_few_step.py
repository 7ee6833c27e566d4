"""Checkers of system `restoration-and-few-step`: latent consistency models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import LCMScheduler
from torch import Tensor

from diffrep.backbones.latent_diffusion import guidance_embedding
from diffrep.backbones.pipelines import alphas_cumprod
from diffrep.sampling.schedules import boundary
from diffrep.table_scheduler import TableScheduler
from diffrep.training.consistency import DiffusionPath, Distillation, distillation_terms

from .cases import each, tensors_of
from .diffdis_unet import part, tolerances
from .restoration_pixels import schedule_of
from .restoration_processes import compare, near


def check_lcm_scheduler(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    limits = {name: case["tolerance"][name] for name in ("atol", "rtol")}
    path = DiffusionPath(alphas_cumprod(schedule_of(case["parameters"])), "epsilon")
    for said in ("steps_offset 1, set_alpha_to_one false, clip_sample false", "sigma_data 0.5, timestep_scaling 10"):
        assert said in case["parameters"]

    for run in each(case["runs"]):
        i = run["index"]
        config = schedule_of(case["parameters"]) | {"prediction_type": run.get("prediction_type", "epsilon")}
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
        if (run["original"], run.get("strength", 1.0)) == (50, 1.0):  # the same as a table of ours
            ours = TableScheduler.from_config(config, sampler="lcm")
            ours.set_timesteps(run["steps"])
            assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
            state, noises = inputs[f"{i}.start"], [*inputs.get(f"{i}.noise", ()), None]
            for number, (t, output) in enumerate(zip(ours.timesteps, inputs[f"{i}.model_outputs"], strict=True)):
                state = ours.step(output, t, state, variance_noise=noises[number]).prev_sample
                near(state, expected[f"{i}.prev_sample"][number], limits, f"{i}: our state {number}")
        got = {"timesteps": scheduler.timesteps, "prev_sample": torch.stack(states), "denoised": torch.stack(denoised)}
        got |= zip(("c_skip", "c_out"), torch.stack(scalings, 1), strict=True)
        compare(got, expected, limits, f"{i}.")
    compare(dict(zip(("c_skip", "c_out"), boundary(inputs["scaling_timesteps"].double()), strict=True)), expected,
            limits, "train_")  # fmt: skip
    for name in list(expected):
        kind, steps = re.fullmatch(r"(w_embedding|solver)_(\d+)(?:\..*)?", name).groups()  # type: ignore[union-attr]
        if kind == "w_embedding":
            atol = tolerances(case["tolerance"]["embedding"])
            compare({name: guidance_embedding(inputs["w"], int(steps))}, expected, atol)
        elif name.endswith(".timesteps"):
            columns = ("timesteps", "alpha_cumprods", "alpha_cumprods_prev")
            table = zip(columns, path.teacher_steps(int(steps)), strict=True)
            compare(dict(table), expected, limits, f"solver_{steps}.")
    assert not expected


def check_lcm_training(folder: Path, case: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    inputs, expected = tensors_of(folder)
    parameters = case["parameters"]
    case["parameters"]["unet"].read_all()
    dim = int(parameters["student and target"].rsplit(" ", 1)[1])
    assert parameters["context"]
    alphas = alphas_cumprod(schedule_of(parameters["schedule"]))

    def network(kind: str, conditioned: bool) -> Any:
        weights = part(inputs, f"net.{kind}.")
        if not conditioned:
            weights.pop("time_embedding.cond_proj.weight", None)
        unet = UNet2DConditionModel(**parameters["unet"], **({"time_cond_proj_dim": dim} if conditioned else {}))
        unet.load_state_dict(weights)
        unet.double()  # nearer to the published numbers than another order of single precision

        def call(x: Tensor, t: Tensor, context: Tensor, w: Tensor | None) -> Tensor:
            condition = None if w is None else guidance_embedding(w, dim).to(x)
            return unet(x, t, encoder_hidden_states=context, timestep_cond=condition).sample

        return unet, call

    for run in each(case["runs"]):
        i, conditioned = run["index"], run["variant"].startswith("LCM loop")
        assert conditioned or run["variant"].startswith("LCM-LoRA loop")
        (unet, student), (_, teacher) = network("student", conditioned), network("teacher", False)
        target = network("target", True)[1] if conditioned else student
        settings = Distillation(
            ddim_steps=run["num_ddim_timesteps"], w_min=run["w_min"], w_max=run["w_max"], loss=run["loss_type"],
            huber_c=run["huber_c"], raw_noise=True,
        )  # fmt: skip
        batch = tuple(inputs[f"{i}.{name}"].double() for name in ("latents", "context", "uncond_context"))
        draws = inputs[f"{i}.index"], inputs[f"{i}.u"], inputs[f"{i}.noise"].double()
        path = DiffusionPath(alphas, run["prediction_type"])
        got = distillation_terms(path, student, target, teacher, batch, draws, settings, conditioned=conditioned)
        start = path.teacher_steps(settings.ddim_steps)[0][draws[0]]
        assert start.tolist() == run["timesteps_start"]
        assert (start - len(alphas) // settings.ddim_steps).clamp(min=0).tolist() == run["timesteps_end"]
        got["loss"].backward()
        got |= {"loss": got["loss"][None], "grad_conv_in": unet.conv_in.weight.grad}
        compare(got, expected, case["tolerance"], f"{i}.")
    assert not expected
