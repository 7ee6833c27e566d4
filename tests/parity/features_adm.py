"""Checker for the kind `dift_adm` of system `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffrep.backbones import Conditions, PixelDiffusion, load_backbone
from diffrep.images import Sizing, fit_image, load_image, stack_pixels

from .cases import assert_near, assert_within, number_in, tensors_of


def check_dift_adm(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    backbone = load_backbone(folder / "model")
    assert isinstance(backbone, PixelDiffusion)
    image = load_image(given["image"].numpy())
    relative = number_in(case["tolerance"]["ft"])
    for number, run in enumerate(case["runs"]):
        name, (width, height) = f"run{number}", run["img_size"]
        pixels = stack_pixels([fit_image(image, Sizing("squash", (height, width)))[0]])
        noise = given[f"{name}.noise"]
        if f"{name}.xt" in expected:
            noisy = backbone.noisy_pixels(pixels.float(), noise, run["t"])
            assert_within(noisy, expected[f"{name}.xt"], atol=1e-5, what=f"{name} x_t")
        tap = backbone.dift_tap(run["up_ft_index"])
        assert backbone.tap(tap).module == run["diffusers_module"]
        conditions = Conditions(timestep=run["t"], ensemble=run["ensemble_size"])
        got = backbone.maps(pixels, [tap], conditions, noise=noise)[tap]
        assert_near(got, expected[f"{name}.ft"], relative=relative, what=f"{name} {tap}")
