"""What a recipe got on a benchmark of pairs: all averages, the papers' numbers, the worst pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffrep.eval.datasets.pairs import AnnotatedPair
from diffrep.eval.failures import Failure
from diffrep.eval.pck import AGGREGATES, Aggregate, Pck
from diffrep.eval.protocols import Protocol
from diffrep.eval.published import Published, published
from diffrep.eval.report import Report, Section


@dataclass(frozen=True)
class PairMatches:
    """Where one pair's keypoints were matched to, in the protocol's frame."""

    pair: AnnotatedPair
    predicted: Tensor  # (N, 2) float32


@dataclass(frozen=True)
class CorrespondenceReport(Report):
    """What a recipe got on a benchmark.

    Attributes:
        search: "protocol" or "recipe": whose way from keypoints to matches was used.
        root: of the data set's images.
        by_part: over the keypoints that share a part with another one visible in the target.
    """

    dataset: str
    root: Path
    split: str
    protocol: Protocol
    recipe: str
    search: str
    pck: Pck
    by_part: Pck | None
    settings: Mapping[str, object]
    matches: tuple[PairMatches, ...] = field(repr=False, default=())

    def failures(self, count: int, root: Path | None = None) -> list[Failure]:
        """The pairs with the smallest share of right points at the first alpha, then the largest distance."""
        root, judged = root or self.root, []
        for match in self.matches:
            pair, protocol = match.pair, self.protocol
            right = protocol.hits(pair, match.predicted)[0]
            truth = pair.target.points(pair.ids)
            predicted = protocol.to_image(match.predicted, pair.target)
            away = float(torch.linalg.vector_norm(predicted - truth, dim=-1).median()) / max(pair.target.size)
            failure = Failure(
                f"{pair.category}: {int(right.sum())} of {len(right)} right at {protocol.alphas[0]:g}   {pair.name}",
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

    def document(self) -> Mapping[str, object]:
        document: dict[str, object] = {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "recipe": self.recipe,
            "search": self.search,
            "pairs": len(self.pck.counted),
            "points": self.pck.points,
            "pck": {name: _by_alpha(self.pck, name) for name in AGGREGATES},
            "categories": {
                category: {
                    "pairs": len(self.pck.of(category).counted),
                    "points": self.pck.of(category).points,
                    "per point": _by_alpha(self.pck.of(category), "per point"),
                    "per image": _by_alpha(self.pck.of(category), "per image"),
                }
                for category in self.pck.categories
            },
            "published": self.rows(),
            "problems": self.problems,
            "settings": self.settings,
        }
        if self.by_part is not None:
            document["by_part"] = {
                "points": self.by_part.points,
                "share": self.by_part.points / max(self.pck.points, 1),
                "pck": {name: _by_alpha(self.by_part, name) for name in AGGREGATES},
            }
        return document

    def sections(self) -> Iterator[Section]:
        protocol, columns = self.protocol, [f"@{alpha:g}" for alpha in self.protocol.alphas]
        frame = "original pixels" if protocol.frame is None else f"a square of {protocol.frame} pixels"
        sign = "<=" if protocol.inclusive else "<"
        rows = [(name + " *" * (name == protocol.aggregate), *_percent(self.pck.value(name))) for name in AGGREGATES]
        if self.by_part is not None and self.by_part.points:
            share = 100 * self.by_part.points / self.pck.points
            rows.append((f"shared parts ({share:.1f} %)", *_percent(self.by_part.value())))
        yield Section(
            f"{self.recipe} on {self.dataset}: {len(self.pck.counted)} pairs, {self.pck.points} points\n"
            f"protocol {protocol.name}: {sign} alpha * {protocol.threshold}, in {frame}; matches by the {self.search}\n"
            "PCK, % (* the paper's headline number)",
            columns,
            rows,
        )
        by_category = [(category, self.pck.of(category)) for category in self.pck.categories]
        yield Section(
            "By category",
            ("pairs", "points", f"{columns[0]} per point", "per image"),
            [
                (name, str(len(one.counted)), str(one.points), *_percent((one.value()[0], one.value("per image")[0])))
                for name, one in by_category
            ],
        )
        papers = [row for row in self.rows() if set(row.values) & set(protocol.alphas)]
        if papers:
            yield Section("Published (ours minus theirs)", columns, [self._beside(row) for row in papers])

    def _beside(self, row: Published) -> tuple[str, ...]:
        ours = self.pck.value(row.aggregate or self.protocol.aggregate)
        cells = [
            f"{row.values[a]:.1f} ({100 * value - row.values[a]:+.1f})" if a in row.values else ""
            for a, value in zip(self.protocol.alphas, ours, strict=True)
        ]
        name = f"{row.method}{' [this recipe]' if row.recipe == self.recipe else ''}"
        return name, *cells, f"{row.aggregate or 'average not stated'}; {row.source}"


def _percent(values: tuple[float, ...]) -> list[str]:
    return [f"{100 * value:.2f}" for value in values]


def _by_alpha(pck: Pck, aggregate: Aggregate) -> dict[str, float]:
    return {f"{alpha:g}": value for alpha, value in zip(pck.alphas, pck.value(aggregate), strict=True)}
