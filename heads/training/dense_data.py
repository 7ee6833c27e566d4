"""Images with depth or normals to train one-step heads on: what a sample is, the data sets, batches, cached latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffrep.files import read_weights, save_weights
from diffrep.heads.families import FRAME_SIGNS, Family, Frame, Task
from diffrep.heads.point_cloud import Intrinsics, unproject
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
        flipped = {name: value.flip(-1) for name, value in vars(self).items()}
        if len(self.annotation) == 3:
            flipped |= {name: mirror_normals(getattr(self, name)) for name in ("annotation", "reference")}
        return Sample(**flipped)


DepthNorm = Literal["trunc_disparity", "disparity", "truncnorm", "instnorm", "perscene_norm"]
"""How Lotus brings depth to [-1, 1]: by quantiles or extremes of disparity or depth, or by the data set's range."""

READERS = 8  # threads that read files
HYPERSIM_FOCAL = 886.81  # pixels, of the 1024 x 768 images


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
        ValueError: no valid pixel.
    """
    if norm == "perscene_norm":
        return ((depth / scene_depth - 0.5) * 2).clamp(-1, 1)
    values = 1 / depth if norm in ("trunc_disparity", "disparity") else depth
    chosen = values.flatten() if valid is None else values[valid]
    if not len(chosen):
        raise ValueError("there is no valid pixel to take the depth's range from")
    low, high = _quantiles(chosen, quantile if norm in ("trunc_disparity", "truncnorm") else 0.0)
    return (((values - low) / (high - low + 1e-5) - 0.5) * 2).clamp(-1, 1)


def clamp_depth(depth: Tensor, valid: Tensor, quantile: float = 0.02) -> Tensor:
    """Metric depth clamped to the quantiles of its valid pixels, as E2E-FT's loss takes it."""
    low, high = _quantiles(depth[valid], quantile)
    return torch.where(valid, depth.clamp(low, high), high)


def _quantiles(values: Tensor, share: float) -> tuple[float, float]:
    """The values with that share below and above them; unlike `torch.quantile` of any number of values."""
    low, high = np.quantile(values.numpy(), (share, 1 - share)).tolist()
    return low, high


def scene_depth(depth: Tensor, task: Task) -> Tensor:
    """(1, H, W) metres, inf in the sky -> disparity (1 near) or depth (1 far) in [-1, 1]."""
    known = torch.isfinite(depth)
    if task == "disparity":
        return normalize_depth(depth, "trunc_disparity", valid=known)
    return normalize_depth(depth.clamp(max=depth[known].max().item()), "truncnorm", valid=known)


def distance_to_depth(distance: Tensor, focal: float = HYPERSIM_FOCAL) -> Tensor:
    """Distance from the camera's centre (H, W) -> depth along its axis.

    The principal point is the image's centre, the focal length counts pixels of this image.
    """
    height, width = distance.shape
    y = torch.arange(height, dtype=distance.dtype) - (height - 1) / 2
    x = torch.arange(width, dtype=distance.dtype) - (width - 1) / 2
    ray = (y[:, None].square() + x[None].square() + focal**2).sqrt()
    return distance * focal / ray


def lub_normals(normals: Tensor, frame: Frame) -> Tensor:
    """Normals (..., H, W, 3) in a frame, as files hold them -> (..., 3, H, W) in LUB."""
    values = normals.float().movedim(-1, -3)
    return values * values.new_tensor(FRAME_SIGNS[frame]).view(3, 1, 1)


def mirror_normals(normals: Tensor) -> Tensor:
    """The normals of the mirrored image: (..., 3, H, W) flipped left to right, x negated."""
    return normals.flip(-1) * normals.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)


def face_camera(normals: Tensor, points: Tensor) -> Tensor:
    """Turn the normals (3, H, W) in LUB that look away from the camera (Lotus v1-1's `align_cam_normal`).

    Along the ray of a point (3, H, W) in RDF is facing the camera in LUB: the frames are each other's negative.
    """
    return torch.where((normals * points).sum(0, keepdim=True) < 0, -normals, normals)


