"""``diffrep eval joint``: one U-Net that draws depth, normals and masks in one pass, beside three that draw one each.

Multi-task diffusion in one step: the maps share all of the U-Net but its last convolution, whose outputs are one latent
for each. All four trainings start from one base and see the same scenes for the same number of optimiser steps, so that
the three together cost three times as much, in training and in use.

Source of the idea: MT-Diffusion, arXiv 2407.17571, of which no code is published; its noise and losses are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffrep.backbones.pipelines import PipelineParts, load_parts
from diffrep.eval.maps import angular_error
from diffrep.eval.one_step_ablation import AblationSettings
from diffrep.eval.rendering import SceneMapSettings, render_job
from diffrep.eval.report import ScoreTables
from diffrep.eval.scene_maps import scene_depth_metrics, scene_pixels, scene_truth
from diffrep.eval.segmentation import grey
from diffrep.eval.segmentation_metrics import score_image
from diffrep.heads.families import Task
from diffrep.heads.one_step import LatentCodec
from diffrep.heads.training.dense import OneStepModel, adapt_unet, decoded_depth, latent_losses
from diffrep.heads.training.dense_data import Sample, SceneSamples, cache_latents, latent_batches
from diffrep.heads.training.fit import EMBEDDED_RECIPE, Feed, HeadSettings, TrainingInputs, prepared, train_head
from diffrep.scenes import Scene, SceneSet
from diffrep.settings import check
from diffrep.training.loop import FitSettings

TARGETS: Mapping[str, str] = {"disparity": "AbsRel", "normals": "angle, degrees", "mask": "max F"}
"""What is drawn, in the order of the output's channels, and how it is scored."""
JOINT, ALONE = "together", "alone"


class MaskSamples(SceneSamples):
    """Rendered scenes with the masks of their objects as annotation, -1 and 1."""

    def sample(self, index: int) -> Sample:
        one = super().sample(index)
        mask = 2 * torch.from_numpy(np.array(self.scenes.mask[index])).float()[None] - 1
        return Sample(one.pixels, mask, one.valid, mask, one.valid)


@dataclass(frozen=True, kw_only=True)
class JointTraining(HeadSettings[OneStepModel, SceneSet]):
    """One U-Net for some of `TARGETS`, after the recipe of the embedded heads."""

    targets: tuple[str, ...] = tuple(TARGETS)
    base: str = "tiny"
    fit: FitSettings = field(default_factory=lambda: AblationSettings().fit())
    batch_size: int = 16

    def __post_init__(self) -> None:
        check(self)

    def build(self, parts: PipelineParts) -> OneStepModel:
        unet: Any = adapt_unet(parts.unet, EMBEDDED_RECIPE, seed=self.fit.seed)
        last, count = unet.conv_out, len(self.targets)
        wide = nn.Conv2d(last.in_channels, count * last.out_channels, last.kernel_size, padding=last.padding)
        wide.load_state_dict({"weight": last.weight.repeat(count, 1, 1, 1), "bias": last.bias.repeat(count)})
        unet.conv_out = wide
        unet.register_to_config(out_channels=wide.out_channels)
        return OneStepModel(unet, prepared(parts, unet), parts.alphas_cumprod, EMBEDDED_RECIPE)

    def feed(self, model: OneStepModel, inputs: TrainingInputs) -> Feed:
        vae, cached = inputs.parts.vae.to(inputs.device, memory_format=torch.channels_last), {}
        for target in self.targets:
            samples = (MaskSamples if target == "mask" else SceneSamples)(inputs.data, _task(target))
            place: Any = (vae, samples, target, inputs.latents or inputs.folder)
            cached[target] = cache_latents(*place, made_with=self.base, progress=inputs.progress)
        stacked = torch.cat([cached[target]["targets"] for target in self.targets], 1)
        together = {"images": cached[self.targets[0]]["images"], "targets": stacked}
        return latent_batches(together, EMBEDDED_RECIPE, batch_size=self.batch_size), latent_losses, None

    def about(self) -> dict[str, Any]:
        return {"family": EMBEDDED_RECIPE.name, "extra": {"targets": self.targets}}


