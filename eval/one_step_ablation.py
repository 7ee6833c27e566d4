"""Lotus's ablation in small: what the target, the number of steps, the detail preserver and the pretraining bring.

Every variant starts from the same base, sees the same scenes for the same number of optimiser steps and is measured on
the same held-out scenes. The paper's numbers (its section 4.3: AbsRel on NYUv2, in percent) stand beside the variants
that it has; they are of another model, another data set and far longer trainings: only their order is comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffrep.backbones.pipelines import load_parts
from diffrep.eval.report import Report, Section, bootstrap, with_interval
from diffrep.eval.scene_maps import (
    Method,
    SceneMapReport,
    SceneMapSettings,
    evaluate_scene_maps,
    maps_through_vae,
    no_look,
    scene_pixels,
)
from diffrep.heads.families import LOTUS_D, LOTUS_G, Family, Task
from diffrep.heads.training.dense import OneStepModel, predict_maps
from diffrep.heads.training.dense_data import SampleSet
from diffrep.heads.training.fit import EMBEDDED_FIT, OneStepTraining, train_head
from diffrep.scenes import Scene
from diffrep.settings import POSITIVE, check
from diffrep.training.loop import FitSettings


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        steps: of DDIM when it predicts.
        published: AbsRel on NYUv2 in the paper, percent.
    """

    name: str
    recipe: Family
    steps: int = 1
    scratch: bool = False
    published: float | None = None


def variants(*, ddim_steps: int = 10) -> tuple[Variant, ...]:
    """The paper's chain from direct adaptation to Lotus-D, then what is added here."""
    plain = replace(LOTUS_G, posterior="mean", preserve=0.0, task_vector=None)
    diffusion = replace(plain, timesteps="all")
    lotus_d = replace(LOTUS_D, posterior="mean")
    return (
        Variant("noise, all timesteps", replace(diffusion, predicts="epsilon"), ddim_steps, published=11.55),
        Variant("v, all timesteps", replace(diffusion, predicts="v_prediction"), ddim_steps),
        Variant("x0, all timesteps", diffusion, ddim_steps, published=8.33),
        Variant("x0, all timesteps, asked once", diffusion, 1),
        Variant("x0, one step", plain, published=5.59),
        Variant("x0, one step, detail preserver (Lotus-G)", replace(LOTUS_G, posterior="mean"), published=5.56),
        Variant("x0, one step, no noise", replace(lotus_d, preserve=0.0, task_vector=None)),
        Variant("x0, one step, no noise, detail preserver (Lotus-D)", lotus_d),
        Variant("the same as Lotus-D from random weights", lotus_d, scratch=True),
    )


CLAIMS = (  # what the paper says, the number of the better variant and of the one that it is compared with
    ("x0 instead of noise", 2, 0),
    ("one step instead of all timesteps", 4, 2),
    ("the detail preserver, with noise", 5, 4),
    ("the detail preserver, without noise", 7, 6),
    ("no noise instead of noise (D instead of G)", 7, 5),
    ("pretrained instead of random weights", 7, 8),
)


@dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """How long every variant is trained, and on what it is measured."""

    steps: int = 400  # optimiser steps of each variant
    batch_size: int = 16  # images; the detail preserver's rows come on top
    learning_rate: float = 1e-3
    ddim_steps: int = 10  # when variants trained on all timesteps predict
    seed: int = 21
    held_out: int = 160  # scenes that they are measured on

    def __post_init__(self) -> None:
        check(self, steps="1..", batch_size="1..", learning_rate=POSITIVE, ddim_steps="1..", held_out="1..")

    def fit(self) -> FitSettings:
        """The settings of every variant's training."""
        return replace(
            EMBEDDED_FIT, steps=self.steps, learning_rate=self.learning_rate, seed=self.seed, warmup=50,
            ema_decay=0.99,
        )  # fmt: skip


