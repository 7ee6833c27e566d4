"""``diffrep train fewstep`` and ``diffrep eval fewstep``: painting in a few steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import Command, ReportOptions, training_output
from diffrep.commands.train import half
from diffrep.files import replace_folder
from diffrep.scenes import SceneSet, render_set
from diffrep.settings import check_options
from diffrep.synthesis import load_synthesis
from diffrep.training.consistency import FewStepTraining, train_few_step
from diffrep.training.patches import ScenePatches


@dataclass(frozen=True, kw_only=True)
class TrainFewStep(Command):
    """Distil a synthesis model so that it paints in one to four steps, without guidance.

    Latent consistency distillation; with `--eta` above 0 the teacher's steps are random (SCott), with
    `--method guidance` only its guidance is distilled. Paint with the result: diffrep synthesize --model FOLDER
    --scheduler lcm --steps 2. Called again with the same work folder it goes on where it was.
    """

    scenes: Path | None = None  # a rendered set; rendered into WORK/scenes where left out
    count: int = 8000  # scenes that patches are cut from
    work: Path = Path("runs/fewstep")  # encoded patches, checkpoints and log
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # of the model's folder; WORK/model
    training: Annotated[FewStepTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=FewStepTraining)

    def run(self) -> None:
        check_options(self, count="1..")
        output = training_output(self.work, self.output)
        scenes = SceneSet(self.scenes) if self.scenes else render_set(self.work / "scenes", "train", self.count)
        model = train_few_step(self.training, ScenePatches(scenes, count=self.count), self.work / "run")
        replace_folder(output, half(model.to("cpu")).save)
        print(f"wrote {output}")


@dataclass(frozen=True, kw_only=True)
class FewStep(ReportOptions):
    """Paint the same patches with a teacher in 20, 4, 2 and 1 steps and with distilled models in 4, 2 and 1.

    For example: diffrep eval fewstep runs/fewstep/model
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # folders of `diffrep train fewstep`
    teacher: str = "tiny-synthesis"  # embedded model or folder
    patches: int = 256  # painted by each
    seed: int = 0

    def run(self) -> None:
        from diffrep.eval.few_step import compare_few_step

        check_options(self, patches="2..", seed="[0, 2^20)")
        self.check_output()
        students = {Path(name).name: load_synthesis(name) for name in self.models}
        self.show(compare_few_step(load_synthesis(self.teacher), students, patches=self.patches, seed=self.seed))
