"""Measuring a segmentation head on held-out scenes while it is trained, with pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.eval.segmentation import grey
from diffrep.eval.segmentation_metrics import MaskScores
from diffrep.heads.segmentation import DiffDis, finish
from diffrep.heads.training.masks import scene_maps
from diffrep.scenes import SceneSet
from diffrep.training.tiny.pictures import grid


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
        head, scores = self.head(model), MaskScores()
        rows: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.scenes), self.batch_size):
            chosen = torch.arange(start, min(start + self.batch_size, len(self.scenes))).numpy()
            images, masks, edges = (part.to(head.device) for part in scene_maps(self.scenes, chosen))
            noise = head.draw((images.shape[-2], images.shape[-1]), 0)
            wanted = start < self.shown
            mask, edge = head.forward(images, noise, edges=wanted)
            soft = finish(mask, stretch=False)
            for predicted, truth in zip(soft, masks, strict=True):
                scores.update(grey(predicted[0]), grey(truth[0]))
            if wanted:
                drawn = {"image": images, "truth": masks, "mask": soft, "true edge": edges}
                drawn["edge"] = torch.zeros_like(soft) if edge is None else finish(edge, stretch=False)
                for name, maps in drawn.items():
                    rows.setdefault(name, []).append(maps.expand(-1, 3, -1, -1).float().cpu())
        self.pictures.mkdir(parents=True, exist_ok=True)
        grid([torch.cat(maps)[: self.shown] for maps in rows.values()]).save(self.pictures / f"{step:06d}.png")
        computed = scores.compute()
        return {"maxF": computed["maxf"], "MAE": computed["mae"], "S": computed["sm"]}
