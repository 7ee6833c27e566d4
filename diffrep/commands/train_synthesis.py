"""``diffrep train synthesis`` paints large images from embeddings; ``diffrep train prior`` makes these from texts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import diffrep
from diffrep.commands.options import Command
from diffrep.files import replace_folder
from diffrep.images import find_images
from diffrep.scenes import SceneSet, render_set
from diffrep.synthesis import SynthesisModel
from diffrep.training.prior import PriorTraining, train_prior
from diffrep.training.synthesis_data import ImagePatches, Patches, ScenePatches
from diffrep.training.synthesis_fit import PUBLISHED, SynthesisTraining, train_synthesis
from diffrep.training.tiny.pipeline import half


@dataclass(frozen=True, kw_only=True)
class TrainSynthesis(Command):
    """Train a diffusion model to paint patches from the embeddings of a self-supervised encoder.

    The embedded `tiny-synthesis` was made so, in the stages that its card names. Your own patches: --images FOLDER.
    Called again with the same work folder it goes on where it was.
    """

    images: tuple[str, ...] = ()  # files, folders or patterns to cut patches from; none: rendered scenes
    scenes: Path | None = None  # a rendered set; rendered into WORK/scenes where left out
    count: int = 16000  # scenes that patches are cut from
    sides: tuple[float, float] | None = None  # of a patch, shares of the image; scenes: 0.2 1.0, files: not scaled
    published: bool = False  # options of training that are left out are the authors', not those of tiny-synthesis
    work: Path = Path("runs/synthesis")  # encoded patches, checkpoints and log
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the model's folder; WORK/model
    training: Annotated[SynthesisTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthesisTraining)

    def defaults(self) -> TrainSynthesis:
        return replace(self, training=PUBLISHED) if self.published else self

    def run(self) -> None:
        patches, output = cache(self._patches), self.output or self.work / "model"
        model = train_synthesis(self.training, patches, self.work / "run")
        write_model(output, model, self.training, patches(), self.work / "run")
        print(f"wrote {output}")

    def _patches(self) -> Patches:
        if self.images:
            if self.scenes is not None:
                raise ValueError("--images and --scenes are two sources of patches: give one")
            return ImagePatches(tuple(find_images(self.images)), self.sides)
        scenes = SceneSet(self.scenes) if self.scenes else render_set(self.work / "scenes", "train", self.count)
        return ScenePatches(scenes, self.sides or ScenePatches.sides, self.count)


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
        output = self.output or self.work / "model"
        prior = train_prior(self.training, self._scenes, self.work / "run")
        copy: Any = half(prior.to("cpu"))
        replace_folder(output, copy.save)
        print(f"wrote {output}")

    def _scenes(self) -> SceneSet:
        if self.scenes is not None:
            return SceneSet(self.scenes)
        return render_set(self.work / "scenes", "train", self.training.count)


def write_model(output: Path, model: SynthesisModel, training: SynthesisTraining, patches: Patches, run: Path) -> None:
    """Write the folder in half precision, with a card of data, settings and losses, all of it or nothing.

    Args:
        run: the folder that `train_synthesis` worked in.
    """
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    checked: dict[str, Any] = next((row for row in reversed(rows) if "own" in row), {})
    card = {
        "what": "SSL-conditioned latent diffusion (Graikos, Yellapragada et al., CVPR 2024)",
        "trained by": f"diffrep {diffrep.__version__}, `diffrep train synthesis`",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": str(model.device),
        "torch": torch.__version__,
        "patches": patches.name,
        "steps": rows[-1]["step"],
        "minutes": round(rows[-1]["seconds"] / 60, 1),
        "parameters": {
            "unet": sum(p.numel() for p in model.unet.parameters()),
            "embedder": sum(p.numel() for p in model.embedder.parameters()),
        },
        "loss on held-out patches, by condition": {k: checked[k] for k in ("own", "other", "null") if k in checked},
        "settings": json.loads(json.dumps(asdict(training), default=str)),
    }

    def write(folder: Path) -> None:
        copy: Any = half(model.to("cpu"))
        copy.save(folder)
        (folder / "model-card.json").write_text(json.dumps(card, indent=2) + "\n")

    replace_folder(output, write)
