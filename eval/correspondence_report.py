"""What a recipe got on a benchmark of pairs: all averages, the papers' numbers, the worst pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffrep.draw import draw_matches
from diffrep.eval.datasets.pairs import AnnotatedPair
from diffrep.eval.pck import AGGREGATES, Aggregate, Pck
from diffrep.eval.protocols import Protocol
from diffrep.eval.published import Published, published
from diffrep.eval.report import Report, Section
from diffrep.files import printable, write_whole
from diffrep.images import load_image
from diffrep.matching import Matches


@dataclass(frozen=True)
class PairMatches:
    """Where one pair's keypoints were matched to, in the protocol's frame."""

    pair: AnnotatedPair
    predicted: Tensor  # (N, 2) float32


@dataclass(frozen=True)
class Failure:
    """One pair with its matches, in pixels of the original images."""

    title: str
    source: Path
    target: Path
    points: Tensor  # (N, 2) queries in the source
    predicted: Tensor  # (N, 2) in the target
    truth: Tensor  # (N, 2) in the target
    right: Tensor  # (N,) bool
    tolerance: float  # pixels of the target within which a match is right

    def draw(self) -> Image.Image:
        """Both images; what is wrong is ringed red, with a line to where it belongs."""
        source, target = load_image(self.source), load_image(self.target)
        shown = torch.minimum(self.predicted.clamp(min=0), self.predicted.new_tensor(target.size) - 1)
        matches = Matches(shown, torch.zeros(len(shown)))
        return draw_matches(
            source, target, self.points, matches,
            truth=self.truth, tolerance=self.tolerance, titles=[printable(self.title)],
        )  # fmt: skip


def save_failures(failures: Sequence[Failure], folder: Path) -> None:
    """Write one PNG per failure, numbered from the worst."""
    for number, failure in enumerate(failures, start=1):
        write_whole(folder / f"{number:02d}.png", failure.draw().save)


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

    def failures(self, count: int) -> list[Failure]:
        """The pairs with the smallest share of right points at the first alpha, then the largest distance."""
        judged = []
        for match in self.matches:
            pair, protocol = match.pair, self.protocol
            right = protocol.hits(pair, match.predicted)[0]
            truth = pair.target.points(pair.ids)
            predicted = protocol.to_image(match.predicted, pair.target)
            away = float(torch.linalg.vector_norm(predicted - truth, dim=-1).median()) / max(pair.target.size)
            failure = Failure(
                f"{pair.category}: {int(right.sum())} of {len(right)} right at {protocol.alphas[0]:g}   {pair.name}",
                self.root / pair.source.path, self.root / pair.target.path, pair.source.points(pair.ids),
                predicted, truth, right, protocol.alphas[0] * protocol.scale(pair) / protocol.zoom(pair.target),
            )  # fmt: skip
            judged.append((float(right.float().mean()), -away, pair.name, failure))
        return [failure for *_, failure in sorted(judged, key=lambda entry: entry[:3])[:count]]

    def rows(self) -> tuple[Published, ...]:
        """The papers' rows that count the same pairs like this protocol."""
        benchmark, split = self.protocol.benchmark, self.split
        return published(benchmark if split == "test" else f"{benchmark} {split}", threshold=self.protocol.threshold)

    def document(self) -> Mapping[str, object]:
        categories = {category: self.pck.of(category) for category in self.pck.categories}
        document: dict[str, object] = {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "recipe": self.recipe,
            "search": self.search,
            **_numbers(self.pck),
            "pck": _averages(self.pck, AGGREGATES),
            "categories": {
                category: {**_numbers(pck), **_averages(pck, ("per point", "per image"))}
                for category, pck in categories.items()
            },
            "published": self.rows(),
            "problems": self.problems,
            "settings": self.settings,
        }
        if self.by_part is not None:
            share = self.by_part.points / max(self.pck.points, 1)
            averages = _averages(self.by_part, AGGREGATES)
            document["by_part"] = {"points": self.by_part.points, "share": share, "pck": averages}
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
        by_category = []
        for category in self.pck.categories:
            one = self.pck.of(category)
            shares = _percent((one.value()[0], one.value("per image")[0]))
            by_category.append((category, str(len(one.counted)), str(one.points), *shares))
        yield Section("By category", ("pairs", "points", f"{columns[0]} per point", "per image"), by_category)
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


def _numbers(pck: Pck) -> dict[str, object]:
    return {"pairs": len(pck.counted), "points": pck.points}


def _averages(pck: Pck, aggregates: Sequence[Aggregate]) -> dict[str, dict[str, float]]:
    """aggregate -> alpha -> PCK."""
    return {
        name: {f"{alpha:g}": value for alpha, value in zip(pck.alphas, pck.value(name), strict=True)}
        for name in aggregates
    }
