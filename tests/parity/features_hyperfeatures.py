"""Checker for the kind `hyperfeatures_aggregation` of system `features`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffrep.backbones import LatentDiffusion
from diffrep.backbones.hyperfeatures import TAPS, AggregationNetwork, Hyperfeatures, Trajectory, follow

from .cases import assert_near, tensors_of
from .features_unets import bare_backbone, sibling


def check_hyperfeatures_aggregation(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    model = re.search(r"\.\./([^/]+)/model", case["model"])
    assert model is not None
    backbone: LatentDiffusion = bare_backbone(sibling(folder, model[1]) / "model")
    groups = case["aggregation"]["num_norm_groups"]
    assert case["aggregation"]["num_res_blocks"] == 1, "the released network has one bottleneck a layer"
    for number, run in enumerate(case["runs"]):
        name, size = f"run{number}", (run["output_resolution"],) * 2
        guidance = None if run["guidance_scale"] == -1 else run["guidance_scale"]
        trajectory = Trajectory(
            steps=run["num_timesteps"], saved=tuple(run["save_timestep"]), mode=run["mode"], guidance=guidance
        )
        visited = sorted({max(before, after) for _, before, after in trajectory.visits()}, reverse=True)
        assert visited == run["timesteps"]
        taps = TAPS if run["idxs"] is None else [f"up.{i}.resnet.{j}.increment" for i, j in run["idxs"]]
        assert [backbone.tap(tap).channels for tap in taps] == run["feature_dims"]
        network = AggregationNetwork.load(folder / "model" / f"aggregation_{name}.safetensors", groups=groups)
        assert network.projection == case["aggregation"]["projection_dim"]

        contexts = {"context": given["cond"], "unconditional": given["uncond"]}
        steps = list(follow(backbone, given["latents"], taps, trajectory, to_the_end=True, **contexts))
        feats, official = [], expected[f"{name}.feats"]
        order = [step.number for step in steps]
        # the tolerance of a step grows with the passes before it
        allowed = [1e-4 if i == 0 else 1e-3 if i < 3 else 1e-2 for i in range(len(steps))]
        for i, saved in enumerate(run["save_timestep"]):
            step = steps[order.index(saved)]
            feats.append([F.interpolate(step.maps[tap], size=size, mode="bilinear") for tap in taps])
            joined, visit = torch.cat(feats[-1], dim=1), order.index(saved)
            assert_near(joined, official[:, i], relative=allowed[visit], what=f"{name} step {saved}")
        worst = allowed[max(order.index(saved) for saved in run["save_timestep"])]
        assert steps[-1].clean is not None
        assert_near(steps[-1].clean, expected[f"{name}.last_x0"], relative=allowed[-1], what=f"{name} last x0")

        wanted = expected[f"{name}.hyperfeatures"]
        maps = [part for i in range(official.shape[1]) for part in official[:, i].split(run["feature_dims"], dim=1)]
        assert_near(network(maps), wanted, relative=1e-5, what=f"{name} aggregation")
        streamed = Hyperfeatures(backbone, network, taps=taps, trajectory=trajectory)
        joined = streamed.join(given["latents"], given["cond"], given["uncond"], resolution=size)
        assert_near(joined, wanted, relative=worst, what=f"{name} hyperfeatures")