def _task(target: str) -> Task:
    return "normals" if target == "normals" else "disparity"


@torch.no_grad()
def joint_maps(model: OneStepModel, vae: Any, pixels: Tensor, targets: Sequence[str]) -> dict[str, Tensor]:
    """All maps of images in one pass of the U-Net.

    Args:
        pixels: (B, 3, H, W) in [-1, 1], sides that are multiples of the VAE's stride.
        targets: as the model was trained.

    Returns:
        Target -> disparity or mask (B, 1, H, W) in [0, 1], or normals (B, 3, H, W) in LUB, of any length.
    """
    codec = LatentCodec(vae)
    images = codec.encode(pixels / 2 + 0.5, batch_size=16).float().to(model.context.device)
    steps = torch.full((len(images),), EMBEDDED_RECIPE.timestep, device=images.device)
    assert EMBEDDED_RECIPE.task_vector is not None
    output = model(images, steps, images.new_tensor(EMBEDDED_RECIPE.task_vector).expand(len(images), -1))
    maps = {}
    for target, latents in zip(targets, output.chunk(len(targets), 1), strict=True):
        decoded = codec.decode(latents, batch_size=16).float()
        maps[target] = decoded if target == "normals" else decoded_depth(decoded) / 2 + 0.5
    return maps


def score(target: str, drawn: Tensor, scene: Scene) -> float:
    """What `TARGETS` says of a map (1 or 3, H, W) of a scene: AbsRel where nearer than 80 m and affine-aligned, the
    mean angle over all surfaces, or the best F of a mask.
    """
    if target == "mask":
        return score_image(grey(drawn[0]), grey(torch.from_numpy(scene.mask))).values["maxf"]
    if target == "normals":
        angles = angular_error(drawn[None], scene_truth(scene, "normals")[None])[0, 0]
        return float(angles[torch.from_numpy(np.isfinite(scene.depth))].mean())
    return scene_depth_metrics(drawn[0], torch.from_numpy(scene.depth), "disparity")["abs_rel"]


def evaluate_joint(
    scenes: SceneSet,
    work: Path,
    settings: AblationSettings | None = None,
    *,
    base: str = "tiny",
    device: str | torch.device = "auto",
    workers: int = 2,
    progress: bool = True,
) -> ScoreTables:
    """Train one U-Net for all targets and one for each, and measure them. The same folder again goes on where it was.

    Args:
        scenes: to train on.
        work: of the trainings, and of the encoded scenes, which they share.
        workers: processes that render the held-out scenes.

    Raises:
        ValueError: the folder is of other settings.
    """
    settings = settings or AblationSettings()
    variants = {JOINT: tuple(TARGETS), **{target: (target,) for target in TARGETS}}
    methods: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {}
    vae = load_parts(base, pad=False).vae.eval()
    for name, targets in variants.items():
        training = JointTraining(targets=targets, base=base, fit=settings.fit(), batch_size=settings.batch_size)
        model = train_head(training, scenes, work / name, latents=work, device=device, progress=progress)
        place = vae.to(model.context.device)
        methods[name] = partial(joint_maps, model, place, targets=targets)
    scores: dict[str, dict[str, list[float]]] = {target: {JOINT: [], ALONE: []} for target in TARGETS}
    measured = SceneMapSettings(count=settings.held_out, workers=workers)
    for batch in measured.batches(render_job, measured.jobs()):
        pixels = scene_pixels(batch)
        for name, method in methods.items():
            for target, maps in method(pixels).items():
                scores[target][JOINT if name == JOINT else ALONE] += [
                    score(target, m, s) for m, s in zip(maps.cpu(), batch, strict=True)
                ]
    for both in scores.values():
        both["difference"] = [ours - theirs for ours, theirs in zip(both[JOINT], both[ALONE], strict=True)]
    s = settings
    of = f"{s.steps} steps of {s.batch_size} images, {s.held_out} held-out scenes (95 % interval)"
    title = f"One U-Net for all three together, and three alone, each {of}"
    rows = {f"{target}: {measure}": scores[target] for target, measure in TARGETS.items()}
    return ScoreTables(settings, {title: rows}, dict.fromkeys((JOINT, ALONE, "difference"), 3))
