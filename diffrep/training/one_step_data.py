"""Images with depth or normals to train one-step heads on: what a sample is, batches of them, cached latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from diffrep.scenes import SceneSet
from diffrep.training.loop import Batch, save_weights
from diffrep.training.one_step import OneStepRecipe, Task, draw_rows
from diffrep.training.one_step_targets import RDF_TO_LUB, mirror_normals, normalize_depth


@dataclass(frozen=True)
class Sample:
    """One image with its annotation.

    Attributes:
        pixels: (3, H, W) in [-1, 1].
        annotation: (1, H, W) normalised depth or disparity, or (3, H, W) normals in LUB, in [-1, 1].
        valid: (1, H, W) bool, the pixels that the latent loss counts.
        reference: (1, H, W) metres, clamped to the quantiles, or the normals: what the decoded loss compares with.
        measured: (1, H, W) bool, the pixels that the decoded loss counts.
    """

    pixels: Tensor
    annotation: Tensor
    valid: Tensor
    reference: Tensor
    measured: Tensor

    def mirrored(self) -> Sample:
        """The sample seen in a mirror."""

        def flip(x: Tensor) -> Tensor:
            return mirror_normals(x) if len(x) == 3 else x.flip(-1)

        return Sample(
            self.pixels.flip(-1), flip(self.annotation), self.valid.flip(-1), flip(self.reference),
            self.measured.flip(-1),
        )  # fmt: skip


class AnnotatedImages(Protocol):
    """A data set to train on; all samples have one size."""

    name: str

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


def sample_batches(
    sets: Sequence[AnnotatedImages],
    shares: Sequence[float],
    recipe: OneStepRecipe,
    *,
    batch_size: int,
    latent_channels: int,
    stride: int,
    workers: int = 8,
) -> Callable[[torch.Generator], Batch]:
    """Batches of samples of one set each, the set drawn with these shares; every second one mirrored.

    Args:
        workers: threads that read files.

    Raises:
        ValueError: not one share per set, or an empty set.
    """
    if len(sets) != len(shares) or not sets:
        raise ValueError(f"each data set needs a share, got {len(sets)} sets and {len(shares)} shares")
    if empty := [one.name for one in sets if not len(one)]:
        raise ValueError(f"no image to train on in {', '.join(empty)}")
    weights = torch.tensor(shares, dtype=torch.float64)
    pool = ThreadPoolExecutor(workers)

    def batches(generator: torch.Generator) -> Batch:
        chosen = sets[int(torch.multinomial(weights, 1, generator=generator))]
        indices = torch.randint(len(chosen), (batch_size,), generator=generator).tolist()
        mirrored = (torch.rand(batch_size, generator=generator) < 0.5).tolist()
        read = list(pool.map(chosen.sample, indices))
        samples = [one.mirrored() if flip else one for one, flip in zip(read, mirrored, strict=True)]
        batch = {
            name: torch.stack([getattr(one, name) for one in samples])
            for name in ("pixels", "annotation", "valid", "reference", "measured")
        }
        height, width = batch["pixels"].shape[-2:]
        shape = (latent_channels, height // stride, width // stride)
        return {**batch, **draw_rows(batch_size, recipe, shape, generator)}

    return batches


class SceneSamples:
    """Rendered scenes. The sky counts: it is infinitely far for disparity, and has the normal zero."""

    name = "scenes"

    def __init__(self, scenes: SceneSet, task: Task) -> None:
        self.scenes, self.task = scenes, task

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, index: int) -> Sample:
        """Scene number `index`."""
        pixels = torch.from_numpy(np.array(self.scenes.image[index])).permute(2, 0, 1).float() / 127.5 - 1
        depth = torch.from_numpy(np.array(self.scenes.depth[index])).float()[None]
        known = torch.isfinite(depth)
        everything = torch.ones_like(known)
        if self.task == "normals":
            normals = scene_normals(torch.from_numpy(np.array(self.scenes.normals[index])))
            return Sample(pixels, normals, everything, normals, known)
        return Sample(pixels, scene_depth(depth, self.task), everything, clamp_depth(depth, known), known)


def scene_normals(normals: Tensor) -> Tensor:
    """int8 (..., H, W, 3) of a `SceneSet`, RDF -> (..., 3, H, W) unit normals in LUB, zero in the sky."""
    values = normals.float().movedim(-1, -3) * torch.tensor(RDF_TO_LUB).view(3, 1, 1)
    return torch.nn.functional.normalize(values, dim=-3)


def scene_depth(depth: Tensor, task: Task) -> Tensor:
    """(1, H, W) metres, inf in the sky -> disparity (1 near) or depth (1 far) in [-1, 1]."""
    known = torch.isfinite(depth)
    if task == "disparity":
        return normalize_depth(depth, "trunc_disparity", valid=known)
    return normalize_depth(depth.clamp(max=depth[known].max().item()), "truncnorm", valid=known)


def clamp_depth(depth: Tensor, valid: Tensor, quantile: float = 0.02) -> Tensor:
    """Metric depth clamped to the quantiles of its valid pixels, as E2E-FT's loss takes it."""
    low, high = torch.quantile(depth[valid], torch.tensor([quantile, 1 - quantile])).tolist()
    return torch.where(valid, depth.clamp(low, high), high)


