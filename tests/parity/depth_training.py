"""Checkers of system `one-step-depth-normals` for the kinds that are about training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from diffrep.alignment import fit_scale_shift
from diffrep.training.one_step_losses import (
    affine_invariant_loss,
    angular_loss,
    decoded_depth,
    decoded_normals,
)
from diffrep.training.one_step_targets import (
    camera_points,
    face_camera,
    hypersim_normals,
    image_target,
    mirror_normals,
    normalize_depth,
    normals_from_depth,
    resize_nearest,
)

from .cases import assert_within


def check_e2e_losses(folder: Path, case: dict[str, Any]) -> None:
    given, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    tolerance = case["tolerance"]
    for run in case["runs"]:
        i = run["index"]
        decoded = given[f"{i}.decoded"].requires_grad_()
        reference, mask = given[f"{i}.gt"], given[f"{i}.mask"]
        if run["kind"] == "depth":
            estimate = decoded_depth(decoded)
            loss = affine_invariant_loss(estimate, reference, mask)
            fitted = fit_scale_shift(estimate, reference, mask, undetermined="zero")
            for name, value in zip(("scale", "shift"), fitted, strict=True):
                torch.testing.assert_close(value, expected[f"{i}.{name}"], rtol=1e-4, atol=1e-5)
        else:
            estimate = decoded_normals(decoded)
            loss = angular_loss(estimate, reference, mask, margin=0.0)
        what = f"run {i}, estimate"
        assert_within(estimate.detach(), expected[f"{i}.estimate"], atol=tolerance["grad"]["atol"], what=what)
        torch.testing.assert_close(loss.detach(), expected[f"{i}.loss"][0], rtol=tolerance["loss"]["rtol"], atol=0)
        (gradient,) = torch.autograd.grad(loss, decoded)
        torch.testing.assert_close(gradient, expected[f"{i}.grad_decoded"], **tolerance["grad"])


def check_training_targets(folder: Path, case: dict[str, Any]) -> None:
    given, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    parameters, atol = case["parameters"], case["tolerance"]["atol"]
    size = tuple(parameters["resize_to_hw"])
    fx, fy, cx, cy = parameters["K_used_by_align"]
    intrinsics = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    raw, depth = Image.fromarray(given["image_uint8_hwc"].numpy()), given["depth"]
    unaligned = hypersim_normals(given["normal_hypersim_hwc"])
    found = {
        "image": image_target(raw, size),
        "normal.unaligned": resize_nearest(unaligned, size),
        "normal.aligned": resize_nearest(face_camera(unaligned, camera_points(depth, intrinsics)), size),
    }
    small = resize_nearest(depth[None], size)
    norms = [name.removeprefix("depth.") for name in expected if name.startswith("depth.")]
    assert norms
    for norm in norms:
        found[f"depth.{norm}"] = normalize_depth(small, norm, quantile=parameters["truncnorm_min"])
    for name in [name for name in expected if name.startswith("flipped.")]:
        plain = found[name.removeprefix("flipped.")]
        found[name] = mirror_normals(plain) if "normal" in name else plain.flip(-1)
    for name, value in found.items():
        assert_within(value, expected.pop(name), atol=atol, what=name)

    depth, intrinsics = given["d2n.depth"], given["d2n.intrinsics"]
    assert_within(camera_points(depth, intrinsics), expected.pop("d2n.points"), atol=atol, what="d2n.points")
    normals, valid = normals_from_depth(depth, intrinsics)
    assert torch.equal(valid, expected["d2n.valid"])
    shown = expected.pop("d2n.valid")[0]
    assert_within(normals[:, shown], expected.pop("d2n.normal")[:, shown], atol=1e-4, what="d2n.normal")
    assert not expected, f"not compared: {sorted(expected)}"
