"""Procedural scenes with exact ground truth.

`render_scene` draws one object of a category with depth, normals, mask, parts, canonical coordinates and
named keypoints; `render_set` draws many to disk; `scene_pairs` chooses pairs for matching.
"""

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
    ScenePart,
)
from diffrep.scenes.look import VOCABULARY
from diffrep.scenes.render import Scene, mirror, render_scene
from diffrep.scenes.sets import (
    SceneSet,
    held_out_pair,
    open_or_render,
    render_set,
    scene_pairs,
    scene_seed,
    shared_keypoints,
)

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
    "Scene",
    "ScenePart",
    "SceneSet",
    "held_out_pair",
    "mirror",
    "open_or_render",
    "render_scene",
    "render_set",
    "scene_pairs",
    "scene_seed",
    "shared_keypoints",
]
