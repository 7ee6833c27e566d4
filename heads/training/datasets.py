"""Data sets to train one-step heads on, in the layouts in which they are released."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.files import optional_import
from diffrep.heads.families import Task
from diffrep.heads.point_cloud import Intrinsics, unproject
from diffrep.heads.training.dense_data import (
    HYPERSIM_FOCAL,
    DepthNorm,
    Sample,
    SampleSet,
    clamp_depth,
    distance_to_depth,
    face_camera,
    image_target,
    lub_normals,
    normalize_depth,
    plane_normals,
    resize_nearest,
)

SPLIT_FILE = "metadata_images_split_scene_v1.csv"
KITTI_SIZE = (352, 1216)
VKITTI_SCENES = ("Scene02", "Scene06", "Scene18", "Scene20")  # what Lotus trains on
_TURNED = (f"{angle}-deg-{side}" for angle in (15, 30) for side in ("left", "right"))
VKITTI_CONDITIONS = (*_TURNED, "clone", "fog", "morning", "overcast", "rain", "sunset")
FAR = 80.0  # metres: what is not nearer is sky
_VKITTI_CAMERA = Intrinsics(725.0087, 725.0087, 620.5, 187.0)  # of the 1242 x 375 images


def norm_of(task: Task) -> DepthNorm:
    """How depth becomes a picture by default: by quantiles of disparity or depth, as the task is."""
    return "trunc_disparity" if task == "disparity" else "truncnorm"


class Hypersim(SampleSet):
    """Hypersim as released: ``ai_VVV_NNN/images/scene_cam_XX_{final_preview,geometry_hdf5}/frame.IIII.*``.

    The images are 1024 x 768; depth is stored as distance from the camera's centre, normals in camera axes x right, y
    up, z backward, not always facing the camera.

    Args:
        root: with the scenes' folders, and the official split (``metadata_images_split_scene_v1.csv``) in it or beside
            it; without one, every frame that is there is used.
        size: (H, W) to which images are resized: Pillow's bilinear for the image, nearest for the others.
        norm: how depth becomes a picture; its range is that of all pixels.
        facing: turn normals that look away from the camera (Lotus v1-1).

    Raises:
        ValueError: the folder holds no frame of that split.
        ImportError: h5py is not installed.
    """

    name = "hypersim"

    def __init__(
        self,
        root: str | Path,
        task: Task,
        *,
        split: Literal["train", "val", "test"] = "train",
        size: tuple[int, int] = (576, 768),
        norm: DepthNorm | None = None,
        facing: bool = True,
    ) -> None:
        with optional_import('reading Hypersim needs h5py: pip install "diffrep[dense]"'):
            import h5py
        self.root, self.task, self.norm = Path(root), task, norm or norm_of(task)
        self._h5py, self.size, self.facing = h5py, size, facing
        listing = next((p for p in (self.root / SPLIT_FILE, self.root.parent / SPLIT_FILE) if p.is_file()), None)
        images = self._listed(listing, split) if listing else sorted(self.root.glob("*/images/*/frame.*.tonemap.jpg"))
        self.images = [image for image in images if self.geometry(image, "depth_meters").is_file()]
        if not self.images:
            where = f"named by {listing} as {split}" if listing else "(ai_*/images/scene_cam_*_final_preview/...)"
            raise ValueError(f"{self.root}: no frame of Hypersim with its depth {where}")

    def _listed(self, listing: Path, split: str) -> Iterator[Path]:
        """The public frames of a split."""
        with listing.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["split_partition_name"] == split and row["included_in_public_release"] == "True":
                    folder = self.root / row["scene_name"] / "images" / f"scene_{row['camera_name']}_final_preview"
                    image = folder / f"frame.{int(row['frame_id']):04d}.tonemap.jpg"
                    if image.is_file():
                        yield image

    @staticmethod
    def geometry(image: Path, what: str) -> Path:
        """Where the depth ("depth_meters") or normals ("normal_cam") of an image lie."""
        folder = image.parent.name.replace("_final_preview", "_geometry_hdf5")
        return image.parent.parent / folder / image.name.replace("tonemap.jpg", f"{what}.hdf5")

    def sample(self, index: int) -> Sample:
        """Frame number `index`. A frame with an unknown distance gives way to the next one, as Lotus leaves it out.

        Raises:
            ValueError: no frame has all distances, or a file holds something else.
        """
        for offset in range(len(self.images)):
            file = self.images[(index + offset) % len(self.images)]
            distance = self._read(self.geometry(file, "depth_meters"))
            if bool(torch.isfinite(distance).all()):
                return self._sample(file, distance)
        raise ValueError(f"{self.root}: every frame has pixels of unknown distance")

    def _sample(self, file: Path, distance: Tensor) -> Sample:
        pixels = image_target(Image.open(file).convert("RGB"), self.size)
        height, width = distance.shape
        focal = HYPERSIM_FOCAL * width / 1024  # the focal length belongs to 1024 x 768 pixels
        depth = distance_to_depth(distance, focal)
        everything = torch.ones(1, *self.size, dtype=torch.bool)
        if self.task == "normals":
            normals = lub_normals(self._read(self.geometry(file, "normal_cam")), "rub")
            if self.facing:
                normals = face_camera(normals, unproject(depth, Intrinsics(focal, focal, width / 2, height / 2)))
            normals = resize_nearest(torch.nan_to_num(normals), self.size)
            known = normals.norm(dim=0, keepdim=True) > 0.5
            return Sample(pixels, normals, everything, normals, known)
        small = resize_nearest(depth[None], self.size)
        measured = (small > 1e-5) & (small < 65)
        reference = clamp_depth(small, measured) if bool(measured.any()) else small
        return Sample(pixels, normalize_depth(small, self.norm), everything, reference, measured)

    def _read(self, file: Path) -> Tensor:
        try:
            with self._h5py.File(file, "r") as opened:
                return torch.from_numpy(np.asarray(opened["dataset"], dtype=np.float32))
        except (OSError, KeyError) as error:
            raise ValueError(f"{file}: is no geometry of Hypersim ({error})") from None


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


class VirtualKitti(SampleSet):
    """Virtual KITTI 2 as released: ``SceneXX/CONDITION/frames/{rgb,depth}/Camera_{0,1}/``, depth in centimetres.

    Normals are not released; they are fitted to the depth when an image is read.

    Args:
        root: with ``SceneXX`` folders, rgb and depth archives unpacked into the same place.

    Raises:
        ValueError: the folder holds no image with its depth.
    """

    name = "vkitti2"

    def __init__(self, root: str | Path, task: Task, *, norm: DepthNorm | None = None) -> None:
        self.root, self.task, self.norm = Path(root), task, norm or norm_of(task)
        folders = [self.root / s / c / "frames" / "rgb" for s in VKITTI_SCENES for c in VKITTI_CONDITIONS]
        files = [file for folder in folders for file in sorted(folder.glob("Camera_*/rgb_*.jpg"))]
        self.images = [file for file in files if self.depth_file(file).is_file()]
        if not self.images:
            raise ValueError(
                f"{self.root}: no image of Virtual KITTI 2 with its depth (Scene02/15-deg-left/frames/rgb/Camera_0/"
                "rgb_00000.jpg, .../depth/Camera_0/depth_00000.png)"
            )

    @staticmethod
    def depth_file(image: Path) -> Path:
        """Where the depth of an image lies."""
        name = image.name.replace("rgb_", "depth_").replace(".jpg", ".png")
        return image.parent.parent.parent / "depth" / image.parent.name / name

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
            normals, valid = map(vkitti_crop, plane_normals(depth[0], _VKITTI_CAMERA, bounds=(1e-3, FAR)))
            normals = normals.float() * valid
            return Sample(pixels, normals, valid, normals, valid)
        depth, known = vkitti_crop(depth), vkitti_crop(known)
        annotation = normalize_depth(depth, self.norm, valid=known, scene_depth=FAR)
        return Sample(pixels, annotation, known | (depth >= FAR), clamp_depth(depth, known), known)
