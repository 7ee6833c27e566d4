"""Tasks by name: `pipeline("depth")` is one that is ready to be called, with the embedded model or a published one.

The embedded models have seen nothing but rendered scenes: they show how things work, and answer about photographs only
roughly. `MODELS` lists published ones to take in their place. Torch is not needed before a pipeline is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffrep.settings import near_names

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pipeline:
    """A task that is ready to be called.

    Attributes:
        task: its name.
        model: what does the work: a head, a backbone, a `Correspondence`.
        run: what a call calls.
    """

    task: str
    model: Any
    run: Callable[..., Any]

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        return self.run(*inputs, **settings)

    def __repr__(self) -> str:
        return f"pipeline({self.task!r}, {getattr(self.model, 'name', None) or self.model!r})"


def pipeline(
    task: str,
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """What does a task, ready to be called.

        pipeline("depth")("room.jpg").save("depth.png")
        pipeline("correspondence")("cat.jpg", "dog.jpg", [(212, 130)])
        pipeline("features", "sd2.1")("cat.jpg", taps="up.1")

    Args:
        task: "depth", "normals", "segmentation" or "restore" of an image; "features" of one or more images (`extract`);
            "correspondence" of two images and points of the first (`Correspondence.match`); or one of `SYNONYMS`.
        model: a name, folder or hub id of a head or backbone, a recipe for correspondence; the embedded one where None.
        device, dtype: as `load_backbone` has them.

    Raises:
        ValueError: there is no such task; the message lists the near names.
        HeadError, BackboneError: the model cannot be loaded.
        DeviceError: there is no such device here.
    """
    from diffrep.devices import resolve_device

    task = task_named(task)
    embedded, load = TASKS[task]
    name = embedded if model is None else os.fspath(model)
    loaded, run = load(name, task, device=resolve_device(device), dtype=dtype)
    return Pipeline(task, loaded, run)


def task_named(name: str) -> str:
    """The name in `TASKS` that one of them or of `SYNONYMS` stands for.

    >>> task_named("segment")
    'segmentation'

    Raises:
        ValueError: there is no such task; the message lists the near names.
    """
    if (task := SYNONYMS.get(name, name)) in TASKS:
        return task
    raise ValueError(f"there is no task {name!r}; {near_names(name, [*TASKS, *SYNONYMS], TASKS)}")


def embedded_head(name: str) -> str:
    """The embedded head that a task's name or "tiny-" and a task's name stands for; any other name as it is.

    A head of one's own in a folder of that name goes first.

    >>> embedded_head("depth"), embedded_head("tiny-restoration"), embedded_head("lotus")
    ('tiny-depth', 'tiny-restore', 'lotus')
    """
    task = name.removeprefix("tiny-")
    task = SYNONYMS.get(task, task)
    if task not in TASKS or TASKS[task][1] is not _head or Path(name).is_file():
        return name
    lies_here = any((Path(name) / file).is_file() for file in ("head.json", "unet/config.json", "config.json"))
    return name if lies_here else TASKS[task][0]


def _head(name: str, task: str, **where: Any) -> tuple[Any, Callable[..., Any]]:
    from diffrep.heads.head import HeadError
    from diffrep.heads.loading import load_head

    try:
        head = load_head(name, task=task, **where)
    except HeadError as error:
        if task != "depth":
            raise
        try:
            head = load_head(name, task="disparity", **where)  # which says how near things are as well
        except HeadError:
            raise error from None
    return head, head


def _features(name: str, task: str, **where: Any) -> tuple[Any, Callable[..., Any]]:
    from diffrep.backbones import load_backbone
    from diffrep.features import extract

    backbone = load_backbone(name, **where)
    return backbone, partial(extract, backbone)


def _correspondence(name: str, task: str, **where: Any) -> tuple[Any, Callable[..., Any]]:
    from diffrep.recipes import Correspondence

    correspondence = Correspondence(name, **where)
    return correspondence, correspondence.match


TASKS: dict[str, tuple[str, Callable[..., tuple[Any, Callable[..., Any]]]]] = {  # task -> embedded model, its loader
    "depth": ("tiny-depth", _head),
    "normals": ("tiny-normals", _head),
    "segmentation": ("tiny-segmentation", _head),
    "restore": ("tiny-restore", _head),
    "features": ("tiny", _features),
    "correspondence": ("tiny", _correspondence),
}

SYNONYMS = {  # other words for the tasks
    "disparity": "depth",
    "depth-estimation": "depth",
    "normal": "normals",
    "surface-normals": "normals",
    "segment": "segmentation",
    "mask": "segmentation",
    "restoration": "restore",
    "upscale": "restore",
    "super-resolution": "restore",
    "extract": "features",
    "feature-extraction": "features",
    "match": "correspondence",
    "matching": "correspondence",
}


Job = Literal["features", "matching", "search", "probes", "depth", "normals", "segmentation", "restore"]


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
    PublishedModel("depth", "--model jingheya/lotus-depth-d-v1-1", 2.6, "Lotus-D: one pass, no noise", "Apache-2.0"),
    PublishedModel(
        "depth", "--model prs-eth/marigold-depth-v1-1", 2.6, "Marigold: one step or several, ensembles", "RAIL++-M"
    ),
    PublishedModel("depth", "--model GonzaloMG/marigold-e2e-ft-depth", 2.6, "E2E-FT: Marigold tuned to one step"),
    PublishedModel("normals", "--model jingheya/lotus-normal-d-v1-1", 2.6, "Lotus-D: one pass, no noise", "Apache-2.0"),
    PublishedModel(
        "normals", "--model prs-eth/marigold-normals-v1-1", 2.6, "Marigold: one step or several", "RAIL++-M"
    ),
    PublishedModel(
        "segmentation",
        "--model qianyu1217/diffdis",
        2.7,
        "DiffDIS: masks and edges at 1024 pixels",
        "code MIT; weights of SD-Turbo, from which they derive",
    ),
    PublishedModel(
        "restore",
        "--model pisa_sr.pkl --base stable-diffusion-2-1-base",
        2.6,
        "PiSA-SR: one pass, two strengths",
        "none stated",
    ),
    PublishedModel("restore", "--model osediff.pkl --base stable-diffusion-2-1-base", 2.6, "OSEDiff", "Apache-2.0"),
    PublishedModel(
        "restore",
        "--model s3diff.pkl --base sd-turbo",
        2.6,
        "S3Diff: looks at blur and noise first",
        "Apache-2.0, of SD-Turbo besides",
    ),
    PublishedModel(
        "matching",
        "--recipe sd2.1-dinov2",
        2.8,
        "Stable Diffusion 2.1 fused with DINOv2",
        "CreativeML Open RAIL++-M; Apache-2.0",
    ),
    PublishedModel("matching", "--recipe dift", 2.6, "DIFT: Stable Diffusion 2.1 alone", "CreativeML Open RAIL++-M"),
    PublishedModel("features", "--backbone sd2.1", 2.6, "Stable Diffusion 2.1", "CreativeML Open RAIL++-M"),
    PublishedModel("features", "--backbone dinov2-base", 0.2, "a vision transformer, fast", "Apache-2.0"),
    PublishedModel("search", "--backbone dinov2-base", 0.2, "a vision transformer, fast", "Apache-2.0"),
    PublishedModel("probes", "--backbone dinov2-base", 0.2, "a vision transformer, fast", "Apache-2.0"),
    PublishedModel("probes", "--backbone sd2.1", 2.6, "Stable Diffusion 2.1", "CreativeML Open RAIL++-M"),
)


def recommended(job: Job) -> PublishedModel:
    """The published model to take for a job.

    >>> recommended("normals").option
    '--model jingheya/lotus-normal-d-v1-1'
    """
    return next(model for model in MODELS if model.job == job)


def note_embedded(job: Job, *names: str) -> None:
    """Say on stderr, once for each job, that an embedded model answers: the first of these; nothing without one."""
    for name in names:
        if (model := name.partition("?")[0]) in _embedded():
            return _say(model, job)


@cache
def _embedded() -> frozenset[str]:
    return frozenset(entry.name for entry in Path(__file__).with_name("models").iterdir())


@cache
def _say(name: str, job: Job) -> None:
    print(
        f"note: {name} is a small model that has seen rendered scenes alone; for photographs take a published one:"
        f" {recommended(job).option}",
        file=sys.stderr,
    )
