"""``diffrep train depth|normals|segmentation|restore``: a diffusion model as a one-step head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from diffrep.backbones.pipelines import PipelineParts, load_parts
from diffrep.commands.options import DeviceOptions, training_output
from diffrep.eval.scenes import MaskValidation, SceneValidation
from diffrep.files import check_folder
from diffrep.heads.dense import DenseHead
from diffrep.heads.families import FAMILIES, Task
from diffrep.heads.loading import load_head
from diffrep.heads.training.datasets import Hypersim, VirtualKitti
from diffrep.heads.training.dense import OneStepModel
from diffrep.heads.training.dense_data import SampleSet, SceneSamples
from diffrep.heads.training.detail import REFINING, REFINING_BATCH, refined_head
from diffrep.heads.training.fit import (
    EMBEDDED_BATCH,
    EMBEDDED_FIT,
    EMBEDDED_MASK_FIT,
    EMBEDDED_RECIPE,
    EMBEDDED_SCENES,
    PUBLISHED_BATCH,
    PUBLISHED_EPOCHS,
    PUBLISHED_MASK_BATCH,
    OneStepTraining,
    SegmentationTraining,
    head_of,
    published_fit,
    published_mask_fit,
    train_head,
)
from diffrep.heads.training.masks import MaskedImage, read_dis
from diffrep.heads.training.restoration import (
    RestorationTraining,
    enlargements,
    photo_originals,
    scene_originals,
)
from diffrep.images import find_images
from diffrep.scenes import SceneSet, render_set
from diffrep.settings import POSITIVE, WORKERS, check_options
from diffrep.training.loop import FitSettings


@dataclass(frozen=True, kw_only=True)
class HeadTraining(DeviceOptions):
    """What the trainings of all heads share."""

    base: str = "tiny"  # embedded model, diffusers folder or hub id whose U-Net is trained
    work: Path | None = None  # checkpoints, logs, validation pictures; runs/TASK
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the head's folder; WORK/head
    steps: int | None = None  # optimiser steps; by the recipe where left out
    minutes: float | None = None  # or this long, whichever ends first
    batch_size: int | None = None  # images of a batch and device
    learning_rate: float | None = None
    sara: float | None = None  # train only weights of a smaller magnitude (SaRA), for example 2e-3
    seed: int | None = None
    scenes: int = 24000  # rendered for training where --data scenes names no folder
    latents: Path | None = None  # encoded scenes, which heads of one base can share; in WORK
    validate_every: int = 500  # steps between measurements and pictures of held-out scenes
    validation_scenes: int = 48
    workers: int = 2  # processes that render

    def checked(self, name: str) -> tuple[Path, Path, PipelineParts]:
        """The folders of work and output and the parts of the base, before anything is rendered or written.

        Args:
            name: of the folder of work, where none is named.

        Raises:
            ValueError: a number that means nothing, a folder that is a file, or a base that cannot be loaded.
        """
        check_options(
            self,
            scenes="1..", validate_every="1..", validation_scenes="1..", batch_size="1..", steps="1..",
            seed="[0, 2^63)", workers=WORKERS, sara=POSITIVE,
        )  # fmt: skip
        if self.latents is not None:
            check_folder(self.latents)
        work = self.work or Path("runs") / name
        return work, training_output(work, self.output, "head"), load_parts(self.base, pad=False)

    def changed(self, fit: FitSettings, *names: str) -> FitSettings:
        """A training's settings with the options that are named; steps alone decide, unless minutes are named too."""
        if self.steps is not None:
            fit = replace(fit, minutes=None)
        values = {name: getattr(self, name) for name in ("steps", "minutes", "learning_rate", "sara", "seed", *names)}
        return replace(fit, **{name: value for name, value in values.items() if value is not None})


