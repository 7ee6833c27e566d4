"""The embedded benchmark: corresponding parts of different objects in rendered scenes.

Pairs show two instances of one category from any side; in a third of them the target is mirrored, so that the
layout of the frame helps nobody. The query points are the named keypoints that both images show, and each
image is extracted once. PCK is per point, the threshold a share of the longer side of the target's box; the
interval is a bootstrap over pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffrep.eval.maps import PooledAngles, angular_error, mean_metrics
from diffrep.eval.matchers import FUSED, Extractor, Matcher, View, describe
from diffrep.eval.protocols import PairCount, Pck, chance_within, difference_interval, within
from diffrep.eval.rendering import RenderedScenes
from diffrep.eval.report import Report, Section, with_interval
from diffrep.eval.scene_maps import scene_depth_metrics
from diffrep.eval.segmentation import grey
from diffrep.eval.segmentation_metrics import score_image, together
from diffrep.files import number_of, write_whole
from diffrep.heads.families import Task
from diffrep.heads.segmentation import DiffDis, finish
from diffrep.heads.training.dense import OneStepModel, predict_maps
from diffrep.heads.training.dense_data import SceneSamples
from diffrep.heads.training.masks import held_scenes, scene_maps
from diffrep.pictures import image_grid
from diffrep.scenes import SEEN, UNSEEN, SceneSet, mirror, render_scene, scene_pairs, shared_keypoints
from diffrep.settings import POSITIVE, check_ranges

CHANCE = "chance"


@dataclass(frozen=True, kw_only=True)
class ScenesSettings(RenderedScenes):
    """Which pairs are drawn and how they are counted."""

    per_category: int = 50  # pairs of each category
    seed: int = 0  # of the choice of pairs
    alphas: tuple[float, ...] = (0.05, 0.1)  # shares of the longer side of the target's box

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, per_category="1..", seed="[0, 2^31)", alphas=POSITIVE)


@dataclass(frozen=True)
class ScenePair:
    """Two scenes and the keypoints that both show."""

    name: str
    category: str
    mirrored: bool  # whether the target is a mirror image
    views: tuple[View, View]
    points: tuple[Tensor, Tensor]  # (N, 2) each, (x, y) in pixels


@dataclass(frozen=True)
class ScenesReport(Report):
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

    def document(self) -> Mapping[str, object]:
        rows = {
            matcher: {
                "groups": {name: _numbers(self.pck(matcher, name)) for name in self.groups()},
                "categories": {name: _numbers(counts.of(name)) for name in counts.categories},
            }
            for matcher, counts in self.rows.items()
        }
        return {
            "benchmark": "scenes",
            "protocol": "PCK per point, <= alpha * longer side of the target's box, points visible in both",
            "settings": self.settings,
            "unseen": [c for c in self.settings.categories if c in UNSEEN],
            "extractors": self.extractors,
            "rows": rows,
        }

    def sections(self) -> Iterator[Section]:
        first = next(iter(self.rows))
        sizes = {name: self.pck(first, name) for name in self.groups()}
        columns = [
            f"{name} ({number_of(len(c.pairs), 'pair')}, {number_of(c.points, 'point')})" for name, c in sizes.items()
        ]
        for i, alpha in enumerate(self.settings.alphas):
            rows = [(matcher, *(_cell(self.pck(matcher, name), i) for name in sizes)) for matcher in self.rows]
            yield Section(f"PCK@{alpha:g} per point, % (95 % interval over pairs)", columns, rows)
        names = [c for c in self.settings.categories if c in self.rows[first].categories]
        yield Section(
            f"PCK@{self.settings.alphas[-1]:g} per point by category, % (* never in training)",
            [f"{name}*" if name in UNSEEN else name for name in names],
            [
                (matcher, *(f"{100 * counts.of(name).value()[-1]:.1f}" for name in names))
                for matcher, counts in self.rows.items()
            ],
        )
        if gains := list(self._gains()):
            yield Section("Gain of fusion on the same pairs (95 % interval)", rows=gains)

    def _gains(self) -> Iterator[tuple[str, str]]:
        """How much each fused matcher ("a + b") gains over its parts."""
        for fused in self.rows:
            parts = [part for part in fused.split(FUSED) if part != fused and part in self.rows]
            for part, group in itertools.product(parts, self.groups()):
                gain = self.difference(fused, part, group)[-1]
                low, value, high = (100 * gain[key] for key in ("low", "value", "high"))
                points = f"{value:+.1f} ({low:+.1f}..{high:+.1f}) points of PCK@{gain['alpha']:g}"
                yield group, f"{fused} over {part}: {points}"


def _cell(pck: Pck, alpha: int) -> str:
    return with_interval(100 * pck.value()[alpha], *(100 * end for end in pck.interval()[alpha]), digits=1)


def _numbers(pck: Pck) -> dict[str, object]:
    per_alpha = zip(pck.alphas, pck.value(), pck.value("per image"), pck.interval(), strict=True)
    values = [
        {"alpha": alpha, "per_point": point, "per_image": image, "low": low, "high": high}
        for alpha, point, image, (low, high) in per_alpha
    ]
    return {"pairs": len(pck.pairs), "points": pck.points, "pck": values}


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
    described: dict[str, Mapping[str, object]] = {}
    mirrored = set()
    pairs = scene_pairs(settings.split, settings.per_category, categories=settings.categories, seed=settings.seed)
    with tqdm(total=len(pairs), desc="scenes", unit="pair", disable=not progress) as bar:
        for batch in settings.batches(render_pair, [(*pair, settings.size) for pair in pairs]):
            views = describe([view for pair in batch for view in pair.views], extractors, described)
            for pair, source, target in zip(batch, views[::2], views[1::2], strict=True):
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
    return ScenesReport(settings, rows, frozenset(mirrored), described)


def render_pair(job: tuple[int, int, str, bool, int]) -> ScenePair:
    """Render (seed of the source, seed of the target, category, whether the target is mirrored, size)."""
    seed_a, seed_b, category, mirrored, size = job
    a = render_scene(seed_a, category=category, size=size)
    b = render_scene(seed_b, category=category, size=size)
    if mirrored:
        b = mirror(b)
    points = tuple(map(torch.from_numpy, shared_keypoints(a, b)))
    name = f"{seed_a}-{seed_b}{' mirrored' if mirrored else ''}"
    views = (View.of(a.image, a.box), View.of(b.image, b.box))
    return ScenePair(name, category, mirrored, views, (points[0], points[1]))


# -- Measuring heads on held-out scenes while they are trained, with pictures --------------------------------


class SceneValidation:
    """Metrics and a picture of a model in training; see `fit`.

    Args:
        scenes: of the validation split.
        vae: of the base model.
        folder: where the pictures go, one per step.
        shown: images in a picture.
        steps: of DDIM, for recipes trained on all timesteps.
    """

    def __init__(
        self, scenes: SceneSet, vae: Any, task: Task, folder: Path | None = None, *, shown: int = 8, steps: int = 1
    ) -> None:
        self.vae, self.task, self.folder, self.shown, self.steps = vae, task, folder, shown, steps
        samples = [SceneSamples(scenes, task).sample(i) for i in range(len(scenes))]
        self.pixels = torch.stack([one.pixels for one in samples])
        self.annotations = torch.stack([one.annotation for one in samples])
        self.depth = torch.stack([torch.from_numpy(scenes.depth[i].copy()).float() for i in range(len(scenes))])

    def __call__(self, model: OneStepModel, step: int) -> Mapping[str, float]:
        device = model.alphas_cumprod.device
        vae = self.vae.to(device)
        maps = predict_maps(model, vae, self.pixels.to(device), self.task, steps=self.steps).cpu()
        if self.folder is not None:
            write_whole(self.folder / f"{step:06d}.png", self.picture(maps).save)
        return self.measure(maps)

    def measure(self, maps: Tensor) -> dict[str, float]:
        """Metrics of predicted maps: of all pixels nearer than 80 m, affine-aligned per image; or of all surfaces."""
        if self.task == "normals":
            errors = angular_error(maps, self.annotations)[torch.isfinite(self.depth)[:, None]]
            return PooledAngles.over([errors])
        pairs = zip(maps[:, 0], self.depth, strict=True)
        return mean_metrics([scene_depth_metrics(prediction, depth, self.task) for prediction, depth in pairs])

    def picture(self, predicted: Tensor) -> Any:
        """Images, true maps and predicted maps as one picture."""
        images = self.pixels[: self.shown] / 2 + 0.5
        truth = self.annotations[: self.shown] / 2 + 0.5
        maps = predicted[: self.shown] / 2 + 0.5 if self.task == "normals" else predicted[: self.shown]
        return image_grid([images, truth.expand(-1, 3, -1, -1), maps.clamp(0, 1).expand(-1, 3, -1, -1)])


class MaskValidation:
    """Given to `fit` as `validate`: "maxF" and "MAE" of held-out scenes, and rows of image, truth, mask and edge.

    Args:
        head: a head that shares the weights of the model in training.
        pictures: folder of the pictures, ``STEP.png``.
    """

    def __init__(
        self, scenes: SceneSet, head: Callable[[Any], DiffDis], pictures: Path, *, shown: int = 8, batch_size: int = 8
    ) -> None:
        self.scenes, self.head, self.pictures, self.shown, self.batch_size = scenes, head, pictures, shown, batch_size

    @torch.inference_mode()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        head, scores = self.head(model), []
        rows: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.scenes), self.batch_size):
            chosen = torch.arange(start, min(start + self.batch_size, len(self.scenes))).numpy()
            images, masks, edges = scene_maps(*held_scenes(self.scenes, chosen, head.device))
            noise = head.draw((images.shape[-2], images.shape[-1]), 0)
            wanted = start < self.shown
            mask, edge = head.forward(images, noise, edges=wanted)
            soft = finish(mask, stretch=False)
            for predicted, truth in zip(soft, masks, strict=True):
                scores.append(score_image(grey(predicted[0]), grey(truth[0])))
            if wanted:
                drawn = {"image": images, "truth": masks, "mask": soft, "true edge": edges}
                drawn["edge"] = torch.zeros_like(soft) if edge is None else finish(edge, stretch=False)
                for name, maps in drawn.items():
                    rows.setdefault(name, []).append(maps.expand(-1, 3, -1, -1).float().cpu())
        picture = image_grid([torch.cat(maps)[: self.shown] for maps in rows.values()])
        write_whole(self.pictures / f"{step:06d}.png", picture.save)
        computed = together(scores)
        return {"maxF": computed["maxf"], "MAE": computed["mae"], "S": computed["sm"]}
