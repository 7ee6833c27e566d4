"""Checkers for the kinds of system `classification-probes` that are about the ADM backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diffrep.backbones.pixel_diffusion import AdmArchitecture, adm_backbone, convert, numbered_blocks

from .cases import assert_near, number_in, tensors_of


def _flags(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model" / "official_config.json").read_text()))


def check_adm_unet_blocks(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    weights = load_file(folder / "model" / "official_state_dict.safetensors")
    wanted = json.loads((folder / "model" / "diffusers_config.json").read_text())
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    assert AdmArchitecture.infer(shapes, _flags(folder)).diffusers_config() == wanted
    backbone = adm_backbone(weights, _flags(folder), name=folder.name)
    blocks = {f"block.{block['b']}": block for block in case["blocks"]}
    assert numbered_blocks(backbone.network) == [block["diffusers"] for block in blocks.values()]

    relative = number_in(case["tolerance"].replace("max |diff|", ""))
    compared = set()
    for key, timesteps in given.items():
        if not key.startswith("timesteps."):
            continue
        name = key.removeprefix("timesteps.")
        noisy = backbone.noisy_pixels((given["x_start"] + 1) / 2, given["noise"], timesteps)
        if f"{name}.x_t" in expected:
            assert_near(noisy, expected[f"{name}.x_t"], relative=relative, what=f"{name} x_t")
        maps = backbone.unet_maps(
            expected.get(f"{name}.x_t", noisy), [*blocks, "out"], timesteps, labels=given.get("class_labels")
        )
        compared.add(f"{name}.x_t")
        for tap, value in maps.items():
            stem = f"{name}.out" if tap == "out" else f"{name}.b{int(tap.removeprefix('block.')):02d}"
            for official, got in ((stem, value), (f"{stem}.pool2x2", F.adaptive_avg_pool2d(value, 2))):
                if official in expected:
                    assert_near(got, expected[official], relative=relative, what=official)
                    compared.add(official)
            if tap != "out":
                assert list(value.shape[1:]) == blocks[tap]["shape"]
    assert set(expected) <= compared
    for wanted, ending in (("full_timesteps", ""), ("pooled_timesteps", ".pool2x2")):
        for timestep in case[wanted]:
            steps = timestep if isinstance(timestep, list) else [timestep]
            name = f"t{'_'.join(map(str, steps))}"
            assert given[f"timesteps.{name}"].unique().tolist() == sorted(set(steps))
            assert {f"{name}.b{block['b']:02d}{ending}" for block in blocks.values()} <= compared


def check_adm_checkpoint_inventory(folder: Path, case: dict[str, Any]) -> None:
    def read(name: str) -> Any:
        return json.loads((folder / name).read_text())

    official = {key: torch.empty(shape, device="meta") for key, shape in read("official_keys.json").items()}
    architecture = AdmArchitecture.infer({key: value.shape for key, value in official.items()})
    assert architecture.diffusers_config() == read("diffusers_config.json")
    converted = convert(official, architecture)
    assert {key: list(value.shape) for key, value in converted.items()} == read("diffusers_keys.json")
    with torch.device("meta"):
        backbone = adm_backbone(official, name="adm256")
    assert sum(p.numel() for p in backbone.network.parameters()) == case["parameters"]
    taps = {tap.name: tap for tap in backbone.taps()}
    for block in read("blocks.json"):
        tap = taps[f"block.{block['b']}"]
        found = (tap.module, tap.channels, architecture.image_size // tap.stride)
        assert found == (block["diffusers"], block["channels"], block["size"])
    assert backbone.recommended.taps == ("block.24",)
