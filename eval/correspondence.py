"""Evaluate a recipe on a published correspondence benchmark.

Features are extracted once per image and kept, matches are kept by the chunk; both are written whole or not
at all, so a run that was killed goes on where it was and ends with the same numbers. What a data set lacks
is named in the report. All averages are printed, with the papers' numbers and the difference beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from diffrep.draw import draw_matches
from diffrep.eval.cache import MIRRORED, ImageFeatures, StoredType, fingerprint, resumed
from diffrep.eval.datasets.pairs import AnnotatedPair, KeypointTable, PairSet, table_of
from diffrep.eval.protocols import AGGREGATES, Aggregate, Pck, Protocol
from diffrep.eval.report import Problem, Published, Report, Section, published
from diffrep.features import Descriptors, FeatureMaps
from diffrep.files import claim_folder, number_of, sweep_partials, write_whole
from diffrep.fusion import fuse
from diffrep.images import load_image
from diffrep.matching import Matches, masked_distance, match_points, mutual_distance
from diffrep.recipes import Correspondence, Recipe

Search = Literal["auto", "protocol", "recipe"]


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

    def failures(self, count: int) -> list[PairMatches]:
        """The pairs with the smallest share of right points at the first alpha, then the largest distance."""

        def judged(match: PairMatches) -> tuple[float, float, str]:
            pair, protocol = match.pair, self.protocol
            right = protocol.hits(pair, match.predicted)[0].float().mean()
            missed = protocol.to_image(match.predicted, pair.target) - pair.target.points(pair.ids)
            away = torch.linalg.vector_norm(missed, dim=-1).median() / max(pair.target.size)
            return float(right), -float(away), pair.name

        return sorted(self.matches, key=judged)[:count]

    def draw(self, match: PairMatches) -> Image.Image:
        """Both images of a pair; matches that are wrong are ringed red, with a line to where they belong."""
        pair, protocol = match.pair, self.protocol
        source, target = (load_image(self.root / image.path) for image in (pair.source, pair.target))
        places = protocol.to_image(match.predicted, pair.target)
        shown = torch.minimum(places.clamp(min=0), places.new_tensor(target.size) - 1)
        right, alpha = protocol.hits(pair, match.predicted)[0], protocol.alphas[0]
        return draw_matches(
            source,
            target,
            pair.source.points(pair.ids),
            Matches(shown, torch.zeros(len(shown))),
            truth=pair.target.points(pair.ids),
            tolerance=alpha * protocol.scale(pair) / protocol.zoom(pair.target),
            titles=[f"{pair.category}: {int(right.sum())} of {len(right)} right at {alpha:g}   {pair.name}"],
        )

    def save_failures(self, count: int, folder: Path) -> None:
        """Draw the worst pairs, one PNG each, numbered from the worst."""
        for number, match in enumerate(self.failures(count), start=1):
            write_whole(folder / f"{number:02d}.png", self.draw(match).save)

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
            f"{self.recipe} on {self.dataset}: {number_of(len(self.pck.counted), 'pair')},"
            f" {number_of(self.pck.points, 'point')}\n"
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
            yield Section(
                f"Published, on all of {self.dataset} (ours minus theirs)",
                columns,
                [self._beside(row) for row in papers],
            )

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


def evaluate_pairs(
    pairs: PairSet,
    protocol: Protocol,
    correspondence: Correspondence,
    folder: str | Path,
    *,
    search: Search = "auto",
    pose: bool = False,
    tables: Mapping[str, KeypointTable] | None = None,
    keep: StoredType = "float32",
    batch_size: int = 8,
    pairs_per_file: int = 50,
    progress: bool = True,
) -> CorrespondenceReport:
    """Evaluate a recipe on a benchmark; the same folder again goes on from what is in it.

    Args:
        folder: holds ``features/`` (one file per image) and ``matches/`` (one file per `pairs_per_file`
            pairs).
        search: ``protocol`` matches as the paper's script does, ``recipe`` as the recipe does; ``auto`` takes
            the protocol's way where the recipe's descriptors lie on the cells that it needs.
        pose: also extract the sources' mirror images and match from those where they are nearer (GeoAware's
            adaptive pose alignment, without masks).
        tables: category -> which of its keypoints are alike, instead of the published tables.
        keep: the type in which features are kept.
        batch_size: images that are extracted together; all that is lost when a run is killed.

    Raises:
        ValueError: the folder is from other settings, the protocol's search does not fit the recipe, or pose
            alignment is asked for without it.
    """

    def load(image: str) -> Image.Image:
        picture = load_image(pairs.root / image.removeprefix(MIRRORED))
        return ImageOps.mirror(picture) if image.startswith(MIRRORED) else picture

    recipe, folder = correspondence.recipe, Path(folder)
    features = ImageFeatures(
        pairs.root, load, correspondence, folder / "features", pairs.name, kept_as=keep, batch_size=batch_size
    )
    images = sorted({(p.category, image.path) for p in pairs.pairs for image in (p.source, p.target)})
    if pose:
        images += [(category, MIRRORED + image) for category, image in images]
    unreadable = features.extract(images, progress=progress)
    usable = [p for p in pairs.pairs if not {p.source.path, p.target.path} & unreadable.keys()]
    problems = [Problem(image, what) for image, what in unreadable.items() if not image.startswith(MIRRORED)]
    used = choose_search(usable, protocol, features, search)
    if pose and used != "protocol":
        raise ValueError(f"pose alignment goes with a protocol's search; {recipe.name} matches by itself here")
    categories = sorted({p.category for p in usable})
    partners = {c: table_of(protocol.benchmark, c, tables).mirror for c in categories if pose}
    read = lru_cache(maxsize=16)(features.get)  # an image is in many pairs, usually in neighbouring ones

    def match(pair: AnnotatedPair) -> list[list[float]]:
        source, target = (read(pair.category, image.path) for image in (pair.source, pair.target))
        mirrored = read(pair.category, MIRRORED + pair.source.path) if pose else None
        points = predict(
            pair, source, target, protocol, recipe,
            by_protocol=used == "protocol", mirrored=mirrored, partners=partners.get(pair.category),
        )  # fmt: skip
        return points.tolist()

    def matched() -> Iterator[PairMatches]:
        with tqdm(total=len(usable), desc="match", unit="pair", disable=not progress) as bar:
            for start in range(0, len(usable), pairs_per_file):
                chunk = usable[start : start + pairs_per_file]
                seen = [(asdict(i), features.content(i.path)) for pair in chunk for i in (pair.source, pair.target)]
                document = resumed(
                    work / f"{start // pairs_per_file:05d}.json",
                    fingerprint(seen),
                    lambda chunk=chunk: {"points": [match(pair) for pair in chunk]},  # type: ignore[misc]
                )
                for pair, values in zip(chunk, document["points"], strict=True):
                    yield PairMatches(pair, torch.tensor(values, dtype=torch.float32).reshape(-1, 2))
                bar.update(len(chunk))

    asked = [[p.name, p.source.path, p.target.path, list(p.ids)] for p in usable]
    work = folder / "matches" / f"{protocol.name} by {used}{' posed' if pose else ''}"
    claim_folder(
        work,
        {
            "recipe": asdict(recipe),
            "by_protocol": used == "protocol",
            "frame": protocol.frame,
            "search": None if protocol.search is None else asdict(protocol.search),
            "pairs": f"{len(usable)}, {fingerprint(asked)}",
            "pairs_per_file": pairs_per_file,
            "partners": {category: sorted(mirror.items()) for category, mirror in partners.items()},
        },
    )
    sweep_partials(work)
    matches = tuple(matched())
    parts = None
    if protocol.by_part:
        groups = {c: table_of(protocol.benchmark, c, tables).groups for c in categories}
        shared = (protocol.count_shared(m.pair, m.predicted, groups[m.pair.category]) for m in matches)
        parts = Pck(protocol.alphas, tuple(shared))
    return CorrespondenceReport(
        dataset=pairs.name,
        root=pairs.root,
        split=pairs.split,
        protocol=protocol,
        recipe=recipe.name,
        search=used,
        pck=Pck(protocol.alphas, tuple(protocol.count(m.pair, m.predicted) for m in matches)),
        by_part=parts,
        problems=(*pairs.problems, *problems),
        settings=features.settings,
        matches=matches,
    )


def choose_search(
    pairs: Sequence[AnnotatedPair], protocol: Protocol, features: ImageFeatures, search: Search
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
    recipe = features.correspondence.recipe
    (descriptors,) = fuse([features.get(pairs[0].category, pairs[0].source.path)], recipe.fusion)
    placement, cells = descriptors.placement, protocol.search.cells
    (height, width), (x, y), (x0, y0, x1, y1) = placement.canvas_size, placement.scale, placement.content_box
    centred = abs(x / y - 1) < 0.05 and abs(x0 - (width - x1)) <= 1 and abs(y0 - (height - y1)) <= 1
    if height == width and descriptors.size == (cells, cells) and centred:
        return "protocol"
    if search == "auto":
        return "recipe"
    raise ValueError(
        f"{protocol.name} matches {cells} x {cells} cells of a padded square; {recipe.name} gives"
        f" {descriptors.size[0]} x {descriptors.size[1]} on a canvas of {placement.canvas_size}:"
        " search='recipe'"
    )


def predict(
    pair: AnnotatedPair,
    source: Sequence[FeatureMaps],
    target: Sequence[FeatureMaps],
    protocol: Protocol,
    recipe: Recipe,
    *,
    by_protocol: bool,
    mirrored: Sequence[FeatureMaps] | None = None,
    partners: Mapping[int, int] | None = None,
) -> Tensor:
    """Where a pair's keypoints lie in the target, (N, 2) float32 in the protocol's frame.

    Args:
        mirrored: features of the source's mirror image, to match from those where they are nearer.
        partners: with `mirrored`: keypoint -> the one that takes its place in a mirror image.
    """
    if mirrored is not None:
        a, flipped, b = fuse([source, mirrored, target], recipe.fusion)
        return predict_posed(pair, protocol, a, flipped, b, partners or {}).float()
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


# -- adaptive pose alignment ------------------------------------------------------------------------------------------
# GeoAware-SC ("Telling Left from Right", section 3.2): two images of one object from opposite sides are far apart for
# any descriptor, and mirroring one of them brings them together. A keypoint's place in a mirror image is that of its
# left-right partner, so the answers are asked for at the partners.


def mirrored_is_nearer(
    source: Descriptors,
    mirrored: Descriptors,
    target: Descriptors,
    *,
    masks: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Whether the mirrored source is nearer to the target than the source itself.

    Args:
        masks: of source and target, (H', W') over the whole map; None compares mutually nearest cells.
    """
    if masks is None:
        return bool(mutual_distance(mirrored, target) < mutual_distance(source, target))
    source_mask, target_mask = masks
    plain = masked_distance(source, target, source_mask, target_mask)
    return bool(masked_distance(mirrored, target, source_mask.flip(-1), target_mask) < plain)