@dataclass(frozen=True)
class AblationReport(Report):
    """What every variant got."""

    settings: AblationSettings
    variants: tuple[Variant, ...]
    scenes: SceneMapReport

    def metric(self) -> str:
        """The one that is compared."""
        return "mean" if self.scenes.task == "normals" else "abs_rel"

    def difference(self, ours: str, theirs: str) -> tuple[float, float, float]:
        """How much lower the error of `ours` is than that of `theirs`, in percent of it, with a 95 % interval.

        Over the same images, drawn together.
        """
        names = self.scenes.groups["all"]
        a, b = (np.array([self.scenes.rows[m][n][self.metric()] for n in names]) for m in (ours, theirs))
        low, high = bootstrap(lambda rows: 100 * (1 - a[rows].mean(1) / b[rows].mean(1)), len(names), draws=2000)
        return float(100 * (1 - a.mean() / b.mean())), low, high

    def findings(self) -> list[str]:
        """Each claim of the paper, and whether it shows here."""
        lines = []
        for what, ours, theirs in CLAIMS:
            value, low, high = self.difference(self.variants[ours].name, self.variants[theirs].name)
            verdict = "shows" if low > 0 else ("the opposite shows" if high < 0 else "does not show either way")
            lines.append(f"  {what}: error {value:+.1f}% lower ({low:+.1f}..{high:+.1f}): {verdict}")
        return lines

    def document(self) -> Mapping[str, object]:
        return {
            "settings": self.settings,
            "variants": self.variants,
            "scenes": self.scenes.document(),
            "findings": self.findings(),
        }

    def sections(self) -> Iterator[Section]:
        metric = self.metric()
        scale, unit = (1, "mean angle, degrees") if metric == "mean" else (100, "AbsRel, %")
        steps = {variant.name: str(variant.steps) for variant in self.variants}
        paper = {variant.name: f"{variant.published:.2f}" for variant in self.variants if variant.published}
        rows = []
        for name in {**steps, **self.scenes.rows}:
            interval = with_interval(*(scale * x for x in self.scenes.mean(name, metric)))
            rows.append((name, steps.get(name, ""), interval, paper.get(name, "")))
        yield Section(
            f"{self.settings.steps} steps of {self.settings.batch_size} images each, {len(self.scenes.groups['all'])}"
            " held-out scenes (95 % interval over images)",
            ("passes", unit, "paper, NYUv2 AbsRel %"),
            rows,
        )
        yield Section("What the paper claims, on these scenes:", notes=self.findings())


def run_ablation(
    samples: SampleSet,
    task: Task,
    work: Path,
    settings: AblationSettings | None = None,
    *,
    base: str = "tiny",
    latents: Path | None = None,
    progress: bool = True,
) -> AblationReport:
    """Train and measure every variant. Called again with the same folder it goes on where it was.

    Args:
        samples: to train on.
        latents: folder of the encoded samples; `work` where None.

    Raises:
        ValueError: the folder is of other settings.
    """
    settings = settings or AblationSettings()
    chosen = variants(ddim_steps=settings.ddim_steps)
    vae = load_parts(base).vae
    methods: dict[str, Method] = {}
    weights: dict[str, object] = {}
    for variant in chosen:
        training = OneStepTraining(
            task=task, base=base, recipe=variant.recipe, fit=settings.fit(), batch_size=settings.batch_size,
            scratch=variant.scratch, cache=True,
        )  # fmt: skip
        model = train_head(
            training, ([samples], [1.0]), work / _folder_name(variant), latents=latents or work, progress=progress
        )
        methods[variant.name] = _method(model, vae, task, variant.steps)
        weights[variant.name] = asdict(training)
    methods |= {"no look": no_look(task), "truth through the VAE": maps_through_vae(vae, task)}
    measured = evaluate_scene_maps(
        methods,
        task,
        SceneMapSettings(count=settings.held_out),
        folder=work / "scenes",
        weights=weights,
        progress=progress,
    )
    return AblationReport(settings, chosen, measured)


def _folder_name(variant: Variant) -> str:
    """Variants that differ in how they are asked share their training."""
    start = "scratch" if variant.scratch else "pretrained"
    recipe = variant.recipe
    preserver = "-preserver" if recipe.preserve else ""
    return f"{start}-{recipe.predicts}-{recipe.timesteps}-{recipe.first_latent}{preserver}".replace("_", "-")


def _method(model: OneStepModel, vae: Any, task: Task, steps: int) -> Callable[[Sequence[Scene]], Tensor]:
    def method(scenes: Sequence[Scene]) -> Tensor:
        device = model.alphas_cumprod.device
        measured = predict_maps(model, vae.to(device), scene_pixels(scenes).to(device), task, steps=steps)
        return measured.cpu()

    return method