REFINE_OPTIONS = frozenset(
    ("refine", "data", "space", "work", "output", "steps", "minutes", "batch_size", "learning_rate", "sara", "seed",
     "scenes", "workers", "device")
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OneStepOptions(HeadTraining):
    """Options that depth and normals share. With `--base tiny --data scenes`, the defaults made the embedded heads."""

    data: tuple[str, ...] = ("scenes",)  # scenes, scenes=FOLDER, hypersim=FOLDER, vkitti2=FOLDER
    shares: tuple[float, ...] | None = None  # how often a batch comes from each; hypersim 0.9, vkitti2 0.1, else equal
    recipe: Literal["lotus-d", "lotus-g", "e2e-ft", "marigold"] = "lotus-d"
    accumulate: int | None = None  # batches of an optimiser step
    decoder: bool | None = None  # a decoder of its own for the maps; yes with the embedded recipe, else the VAE's
    preserve: float | None = None  # share of a batch that also reconstructs its image (Lotus' detail preserver)
    refine: str | None = None  # an embedded head or a folder: train a decoder for it alone, its U-Net stays as it is
    start: str = (
        ""  # an embedded head or a folder: start from its U-Net, and from its decoder if it has the same layers
    )
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
            recipe = EMBEDDED_RECIPE if self.recipe == "lotus-d" else replace(recipe, posterior="mean")
            fit, batch = EMBEDDED_FIT, EMBEDDED_BATCH
        if self.preserve is not None:
            recipe = replace(recipe, preserve=self.preserve)
        latent = ours and recipe.loss == "latent" and len(self.data) == 1
        decoder = (latent and not recipe.preserve) if self.decoder is None else self.decoder
        return OneStepTraining(
            task=task,
            base=self.base,
            recipe=recipe,
            fit=self.changed(fit, "accumulate"),
            batch_size=self.batch_size or batch,
            start=self.start,
            scratch=self.scratch,
            cache=latent and not decoder,
            decoder=decoder,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def train(self, task: Task, name: str) -> None:
        """Train a head and write its folder."""
        if self.refine is not None:
            self.train_refined(task, name)
            return
        training = self.training(task)
        work, output, parts = self.checked(name)
        training.build(parts)  # refuses a base that the recipe does not fit
        vae = parts.vae
        del parts  # a U-Net of gigabytes
        opened = [open_set(text, task, work, self.scenes, self.workers) for text in self.data]
        kinds = [text.partition("=")[0] for text in self.data]
        shares = self.shares or tuple({"hypersim": 0.9, "vkitti2": 0.1}.get(kind, 1.0) for kind in kinds)
        if len(shares) != len(kinds) or not all(0 < share < math.inf for share in shares):
            raise ValueError(f"--shares needs a number above 0 for each of {', '.join(kinds)}, got {shares}")
        sets = [make() for make in opened]
        held_out = render_set(work / "validation", "val", self.validation_scenes, workers=1)
        steps = 10 if training.recipe.timesteps == "all" else 1
        side = max(sets[0].sample(0).pixels.shape[1:])  # heads see images at the size they were trained on
        measured, best = SceneValidation(held_out, vae, task, work / "pictures", steps=steps), math.inf

        def write(model: OneStepModel, **measures: float) -> None:
            extra = training.about()["extra"] | {"measured": measures}
            training.write(output, model, family=self.recipe, working_size=side, extra=extra)

        def validate(model: OneStepModel, step: int) -> Mapping[str, float]:
            """Measure, and write the head whenever it is better than before."""
            nonlocal best
            values = measured(model, step)
            if (error := values["mean" if task == "normals" else "abs_rel"]) < best:
                best = error
                write(model, step=step, **values)
            return values

        model = train_head(
            training, (sets, shares), work / "run",
            latents=self.latents or work, validate=validate, validate_every=self.validate_every, device=self.device,
        )  # fmt: skip
        if math.isinf(best):  # nothing was left to do, or nothing could be measured
            write(model)
        print(f"wrote {output}")

    def train_refined(self, task: Task, name: str) -> None:
        """Train a decoder for the head that --refine names."""
        if unused := sorted(self.typed - REFINE_OPTIONS):
            raise ValueError(f"--refine trains a decoder alone: it goes without {', '.join(unused)}")
        assert self.refine is not None
        work, output, _ = self.checked(name)
        head = load_head(self.refine, fold=False, device="cpu", dtype=torch.float32)
        if head.task != task or not isinstance(head, DenseHead):
            raise ValueError(f"--refine {self.refine}: is a head for {head.task}, not for {task}")
        if len(self.data) != 1 or self.data[0].partition("=")[0] != "scenes":
            raise ValueError("--refine trains on one set of rendered scenes: --data scenes or scenes=FOLDER")
        samples: Any = open_set(self.data[0], task, work, self.scenes, self.workers)()
        batch = self.batch_size or REFINING_BATCH
        fit = self.changed(REFINING)
        refined_head(head, samples.scenes, fit, work / "run", output, batch_size=batch, device=self.device)
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
        work, output, parts = self.checked("segmentation")
        training.build(parts)  # refuses a base that it does not fit
        vae = parts.vae.eval()
        del parts  # a U-Net of gigabytes
        data = render_set(work / "scenes", "train", self.scenes, workers=self.workers) if data is None else data
        held_out = render_set(work / "validation", "val", self.validation_scenes, workers=1)
        model = train_head(
            training, data, work / "run",
            latents=self.latents or work / "latents.safetensors",
            validate=MaskValidation(held_out, lambda model: head_of(model, vae, training), work / "pictures"),
            validate_every=self.validate_every,
            device=self.device,
        )  # fmt: skip
        training.write(output, model)
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


@dataclass(frozen=True, kw_only=True)
class TrainRestore(DeviceOptions):
    """Turn a diffusion model into a one-step restorer of degraded images, by the rule of PiSA-SR.

    With `--base tiny --data scenes` the defaults are those of the embedded `tiny-restore`. Called again with the same
    work folder it goes on where it was. `--teacher FOLDER` distils a restorer of half the scale (YONOS-SR).
    """

    data: tuple[str, ...] = ("scenes",)  # scenes, scenes=FOLDER, or files, folders and patterns of photographs
    scenes: int = 16000  # to train on; rendered where --data scenes names no folder
    work: Path = Path("runs/restore")  # degraded pairs, checkpoints, logs, validation pictures
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the head's folder; WORK/head
    validate_every: int = 500  # steps between measurements and pictures of held-out scenes
    validation_scenes: int = 48
    training: Annotated[RestorationTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=RestorationTraining)

    def defaults(self) -> TrainRestore:
        training, typed = self.training, {name.rpartition(".")[2] for name in self.typed}
        detail = training.detail if "detail" in typed else training.base == "tiny"
        fit = replace(training.fit, minutes=None) if "steps" in typed else training.fit
        return replace(
            self, training=replace(training, detail=detail, latent=training.latent if detail else 1.0, fit=fit)
        )

    def run(self) -> None:
        from diffrep.eval.restoration import RestorationValidation

        check_options(self, scenes="1..", validate_every="1..", validation_scenes="1..")
        if "scenes" in self.typed and self.data != ("scenes",):
            raise ValueError(f"--scenes counts what is rendered, with --data scenes, not of {' '.join(self.data)}")
        training, work, output = self.training, self.work, training_output(self.work, self.output, "head")
        training.build(load_parts(training.base, pad=False))  # refuses a base that it does not fit
        originals = self._originals()
        held_out = render_set(work / "validation", "val", self.validation_scenes, size=training.size, workers=1)
        pairs = enlargements(scene_originals(held_out), training.pairs, seed=training.fit.seed)
        model = train_head(
            training, originals, work / "run",
            latents=work / "pairs.safetensors", device=self.device,
            validate=RestorationValidation(pairs, work / "pictures"), validate_every=self.validate_every,
        )  # fmt: skip
        training.write(output, model)
        print(f"wrote {output}")

    def _originals(self) -> torch.Tensor:
        kind, _, folder = self.data[0].partition("=") if len(self.data) == 1 else ("", "", "")
        size, workers = self.training.size, self.training.workers
        if kind != "scenes":
            return photo_originals(find_images(self.data), size)
        if folder:
            return scene_originals(SceneSet(folder))
        return scene_originals(render_set(self.work / "scenes", "train", self.scenes, size=size, workers=workers))


def open_set(text: str, task: Task, work: Path, scenes: int, workers: int = 2) -> Callable[[], SampleSet]:
    """What opens the data set that a word of --data names; scenes are rendered only when it is called.

    Raises:
        ValueError: no such data set, or its folder is not named or holds none.
    """
    name, _, folder = text.partition("=")
    readers: dict[str, Callable[[str], SampleSet]] = {
        "scenes": lambda folder: SceneSamples(SceneSet(folder), task),
        "hypersim": lambda folder: Hypersim(folder, task),
        "vkitti2": lambda folder: VirtualKitti(folder, task),
    }
    if name not in readers:
        raise ValueError(f"no data set {name!r} to train on; there are scenes, hypersim=FOLDER and vkitti2=FOLDER")
    if folder:
        samples = readers[name](folder)
        return lambda: samples
    if name != "scenes":
        raise ValueError(f"--data {name} needs its folder: {name}=FOLDER")
    return lambda: SceneSamples(render_set(work / "scenes", "train", scenes, workers=workers), task)
