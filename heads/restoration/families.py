"""How the published one-step restorers treat an image, as data: what differs, on top of what one-step heads share.

Sources: PiSA-SR arXiv 2412.03017, OSEDiff arXiv 2406.08177, S3Diff arXiv 2409.17058, and their authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from diffrep.heads.families import Family
from diffrep.heads.restoration.pixels import Colours

S3DIFF_PROMPT = "A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting."
S3DIFF_NEGATIVE = "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth"


@dataclass(frozen=True, kw_only=True)
class RestorationFamily(Family):
    """One family of checkpoints that make images better."""

    first_latent: Literal["none", "noise", "zeros"] = "none"
    upscale: Literal["bicubic", "bilinear"] = "bicubic"  # how the image is enlarged before the network
    smallest: int = 1  # pixels that the short side has at least, enlarged
    multiple: int = 8  # sides the network sees are multiples of this:
    fit: Literal["mirror", "lanczos"] = "mirror"  # padded by a mirror image and cut off behind it, or made smaller
    colours: Colours = "adain"  # how colours are taken from the enlarged image
    tiled_colours: Colours | None = None  # of images larger than a tile, where tiles may differ; None: the same
    tile: int = 96  # latent cells of a tile's side
    overlap: int = 32  # cells that neighbours have in common
    guidance: float = 1.0  # the negative prompt's output plus this times the difference to the prompt's
    prompt: str = ""
    negative: str = ""
    process: str = ""  # of `residual.PROCESSES`: it starts from noise around the image; none: one pass on the image
    steps: int = 1  # of the process


PISA_SR = RestorationFamily(
    name="pisa-sr", result="residual", timestep=1, posterior="sample", smallest=512, fit="lanczos"
)
OSEDIFF = replace(PISA_SR, name="osediff", result="clean", timestep=999, image_is_noisy=True, predicts="epsilon")
S3DIFF = RestorationFamily(
    name="s3diff",
    result="clean",
    image_is_noisy=True,
    predicts="epsilon",
    posterior="sample",
    upscale="bilinear",
    multiple=64,
    colours="wavelet",
    guidance=1.07,
    prompt=S3DIFF_PROMPT,
    negative=S3DIFF_NEGATIVE,
)
# trained as Lotus-D is, on the latent of the original instead of an annotation's
TINY = RestorationFamily(
    name="restore", result="residual", timestep=1, posterior="mean", colours="wavelet", tiled_colours="low-band",
    tile=32, overlap=8, working_size=128,
)  # fmt: skip

# ResShift, SinSR and RDDM on a latent U-Net that sees the image's latent beside the state. Their authors' networks have
# no such layout: Swin layers and a VQ autoencoder, pixels.
RESIDUAL = tuple(
    replace(TINY, name=name, process=name, steps=steps, result="clean", first_latent="noise")
    for name, steps in {"resshift": 15, "resshift-4": 4, "sinsr": 1, "rddm": 5}.items()
)
RESTORATION_FAMILIES = {family.name: family for family in (PISA_SR, OSEDIFF, S3DIFF, TINY, *RESIDUAL)}
