"""The vision transformer: self-distillation between two views, then jointly with dense labels.

The student sees one crop with blocks of it hidden, the teacher (its moving average) another crop of the same image
in other colours. Where both show the same place, the student is to give the teacher's answer: the same prototype,
the teacher's assignments being spread evenly by Sinkhorn's iteration (as in DINO and SwAV, here for every cell as
in iBOT), and a projection nearer to the teacher's than those of all other places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.devices import initial_weights
from diffrep.files import save_weights, write_document
from diffrep.scenes import SceneSet
from diffrep.settings import check
from diffrep.training.loop import Batch, FitSettings
from diffrep.training.tiny.crops import (
    Crops,
    LabelSettings,
    dense_losses,
    draw_groups,
    draw_queries,
    fit_stages,
    gather,
    jitter,
    part_classifier,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCHITECTURE = "vit_tiny_r_s16_p8_224"  # patches of the maps of one convolution and one pooling, a quarter the size
STEM = 4  # pixels a side of a place of these maps
LABEL_FREE = FitSettings(steps=20000, minutes=6, learning_rate=1e-3, ema_decay=0.996, seed=2)
JOINT = FitSettings(steps=40000, minutes=56, learning_rate=1e-3, ema_decay=0.999, seed=3)


@dataclass(frozen=True, kw_only=True)
class DinoSettings:
    """The vision transformer and its training."""

    width: int = 192
    depth: int = 5
    heads: int = 3
    patch: int = 8
    image_size: int = 128  # pixels a side at which it is used
    crop: int = 96  # pixels a side of the training views
    sides: tuple[float, float] = (0.6, 1.0)  # of a view, shares of the image's side
    colour: float = 0.8  # strength of the colour changes
    joint_colour: float = 0.4  # the same in the joint phase
    hidden: float = 0.25  # share of the student's patches that are blanked, label-free phase
    prototypes: int = 512
    teacher_temperature: float = 0.04
    student_temperature: float = 0.1
    contrast: float = 0.5  # weight of the contrastive loss
    places: int = 24  # cells per image that are compared with the teacher's
    self_share: float = 0.25  # share of a batch that goes on with self-distillation in the joint phase
    self_weight: float = 0.1  # and the weight of its loss there
    labels: LabelSettings = field(default_factory=LabelSettings)
    batch_size: int = 32
    label_free: FitSettings = LABEL_FREE
    joint: FitSettings = JOINT

    def __post_init__(self) -> None:
        check(self)


def build_vit(settings: DinoSettings) -> Any:
    """A stock timm `VisionTransformer` behind a convolutional stem, with random weights."""
    import timm

    network: Any = timm.create_model(ARCHITECTURE, **model_arguments(settings))
    for block in network.blocks:
        block.attn.fused_attn = False  # the plain product is faster than CPU flash attention, and equal
    return network


def model_arguments(settings: DinoSettings) -> dict[str, Any]:
    """Arguments of `timm.create_model` beside the architecture, JSON-ready."""
    return {
        "img_size": settings.image_size,
        "patch_size": settings.patch // STEM,
        "embed_dim": settings.width,
        "depth": settings.depth,
        "num_heads": settings.heads,
        "num_classes": 0,
        "dynamic_img_size": True,
    }


def patch_tokens(network: Any, images: Tensor) -> Tensor:
    """The raw output of the last block of a timm ViT for images (B, 3, H, W) in [0, 1]: (B, N, C) of the patches."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    x = network._pos_embed(network.patch_embed((images - mean) / std))
    for block in network.blocks:
        x = block(x)
    return x[:, network.num_prefix_tokens :]


class Student(nn.Module):
    """The transformer with the heads that only training needs."""

    def __init__(self, network: Any, settings: DinoSettings) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        self.project = nn.Sequential(nn.Linear(settings.width, 256), nn.GELU(), nn.Linear(256, 96))
        self.prototypes = nn.Parameter(torch.randn(settings.prototypes, 96))
        self.classify = part_classifier(settings.width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> the last block's map (B, C, h, w) and unit projections (B, N, 96)."""
        tokens = patch_tokens(self.network, images)
        side = images.shape[-1] // self.settings.patch
        projected = F.normalize(self.project(self.network.norm(tokens)).float(), dim=-1)
        return tokens.mT.unflatten(2, (side, side)), projected


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, *, rounds: int = 3) -> Tensor:
    """Assign N rows to K prototypes, all prototypes about equally often; (N, K), rows sum to 1."""
    logits = scores.float() / temperature
    q = torch.exp(logits - logits.max())
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-12)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-12)
    return q