def predict_posed(
    pair: AnnotatedPair,
    protocol: Protocol,
    source: Descriptors,
    mirrored: Descriptors,
    target: Descriptors,
    partners: Mapping[int, int],
    *,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Where a pair's keypoints lie in the target, (N, 2) float32 in the protocol's square.

    Where the mirrored source is the nearer one, a keypoint whose partner is visible in both images is
    looked for from there, at its partner's place; the others from the source as it is.

    Args:
        mirrored: descriptors of the source's mirror image.
        partners: keypoint -> the one that takes its place in a mirror image; those left out are their own.

    Raises:
        ValueError: the protocol does not match on a square.
    """
    if protocol.search is None or protocol.frame is None:
        raise ValueError(f"pose alignment needs a protocol that matches on a square, {protocol.name} does not")
    side = protocol.frame
    predicted = protocol.search(source, target, protocol.to_frame(pair.source.points(pair.ids), pair.source), side)
    asked = [partners.get(i, i) for i in pair.ids]
    visible = torch.tensor([i in pair.ids for i in asked], dtype=torch.bool)
    if not bool(visible.any()) or not mirrored_is_nearer(source, mirrored, target, masks=masks):
        return predicted
    queries = protocol.to_frame(pair.source.points([i for i in asked if i in pair.ids]), pair.source)
    queries[:, 0] = side - queries[:, 0]
    predicted[visible] = protocol.search(mirrored, target, queries, side)
    return predicted
