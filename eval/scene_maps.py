"""The embedded benchmark of depth and normals: held-out rendered scenes, whose truth is exact.

Depth is affine-aligned per image, in the space of the prediction, and counted where it is nearer than 80 m; normals are
counted wherever there is a surface. Intervals are a bootstrap over images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.alignment import align_depth
from diffrep.eval.cache import ImageResults
from diffrep.eval.maps import PooledAngles, angular_error, depth_metrics, mean_metrics
from diffrep.eval.rendering import check_scenes, rendered
from diffrep.eval.report import Report, Section, bootstrap, with_interval
from diffrep.files import claim_folder, write_whole
from diffrep.heads.families import FRAME_SIGNS, Task
from diffrep.heads.training.dense import OneStepModel, predict_maps
from diffrep.heads.training.dense_data import SceneSamples, scene_depth
from diffrep.scenes import CATEGORIES, SEEN, UNSEEN, Scene, SceneSet, render_scene, scene_seed
from diffrep.training.tiny.pictures import grid

Method = Callable[[Sequence[Scene]], Tensor]
"""Scenes of one size -> their maps: relative depth or disparity (B, 1, H, W), normals in LUB (B, 3, H, W), or masks in
[0, 1] (B, H, W). A predictor looks at `Scene.image` alone."""


@dataclass(frozen=True, kw_only=True)
class SceneMapSettings:
    """Which scenes are counted."""

    count: int = 600  # scenes
    categories: tuple[str, ...] = CATEGORIES
    split: Literal["train", "val", "test"] = "test"  # of disjoint seeds
    size: int = 128  # side of the rendered images, pixels
    first: int = 0  # number of the first scene
    batch_size: int = 16
    workers: int = 1  # processes that render ahead; 0: none beside this one

    def __post_init__(self) -> None:
        check_scenes(
            size=self.size, categories=self.categories, count=self.count, batch_size=self.batch_size,
            first=self.first, workers=self.workers,
        )  # fmt: skip


def scene_jobs(settings: SceneMapSettings) -> list[tuple[int, str, int]]:
    """(seed, category, size) of every scene, categories in turn."""
    kinds = settings.categories
    numbers = range(settings.first, settings.first + settings.count)
    return [(scene_seed(settings.split, i), kinds[i % len(kinds)], settings.size) for i in numbers]


def render_job(job: tuple[int, str, int]) -> Scene:
    """Render one scene."""
    seed, category, size = job
    return render_scene(seed, category=category, size=size)


def scene_batches(jobs: Sequence[tuple[int, str, int]], settings: SceneMapSettings) -> Iterator[list[Scene]]:
    """Rendered scenes, in batches."""
    return rendered(render_job, jobs, workers=settings.workers, batch_size=settings.batch_size)


def name_of(job: tuple[int, str, int]) -> str:
    """What a scene is called in reports."""
    return f"{job[1]} {job[0]}"


def scene_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Scenes by name, together and by whether models in training see their categories; only groups that have any."""
    seen = [name for name in names if name.partition(" ")[0] in SEEN]
    unseen = [name for name in names if name.partition(" ")[0] in UNSEEN]
    return {group: some for group, some in {"all": list(names), "seen": seen, "unseen": unseen}.items() if some}


