"""What differs between the one-step families, as data: Lotus, Marigold and E2E-FT share everything else.

Sources: Lotus arXiv 2409.18124, Marigold arXiv 2312.02145 and 2505.09358, E2E-FT arXiv 2409.11355, and the code that
their authors released.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["depth", "disparity", "normals"]
Frame = Literal["lub", "rub", "rdf"]
"""Camera axes in reading order x, y, z. A wall that faces the camera is (0, 0, 1) in "lub" (x left, y up, z to the
camera) and "rub" (x right), (0, 0, -1) in "rdf" (x right, y down, z forward; OpenCV)."""

FRAME_SIGNS: dict[Frame, tuple[int, int, int]] = {"lub": (1, 1, 1), "rub": (-1, 1, 1), "rdf": (-1, -1, -1)}
"""Factors of x, y, z that bring normals from "lub" to each frame, and back."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of checkpoints treats an image, a latent and what the VAE decodes.

    Attributes:
        resized: what is resized: float colours, or 8-bit ones (the result is rounded to 8 bits again).
        size_rule: "truncate" cuts side * min(R / W, R / H) to an integer in floating point, "integer" divides integers.
            They differ by a pixel for some sizes.
        pad: repeat the right and bottom edges up to a multiple of the VAE's stride and cut them off behind the
            decoder. Without, the VAE drops what does not fill a cell.
        posterior: which latent of the VAE's posterior the image becomes.
        first_latent: what the U-Net gets beside the image.
        task_vector: class vector of the annotation, or None.
        result: which latent is decoded: the network's output itself, DDIM's last sample, or its estimate of the clean
            latent.
        depth: the order of clamping to [-1, 1] and averaging the three channels.
        stretch: depth is stretched to [0, 1] by its minimum and maximum before it is resized.
        normals: "raw": clamped channels; "unit": of unit length where longer than 1e-6; "twice": divided by
            (length + 1e-5) two times.
        renormalize: normals get unit length again behind the resize.
        resize_back: "nearest", "antialias" (with the method that resized the image) or "interpolate".
        frame: camera axes of its normals.
        working_size: long side in pixels that the network sees by default.
    """

    name: str
    resized: Literal["float", "uint8"]
    size_rule: Literal["truncate", "integer"]
    pad: bool
    posterior: Literal["sample", "mean"]
    first_latent: Literal["none", "noise", "zeros"]
    task_vector: tuple[float, ...] | None
    result: Literal["output", "sample", "clean"]
    depth: Literal["clamp, mean", "mean, clamp"]
    stretch: bool
    normals: Literal["raw", "unit", "twice"]
    renormalize: bool
    resize_back: Literal["nearest", "antialias", "interpolate"]
    frame: Frame
    working_size: int = 768


def task_vector(switch: Sequence[float] = (1, 0)) -> tuple[float, ...]:
    """Lotus' class vector [sin, cos] of a switch in radians: (1, 0) annotates, (0, 1) draws the image again.

    >>> [round(x, 4) for x in task_vector()]
    [0.8415, 0.0, 0.5403, 1.0]
    """
    return (*map(math.sin, switch), *map(math.cos, switch))


LOTUS_G = Family(
    name="lotus-g",
    resized="float",
    size_rule="truncate",
    pad=False,
    posterior="sample",
    first_latent="noise",
    task_vector=task_vector(),
    result="output",
    depth="clamp, mean",
    stretch=False,
    normals="raw",
    renormalize=False,
    resize_back="nearest",
    frame="lub",
)
LOTUS_D = dataclasses.replace(LOTUS_G, name="lotus-d", first_latent="none")
MARIGOLD = Family(
    name="marigold",
    resized="uint8",
    size_rule="truncate",
    pad=False,
    posterior="mean",
    first_latent="noise",
    task_vector=None,
    result="sample",
    depth="mean, clamp",
    stretch=False,
    normals="unit",
    renormalize=False,
    resize_back="antialias",
    frame="rub",
)
MARIGOLD_DIFFUSERS = dataclasses.replace(  # the same checkpoints as diffusers' own pipelines run them
    MARIGOLD,
    name="marigold-diffusers",
    resized="float",
    size_rule="integer",
    pad=True,
    renormalize=True,
    resize_back="interpolate",
)
E2E_FT = dataclasses.replace(
    MARIGOLD, name="e2e-ft", first_latent="zeros", result="clean", stretch=True, normals="twice", frame="lub"
)

FAMILIES = {family.name: family for family in (LOTUS_G, LOTUS_D, MARIGOLD, MARIGOLD_DIFFUSERS, E2E_FT)}
