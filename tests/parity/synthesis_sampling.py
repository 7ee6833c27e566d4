"""Kinds `embedding_interpolation`, `panorama` and `patch_samplers`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from safetensors.torch import load_file

from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, denoise_canvas, sample_patches, slerp
from diffrep.synthesis.canvas import Lines, WindowPlan, decode_weights
from diffrep.synthesis.checkpoints import convert_official
from diffrep.synthesis.grids import NEARLY_PARALLEL
from diffrep.synthesis.large import decode_lines, to_uint8
from diffrep.synthesis.sampler import GivenNoise
from diffrep.synthesis.schedulers import build_scheduler

from .cases import assert_within, tensors_of
from .synthesis_model import model_of, tolerances_of


def bounds(text: str) -> tuple[float, float]:
    """(rtol, atol) of a text such as ``atol 5e-4 rtol 1e-4 (an independent ...)``."""
    found = dict(re.findall(r"(atol|rtol) ([0-9.e-]+)", text))
    return float(found.get("rtol", 0)), float(found.get("atol", 0))


def bounds_of(case: dict[str, Any], name: str) -> tuple[float, float]:
    """(rtol, atol) for a tensor; a tolerance named "all" is for every one."""
    for names, text in case["tolerance"].items():
        if name in [n.strip() for n in names.split(",")] or names == "all":
            return bounds(text)
    raise KeyError(f"the case has no tolerance for {name}")


def check_embedding_interpolation(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    model, grid = model_of(folder, case), EmbeddingGrid(given["embedding_grid"])
    assert grid.shape == tuple(case["parameters"]["grid"])
    assert case["parameters"]["dot_threshold"] == NEARLY_PARALLEL
    rtol, atol = bounds_of(case, "slerp")
    a, b, t = given["slerp_a"], given["slerp_b"], given["slerp_t"]
    found = torch.stack([slerp(t, x.expand(len(t), -1), y.expand(len(t), -1)) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(found, expected["slerp"], rtol=rtol, atol=atol)
    raw = grid.at(given["offsets"], case["parameters"]["patch_size_latent"])
    torch.testing.assert_close(raw, expected["raw"], rtol=rtol, atol=atol)
    allowed = tolerances_of(case)["context"]
    assert_within(model.context(raw), expected["context"], atol=allowed, what="context")
    assert_within(model.null_context(), expected["null_context"], atol=allowed, what="null context")


def weights_of(folder: Path, case: dict[str, Any]) -> SynthesisModel:
    """The model of a panorama. A folder has the moving average where there is one, the checkpoint beside it both."""
    place = (folder / case["model_dir"]).parent
    about = json.loads((place / "case.json").read_text())
    asked, averaged = {"plain": False, "EMA": True}[case["parameters"]["weights"]], about["parameters"]["use_ema"]
    if asked == averaged:
        return model_of(folder, case)
    assert averaged, "the model has no moving average"
    groups, weights = about["parameters"]["groups"], load_file(place / "official_state_dict.safetensors")
    return convert_official(weights, about["official_config"], groups=groups, ema=False)


def check_panorama(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    parameters, model = case["parameters"], weights_of(folder, case)
    start, grid = given["x_start"][0], EmbeddingGrid(given["embedding_grid"])
    model.window = parameters["window"]
    plan = WindowPlan((start.shape[1], start.shape[2]), model.window, parameters["window_stride"])
    assert list(grid.shape) == parameters["grid"]
    assert len(plan) == parameters["windows"]
    assert parameters["guidance_formula"] == "(1+g)*eps_cond - g*eps_null"
    if "noise_a" in given:  # how the authors draw it: from the clean image, which is noise too
        alpha = model.alphas_cumprod[-1]
        torch.testing.assert_close(
            alpha.sqrt() * given["noise_a"][0] + (1 - alpha).sqrt() * given["noise_b"][0], start, rtol=0, atol=1e-5
        )
    timesteps = list(range(len(model.alphas_cumprod) - 1, -1, -parameters["time_stride"]))
    assert [t + 1 for t in timesteps] == parameters["timesteps"]
    scheduler = build_scheduler(
        "official", model.scheduler, len(timesteps), timesteps=timesteps, noise_scale=parameters["noise_scale_ddim"]
    )
    settings = SynthesisSettings(
        scheduler="official",
        guidance=1 + parameters["guidance"],
        stride=parameters["window_stride"],
        weights="uniform",
        timestep_shift=1,
    )
    between: list[torch.Tensor] = []
    lines = denoise_canvas(
        model,
        grid,
        plan.size,
        settings,
        scheduler=scheduler,
        noise=GivenNoise.of_canvas(start, given["step_noise"][:, 0]),
        after_step=lambda step, canvas: between.append(canvas.tensor(0, canvas.shape[0]).movedim(0, 1)),
    )
    for number, reference in enumerate(expected["x_after_step"]):
        rtol, atol = bounds_of(case, "x_after_step")
        torch.testing.assert_close(between[number], reference[0], rtol=rtol, atol=atol)
    rtol, atol = bounds_of(case, "latent")
    latent = lines.tensor(0, lines.shape[0]).movedim(0, 1)
    torch.testing.assert_close(latent, expected["latent"][0], rtol=rtol, atol=atol)
    if "decode" in parameters:
        check_decoding(case, model, expected)


def check_decoding(case: dict[str, Any], model: Any, expected: dict[str, torch.Tensor]) -> None:
    """Our images lie in [0, 1]; the official float image in [-1, 1]."""
    how = case["parameters"]["decode"]
    assert how["factor"] == model.factor
    model.window = how["window"]
    settings = SynthesisSettings(
        decode_stride=how["stride"], decode_weights="official", decode_sigma=how["sigma"], quantize=how["quantized"]
    )
    latent = expected["latent"][0].movedim(1, 0)
    lines = Lines(tuple(latent.shape), "float32")
    lines.write(0, latent.numpy())
    rows = np.concatenate([values for _, _, values in decode_lines(model, lines, settings)])
    image = torch.from_numpy(rows).movedim(1, 0) * 2 - 1
    share = 0.999
    _, atol = bounds(case["tolerance"]["image_float"])
    near = (image - expected["image_float"][0]).abs() <= atol
    assert near.float().mean() >= share, f"decoded: only {near.float().mean():.4f} within {atol}"
    pixels = torch.from_numpy(to_uint8(rows).astype(np.int16))
    assert ((pixels - expected["image_uint8"][0].short()).abs() <= 1).float().mean() >= share
    kernel = decode_weights(how["window"] * how["factor"], how["sigma"])
    assert_within(
        kernel[len(kernel) // 2], expected["kernel_row"], atol=bounds(case["tolerance"]["kernel_row"])[1], what="kernel"
    )


def check_patch_samplers(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    parameters, model = case["parameters"], model_of(folder, case)
    assert parameters["guidance_formula"] == "eps_null + scale*(eps_cond - eps_null)"
    tried = []
    for name, reference in expected.items():
        kind = "pndm" if name.startswith("plms") else "ddim"
        eta = float(match[1]) if (match := re.search(r"eta([0-9.]+)", name)) else 0.0
        scale = float(match[1]) if (match := re.search(r"scale([0-9.]+)", name)) else parameters["guidance_scale"]
        # diffusers' schedulers step our canvases, too; ours end at the clean image, and not at timestep 0
        theirs, option = (PNDMScheduler, "skip_prk_steps") if kind == "pndm" else (DDIMScheduler, "clip_sample")
        scheduler: Any = theirs.from_config(model.scheduler, **{option: kind == "pndm"})
        scheduler.set_timesteps(parameters["S"])
        steps = [1 + t for t in range(0, 1000, 1000 // parameters["S"])][::-1]  # more than S where that leaves a rest
        assert steps[::-1] == parameters["timesteps_ascending"]
        scheduler.timesteps = torch.tensor([*steps[:2], *steps[1:]] if kind == "pndm" else steps)
        settings = SynthesisSettings(guidance=scale, eta=eta)
        noise = GivenNoise(given["x_T"], given["step_noise"] if eta else None)
        size = (given["x_T"].shape[2], given["x_T"].shape[3])
        found = sample_patches(model, given["patch_embedding"], settings, size=size, scheduler=scheduler, noise=noise)
        rtol, atol = bounds_of(case, name)
        torch.testing.assert_close(found, reference, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        tried.append(kind)
    assert {"pndm", "ddim"} <= set(tried)
