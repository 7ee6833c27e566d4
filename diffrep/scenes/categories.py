"""The categories, their parts and their keypoints, and what each becomes in a mirror.

Part ids are global: 0 is the background, every (category, part) has its own id. `PART_CLASSES` groups parts
that mean the same in different categories (leg, wheel, head, ...), which is what a category never seen in
training shares with those that were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diffrep.scenes import animals, furniture, vehicles
from diffrep.scenes.build import Body, Draw
from diffrep.scenes.motorbike import motorbike
from diffrep.scenes.person import person
from diffrep.scenes.shapes import Array


@dataclass(frozen=True)
class Category:
    """One kind of object.

    Attributes:
        parts: part name -> part class; "*" in a name stands for left and right.
        seen: whether it may be used in training.
    """

    name: str
    build: Callable[[Body], None]
    parts: Mapping[str, str]
    seen: bool = True

    @cached_property
    def template(self) -> Body:
        """Mean proportions, rest pose, first of every choice, no optional part."""
        body = Body(Draw(None))
        self.build(body)
        return body

    @cached_property
    def keypoint_names(self) -> tuple[str, ...]:
        """Names in the order of every scene's keypoints."""
        return tuple(sorted({k.name for k in self.template.keypoints}))

    @cached_property
    def mirrored_keypoints(self) -> tuple[int, ...]:
        """Index of the keypoint that each keypoint becomes in a mirror."""
        return tuple(self.keypoint_names.index(mirrored_name(name)) for name in self.keypoint_names)

    @cached_property
    def frame(self) -> Array:
        """(2, 3) centre and half extent of the template; lateral centre 0."""
        low, high = self.template.bounds()
        return np.stack([(low + high) / 2, (high - low) / 2])


def mirrored_name(name: str) -> str:
    """The name with left and right exchanged."""
    return re.sub(r"\b(left|right)\b", lambda m: "right" if m[0] == "left" else "left", name)


_ANIMAL = {
    "body": "body",
    "neck": "neck",
    "head": "head",
    "snout": "snout",
    "* ear": "ear",
    "* front leg": "leg",
    "* hind leg": "leg",
    "tail": "tail",
}
_WHEELED = {
    "body": "body",
    "windows": "window",
    "roof": "roof",
    "front * wheel": "wheel",
    "rear * wheel": "wheel",
    "* mirror": "mirror",
    "* headlight": "light",
    "* tail light": "light",
}
_TABLE = (
    Category("dog", animals.dog, _ANIMAL),
    Category(
        "bird",
        animals.bird,
        {
            "body": "body",
            "neck": "neck",
            "head": "head",
            "beak": "snout",
            "* wing": "wing",
            "* leg": "leg",
            "tail": "tail",
        },
    ),
    Category(
        "fish",
        animals.fish,
        {
            "body": "body",
            "head": "head",
            "tail": "tail",
            "dorsal fin": "fin",
            "* fin": "fin",
            "anal fin": "fin",
        },
    ),
    Category(
        "person",
        person,
        {
            "torso": "body",
            "hips": "body",
            "neck": "neck",
            "head": "head",
            "hair": "hair",
            "* arm": "arm",
            "* hand": "hand",
            "* leg": "leg",
            "* foot": "foot",
        },
    ),
    Category(
        "car",
        vehicles.car,
        {**_WHEELED, "bumper": "body", "antenna": "rod", "spoiler": "wing", "rack": "rod"},
    ),
    Category(
        "plane",
        vehicles.plane,
        {
            "body": "body",
            "windows": "window",
            "* wing": "wing",
            "* engine": "engine",
            "* tailplane": "wing",
            "fin": "fin",
            "propeller": "propeller",
            "gear": "wheel",
        },
    ),
    Category(
        "boat",
        vehicles.boat,
        {
            "hull": "body",
            "deck": "roof",
            "cabin": "body",
            "windows": "window",
            "mast": "rod",
            "sail": "sail",
            "jib": "sail",
            "rudder": "fin",
            "motor": "engine",
            "flag": "sail",
        },
    ),
    Category(
        "motorbike",
        motorbike,
        {
            "front wheel": "wheel",
            "rear wheel": "wheel",
            "front fender": "roof",
            "rear fender": "roof",
            "fork": "rod",
            "frame": "body",
            "engine": "engine",
            "tank": "body",
            "seat": "seat",
            "headlight": "light",
            "* handlebar": "handle",
            "* mirror": "mirror",
            "* exhaust": "exhaust",
        },
    ),
    Category(
        "chair",
        furniture.chair,
        {
            "seat": "seat",
            "back rest": "back rest",
            "* back post": "rod",
            "* front leg": "leg",
            "* rear leg": "leg",
            "stretcher": "rod",
            "* arm rest": "arm",
        },
    ),
    Category(
        "mug",
        furniture.mug,
        {"body": "vessel", "band": "vessel", "drink": "drink", "handle": "handle"},
    ),
    Category(
        "lamp",
        furniture.lamp,
        {
            "base": "foot",
            "joint": "joint",
            "lower arm": "rod",
            "upper arm": "rod",
            "shade": "shade",
            "bulb": "light",
        },
    ),
    Category("giraffe", animals.giraffe, {**_ANIMAL, "horns": "horn"}, seen=False),
    Category(
        "truck",
        vehicles.truck,
        {**_WHEELED, "chassis": "body", "load": "load", "exhaust": "exhaust"},
        seen=False,
    ),
    Category(
        "teapot",
        furniture.teapot,
        {"body": "vessel", "lid": "lid", "spout": "snout", "handle": "handle"},
        seen=False,
    ),
)


