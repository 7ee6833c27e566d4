"""Held-out scenes that a one-step head is measured and drawn on while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffrep.alignment import align_depth
from diffrep.eval.depth_metrics import depth_metrics, mean_metrics
from diffrep.eval.normal_metrics import PooledAngles, angular_error
from diffrep.scenes import SceneSet
from diffrep.training.one_step import OneStepModel, Task
from diffrep.training.one_step_data import SceneSamples
from diffrep.training.one_step_sampling import predict_maps
from diffrep.training.pictures import grid

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
