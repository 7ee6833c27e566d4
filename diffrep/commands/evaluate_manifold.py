"""``diffrep eval manifold`` and ``diffrep eval interpolation``: how well maps keep geodesics and trajectories."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from diffrep.commands.options import ReportOptions
from diffrep.eval.manifold import SCORES, ManifoldSettings, evaluate_manifolds, interpolate_times
from diffrep.files import check_writable, write_whole
from diffrep.manifold.files import EmbedConfig, embed_file


@dataclass(frozen=True, kw_only=True)
class Manifold(ReportOptions):
    """Embed noisy swiss rolls and trees with every method and compare with the true geodesics.

    PHATE and UMAP take part where they are installed.
    """

    plot: Path | None = None  # draw the first score of all methods: .png, .pdf or .svg
    score: tuple[str, ...] = ("spearman_mean_rows",)  # a table for each
    settings: Annotated[ManifoldSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=ManifoldSettings)

    def run(self) -> None:
        if (unknown := [name for name in self.score if name not in SCORES]) or not self.score:
            raise ValueError(f"--score must be of {', '.join(SCORES)}, got {', '.join(unknown) or 'none'}")
        self.check_output()
        if self.plot is not None:
            check_writable(self.plot, (".png", ".pdf", ".svg"))
        report = replace(evaluate_manifolds(self.settings, progress=not self.json), shown=self.score)
        if self.plot is not None:
            write_whole(self.plot, report.plot(self.score[0]).savefig)
        self.show(report)


@dataclass(frozen=True, kw_only=True)
class Interpolation(ReportOptions):
    """The single-cell protocol: predict each inner time point of a table from the times before and after it."""

    file: Annotated[Path, tyro.conf.Positional]  # .h5ad, or any table that `diffrep embed` reads
    times: str  # column (of .obs in .h5ad) that says when a row was taken; it is no feature
    max_points: int | None = None  # at most so many rows of a time enter the scores
    seed: int = 0  # of what is drawn
    config: EmbedConfig = field(default_factory=EmbedConfig)

    def run(self) -> None:
        self.check_output()
        config = replace(self.config, exclude=(*self.config.exclude, self.times))
        embedded = embed_file(self.file, None, config, progress=not self.json)
        times = np.asarray(embedded.table.column(self.times))
        report = interpolate_times(embedded.embedding, times, max_points=self.max_points, seed=self.seed)
        self.show(replace(report, settings={**report.settings, "embedding": embedded.settings}))
