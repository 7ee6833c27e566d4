"""Checkers for the kinds of system `classification-probes` that are about classification heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffrep.backbones import Conditions, PixelDiffusion
from diffrep.backbones.pixel_diffusion import adm_backbone
from diffrep.heads.probes import AttentionFusion, DifFeed, PooledHead, TokenReadout, numbered_taps

from .cases import assert_near, number_in, tensors_of


def tolerance(case: Mapping[str, Any]) -> float:
    return number_in(case["tolerance"].replace("max |diff|", ""))


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}


def the_backbone(folder: Path, case: Mapping[str, Any]) -> PixelDiffusion:
    """The tiny ADM network that a case names, which lies beside it."""
    model = (folder / case["unet"]).resolve()
    flags = dict(json.loads((model / "official_config.json").read_text()))
    return adm_backbone(load_file(model / "official_state_dict.safetensors"), flags, name=model.parent.name)


def assert_all(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], case: Mapping[str, Any]) -> None:
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert_near(got[name], value, relative=tolerance(case), what=name)


def heads_of(folder: Path, file: str = "heads") -> dict[str, Tensor]:
    return load_file(folder / "model" / f"{file}.safetensors")


def check_heads_linear_mlp(folder: Path, case: dict[str, Any]) -> None:
    given, expected, weights = load_file(folder / "inputs.safetensors"), {}, heads_of(folder)
    for name, variant in case["variants"].items():
        state = under(name, weights)
        for key, maps in given.items():
            head = PooledHead(maps.shape[1], case["num_classes"], pool=variant["pool"], hidden=variant["hidden"])
            head.load_state_dict(state)
            expected[f"{name}.{key}.logits"] = head(maps).detach()
    assert_all(load_file(folder / "expected.safetensors"), expected, case)


def _fusion(
    state: Mapping[str, Tensor],
    channels: Mapping[str, int],
    sizes: Mapping[str, int],
    *,
    classes: int,
    readout: str,
    pool: int,
    timesteps: int,
    norm: Any = "layer",
) -> AttentionFusion:
    assert len(state["head.bias"]) == classes
    head = AttentionFusion(channels, sizes, classes, readout=readout, pool=pool, norm=norm, timesteps=timesteps)
    head.load_state_dict(dict(state))
    return head.eval()


def check_heads_attention(folder: Path, case: dict[str, Any]) -> None:
    given, weights, got = load_file(folder / "inputs.safetensors"), heads_of(folder), {}
    for name, variant in case["variants"].items():
        state = under(name, weights)
        if "layer_string" in variant:
            readout = TokenReadout(variant["layer_string"])
            readout.load_state_dict(state)
            got[f"{name}.out"] = readout(given[variant["input"]]).detach()
        else:
            block, maps = f"block.{variant['block']}", given["feature"]
            head = _fusion(
                state,
                {block: maps.shape[1]},
                {block: variant["feature_size"]},
                classes=len(state["head.bias"]),
                readout=variant["fusion_arc"],
                pool=variant["pre_pool_size"],
                timesteps=1,
                norm=variant["norm"],
            )
            got[f"{name}.logits"] = head([{block: maps}]).detach()
    if "num_classes" in case:
        assert all(value.shape[1] == case["num_classes"] for name, value in got.items() if name.endswith("logits"))
    assert_all(load_file(folder / "expected.safetensors"), got, case)


def check_difformer_from_features(folder: Path, case: dict[str, Any]) -> None:
    given = load_file(folder / "inputs.safetensors")
    blocks = {b: f"block.{b}" for b in case["blocks"]}
    head = _fusion(
        heads_of(folder, "head"),
        {tap: case["feature_dims"][str(b)] for b, tap in blocks.items()},
        {tap: case["feature_sizes"][str(b)] for b, tap in blocks.items()},
        classes=case["num_classes"],
        readout=case["fusion_arc"],
        pool=case["pre_pool_size"],
        timesteps=len(case["timesteps"]),
        norm=case.get("norm", "layer"),
    )
    maps = [{tap: given[f"t{t}.b{b}"] for b, tap in blocks.items()} for t in case["timesteps"]]
    assert_all(load_file(folder / "expected.safetensors"), {"logits": head(maps).detach()}, case)


def check_difformer_end_to_end(folder: Path, case: dict[str, Any]) -> None:
    given, backbone = load_file(folder / "inputs.safetensors"), the_backbone(folder, case)
    taps = {b: numbered_taps(backbone)[b] for b in case["blocks"]}
    head = _fusion(
        heads_of(folder, "head"),
        {tap.name: tap.channels for tap in taps.values()},
        {tap.name: case["feature_sizes"][str(b)] for b, tap in taps.items()},
        classes=case["num_classes"],
        readout=case["fusion_arc"],
        pool=case["pre_pool_size"],
        timesteps=len(case["timesteps"]),
        norm=case.get("norm", "layer"),
    )
    maps = []
    for t in case["timesteps"]:
        noisy = backbone.noisy_pixels((given["image"] + 1) / 2, given[f"noise.t{t}"], t)
        maps.append(backbone.network_maps(noisy, head.blocks, Conditions(timestep=t)))
    assert_all(load_file(folder / "expected.safetensors"), {"logits": head(maps).detach()}, case)


def check_diffeed_end_to_end(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    backbone = the_backbone(folder, case)
    second = {b: numbered_taps(backbone)[b] for b in case["second_forward_blocks"]}
    head = _fusion(
        heads_of(folder, "head"),
        {tap.name: tap.channels for tap in second.values()},
        {tap.name: case["feature_sizes"][str(b)] for b, tap in second.items()},
        classes=case["num_classes"],
        readout=case["fusion_arc"],
        pool=case["pre_pool_size"],
        timesteps=len(case["timestep"]),
        norm=case.get("norm", "layer"),
    )
    model = DifFeed(backbone, head, blocks=case["feedback_blocks"], arch=case["feedback_arch"])
    model.feedback.load_state_dict(heads_of(folder, "feedback_layers"))
    (timestep,) = case["timestep"]
    noisy = backbone.noisy_pixels((given["image"] + 1) / 2, given[f"noise.t{timestep}"], timestep)
    conditions = Conditions(timestep=timestep)

    got, model = {"x_t": noisy}, model.eval()
    first = model.first_pass(backbone, noisy, conditions)
    plain = backbone.network_maps(noisy, [tap.name for tap in second.values()], conditions)
    with torch.no_grad():
        got["eval.logits"] = model(backbone, noisy, conditions)
        again = model.second_pass(backbone, noisy, conditions, first)
        added = model.feedback_maps(first)
    for b, tap in second.items():
        got[f"first_forward.b{b}"] = plain[tap.name]
        got[f"eval.second_forward.b{b}"] = again[tap.name]
    count = len(numbered_taps(backbone))
    for b in model.blocks:
        value = added[model.targets[b].module]
        got[f"eval.feedback.from_b{b}_to_b{count + 1 - b}.pool2x2"] = F.adaptive_avg_pool2d(value, 2)

    logits = model.train()(backbone, noisy, conditions)
    assert logits.requires_grad
    logits.sum().backward()
    assert all(_moved(p) for p in model.feedback.parameters())
    got["train.logits"] = logits.detach()
    buffers = {name: value for name, value in model.feedback.named_buffers() if value.is_floating_point()}
    got |= {f"train.after.{name}": value for name, value in buffers.items()}
    assert_all(expected, got, case)


def _moved(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
