"""What the sub-commands of ``diffrep probe`` share: which images, how the backbone is used, where results go."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diffrep.backbones import Backbone, load_backbone
from diffrep.commands.options import BackboneOptions, Command, PrecisionOptions
from diffrep.commands.output import check_writable
from diffrep.features import ExtractConfig
from diffrep.heads.probes import LabelledImages, ProbeData, ProbeFit, ReadPlan, Scores, read_labelled
from diffrep.heads.probes.layouts import HeadShape, Kind
from diffrep.heads.probes.recipe import check_settings
from diffrep.heads.probes.saved import SavedKind, SavedProbe, saved_kind
from diffrep.images import Sizing
from diffrep.published import note_embedded


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """What is split and kept, and how."""

    split_seed: int = 0  # of what is held out
    work: Path = Path("runs/probe")  # folder of features, maps and rendered scenes, so that they are made once
    workers: int = 0  # processes that decode and render ahead

    def __post_init__(self) -> None:
        check_settings(self, not_negative=("split_seed", "workers"))


@dataclass(frozen=True, kw_only=True)
class Images(WorkOptions):
    """Which labelled images, and how they are split."""

    image: str | None = None  # column or key of the image; "path" in a table, "image" in a data set
    label: str = "label"  # column or key of the label
    group: str | None = None  # column or key of a group that is kept together in the split
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)  # of train, val, test, where the source names no split
    dtype: Literal["float16", "float32"] = "float16"  # in which features are kept

    def find(self, source: str) -> LabelledImages:
        """The labelled images of a folder, table, archive or data set; ``scenes[:ATTRIBUTE]``; ``digits``."""
        if source == "digits" or source.partition(":")[0] == "scenes":
            from diffrep.eval.probe_data import named_images  # brings the renderer

            return named_images(source, self.work, workers=max(self.workers, 1))
        return read_labelled(source, image=self.image, label=self.label, group=self.group)

    def read(self, data: LabelledImages, backbones: Mapping[str, Backbone], readings: Sequence[ReadPlan]) -> ProbeData:
        """Read the features that are not kept yet, and say what could not be read."""
        prepared = ProbeData.read(
            data,
            backbones,
            readings,
            self.work / "features",
            shares=self.shares,
            seed=self.split_seed,
            workers=self.workers,
            dtype=self.dtype,
        )
        if lost := prepared.unreadable():
            print(f"left out {len(lost)} images that cannot be read, the first: {lost[0]}", file=sys.stderr)
        return prepared


@dataclass(frozen=True, kw_only=True)
class Extraction(BackboneOptions, PrecisionOptions):
    """How the backbone is used; what is left out is as it recommends."""

    size: int | None = None  # side of the square that images are brought to, pixels
    prompt: str = ""  # the text condition
    ensemble: int | None = None  # noise draws that are averaged
    noise_seed: int = 0  # of the noise
    batch_size: int = 16  # images that go through the network together

    def config(self, **others: Any) -> ExtractConfig:
        """The settings of reading, and others such as taps and timestep."""
        sizing = None if self.size is None else Sizing("squash", self.size)
        return ExtractConfig(
            sizing=sizing,
            prompt=self.prompt,
            ensemble=self.ensemble,
            seed=self.noise_seed,
            batch_size=self.batch_size,
            **others,
        )

    def load(self, names: Sequence[str]) -> dict[str, Backbone]:
        """Load backbones by their names; the names that they get have the options of the command line.

        Raises:
            ValueError: there are none, or several and options that only one takes.
        """
        if not names:
            raise ValueError("--cells must name at least one backbone")
        self.config()  # refuses what means nothing before anything is loaded
        device, dtype = self.resolved()
        models = dict.fromkeys(self.named_alone(names))
        backbones = {name: load_backbone(name, device=device, dtype=dtype) for name in models}
        for name in names:
            note_embedded(name, "probes")
        return backbones

    def load_one(self, name: str) -> Backbone:
        """Load a backbone by its name."""
        (backbone,) = self.load([name]).values()
        return backbone


@dataclass(frozen=True, kw_only=True)
class Classifier(Command):
    """Which head is trained on features, and how."""

    head: Kind = "linear"  # what is trained on the features
    seed: int = 0  # of the order of examples and of initial weights
    balanced: bool = False  # weigh rare classes up in the loss
    images: Annotated[Images, tyro.conf.OmitArgPrefixes] = field(default_factory=Images)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: ProbeFit = field(default_factory=ProbeFit)
    shape: HeadShape = field(default_factory=HeadShape)

    def seeded_fit(self) -> ProbeFit:
        """The settings of training, with the seed and the class weights of the command line."""
        grid = replace(self.fit.grid, seed=self.seed, balanced=self.balanced or self.fit.grid.balanced)
        return replace(self.fit, grid=grid)


@dataclass(frozen=True, kw_only=True)
class NewProbe(Command):
    """Where a new probe goes."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("probe")  # folder of the probe
    overwrite: bool = False  # a probe that is there already
    json: bool = False  # print JSON

    def check_new(self, kind: SavedKind) -> None:
        """Refuse a folder that holds a probe.

        Raises:
            ValueError: it does, and it is not to be overwritten, or is of another kind.
            OSError: it cannot be written to.
        """
        check_writable(self.output / "probe.json", (".json",))
        existing = saved_kind(self.output)
        if existing is not None and existing != kind:
            raise ValueError(f"{self.output}: holds a probe of another kind ({existing}); name another folder")
        if existing is not None and not self.overwrite:
            raise ValueError(f"{self.output}: holds a probe already; name another folder, or say --overwrite")

    def finish(self, probe: SavedProbe, lines: Sequence[str], document: Mapping[str, Any] | None = None) -> None:
        """Save the probe, and print its lines, or as JSON a document, which is what it says about itself if None."""
        probe.save(self.output)
        if self.json:
            print(json_module.dumps(dict(probe.about if document is None else document), indent=2))
            return
        print("\n".join([*lines, f"wrote {self.output}"]))


def score_lines(parts: Mapping[str, Scores]) -> list[str]:
    """One line for each part: top-1 with its interval, top-5, mean per class."""
    return [
        f"{part:<4}  top-1 {100 * scores.top1:.1f} % ({100 * scores.low:.1f}..{100 * scores.high:.1f})"
        f"  top-5 {100 * scores.top5:.1f} %  mean per class {100 * scores.mean_per_class:.1f} %"
        f"  {scores.n} images"
        for part, scores in parts.items()
    ]
