"""Training depth and normals with a decoder of their own, on rendered scenes that lie on the device.

The loss of the annotation's latent stays, and what the decoder draws is compared with the truth pixel by pixel: depth
by the logarithm of what it is when aligned, its error and that of its steps from pixel to pixel, normals by their
angle; where depth jumps, pixels count more. Half of the images get other colours, light, texture, sharpness and noise
on the way, as photographs differ in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.alignment import fit_scale_shift
from diffrep.backbones.repositories import EMBEDDED
from diffrep.devices import resolve_device
from diffrep.files import replace_folder
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.dense import DenseHead
from diffrep.heads.families import Family, Task
from diffrep.heads.head_folders import HEAD_FILE, json_of, write_head
from diffrep.heads.training.dense import OneStepModel, decoded_normals, draw_rows, latent_loss
from diffrep.heads.training.dense_data import cached_latents, lub_normals, mirror_normals
from diffrep.scenes import SceneSet
from diffrep.training.loop import Batch, FitSettings, Loss, fit
from diffrep.training.tiny.crops import jitter

LATENT_WEIGHT = 0.1  # of the error of latents beside that of drawn maps
FAR = 80.0  # metres: all that is farther is as far
NEAR = 0.1  # metres: nearer than any surface of a scene
JUMP = 1.15  # ratio of the depths of neighbouring pixels from which on there is a border
BORDER = {"depth": 3.0, "normals": 1.0}  # how much more pixels within three of a border count
STRETCH = 2.0  # factor by which a map's scale may be off before its loss counts that
ANCHOR = 0.1  # of the error of maps that are not aligned
MARGIN = 1e-4  # by which cosines stay away from 1, where the angle has no gradient
REFINING = FitSettings(steps=20000, learning_rate=2e-3, warmup=50, ema_decay=0.995, seed=23)  # of a decoder alone
REFINING_WIDTHS, REFINING_BATCH = (64, 48, 32), 16
ROOM = 0.05  # of a picture of depth, beyond the largest value
CHANGED = 0.5  # share of images whose looks are changed


def load_scenes(scenes: SceneSet, task: Task, device: torch.device) -> dict[str, Tensor]:
    """The arrays of N scenes that a task needs, on a device.

    Returns:
        "image" uint8 (N, H, W, 3) and "depth" float16 (N, H, W), for normals also "normals" int8 (N, H, W, 3).
    """
    names = ("image", "depth", *(["normals"] if task == "normals" else []))
    return {name: torch.from_numpy(np.array(getattr(scenes, name)[: len(scenes)])).to(device) for name in names}


def depth_pictures(depth: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """What is drawn of depth (B, 1, H, W), metres, inf in the sky, and between which values it is looked at.

    Unlike `diffrep.heads.training.dense_data.normalize_depth` this subtracts nothing: of a disparity that begins with
    the farthest surface's, the sky can only be drawn as something as far as that, with a halo along every outline.

    Returns:
        Disparity (high where near, 0 in the sky) or depth (high where far, 1 in the sky) over its largest value, and
        what of it (B, 1, 1, 1) is `FAR` and `NEAR`: the smaller one, then the larger.
    """
    values, ends = (1 / depth, (1 / FAR, 1 / NEAR)) if task == "disparity" else (depth, (NEAR, FAR))
    largest = torch.where(torch.isfinite(depth), values, 0.0).amax((1, 2, 3), keepdim=True)
    factor = (1 - ROOM) / largest.clamp(min=1e-6)
    return (factor * values).clamp(0, 1), torch.cat([factor * end for end in ends], 1)


def borders(depth: Tensor) -> Tensor:
    """1 within three pixels of a jump of depth (B, 1, H, W), else 0."""
    steps = depth.clamp(NEAR, FAR).log()
    jump = F.max_pool2d(steps, 3, 1, 1) + F.max_pool2d(-steps, 3, 1, 1) > math.log(JUMP)
    return F.max_pool2d(jump.float(), 5, 1, 2)


def change_looks(images: Tensor, generator: torch.Generator) -> Tensor:
    """Other colours, light, texture, sharpness and noise, drawn for each image.

    Args:
        images: (B, 3, H, W) in [0, 1], on any device.
        generator: of the CPU; the noise of pixels is drawn where the images are, from a seed that it draws.
    """
    count, size, device = len(images), images.shape[-2:], images.device
    local = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))

    def amount(most: float) -> Tensor:
        return (most * torch.rand(count, 1, 1, 1, generator=generator)).to(device)

    def field(channels: int, cells: int) -> Tensor:
        drawn = torch.randn(count, channels, cells, cells, generator=local, device=device)
        return F.interpolate(drawn, size=size, mode="bilinear", align_corners=False)

    looks = jitter(images, 0.5, generator)
    light = amount(0.3) * field(1, 4) + amount(0.12) * field(3, size[-1] // 4) + amount(0.08) * field(1, size[-1] // 2)
    looks = looks * light.exp()
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=device) / 16
    kernel = torch.outer(kernel, kernel).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(looks, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    looks = torch.lerp(looks, blurred, amount(1.0))
    looks = looks + amount(0.05) * torch.randn(looks.shape, generator=local, device=device)
    return looks.clamp(0, 1)


def true_maps(data: Mapping[str, Tensor], rows: Tensor, task: Task, mirrored: Tensor) -> dict[str, Tensor]:
    """What the maps of a batch are compared with; see `normal_terms` and `depth_terms`.

    Args:
        data: of `load_scenes`.
        mirrored: (B, 1, 1, 1) bool.
    """
    depth = data["depth"][rows][:, None].float()
    depth = torch.where(mirrored, depth.flip(-1), depth)
    if task == "normals":
        truth = F.normalize(lub_normals(data["normals"][rows], "rdf"), dim=1)
        truth = torch.where(mirrored, mirror_normals(truth), truth)
        return {"truth": truth, "surface": torch.isfinite(depth), "border": borders(depth)}
    picture, ends = depth_pictures(depth, task)
    return {"truth": picture * 2 - 1, "ends": ends, "counted": depth < FAR, "border": borders(depth)}


def detail_batches(
    data: Mapping[str, Tensor], task: Task, recipe: Family, *, batch_size: int, latent_shape: tuple[int, ...]
) -> Callable[[torch.Generator], Batch]:
    """Batches of scenes, every second one mirrored; they lie where the data does.

    Args:
        data: of `load_scenes`.
        latent_shape: (c, h, w).
    """
    device = data["image"].device

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(data["image"]), (batch_size,), generator=generator).to(device)
        mirrored = (torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5).to(device)
        changed = (torch.rand(batch_size, 1, 1, 1, generator=generator) < CHANGED).to(device)
        image = data["image"][rows].permute(0, 3, 1, 2).float() / 255
        image = torch.where(mirrored, image.flip(-1), image)
        return {
            **draw_rows(batch_size, recipe, latent_shape, generator),
            "pixels": torch.where(changed, change_looks(image, generator), image),
            **true_maps(data, rows, task, mirrored),
        }

    return batches


def detail_losses(vae: Any, task: Task) -> Loss[Any]:
    """The loss of latents plus that of drawn maps, on batches of `detail_batches`; see `fit`."""

    def losses(module: nn.Module, ema: OneStepModel, batch: Batch) -> Mapping[str, Tensor]:
        pixels, truth, factor = batch["pixels"], batch["truth"], vae.config.scaling_factor
        with torch.no_grad():
            images, targets = (
                factor * vae.encode(maps).latent_dist.mean.float()
                for maps in (pixels * 2 - 1, truth.expand(-1, 3, -1, -1))
            )
        noisy = ema.noisy(targets, batch.get("noise"), batch["timesteps"])
        output, drawn = module(ema.inputs(images, noisy), batch["timesteps"], batch.get("tasks"), pixels)
        latent = latent_loss(output, ema.target(targets, batch.get("noise"), batch["timesteps"]))
        terms = TERMS[task](drawn, batch)
        total = LATENT_WEIGHT * latent + torch.stack(list(terms.values())).sum()
        return {"loss": total, "latent": latent, **terms}

    return losses


def normal_terms(drawn: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Mean angle (radians) on surfaces, and half of the mean difference of the vectors, which are 0 in the sky."""
    truth, weight = batch["truth"], batch["surface"] * (1 + BORDER["normals"] * batch["border"])
    cosine = (decoded_normals(drawn) * truth).sum(1, keepdim=True).clamp(-1 + MARGIN, 1 - MARGIN)
    angle = (torch.acos(cosine) * weight).sum() / weight.sum().clamp(min=1)
    return {"angle": angle, "vector": 0.5 * (drawn - truth).abs().mean()}


