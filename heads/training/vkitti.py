"""Virtual KITTI 2 as released: ``SceneXX/CONDITION/frames/{rgb,depth}/Camera_{0,1}/``, depth in centimetres.

Normals are not released; they are fitted to the depth when an image is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.heads.families import Task
from diffrep.heads.training.dense_data import (
    DepthNorm,
    Sample,
    clamp_depth,
    image_target,
    normalize_depth,
    normals_from_depth,
)

KITTI_SIZE = (352, 1216)
VKITTI_SCENES = ("Scene02", "Scene06", "Scene18", "Scene20")  # what Lotus trains on
VKITTI_CONDITIONS = (
    "15-deg-left", "15-deg-right", "30-deg-left", "30-deg-right", "clone", "fog", "morning", "overcast", "rain",
    "sunset",
)  # fmt: skip
FAR = 80.0  # metres: what is not nearer is sky
_INTRINSICS = torch.tensor([[725.0087, 0, 620.5], [0, 725.0087, 187.0], [0, 0, 1]])  # of the 1242 x 375 images


def kitti_crop(height: int, width: int) -> tuple[int, int]:
    """Top and left edge of the KITTI benchmark crop of 352 x 1216 pixels: at the bottom, centred.

    Raises:
        ValueError: the image is smaller than the crop.
    """
    if height < KITTI_SIZE[0] or width < KITTI_SIZE[1]:
        raise ValueError(f"the KITTI crop of {KITTI_SIZE[1]} x {KITTI_SIZE[0]} pixels does not fit {width} x {height}")
    return height - KITTI_SIZE[0], (width - KITTI_SIZE[1]) // 2


def vkitti_crop(values: Tensor) -> Tensor:
    """The training crop of (C, H, W): the KITTI benchmark crop."""
    top, left = kitti_crop(int(values.shape[-2]), int(values.shape[-1]))
    return values[..., top : top + KITTI_SIZE[0], left : left + KITTI_SIZE[1]]


class VirtualKitti:
    """Virtual KITTI 2, for depth, disparity or normals.

    Args:
        root: with ``SceneXX`` folders, rgb and depth archives unpacked into the same place.
        norm: how depth becomes a picture.

    Raises:
        ValueError: the folder holds no image with its depth.
    """

    name = "vkitti2"

    def __init__(
        self,
        root: str | Path,
        task: Task,
        *,
        norm: DepthNorm | None = None,
        scenes: Sequence[str] = VKITTI_SCENES,
        conditions: Sequence[str] = VKITTI_CONDITIONS,
    ) -> None:
        self.root, self.task = Path(root), task
        self.norm: DepthNorm = norm or ("trunc_disparity" if task == "disparity" else "truncnorm")
        self.images = [
            file
            for scene in scenes
            for condition in conditions
            for file in sorted((self.root / scene / condition / "frames" / "rgb").glob("Camera_*/rgb_*.jpg"))
            if self.depth_file(file).is_file()
        ]
        if not self.images:
            raise ValueError(
                f"{self.root}: no image of Virtual KITTI 2 with its depth"
                f" ({scenes[0]}/{conditions[0]}/frames/rgb/Camera_0/rgb_00000.jpg, .../depth/Camera_0/depth_00000.png)"
            )

    @staticmethod
    def depth_file(image: Path) -> Path:
        """Where the depth of an image lies."""
        name = image.name.replace("rgb_", "depth_").replace(".jpg", ".png")
        return image.parent.parent.parent / "depth" / image.parent.name / name

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int) -> Sample:
        """Image number `index`, cropped.

        The sky, which is all that is not nearer than 80 m, counts for depth and not for normals.

        Raises:
            ValueError: no pixel is nearer than 80 m, or a file cannot be decoded.
        """
        file = self.images[index]
        picture = Image.open(file).convert("RGB")
        depth = torch.from_numpy(np.asarray(Image.open(self.depth_file(file))).astype(np.float32))[None] / 100
        size = (int(depth.shape[1]), int(depth.shape[2]))
        if picture.size != size[::-1]:
            raise ValueError(f"{file}: is {picture.width} x {picture.height}, its depth {size[1]} x {size[0]}")
        known = (depth > 1e-5) & (depth < FAR)
        if not bool(known.any()):
            raise ValueError(f"{file}: nothing in it is nearer than {FAR:g} m")
        pixels = vkitti_crop(image_target(picture, size))
        if self.task == "normals":
            normals, valid = normals_from_depth(depth[0], _INTRINSICS, bounds=(1e-3, FAR))
            normals, valid = vkitti_crop(normals.float()), vkitti_crop(valid)
            normals = normals * valid
            return Sample(pixels, normals, valid, normals, valid)
        depth, known = vkitti_crop(depth), vkitti_crop(known)
        picture_of_depth = normalize_depth(depth, self.norm, valid=known, scene_depth=FAR)
        counted = known | (depth >= FAR)
        return Sample(pixels, picture_of_depth, counted, clamp_depth(depth, known), known)