@torch.no_grad()
def cache_latents(
    vae: Any, samples: AnnotatedImages, task: Task, folder: Path, *, made_with: str, progress: bool = True
) -> dict[str, Tensor]:
    """Posterior means of all images and annotations, encoded once and kept in a folder.

    Heads trained in one folder share the images' latents.

    Args:
        made_with: what the latents depend on (the base model); a file made with something else is refused.

    Returns:
        "images" and "targets", float16 (N, c, h, w), times the scaling factor.

    Raises:
        ValueError: the folder holds latents of another base model or number of images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, part in (("images", "pixels"), ("targets", "annotation")):
        file = folder / f"latents-{'images' if name == 'images' else task}.safetensors"
        note = f"{made_with}, {len(samples)} {samples.name}"
        if not file.exists():
            save_weights(file, {name: _encoded(vae, samples, part, progress)}, made_with=note)
        with safe_open(file, "pt") as opened:
            kept = (opened.metadata() or {}).get("made_with")
        if kept != note:
            raise ValueError(f"{file}: holds latents of {kept}, not of {note}; choose another folder or delete it")
        found |= load_file(file)
    return found


def _encoded(vae: Any, samples: AnnotatedImages, part: str, progress: bool) -> Tensor:
    device, chunks = next(vae.parameters()).device, []
    bar = tqdm(range(0, len(samples), 64), desc=f"encoding {part}", unit="batch", disable=not progress)
    for start in bar:
        chosen = [getattr(samples.sample(i), part) for i in range(start, min(start + 64, len(samples)))]
        pictures = torch.stack([x.expand(3, -1, -1) for x in chosen]).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mean = vae.encode(pictures).latent_dist.mean
        chunks.append((mean.float() * vae.config.scaling_factor).half().cpu())
    return torch.cat(chunks)


def latent_batches(
    latents: Mapping[str, Tensor], recipe: OneStepRecipe, *, batch_size: int
) -> Callable[[torch.Generator], Batch]:
    """Batches of cached latents, all cells counting.

    Raises:
        ValueError: the recipe wants posterior samples or a decoded loss, for which the images are needed.
    """
    if recipe.posterior != "mean" or recipe.loss != "latent":
        raise ValueError("cached latents go with posterior='mean' and loss='latent'")
    images, targets = latents["images"], latents["targets"]

    def batches(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        drawn = draw_rows(batch_size, recipe, tuple(images.shape[1:]), generator)
        rebuilt = chosen[: len(drawn["timesteps"]) - batch_size]
        return {
            **drawn,
            "images": torch.cat([images[chosen], images[rebuilt]]).float(),
            "targets": torch.cat([targets[chosen], images[rebuilt]]).float(),
            "mask": torch.ones(batch_size, 1, *images.shape[-2:], dtype=torch.bool),
        }

    return batches