def depth_terms(drawn: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Of the map, aligned as it is measured: the mean error of its logarithm, of that logarithm's steps to the next
    pixels, and of the map itself; and how far it is off where nothing is aligned, a little.
    """
    picture, truth = drawn / 2 + 0.5, batch["truth"] / 2 + 0.5
    counted, (low, high) = batch["counted"], batch["ends"].split(1, 1)
    with torch.no_grad():
        scale, _ = fit_scale_shift(picture, truth, counted)
        scale = scale.clamp(1 / STRETCH, STRETCH).view(-1, 1, 1, 1)
    off = counted * (truth - scale * picture)
    error = (
        scale * picture + off.sum((1, 2, 3), keepdim=True) / counted.sum((1, 2, 3), keepdim=True).clamp(min=1) - truth
    )
    seen, known = (torch.minimum(torch.maximum(values, low), high).log() for values in (truth + error, truth))
    weight = 1 + BORDER["depth"] * batch["border"]

    def mean(values: Tensor, weight: Tensor) -> Tensor:
        return (weight * values.abs()).sum() / weight.sum()

    logs = seen - known
    steps = mean(logs.diff(dim=-1), weight[..., 1:]) + mean(logs.diff(dim=-2), weight[..., 1:, :])
    anchor = ANCHOR * (picture - truth).abs().mean()
    return {"logs": mean(logs, weight), "steps": steps, "error": mean(error, weight), "anchor": anchor}


TERMS: Mapping[Task, Callable[[Tensor, Batch], dict[str, Tensor]]] = {
    "normals": normal_terms, "disparity": depth_terms, "depth": depth_terms,
}  # fmt: skip


@torch.no_grad()
def predicted_latents(head: DenseHead, scenes: SceneSet, count: int, file: Path, *, progress: bool = True) -> Tensor:
    """What a head's U-Net predicts for the first `count` scenes, (count, c, h, w) float16; predicted once."""

    def predicted(rows: range) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.array(scenes.image[rows.start : rows.stop])).permute(0, 3, 1, 2).float() / 255
        return {"latents": head.model.predict(head.model.encode(pixels, batch_size=16), batch_size=16)}

    note = f"{head.name}, {scenes.settings.renderer}"
    return cached_latents(file, predicted, count, made_with=note, progress=progress)["latents"]


