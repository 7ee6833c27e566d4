"""Images through the whole of DiffDIS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from diffrep.heads.segmentation import DiffDis, ensemble, ensemble_sizes, finish, image_pixels

from .cases import each, tensors_of
from .diffdis_unet import assert_equal, load_unet


def load_pipeline(folder: Path, text: Tensor) -> DiffDis:
    unet, schedule = load_unet(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    return DiffDis(unet, vae, text, schedule)


@torch.no_grad()
def check_pipeline(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    head, tolerance = load_pipeline(folder / "model", given["text"]), case["tolerance"]
    described = ("fraction_of_raw_mask_inside_clip", "mask_std", "edge_std", "mask_edge_max_difference")
    for variant in each(case["variants"], describing=described):
        name = variant["name"]
        pixels, noise = given[f"{name}/image"].float() / 255, given[f"{name}/noise"]
        assert pixels.shape[-2:] == (variant["image_side"], variant["image_side"])
        latents = head.encode_scales(pixels)
        for level, latent in enumerate(latents):
            key = f"{name}/rgb_latent_{2**level}"
            assert_equal(latent, expected[key], tolerance["rgb_latent"], key)
        output = head.unet(latents, noise, head.context)
        assert_equal(output, expected[f"{name}/unet_out"], tolerance["unet_out"], f"{name}/unet_out")
        clean = head.predict_latents(latents, noise, edges=True)
        assert_equal(clean, expected[f"{name}/x0"], tolerance["x0"], f"{name}/x0")
        raw = dict(zip(("mask", "edge"), head.forward(pixels, noise, edges=True), strict=True))
        for kind, maps in raw.items():
            if f"{name}/{kind}_raw" in expected:
                assert_equal(maps, expected[f"{name}/{kind}_raw"], tolerance["raw"], f"{name}/{kind}_raw")
            got = finish(maps)[0, 0]
            assert_equal(got, expected[f"{name}/{kind}"], tolerance[kind], f"{name}/{kind}")
        alone, none = head.forward(pixels, noise)
        assert none is None
        assert_equal(finish(alone)[0, 0], expected[f"{name}/mask"], tolerance["mask"], f"{name}/mask alone")
        torch.testing.assert_close(finish(alone), finish(raw["mask"]), atol=1e-4, rtol=0)


def published_grey(maps: Tensor, size: tuple[int, int]) -> Image.Image:
    """A map as the authors' script writes it: 255 * x cut to 8 bits, then enlarged bilinearly by Pillow.

    Args:
        maps: (H, W) in [0, 1].
        size: (height, width) of the original image.
    """
    grey = Image.fromarray((maps.float() * 255).to(torch.uint8).cpu().numpy())
    return grey.resize(size[::-1], Image.Resampling.BILINEAR)


@torch.no_grad()
def check_tta_image(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    head = load_pipeline((folder / case["model"]).resolve(), given["text"])
    side = case["processing_res"]
    for variant in each(case["variants"], describing=("mask_levels", "mask_std")):
        name = variant["name"]
        assert [list(size) for size in ensemble_sizes((side, side), head.multiple) * 2] == variant["passes"]
        image = Image.fromarray(given[f"{name}/image"].numpy())
        pixels = image_pixels(image, (side, side))
        noises = [given[f"{name}/noise_flip{flip}_scale{scale}"] for flip in range(2) for scale in range(3)]
        plain, _ = head.forward(pixels, noises[1])
        every_fourth = finish(plain)[0, 0, ::4, ::4]
        key = f"{name}/mask_scale1_noflip"
        assert_equal(every_fourth, expected[key], case["tolerance"]["mask_scale1_noflip"], key)
        for kind, maps in zip(("mask", "edge"), ensemble(head, pixels, noises, edges=True), strict=True):
            assert maps is not None
            got = torch.tensor(list(published_grey(maps[0, 0], tuple(variant["image_hw"])).tobytes()))
            levels = (got.view(variant["image_hw"]) - expected[f"{name}/{kind}"].int()).abs()
            # "at most 1 grey level, and equal in 98% of the pixels"
            assert levels.max() <= 1, f"{name}/{kind}"
            assert (levels == 0).float().mean() >= 0.98, f"{name}/{kind}"
