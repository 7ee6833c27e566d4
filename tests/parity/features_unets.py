"""Checkers for the kinds of system `features` that read Stable Diffusion's U-Net in other ways than DIFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones import (
    Conditions,
    FreeU,
    LatentDiffusion,
    PromptEmbedding,
    draw_noise,
    gdf_tap,
    load_backbone,
)
from diffrep.features import ExtractConfig, extract, window_origins
from diffrep.images import Sizing, fit_image, load_image, stack_pixels

from .cases import ROOT, assert_near, assert_within, number_in, tensors_of

VARIANTS = {"sd-dino": {}, "geoaware": {"freeu": FreeU()}, "cleandift": {"clean": True, "timestep": 261}}
SCHEDULE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


def sibling(folder: Path, name: str) -> Path:
    """A folder of another case: beside this one, or among the committed cases."""
    here = folder.parent / name
    return here if here.is_dir() else ROOT / "features" / name


def input_of(block: int) -> str:
    """The tap of what goes into an output block of the U-Net of CompVis: what the block before it gives."""
    level, layer = divmod(block - 1, 3)
    if layer == 2 and level < 3:
        return f"up.{level}.upsampler"
    return f"up.{level}.{'attention' if level else 'resnet'}.{layer}"


def bare_backbone(folder: Path) -> LatentDiffusion:
    """U-Net and VAE without text encoders or a scheduler."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae = UNet2DConditionModel.from_pretrained(folder / "unet"), AutoencoderKL.from_pretrained(folder / "vae")
    return LatentDiffusion(unet, vae, SCHEDULE)


def check_sd_taps_tiled(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    backbone = bare_backbone(folder / "model")
    backbone.embed("", PromptEmbedding(given["prompt_embeds"]))
    shared = expected["shared_noise"]
    assert torch.equal(draw_noise(shared.shape[1:], 42), shared)
    relative = number_in(case["tolerance"]["features"])
    image, window = given["image"].numpy(), case["window"]
    height, width = image.shape[:2]
    assert min(height, width) >= window, "how an image smaller than a window is enlarged is not known here"
    for number, run in enumerate(case["runs"]):
        corners = [[y, x] for y in window_origins(height, window) for x in window_origins(width, window)]
        assert corners == run["window_origins_yx"]
        assert len(corners) == run["n_windows"]
        names, _, blocks = run["out"].partition(" = taps ")
        assert [int(block) for block in blocks.split(",")] == run["block_indices"]
        taps = {name: input_of(block) for name, block in zip(names.split(","), run["block_indices"], strict=True)}
        settings: dict[str, Any] = {"timestep": run["t"], **VARIANTS[run["variant"]]}
        config = ExtractConfig(
            taps=tuple(taps.values()),
            sizing=Sizing("native", None),
            window=window,
            seed=42,
            ensemble=1,
            posterior="mean",
            **settings,
        )
        maps = extract(backbone, [image], config).maps
        for name, tap in taps.items():
            official = expected[f"run{number}.{name}"]
            assert_near(maps[tap], official, relative=relative, what=f"run{number}.{name} ({run['variant']})")


def check_gdf_layer_names(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    model = sibling(folder, Path(case["model"].split()[0]).parts[-2]) / "model"
    backbone = load_backbone(model)
    assert isinstance(backbone, LatentDiffusion)
    assert backbone.scheduler is not None
    relative = number_in(case["tolerance"]["features"])
    for number, run in enumerate(case["runs"]):
        name = f"run{number}"
        prompt = backbone.embed(run["prompt"]).context
        assert_near(prompt, expected[f"{name}.prompt_embeds"], relative=relative, what="prompt")
        noise = given[f"{name}.noise"]
        assert run["timestep"] == run["t"] - 1 + backbone.scheduler["steps_offset"]  # of a thousand steps
        pixels = stack_pixels([fit_image(load_image(given["image"].numpy()), Sizing("squash", case["img_size"]))[0]])
        assert backbone.encode(pixels)[0].shape == noise.shape
        alpha = backbone.alphas_cumprod[run["timestep"]]
        noisy = alpha.sqrt() * given[f"{name}.latents"] + (1 - alpha).sqrt() * noise
        assert_within(noisy, given[f"{name}.noisy_latents"], atol=1e-5, what="noisy latents")

        conditions = Conditions(timestep=run["timestep"], prompt=run["prompt"])
        taps = {layer: gdf_tap(layer) for layer in run["layers"]}
        maps = backbone.network_maps(given[f"{name}.noisy_latents"], list(taps.values()), conditions)
        for layer, tap in taps.items():
            official = expected[f"{name}.{layer}"]
            assert list(official.shape) == run["shapes"][layer]
            got = by_head(maps[tap], official) if layer.endswith("-map") else maps[tap]
            assert_near(got, official, relative=relative, what=f"{layer} = {tap}")


def by_head(maps: Tensor, official: Tensor) -> Tensor:
    """(B, heads * keys, h, w) -> (B, heads, places, keys)."""
    return maps.unflatten(1, (official.shape[1], -1)).flatten(3).mT
