"""``diffrep eval completion``: depth of held-out scenes from a head and some known depths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.rendering import SceneMapSettings, render_job
from diffrep.eval.report import ScoreTables, Section, bootstrap, with_interval
from diffrep.eval.scene_maps import SCENE_BOUNDS
from diffrep.files import number_of
from diffrep.heads.completion import CompletionConfig, complete_depth, follows
from diffrep.heads.dense import DenseHead
from diffrep.heads.maps import DepthMap, nearest_known
from diffrep.scenes import Scene
from diffrep.settings import check_ranges


@dataclass(frozen=True, kw_only=True)
class CompletionEvaluation(SceneMapSettings):
    """Which scenes are counted, and how many depths of each are known."""

    count: int = 32  # scenes
    points: tuple[int, ...] = (25, 100, 500)  # known depths of a scene
    seed: int = 0  # of their places

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, points="2..", seed="[0, 2^31)")


@dataclass(frozen=True)
class CompletionReport(ScoreTables):
    """Root mean square errors in metres of every scene, in one table: method -> number of known depths -> scenes."""

    def gains(self) -> dict[int, tuple[float, float, float]]:
        """By number of known depths what guidance takes off the least-squares fit's error, a share, with 95 %."""
        (errors,) = self.scores.values()

        def gain(fit: NDArray[np.float64], guided: NDArray[np.float64]) -> tuple[float, float, float]:
            low, high = bootstrap(lambda rows: 1 - guided[rows].mean(1) / fit[rows].mean(1), len(fit))
            return float(1 - guided.mean() / fit.mean()), low, high

        both = (errors["least squares"], errors["guided"])
        return {points: gain(*(np.array(method[points]) for method in both)) for points in both[0]}

    def sections(self) -> Iterator[Section]:
        yield from super().sections()
        gains = self.gains()
        cells = (with_interval(*gain, percent=True, digits=0) for gain in gains.values())
        yield Section("error taken off", [*map(str, gains)], [("guided against least squares", *cells)])

    def document(self) -> Mapping[str, object]:
        return {**super().document(), "gain": self.gains()}


def evaluate_completion(
    head: DenseHead,
    settings: CompletionEvaluation | None = None,
    how: CompletionConfig | None = None,
    *,
    progress: bool = True,
) -> CompletionReport:
    """Complete the depth of scenes from depths that are known exactly, at places drawn where there is a surface."""
    settings, how = settings or CompletionEvaluation(), how or CompletionConfig()
    errors: dict[str, dict[int, list[float]]] = {}
    scenes = (scene for batch in settings.batches(render_job, settings.jobs()) for scene in batch)
    for scene in tqdm(scenes, "completion", settings.count, disable=not progress):
        relative = head.predict(scene.image)
        assert isinstance(relative, DepthMap)
        for count in settings.points:
            known = known_depths(scene, count, seed=settings.seed)
            ways: dict[str, Callable[[Tensor], Tensor]] = {
                "nearest known": nearest_known,
                "least squares": partial(fitted, relative, method="least squares"),
                "robust": partial(fitted, relative, method="robust"),
                "robust, errors carried": partial(guided, head, scene, replace(how, rounds=0)),
                "guided": partial(guided, head, scene, how),
            }
            if follows(head):  # there is no fit whose errors are carried
                del ways["robust, errors carried"]
            for name, complete in ways.items():
                errors.setdefault(name, {}).setdefault(count, []).append(scene_rmse(complete(known), scene))
    of = number_of(settings.count, "held-out scene")
    title = f"{head.name} on {of}: RMSE in metres, by known depths; 95 % interval"
    return CompletionReport(settings, {title: errors})


def fitted(relative: DepthMap, known: Tensor, method: Literal["least squares", "robust"]) -> Tensor:
    """(H, W) metres by scale and shift; where known depths contradict the map, their median everywhere."""
    try:
        return relative.align(known, method=method).values
    except ValueError:
        return torch.full_like(known, float(known[known > 0].median()))


def guided(head: DenseHead, scene: Scene, how: CompletionConfig, known: Tensor) -> Tensor:
    """(H, W) metres of a scene by `complete_depth`."""
    return complete_depth(head, Image.fromarray(scene.image), known, how=how).values


def known_depths(scene: Scene, count: int, *, seed: int = 0) -> Tensor:
    """(H, W) metres at `count` random pixels that count, 0 elsewhere."""
    depth = torch.from_numpy(scene.depth).float()
    places = ((depth > SCENE_BOUNDS[0]) & (depth < SCENE_BOUNDS[1])).flatten().nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed + scene.seed)
    chosen = places[torch.randperm(len(places), generator=generator)[:count]]
    return torch.zeros(depth.numel()).index_copy(0, chosen, depth.flatten()[chosen]).view_as(depth)


def scene_rmse(depth: Tensor, scene: Scene) -> float:
    """Metres, where a scene is nearer than 80 m, to which the depth is clipped."""
    truth = torch.from_numpy(scene.depth).float()
    counts = (truth > SCENE_BOUNDS[0]) & (truth < SCENE_BOUNDS[1])
    return float((depth.clamp(*SCENE_BOUNDS) - truth)[counts].square().mean().sqrt())
