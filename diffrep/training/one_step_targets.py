"""What a one-step head is trained to draw: normalised depth, re-oriented normals, and normals from depth.

Normals are in camera axes x left, y up, z towards the camera ("LUB", Lotus and DSINE): a wall that faces the camera
is (0, 0, 1). Camera points are x right, y down, z forward ("RDF").
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

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
