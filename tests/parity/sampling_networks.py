"""Cases of samplers that reach into the network: DeepCache and early exit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from diffrep.backbones.early_exit import EarlyExitUViT, LayerOutputs, UViTConfig
from diffrep.backbones.partial import PartialNetwork

from .cases import each, tensors_of
from .sampling_mixture import assert_like


@torch.no_grad()
def check_deepcache(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p = case["parameters"]
    words = r"DDIM eta 0, (\w+) ([\d.]+)\.\.([\d.]+), (\w+), set_alpha_to_one (True|False), no clipping"
    schedule, start, end, spacing, one = re.fullmatch(words, p["scheduler"]).groups()  # type: ignore[union-attr]
    scheduler = DDIMScheduler(
        beta_start=float(start), beta_end=float(end), beta_schedule=schedule, timestep_spacing=spacing,
        set_alpha_to_one=one == "True", clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(p["steps"])
    assert scheduler.timesteps.tolist() == p["timesteps"]
    unet = UNet2DConditionModel.from_pretrained(folder / "model").eval()
    for one in each(p["runs"]):
        x, outputs = inputs["x_T"], list[Tensor]()
        # the released ids count three units in each block, ours as many as it has
        (block, unit), units = divmod(one["cache_branch_id"], 3), unet.config.layers_per_block + 1
        assert unit < units
        with PartialNetwork(unet, interval=one["cache_interval"], branch=block * units + unit) as cache:
            for step, t in enumerate(scheduler.timesteps):
                cache.at(step)
                outputs.append(unet(x, t, encoder_hidden_states=inputs["context"]).sample)
                x = scheduler.step(outputs[-1], t, x).prev_sample
        corners = expected[f"{one['key']}_eps_corner"]
        got = torch.stack(outputs[: len(corners)])[..., ::4, ::4]
        assert_like(got, corners, atol=1e-4, what=f"{one['key']}, first outputs")
        assert_like(x, expected[one["key"]], atol=2e-3, rtol=1e-4, what=one["key"])


@torch.no_grad()
def check_deediff(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p = case["parameters"]
    network = EarlyExitUViT(UViTConfig(**p["uvit"]), p["probe"])
    network.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    x, target = inputs["x"], inputs["target"]
    for t in p["timesteps"]:
        times = torch.full((len(x),), t)
        layers = network(x, times)
        assert isinstance(layers, LayerOutputs)
        simple, probes, heads, truth = layers.losses(target)
        for name, got in (
            ("full", layers.full), ("uncertainty", layers.uncertainty), ("outputs", layers.outputs), ("u_hat", truth),
            ("L_simple", simple[None]), ("L_u", probes[None]), ("L_ual", heads[None]),
        ):  # fmt: skip
            assert_like(got, expected[f"t{t}_{name}"], atol=1e-4, rtol=1e-4, what=f"{name} at {t}")
        for threshold in p["thresholds"]:
            exits = layers.exits(threshold)
            assert torch.equal(exits, expected[f"t{t}_exit_{threshold}"]), f"exits at {t} below {threshold}"
            early = layers.at(exits)
            assert_like(early, expected[f"t{t}_out_{threshold}"], atol=1e-4, rtol=1e-4, what=f"output at {t}")
            with PartialNetwork(network, threshold=threshold):  # really leaves early
                assert_like(network(x, times), early, atol=1e-4, rtol=1e-4, what="left early")
