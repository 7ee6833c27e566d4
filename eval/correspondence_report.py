"""What a recipe got on a benchmark of pairs: all averages, the papers' numbers, the worst pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.eval.datasets.pairs import AnnotatedPair, Problem
from diffrep.eval.failures import Failure
from diffrep.eval.pck import AGGREGATES, Pck
from diffrep.eval.protocols import Protocol
from diffrep.eval.published import Published, published


@dataclass(frozen=True)
class PairMatches:
    """Where one pair's keypoints were found, in the protocol's frame."""

    pair: AnnotatedPair
    predicted: Tensor  # (N, 2) float32


@dataclass(frozen=True)
class CorrespondenceReport:
    """What a recipe got on a benchmark."""

    dataset: str
    split: str
    protocol: Protocol
    recipe: str
    search: str  # "protocol" or "recipe": whose way from keypoints to matches was used
    pck: Pck
    by_part: Pck | None  # over the keypoints that share a part with another one visible in the target
    problems: tuple[Problem, ...]
    settings: Mapping[str, object]
    matches: tuple[PairMatches, ...] = field(repr=False, default=())

    def failures(self, count: int, root: Path) -> list[Failure]:
        """The pairs with the smallest share of right points at the first alpha, then the largest distance."""
        judged = []
        for found in self.matches:
            pair, protocol = found.pair, self.protocol
            right = protocol.hits(pair, found.predicted)[0]
            truth = pair.target.points(pair.ids)
            predicted = protocol.to_image(found.predicted, pair.target)
            away = float(torch.linalg.vector_norm(predicted - truth, dim=-1).median()) / max(pair.target.size)
            title = f"{pair.category}: {int(right.sum())} of {len(right)} right at {protocol.alphas[0]:g}"
            failure = Failure(
                f"{title}   {pair.name}",
                root / pair.source.path,
                root / pair.target.path,
                pair.source.points(pair.ids),
                predicted,
                truth,
                right,
            )
            judged.append((float(right.float().mean()), -away, pair.name, failure))
        return [failure for *_, failure in sorted(judged, key=lambda entry: entry[:3])[:count]]

    def rows(self) -> tuple[Published, ...]:
        """The papers' rows that count the same pairs like this protocol."""
        benchmark, split = self.protocol.benchmark, self.split
        return published(benchmark if split == "test" else f"{benchmark} {split}", threshold=self.protocol.threshold)

    def table(self) -> str:
        """The report as text."""
        return "\n".join([*self._averages(), "", *self._categories(), *self._papers(), *self._notes()])

    def to_json(self) -> str:
        """Everything in the tables as numbers, with the settings that made them."""
        averages = {name: _by_alpha(self.pck, name) for name in AGGREGATES}
        document: dict[str, object] = {
            "dataset": self.dataset,
            "protocol": asdict(self.protocol),
            "recipe": self.recipe,
            "search": self.search,
            "pairs": len(self.pck.counted),
            "points": self.pck.points,
            "pck": averages,
            "categories": {
                category: {
                    "pairs": len(self.pck.of(category).counted),
                    "points": self.pck.of(category).points,
                    "per point": _by_alpha(self.pck.of(category), "per point"),
                    "per image": _by_alpha(self.pck.of(category), "per image"),
                }
                for category in self.pck.categories
            },
            "published": [asdict(row) for row in self.rows()],
            "problems": [asdict(problem) for problem in self.problems],
            "settings": dict(self.settings),
        }
        if self.by_part is not None:
            document["by_part"] = {
                "points": self.by_part.points,
                "share": self.by_part.points / max(self.pck.points, 1),
                "pck": {name: _by_alpha(self.by_part, name) for name in AGGREGATES},
            }
        return json.dumps(document, indent=2, default=str)

    def _averages(self) -> list[str]:
        alphas = self.protocol.alphas
        frame = "original pixels" if self.protocol.frame is None else f"a square of {self.protocol.frame} pixels"
        sign = "<=" if self.protocol.inclusive else "<"
        lines = [
            f"{self.recipe} on {self.dataset}: {len(self.pck.counted)} pairs, {self.pck.points} points",
            f"protocol {self.protocol.name}: {sign} alpha * {self.protocol.threshold}, in {frame};"
            f" matches by the {self.search}",
            f"{'PCK, %':<26}" + "".join(f"{f'@{alpha:g}':>8}" for alpha in alphas),
        ]
        for name in AGGREGATES:
            mark = " *" if name == self.protocol.aggregate else ""
            lines.append(f"{name + mark:<26}" + "".join(f"{100 * v:>8.2f}" for v in self.pck.value(name)))
        if self.by_part is not None and self.by_part.points:
            share = 100 * self.by_part.points / self.pck.points
            lines.append(
                f"{f'shared parts ({share:.1f} %)':<26}" + "".join(f"{100 * v:>8.2f}" for v in self.by_part.value())
            )
        return [*lines, "* the paper's headline number"]

    def _categories(self) -> list[str]:
        first = self.protocol.alphas[0]
        lines = [f"{'category':<16}{'pairs':>7}{'points':>8}{f'@{first:g} per point':>18}{'per image':>11}"]
        for category in self.pck.categories:
            own = self.pck.of(category)
            point, image = own.value()[0], own.value("per image")[0]
            lines.append(f"{category:<16}{len(own.counted):>7}{own.points:>8}{100 * point:>18.2f}{100 * image:>11.2f}")
        return lines

    def _papers(self) -> list[str]:
        rows = [row for row in self.rows() if set(row.values) & set(self.protocol.alphas)]
        if not rows:
            return []
        lines = [
            "",
            f"{'published (ours minus theirs)':<40}" + "".join(f"{f'@{a:g}':>16}" for a in self.protocol.alphas),
        ]
        for row in rows:
            ours = self.pck.value(row.aggregate or self.protocol.aggregate)
            cells = [
                f"{row.values[a]:.1f} ({100 * own - row.values[a]:+.1f})" if a in row.values else ""
                for a, own in zip(self.protocol.alphas, ours, strict=True)
            ]
            name = f"{row.method}{' [this recipe]' if row.recipe == self.recipe else ''}"
            averaged = row.aggregate or "average not stated"
            lines.append(f"{name:<40}" + "".join(f"{c:>16}" for c in cells) + f"  {averaged}; {row.source}")
        return lines

    def _notes(self) -> list[str]:
        if not self.problems:
            return []
        shown = [f"  {problem}" for problem in self.problems[:20]]
        more = [f"  ... and {len(self.problems) - 20} more, all in the JSON"] if len(self.problems) > 20 else []
        return [
            "",
            f"{len(self.problems)} problems; what they concern is left out of every number:",
            *shown,
            *more,
        ]


def _by_alpha(pck: Pck, aggregate: Any) -> dict[str, float | None]:
    values = zip(pck.alphas, pck.value(aggregate), strict=True)
    return {f"{alpha:g}": None if math.isnan(value) else value for alpha, value in values}
