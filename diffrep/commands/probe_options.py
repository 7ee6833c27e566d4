"""What the sub-commands of ``diffrep probe`` share: which images, how the backbone is used, where results go."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffrep.backbones import Backbone, load_backbone
from diffrep.commands.output import check_writable
from diffrep.eval.probe_data import named_images
from diffrep.features import ExtractConfig
from diffrep.heads.probes import LabelledImages, ProbeData, ProbeFit, Reading, Scores
from diffrep.heads.probes.saved import SavedKind, saved_kind
from diffrep.images import Sizing


@dataclass(frozen=True, kw_only=True)
class Images:
    """Which labelled images, and how they are split."""

    image: str | None = None  # column or key of the image; "path" in a table, "image" in a data set
    label: str = "label"  # column or key of the label
    group: str | None = None  # column or key of a group that is kept together in the split
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)  # of train, val, test, where the source names no split
    split_seed: int = 0
    work: Path = Path("runs/probe")  # features are kept here, so that they are read once
    workers: int = 0  # processes that decode images ahead
    dtype: Literal["float16", "float32"] = "float16"  # in which features are kept

    def find(self, source: str) -> LabelledImages:
        """Find the images."""
        return named_images(
            source, self.work, workers=max(self.workers, 1), image=self.image, label=self.label, group=self.group
        )

    def read(self, data: LabelledImages, backbones: Mapping[str, Backbone], readings: Sequence[Reading]) -> ProbeData:
        """Read the features that are not kept yet, and say what could not be read."""
        found = ProbeData.read(
            data,
            backbones,
            readings,
            self.work / "features",
            shares=self.shares,
            seed=self.split_seed,
            workers=self.workers,
            dtype=self.dtype,
        )
        if lost := found.unreadable():
            print(f"left out {len(lost)} images that cannot be read, the first: {lost[0]}", file=sys.stderr)
        return found


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How the backbone is used; what is left out is as it recommends."""

    size: int | None = None  # side of the square that images are brought to, pixels
    prompt: str = ""  # the text condition
    ensemble: int | None = None  # noise draws that are averaged
    noise_seed: int = 0
    batch_size: int = 16
    device: str = "cpu"  # cpu or cuda

    def config(self) -> ExtractConfig:
        """The settings without taps and timesteps."""
        sizing = None if self.size is None else Sizing("squash", self.size)
        return ExtractConfig(
            sizing=sizing,
            prompt=self.prompt,
            ensemble=self.ensemble,
            seed=self.noise_seed,
            batch_size=self.batch_size,
        )

    def load(self, names: Sequence[str]) -> dict[str, Backbone]:
        """Load backbones by their names."""
        return {name: load_backbone(name, device=self.device) for name in dict.fromkeys(names)}


def with_seed(fit: ProbeFit, seed: int, balanced: bool) -> ProbeFit:
    """The seed and the class weights of the command line."""
    return replace(fit, grid=replace(fit.grid, seed=seed, balanced=balanced or fit.grid.balanced))


def check_new(folder: Path, kind: SavedKind, *, overwrite: bool) -> None:
    """Refuse a folder that holds a probe.

    Raises:
        ValueError: it does, and it is not to be overwritten, or is of another kind.
        OSError: it cannot be written to.
    """
    check_writable(folder / "probe.json", (".json",))
    there = saved_kind(folder)
    if there is not None and there != kind:
        raise ValueError(f"{folder}: holds a probe of another kind ({there}); name another folder")
    if there is not None and not overwrite:
        raise ValueError(f"{folder}: holds a probe already; name another folder, or say --overwrite")


def score_lines(parts: Mapping[str, Scores]) -> list[str]:
    """One line for each part: top-1 with its interval, top-5, mean per class."""
    return [
        f"{part:<4}  top-1 {100 * scores.top1:.1f} % ({100 * scores.low:.1f}..{100 * scores.high:.1f})"
        f"  top-5 {100 * scores.top5:.1f} %  mean per class {100 * scores.mean_per_class:.1f} %"
        f"  {scores.n} images"
        for part, scores in parts.items()
    ]
