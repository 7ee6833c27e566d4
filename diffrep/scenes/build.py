"""Building one object: parts placed in the object's frame, keypoints on their surfaces, a template beside it.

Object frame: x to the object's own left, y up, z to its front; metres, the ground at y = 0.

A category is a function that builds an object from draws. It is called twice: once with random draws, once
with the middle of every range (the template: mean proportions, rest pose) and the same discrete choices.
Primitive number i of both is the same piece of the same part, so a surface point's local coordinates carry
over, and the template's frame gives the canonical coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np

from diffrep.scenes.shapes import Array, Ball, Shape, Tube, block, cross

T = TypeVar("T")
Vector: TypeAlias = "Sequence[float] | np.ndarray"
Points: TypeAlias = "Mapping[str, Vector]"

SIDES = ((1.0, "left"), (-1.0, "right"))
NO_POINTS: Points = {}


@dataclass(frozen=True, eq=False)
class Primitive:
    """A shape placed by point = linear @ local + centre, with its part and its paint by name."""

    shape: Shape
    linear: Array  # (3, 3)
    centre: Array  # (3,)
    part: str
    paint: str
    rest: tuple[Array, Array] | None = None  # linear and centre in the rest pose, where that is another one

    @property
    def resting(self) -> tuple[Array, Array]:
        """Linear map and centre in the rest pose."""
        return self.rest or (self.linear, self.centre)

    def at(self, local: Vector) -> Array:
        """World point (3,) of a local one."""
        return self.linear @ np.asarray(local, dtype=float) + self.centre

    def faces(self, local: Vector) -> Array:
        """Unit outward normals (k, 3) in the world of the faces that meet at a local surface point."""
        normals = self.shape.faces(np.asarray(local, dtype=float)) @ np.linalg.inv(self.linear)
        return normals / np.linalg.norm(normals, axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Keypoint:
    """A named point on the surface of one primitive."""

    name: str
    primitive: Primitive
    local: tuple[float, float, float]


class Draw:
    """Random draws of one object that can be replayed as its template."""

    def __init__(self, rng: np.random.Generator | None, chosen: list[int] | None = None) -> None:
        self._rng = rng
        self._chosen = [] if chosen is None else list(chosen)
        self.chosen: list[int] = []

    def between(self, low: float, high: float) -> float:
        """A uniform number; the middle in a template."""
        return (low + high) / 2 if self._rng is None else float(self._rng.uniform(low, high))

    def angle(self, spread: float, rest: float = 0.0) -> float:
        """A joint angle in radians, `rest` +- `spread` given in degrees."""
        return np.radians(self.between(rest - spread, rest + spread))

    def form(self, value: float, mean: float) -> float:
        """A value that a discrete choice fixed; `mean` in a template, which knows no such choice."""
        return mean if self._rng is None else value

    def choice(self, options: Sequence[T]) -> T:
        """One of the options; a template repeats the object's choice, or takes the first."""
        if self._rng is not None:
            index = int(self._rng.integers(len(options)))
        else:
            index = self._chosen.pop(0) if self._chosen else 0
        self.chosen.append(index)
        return options[index]

    def chance(self, probability: float) -> bool:
        """Whether an optional part is there; a template repeats the object's choice, or leaves it out."""
        if self._rng is not None:
            present = bool(self._rng.random() < probability)
        else:
            present = bool(self._chosen.pop(0)) if self._chosen else False
        self.chosen.append(int(present))
        return present

    def template(self) -> Draw:
        """The draws of this object's template."""
        return Draw(None, self.chosen)


def xyz(x: float, y: float, z: float) -> Array:
    """A vector (3,)."""
    return np.array([x, y, z], dtype=float)


def turn(axis: str, angle: float) -> Array:
    """Rotation matrix about a coordinate axis, radians, right-handed."""
    c, s = np.cos(angle), np.sin(angle)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


