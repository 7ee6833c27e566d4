"""`pipeline("depth")`: a task by its name, with the embedded model or a published one, ready to be called."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffrep.devices import resolve_device


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
        task: "depth", "normals" or "segmentation" of an image; "features" of one or more images (`extract`);
            "correspondence" of two images and points of the first (`Correspondence.match`).
        model: a name, folder or hub id of a head or backbone, a recipe for correspondence; the embedded one where None.
        device, dtype: as `load_backbone` has them.

    Raises:
        ValueError: there is no such task; the message lists the near names.
        HeadError, BackboneError: the model cannot be loaded.
        DeviceError: there is no such device here.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=2) or list(TASKS)
        raise ValueError(f"there is no task {task!r}; near names: {', '.join(near)}")
    embedded, load = TASKS[task]
    name = embedded if model is None else os.fspath(model)
    loaded, run = load(name, task, device=resolve_device(device), dtype=dtype)
    return Pipeline(task, loaded, run)


def _head(name: str, task: str, **where: Any) -> tuple[Any, Callable[..., Any]]:
    from diffrep.heads.loading import load_head

    known: Any = None if name.startswith("tiny-") else task
    head = load_head(name, task=known, **where)
    return head, head.predict


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
    "features": ("tiny", _features),
    "correspondence": ("tiny", _correspondence),
}