def plane_normals(
    depth: Tensor, intrinsics: Intrinsics, *, bounds: tuple[float, float] = (1e-3, 80.0)
) -> tuple[Tensor, Tensor]:
    """Normals of the planes fitted to each pixel's neighbourhood (how Lotus made them for Virtual KITTI 2).

    The neighbourhood is a square of 5 x 5 pixels; those whose depth differs by more than 5 % of the pixel's are left
    out, and a valid normal needs four neighbours. The plane is the eigenvector of the smallest eigenvalue of the
    scatter of homogeneous points (x, y, z, 1).

    Args:
        depth: (H, W) metres; what lies outside of `bounds` is invalid.

    Returns:
        (3, H, W) unit normals facing the camera, LUB, and (1, H, W) bool where they are valid.
    """
    d = depth.double()
    points = unproject(d, intrinsics)
    known = (d > bounds[0]) & (d < bounds[1])

    def neighbours(x: Tensor) -> Tensor:  # (C, H, W) -> (C, 25, H * W), zero outside
        return F.unfold(x[:, None].double(), 5, padding=2).view(len(x), 25, -1)

    near = (neighbours(d[None]) - d.flatten()).abs() < 0.05 * d.flatten()
    used = (near & (neighbours(known[None]) > 0) & known.flatten())[0]
    stacked = neighbours(torch.cat([points, torch.ones_like(d)[None]])) * used
    scatter = torch.einsum("iwn,jwn->nij", stacked, stacked)
    plane = torch.linalg.eigh(scatter).eigenvectors[..., 0]
    normals = F.normalize(plane[:, :3], dim=-1, eps=1e-12).T.reshape(3, *depth.shape)
    valid = known & (used.sum(0) - 1 >= 4).view(depth.shape)
    return face_camera(normals, points), valid[None]


