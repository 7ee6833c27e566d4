"""Images with depth or normals to train one-step heads on: what a sample is, batches of them, cached latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from diffrep.files import save_weights
from diffrep.heads.families import Family, Task
from diffrep.heads.training.dense import draw_rows
from diffrep.scenes import SceneSet
from diffrep.training.loop import Batch


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
    recipe: Family,
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
    latents: Mapping[str, Tensor], recipe: Family, *, batch_size: int
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


DepthNorm = Literal["trunc_disparity", "disparity", "truncnorm", "instnorm", "perscene_norm"]
"""How Lotus brings depth to [-1, 1]: by quantiles or extremes of disparity or depth, or by the data set's range."""

HYPERSIM_FOCAL = 886.81  # pixels, of the 1024 x 768 images
RUB_TO_LUB = (-1.0, 1.0, 1.0)
RDF_TO_LUB = (-1.0, -1.0, -1.0)


def normalize_depth(
    depth: Tensor,
    norm: DepthNorm = "trunc_disparity",
    *,
    valid: Tensor | None = None,
    quantile: float = 0.02,
    scene_depth: float = 65.0,
) -> Tensor:
    """Depth as a picture in [-1, 1].

    Args:
        depth: (1, H, W) metres, positive; may be infinite in the sky for the norms of disparity.
        valid: (1, H, W) bool, the pixels from which the range is taken; None takes all.
        quantile: share of pixels cut off at each end by the truncated norms.
        scene_depth: metres that "perscene_norm" divides by.

    Returns:
        (1, H, W). The norms of disparity give 1 where near, the others -1.

    Raises:
        ValueError: no valid pixel, or no such norm.
    """
    if norm == "perscene_norm":
        return ((depth / scene_depth - 0.5) * 2).clamp(-1, 1)
    values = 1 / depth if norm in ("trunc_disparity", "disparity") else depth
    chosen = values.flatten() if valid is None else values[valid]
    if not len(chosen):
        raise ValueError("there is no valid pixel to take the depth's range from")
    if norm in ("trunc_disparity", "truncnorm"):
        low, high = (_quantile(chosen, q) for q in (quantile, 1 - quantile))
    elif norm in ("disparity", "instnorm"):
        low, high = chosen.min(), chosen.max()
    else:
        raise ValueError(f"there is no depth norm {norm!r}")
    return (((values - low) / (high - low + 1e-5) - 0.5) * 2).clamp(-1, 1)


def _quantile(values: Tensor, share: float) -> Tensor:
    """`torch.quantile` without its limit of 2^24 values."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


def distance_to_depth(distance: Tensor, focal: float = HYPERSIM_FOCAL) -> Tensor:
    """Distance from the camera's centre -> depth along its axis, for a principal point at the image's centre.

    Args:
        distance: (H, W) metres.
        focal: pixels of this image.
    """
    height, width = distance.shape
    y = torch.arange(height, dtype=distance.dtype) - (height - 1) / 2
    x = torch.arange(width, dtype=distance.dtype) - (width - 1) / 2
    ray = (y[:, None].square() + x[None].square() + focal**2).sqrt()
    return distance * focal / ray


def camera_points(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Points K^-1 (x, y, 1) depth of the pixels, x right, y down, z forward.

    Args:
        depth: (H, W) metres; intrinsics: (3, 3) pixels; pixel (0, 0) is at (0, 0).

    Returns:
        (3, H, W).
    """
    height, width = depth.shape
    y, x = torch.meshgrid(
        torch.arange(height, dtype=depth.dtype), torch.arange(width, dtype=depth.dtype), indexing="ij"
    )
    rays = torch.einsum("ij,jhw->ihw", torch.linalg.inv(intrinsics.to(depth.dtype)), torch.stack([x, y, x * 0 + 1]))
    return rays * depth


def face_camera(normals: Tensor, points: Tensor) -> Tensor:
    """Turn the normals that look away from the camera (Lotus v1-1's `align_cam_normal`).

    Args:
        normals: (3, H, W) in LUB; points: (3, H, W) in RDF.
    """
    away = (normals * points).sum(0, keepdim=True) < 0
    return torch.where(away, -normals, normals)


def mirror_normals(normals: Tensor) -> Tensor:
    """The normals of the mirrored image: (..., 3, H, W) flipped left to right, x negated."""
    return normals.flip(-1) * normals.new_tensor(RUB_TO_LUB).view(3, 1, 1)


def normals_from_depth(
    depth: Tensor,
    intrinsics: Tensor,
    *,
    bounds: tuple[float, float] = (1e-3, 80.0),
    window: int = 5,
    tolerance: float = 0.05,
    least: int = 4,
) -> tuple[Tensor, Tensor]:
    """Normals of the planes fitted to each pixel's neighbourhood (how Lotus made them for Virtual KITTI 2).

    The plane is the eigenvector of the smallest eigenvalue of the scatter of homogeneous points (x, y, z, 1).

    Args:
        depth: (H, W) metres; intrinsics: (3, 3) pixels.
        bounds: metres; depths outside are invalid.
        window: pixels a side of the neighbourhood.
        tolerance: neighbours whose depth differs by more than this share of the pixel's are left out.
        least: neighbours, the pixel itself not counted, that a valid normal needs.

    Returns:
        (3, H, W) unit normals facing the camera, LUB, and (1, H, W) bool where they are valid.
    """
    height, width = depth.shape
    d = depth.double()
    points = camera_points(d, intrinsics)
    known = (d > bounds[0]) & (d < bounds[1])
    rows = torch.cat([points, torch.ones_like(d)[None]])
    radius = window // 2

    def neighbours(x: Tensor) -> Tensor:  # (C, H, W) -> (C, window^2, H * W), zero outside
        return F.unfold(x[:, None].double(), window, padding=radius).view(len(x), window**2, -1)

    near = (neighbours(d[None]) - d.flatten()).abs() < tolerance * d.flatten()
    used = (near & (neighbours(known[None]) > 0) & known.flatten())[0]
    stacked = neighbours(rows) * used
    scatter = torch.einsum("iwn,jwn->nij", stacked, stacked)
    plane = torch.linalg.eigh(scatter).eigenvectors[..., 0]
    normal = F.normalize(plane[:, :3], dim=-1, eps=1e-12).T.reshape(3, height, width)
    # along the pixel's ray in RDF is facing the camera in LUB: the two frames are each other's negative
    normal = torch.where((normal * points).sum(0) < 0, -normal, normal)
    valid = known & (used.sum(0) - 1 >= least).view(height, width)
    return normal, valid[None]


def hypersim_normals(normals: Tensor) -> Tensor:
    """Hypersim's ``normal_cam``, (H, W, 3) in RUB -> (3, H, W) in LUB."""
    return normals.movedim(-1, 0) * normals.new_tensor(RUB_TO_LUB).view(3, 1, 1)


def image_target(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB image resized to (H, W) as Lotus does, bilinear by Pillow: (3, H, W) in [-1, 1]."""
    resized = image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth or normals (C, H, W) at another size, no value mixed with its neighbours."""
    return F.interpolate(values[None], size=size, mode="nearest")[0]
