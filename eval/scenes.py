"""The embedded benchmark: corresponding parts of different objects in rendered scenes.

Pairs show two instances of one category from any side; in a third of them the target is mirrored, so that the
layout of the frame helps nobody. The query points are the named keypoints that both images show, and each
image is extracted once. PCK is per point, the threshold a share of the longer side of the target's box; the
interval is a bootstrap over pairs.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.matchers import FUSED, Extractor, Matcher, View
from diffrep.eval.pck import PairCount, Pck, chance_within, difference_interval, within
from diffrep.scenes import CATEGORIES, SEEN, UNSEEN, mirror, render_scene, scene_pairs

CHANCE = "chance"


@dataclass(frozen=True, kw_only=True)
class ScenesSettings:
    """Which pairs are drawn and how they are counted."""

    per_category: int = 50  # pairs of each category
    categories: tuple[str, ...] = CATEGORIES
    split: Literal["train", "val", "test"] = "test"  # of disjoint seeds
    size: int = 128  # side of the rendered images, pixels
    seed: int = 0  # of the choice of pairs
    alphas: tuple[float, ...] = (0.05, 0.1)  # shares of the longer side of the target's box
    batch_size: int = 8  # pairs whose images are extracted together
    workers: int = 2  # processes that render ahead; 0: none beside this one

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.categories) - set(CATEGORIES)):
            raise ValueError(f"no category {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")
        if self.per_category < 1 or self.batch_size < 1:
            raise ValueError(
                f"per_category and batch_size must be at least 1, got {self.per_category} and {self.batch_size}"
            )


@dataclass(frozen=True)
class ScenePair:
    """Two scenes and the keypoints that both show."""

    name: str
    category: str
    mirrored: bool  # whether the target is a mirror image
    views: tuple[View, View]
    points: tuple[Tensor, Tensor]  # (N, 2) each, (x, y) in pixels


@dataclass(frozen=True)
class ScenesReport:
    """Counts of every matcher over the same pairs."""

    settings: ScenesSettings
    rows: Mapping[str, Pck]  # matcher -> counts
    mirrored: frozenset[str]  # names of the pairs with a mirrored target
    extractors: Mapping[str, Mapping[str, object]]  # extractor -> settings that made its features

    def groups(self) -> dict[str, frozenset[str]]:
        """Group -> names of its pairs; only groups that have any."""
        counts = next(iter(self.rows.values())).pairs
        seen = frozenset(c.pair for c in counts if c.category in SEEN)
        unseen = frozenset(c.pair for c in counts if c.category in UNSEEN)
        groups = {
            "seen": seen,
            "seen, as drawn": seen - self.mirrored,
            "seen, mirrored": seen & self.mirrored,
            "unseen": unseen,
            "unseen, mirrored": unseen & self.mirrored,
        }
        return {name: pairs for name, pairs in groups.items() if pairs}

    def pck(self, matcher: str, group: str) -> Pck:
        """Counts of one matcher over one group."""
        pairs = self.groups()[group]
        return self.rows[matcher].where(lambda count: count.pair in pairs)

    def difference(self, matcher: str, other: str, group: str = "seen") -> list[dict[str, float]]:
        """How much higher `matcher` is than `other` on the same pairs, per alpha, with a 95 % interval."""
        ours, theirs = self.pck(matcher, group), self.pck(other, group)
        return [
            {"alpha": alpha, "value": a - b, "low": low, "high": high}
            for alpha, a, b, (low, high) in zip(
                ours.alphas, ours.value(), theirs.value(), difference_interval(ours, theirs), strict=True
            )
        ]

    def table(self) -> str:
        """The report as text: groups with intervals, then categories."""
        groups = self.groups()
        width = max(map(len, self.rows))
        lines = []
        for i, alpha in enumerate(self.settings.alphas):
            lines.append(f"PCK@{alpha:g} per point, % (95 % interval over pairs)")
            lines.append(f"{'':<{width}}" + "".join(f"  {name:>20}" for name in groups))
            counts = [self.pck(next(iter(self.rows)), name) for name in groups]
            sizes = (f"{len(c.pairs)} pairs, {c.points} points" for c in counts)
            lines.append(f"{'':<{width}}" + "".join(f"  {size:>20}" for size in sizes))
            for matcher in self.rows:
                cells = (_cell(self.pck(matcher, name), i) for name in groups)
                lines.append(f"{matcher:<{width}}" + "".join(f"  {cell:>20}" for cell in cells))
            lines.append("")
        last = len(self.settings.alphas) - 1
        names = [c for c in self.settings.categories if c in next(iter(self.rows.values())).categories]
        lines.append(f"PCK@{self.settings.alphas[last]:g} per point by category, % (* never in training)")
        heads = [f"{name}*" if name in UNSEEN else name for name in names]
        lines.append(f"{'':<{width}}" + "".join(f"  {head:>{max(5, len(head))}}" for head in heads))
        for matcher, counts_of in self.rows.items():
            values = (100 * counts_of.of(name).value()[last] for name in names)
            cells = (f"  {v:>{max(5, len(head))}.1f}" for v, head in zip(values, heads, strict=True))
            lines.append(f"{matcher:<{width}}" + "".join(cells))
        return "\n".join([*lines, *self._gains()])

    def _gains(self) -> list[str]:
        """How much each fused matcher ("a + b") gains over its parts."""
        lines = []
        for fused in self.rows:
            parts = [part for part in fused.split(FUSED) if part != fused and part in self.rows]
            for part, group in itertools.product(parts, self.groups()):
                gain = self.difference(fused, part, group)[-1]
                low, value, high = (100 * gain[key] for key in ("low", "value", "high"))
                alpha = f"PCK@{gain['alpha']:g}"
                lines.append(
                    f"  {group:<16}  {fused} over {part}: {value:+.1f} ({low:+.1f}..{high:+.1f}) points of {alpha}"
                )
        return ["", "Gain of fusion on the same pairs (95 % interval)", *lines] if lines else []

    def to_json(self) -> str:
        """Everything in the tables as numbers, with the settings that made them."""
        rows: dict[str, object] = {}
        for matcher, counts in self.rows.items():
            groups = {name: _numbers(self.pck(matcher, name)) for name in self.groups()}
            categories = {name: _numbers(counts.of(name)) for name in counts.categories}
            rows[matcher] = {"groups": groups, "categories": categories}
        document = {
            "benchmark": "scenes",
            "protocol": "PCK per point, <= alpha * longer side of the target's box, points visible in both",
            "settings": asdict(self.settings),
            "unseen": [c for c in self.settings.categories if c in UNSEEN],
            "extractors": {name: dict(values) for name, values in self.extractors.items()},
            "rows": rows,
        }
        return json.dumps(document, indent=2, default=str)


def _cell(pck: Pck, alpha: int) -> str:
    low, high = pck.interval()[alpha]
    return f"{100 * pck.value()[alpha]:.1f} ({100 * low:.1f}..{100 * high:.1f})"


def _numbers(pck: Pck) -> dict[str, object]:
    per_alpha = zip(pck.alphas, pck.value(), pck.value("per image"), pck.interval(), strict=True)
    values = [
        {
            "alpha": alpha,
            "per_point": _known(point),
            "per_image": _known(image),
            "low": _known(low),
            "high": _known(high),
        }
        for alpha, point, image, (low, high) in per_alpha
    ]
    return {"pairs": len(pck.pairs), "points": pck.points, "pck": values}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def evaluate_scenes(
    matchers: Mapping[str, Matcher],
    extractors: Mapping[str, Extractor],
    settings: ScenesSettings | None = None,
    *,
    progress: bool = True,
) -> ScenesReport:
    """Count PCK of named matchers on rendered pairs. A row "chance", an exact expectation, comes first.

    Args:
        matchers: name -> function; it finds the extractors' features in the views it is given.
        extractors: name -> function; each is given every image exactly once.

    Raises:
        ValueError: a matcher returns points of another shape, or is named "chance".
    """
    settings = settings or ScenesSettings()
    if CHANCE in matchers:
        raise ValueError(f"the name {CHANCE!r} is taken by the row that is always there")
    counts: dict[str, list[PairCount]] = {name: [] for name in (CHANCE, *matchers)}
    made: dict[str, Mapping[str, object]] = {}
    mirrored = set()
    pairs = scene_pairs(settings.split, settings.per_category, categories=settings.categories, seed=settings.seed)
    with tqdm(total=len(pairs), desc="scenes", unit="pair", disable=not progress) as bar:
        for batch in _batches(_rendered(pairs, settings), settings.batch_size):
            images = [view.image for pair in batch for view in pair.views]
            read = {name: list(extract(images)) for name, extract in extractors.items()}
            made |= {name: maps[0].settings for name, maps in read.items()}
            for i, pair in enumerate(batch):
                source, target = (
                    View(view.image, view.box, {name: maps[2 * i + side] for name, maps in read.items()})
                    for side, view in enumerate(pair.views)
                )
                points, truth = pair.points
                scale = max(target.box[2] - target.box[0], target.box[3] - target.box[1])
                if pair.mirrored:
                    mirrored.add(pair.name)
                expected = chance_within(truth, scale, settings.alphas, target.size).sum(-1)
                counts[CHANCE].append(PairCount(pair.name, pair.category, len(points), tuple(expected.tolist())))
                for name, match in matchers.items():
                    hits = within(match(source, target, points), truth, scale, settings.alphas)
                    counts[name].append(PairCount.of(pair.name, pair.category, hits))
            bar.update(len(batch))
    rows = {name: Pck(settings.alphas, tuple(values)) for name, values in counts.items()}
    return ScenesReport(settings, rows, frozenset(mirrored), made)


def _rendered(pairs: Sequence[tuple[int, int, str, bool]], settings: ScenesSettings) -> Iterator[ScenePair]:
    jobs = [(*pair, settings.size) for pair in pairs]
    if settings.workers == 0:
        yield from map(render_pair, jobs)
        return
    # spawn: a forked child would inherit the threads' locks of the libraries that are loaded here
    with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(render_pair, jobs, chunksize=4)


def render_pair(job: tuple[int, int, str, bool, int]) -> ScenePair:
    """Render (seed of the source, seed of the target, category, whether the target is mirrored, size)."""
    seed_a, seed_b, category, mirrored, size = job
    a = render_scene(seed_a, category=category, size=size)
    b = render_scene(seed_b, category=category, size=size)
    if mirrored:
        b = mirror(b)
    shown = {name: point for name, point, seen in zip(b.keypoint_names, b.keypoints, b.visible, strict=True) if seen}
    both = [
        (point, shown[name])
        for name, point, seen in zip(a.keypoint_names, a.keypoints, a.visible, strict=True)
        if seen and name in shown
    ]
    points = torch.from_numpy(np.array(both, dtype=np.float32).reshape(-1, 2, 2))
    x0, y0, x1, y1 = (float(v) for v in a.box)
    u0, v0, u1, v1 = (float(v) for v in b.box)
    name = f"{seed_a}-{seed_b}{' mirrored' if mirrored else ''}"
    views = (View(a.image, (x0, y0, x1, y1)), View(b.image, (u0, v0, u1, v1)))
    return ScenePair(name, category, mirrored, views, (points[:, 0], points[:, 1]))


def _batches(pairs: Iterator[ScenePair], size: int) -> Iterator[list[ScenePair]]:
    while batch := list(islice(pairs, size)):
        yield batch
