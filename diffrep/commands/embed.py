"""``diffrep embed``, ``diffrep eval manifold`` and ``diffrep eval interpolation``: maps of tables."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from diffrep.commands.options import ReportOptions
from diffrep.commands.parsing import Command
from diffrep.eval.manifold import SCORES, ManifoldSettings, evaluate_manifolds, interpolate_times
from diffrep.files import check_writable, write_whole
from diffrep.manifold.files import EmbedConfig, embed_file, save_figure


@dataclass(frozen=True)
class Embed(Command):
    """Draw a map of high-dimensional data that keeps its geodesic distances.

    Writes the picture and beside it the coordinates (.csv), the settings (.json) and a page to explore (.html); of an
    .h5ad file also its cells with the map in obsm["X_heat_geodesic"] (.h5ad).
    """

    file: Annotated[Path, tyro.conf.Positional]  # .npy, .npz, .csv, .tsv, .parquet, .h5ad, or a store of features
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("map.png")  # .png, .pdf or .svg
    json: bool = False  # print the settings and results as JSON
    config: Annotated[EmbedConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=EmbedConfig)

    def run(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _one_line  # type: ignore[assignment]  # takes the place as it comes
            result = embed_file(self.file, self.output, self.config, progress=not self.json)
        if self.json:
            print(json.dumps(result.settings, indent=2))
        else:
            print("\n".join(f"wrote {path}" for path in result.files))


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Show what was left out or guessed, without the place in our code."""
    print(f"diffrep embed: {message}", file=sys.stderr)


# -- `diffrep eval manifold` and `diffrep eval interpolation`: how well maps keep geodesics and trajectories


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
            write_whole(self.plot, lambda path: save_figure(report.plot(self.score[0]), path))
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
