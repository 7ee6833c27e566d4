"""What a rendered scene holds, and its mirror image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from diffrep.scenes.categories import KEYPOINT_MIRROR, PART_MIRROR
from diffrep.scenes.shapes import Array


@dataclass(frozen=True, eq=False)
class Scene:
    """One rendered object with exact labels: colour is supersampled, labels are those of pixel centres.

    Points are (x, y) in pixels, (0, 0) the centre of the first. Camera axes: x right, y down, z forward.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        depth: (H, W) float32, metres along the optical axis; inf in the sky.
        normals: (H, W, 3) float32, unit normals in camera axes (z < 0 where visible); 0 in the sky.
        mask: (H, W) bool, the object.
        edge: (H, W) bool, pixels of the object with a 4-neighbour outside it.
        part: (H, W) uint8, index into `PARTS`, 0 outside the object.
        canonical: (H, W, 3) float32 in [-1, 1]: the surface point's place in the category's template, x to
            the object's left, y up, z to its front; 0 outside the object.
        keypoint_names: the category's N keypoints, in an order that is the same in all its scenes.
        keypoints: (N, 2) float32.
        visible: (N,) bool: in the frame, on the surface that the pixel shows, and of its part.
        box: edges x0, y0, x1, y1 of the mask; x1 - x0 is its width in pixels.
        intrinsics: fx, fy, cx, cy in pixels.
    """

    image: Array
    depth: Array
    normals: Array
    mask: Array
    edge: Array
    part: Array
    canonical: Array
    keypoint_names: tuple[str, ...]
    keypoints: Array
    visible: Array
    category: str
    caption: str
    attributes: Mapping[str, str]
    box: tuple[float, float, float, float]
    intrinsics: tuple[float, float, float, float]
    seed: int


def mirror(scene: Scene) -> Scene:
    """The scene seen in a mirror, which is again a valid scene: what was left of the object is now right.

    Part ids and keypoints change sides, the lateral canonical axis and the normals' x change sign.
    """
    width = scene.image.shape[1]
    order = list(KEYPOINT_MIRROR[scene.category])
    keypoints = scene.keypoints[order].copy()
    keypoints[:, 0] = width - 1 - keypoints[:, 0]
    flip = np.array([-1, 1, 1], dtype=np.float32)
    x0, y0, x1, y1 = scene.box
    fx, fy, cx, cy = scene.intrinsics
    return replace(
        scene,
        image=np.ascontiguousarray(scene.image[:, ::-1]),
        depth=np.ascontiguousarray(scene.depth[:, ::-1]),
        normals=scene.normals[:, ::-1] * flip,
        mask=np.ascontiguousarray(scene.mask[:, ::-1]),
        edge=np.ascontiguousarray(scene.edge[:, ::-1]),
        part=PART_MIRROR[scene.part[:, ::-1]],
        canonical=scene.canonical[:, ::-1] * flip,
        keypoints=keypoints,
        visible=scene.visible[order],
        box=(width - 1 - x1, y0, width - 1 - x0, y1),
        intrinsics=(fx, fy, width - 1 - cx, cy),
    )
