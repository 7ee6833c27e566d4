"""Hypersim as released: ``ai_VVV_NNN/images/scene_cam_XX_{final_preview,geometry_hdf5}/frame.IIII.*``.

The images are 1024 x 768; depth is stored as distance from the camera's centre, normals in camera axes x right, y up,
z backward, not always facing the camera.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.heads.families import Task
from diffrep.heads.training.dense_data import (
    HYPERSIM_FOCAL,
    DepthNorm,
    Sample,
    camera_points,
    clamp_depth,
    distance_to_depth,
    face_camera,
    hypersim_normals,
    image_target,
    normalize_depth,
    resize_nearest,
)

SPLIT_FILE = "metadata_images_split_scene_v1.csv"


class Hypersim:
    """Hypersim, for depth, disparity or normals.

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
        self._h5py = _import_h5py()
        self.root, self.task, self.size, self.facing = Path(root), task, size, facing
        self.norm: DepthNorm = norm or ("trunc_disparity" if task == "disparity" else "truncnorm")
        listing = next((p for p in (self.root / SPLIT_FILE, self.root.parent / SPLIT_FILE) if p.is_file()), None)
        images = self._listed(listing, split) if listing else sorted(self.root.glob("*/images/*/frame.*.tonemap.jpg"))
        self.images = [image for image in images if self.geometry(image, "depth_meters").is_file()]
        if not self.images:
            where = f"named by {listing} as {split}" if listing else "(ai_*/images/scene_cam_*_final_preview/...)"
            raise ValueError(f"{self.root}: no frame of Hypersim with its depth {where}")

    def _listed(self, listing: Path, split: str) -> list[Path]:
        """Public frames of a split that are there."""
        with listing.open(newline="") as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if row["split_partition_name"] == split and row["included_in_public_release"] == "True"
            ]
        files = [
            self.root / row["scene_name"] / "images" / f"scene_{row['camera_name']}_final_preview"
            / f"frame.{int(row['frame_id']):04d}.tonemap.jpg"
            for row in rows
        ]  # fmt: skip
        return [file for file in files if file.is_file()]

    @staticmethod
    def geometry(image: Path, what: str) -> Path:
        """Where the depth ("depth_meters") or normals ("normal_cam") of an image lie."""
        folder = image.parent.name.replace("_final_preview", "_geometry_hdf5")
        return image.parent.parent / folder / image.name.replace("tonemap.jpg", f"{what}.hdf5")

    def __len__(self) -> int:
        return len(self.images)

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
        # the focal length belongs to 1024 x 768 pixels
        depth = distance_to_depth(distance, HYPERSIM_FOCAL * distance.shape[1] / 1024)
        everything = torch.ones(1, *self.size, dtype=torch.bool)
        if self.task == "normals":
            normals = hypersim_normals(self._read(self.geometry(file, "normal_cam")))
            if self.facing:
                height, width = depth.shape
                focal = HYPERSIM_FOCAL * width / 1024
                intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
                normals = face_camera(normals, camera_points(depth, intrinsics))
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


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise ImportError('reading Hypersim needs h5py: pip install "diffrep[dense]"') from None
    return h5py
