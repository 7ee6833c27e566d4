"""``diffrep train``: make the embedded models again, train heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import Command
from diffrep.training.tiny.pipeline import TinyTraining, train_tiny


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
        for name in ("workers", "threads", "scenes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        output = self.output or self.work / "models"
        if self.smoke:
            config = TinyTraining.smoke(self.work, output)
        else:
            config = TinyTraining(work=self.work, output=output, workers=self.workers, threads=self.threads)
        if self.scenes is not None:
            config = dataclasses.replace(config, scenes=self.scenes)
        train_tiny(config)
        print(f"wrote {output / 'tiny'} and {output / 'tiny-dino'}")
