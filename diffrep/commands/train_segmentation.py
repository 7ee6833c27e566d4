"""``diffrep train segmentation``: DiffDIS heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.eval.segmentation_validation import MaskValidation
from diffrep.files import replace_folder
from diffrep.heads.training.masks_data import MaskedImage, read_dis
from diffrep.heads.training.masks_fit import (
    EMBEDDED_FIT,
    EMBEDDED_SCENES,
    PUBLISHED_BATCH,
    PUBLISHED_EPOCHS,
    SegmentationTraining,
    head_of,
    load_parts,
    published_fit,
    train_segmentation,
    write_segmentation_head,
)
from diffrep.scenes import SceneSet, render_set


@dataclass(frozen=True, kw_only=True)
class TrainSegmentation:
    """Turn a diffusion model into a one-step segmentation head (DiffDIS).

    With `--base tiny --data scenes` the defaults are those of the embedded head; another base gets the authors' recipe.
    Called again with the same work folder it goes on where it was.
    """

    base: str = "tiny"  # embedded model, diffusers folder or hub id whose U-Net is trained
    data: str = "scenes"  # scenes, scenes=FOLDER, or dis=FOLDER: a split of DIS5K with im/ and gt/, for example DIS-TR
    work: Path = Path("runs/segmentation")  # checkpoints, logs, validation pictures
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the head's folder; WORK/head
    latents: Path | None = None  # file of encoded scenes, which heads of one base share; in WORK
    scenes: int = EMBEDDED_SCENES  # to train on; rendered where --data scenes names no folder
    edges: bool = True  # train the edges along; --no-edges for a comparison
    decoder: bool | None = None  # a decoder of its own for the maps; yes with base tiny, else the VAE's, as published
    size: int | None = None  # pixels a side of the square that the network sees; 128 with base tiny, else 1024
    epochs: int | None = None  # of the authors' recipe
    steps: int | None = None  # optimiser steps instead
    minutes: float | None = None  # or this long, whichever ends first
    batch_size: int | None = None
    learning_rate: float | None = None
    bf16: bool | None = None  # autocast to bfloat16
    sharpen: float | None = None  # minutes in which the decoder then learns on alone; 4 with base tiny, unless --steps
    seed: int | None = None
    validate_every: int = 500  # steps between measurements and pictures of held-out scenes
    validation_scenes: int = 48

    def run(self) -> None:
        kind, _, folder = self.data.partition("=")
        if kind not in ("scenes", "dis") or (kind == "dis" and not folder):
            raise ValueError(f"no data {self.data!r} to train on; there are scenes, scenes=FOLDER and dis=FOLDER")
        data: SceneSet | list[MaskedImage]
        if kind == "dis":
            data = read_dis(Path(folder))
        else:
            data = SceneSet(folder) if folder else render_set(self.work / "scenes", "train", self.scenes)
        training = self.training(len(data))
        held_out = render_set(self.work / "validation", "val", self.validation_scenes, workers=1)
        vae = load_parts(self.base).vae.eval()
        validation = MaskValidation(held_out, lambda model: head_of(model, vae, training), self.work / "pictures")
        model = train_segmentation(
            training, data, self.work / "run",
            latents=self.latents or self.work / "latents.safetensors", validate=validation,
            validate_every=self.validate_every,
        )  # fmt: skip
        output = self.output or self.work / "head"
        replace_folder(output, lambda where: write_segmentation_head(where, model, training, seed=training.fit.seed))
        print(f"wrote {output}")

    def training(self, images: int) -> SegmentationTraining:
        """The settings that these options mean, for that many training images."""
        embedded = self.base == "tiny"
        batch_size = self.batch_size or (SegmentationTraining().batch_size if embedded else PUBLISHED_BATCH)
        fit = EMBEDDED_FIT
        if not embedded or self.epochs is not None:
            fit = published_fit(images, batch_size=batch_size, epochs=self.epochs or PUBLISHED_EPOCHS)
        if self.steps is not None:
            fit = replace(fit, steps=self.steps, minutes=None)  # steps alone decide, unless minutes are given too
        given = {name: getattr(self, name) for name in ("minutes", "learning_rate", "bf16", "seed")}
        fit = replace(fit, **{name: value for name, value in given.items() if value is not None})
        return SegmentationTraining(
            base=self.base,
            edges=self.edges,
            decoder=embedded if self.decoder is None else self.decoder,
            fit=fit,
            batch_size=batch_size,
            size=self.size or (128 if embedded else 1024),
            scenes=self.scenes,
            sharpen=(4.0 if embedded and self.steps is None else 0.0) if self.sharpen is None else self.sharpen,
        )
