"""What distillation costs: patches of few-step models beside their teacher's, at equal noise and conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.eval.painted import frechet_distance, load_features
from diffrep.eval.report import Report, Section
from diffrep.eval.synthesis import held_out_images
from diffrep.files import number_of
from diffrep.synthesis import SynthesisModel, SynthesisSettings, sample_patches
from diffrep.synthesis.grids import ImageEncoder


@dataclass(frozen=True)
class FewStepReport(Report):
    """Rows by name, the teacher's 20 steps first.

    Attributes:
        rows: of each "calls" of the U-Net for a patch; "fid", the Fréchet distance to real patches in the features of
            the embedded DINO, comparable within a table alone; "cosine", the mean of a painted patch's embedding to the
            one that was asked for; "near", the mean absolute difference to the teacher's 20 steps, of 255 levels.
    """

    rows: Mapping[str, Mapping[str, float]]
    patches: int

    def document(self) -> Mapping[str, object]:
        return {"patches": self.patches, "rows": self.rows}

    def sections(self) -> Iterator[Section]:
        columns = ("calls", "FID (tiny-dino)", "cosine to the condition", "difference to the teacher")
        rows = [(name, *(f"{value:.4g}" for value in row.values())) for name, row in self.rows.items()]
        yield Section(f"{number_of(self.patches, 'patch', 'patches')} of held-out scenes", columns, rows)


def compare_few_step(
    teacher: SynthesisModel, students: Mapping[str, SynthesisModel], *, patches: int = 256, seed: int = 0
) -> FewStepReport:
    """Paint the same patches with the teacher in 20, 4, 2 and 1 steps and with students in 4, 2 and 1."""
    encoder, extractor = ImageEncoder.of_model(teacher), load_features("tiny-dino@class")
    size = teacher.window * teacher.factor
    shown = held_out_images(patches, size, first=seed * 2**20)
    others = held_out_images(patches, size, first=seed * 2**20 + 2**18)
    conditions = encoder(shown)
    reference: Tensor | None = None

    def measured(model: SynthesisModel, settings: SynthesisSettings) -> dict[str, float]:
        nonlocal reference
        latents = sample_patches(model, conditions, settings)
        images = torch.cat([model.decode(part) for part in latents.split(32)]).float().clamp(0, 1).cpu()
        reference = images if reference is None else reference
        guidance = model.about.guidance if settings.guidance is None else settings.guidance
        return {
            "calls": settings.steps * (1 if guidance == 1 else 2),
            "fid": frechet_distance(others, images, extractor),
            "cosine": float(F.cosine_similarity(encoder(images), conditions).mean()),
            "near": 255 * float((images - reference).abs().mean()),
        }

    rows = {
        f"teacher, {number_of(steps, 'step')}": measured(teacher, SynthesisSettings(steps=steps, seed=seed))
        for steps in (20, 4, 2, 1)
    }
    for name, student in students.items():
        for steps in (4, 2, 1):
            settings = SynthesisSettings(scheduler="lcm", steps=steps, guidance=1.0, seed=seed)
            rows[f"{name}, {number_of(steps, 'step')}"] = measured(student, settings)
    return FewStepReport(rows=rows, patches=patches)
