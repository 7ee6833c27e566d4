"""``diffrep eval manifold`` and ``diffrep eval interpolation``: how well maps keep geodesics and trajectories."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from diffrep.commands.output import check_writable
from diffrep.eval.manifold import interpolate_times
from diffrep.eval.manifold_table import SCORES, ManifoldSettings, evaluate_manifolds
from diffrep.files import write_whole
from diffrep.manifold.files import EmbedConfig, embed_file


@dataclass(frozen=True)
class Manifold:
    """Embed noisy swiss rolls and trees with every method and compare with the true geodesics.

    PHATE and UMAP take part where they are installed.
    """

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep all scores as this JSON file
    plot: Path | None = None  # draw the first score of all methods: .png, .pdf or .svg
    score: tuple[str, ...] = ("spearman_mean_rows",)  # a table for each
    json: bool = False  # print JSON instead of the tables
    settings: Annotated[ManifoldSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=ManifoldSettings)

    def run(self) -> None:
        if unknown := [name for name in self.score if name not in SCORES] or not self.score:
            raise ValueError(f"--score must be of {', '.join(SCORES)}, got {unknown or 'none'}")
        if self.output is not None:
            check_writable(self.output, (".json",))
        if self.plot is not None:
            check_writable(self.plot, (".png", ".pdf", ".svg"))
        report = evaluate_manifolds(self.settings, progress=not self.json)
        if self.output is not None:
            write_whole(self.output, report.to_json() + "\n")
        if self.plot is not None:
            self.plot.parent.mkdir(parents=True, exist_ok=True)
            report.plot(self.score[0]).savefig(self.plot)
        print(report.to_json() if self.json else "\n\n".join(report.table(name) for name in self.score))


@dataclass(frozen=True)
class Interpolation:
    """The single-cell protocol: predict each inner time point of a table from the times before and after it."""

    file: Annotated[Path, tyro.conf.Positional]  # .h5ad, or any table that `diffrep embed` reads
    times: str  # column (of .obs in .h5ad) that says when a row was taken
    max_points: int | None = None  # at most so many rows of a time enter the scores
    seed: int = 0
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the scores as this JSON file
    json: bool = False  # print JSON instead of the table
    config: EmbedConfig = field(default_factory=EmbedConfig)

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".json",))
        config = self.config if self.file.suffix == ".h5ad" else _without(self.config, self.times)
        embedded = embed_file(self.file, None, config, progress=not self.json)
        times = np.asarray(embedded.table.column(self.times))
        found = interpolate_times(embedded.embedding, times, max_points=self.max_points, seed=self.seed)
        per_time = {str(k): dict(v) for k, v in found.per_time.items()}
        scores: dict[str, Any] = {"per_time": per_time, "mean": found.mean()}
        document = json.dumps({**scores, "settings": {**found.settings, "embedding": embedded.settings}}, indent=2)
        if self.output is not None:
            write_whole(self.output, document + "\n")
        if self.json:
            print(document)
            return
        names = list(found.mean())
        rows = [["time", *names], *([t, *(f"{s[n]:.4f}" for n in names)] for t, s in scores["per_time"].items())]
        rows.append(["mean", *(f"{found.mean()[n]:.4f}" for n in names)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
        print("\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows))


def _without(config: EmbedConfig, column: str) -> EmbedConfig:
    """The time is what is predicted, so it must be no feature."""
    return replace(config, exclude=(*config.exclude, column))
