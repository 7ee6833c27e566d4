"""Procedural scenes with exact ground truth: images, depth, normals, masks, parts, canonical coordinates, keypoints."""

from diffrep.scenes.categories import (
    CATEGORIES,
    KEYPOINT_MIRROR,
    KEYPOINTS,
    PART_CLASS_OF,
    PART_CLASSES,
    PART_ID,
    PART_MIRROR,
    PARTS,
    SEEN,
    UNSEEN,
    Part,
)
from diffrep.scenes.look import VOCABULARY
from diffrep.scenes.render import render_scene
from diffrep.scenes.scene import Scene, mirror
from diffrep.scenes.sets import SceneSet, render_set, scene_pairs, scene_seed

__all__ = [
    "CATEGORIES",
    "KEYPOINTS",
    "KEYPOINT_MIRROR",
    "PARTS",
    "PART_CLASSES",
    "PART_CLASS_OF",
    "PART_ID",
    "PART_MIRROR",
    "SEEN",
    "UNSEEN",
    "VOCABULARY",
    "Part",
    "Scene",
    "SceneSet",
    "mirror",
    "render_scene",
    "render_set",
    "scene_pairs",
    "scene_seed",
]