def image_target(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB image resized to (H, W) as Lotus does, bilinear by Pillow: (3, H, W) in [-1, 1]."""
    resized = image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth or normals (C, H, W) at another size, no value mixed with its neighbours."""
    return F.interpolate(values[None], size=size, mode="nearest")[0]


class SampleSet(ABC):
    """A data set to train on; all samples have one size.

    Attributes:
        name: of the data set.
        task: what its samples annotate.
        images: all of them, or their files.
    """

    name: str
    task: Task
    images: Any

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Image number `index` with its annotation."""


class SceneSamples(SampleSet):
    """Rendered scenes. The sky counts: it is infinitely far for disparity, and has the normal zero."""

    name = "scenes"

    def __init__(self, scenes: SceneSet, task: Task) -> None:
        self.scenes, self.task, self.images = scenes, task, scenes.image

    def sample(self, index: int) -> Sample:
        pixels = torch.from_numpy(np.array(self.scenes.image[index])).permute(2, 0, 1).float() / 127.5 - 1
        depth = torch.from_numpy(np.array(self.scenes.depth[index])).float()[None]
        known = torch.isfinite(depth)
        everything = torch.ones_like(known)
        if self.task == "normals":
            stored = torch.from_numpy(np.array(self.scenes.normals[index]))
            normals = F.normalize(lub_normals(stored, "rdf"), dim=0)
            return Sample(pixels, normals, everything, normals, known)
        return Sample(pixels, scene_depth(depth, self.task), everything, clamp_depth(depth, known), known)


def sample_batches(
    sets: Sequence[SampleSet],
    shares: Sequence[float],
    recipe: Family,
    *,
    batch_size: int,
    latent_channels: int,
    stride: int,
) -> Callable[[torch.Generator], Batch]:
    """Batches of samples of one set each, the set drawn with these shares; every second one mirrored.

    Raises:
        ValueError: not one share per set, or an empty set.
    """
    if len(sets) != len(shares) or not sets:
        raise ValueError(f"each data set needs a share, got {len(sets)} sets and {len(shares)} shares")
    if empty := [one.name for one in sets if not len(one)]:
        raise ValueError(f"no image to train on in {', '.join(empty)}")
    weights = torch.tensor(shares, dtype=torch.float64)
    pool = ThreadPoolExecutor(READERS)

    def batches(generator: torch.Generator) -> Batch:
        chosen = sets[int(torch.multinomial(weights, 1, generator=generator))]
        indices = torch.randint(len(chosen), (batch_size,), generator=generator).tolist()
        mirrored = (torch.rand(batch_size, generator=generator) < 0.5).tolist()
        read = pool.map(chosen.sample, indices)
        rows = [vars(one.mirrored() if flip else one) for one, flip in zip(read, mirrored, strict=True)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        height, width = batch["pixels"].shape[-2:]
        return batch | draw_rows(batch_size, recipe, (latent_channels, height // stride, width // stride), generator)

    return batches


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
        chosen = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
        drawn = draw_rows(batch_size, recipe, tuple(images.shape[1:]), generator)
        rebuilt = chosen[: len(drawn["timesteps"]) - batch_size]
        return {
            **drawn,
            "images": torch.cat([images[chosen], images[rebuilt]]).float(),
            # targets of several heads have more channels than images, of which none are rebuilt then
            "targets": (torch.cat([targets[chosen], images[rebuilt]]) if len(rebuilt) else targets[chosen]).float(),
            "mask": torch.ones(batch_size, 1, *images.shape[-2:], dtype=torch.bool),
        }

    return batches


def cached_latents(
    file: Path, encode: Callable[[range], Mapping[str, Tensor]], count: int, *, made_with: str, progress: bool = True
) -> dict[str, Tensor]:
    """Latents of `count` images, encoded once, 64 at a time, and stored in a file as float16.

    Args:
        encode: numbers of images to their latents by name.
        made_with: all that the latents depend on; a file made with something else is refused.

    Raises:
        ValueError: the file holds other latents.
    """
    if not file.exists():
        chunks: dict[str, list[Tensor]] = {}
        for start in tqdm(range(0, count, 64), desc="encoding", unit="batch", disable=not progress):
            for name, latents in encode(range(start, min(start + 64, count))).items():
                chunks.setdefault(name, []).append(latents.half().cpu())
        save_weights(file, {name: torch.cat(parts) for name, parts in chunks.items()}, made_with=made_with)
    stored, metadata = read_weights(file)
    if (existing := metadata.get("made_with")) != made_with:
        raise ValueError(f"{file}: holds latents of {existing}, not of {made_with}; choose another folder or delete it")
    return stored


@torch.no_grad()
def cache_latents(
    vae: Any, samples: SampleSet, task: Task, folder: Path, *, made_with: str, progress: bool = True
) -> dict[str, Tensor]:
    """Posterior means of all images and annotations, encoded once and stored in a folder.

    Heads trained in one folder share the images' latents.

    Args:
        made_with: what the latents depend on beside the samples (the base model).

    Returns:
        "images" and "targets", float16 (N, c, h, w), times the scaling factor.

    Raises:
        ValueError: the folder holds latents of another base model or number of images.
    """
    device = next(vae.parameters()).device
    latents: dict[str, Tensor] = {}
    for name, part, stem in (("images", "pixels", "images"), ("targets", "annotation", task)):

        def encode(rows: range, name: str = name, part: str = part) -> dict[str, Tensor]:
            pictures = torch.stack([getattr(samples.sample(row), part).expand(3, -1, -1) for row in rows])
            with torch.autocast(device.type, dtype=torch.bfloat16):
                mean = vae.encode(pictures.to(device)).latent_dist.mean
            return {name: mean.float() * vae.config.scaling_factor}

        note = f"{made_with}, {len(samples)} {samples.name}"
        file = folder / f"latents-{stem}.safetensors"
        latents |= cached_latents(file, encode, len(samples), made_with=note, progress=progress)
    return latents
