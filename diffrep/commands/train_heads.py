"""``diffrep train depth``, ``normals`` and ``segmentation``: a diffusion model becomes a one-step head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffrep.backbones.pipelines import PipelineParts, load_parts
from diffrep.commands.image_runs import check_folder
from diffrep.commands.options import Command
from diffrep.eval.scene_validation import MaskValidation, SceneValidation
from diffrep.files import replace_folder
from diffrep.heads.families import FAMILIES, Task
from diffrep.heads.training.datasets import Hypersim, VirtualKitti
from diffrep.heads.training.dense_data import SampleSet, SceneSamples
from diffrep.heads.training.fit import (
    EMBEDDED_MASK_FIT,
    EMBEDDED_SCENES,
    PUBLISHED_BATCH,
    PUBLISHED_EPOCHS,
    PUBLISHED_MASK_BATCH,
    OneStepTraining,
    SegmentationTraining,
    build_model,
    build_segmentation_model,
    embedded,
    head_of,
    published_fit,
    published_mask_fit,
    train_one_step,
    train_segmentation,
    write_dense_head,
    write_segmentation_head,
)
from diffrep.heads.training.masks import MaskedImage, read_dis
from diffrep.scenes import SceneSet, render_set
from diffrep.training.loop import FitSettings


@dataclass(frozen=True, kw_only=True)
class HeadTraining(Command):
    """What the trainings of all heads share."""

    base: str = "tiny"  # embedded model, diffusers folder or hub id whose U-Net is trained
    work: Path | None = None  # checkpoints, logs, validation pictures; runs/TASK
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the head's folder; WORK/head
    steps: int | None = None  # optimiser steps; by the recipe where left out
    minutes: float | None = None  # or this long, whichever ends first
    batch_size: int | None = None  # images of a batch and device
    learning_rate: float | None = None
    seed: int | None = None
    latents: Path | None = None  # encoded scenes, which heads of one base can share; in WORK
    validate_every: int = 500  # steps between measurements and pictures of held-out scenes
    validation_scenes: int = 48

    def checked(self, name: str, count: int) -> tuple[Path, Path, PipelineParts]:
        """The folders of work and output and the parts of the base, before anything is rendered or written.

        Args:
            name: of the folder of work, where none is named.
            count: scenes to render.

        Raises:
            ValueError: a number that means nothing, a folder that is a file, or a base that cannot be loaded.
        """
        numbers = {"scenes": count, "validate_every": self.validate_every, "validation_scenes": self.validation_scenes}
        numbers |= {"batch_size": self.batch_size or 1, "steps": 1 if self.steps is None else self.steps}
        for option, value in numbers.items():
            if value < 1:
                raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
        if self.batch_size == 0:
            raise ValueError("--batch-size must be at least 1, got 0")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must lie in 0..2^63-1, got {self.seed}")
        work = self.work or Path("runs") / name
        output = self.output or work / "head"
        for folder in (work, output):
            check_folder(folder)
        return work, output, load_parts(self.base, pad=False)

    def changed(self, fit: FitSettings, *names: str) -> FitSettings:
        """A training's settings with the options that are named; steps alone decide, unless minutes are named too."""
        if self.steps is not None:
            fit = replace(fit, minutes=None)
        values = {name: getattr(self, name) for name in ("steps", "minutes", "learning_rate", "seed", *names)}
        return replace(fit, **{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class OneStepOptions(HeadTraining):
    """Options that depth and normals share. With `--base tiny --data scenes`, the defaults made the embedded heads."""

    data: tuple[str, ...] = ("scenes",)  # scenes, scenes=FOLDER, hypersim=FOLDER, vkitti2=FOLDER
    shares: tuple[float, ...] | None = None  # how often a batch comes from each; hypersim 0.9, vkitti2 0.1, else equal
    recipe: Literal["lotus-d", "lotus-g", "e2e-ft", "marigold"] = "lotus-d"
    scenes: int = 24000  # rendered for training where --data scenes names no folder
    accumulate: int | None = None  # batches of an optimiser step
    preserve: float | None = None  # share of a batch that also reconstructs its image (Lotus' detail preserver)
    scratch: bool = False  # start from random weights
    gradient_checkpointing: bool = False  # less memory, more time

    def training(self, task: Task) -> OneStepTraining:
        """The settings that these options mean.

        Raises:
            ValueError: options that do not go together.
        """
        ours = self.base == "tiny" and all(name.startswith("scenes") for name in self.data)
        recipe, fit, batch = FAMILIES[self.recipe], published_fit(self.recipe, task), PUBLISHED_BATCH[self.recipe]
        if ours:
            tuned, fit = embedded(task)
            recipe = tuned if self.recipe == "lotus-d" else replace(recipe, posterior="mean")
            batch = OneStepTraining().batch_size
        if self.preserve is not None:
            recipe = replace(recipe, preserve=self.preserve)
        return OneStepTraining(
            task=task,
            base=self.base,
            recipe=recipe,
            fit=self.changed(fit, "accumulate"),
            batch_size=self.batch_size or batch,
            scratch=self.scratch,
            cache=ours and recipe.loss == "latent" and len(self.data) == 1,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def train(self, task: Task, name: str) -> None:
        """Train a head and write its folder."""
        training = self.training(task)
        work, output, parts = self.checked(name, self.scenes)
        build_model(training, parts)  # refuses a base that the recipe does not fit
        vae = parts.vae
        del parts  # a U-Net of gigabytes
        opened = [open_set(text, task, work, self.scenes) for text in self.data]
        kinds = [text.partition("=")[0] for text in self.data]
        shares = self.shares or tuple({"hypersim": 0.9, "vkitti2": 0.1}.get(kind, 1.0) for kind in kinds)
        if len(shares) != len(kinds) or not all(0 < share < math.inf for share in shares):
            raise ValueError(f"--shares needs a number above 0 for each of {', '.join(kinds)}, got {shares}")
        sets = [make() for make in opened]
        held_out = render_set(work / "validation", "val", self.validation_scenes, workers=1)
        steps = 10 if training.recipe.timesteps == "all" else 1
        model = train_one_step(
            training, sets, shares, work / "run",
            latents=self.latents or work,
            validate=SceneValidation(held_out, vae, task, work / "pictures", steps=steps),
            validate_every=self.validate_every,
        )  # fmt: skip
        side = max(sets[0].sample(0).pixels.shape[1:])  # heads see images at the size they were trained on
        write_dense_head(output, model, training, self.recipe, side)
        print(f"wrote {output}")


@dataclass(frozen=True, kw_only=True)
class TrainDepth(OneStepOptions):
    """Turn a diffusion model into a one-step depth head (Lotus, E2E-FT) or a Marigold.

    Called again with the same work folder it goes on where it was.
    """

    space: Literal["disparity", "depth"] = "disparity"  # what is predicted: disparity (1 near) or depth (1 far)

    def run(self) -> None:
        self.train(self.space, "depth")


@dataclass(frozen=True, kw_only=True)
class TrainNormals(OneStepOptions):
    """Turn a diffusion model into a one-step head for surface normals (Lotus, E2E-FT) or a Marigold.

    Called again with the same work folder it goes on where it was.
    """

    def run(self) -> None:
        self.train("normals", "normals")


@dataclass(frozen=True, kw_only=True)
class TrainSegmentation(HeadTraining):
    """Turn a diffusion model into a one-step segmentation head (DiffDIS).

    With `--base tiny --data scenes` the defaults are those of the embedded head; another base gets the authors' recipe.
    Called again with the same work folder it goes on where it was.
    """

    data: str = "scenes"  # scenes, scenes=FOLDER, or dis=FOLDER: a split of DIS5K with im/ and gt/, for example DIS-TR
    scenes: int = EMBEDDED_SCENES  # to train on; rendered where --data scenes names no folder
    edges: bool = True  # train the edges along; --no-edges for a comparison
    decoder: bool | None = None  # a decoder of its own for the maps; yes with base tiny, else the VAE's, as published
    size: int | None = None  # pixels a side of the square that the network sees; 128 with base tiny, else 1024
    epochs: int | None = None  # of the authors' recipe
    bf16: bool | None = None  # autocast to bfloat16
    sharpen: float | None = None  # minutes in which the decoder then learns on alone; 4 with base tiny, unless --steps

    def run(self) -> None:
        kind, _, folder = self.data.partition("=")
        if kind not in ("scenes", "dis") or (kind == "dis" and not folder):
            raise ValueError(f"no data {self.data!r} to train on; there are scenes, scenes=FOLDER and dis=FOLDER")
        data: SceneSet | list[MaskedImage] | None = None
        if folder:
            data = read_dis(Path(folder)) if kind == "dis" else SceneSet(folder)
        training = self.training(self.scenes if data is None else len(data))
        work, output, parts = self.checked("segmentation", self.scenes)
        build_segmentation_model(training, parts)  # refuses a base that it does not fit
        vae = parts.vae.eval()
        del parts  # a U-Net of gigabytes
        data = render_set(work / "scenes", "train", self.scenes) if data is None else data
        held_out = render_set(work / "validation", "val", self.validation_scenes, workers=1)
        model = train_segmentation(
            training, data, work / "run",
            latents=self.latents or work / "latents.safetensors",
            validate=MaskValidation(held_out, lambda model: head_of(model, vae, training), work / "pictures"),
            validate_every=self.validate_every,
        )  # fmt: skip
        replace_folder(output, lambda where: write_segmentation_head(where, model, training, seed=training.fit.seed))
        print(f"wrote {output}")

    def training(self, images: int) -> SegmentationTraining:
        """The settings that these options mean, for that many training images."""
        ours = self.base == "tiny"
        batch_size = self.batch_size or (SegmentationTraining().batch_size if ours else PUBLISHED_MASK_BATCH)
        fit = EMBEDDED_MASK_FIT
        if not ours or self.epochs is not None:
            epochs = PUBLISHED_EPOCHS if self.epochs is None else self.epochs
            fit = published_mask_fit(images, batch_size=batch_size, epochs=epochs)
        return SegmentationTraining(
            base=self.base,
            edges=self.edges,
            decoder=ours if self.decoder is None else self.decoder,
            fit=self.changed(fit, "bf16"),
            batch_size=batch_size,
            size=(128 if ours else 1024) if self.size is None else self.size,
            scenes=self.scenes,
            sharpen=(4.0 if ours and self.steps is None else 0.0) if self.sharpen is None else self.sharpen,
        )


def open_set(text: str, task: Task, work: Path, scenes: int) -> Callable[[], SampleSet]:
    """What opens the data set that a word of --data names; scenes are rendered only when it is called.

    Raises:
        ValueError: no such data set, or its folder is not named or holds none.
    """
    name, _, folder = text.partition("=")
    if name not in ("scenes", "hypersim", "vkitti2"):
        raise ValueError(f"no data set {name!r} to train on; there are scenes, hypersim=FOLDER and vkitti2=FOLDER")
    if name != "scenes" and not folder:
        raise ValueError(f"--data {name} needs its folder: {name}=FOLDER")
    if name == "scenes" and not folder:
        return lambda: SceneSamples(render_set(work / "scenes", "train", scenes), task)
    opened: SampleSet
    if name == "scenes":
        opened = SceneSamples(SceneSet(folder), task)
    else:
        opened = Hypersim(folder, task) if name == "hypersim" else VirtualKitti(folder, task)
    return lambda: opened
