"""The embedded benchmark of depth and normals: held-out rendered scenes, whose truth is exact.

Depth is affine-aligned per image, in the space of the prediction, and counted where it is nearer than 80 m; normals are
counted wherever there is a surface. Intervals are a bootstrap over images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.alignment import align_depth
from diffrep.eval.cache import AngleFiles, ResultFile
from diffrep.eval.depth import depth_metrics, mean_metrics
from diffrep.eval.normals import PooledAngles, angular_error
from diffrep.files import claim_folder
from diffrep.heads.training.dense import OneStepModel, Task, predict_maps
from diffrep.heads.training.dense_data import RDF_TO_LUB, SceneSamples, scene_depth
from diffrep.scenes import CATEGORIES, SEEN, UNSEEN, Scene, SceneSet, render_scene, scene_seed
from diffrep.training.tiny.pictures import grid

Method = Callable[[Sequence[Scene]], Tensor]
"""Scenes of one size -> their maps (B, 1 or 3, H, W): relative depth or disparity, or normals in LUB. A predictor looks
at `Scene.image` alone."""


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
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"count and batch_size must be at least 1, got {self.count} and {self.batch_size}")
        if unknown := sorted(set(self.categories) - set(CATEGORIES)):
            raise ValueError(f"no category {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")


@dataclass(frozen=True)
class SceneMapReport:
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
        names = list(next(iter(self.rows.values())))
        seen = [n for n in names if n.partition(" ")[0] in SEEN]
        unseen = [n for n in names if n.partition(" ")[0] in UNSEEN]
        return {k: v for k, v in {"all": names, "seen": seen, "unseen": unseen}.items() if v}

    def mean(self, method: str, metric: str, group: str = "all") -> tuple[float, float, float]:
        """Mean over images of one metric of a method, with a 95 % interval."""
        values = np.array([self.rows[method][name][metric] for name in self.groups()[group]])
        draws = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
        return float(values.mean()), float(low), float(high)

    def metrics(self) -> tuple[str, ...]:
        """The metrics that the table shows."""
        if self.task == "normals":
            return ("mean", "under 11.25")
        return ("abs_rel", "delta1", "rmse", "silog")

    def table(self) -> str:
        """Means over images with intervals, for each group; normals also over all pixels together."""
        width = max(map(len, self.rows))
        what = "angle to the true normal" if self.task == "normals" else f"{self.task}, affine-aligned"
        lines = [f"scenes ({self.settings.split}, {self.settings.size} px): {what}; 95 % interval over images"]
        for group, names in self.groups().items():
            lines += ["", f"{group}: {len(names)} images"]
            lines.append(f"  {'':<{width}}" + "".join(f"  {name:>24}" for name in self.metrics()))
            for method in self.rows:
                cells = (_cell(metric, *self.mean(method, metric, group)) for metric in self.metrics())
                lines.append(f"  {method:<{width}}" + "".join(f"  {cell:>24}" for cell in cells))
                if method in self.pooled:
                    pixels = self.pooled[method][group]
                    lines.append(
                        f"  {'':<{width}}  over all pixels: mean {pixels['mean']:.2f}, median {pixels['median']:.2f},"
                        f" under 11.25 {pixels['under 11.25']:.1f}%, under 30 {pixels['under 30']:.1f}%"
                    )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything in the table as numbers, with the settings that made them."""
        rows: dict[str, Any] = {}
        for method, images in self.rows.items():
            metrics = list(next(iter(images.values())))
            rows[method] = {
                group: {
                    "images": len(names),
                    **{m: _interval(*self.mean(method, m, group)) for m in metrics},
                }
                for group, names in self.groups().items()
            }
        return json.dumps(
            {
                "benchmark": "scenes",
                "task": self.task,
                "settings": asdict(self.settings),
                "weights": dict(self.weights),
                "mean of images": rows,
                "all pixels together": {k: dict(v) for k, v in self.pooled.items()},
            },
            indent=2,
        )


