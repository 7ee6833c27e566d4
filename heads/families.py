"""What differs between the one-step families, as data, in use and in training: the rest they share.

Lotus: one pass at one timestep, the output is the clean latent of the annotation; a task vector switches between
annotating and reconstructing the image (the "detail preserver"). E2E-FT: one pass from zeros, the loss is taken behind
the frozen VAE decoder. Marigold: plain diffusion of the annotation over all timesteps.

Sources: Lotus arXiv 2409.18124, Marigold arXiv 2312.02145 and 2505.09358, E2E-FT arXiv 2409.11355, and the code that
their authors released.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffrep.settings import check

Task = Literal["depth", "disparity", "normals"]
Predicts = Literal["sample", "epsilon", "v_prediction"]
Frame = Literal["lub", "rub", "rdf"]
"""Camera axes in reading order x, y, z. A wall that faces the camera is (0, 0, 1) in "lub" (x left, y up, z to the
camera) and "rub" (x right), (0, 0, -1) in "rdf" (x right, y down, z forward; OpenCV)."""

FRAME_SIGNS: dict[Frame, tuple[int, int, int]] = {"lub": (1, 1, 1), "rub": (-1, 1, 1), "rdf": (-1, -1, -1)}
"""Factors of x, y, z that bring normals from "lub" to each frame, and back."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of checkpoints treats an image, a latent and what the VAE decodes, and how it is trained.

    Raises:
        ValueError: settings of training that do not go together.
    """

    name: str
    resized: Literal["float", "uint8"] = "float"  # colours as they are resized; behind uint8 they are rounded again
    # "truncate" cuts side * min(R / W, R / H) to an integer in floating point, "integer" divides integers; they differ
    # by a pixel for some sizes
    size_rule: Literal["truncate", "integer"] = "truncate"
    # repeat the right and bottom edges up to a multiple of the VAE's stride and cut them off behind the decoder;
    # without, the VAE drops what does not fill a cell
    pad: bool = False
    posterior: Literal["sample", "mean"] = "sample"  # which latent of the VAE's posterior the image becomes
    first_latent: Literal["none", "noise", "zeros"] = "noise"  # what the U-Net gets beside the image
    task_vector: tuple[float, ...] | None = None  # class vector of the annotation
    # which latent is decoded: the network's output, DDIM's last sample, its estimate of the clean latent, or the
    # image's when the output is taken away
    result: Literal["output", "sample", "clean", "residual"] = "output"
    image_is_noisy: bool = False  # the rule "clean" takes the image's latent for the noisy one (restoration)
    depth: Literal["clamp, mean", "mean, clamp"] = "clamp, mean"  # to [-1, 1], and over the three channels, in order
    stretch: bool = False  # depth to [0, 1] by its minimum and maximum before it is resized
    # clamped channels; of unit length where longer than 1e-6; or divided by (length + 1e-5) two times
    normals: Literal["raw", "unit", "twice"] = "raw"
    half_z: bool = False  # z of its normals is decoded as 2 z - 1, for none looks away from the camera
    renormalize: bool = False  # normals get unit length again behind the resize
    shift_invariant: bool = True  # depth of the members of an ensemble has a shift of its own, not a scale alone
    # "antialias" with the method that resized the image
    resize_back: Literal["nearest", "antialias", "interpolate"] = "nearest"
    nearest: Literal["nearest-exact", "nearest"] = "nearest-exact"  # what its code means by "nearest", in torch's names
    frame: Frame = "lub"  # camera axes of its normals
    working_size: int = 768  # long side in pixels that the network sees by default
    # of training: what the output is, where in use a folder's scheduler says it; on which timesteps
    predicts: Predicts = "sample"
    timesteps: Literal["one", "all"] = "one"
    timestep: int = 999  # the one
    preserve: float = 0.0  # share of a batch that is also trained to reconstruct its image (detail preserver)
    loss: Literal["latent", "decoded"] = "latent"  # in latent space, or behind the VAE's decoder
    padded_context: bool = False  # the empty prompt padded to the tokenizer's length, not with its two tokens
    scale_bias: bool = False  # halve the bias too of a first convolution that is widened

    def __post_init__(self) -> None:
        check(self, preserve="[0, 1]", timestep="0..999", working_size="1..")
        if self.preserve and self.task_vector is None:
            raise ValueError("reconstructing the image (preserve > 0) needs the task vector")
        noiseless = self.predicts == "epsilon" and not self.image_is_noisy
        if self.first_latent != "noise" and (self.timesteps == "all" or noiseless):
            raise ValueError("predicting noise, or training on all timesteps, needs first_latent='noise'")
        if self.loss == "decoded" and self.preserve:
            raise ValueError("the decoded loss has no detail preserver: set preserve to 0")


def task_vector(switch: Sequence[float] = (1, 0)) -> tuple[float, ...]:
    """Lotus' class vector [sin, cos] of a switch in radians: (1, 0) annotates, (0, 1) draws the image again.

    >>> [round(x, 4) for x in task_vector()]
    [0.8415, 0.0, 0.5403, 1.0]
    """
    return (*map(math.sin, switch), *map(math.cos, switch))


LOTUS_G = Family(name="lotus-g", task_vector=task_vector(), preserve=1.0)
LOTUS_D = dataclasses.replace(LOTUS_G, name="lotus-d", first_latent="none")
MARIGOLD = Family(
    name="marigold",
    resized="uint8",
    posterior="mean",
    result="sample",
    depth="mean, clamp",
    normals="unit",
    resize_back="antialias",
    frame="rub",
    predicts="v_prediction",
    timesteps="all",
)
MARIGOLD_DIFFUSERS = dataclasses.replace(  # the same checkpoints as diffusers' own pipelines run them
    MARIGOLD,
    name="marigold-diffusers",
    resized="float",
    size_rule="integer",
    pad=True,
    renormalize=True,
    resize_back="interpolate",
    nearest="nearest",
)
E2E_FT = dataclasses.replace(
    MARIGOLD,
    name="e2e-ft",
    first_latent="zeros",
    result="clean",
    stretch=True,
    normals="twice",
    frame="lub",
    timesteps="one",
    loss="decoded",
    padded_context=True,
    scale_bias=True,
)

FAMILIES = {family.name: family for family in (LOTUS_G, LOTUS_D, MARIGOLD, MARIGOLD_DIFFUSERS, E2E_FT)}
