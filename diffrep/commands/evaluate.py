"""``diffrep eval``: run a benchmark and print its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from diffrep.commands.output import check_writable
from diffrep.eval.homography import HomographySettings, evaluate_homographies
from diffrep.eval.matchers import baselines, matchers_of
from diffrep.eval.scenes import ScenesSettings, evaluate_scenes
from diffrep.eval.synthesis import SynthesisEvaluation, evaluate_synthesis
from diffrep.files import write_whole
from diffrep.recipes import Correspondence
from diffrep.synthesis import SynthesisSettings, load_synthesis


class Report(Protocol):
    """What every benchmark gives."""

    def table(self) -> str: ...

    def to_json(self) -> str: ...


def show(report: Report, output: Path | None, *, json: bool) -> None:
    """Print a report as a table or as JSON, and keep the JSON where asked."""
    if output is not None:
        write_whole(output, report.to_json() + "\n")
    print(report.to_json() if json else report.table())


def compare(evaluate: Callable[..., Report], asked: Scenes | Homography, *, box: bool) -> None:
    """Evaluate a recipe's matchers beside those without a network; `box`: views show an object in a known box."""
    if asked.output is not None:
        check_writable(asked.output, (".json",))
    plain, ours = baselines(box=box), matchers_of(Correspondence(asked.recipe))
    show(evaluate(plain[0] | ours[0], plain[1] | ours[1], asked.settings), asked.output, json=asked.json)


@dataclass(frozen=True)
class Scenes:
    """Match parts of rendered objects: held-out pairs of different instances, seen and unseen categories."""

    recipe: str = "tiny"  # each of its backbones alone and all of them fused are compared
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the report as this JSON file
    json: bool = False  # print JSON instead of the table
    settings: Annotated[ScenesSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=ScenesSettings)

    def run(self) -> None:
        compare(evaluate_scenes, self, box=True)


@dataclass(frozen=True)
class Homography:
    """Match points of real photographs in views of them that a known homography gives."""

    recipe: str = "tiny-views"  # each of its backbones alone and all of them fused are compared
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the report as this JSON file
    json: bool = False  # print JSON instead of the table
    settings: Annotated[HomographySettings, tyro.conf.OmitArgPrefixes] = field(default_factory=HomographySettings)

    def run(self) -> None:
        compare(evaluate_homographies, self, box=False)


@dataclass(frozen=True)
class Synthesis:
    """Paint from embeddings of held-out scenes: FID, seams, embedding consistency, use as augmentation."""

    model: str = "tiny-synthesis"  # or the folder of one
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the report as this JSON file
    json: bool = False  # print JSON instead of the table
    device: str = "cpu"  # cpu or cuda
    settings: Annotated[SynthesisEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthesisEvaluation)
    sampling: SynthesisSettings = field(default_factory=SynthesisSettings)

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".json",))
        model = load_synthesis(self.model, device=self.device)
        show(evaluate_synthesis(model, self.settings, self.sampling), self.output, json=self.json)
