"""``diffrep eval guidance`` and ``completion``: what is done between the steps of a diffusion, measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import PrecisionOptions, ReportOptions
from diffrep.eval.completion import CompletionEvaluation, evaluate_completion
from diffrep.eval.guidance import GuidanceEvaluation, evaluate_guidance
from diffrep.heads.completion import CompletionConfig
from diffrep.heads.dense import DenseHead
from diffrep.heads.loading import load_head
from diffrep.painting import diffusion_model


@dataclass(frozen=True, kw_only=True)
class EvalGuidance(ReportOptions, PrecisionOptions):
    """Posterior samplers on four measurements of held-out scenes, through the decoder of one model."""

    model: str = "tiny"  # embedded model, folder or hub id of a latent diffusion
    prompt: str = ""  # that it works under
    pictures: Path | None = None  # folder for a picture of each measurement
    settings: Annotated[GuidanceEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=GuidanceEvaluation)

    def run(self) -> None:
        self.check_output()
        device, dtype = self.resolved()
        model = diffusion_model(self.model, self.prompt, guidance=1.0, device=device, dtype=dtype)
        self.show(evaluate_guidance(model, self.settings, self.pictures))


@dataclass(frozen=True, kw_only=True)
class EvalCompletion(ReportOptions, PrecisionOptions):
    """Depth of held-out scenes from a head and some known depths: fits, guidance, and the nearest known depth."""

    head: str = "tiny-depth"  # embedded head, folder or hub id
    settings: Annotated[CompletionEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=CompletionEvaluation)
    guidance: CompletionConfig = field(default_factory=CompletionConfig)

    def run(self) -> None:
        self.check_output()
        device, dtype = self.resolved()
        head = load_head(self.head, device=device, dtype=dtype)
        if not isinstance(head, DenseHead) or head.task == "normals":
            raise ValueError(f"{self.head}: predicts {head.task}, not depth")
        self.show(evaluate_completion(head, self.settings, self.guidance))
