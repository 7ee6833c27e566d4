"""The embedded benchmark of depth and normals: held-out rendered scenes, whose truth is exact.

Depth is affine-aligned per image, in the space of the prediction, and counted where it is nearer than 80 m; normals are
counted wherever there is a surface. What happens at outlines is counted on its own (`diffrep.eval.borders`). Intervals
are a bootstrap over images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from diffrep.alignment import align_depth
from diffrep.eval.borders import halo_metrics, thin_places
from diffrep.eval.cache import ImageResults
from diffrep.eval.maps import PooledAngles, angular_error, depth_metrics
from diffrep.eval.rendering import SceneJob, SceneMapSettings, name_of, scene_groups
from diffrep.eval.report import Report, Section, mean_interval, with_interval
from diffrep.files import claim_folder, number_of
from diffrep.heads.families import FRAME_SIGNS, Task
from diffrep.heads.training.dense_data import scene_depth
from diffrep.scenes import Scene

SCENE_BOUNDS = (1e-3, 80.0)  # metres: what counts of a scene's depth, and what predictions are clipped to

Method = Callable[[Sequence[Scene]], Tensor]
"""Scenes of one size -> their maps: relative depth or disparity (B, 1, H, W), normals in LUB (B, 3, H, W), or masks in
[0, 1] (B, H, W). A predictor looks at `Scene.image` alone."""


Interval: TypeAlias = tuple[float, float, float]
"""A value and both ends of its interval."""


def predict_scenes(
    methods: Mapping[str, Method],
    jobs: Sequence[SceneJob],
    settings: SceneMapSettings,
    count: Callable[[str, str, Tensor, Scene], None],
    *,
    title: str,
    progress: bool,
) -> None:
    """Render every scene once and call `count(method, name of the scene, its map, scene)` for all methods.

    Raises:
        ValueError: a method gives maps that are not finite.
    """
    with tqdm(total=len(jobs), desc=title, disable=not progress or not jobs) as bar:
        for batch in settings.scenes(jobs):
            for method, predict in methods.items():
                maps = predict(batch).float().cpu()
                if not bool(torch.isfinite(maps).all()):
                    raise ValueError(f"{method}: gives maps that are not finite")
                for values, scene in zip(maps, batch, strict=True):
                    count(method, f"{scene.category} {scene.seed}", values, scene)
            bar.update(len(batch))


@dataclass(frozen=True)
class MethodsReport(Report):
    """What every method got on groups of images.

    Attributes:
        rows: method -> image -> what it got, the same images for all.
        groups: group -> its images.
    """

    rows: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Sequence[str]]

    @abstractmethod
    def values(self, method: str, group: str) -> dict[str, Interval]:
        """Metric -> its value over the images of a group, and the 95 % interval."""

    def numbers(self) -> dict[str, dict[str, dict[str, object]]]:
        """Method -> group -> how many images it has, and the value of each metric with its interval."""
        return {
            method: {
                group: {
                    "images": len(names),
                    **{
                        metric: dict(zip(("value", "low", "high"), interval, strict=True))
                        for metric, interval in self.values(method, group).items()
                    },
                }
                for group, names in self.groups.items()
            }
            for method in self.rows
        }


@dataclass(frozen=True)
class SceneMapReport(MethodsReport):
    """What every method got on every scene.

    Attributes:
        rows: method -> scene -> numbers; of depth `depth_metrics` and `halo_metrics`; of normals the mean angle, also
            of thin parts alone, the share of pixels under 11.25 degrees, and their number.
        pooled: method -> group -> metrics over all pixels together (normals only).
    """

    task: Task
    settings: SceneMapSettings
    pooled: Mapping[str, Mapping[str, Mapping[str, float]]]
    weights: Mapping[str, object]

    def mean(self, method: str, metric: str, group: str = "all") -> Interval:
        """Mean over images of one metric of a method, with a 95 % interval."""
        return mean_interval(self.rows[method][name][metric] for name in self.groups[group])

    def values(self, method: str, group: str) -> dict[str, Interval]:
        metrics = next(iter(self.rows[method].values()))
        return {metric: self.mean(method, metric, group) for metric in metrics}

    def document(self) -> Mapping[str, object]:
        return {
            "benchmark": "scenes",
            "task": self.task,
            "settings": self.settings,
            "weights": self.weights,
            "mean of images": self.numbers(),
            "all pixels together": self.pooled,
        }

    def sections(self) -> Iterator[Section]:
        what = "angle to the true normal" if self.task == "normals" else f"{self.task}, affine-aligned"
        yield Section(f"{self.settings.title}: {what}; 95 % interval over images")
        metrics: tuple[str, ...] = ("abs_rel", "delta1", "rmse", "silog")
        if self.task == "normals":
            metrics = ("mean", "under 11.25", "thin")
        elif self.settings.background == "rendered":
            metrics += ("halo", "wide halos", "thin seen")
        for group, names in self.groups.items():
            rows = []
            for method in self.rows:
                means = {metric: self.mean(method, metric, group) for metric in metrics}
                cells = [with_interval(*mean, percent=m in ("abs_rel", "delta1")) for m, mean in means.items()]
                if method in self.pooled:
                    pixels = self.pooled[method][group]
                    cells.append(
                        f"over all pixels: mean {pixels['mean']:.2f}, median {pixels['median']:.2f},"
                        f" under 11.25 {pixels['under 11.25']:.1f}%, under 30 {pixels['under 30']:.1f}%"
                    )
                rows.append((method, *cells))
            yield Section(f"{group}: {number_of(len(names), 'image')}", metrics, rows)


def evaluate_scene_maps(
    methods: Mapping[str, Method],
    task: Task,
    settings: SceneMapSettings | None = None,
    *,
    folder: str | Path | None = None,
    weights: Mapping[str, object] | None = None,
    progress: bool = True,
) -> SceneMapReport:
    """Measure methods on held-out scenes, all on the same ones, each rendered once.

    Args:
        folder: keeps the numbers of every scene; the same folder again goes on from what is in it.
        weights: method -> what its numbers depend on, for the report and to recognise the folder.

    Raises:
        ValueError: the folder is of other methods or settings, or a method gives maps that are not finite.
    """
    settings, weights = settings or SceneMapSettings(), dict(weights or {})
    root = Path(folder) if folder is not None else None
    if root is not None:
        claim_folder(root, {"task": task, "methods": weights, "outlines": True, **asdict(settings)})
    results = {
        method: ImageResults(root, f"{number:02d}-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in method))
        for number, method in enumerate(methods)
    }

    def count(method: str, name: str, values: Tensor, scene: Scene) -> None:
        if task != "normals":
            known = settings.background == "rendered"  # what lies behind the outline
            row = scene_depth_metrics(values[0], torch.from_numpy(scene.depth), task, scene.mask if known else None)
            results[method].add(name, row)
            return
        truth, surface = scene_truth(scene, "normals"), torch.from_numpy(np.isfinite(scene.depth))
        angles = angular_error(values[None].cpu(), truth[None])[0, 0]
        errors = angles[surface]
        e = errors.double()
        row = {"mean": e.mean().item(), "under 11.25": 100 * (e < 11.25).double().mean().item(), "pixels": len(e)}
        thin = angles[torch.from_numpy(thin_places(scene.mask))].double()
        results[method].add(name, row | {"thin": thin.mean().item()}, errors=errors)

    jobs = settings.jobs()
    missing = [job for job in jobs if any(name_of(job) not in one.rows for one in results.values())]
    predict_scenes(methods, missing, settings, count, title=f"scenes, {task}", progress=progress)
    names = [name_of(job) for job in jobs]
    groups = scene_groups(names)
    pooled = {
        method: {group: PooledAngles.over(map(one.errors, some)) for group, some in groups.items()}
        for method, one in results.items()
        if task == "normals"
    }
    rows = {method: {name: one.rows[name] for name in names} for method, one in results.items()}
    return SceneMapReport(rows, groups, task, settings, pooled, weights)


def scene_depth_metrics(
    prediction: Tensor, depth: Tensor, task: Task, mask: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """`depth_metrics` of an (H, W) map, aligned with the depth (H, W) of a scene in its own space.

    Args:
        mask: (H, W) of the scene's object, for `halo_metrics` too.
    """
    valid = (depth > SCENE_BOUNDS[0]) & (depth < SCENE_BOUNDS[1])
    space: Literal["depth", "disparity"] = "disparity" if task == "disparity" else "depth"
    aligned, _, _ = align_depth(prediction.cpu(), depth, valid, space=space, bounds=SCENE_BOUNDS)
    metrics = depth_metrics(aligned, depth, valid)
    if mask is None:
        return metrics
    near, far = SCENE_BOUNDS
    return metrics | halo_metrics(aligned.clamp(near, far).numpy(), depth.clamp(near, far).numpy(), mask)


def scene_pixels(scenes: Sequence[Scene]) -> Tensor:
    """(B, 3, H, W) in [-1, 1] of scenes of one size."""
    images = torch.stack([torch.from_numpy(scene.image.copy()).permute(2, 0, 1) for scene in scenes])
    return images.float() / 127.5 - 1


def scene_truth(scene: Scene, task: Task) -> Tensor:
    """The picture that a head is trained to draw: (1 or 3, H, W) in [-1, 1]."""
    if task == "normals":
        signs = torch.tensor(FRAME_SIGNS["rdf"]).view(3, 1, 1)
        return torch.from_numpy(scene.normals).permute(2, 0, 1) * signs
    return scene_depth(torch.from_numpy(scene.depth)[None], task)


def through_vae(vae: Any, truth: Callable[[Scene], Tensor]) -> Callable[[Sequence[Scene]], Tensor]:
    """Pictures of the truth, (3, H, W) in [-1, 1], encoded and decoded again: (B, 3, H, W)."""

    @torch.no_grad()
    def method(scenes: Sequence[Scene]) -> Tensor:
        pictures = torch.stack([truth(scene) for scene in scenes])
        encoded = vae.encode(pictures.to(next(vae.parameters()).device)).latent_dist.mean
        return vae.decode(encoded).sample.float().cpu()

    return method


def maps_through_vae(vae: Any, task: Task) -> Method:
    """The truth, encoded and decoded again: what no head on this VAE can beat by much."""
    decode = through_vae(vae, lambda scene: scene_truth(scene, task).expand(3, -1, -1))

    def method(scenes: Sequence[Scene]) -> Tensor:
        if task == "normals":
            return F.normalize(decode(scenes), dim=1)
        return decode(scenes).clamp(-1, 1).mean(1, keepdim=True) / 2 + 0.5

    return method


def no_look(task: Task) -> Method:
    """A guess without the image: what gets nearer, and turns from wall to floor, towards the lower edge."""

    def method(scenes: Sequence[Scene]) -> Tensor:
        height, width = scenes[0].depth.shape
        down = torch.linspace(0, 1, height).view(1, 1, height, 1).expand(len(scenes), 1, height, width)
        if task == "normals":
            return F.normalize(torch.cat([0 * down, down, 1 - down], 1), dim=1)
        return down if task == "disparity" else 1 - down

    return method