@dataclass(eq=False)
class Body:
    """Collects the primitives and keypoints of one object.

    Everything that places a shape takes `points`: names of keypoints on it, with their local coordinates as `point`
    takes them.
    """

    draw: Draw
    primitives: list[Primitive] = field(default_factory=list)
    keypoints: list[Keypoint] = field(default_factory=list)
    variant: str = "plain"
    places: tuple[str, ...] = ("ground",)  # where it may be: "ground", "sky", "water" (under it), "sea" (on it)

    def add(
        self,
        shape: Shape,
        part: str,
        paint: str,
        centre: Vector,
        half: Vector,
        rotation: Array | None = None,
        rest: tuple[Array, Array] | None = None,
        points: Points = NO_POINTS,
    ) -> Primitive:
        """Place a shape: local axes scaled by `half`, then turned, then moved to `centre`."""
        linear = np.diag(np.asarray(half, dtype=float))
        if rotation is not None:
            linear = rotation @ linear
        return self._place(Primitive(shape, linear, np.asarray(centre, dtype=float), part, paint, rest), points)

    def _place(self, primitive: Primitive, points: Points) -> Primitive:
        self.primitives.append(primitive)
        for name, local in points.items():
            self.point(name, primitive, local)
        return primitive

    def ball(
        self,
        part: str,
        paint: str,
        centre: Vector,
        radii: Vector | float,
        rotation: Array | None = None,
        points: Points = NO_POINTS,
    ) -> Primitive:
        """An ellipsoid."""
        half = (radii,) * 3 if isinstance(radii, (int, float)) else radii
        return self.add(Ball(), part, paint, centre, half, rotation, points=points)

    def box(
        self,
        part: str,
        paint: str,
        centre: Vector,
        half: Vector,
        rotation: Array | None = None,
        points: Points = NO_POINTS,
    ) -> Primitive:
        """A box of these half sides."""
        return self.add(block(), part, paint, centre, half, rotation, points=points)

    def tube(
        self,
        part: str,
        paint: str,
        start: Vector,
        end: Vector,
        radius: float,
        end_radius: float | None = None,
        *,
        inner: float = 0.0,
        flat: float = 1.0,
        points: Points = NO_POINTS,
    ) -> Primitive:
        """A frustum from `start` to `end`; `flat` scales its local x axis (elliptical sections)."""
        radii = radius, radius if end_radius is None else end_radius
        big = max(radii)
        first, last = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
        half = (last - first) / 2
        up = half / np.linalg.norm(half)
        # A reference in the mirror plane: the frames of a left and a right limb are then mirror images.
        reference = np.array([0.0, 0.0, 1.0]) if abs(up[2]) < 0.9 else np.array([0.0, 1.0, 0.0])
        side = cross(up, reference)
        side /= np.linalg.norm(side)
        linear = np.stack([side * big * flat, half, cross(side, up) * big], axis=1)
        shape = Tube(radii[0] / big, radii[1] / big, inner)
        return self._place(Primitive(shape, linear, (first + last) / 2, part, paint), points)

    def limb(self, part: str, paint: str, joints: Sequence[Vector], radii: Sequence[float]) -> list[Primitive]:
        """Frustums through the joints, with balls at all but the first; returns the frustums, then the balls."""
        pairs = zip(joints[:-1], joints[1:], radii[:-1], radii[1:], strict=True)
        tubes = [self.tube(part, paint, a, b, ra, rb) for a, b, ra, rb in pairs]
        return tubes + [self.ball(part, paint, p, r) for p, r in zip(joints[1:], radii[1:], strict=True)]

    def point(self, name: str, primitive: Primitive, local: Vector) -> None:
        """Name a surface point by local coordinates.

        For a ball a direction is enough; for a tube x and z are a direction from its axis to its wall, or 0
        for the axis at one of its ends; a hull takes the point as it is.
        """
        at = np.asarray(local, dtype=float)
        if isinstance(primitive.shape, Ball):
            at = at / np.linalg.norm(at)
        elif isinstance(primitive.shape, Tube) and (at[0] or at[2]):
            at[[0, 2]] *= primitive.shape.radius(at[1]) / np.hypot(at[0], at[2])
        self.keypoints.append(Keypoint(name, primitive, (float(at[0]), float(at[1]), float(at[2]))))

    def bounds(self) -> Array:
        """(2, 3): lowest and highest coordinates of all primitives."""
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        for p in self.primitives:
            for linear, centre in p.shape.outline():
                middle = p.at(centre)
                reach = np.linalg.norm(p.linear @ linear, axis=1)
                low, high = np.minimum(low, middle - reach), np.maximum(high, middle + reach)
        return np.stack([low, high])
