"""Checkers of system `one-step-depth-normals` for the kinds that are about training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from diffrep.alignment import fit_scale_shift
from diffrep.backbones.pipelines import load_parts
from diffrep.heads.families import LOTUS_D, LOTUS_G, Family
from diffrep.heads.point_cloud import Intrinsics, unproject
from diffrep.heads.training.dense import (
    OneStepModel,
    adapt_unet,
    affine_invariant_loss,
    angular_loss,
    decoded_depth,
    decoded_normals,
    draw_rows,
    encode_rows,
    latent_losses,
    latent_mask,
    widen_conv_in,
)
from diffrep.heads.training.dense_data import (
    face_camera,
    image_target,
    lub_normals,
    mirror_normals,
    normalize_depth,
    plane_normals,
    resize_nearest,
)
from diffrep.training.loop import FitSettings, exponential_factor, make_optimiser

from .cases import assert_within, each, tensors_of


def check_e2e_losses(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    tolerance = case["tolerance"]
    for run in each(case["runs"], describing=("drop", "scale")):
        i = run["index"]
        assert given[f"{i}.decoded"].shape == (run["B"], 3, run["h"], run["w"])
        assert expected[f"{i}.loss"].item() == pytest.approx(run["loss"])
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
    given, expected = tensors_of(folder)
    parameters, atol = case["parameters"], case["tolerance"]["atol"]
    size = tuple(parameters["resize_to_hw"])
    fx, fy, cx, cy = parameters["K_used_by_align"]
    intrinsics = Intrinsics(fx, fy, cx, cy)
    raw, depth = Image.fromarray(given["image_uint8_hwc"].numpy()), given["depth"]
    unaligned = lub_normals(given["normal_hypersim_hwc"], "rub")
    found = {
        "image": image_target(raw, size),
        "normal.unaligned": resize_nearest(unaligned, size),
        "normal.aligned": resize_nearest(face_camera(unaligned, unproject(depth, intrinsics)), size),
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

    depth, matrix = given["d2n.depth"], given["d2n.intrinsics"].tolist()
    intrinsics = Intrinsics(matrix[0][0], matrix[1][1], matrix[0][2], matrix[1][2])
    assert_within(unproject(depth, intrinsics), expected.pop("d2n.points"), atol=atol, what="d2n.points")
    normals, valid = plane_normals(depth, intrinsics)
    assert torch.equal(valid, expected["d2n.valid"])
    shown = expected.pop("d2n.valid")[0]
    assert_within(normals[:, shown], expected.pop("d2n.normal")[:, shown], atol=1e-4, what="d2n.normal")
    assert not expected, f"not compared: {sorted(expected)}"


def check_conv_in_expansion(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    weight, atol = given["weight"], case["tolerance"]["atol"]
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    conv.load_state_dict({"weight": weight, "bias": given["bias"]})
    compared = set()
    for recipe, scale_bias in (("marigold_lotus", False), ("e2e", True)):
        wide = widen_conv_in(conv, scale_bias=scale_bias)
        for name, got in {"weight": wide.weight, "bias": wide.bias, "output": wide(given["x"])}.items():
            assert_within(got.detach(), expected[f"{recipe}.{name}"], atol=atol, what=f"{recipe}.{name}")
            compared.add(f"{recipe}.{name}")
    assert compared == set(expected)


def check_lr_schedule(folder: Path, case: dict[str, Any]) -> None:
    assert case["factor"]
    for name, factors in case["factor"].items():
        values = dict(part.split("=") for part in name.split(","))
        total, final, warmup = int(values["total"]), float(values["final_ratio"]), int(values["warmup"])
        settings = FitSettings(steps=total, learning_rate=1.0, warmup=warmup, schedule="exponential", final_rate=final)
        for step, factor in factors.items():
            n = int(step)
            allowed = pytest.approx(factor, rel=case["tolerance"]["rtol"])
            assert exponential_factor(n, total, final_ratio=final, warmup=warmup) == allowed, (name, step)
            assert settings.rate(n / total, n) == allowed, (name, step)


def check_lotus_train(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    compared: set[str] = set()
    for run in each(case["runs"]):
        assert run["dataset_kind"] in ("hypersim", "vkitti")
        channels = {"depth": 1, "normal": 3}[run["task"]]
        assert given[f"{run['key']}.0.annotation"].shape[1] == channels
        assert (run["dataset_kind"] == "vkitti") == (f"{run['key']}.0.valid_mask" in given)
        shape = (run["batch"], 3, run["h"], run["w"])
        assert all(given[f"{run['key']}.{step}.pixel_uint8"].shape == shape for step in range(run["steps"]))
        for step, printed in enumerate(run["losses"]):
            for ours, theirs in (("anno_loss", "anno"), ("rgb_loss", "rgb"), ("grad_norm_before_clip", "grad_norm")):
                assert expected[f"{run['key']}.{step}.{ours}"].item() == pytest.approx(printed[theirs])
        key, lr, tolerance = run["key"], run["lr"], case["tolerance"]
        recipe = {"d": LOTUS_D, "g": LOTUS_G}[run["variant"]]
        parts = load_parts(folder / "model", pad=recipe.padded_context)
        assert parts.text is not None
        unet = adapt_unet(parts.unet, recipe)
        unet.class_embedding.load_state_dict(
            {k.removeprefix("class_embedding."): v for k, v in given.items() if k.startswith("class_embedding.")}
        )
        model = OneStepModel(unet, parts.text.encode([""])[""].context, parts.alphas_cumprod, recipe)
        settings = FitSettings(
            steps=run["steps"], learning_rate=lr, warmup=0, schedule="constant", weight_decay=1e-2, decay="all",
            betas=(0.9, 0.999), clip=1.0, ema_decay=0.0, bf16=False,
        )  # fmt: skip
        optimiser = make_optimiser(model, settings)

        def check(name: str, got: torch.Tensor, **allowed: float) -> None:
            compared.add(name)
            torch.testing.assert_close(got, expected[name].view_as(got), msg=lambda m: f"{name}: {m}", **allowed)

        for step in range(run["steps"]):
            stem = f"{key}.{step}"
            batch = _lotus_batch(stem, given, run, recipe, parts.vae)
            noisy = model.noisy(batch["targets"], batch.get("noise"), batch["timesteps"])
            inputs = model.inputs(batch["images"], noisy)
            check(f"{stem}.unet_input", inputs, atol=tolerance["unet_input"], rtol=0)
            check(f"{stem}.class_labels", batch["tasks"], atol=1e-6, rtol=0)
            output = model(inputs, batch["timesteps"], batch["tasks"]).detach()
            check(f"{stem}.model_pred", output, atol=tolerance["model_pred"], rtol=0)

            before = {name: value.detach().clone() for name, value in unet.named_parameters()}
            losses = latent_losses(model, model, batch)
            check(f"{stem}.anno_loss", losses["annotation"].detach(), rtol=tolerance["losses"]["rtol"], atol=0)
            check(f"{stem}.rgb_loss", losses["reconstruction"].detach(), rtol=tolerance["losses"]["rtol"], atol=0)
            losses["loss"].backward()
            parameters = dict(unet.named_parameters())
            for name in [n for n in expected if n.startswith(f"{stem}.grad.")]:
                gradient = parameters[name.removeprefix(f"{stem}.grad.")].grad
                assert gradient is not None
                check(name, gradient, **tolerance["grad"])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            check(f"{stem}.grad_norm_before_clip", norm, rtol=tolerance["grad"]["rtol"], atol=0)
            assert settings.rate(step / run["steps"], step) == lr
            optimiser.step()
            optimiser.zero_grad()
            for name in [n for n in expected if n.startswith(f"{stem}.param_after_step.")]:
                parameter = name.removeprefix(f"{stem}.param_after_step.")
                check(name, parameters[parameter].detach(), atol=tolerance["param_after_step"]["atol"], rtol=0)
                assert not torch.equal(parameters[parameter], before[parameter])
    assert compared == set(expected), f"not compared: {sorted(set(expected) - compared)[:5]}"


def _lotus_batch(
    stem: str, given: dict[str, torch.Tensor], run: dict[str, Any], recipe: Family, vae: Any
) -> dict[str, torch.Tensor]:
    """The case's tensors as the package's training has them."""
    pixels = given[f"{stem}.pixel_uint8"].float() / 127.5 - 1
    valid = torch.ones(len(pixels), 1, *pixels.shape[2:], dtype=torch.bool)
    if f"{stem}.valid_mask" in given:
        valid = given[f"{stem}.valid_mask"]
        if run["task"] == "depth":
            valid = valid | given[f"{stem}.sky_mask"]
    shape = tuple(given[f"{stem}.eps_rgb"].shape[1:])
    drawn = draw_rows(len(pixels), recipe, shape, torch.Generator())
    drawn |= {"image_noise": given[f"{stem}.eps_rgb"], "target_noise": given[f"{stem}.eps_target"]}
    if recipe.first_latent == "noise":
        drawn["noise"] = given[f"{stem}.noise"]
    latents = encode_rows(vae, pixels, given[f"{stem}.annotation"], drawn)
    return {**drawn, **latents, "mask": latent_mask(valid)}
