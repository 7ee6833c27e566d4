"""Checkers for the kinds of system `features` that are about backbones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from diffrep.backbones import Conditions, LatentDiffusion, load_backbone
from diffrep.backbones.vit_loading import dinov2_backbone
from diffrep.features import window_origins
from diffrep.fusion import log_bin
from diffrep.images import Sizing, fit_image, load_image, stack_pixels

from .cases import assert_near, assert_within, number_in, tensors_of

# whether an official call gives the mean over the ensemble, or its members
AVERAGES = {"SDFeaturizer.forward": True, "SDFeaturizer4Eval.forward": True, "OneStepSDPipeline.__call__": False}


def check_dift_sd_taps(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    backbone = load_backbone(folder / "model")
    assert isinstance(backbone, LatentDiffusion)
    image = load_image(given["image"].numpy())
    tolerance = {key: number_in(text) for key, text in case["tolerance"].items()}
    for number, run in enumerate(case["runs"]):
        name = f"run{number}"
        size, words = run["img_size"], run.get("category")
        assert words is None or run["prompt"] in (f"a photo of a {words}", "")  # unknown words: the empty prompt
        # "0 keeps the size"; where that is no multiple of 8 the VAE cuts, which is below what `maps` takes
        sizing = Sizing("squash", (size[1], size[0])) if size else Sizing("native", None, multiple=1)
        pixels = stack_pixels([fit_image(image, sizing)[0]])

        embeds = backbone.embed(run["prompt"]).context
        assert_within(embeds, expected[f"{name}.prompt_embeds"], atol=tolerance["prompt_embeds"], what="prompt")
        mean, std = backbone.encode(pixels)
        assert list(mean.shape[-2:]) == run["latent_hw"]
        assert_within(mean, expected[f"{name}.posterior_mean"], atol=tolerance["posterior"], what="mean")
        assert_within(std, expected[f"{name}.posterior_std"], atol=tolerance["posterior"], what="std")
        posterior_noise, noise = given[f"{name}.posterior_eps"], given[f"{name}.noise"]
        latents = backbone.noisy(mean, std * posterior_noise, noise, run["t"])
        assert_within(latents, expected[f"{name}.noisy_latents"], atol=tolerance["noisy_latents"], what="noisy latents")

        indices = run["up_ft_index"] if isinstance(run["up_ft_index"], list) else [run["up_ft_index"]]
        taps, average = [f"up.{k}" for k in indices], AVERAGES[run["api"]]
        conditions = Conditions(
            timestep=run["t"], prompt=run["prompt"], ensemble=run["ensemble_size"], posterior="sample"
        )
        if any(side % backbone.multiple for side in pixels.shape[-2:]):
            maps = backbone.network_maps(latents, taps, conditions)
            maps = {tap: m.mean(0, keepdim=True) if average else m for tap, m in maps.items()}
        else:
            drawn = {"posterior_noise": posterior_noise, "noise": noise}
            maps = backbone.maps(pixels, taps, conditions, average=average, **drawn)
        for k in indices:
            assert_near(
                maps[f"up.{k}"],
                expected[f"{name}.up_ft{k}"],
                relative=tolerance["up_ft"],
                what=f"{name} up.{k}",
            )
    assert len({k.split(".")[0] for k in expected}) == len(case["runs"])


def check_dinov2_extractor(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    config = json.loads((folder / "model" / "config.json").read_text())
    weights = load_file(folder / "model" / "dinov2.safetensors")
    image = Image.fromarray(given["image"].numpy())
    relative = number_in(case["tolerance"]["run"])
    for number, run in enumerate(case["runs"]):
        name = f"run{number}"
        backbone = dinov2_backbone(weights, config, stride=run["stride"], name=name, source=str(folder))
        width, height = run["size_wh"]
        pixels = stack_pixels([fit_image(image, Sizing("squash", (height, width), resample="lanczos"))[0]])
        if f"preprocessed_{name}" in expected:
            normalised = (pixels - backbone.mean[:, None, None]) / backbone.std[:, None, None]
            assert_near(normalised, expected[f"preprocessed_{name}"], relative=relative, what="preprocessed")
        facet = "" if run["facet"] == "token" else f".{run['facet']}"
        tap = f"layer.{run['layer']}{facet}"
        if run.get("bin"):
            binned = log_bin(backbone.maps(pixels, [tap])[tap])
            got = binned.flatten(2).mT
        else:
            got = backbone.tokens(pixels, [tap])[tap][:, 1:]  # the official extractor keeps the registers
            feature_map = backbone.maps(pixels, [tap])[tap]
            assert list(feature_map.shape[-2:]) == run["num_patches_hw"]
            assert torch.equal(feature_map.flatten(2).mT, got[:, backbone.prefix - 1 :])
        assert_near(got[:, None], expected[name], relative=relative, what=f"{name} {tap}")
    assert all(np.isfinite(t.numpy()).all() for t in expected.values())
    assert window_origins(960, 512) == [0, 448]
