"""Which published model to take where the embedded ones are too small, and the line that says so.

The models in the package have seen nothing but rendered scenes: they show how things work, and answer about photographs
only roughly.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Literal

Job = Literal["features", "matching", "search", "probes", "depth", "normals", "segmentation"]


@dataclass(frozen=True)
class PublishedModel:
    """A model that its authors publish.

    Attributes:
        option: what to write on the command line.
        gigabytes: of its weights in half precision, about; what it needs of memory is a little more.
        about: one line.
        licence: of the weights; empty where it is not certain.
    """

    job: Job
    option: str
    gigabytes: float
    about: str
    licence: str = ""


MODELS = (  # of each job the first is recommended
    PublishedModel("depth", "--model jingheya/lotus-depth-d-v1-1", 2.6, "Lotus-D: one pass, depth, no noise"),
    PublishedModel("depth", "--model prs-eth/marigold-depth-v1-1", 2.6, "Marigold: one step or several, ensembles"),
    PublishedModel("depth", "--model GonzaloMG/marigold-e2e-ft-depth", 2.6, "E2E-FT: Marigold tuned to one step"),
    PublishedModel("normals", "--model jingheya/lotus-normal-d-v1-1", 2.6, "Lotus-D: one pass, no noise"),
    PublishedModel("normals", "--model prs-eth/marigold-normals-v1-1", 2.6, "Marigold: one step or several"),
    PublishedModel(
        "segmentation", "--model qianyu1217/diffdis", 2.7, "DiffDIS: masks and edges at 1024 pixels",
        "of SD-Turbo, from which it derives",
    ),
    PublishedModel("matching", "--recipe sd2.1-dinov2", 3.2, "Stable Diffusion 2.1 fused with DINOv2"),
    PublishedModel("matching", "--recipe dift", 2.6, "DIFT: Stable Diffusion 2.1 alone"),
    PublishedModel("features", "--backbone sd2.1", 2.6, "Stable Diffusion 2.1", "CreativeML Open RAIL++-M"),
    PublishedModel("features", "--backbone dinov2-base", 0.2, "a vision transformer, fast", "Apache-2.0"),
    PublishedModel("search", "--backbone dinov2-base", 0.2, "a vision transformer, fast", "Apache-2.0"),
    PublishedModel("probes", "--backbone dinov2-base", 0.2, "a vision transformer, fast", "Apache-2.0"),
    PublishedModel("probes", "--backbone sd2.1", 2.6, "Stable Diffusion 2.1", "CreativeML Open RAIL++-M"),
)  # fmt: skip


def recommended(job: Job) -> PublishedModel:
    """The published model to take for a job.

    >>> recommended("normals").option
    '--model jingheya/lotus-normal-d-v1-1'
    """
    return next(model for model in MODELS if model.job == job)


def note_embedded(name: str, job: Job) -> None:
    """Say on stderr, once for each job, that an embedded model answers; nothing where `name` is none."""
    if name == "tiny" or name.startswith("tiny-"):
        _say(name, job)


@cache
def _say(name: str, job: Job) -> None:
    print(
        f"note: {name} is a small model that has seen rendered scenes alone; for photographs take a published one:"
        f" {recommended(job).option}",
        file=sys.stderr,
    )
