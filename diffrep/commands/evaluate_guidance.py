"""``diffrep eval guidance``, ``completion`` and ``joint``: done between steps, or for several maps at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.backbones.pipelines import load_parts
from diffrep.commands.options import DeviceOptions, PrecisionOptions, ReportOptions
from diffrep.eval.completion import CompletionEvaluation, evaluate_completion
from diffrep.eval.guidance import GuidanceEvaluation, evaluate_guidance
from diffrep.eval.joint import evaluate_joint
from diffrep.eval.one_step_ablation import AblationSettings
from diffrep.heads.completion import CompletionConfig
from diffrep.heads.dense import DenseHead
from diffrep.heads.loading import load_head
from diffrep.painting import diffusion_model
from diffrep.scenes import open_or_render
from diffrep.settings import WORKERS, check_options


@dataclass(frozen=True, kw_only=True)
class EvalGuidance(ReportOptions, PrecisionOptions):
    """Posterior samplers on four measurements of held-out scenes, through the decoder of one model."""

    model: str = "tiny"  # embedded model, folder or hub id of a latent diffusion
    prompt: str = ""  # that it works under
    pictures: Path | None = None  # folder for a picture of each measurement
    settings: Annotated[GuidanceEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=GuidanceEvaluation)

    def run(self) -> None:
        self.check_output()
        model = diffusion_model(self.model, [self.prompt] * 4, guidance=1.0, **self.placed())
        self.show(evaluate_guidance(model, self.settings, self.pictures))


@dataclass(frozen=True, kw_only=True)
class EvalCompletion(ReportOptions, PrecisionOptions):
    """Depth of held-out scenes from a head and some known depths: fits, guidance, and the nearest known depth."""

    head: str = "tiny-depth"  # embedded head, folder or hub id
    settings: Annotated[CompletionEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=CompletionEvaluation)
    guidance: CompletionConfig = field(default_factory=CompletionConfig)

    def run(self) -> None:
        self.check_output()
        head = load_head(self.head, **self.placed())
        if not isinstance(head, DenseHead) or head.task == "normals":
            raise ValueError(f"{self.head}: predicts {head.task}, not depth")
        self.show(evaluate_completion(head, self.settings, self.guidance))


@dataclass(frozen=True, kw_only=True)
class EvalJoint(ReportOptions, DeviceOptions):
    """One U-Net for depth, normals and masks beside three for one each, trained on scenes for equally many steps."""

    base: str = "tiny"  # embedded model, diffusers folder or hub id that each training starts from
    scenes: Path | None = None  # a rendered set; rendered into WORK/scenes where left out
    count: int = 4000  # scenes that are rendered
    work: Path = Path("runs/joint")  # trainings and encoded scenes; the same folder again goes on where it was
    workers: int = 2  # processes that render
    settings: Annotated[AblationSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=AblationSettings)

    def run(self) -> None:
        self.check_output()
        check_options(self, count="1..", workers=WORKERS)
        load_parts(self.base, pad=False)  # a base that cannot be loaded is refused before scenes are rendered for it
        scenes = open_or_render(self.scenes, self.work, self.count, workers=self.workers)
        report = evaluate_joint(
            scenes, self.work, self.settings, base=self.base, device=self.device, workers=self.workers
        )
        self.show(report)