def _interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def _cell(metric: str, value: float, low: float, high: float) -> str:
    if metric in ("abs_rel", "delta1"):
        return f"{100 * value:.2f}% ({100 * low:.2f}..{100 * high:.2f})"
    return f"{value:.2f} ({low:.2f}..{high:.2f})"


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
        folder: keeps the numbers of every scene; the same folder again goes on from what is there.
        weights: method -> what its numbers depend on, for the report and to recognise the folder.

    Raises:
        ValueError: the folder is of other methods or settings, or a method gives maps that are not finite.
    """
    settings = settings or SceneMapSettings()
    root = Path(folder) if folder is not None else None
    if root is not None:
        claim_folder(root, {"task": task, "methods": dict(weights or {}), **asdict(settings)})
    kept = {m: ResultFile(root / f"{_file_name(m)}.jsonl" if root else None) for m in methods}
    angles = {m: AngleFiles(root / _file_name(m) if root else None) for m in methods} if task == "normals" else {}
    jobs = scene_jobs(settings)
    missing = [job for job in jobs if any(name_of(job) not in one.rows for one in kept.values())]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=f"scenes, {task}", disable=not progress) as bar:
        for batch in scene_batches(missing, settings):
            for method, predict in methods.items():
                found = predict(batch).float()
                if not bool(torch.isfinite(found).all()):
                    raise ValueError(f"{method}: gives maps that are not finite")
                for values, scene in zip(found, batch, strict=True):
                    name = f"{scene.category} {scene.seed}"
                    if task == "normals":
                        errors = scene_angles(values, scene)
                        angles[method].add(name, errors)
                        kept[method].add(name, _angle_row(errors))
                    else:
                        kept[method].add(name, scene_depth_metrics(values[0], scene, task))
            bar.update(len(batch))
    names = [name_of(job) for job in jobs]
    rows = {m: {name: one.rows[name] for name in names} for m, one in kept.items()}
    report = SceneMapReport(task, settings, rows, {}, dict(weights or {}))
    pooled = {m: {g: _pool(one, chosen) for g, chosen in report.groups().items()} for m, one in angles.items()}
    return SceneMapReport(task, settings, rows, pooled, dict(weights or {}))


def _file_name(method: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in method)


def _angle_row(errors: Tensor) -> dict[str, float]:
    e = errors.double()
    return {"mean": e.mean().item(), "under 11.25": 100 * (e < 11.25).double().mean().item(), "pixels": len(e)}


def _pool(kept: AngleFiles, names: Sequence[str]) -> dict[str, float]:
    pooled = PooledAngles()
    for name in names:
        pooled.update(kept.errors(name))
    return pooled.compute()


def scene_angles(normals: Tensor, scene: Scene) -> Tensor:
    """(N,) degrees: the errors of (3, H, W) normals in LUB on the surfaces of a scene."""
    truth = scene_truth(scene, "normals")
    return angular_error(normals[None].cpu(), truth[None])[0, 0][torch.from_numpy(np.isfinite(scene.depth))]


def scene_depth_metrics(prediction: Tensor, scene: Scene, task: Task) -> dict[str, float]:
    """`depth_metrics` of an (H, W) map, aligned in its own space."""
    depth = torch.from_numpy(scene.depth)
    valid = (depth > SCENE_BOUNDS[0]) & (depth < SCENE_BOUNDS[1])
    space: Literal["depth", "disparity"] = "disparity" if task == "disparity" else "depth"
    aligned, _, _ = align_depth(prediction.cpu(), depth, valid, space=space, bounds=SCENE_BOUNDS)
    return depth_metrics(aligned, depth, valid)


def scene_truth(scene: Scene, task: Task) -> Tensor:
    """The picture that a head is trained to draw: (1 or 3, H, W) in [-1, 1]."""
    if task == "normals":
        signs = torch.tensor(RDF_TO_LUB).view(3, 1, 1)
        return torch.from_numpy(scene.normals).permute(2, 0, 1) * signs
    return scene_depth(torch.from_numpy(scene.depth)[None], task)


def through_vae(vae: Any, task: Task) -> Method:
    """The truth, encoded and decoded again: what no head on this VAE can beat by much."""

    @torch.no_grad()
    def method(scenes: Sequence[Scene]) -> Tensor:
        truth = torch.stack([scene_truth(scene, task).expand(3, -1, -1) for scene in scenes])
        device = next(vae.parameters()).device
        decoded = vae.decode(vae.encode(truth.to(device)).latent_dist.mean).sample.float().cpu()
        if task == "normals":
            return F.normalize(decoded, dim=1)
        return decoded.clamp(-1, 1).mean(1, keepdim=True) / 2 + 0.5

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


# -- scenes -----------------------------------------------------------------------------------------------------


def scene_jobs(settings: SceneMapSettings) -> list[tuple[int, str, int]]:
    """(seed, category, size) of each scene, the categories in turn."""
    kinds = settings.categories
    numbers = range(settings.first, settings.first + settings.count)
    return [(scene_seed(settings.split, i), kinds[i % len(kinds)], settings.size) for i in numbers]


def name_of(job: tuple[int, str, int]) -> str:
    """What a scene is called in reports."""
    return f"{job[1]} {job[0]}"


def render_job(job: tuple[int, str, int]) -> Scene:
    """Render one scene."""
    seed, category, size = job
    return render_scene(seed, category=category, size=size)


def scene_batches(jobs: Sequence[tuple[int, str, int]], settings: SceneMapSettings) -> Iterator[list[Scene]]:
    """Rendered scenes, in batches."""
    if not jobs:
        return
    if settings.workers == 0:
        yield from _batched(map(render_job, jobs), settings.batch_size)
        return
    # spawn: a forked child would inherit the threads' locks of the libraries that are loaded here
    with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
        yield from _batched(pool.map(render_job, jobs, chunksize=4), settings.batch_size)


def _batched(scenes: Iterator[Scene], size: int) -> Iterator[list[Scene]]:
    while batch := list(islice(scenes, size)):
        yield batch


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
        found = predict_maps(model, vae, self.pixels.to(device), self.task, steps=self.steps).cpu()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.picture(found).save(self.folder / f"{step:06d}.png")
        return self.measure(found)

    def measure(self, found: Tensor) -> dict[str, float]:
        """Metrics of predicted maps: of all pixels nearer than 80 m, affine-aligned per image; or of all surfaces."""
        if self.task == "normals":
            angles = PooledAngles()
            angles.update(angular_error(found, self.annotations)[torch.isfinite(self.depth)[:, None]])
            return angles.compute()
        rows = []
        for prediction, depth in zip(found[:, 0], self.depth, strict=True):
            valid = (depth > SCENE_BOUNDS[0]) & (depth < SCENE_BOUNDS[1])
            space: Literal["depth", "disparity"] = "disparity" if self.task == "disparity" else "depth"
            aligned, _, _ = align_depth(prediction, depth, valid, space=space, bounds=SCENE_BOUNDS)
            rows.append(depth_metrics(aligned, depth, valid))
        return mean_metrics(rows)

    def picture(self, found: Tensor) -> Any:
        """Images, true maps and predicted maps as one picture."""
        images = self.pixels[: self.shown] / 2 + 0.5
        truth = self.annotations[: self.shown] / 2 + 0.5
        maps = found[: self.shown] / 2 + 0.5 if self.task == "normals" else found[: self.shown]
        return grid([images, truth.expand(-1, 3, -1, -1), maps.clamp(0, 1).expand(-1, 3, -1, -1)])
