"""Checkers of system `restoration-and-few-step`: resizing, colours, tiles, metrics."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.eval.restoration import luma, psnr, ssim
from diffrep.heads.one_step import Schedule
from diffrep.heads.restoration.pixels import (
    adain_colours,
    blended_rows,
    imresize,
    low_band,
    tile_window,
    to_bytes,
    wavelet_colours,
)

from .cases import assert_within, each, tensors_of


def check_bicubic(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    for run in each(case["runs"]):
        resized = imresize(inputs[f"{run['index']}.image"], run["scale"], antialias=run["antialiasing"])
        assert list(resized.shape) == run["out"]
        assert_within(resized, expected[f"{run['index']}.resized"], atol=case["tolerance"]["atol"], what="resized")


def check_colour_fix(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    fixes, checked = {"wavelet": wavelet_colours, "adain": adain_colours}, 0
    (levels,) = map(int, re.findall(r"^equal up to (\d+)$", case["tolerance"]["u8"]))
    for run in each(case["runs"]):
        i = run["index"]
        restored, reference = inputs[f"{i}.restored"], inputs[f"{i}.reference"]
        assert (len(restored), *restored.shape[-2:]) == (run["B"], run["h"], run["w"])
        got = {name: fix(restored, reference) for name, fix in fixes.items()}
        got["low_of_restored"] = low_band(restored)
        for name, value in got.items():
            assert_within(value, expected[f"{i}.{name}"], atol=case["tolerance"]["atol"], what=f"{i}.{name}")
            checked += 1
        if f"{i}.restored_u8" in inputs:
            door = [inputs[f"{i}.{name}_u8"][None].float() / 255 for name in ("restored", "reference")]
            for name, fix in fixes.items():
                difference = to_bytes(fix(*door))[0].int() - expected[f"{i}.{name}_u8"].int()
                assert int(difference.abs().max()) <= levels, f"{i}.{name}_u8"
                checked += 1
    assert checked == len(expected)


def schedule_of(text: str) -> dict[str, Any]:
    """The configuration of the schedule that a case says in words: ``scaled_linear 0.00085..0.012, 1000 steps``."""
    if (said := re.search(r"scaled_linear (?:betas )?(\d+\.\d+)\.\.(\d+\.\d+)(?:, (\d+) steps)?", text)) is None:
        raise AssertionError(f"the check cannot read the schedule in {text!r}")
    ends = {"beta_start": float(said[1]), "beta_end": float(said[2])}
    return {"beta_schedule": "scaled_linear", "num_train_timesteps": int(said[3] or 1000), **ends}


def check_latent_tiles(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    schedule, tolerance = Schedule.from_config(schedule_of(case["parameters"])), case["tolerance"]
    (timestep,) = map(int, re.findall(r"one step at (\d+)", case["parameters"]))
    assert case["parameters"].startswith("network tanh(conv3x3(z, W, b, padding 1)) = epsilon; ")
    assert case["parameters"].endswith("x0 = (z - sqrt(1-abar) eps)/sqrt(abar)")
    for run in each(case["runs"]):
        i, tile, overlap = run["index"], run["latent_tiled_size"], run["latent_tiled_overlap"]
        latent, weight, bias = (inputs[f"{i}.{name}"] for name in ("latent", "W", "b"))
        height, width = latent.shape[-2:]
        assert (height, width) == (run["h"], run["w"])

        def network(part: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return torch.tanh(F.conv2d(part, weight, bias, padding=1))

        def run_tile(*place: slice, latent: Tensor = latent, network: Any = network) -> Tensor:
            return network(latent[(..., *place)]).flatten(0, 1)

        if height * width <= tile**2:
            output = network(latent)
        else:
            bands = blended_rows(run_tile, (height, width), tile, overlap, published=True)
            output = torch.cat([band for _, band in bands], 1).view_as(latent)
        clean = schedule.clean(output, latent, timestep)
        side = min(tile, height, width)
        assert_within(tile_window(side, side, published=True), expected[f"{i}.weights"], atol=2e-6, what="weights")
        torch.testing.assert_close(clean.float(), expected[f"{i}.x0"], **tolerance, msg=lambda t: f"x0: {t}")


def check_image_metrics(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    for run in each(case["runs"]):
        i, crop = run["index"], run["crop_border"]
        reference, restored = inputs[f"{i}.reference"], inputs[f"{i}.restored"]
        assert_within(luma(reference)[0, ..., None], expected[f"{i}.y_reference"], atol=1e-3, what="luma")
        for name, measure in (("psnr", psnr), ("ssim", ssim)):
            for channels in ("rgb", "y"):
                value = measure(restored, reference, crop=crop, y=channels == "y")
                wanted, rtol = run[f"{name}_{channels}"], case["tolerance"]["rtol"]
                near = value == wanted or abs(value - wanted) <= rtol * abs(wanted) < math.inf  # equal images: infinite
                assert near, f"{i} {name}_{channels}: {value}"
