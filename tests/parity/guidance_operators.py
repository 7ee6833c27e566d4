"""Cases of measurement operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from diffrep.guidance import operators
from diffrep.guidance.operators import Operator

from . import guidance_released as released
from .cases import tensors_of
from .sampling_mixture import assert_like


def red_operator(name: str, shape: tuple[int, int, int], mask: Tensor | None = None) -> Operator:
    """RED-diff's operator of a name."""
    kind, number = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    if name == "in2":
        assert mask is not None
        return operators.inpainting(mask.expand(-1, shape[0], -1, -1))
    if name == "color":
        return operators.colours(shape, (0.3333, 0.3334, 0.3333))
    if kind == "sr":
        return operators.averaging(shape, int(number))
    if kind == "bicubic":
        return released.red_bicubic(shape, int(number))
    if kind == "quant":
        return released.quantised(shape, int(number))
    if name == "hdr":
        return released.overexposed(shape)
    if name == "phase":
        return released.phaseless(shape)
    assert name in ("deblur_uni", "deblur_gauss"), f"RED-diff has no operator {name}"
    return released.red_deblurring(shape, released.red_deblurring_kernel(name.removeprefix("deblur_")))


def check_operators(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    image, p = inputs["image"], case["parameters"]
    shape = (3, p["size"], p["size"])
    got: dict[str, Tensor] = {}
    for name in p["names"]:
        operator = red_operator(name, shape, inputs["mask"])
        measured = operator(image)
        operator.check(measured)
        got[f"red.{name}.forward"] = measured.flatten(1)
        got[f"red.{name}.pinv"] = operator.pinv(measured).flatten(1)
        if operator.linear:
            got[f"red.{name}.adjoint"] = operator.adjoint(measured).flatten(1)
    hidden = inputs["phase.image"]
    retrieval = released.phaseless(tuple(hidden.shape[1:]), p["phase_padding"])
    got["red.phase.forward"] = retrieval(hidden)
    got["red.phase.pinv"] = retrieval.pinv(got["red.phase.forward"])
    chef, dps = p["flowchef"], p["dps"]
    others = {
        "flowchef.box": operators.box(shape, chef["box_size"]),
        "flowchef.sr": released.flowchef_super_resolution(shape, chef["scale_factor"]),
        "flowchef.gauss": released.flowchef_blur(shape, chef["kernel_size"], chef["sigma"]),
        "dps.sr": released.dps_super_resolution(shape, dps["scale_factor"]),
        "dps.gauss": released.dps_blur(shape, dps["kernel_size"], dps["sigma"]),
    }
    for name, operator in others.items():
        got[f"{name}.forward"] = operator(image)
        got[f"{name}.transpose"] = operator.adjoint(got[f"{name}.forward"])
    got["dps.gauss.kernel"] = released.dps_kernel(dps["kernel_size"], dps["sigma"])
    missing = sorted(set(expected) - set(got))
    assert not missing, f"no check of {', '.join(missing)}"
    for name, value in expected.items():
        loose = "pinv" in name and ("deblur" in name or "bicubic" in name)
        assert_like(got[name], value, atol=2e-3 if loose else 2e-5, rtol=1e-4, what=name)
