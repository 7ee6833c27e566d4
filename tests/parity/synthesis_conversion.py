"""Kind `ldm_unet`: the authors' checkpoint, converted, against the reference's conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffrep.synthesis import SynthesisModel, load_synthesis
from diffrep.synthesis.checkpoints import autoencoder_name, convert_official, unet_name

from .synthesis_model import check_network, tolerances_of


def official_weights(folder: Path, model: SynthesisModel) -> dict[str, Tensor]:
    """The stored official state dict, or the model's tensors under the official names of ``key_map.json``."""
    if (file := folder / "official_state_dict.safetensors").is_file():
        return load_file(file)
    names = json.loads((folder / "key_map.json").read_text())
    weights = {}
    for part, module in (("unet", model.unet), ("vqvae", model.autoencoder)):
        state = module.state_dict()
        for official, ours in names[part].items():
            matrix = ".mid.attn_1." in official and state[ours].ndim == 2
            weights[names[f"{part}_prefix"] + official] = state[ours][:, :, None, None] if matrix else state[ours]
    for number, token in enumerate(("patch_fc", "region_fc")[: len(model.embedder.dims)]):
        for kind in ("weight", "bias"):
            weights[f"{names['cond_stage_prefix']}{token}.{kind}"] = getattr(model.embedder.tokens[number], kind)
    return weights


def plain_config(module: Any) -> Any:
    """A module's config as JSON has it: lists, no tuples."""
    return json.loads(json.dumps({k: v for k, v in module.config.items() if not k.startswith("_")}))


def check_conversion(folder: Path, case: dict[str, Any], given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    model = load_synthesis(folder / "model")
    names = json.loads((folder / "key_map.json").read_text())
    official = case["official_config"]
    layers, levels = official["unet_config"]["num_res_blocks"], len(official["unet_config"]["channel_mult"])
    coder_levels = len(official["first_stage_config"]["ddconfig"]["ch_mult"])
    assert {k: unet_name(k, layers, levels) for k in names["unet"]} == names["unet"]
    assert {k: autoencoder_name(k, coder_levels) for k in names["vqvae"]} == names["vqvae"]

    weights, groups = official_weights(folder, model), case["parameters"]["groups"]
    assert not case["parameters"]["use_ema"] or any(key.startswith("model_ema.") for key in weights)
    scale = case["parameters"]["scale_factor"]
    assert model.autoencoder.config.scaling_factor == pytest.approx(scale, rel=1e-6)
    if official.get("scale_factor", 1.0) != scale:  # then the checkpoint has it, as a float32 buffer
        weights.setdefault("scale_factor", torch.tensor(scale))
    converted = convert_official(weights, official, groups=groups, ema=case["parameters"]["use_ema"])
    for part in ("unet", "autoencoder", "embedder"):
        ours, reference = getattr(converted, part), getattr(model, part)
        if part != "embedder":
            config, wanted = plain_config(ours), plain_config(reference)
            scales = [values.pop("scaling_factor", 1.0) for values in (config, wanted)]
            assert scales[0] == pytest.approx(scales[1], rel=1e-6), f"scale factor of {part}"
            assert config == wanted, f"config of {part}"
        assert ours.state_dict().keys() == reference.state_dict().keys()
        for key, value in reference.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), f"{part}: {key}"
    if case["parameters"]["use_ema"]:
        raw = convert_official(weights, official, groups=groups, ema=False)
        check_network(raw, given, expected, tolerances_of(case), weights="raw_")