def predict_scenes(
    methods: Mapping[str, Method],
    jobs: Sequence[tuple[int, str, int]],
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
        for batch in scene_batches(jobs, settings):
            for method, predict in methods.items():
                maps = predict(batch).float().cpu()
                if not bool(torch.isfinite(maps).all()):
                    raise ValueError(f"{method}: gives maps that are not finite")
                for values, scene in zip(maps, batch, strict=True):
                    count(method, f"{scene.category} {scene.seed}", values, scene)
            bar.update(len(batch))


@dataclass(frozen=True)
class SceneMapReport(Report):
    """What every method got on every scene.

    Attributes:
        rows: method -> scene -> numbers; of depth `depth_metrics`, of normals the mean angle and the share under
            11.25 degrees of its pixels, and their number.
        pooled: method -> group -> metrics over all pixels together (normals only).
    """

    task: Task
    settings: SceneMapSettings
    rows: Mapping[str, Mapping[str, Mapping[str, float]]]
    pooled: Mapping[str, Mapping[str, Mapping[str, float]]]
    weights: Mapping[str, object]

    def groups(self) -> dict[str, list[str]]:
        """Group -> its scenes; only groups that have any."""
        return scene_groups(list(next(iter(self.rows.values()))))

    def mean(self, method: str, metric: str, group: str = "all") -> tuple[float, float, float]:
        """Mean over images of one metric of a method, with a 95 % interval."""
        values = np.array([self.rows[method][name][metric] for name in self.groups()[group]])
        return float(values.mean()), *bootstrap(lambda rows: values[rows].mean(1), len(values))

    def document(self) -> Mapping[str, object]:
        means = {
            method: {
                group: {
                    "images": len(names),
                    **{m: _named(self.mean(method, m, group)) for m in next(iter(images.values()))},
                }
                for group, names in self.groups().items()
            }
            for method, images in self.rows.items()
        }
        return {
            "benchmark": "scenes",
            "task": self.task,
            "settings": self.settings,
            "weights": self.weights,
            "mean of images": means,
            "all pixels together": self.pooled,
        }

    def sections(self) -> Iterator[Section]:
        what = "angle to the true normal" if self.task == "normals" else f"{self.task}, affine-aligned"
        yield Section(f"scenes ({self.settings.split}, {self.settings.size} px): {what}; 95 % interval over images")
        metrics = ("mean", "under 11.25") if self.task == "normals" else ("abs_rel", "delta1", "rmse", "silog")
        for group, names in self.groups().items():
            rows: list[tuple[str, ...]] = []
            for method in self.rows:
                cells = (
                    with_interval(*self.mean(method, metric, group), percent=metric in ("abs_rel", "delta1"))
                    for metric in metrics
                )
                rows.append((method, *cells))
                if method in self.pooled:
                    pixels = self.pooled[method][group]
                    rows[-1] += (
                        f"over all pixels: mean {pixels['mean']:.2f}, median {pixels['median']:.2f},"
                        f" under 11.25 {pixels['under 11.25']:.1f}%, under 30 {pixels['under 30']:.1f}%",
                    )
            yield Section(f"{group}: {len(names)} images", metrics, rows)


def _named(numbers: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), numbers, strict=True))


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
        claim_folder(root, {"task": task, "methods": weights, **asdict(settings)})
    results = {method: ImageResults(root, _file_name(number, method)) for number, method in enumerate(methods)}

    def count(method: str, name: str, values: Tensor, scene: Scene) -> None:
        if task != "normals":
            results[method].add(name, scene_depth_metrics(values[0], torch.from_numpy(scene.depth), task))
            return
        errors = scene_angles(values, scene)
        e = errors.double()
        row = {"mean": e.mean().item(), "under 11.25": 100 * (e < 11.25).double().mean().item(), "pixels": len(e)}
        results[method].add(name, row, errors=errors)

    jobs = scene_jobs(settings)
    missing = [job for job in jobs if any(name_of(job) not in one.rows for one in results.values())]
    predict_scenes(methods, missing, settings, count, title=f"scenes, {task}", progress=progress)
    names = [name_of(job) for job in jobs]
    rows = {method: {name: one.rows[name] for name in names} for method, one in results.items()}
    pooled = {}
    if task == "normals":
        pooled = {
            method: {group: PooledAngles.over(map(one.errors, some)) for group, some in scene_groups(names).items()}
            for method, one in results.items()
        }
    return SceneMapReport(task, settings, rows, pooled, weights)


def _file_name(number: int, method: str) -> str:
    return f"{number:02d}-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in method)


def scene_angles(normals: Tensor, scene: Scene) -> Tensor:
    """(N,) degrees: the errors of (3, H, W) normals in LUB on the surfaces of a scene."""
    truth = scene_truth(scene, "normals")
    return angular_error(normals[None].cpu(), truth[None])[0, 0][torch.from_numpy(np.isfinite(scene.depth))]


def scene_depth_metrics(prediction: Tensor, depth: Tensor, task: Task) -> dict[str, float]:
    """`depth_metrics` of an (H, W) map, aligned with the depth (H, W) of a scene in its own space."""
    valid = (depth > SCENE_BOUNDS[0]) & (depth < SCENE_BOUNDS[1])
    space: Literal["depth", "disparity"] = "disparity" if task == "disparity" else "depth"
    aligned, _, _ = align_depth(prediction.cpu(), depth, valid, space=space, bounds=SCENE_BOUNDS)
    return depth_metrics(aligned, depth, valid)


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
        decoded: Tensor = vae.decode(encoded).sample.float().cpu()
        return decoded

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


SCENE_BOUNDS = (1e-3, 80.0)  # metres: what counts of a scene's depth, and what predictions are clipped to


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
        return grid([images, truth.expand(-1, 3, -1, -1), maps.clamp(0, 1).expand(-1, 3, -1, -1)])
