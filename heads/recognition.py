"""What a folder of a one-step head holds, said by its configurations alone: `recognise`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from diffrep.heads.families import FAMILIES, LOTUS_D, LOTUS_G, MARIGOLD, Family, Frame, Task
from diffrep.heads.head import HeadError
from diffrep.heads.head_folders import DIFFDIS, HEAD_FILE, MARIGOLD_KEYS, published
from diffrep.heads.one_step import TIMESTEP, Schedule
from diffrep.heads.restoration.families import RESTORATION_FAMILIES

RESTORATION = "restore"
TASKS, FAMILY_NAMES = (*get_args(Task), "segmentation", RESTORATION), (*FAMILIES, DIFFDIS, *RESTORATION_FAMILIES)
PIPELINE_TASKS: dict[str, Task] = {"MarigoldDepthPipeline": "depth", "MarigoldNormalsPipeline": "normals"}


@dataclass(frozen=True)
class Recognised:
    """What a folder is, and which of its files said so."""

    family: Family
    task: Task
    reason: str


def check_names(task: str | None, family: str | None) -> None:
    """Refuse the name of a task or family that does not exist.

    Raises:
        HeadError: naming the known ones.
    """
    for what, value, allowed in (("task", task, TASKS), ("family", family, FAMILY_NAMES)):
        if value is not None and value not in allowed:
            raise HeadError(f"there is no {what} {value!r}; known are {', '.join(allowed)}")


def recognise(
    name: str,
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    head: Mapping[str, Any],
    index: Mapping[str, Any],
    task: str | None = None,
    family: str | None = None,
) -> Recognised:
    """What a folder of a head for depth or normals holds, from its configs.

    Args:
        unet, vae: ``unet/config.json``, ``vae/config.json``.
        head: our own ``head.json``; empty where there is none.
        index: ``model_index.json``; Marigold's says its task in newer releases.
        task, family: named by the caller, for what is not known.

    Raises:
        HeadError: another kind of network, a contradiction, or a task that nothing tells.
    """
    check_names(task, family)
    known_family, known_task = published(name)
    detected, shape = _family_of(name, unet, vae, family or head.get("family") or known_family)
    if family is not None and FAMILIES[family] != detected:
        raise HeadError(f"{name}: is no {family}: {shape}, which is {detected.name}")

    tasks = get_args(Task)
    by_index = index.get("prediction_type") if index.get("prediction_type") in tasks else None
    by_index = by_index or PIPELINE_TASKS.get(str(index.get("_class_name")))
    sayings = ((head.get("task"), HEAD_FILE), (known_task, "a published checkpoint"), (by_index, "model_index.json"))
    said, by = next((saying for saying in sayings if saying[0]), (None, ""))
    if said is not None and said not in tasks:
        raise HeadError(f"{name}: is a head for {said}, not for {', '.join(tasks)}")
    if task is not None and said is not None and task != said:
        raise HeadError(f"{name}: predicts {said} (said by {by}), but the task {task} was asked for")
    final: Any = said or task
    if final is None:
        raise HeadError(
            f"{name}: is a {detected.name} ({shape}), but its files do not say what it predicts: name the task, one of"
            f" {', '.join(tasks)}"
        )

    working = integer(name, head, "working_size", 0) or integer(name, index, "default_processing_resolution", 0)
    frame = head["frame"] if head.get("frame") in get_args(Frame) else detected.frame
    detected = dataclasses.replace(detected, working_size=working or detected.working_size, frame=frame)
    if detected.result == "sample":
        full_z, shift = (bool({**index, **head}.get(key, True)) for key in MARIGOLD_KEYS)
        detected = dataclasses.replace(detected, half_z=not full_z, shift_invariant=shift)
    return Recognised(detected, final, f"{shape}; task {f'said by {by}' if said else 'as asked for'}")


def _family_of(name: str, unet: Mapping[str, Any], vae: Mapping[str, Any], asked: str | None) -> tuple[Family, str]:
    """The family of a U-Net's inputs and class embedding, and these in words.

    A class embedding of 4 numbers is Lotus': with the image's latent alone D, with noise beside it G. Without one, a
    U-Net that takes two latents is Marigold's or E2E-FT's, which the files do not tell apart: it is what was asked for.

    Raises:
        HeadError: no head for depth or normals has such a U-Net, or not the family that was asked for.
    """
    latent, inputs = integer(name, vae, "latent_channels", 4), integer(name, unet, "in_channels", 0)
    width = unet.get("projection_class_embeddings_input_dim") if unet.get("class_embed_type") else None
    shape = f"{inputs} input channels, {'task vector' if width else 'no task vector'}"
    if width == 10:
        raise HeadError(f"{name}: is a GeoWizard, whose U-Net predicts depth and normals jointly; it is not supported")
    if unet.get("class_embed_type") not in (None, "projection") or width not in (None, 4) or inputs % latent:
        more = f" and a class embedding of {width} numbers" if width is not None else ""
        raise HeadError(f"{name}: is no one-step head: its U-Net takes {inputs} channels{more}")
    if (width, inputs) == (None, latent):
        raise HeadError(
            f"{name}: is a plain diffusion model and no head: {shape}; `diffrep train depth` makes one of it"
        )
    by_shape = {(4, 1): LOTUS_D, (4, 2): LOTUS_G, (None, 2): FAMILIES.get(asked or "", MARIGOLD)}
    if (detected := by_shape.get((width, inputs // latent))) is None:
        raise HeadError(f"{name}: is no one-step head: {shape}")
    if width is None and detected.task_vector is not None:
        raise HeadError(f"{name}: is no {detected.name}: {shape}")
    return detected, shape


def integer(name: str, config: Mapping[str, Any], key: str, default: int) -> int:
    """A number of a configuration.

    Raises:
        HeadError: it is negative, or no whole number.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or value < 0:
        raise HeadError(f"{name}: {key} must be a whole number, the configuration has {value!r}")
    return value


def spacing_note(family: Family, schedule: Schedule) -> str:
    """Why a folder's head does not take its timesteps where its scheduler says; empty where it does.

    The schedulers of the first Marigolds name leading timesteps, of which a single one is 1: a network that gets noise
    alone is told that its input is all but finished. What it learnt for noise alone it learnt at 999.
    """
    if family.result != "sample" or schedule.stated_single == TIMESTEP:
        return ""
    note = (
        f"its scheduler says {schedule.stated} timesteps, with which diffusers takes a single step at"
        f" {schedule.stated_single}; trailing ones are taken, a single step at {TIMESTEP}: it begins with noise alone,"
        f" and what to make of that the network learnt at {TIMESTEP} (E2E-FT, arXiv 2409.11355)"
    )
    return note + ("; --spacing leading does as the scheduler says" if schedule.stated == "leading" else "")
