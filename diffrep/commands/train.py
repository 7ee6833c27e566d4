"""``diffrep train tiny|synthesis|fewstep|early-exit|prior``: the embedded backbones again, painters of your own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from diffrep.backbones.early_exit import save_early_exit
from diffrep.commands.options import Command, DeviceOptions, training_output
from diffrep.files import replace_folder
from diffrep.images import find_images
from diffrep.scenes import SceneSet, open_or_render
from diffrep.settings import WORKERS, check_options
from diffrep.synthesis import SynthesisModel
from diffrep.training.consistency import FewStepTraining, train_few_step
from diffrep.training.early_exit import EarlyExitTraining, train_early_exit
from diffrep.training.patches import ImagePatches, Patches, ScenePatches
from diffrep.training.prior import PriorTraining, train_prior
from diffrep.training.synthesis import PUBLISHED, SynthesisTraining, train_synthesis
from diffrep.training.tiny.pipeline import (
    TinyTraining,
    card_head,
    count_parameters,
    half,
    log_rows,
    steps_of,
    train_tiny,
    write_card,
)


@dataclass(frozen=True, kw_only=True)
class TrainTiny(Command):
    """Train the embedded models from rendered scenes alone, with the settings of the ones in the package.

    Called again with the same work folder it goes on where it was. Every other setting is a field of
    `diffrep.training.tiny.pipeline.TinyTraining`.
    """

    work: Path = Path("runs/tiny")  # scenes, checkpoints and logs; a few GB
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the model folders; WORK/models
    scenes: int | None = None  # rendered for training; as for the embedded models where left out
    workers: int = 2  # processes: rendering, and the two networks side by side
    threads: int = 1  # torch threads of each
    smoke: bool = False  # all stages in under a minute; the models are useless

    def run(self) -> None:
        check_options(self, workers=WORKERS, threads=WORKERS, scenes="1..")
        output = self.output or self.work / "models"
        for model in ("tiny", "tiny-dino"):
            training_output(self.work, output / model)
        if self.smoke:
            config = TinyTraining.smoke(self.work, output)
        else:
            config = TinyTraining(work=self.work, output=output, workers=self.workers, threads=self.threads)
        train_tiny(config if self.scenes is None else replace(config, scenes=self.scenes))
        print(f"wrote {output / 'tiny'} and {output / 'tiny-dino'}")


@dataclass(frozen=True, kw_only=True)
class PatchTraining(DeviceOptions):
    """Options of trainings on patches of rendered scenes. A subclass sets `count` and `work`."""

    FIRST = "scenes count work output"

    scenes: Path | None = None  # a rendered set; rendered into WORK/scenes where left out
    count: int  # scenes that patches are cut from
    work: Path  # encoded patches, checkpoints and log
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the model's folder; WORK/model

    def checked_output(self) -> Path:
        """Where the model goes, before anything is rendered or written.

        Raises:
            ValueError, OSError: it cannot go there, or there are no such scenes.
        """
        check_options(self, count="1..")
        if self.scenes is not None:
            SceneSet(self.scenes)
        return training_output(self.work, self.output)

    def scene_patches(self, **sides: tuple[float, float]) -> ScenePatches:
        """The patches, of scenes that are rendered now where none are named."""
        return ScenePatches(open_or_render(self.scenes, self.work, self.count), **sides, count=self.count)


@dataclass(frozen=True, kw_only=True)
class TrainSynthesis(PatchTraining):
    """Train a diffusion model to paint patches from the embeddings of a self-supervised encoder.

    The embedded `tiny-synthesis` was made so, in the stages that its card names. Your own patches: --images FOLDER.
    Called again with the same work folder it goes on where it was.
    """

    FIRST = "images scenes count sides published work output"

    images: tuple[str, ...] = ()  # files, folders or patterns to cut patches from; none: rendered scenes
    count: int = 16000
    sides: tuple[float, float] | None = None  # of a patch, shares of the image; scenes: 0.2 1.0, files: not scaled
    published: bool = False  # options of training that are left out are the authors', not those of tiny-synthesis
    work: Path = Path("runs/synthesis")
    training: Annotated[SynthesisTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthesisTraining)

    def defaults(self) -> TrainSynthesis:
        return replace(self, training=PUBLISHED) if self.published else self

    def run(self) -> None:
        if self.sides is not None and not 0 < self.sides[0] <= self.sides[1] <= 1:
            raise ValueError(f"--sides are a smallest and a largest share of the image, in (0, 1], got {self.sides}")
        patches, output = cache(self._patches), self.checked_output()
        model = train_synthesis(self.training, patches, self.work / "run", device=self.device)
        write_model(output, model, self.training, patches(), self.work / "run")
        print(f"wrote {output}")

    def _patches(self) -> Patches:
        if self.images:
            if clash := sorted(self.typed & {"scenes", "count"}):
                raise ValueError(f"--images and --{clash[0]} are of two sources of patches: give one")
            return ImagePatches(tuple(find_images(self.images)), self.sides)
        return self.scene_patches(**({"sides": self.sides} if self.sides else {}))


@dataclass(frozen=True, kw_only=True)
class TrainFewStep(PatchTraining):
    """Distil a synthesis model so that it paints in one to four steps, without guidance.

    Latent consistency distillation; with `--eta` above 0 the teacher's steps are random (SCott), with
    `--method guidance` only its guidance is distilled. Paint with the result: diffrep synthesize --model FOLDER
    --scheduler lcm --steps 2. Called again with the same work folder it goes on where it was.
    """

    count: int = 8000
    work: Path = Path("runs/fewstep")
    training: Annotated[FewStepTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=FewStepTraining)

    def run(self) -> None:
        output = self.checked_output()
        model = train_few_step(self.training, self.scene_patches, self.work / "run", device=self.device)
        replace_folder(output, half(model.to("cpu")).save)
        print(f"wrote {output}")


@dataclass(frozen=True, kw_only=True)
class TrainEarlyExit(PatchTraining):
    """Train a small painter whose images leave the network early, where it is sure of them (DeeDiff).

    It paints patches of rendered scenes without a condition. Paint with the result: diffrep sample --model FOLDER
    --threshold 0.3. What thresholds save and cost is printed, beside a table of fixed depths, one for each timestep.
    Called again with the same work folder it goes on where it was.
    """

    count: int = 2000
    work: Path = Path("runs/early-exit")
    training: Annotated[EarlyExitTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=EarlyExitTraining)

    def run(self) -> None:
        output = self.checked_output()
        network, rows = train_early_exit(self.training, self.scene_patches, self.work / "run", device=self.device)
        replace_folder(output, partial(save_early_exit, network.to("cpu")))
        print(f"{'threshold':>9}{'blocks':>9}{'error':>9}{'fixed table':>13}   (mean squared, of the noise)")
        for threshold, blocks, error, fixed in rows:
            print(f"{threshold:>9}{blocks:9.2f}{error:9.4f}{fixed:13.4f}")
        print(f"wrote {output}")


@dataclass(frozen=True, kw_only=True)
class TrainPrior(Command):
    """Train a small model to draw grids of embeddings from texts or labels, on rendered scenes.

    The defaults made the embedded `tiny-prior`. Called again with the same work folder it goes on where it was.
    """

    scenes: Path | None = None  # a rendered set; rendered into WORK/scenes where left out
    work: Path = Path("runs/prior")  # embedded scenes, checkpoints and log
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the model's folder; WORK/model
    training: Annotated[PriorTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=PriorTraining)

    def run(self) -> None:
        output = training_output(self.work, self.output)
        scenes = partial(open_or_render, self.scenes, self.work, self.training.count)
        prior = train_prior(self.training, scenes, self.work / "run")
        replace_folder(output, half(prior.to("cpu")).save)
        print(f"wrote {output}")


def write_model(output: Path, model: SynthesisModel, training: SynthesisTraining, patches: Patches, run: Path) -> None:
    """Write the folder in half precision, with a card of data, settings and losses, all of it or nothing.

    Args:
        run: the folder that `train_synthesis` worked in.
    """
    rows = log_rows(run)
    checked: dict[str, Any] = next((row for row in reversed(rows) if "own" in row), {})
    card = card_head("SSL-conditioned latent diffusion (Graikos, Yellapragada et al., CVPR 2024)", "synthesis") | {
        "device": str(model.device),
        "torch": torch.__version__,
        "patches": patches.name,
        **steps_of(rows),
        "parameters": {"unet": count_parameters(model.unet), "embedder": count_parameters(model.embedder)},
        "loss on held-out patches, by condition": {k: checked[k] for k in ("own", "other", "null") if k in checked},
        "settings": json.loads(json.dumps(asdict(training), default=str)),
    }

    def write(folder: Path) -> None:
        half(model.to("cpu")).save(folder)
        write_card(folder, card)

    replace_folder(output, write)