def self_losses(
    student: Tensor, teacher: Tensor, prototypes: tuple[Tensor, Tensor], batch: Batch, settings: DinoSettings
) -> Mapping[str, Tensor]:
    """Losses between projections of the same places in two views.

    Args:
        student, teacher: (B, N, D) unit vectors.
        prototypes: of the student and of the teacher, (K, D).
        batch: "cells" (B, P) of the student's view, "elsewhere" (B, P) of the teacher's, "shared" (B, P) bool.
    """
    width = student.shape[-1]
    keep = batch["shared"].flatten()
    ours = student.gather(1, batch["cells"][..., None].expand(-1, -1, width)).flatten(0, 1)[keep]
    theirs = teacher.gather(1, batch["elsewhere"][..., None].expand(-1, -1, width)).flatten(0, 1)[keep]
    target = sinkhorn(theirs @ F.normalize(prototypes[1].float(), dim=-1).T, settings.teacher_temperature)
    logits = ours @ F.normalize(prototypes[0].float(), dim=-1).T / settings.student_temperature
    assign = -(target * logits.log_softmax(-1)).sum(-1).mean()
    contrast = F.cross_entropy(ours @ theirs.T / 0.1, torch.arange(len(ours), device=ours.device))
    return {"assign": assign, "contrast": contrast, "self": assign + settings.contrast * contrast}


def view_batch(scenes: SceneSet, settings: DinoSettings, labels: bool, generator: torch.Generator) -> Batch:
    """Two views of random scenes; with the labels of the first view where asked for."""
    if labels:
        groups = settings.batch_size // settings.labels.members
        indices = draw_groups(scenes.category, groups, settings.labels.members, generator)
    else:
        indices = torch.randint(len(scenes), (settings.batch_size,), generator=generator)
    images = gather(scenes, "image", indices)
    side, cells = images.shape[1], settings.crop // settings.patch
    first, second = (Crops.draw(len(images), side, settings.crop, generator, sides=settings.sides) for _ in range(2))
    colour = settings.joint_colour if labels else settings.colour
    views = [jitter(crops.images(images), colour, generator) for crops in (first, second)]
    chosen = torch.rand(len(images), cells * cells, generator=generator).argsort(1)[:, : settings.places]
    places = first.cell_points(cells).flatten(1, 2).gather(1, chosen[..., None].expand(-1, -1, 2))
    elsewhere = (second.from_image(places) / settings.patch).floor().long()
    shared = ((elsewhere >= 0) & (elsewhere < cells)).all(-1)
    elsewhere = elsewhere.clamp(0, cells - 1)
    numbers = elsewhere[..., 1] * cells + elsewhere[..., 0]
    batch = {"view": views[0], "other": views[1], "cells": chosen, "elsewhere": numbers, "shared": shared}
    if labels:
        part, canonical = first.labels(gather(scenes, "part", indices), gather(scenes, "canonical", indices), cells)
        queries = draw_queries(part, settings.labels, generator)
        count = int(len(images) * settings.self_share)
        fewer = {name: batch[name][:count] for name in ("other", "cells", "elsewhere", "shared")}
        return batch | fewer | {"part": part, "canonical": canonical, "queries": queries}
    blank = torch.rand(len(images), 1, cells, cells, generator=generator) < settings.hidden
    grey = torch.tensor(MEAN)[:, None, None]
    hidden = F.interpolate(blank.float(), scale_factor=float(settings.patch), mode="nearest") > 0
    return batch | {"view": torch.where(hidden, grey, views[0])}


def dino_loss(module: Student, ema: Student, batch: Batch) -> Mapping[str, Tensor]:
    """Losses of a `Student` with its moving average as the teacher; see `fit`."""
    settings = ema.settings
    features, ours = module(batch["view"])
    with torch.no_grad():
        _, theirs = ema(batch["other"])
    ours = ours[: len(theirs)]
    losses = dict(self_losses(ours, theirs, (module.prototypes, ema.prototypes), batch, settings))
    if "part" not in batch:
        return {"loss": losses["self"], **losses}
    losses |= dense_losses(features, module.classify, batch, settings.labels)
    return {"loss": settings.self_weight * losses["self"] + losses["dense"], **losses}


def train_dino(scenes: SceneSet, settings: DinoSettings, folder: Path, *, progress: bool = True) -> list[Any]:
    """Train label-free, then jointly with labels. Returns both timm networks; it resumes from `folder`."""
    with initial_weights(settings.label_free.seed):
        student = Student(build_vit(settings), settings)
    stages = {
        "dino-label-free": (settings.label_free, partial(view_batch, scenes, settings, False)),
        "dino-joint": (settings.joint, partial(view_batch, scenes, settings, True)),
    }
    return [average.network for average in fit_stages(student, stages, dino_loss, folder, progress=progress)]


def write_vit(network: Any, settings: DinoSettings, folder: Path) -> None:
    """Write a folder in timm's hub layout: config.json and model.safetensors in half precision."""
    size = settings.image_size
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": settings.width,
        "global_pool": "token",
        "model_args": model_arguments(settings),
        "pretrained_cfg": {
            "tag": "diffrep_tiny",
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    write_document(folder / "config.json", config)
    half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_weights(folder / "model.safetensors", half, format="pt")
