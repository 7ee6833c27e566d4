"""Published accuracies of probes, with their sources and how they were obtained, from ``eval/data/probes.toml``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffrep.eval.published import read_tables


@dataclass(frozen=True, kw_only=True)
class PublishedProbe:
    """Top-1 accuracy in percent.

    Attributes:
        obtained: "table" printed in the paper; "figure" decoded from its vector figure, exact to about 0.02;
            "bars" read off a bar chart, good to about 0.5.
    """

    benchmark: str
    method: str
    value: float
    source: str
    obtained: Literal["table", "figure", "bars"]
    block: int | None = None  # of the 37 of the 256-pixel ADM network
    timestep: int | None = None
    pool: int | None = None

    def __str__(self) -> str:
        place = "" if self.block is None else f" block {self.block}, t={self.timestep}, pool {self.pool}"
        paper = self.source[self.source.index("arXiv") :].rstrip(")")
        return f"{self.value:>6.2f}  {self.method}{place}  ({paper}, {self.obtained})"


PUBLISHED = read_tables("probes", PublishedProbe)


def published_rows(benchmark: str) -> Sequence[PublishedProbe]:
    """What papers report for a benchmark, best first."""
    return sorted((p for p in PUBLISHED if p.benchmark == benchmark), key=lambda p: -p.value)


def published_table(benchmark: str, rows: int = 12) -> str:
    """The best published rows as text; empty where there are none."""
    published = published_rows(benchmark)[:rows]
    head = f"published top-1 on {benchmark}, % (bars: read off a chart, good to about 0.5)"
    return "\n".join([head, *(f"  {row}" for row in published)]) if published else ""
