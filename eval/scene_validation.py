"""Measuring heads on held-out scenes while they are trained, with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.eval.maps import PooledAngles, angular_error, mean_metrics
from diffrep.eval.scene_maps import scene_depth_metrics
from diffrep.eval.segmentation import grey
from diffrep.eval.segmentation_metrics import score_image, together
from diffrep.files import write_whole
from diffrep.heads.families import Task
from diffrep.heads.segmentation import DiffDis, finish
from diffrep.heads.training.dense import OneStepModel, predict_maps
from diffrep.heads.training.dense_data import SceneSamples
from diffrep.heads.training.masks import scene_maps
from diffrep.pictures import image_grid
from diffrep.scenes import SceneSet


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
            images, masks, edges = (part.to(head.device) for part in scene_maps(self.scenes, chosen))
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
