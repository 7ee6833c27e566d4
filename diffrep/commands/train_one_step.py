"""``diffrep train depth`` and ``diffrep train normals``: one-step heads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffrep.backbones.pipelines import load_parts
from diffrep.eval.scene_maps import SceneValidation
from diffrep.files import replace_folder
from diffrep.heads.loading import write_head
from diffrep.heads.training.dense import RECIPES, OneStepModel, Task
from diffrep.heads.training.dense_data import AnnotatedImages, SceneSamples
from diffrep.heads.training.dense_fit import (
    PUBLISHED_BATCH,
    OneStepTraining,
    embedded,
    published_fit,
    train_one_step,
)
from diffrep.heads.training.hypersim import Hypersim
from diffrep.heads.training.vkitti import VirtualKitti
from diffrep.scenes import SceneSet, render_set

RecipeName = Literal["lotus-d", "lotus-g", "e2e-ft", "marigold"]


@dataclass(frozen=True, kw_only=True)
class OneStepOptions:
    """Options that depth and normals share. With `--base tiny --data scenes`, the defaults made the embedded heads."""

    base: str = "tiny"  # embedded model, diffusers folder or hub id whose U-Net is trained
    data: tuple[str, ...] = ("scenes",)  # scenes, scenes=FOLDER, hypersim=FOLDER, vkitti2=FOLDER
    shares: tuple[float, ...] | None = None  # how often a batch comes from each; hypersim 0.9, vkitti2 0.1, else equal
    recipe: RecipeName = "lotus-d"
    work: Path | None = None  # checkpoints, logs, validation pictures; runs/TASK
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the head's folder; WORK/head
    latents: Path | None = None  # encoded scenes, which heads of one base can share; WORK
    scenes: int = 24000  # rendered for training where --data scenes names no folder
    steps: int | None = None  # optimiser steps; by the recipe where left out
    minutes: float | None = None  # or this long, whichever ends first
    batch_size: int | None = None  # images of a batch and device
    learning_rate: float | None = None
    accumulate: int | None = None  # batches of an optimiser step
    preserve: float | None = None  # share of a batch that also reconstructs its image (Lotus' detail preserver)
    scratch: bool = False  # start from random weights
    gradient_checkpointing: bool = False  # less memory, more time
    validate_every: int = 500  # steps between measurements and pictures of held-out scenes
    validation_scenes: int = 48
    seed: int | None = None

    def _training(self, task: Task) -> OneStepTraining:
        """The settings that these options mean.

        Raises:
            ValueError: options that do not go together.
        """
        ours = self.base == "tiny" and all(name.startswith("scenes") for name in self.data)
        recipe, fit, batch = RECIPES[self.recipe], published_fit(self.recipe, task), PUBLISHED_BATCH[self.recipe]
        if ours:
            own, fit = embedded(task)
            recipe = own if self.recipe == "lotus-d" else replace(recipe, posterior="mean")
            batch = OneStepTraining().batch_size
        if self.preserve is not None:
            recipe = replace(recipe, preserve=self.preserve)
        given = {name: getattr(self, name) for name in ("steps", "minutes", "learning_rate", "accumulate", "seed")}
        if self.steps is not None and self.minutes is None:
            given["minutes"] = None  # steps alone decide
            fit = replace(fit, minutes=None)
        fit = replace(fit, **{name: value for name, value in given.items() if value is not None})
        return OneStepTraining(
            task=task,
            base=self.base,
            recipe=recipe,
            fit=fit,
            batch_size=self.batch_size or batch,
            scratch=self.scratch,
            cache=ours and recipe.loss == "latent" and len(self.data) == 1,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def _run(self, task: Task, name: str) -> None:
        training = self._training(task)
        work = self.work or Path("runs") / name
        output = self.output or work / "head"
        sets = [open_set(text, task, work, self.scenes) for text in self.data]
        shares = self.shares or tuple({"hypersim": 0.9, "vkitti2": 0.1}.get(one.name, 1.0) for one in sets)
        held_out = render_set(work / "validation", "val", self.validation_scenes, workers=1)
        vae = load_parts(self.base).vae
        steps = 10 if training.recipe.timesteps == "all" else 1
        model = train_one_step(
            training, sets, shares, work / "run",
            latents=self.latents or work,
            validate=SceneValidation(held_out, vae, task, work / "pictures", steps=steps),
            validate_every=self.validate_every,
        )  # fmt: skip
        side = max(sets[0].sample(0).pixels.shape[1:])  # heads see images at the size they were trained on
        write(output, model, training, self.recipe, side)
        print(f"wrote {output}")


@dataclass(frozen=True, kw_only=True)
class TrainDepth(OneStepOptions):
    """Turn a diffusion model into a one-step depth head (Lotus, E2E-FT) or a Marigold.

    Called again with the same work folder it goes on where it was.
    """

    space: Literal["disparity", "depth"] = "disparity"  # what is predicted: disparity (1 near) or depth (1 far)

    def run(self) -> None:
        self._run(self.space, "depth")


@dataclass(frozen=True, kw_only=True)
class TrainNormals(OneStepOptions):
    """Turn a diffusion model into a one-step head for surface normals (Lotus, E2E-FT) or a Marigold.

    Called again with the same work folder it goes on where it was.
    """

    def run(self) -> None:
        self._run("normals", "normals")


def open_set(text: str, task: Task, work: Path, scenes: int) -> AnnotatedImages:
    """The data set that a word of --data names.

    Raises:
        ValueError: no such data set, or its folder is not named.
    """
    name, _, folder = text.partition("=")
    if name == "scenes":
        return SceneSamples(SceneSet(folder) if folder else render_set(work / "scenes", "train", scenes), task)
    if name not in ("hypersim", "vkitti2"):
        raise ValueError(f"no data set {name!r} to train on; there are scenes, hypersim=FOLDER and vkitti2=FOLDER")
    if not folder:
        raise ValueError(f"--data {name} needs its folder: {name}=FOLDER")
    return Hypersim(folder, task) if name == "hypersim" else VirtualKitti(folder, task)


def write(folder: Path, model: OneStepModel, training: OneStepTraining, family: str, working_size: int) -> None:
    """Write a trained head, all of it or nothing; what was in the folder is replaced."""
    extra = {"training": json.loads(json.dumps(asdict(training), default=str))}

    def fill(where: Path) -> None:
        write_head(
            where, model.unet,
            base=training.base, family=family, task=training.task, context=model.context, working_size=working_size,
            extra=extra,
        )  # fmt: skip

    replace_folder(folder, fill)