def train_decoder(
    head: DenseHead,
    decoder: DetailDecoder,
    scenes: SceneSet,
    settings: FitSettings,
    folder: Path,
    *,
    batch_size: int,
    device: str | torch.device = "auto",
    **options: Any,
) -> DetailDecoder:
    """Train a decoder for a head whose U-Net stays as it is, on what that predicts; it resumes from `folder`.

    Args:
        folder: of predicted latents, checkpoint and log.
        options: of `fit`.
    """
    place = resolve_device(device)
    data = load_scenes(scenes, head.task, place)
    latents = predicted_latents(head, scenes, len(scenes), folder / "predicted.safetensors").to(place)

    def truth(rows: Tensor) -> dict[str, Tensor]:
        return true_maps(data, rows, head.task, torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=place))

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(latents), (batch_size,), generator=generator).to(place)
        pixels = (data["image"][rows].permute(0, 3, 1, 2).float() / 255).to(memory_format=torch.channels_last)
        return {"latents": latents[rows].float(), "pixels": pixels, **truth(rows)}

    def losses(module: nn.Module, ema: DetailDecoder, batch: Batch) -> Mapping[str, Tensor]:
        drawn = module(batch["latents"], batch["pixels"])
        terms = TERMS[head.task](drawn, batch)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    some = torch.arange(0, len(latents), max(1, len(latents) // 512), device=place)
    decoder.fit_coarse(latents[some].cpu().float(), truth(some)["truth"].cpu())
    decoder.to(memory_format=torch.channels_last)
    return fit(decoder, batches, losses, settings, folder, device=place, **options)


def refined_head(
    head: DenseHead, scenes: SceneSet, settings: FitSettings, folder: Path, output: Path, **options: Any
) -> None:
    """Train a decoder for a head by `train_decoder`, and write both as one head's folder.

    Args:
        head: loaded with fold=False.
        output: of the folder.
        options: of `train_decoder`.
    """
    model, outputs = head.model, 3 if head.task == "normals" else 1
    decoder = DetailDecoder.seeded(settings.seed, model, widths=REFINING_WIDTHS, outputs=outputs, coarse=True)
    trained = train_decoder(head, decoder, scenes, settings, folder, **options)
    about = json_of(head.source, HEAD_FILE)
    base = about["base"] if about.get("base") in EMBEDDED else head.base
    values: dict[str, Any] = {
        "base": base,
        "family": head.family_name,
        "task": head.task,
        "working_size": head.working_size,
    }
    extra = {name: value for name, value in about.items() if name not in values}
    extra["refined"] = {"scenes": len(scenes), "fit": asdict(settings)}

    def fill(partial: Path) -> None:
        write_head(partial, model.network.unet, context=model.network.context, extra=extra, **values)
        trained.save(partial)

    replace_folder(output, fill)
