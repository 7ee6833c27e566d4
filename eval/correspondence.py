"""Evaluate a recipe on a published correspondence benchmark.

Features are extracted once per image and kept, matches are kept by the chunk; both are written whole or not
at all, so a run that was killed goes on where it was and ends with the same numbers. What a data set lacks
is named in the report. All averages are printed, with the papers' numbers and the difference beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.cache import FeatureCache, claim_folder, fingerprint, write_text
from diffrep.eval.datasets.pairs import AnnotatedPair, PairSet, Problem
from diffrep.eval.datasets.spair_keypoints import part_groups
from diffrep.eval.pck import AGGREGATES, Pck
from diffrep.eval.protocols import Protocol
from diffrep.eval.published import Published, published
from diffrep.features import FeatureMaps
from diffrep.fusion import Descriptors, fuse
from diffrep.images import ImageError, load_image
from diffrep.matching import match_points
from diffrep.recipes import Correspondence, Recipe

Search = Literal["auto", "protocol", "recipe"]
CATEGORY = "{category}"  # in a prompt: stands for the name of the image's category


@dataclass(frozen=True)
class CorrespondenceReport:
    """What a recipe got on a benchmark."""

    dataset: str
    protocol: Protocol
    recipe: str
    search: str  # "protocol" or "recipe": whose way from keypoints to matches was used
    pck: Pck
    by_part: Pck | None  # over the keypoints that share a part with another one visible in the target
    problems: tuple[Problem, ...]
    settings: Mapping[str, object]

    def rows(self) -> tuple[Published, ...]:
        """The papers' rows that count like this protocol."""
        return published(self.protocol.benchmark, threshold=self.protocol.threshold)

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
        frame = (
            "original pixels" if self.protocol.frame is None else f"a square of {self.protocol.frame} pixels"
        )
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
                f"{f'shared parts ({share:.1f} %)':<26}"
                + "".join(f"{100 * v:>8.2f}" for v in self.by_part.value())
            )
        return [*lines, "* the paper's headline number"]

    def _categories(self) -> list[str]:
        first = self.protocol.alphas[0]
        lines = [f"{'category':<16}{'pairs':>7}{'points':>8}{f'@{first:g} per point':>18}{'per image':>11}"]
        for category in self.pck.categories:
            own = self.pck.of(category)
            point, image = own.value()[0], own.value("per image")[0]
            lines.append(
                f"{category:<16}{len(own.counted):>7}{own.points:>8}{100 * point:>18.2f}{100 * image:>11.2f}"
            )
        return lines

    def _papers(self) -> list[str]:
        rows = [row for row in self.rows() if set(row.values) & set(self.protocol.alphas)]
        if not rows:
            return []
        lines = [
            "",
            f"{'published (ours minus theirs)':<40}"
            + "".join(f"{f'@{a:g}':>16}" for a in self.protocol.alphas),
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
        more = (
            [f"  ... and {len(self.problems) - 20} more, all in the JSON"] if len(self.problems) > 20 else []
        )
        return [
            "",
            f"{len(self.problems)} problems; what they concern is left out of every number:",
            *shown,
            *more,
        ]


def _by_alpha(pck: Pck, aggregate: Any) -> dict[str, float | None]:
    values = zip(pck.alphas, pck.value(aggregate), strict=True)
    return {f"{alpha:g}": None if math.isnan(value) else value for alpha, value in values}


@dataclass(frozen=True)
class PairMatches:
    """Where one pair's keypoints were found, in the protocol's frame."""

    pair: AnnotatedPair
    predicted: Tensor  # (N, 2) float32


def evaluate_pairs(
    pairs: PairSet,
    protocol: Protocol,
    correspondence: Correspondence,
    folder: str | Path,
    *,
    search: Search = "auto",
    keep: Literal["float32", "float16"] = "float32",
    batch_size: int = 8,
    pairs_per_file: int = 50,
    progress: bool = True,
) -> CorrespondenceReport:
    """Evaluate a recipe on a benchmark; the same folder again goes on from what is there.

    Args:
        folder: holds ``features/`` (one file per image) and ``matches/`` (one file per `pairs_per_file`
            pairs).
        search: ``protocol`` matches as the paper's script does, ``recipe`` as the recipe does; ``auto`` takes
            the protocol's way where the recipe's descriptors lie on the cells that it needs.
        keep: the type in which features are kept.
        batch_size: images that are extracted together; all that is lost when a run is killed.

    Raises:
        ValueError: the folder is from other settings, or the protocol's search does not fit the recipe.
    """
    folder = Path(folder)
    recipe = correspondence.recipe
    settings = {
        "readings": [asdict(reading) for reading in recipe.readings],
        "weights": [backbone.source for backbone in correspondence.backbones],
        "dataset": pairs.name,
        "batch_size": batch_size,
    }
    cache = FeatureCache(folder / "features", settings, dtype=keep)
    unreadable = extract_images(pairs, correspondence, cache, batch_size=batch_size, progress=progress)
    usable = tuple(p for p in pairs.pairs if not {p.source.path, p.target.path} & unreadable.keys())
    problems = [*pairs.problems, *(Problem(path, what) for path, what in unreadable.items())]
    used = choose_search(usable, protocol, recipe, cache, search)
    matches = list(
        match_pairs(
            usable, protocol, recipe, cache, folder / "matches" / f"{protocol.name} by {used}",
            by_protocol=used == "protocol", pairs_per_file=pairs_per_file, progress=progress,
        )
    )  # fmt: skip
    counts = tuple(protocol.count(found.pair, found.predicted) for found in matches)
    parts = None
    if protocol.by_part:
        shared = (protocol.count_shared(m.pair, m.predicted, part_groups(m.pair.category)) for m in matches)
        parts = Pck(protocol.alphas, tuple(shared))
    return CorrespondenceReport(
        dataset=pairs.name,
        protocol=protocol,
        recipe=recipe.name,
        search=used,
        pck=Pck(protocol.alphas, counts),
        by_part=parts,
        problems=tuple(problems),
        settings={**settings, "recipe": asdict(recipe), "kept_as": keep},
    )


def extract_images(
    pairs: PairSet, correspondence: Correspondence, cache: FeatureCache, *, batch_size: int, progress: bool
) -> dict[str, str]:
    """Extract every image of a data set that the cache lacks.

    Batches are fixed by the sorted list of images, and a batch that is not complete is extracted as a
    whole, so that a run in two halves gives the very numbers of a run in one.

    Returns:
        Path -> what was wrong, for the images that cannot be read.
    """
    unreadable: dict[str, str] = {}
    groups = _images_by_prompt(pairs, correspondence.recipe)
    total = sum(map(len, groups.values()))
    with tqdm(total=total, desc="extract", unit="image", disable=not progress) as bar:
        for category, images in groups.items():
            own = _with_prompt(correspondence, category)
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not all(cache_key(category, image) in cache for image in batch):
                    readable = []
                    for image in batch:
                        try:
                            readable.append((image, load_image(pairs.root / image)))
                        except ImageError as error:
                            unreadable[image] = str(error)
                    for (image, _), features in zip(
                        readable, own.features([picture for _, picture in readable]), strict=True
                    ):
                        cache.save(cache_key(category, image), features)
                bar.update(len(batch))
    return unreadable


def cache_key(category: str, image: str) -> str:
    """The name of an image's features: with the category where the prompt depends on it."""
    return f"{category}/{image}" if category else image


def _prompts_by_category(recipe: Recipe) -> bool:
    return any(CATEGORY in reading.extract.prompt for reading in recipe.readings)


def _images_by_prompt(pairs: PairSet, recipe: Recipe) -> dict[str, list[str]]:
    """Category -> its images, sorted; one entry "" with all images where the prompt is the same for all."""
    if not _prompts_by_category(recipe):
        return {"": list(pairs.images())}
    names = sorted({pair.category for pair in pairs.pairs})
    return {name: list(replace(pairs, pairs=pairs.of(name)).images()) for name in names}


def _with_prompt(correspondence: Correspondence, category: str) -> Correspondence:
    if not category:
        return correspondence
    recipe = correspondence.recipe
    readings = tuple(
        replace(r, extract=replace(r.extract, prompt=r.extract.prompt.replace(CATEGORY, category)))
        for r in recipe.readings
    )
    backbones = {r.backbone: b for r, b in zip(readings, correspondence.backbones, strict=True)}
    return Correspondence(replace(recipe, readings=readings), backbones=backbones)


def choose_search(
    pairs: Sequence[AnnotatedPair], protocol: Protocol, recipe: Recipe, cache: FeatureCache, search: Search
) -> Literal["protocol", "recipe"]:
    """Whose way from keypoints to matches is used.

    Raises:
        ValueError: the protocol's is asked for and it has none, or the recipe's cells are others than it
        needs.
    """
    if search == "recipe" or (search == "auto" and (protocol.search is None or not pairs)):
        return "recipe"
    if protocol.search is None:
        raise ValueError(f"the protocol {protocol.name} leaves matching to the recipe: search='recipe'")
    if not pairs:
        return "protocol"
    category = pairs[0].category if _prompts_by_category(recipe) else ""
    (descriptors,) = fuse([cache.load(cache_key(category, pairs[0].source.path))], recipe.fusion)
    placement, cells = descriptors.placement, protocol.search.cells
    square = placement.canvas_size[0] == placement.canvas_size[1]
    if square and descriptors.size == (cells, cells) and _centred(descriptors):
        return "protocol"
    if search == "auto":
        return "recipe"
    raise ValueError(
        f"{protocol.name} matches {cells} x {cells} cells of a padded square; {recipe.name} gives"
        f" {descriptors.size[0]} x {descriptors.size[1]} on a canvas of {placement.canvas_size}:"
        " search='recipe'"
    )


def _centred(descriptors: Descriptors) -> bool:
    """Whether the image keeps its aspect in the middle of its canvas."""
    placement = descriptors.placement
    x, y = placement.scale
    x0, y0, x1, y1 = placement.content_box
    height, width = placement.canvas_size
    return abs(x / y - 1) < 0.05 and abs(x0 - (width - x1)) <= 1 and abs(y0 - (height - y1)) <= 1


def match_pairs(
    pairs: Sequence[AnnotatedPair],
    protocol: Protocol,
    recipe: Recipe,
    cache: FeatureCache,
    folder: Path,
    *,
    by_protocol: bool,
    pairs_per_file: int = 50,
    progress: bool = True,
) -> Iterator[PairMatches]:
    """Match every pair, or read its matches where they are kept.

    Raises:
        ValueError: the folder holds matches of other pairs or settings.
    """
    names = [[p.name, p.source.path, p.target.path, list(p.ids)] for p in pairs]
    claim_folder(
        folder,
        {
            "recipe": asdict(recipe),
            "by_protocol": by_protocol,
            "frame": protocol.frame,
            "search": None if protocol.search is None else asdict(protocol.search),
            "pairs": fingerprint(names),
            "pairs_per_file": pairs_per_file,
        },
    )
    by_category = _prompts_by_category(recipe)
    load = lru_cache(maxsize=16)(cache.load)  # an image is in many pairs, usually in neighbouring ones
    with tqdm(total=len(pairs), desc="match", unit="pair", disable=not progress) as bar:
        for start in range(0, len(pairs), pairs_per_file):
            chunk = pairs[start : start + pairs_per_file]
            file = folder / f"{start // pairs_per_file:05d}.json"
            if not file.exists():
                found = []
                for pair in chunk:
                    category = pair.category if by_category else ""
                    source, target = (load(cache_key(category, i.path)) for i in (pair.source, pair.target))
                    points = predict(pair, source, target, protocol, recipe, by_protocol=by_protocol)
                    found.append(points.tolist())
                write_text(file, json.dumps(found))
            # read back also what was just written: a run in two halves sees the same numbers
            for pair, points in zip(chunk, json.loads(file.read_text()), strict=True):
                yield PairMatches(pair, torch.tensor(points, dtype=torch.float32).reshape(-1, 2))
            bar.update(len(chunk))


def predict(
    pair: AnnotatedPair,
    source: Sequence[FeatureMaps],
    target: Sequence[FeatureMaps],
    protocol: Protocol,
    recipe: Recipe,
    *,
    by_protocol: bool,
) -> Tensor:
    """Where a pair's keypoints lie in the target, (N, 2) float32 in the protocol's frame."""
    a, b = fuse([source, target], recipe.fusion)
    points = pair.source.points(pair.ids)
    if by_protocol:
        assert protocol.search is not None
        assert protocol.frame is not None
        return protocol.search(a, b, protocol.to_frame(points, pair.source), protocol.frame).float()
    height, width = pair.source.size
    # annotations that count pixels from 1 reach beyond the last pixel's centre
    points = torch.minimum(points.clamp(min=-0.5), points.new_tensor([width - 0.5, height - 0.5]))
    return protocol.to_frame(match_points(a, b, points, recipe.matching).points.cpu(), pair.target)