@dataclass(frozen=True)
class ScenePart:
    """A row of the part table: `mirror` is the id that the part becomes in a mirror."""

    id: int
    category: str
    name: str
    part_class: str
    mirror: int


def _parts() -> tuple[ScenePart, ...]:
    rows: list[tuple[str, str, str]] = [("", "background", "background")]
    for category in _TABLE:
        for name, part_class in category.parts.items():
            for side in ("left", "right") if "*" in name else ("",):
                rows.append((category.name, name.replace("*", side), part_class))
    ids = {(category, name): i for i, (category, name, _) in enumerate(rows)}
    return tuple(
        ScenePart(i, category, name, part_class, ids[category, mirrored_name(name)])
        for i, (category, name, part_class) in enumerate(rows)
    )


CATEGORY = {category.name: category for category in _TABLE}
CATEGORIES: tuple[str, ...] = tuple(CATEGORY)
SEEN: tuple[str, ...] = tuple(c.name for c in _TABLE if c.seen)
UNSEEN: tuple[str, ...] = tuple(c.name for c in _TABLE if not c.seen)

PARTS: tuple[ScenePart, ...] = _parts()
PART_ID: dict[tuple[str, str], int] = {(p.category, p.name): p.id for p in PARTS}
PART_CLASSES: tuple[str, ...] = tuple(dict.fromkeys(p.part_class for p in PARTS))

PART_CLASS_OF: Array = np.array([PART_CLASSES.index(p.part_class) for p in PARTS], dtype=np.uint8)
"""(number of parts,): part id -> index into `PART_CLASSES`; 0 stays 0."""

PART_MIRROR: Array = np.array([p.mirror for p in PARTS], dtype=np.uint8)
"""(number of parts,): part id -> id of the part in a mirror."""

KEYPOINTS: dict[str, tuple[str, ...]] = {c.name: c.keypoint_names for c in _TABLE}
KEYPOINT_MIRROR: dict[str, tuple[int, ...]] = {c.name: c.mirrored_keypoints for c in _TABLE}


def build(category: str, rng: np.random.Generator) -> tuple[Body, Body]:
    """A random object of a category and its template, primitive by primitive."""
    body = Body(Draw(rng))
    CATEGORY[category].build(body)
    template = Body(body.draw.template())
    CATEGORY[category].build(template)
    return body, template
