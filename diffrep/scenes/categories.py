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
from pathlib import Path

import numpy as np

from diffrep.files import read_document
from diffrep.scenes import creatures, furniture, vehicles
from diffrep.scenes.build import Body, Draw
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


_DATA = read_document(Path(__file__).with_name("scenes.json"))
_BUILDERS = (  # in the order of their parts' ids
    *(creatures.dog, creatures.bird, creatures.fish, creatures.person),
    *(vehicles.car, vehicles.plane, vehicles.boat, vehicles.motorbike),
    *(furniture.chair, furniture.mug, furniture.lamp),
    *(creatures.giraffe, vehicles.truck, furniture.teapot),
)
CATEGORY: dict[str, Category] = {
    f.__name__: Category(f.__name__, f, _DATA["categories"][f.__name__], f.__name__ not in _DATA["unseen"])
    for f in _BUILDERS
}


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
    for category in CATEGORY.values():
        for name, part_class in category.parts.items():
            for side in ("left", "right") if "*" in name else ("",):
                rows.append((category.name, name.replace("*", side), part_class))
    ids = {(category, name): i for i, (category, name, _) in enumerate(rows)}
    return tuple(
        ScenePart(i, category, name, part_class, ids[category, mirrored_name(name)])
        for i, (category, name, part_class) in enumerate(rows)
    )


CATEGORIES: tuple[str, ...] = tuple(CATEGORY)
SEEN: tuple[str, ...] = tuple(c.name for c in CATEGORY.values() if c.seen)
UNSEEN: tuple[str, ...] = tuple(c.name for c in CATEGORY.values() if not c.seen)

COLOURS: Mapping[str, tuple[float, float, float]] = {name: tuple(rgb) for name, rgb in _DATA["colours"].items()}
"""Name -> RGB in [0, 1]."""

FLOORS: Mapping[str, tuple[str, ...]] = {name: tuple(colours) for name, colours in _DATA["floors"].items()}
"""Kind of floor -> the colours that it may have."""

PARTS: tuple[ScenePart, ...] = _parts()
PART_ID: dict[tuple[str, str], int] = {(p.category, p.name): p.id for p in PARTS}
PART_CLASSES: tuple[str, ...] = tuple(dict.fromkeys(p.part_class for p in PARTS))

PART_CLASS_OF: Array = np.array([PART_CLASSES.index(p.part_class) for p in PARTS], dtype=np.uint8)
"""(number of parts,): part id -> index into `PART_CLASSES`; 0 stays 0."""

PART_MIRROR: Array = np.array([p.mirror for p in PARTS], dtype=np.uint8)
"""(number of parts,): part id -> id of the part in a mirror."""

KEYPOINTS: dict[str, tuple[str, ...]] = {c.name: c.keypoint_names for c in CATEGORY.values()}
KEYPOINT_MIRROR: dict[str, tuple[int, ...]] = {c.name: c.mirrored_keypoints for c in CATEGORY.values()}


def build(category: str, rng: np.random.Generator) -> tuple[Body, Body]:
    """A random object of a category and its template, primitive by primitive."""
    body = Body(Draw(rng))
    CATEGORY[category].build(body)
    template = Body(body.draw.template())
    CATEGORY[category].build(template)
    return body, template
