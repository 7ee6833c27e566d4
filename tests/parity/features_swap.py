"""Checker of cases of kind `swap_nearest_patch`: square padding of images and the dense swap of colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.features import Descriptors
from diffrep.images import Sizing, fit_image
from diffrep.swap import swap_colours

from .cases import assert_within, number_in, tensors_of


def check(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    params, side = case["params"], case["params"]["resolution"]
    padded = {}
    for name in (key for key in expected if "padded_image" in key):
        edge, _, number = name.rpartition("padded_image")
        image = Image.fromarray(given[f"image{number}"].numpy())
        assert list(image.size) == params[f"image{number}_wh"]
        sizing = Sizing("pad", side, resample="lanczos", fill="edge" if edge else "black")
        padded[name], _ = fit_image(image, sizing)
        assert torch.equal(padded[name].movedim(0, -1), expected[name]), name

    masks = [F.interpolate(given[f"mask{k}"][None, None], size=(side, side))[0, 0] for k in (1, 2)]
    # the released code stretches the masked image to [0, 1] as a whole
    colours = padded["padded_image2"].float() * masks[1]
    colours = (colours - colours.min()) / (colours.max() - colours.min())
    assert_within(colours.movedim(0, -1), expected["image2_masked"], atol=1e-6, what="masked image")

    one, two = (Descriptors.from_vectors(given[f"features{k}"][0].movedim(0, -1), (side, side)) for k in (1, 2))
    swapped = {
        "replaced": swap_colours(one, two, colours, (side, side), pose_mask=masks[0], mask=masks[1]),
        "replaced_nomask_features": swap_colours(one, two, colours, (side, side)),
    }
    for name, got in swapped.items():
        _assert_mostly_equal(got.movedim(0, -1), expected[name], case["tolerance"]["replaced"], name)


def _assert_mostly_equal(got: Tensor, expected: Tensor, tolerance: str, what: str) -> None:
    """``equal on >= 99.8% of pixels, atol 1e-6 there``"""
    pixels, _, there = tolerance.partition("atol")
    wanted = number_in(pixels.replace(">=", " ").replace("%", " ")) / 100
    share = float(((got - expected).abs().amax(-1) <= number_in(there)).float().mean())
    assert share >= wanted, f"{what}: equal on {share:.4f} of the pixels"
