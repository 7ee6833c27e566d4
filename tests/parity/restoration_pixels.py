"""Checkers of system `restoration-and-few-step`: resizing, colours, tiles, metrics."""

from __future__ import annotations

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

from .cases import assert_within, each
from .diffdis_unet import tensors_of


def check_bicubic(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    for run in each(case["runs"]):
        resized = imresize(inputs[f"{run['index']}.image"], run["scale"], antialias=run["antialiasing"])
        assert list(resized.shape) == run["out"]
        assert_within(resized, expected[f"{run['index']}.resized"], atol=case["tolerance"]["atol"], what="resized")


def check_colour_fix(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    fixes, checked = {"wavelet": wavelet_colours, "adain": adain_colours}, 0
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
                assert int(difference.abs().max()) <= 1, f"{i}.{name}_u8"
                checked += 1
    assert checked == len(expected)


def stable_diffusion_schedule(predicts: str = "epsilon") -> Schedule:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": predicts}
    return Schedule.from_config(config)


def check_latent_tiles(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    schedule, tolerance = stable_diffusion_schedule(), case["tolerance"]
    assert "one step at 999" in case["parameters"]
    for run in each(case["runs"]):
        i, tile, overlap = run["index"], run["latent_tiled_size"], run["latent_tiled_overlap"]
        latent, weight, bias = (inputs[f"{i}.{name}"] for name in ("latent", "W", "b"))
        height, width = latent.shape[-2:]
        assert (height, width) == (run["h"], run["w"])

        def network(part: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return torch.tanh(F.conv2d(part, weight, bias, padding=1))

        def run_tile(top: int, left: int, latent: Tensor = latent, tile: int = tile) -> Tensor:
            return network(latent[..., top : top + tile, left : left + tile])[0]

        if height * width <= tile**2:
            output = network(latent)
        else:
            bands = blended_rows(run_tile, (height, width), tile, overlap, published=True)
            output = torch.cat([band for _, band in bands], 1)[None]
        clean = schedule.clean(output, latent, 999)
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
                wanted = run[f"{name}_{channels}"]
                assert abs(value - wanted) <= case["tolerance"]["rtol"] * abs(wanted), f"{i} {name}_{channels}: {value}"
