"""Weights to start from, ground truth, noise and one training step of DiffDIS."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from diffrep.heads.diffdis import DiffDisUNet, derived_weights
from diffrep.heads.one_step import TIMESTEP, LatentCodec, Schedule
from diffrep.heads.tiling import stretch
from diffrep.heads.training.masks import (
    DISCOUNT,
    PUBLISHED_FASTER,
    SegmentationModel,
    cut_mix,
    edge_map,
    encode_step,
    pyramid_noise,
    segmentation_losses,
)
from diffrep.training.loop import FitSettings, diffdis_rate, make_optimiser

from .cases import each, tensors_of
from .diffdis_unet import assert_equal, tolerances


def part_names(stored: Iterable[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in stored if name.startswith(prefix)]


def check_init_from_base(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    assert case["tolerance"] == "exact"
    found = derived_weights(given, case["config"]["ch"][:-1])
    assert set(found) == set(expected) == {*case["changed_keys"], *case["zero_keys"], "conv_in.bias"}
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def check_contour(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    assert case["tolerance"] == "exact"
    for index, (mask, fraction) in enumerate(zip(case["masks"], case["edge_fraction"], strict=True)):
        assert list(given[f"m{index}/mask"].shape) == mask["hw"]
        edges = edge_map(given[f"m{index}/mask"])
        assert torch.equal(edges, expected[f"m{index}/edge"]), f"m{index}"
        assert (edges > 0).float().mean().item() == pytest.approx(fraction), f"m{index}"


def check_pyramid_noise(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    for variant in each(case["variants"], describing=("std",)):
        name = variant["name"]
        draws = [given[f"{name}/draw_{n}"] for n in range(len(variant["draw_sizes"]))]
        assert [list(draw.shape[-2:]) for draw in draws] == variant["draw_sizes"]
        assert list(draws[0].shape) == variant["shape"]
        noise = pyramid_noise(
            variant["shape"], discount=variant["discount"], draws=draws, uniforms=given[f"{name}/uniform"].tolist()
        )
        assert_equal(noise, expected[f"{name}/noise"], case["tolerance"], name)


def check_train_step(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    tolerance, config = case["tolerance"], json.loads((folder / "model" / "unet" / "config.json").read_text())
    vae_folder = (folder / case["vae"]).resolve()
    codec = LatentCodec(AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False))
    unet = DiffDisUNet(config)
    unet.load_state_dict(load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"))
    scheduler = (vae_folder.parent / "scheduler" / "scheduler_config.json").read_text()
    model = SegmentationModel(unet, given["text"], Schedule.from_config(json.loads(scheduler))).train()
    assert (case["timestep"], case["noise_discount"]) == (TIMESTEP, DISCOUNT)
    assert given["image"].shape == (case["batch"], 3, case["image_side"], case["image_side"])

    boxes = given["box"].bool()
    image, mask, edge = (
        cut_mix(stretch(given[name].reshape(case["batch"], -1, *boxes.shape[1:])), boxes)
        for name in ("image", "label", "edge")
    )
    with torch.no_grad():
        latents = encode_step(codec.encode, image, mask, edge, levels=unet.levels)
    for ours, key in (("image 0", "rgb_latent"), ("mask", "mask_latent_target"), ("edge", "edge_latent_target")):
        assert_equal(latents[ours], expected[key], tolerance["latents"], key)
    for level in range(1, unet.levels + 1):  # the same for mask and edge
        key = f"rgb_latent_{2**level}"
        assert_equal(latents[f"image {level}"].repeat(2, 1, 1, 1), expected[key], tolerance["latents"], key)

    target = torch.cat([latents.pop("mask"), latents.pop("edge")])
    batch = latents | {"target": target, "noise": given["noise"]}
    found = model(batch)
    assert_equal(found["noisy"], expected["noisy"], tolerance["latents"], "noisy")
    assert_equal(found["output"], expected["unet_out"], tolerance["unet_out"], "unet_out")
    assert_equal(found["clean"], expected["x0"], tolerance["x0"], "x0")
    for name, buffer in unet.named_buffers():  # the pass above has moved the batch norms: start again
        buffer.copy_(load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")[name])

    adam = case["adam"]
    settings = FitSettings(
        steps=1, learning_rate=adam["lr"], weight_decay=adam["weight_decay"], betas=tuple(adam["betas"]),
        faster=PUBLISHED_FASTER, epsilon=adam["eps"],
    )  # fmt: skip
    optimiser = make_optimiser(model, settings)
    rates = {group["lr"] for group in optimiser.param_groups}
    torch.testing.assert_close(sorted(rates), sorted([adam["lr"], adam["class_embedding_lr"]]))
    torch.testing.assert_close([diffdis_rate(2, lr) for lr in sorted(rates)], case["learning_rates_after_epoch"])
    losses = segmentation_losses(model, model, batch)
    for name, printed in case["losses"].items():
        assert expected[f"loss_{name}"].item() == pytest.approx(printed)
    for ours, key in (("mask", "loss_mask"), ("edge", "loss_edge"), ("loss", "loss")):
        assert_equal(losses[ours].detach(), expected[key], tolerance["loss"], key)
    losses["loss"].backward()
    allowed = tolerances(tolerance["grad"])
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    for name in part_names(expected, "grad/"):
        value = expected[f"grad/{name}"]
        # a share of the largest entry; queries over one token have no gradient, and what is stored of it is rounding
        atol = max(allowed["atol"] * float(value.abs().max()), 1e-6)
        torch.testing.assert_close(gradients[name], value, rtol=allowed["rtol"], atol=atol)
    without = [name for name, p in unet.named_parameters() if p.grad is None]
    assert without == case["parameters_without_gradient"]
    norm = torch.nn.utils.get_total_norm(gradients.values())
    torch.testing.assert_close(norm, expected["grad_norm"], rtol=allowed["rtol"], atol=0)

    optimiser.step()
    after = unet.state_dict()
    for name in part_names(expected, "after_step/"):
        value = expected[f"after_step/{name}"]
        moved = gradients[name].abs() >= 1e-6 if name in gradients else torch.ones_like(value, dtype=torch.bool)
        assert_equal(after[name][moved], value[moved], tolerance["after_step"], name)
