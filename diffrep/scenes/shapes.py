"""Analytic shapes: where a ray meets them, and which way their surface faces.

Every shape lives in local coordinates of its own, about [-1, 1]^3; a primitive places it in the world by an
affine map, so one ray test serves all sizes. Directions are not normalised, so t is the same in every frame.

Arrays of points and directions have the coordinate first: (3, ...), float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from diffrep.settings import check

Array: TypeAlias = "np.ndarray"

MISS = np.float32(np.inf)
_NEAR = 1e-3  # t below this lies behind the camera
_TOUCH = 1e-3  # how close to a face, in local units, a point lies on it


def cross(a: Array, b: Array) -> Array:
    """Cross product of two single vectors; np.cross takes ten times as long for one."""
    (ax, ay, az), (bx, by, bz) = a.tolist(), b.tolist()
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


@dataclass(frozen=True, eq=False)
class Rays:
    """Camera rays (x, y, 1) t as a shape sees them: matrix @ (x, y, 1) t + eye in its local coordinates.

    Thin things far away lie hundreds of their own units from the camera, where float32 squares lose them;
    so quadrics are solved about the point of each ray at depth `pivot`, near the shape.
    """

    x: Array  # broadcasts with y, float32
    y: Array
    matrix: Array  # (3, 3) float64
    eye: Array  # (3,) float64
    pivot: float

    def linear(self, row: Array, constant: float = 0.0) -> Array:
        """row[0] x + row[1] y + row[2] + constant for every ray."""
        a, b, c = (np.float32(v) for v in (row[0], row[1], row[2] + constant))
        return (a * self.x + c) + b * self.y

    def directions(self) -> list[Array]:
        return [self.linear(row) for row in self.matrix]

    def middles(self) -> list[Array]:
        """Where each ray is at t = pivot."""
        return [self.linear(self.pivot * row, eye) for row, eye in zip(self.matrix, self.eye, strict=True)]


class Shape(Protocol):
    """A surface in local coordinates."""

    def hit(self, rays: Rays) -> Array:
        """Smallest t > 0 at which each ray meets the surface, inf where it does not."""

    def normals(self, points: Array) -> Array:
        """Outward normals (3, n), any length, of surface points (3, n)."""

    def faces(self, point: Array) -> Array:
        """Outward normals (k, 3) of the faces that meet at one surface point."""

    def outline(self) -> list[tuple[Array, Array]]:
        """Ellipsoids (linear map, centre) whose convex hull holds the shape."""


@dataclass(frozen=True, eq=False)
class Clip:
    """The half space normal . point <= offset that a ball or a tube is cut down to."""

    normal: tuple[float, float, float]
    offset: float

    def keeps(self, middles: Sequence[Array], directions: Sequence[Array], t: Array) -> Array:
        inside: Array = np.zeros_like(t) - np.float32(self.offset)
        for n, middle, direction in zip(self.normal, middles, directions, strict=True):
            if n:
                inside = inside + np.float32(n) * (middle + t * direction)
        return np.asarray(inside <= 0)


@dataclass(frozen=True, eq=False)
class Ball:
    """The unit sphere; clipped it is an open shell that shows its inside."""

    clips: tuple[Clip, ...] = ()

    def __post_init__(self) -> None:
        check(self)

    def hit(self, rays: Rays) -> Array:
        x, y, z = directions = rays.directions()
        ox, oy, oz = middles = rays.middles()
        a = x * x + y * y + z * z
        b = ox * x + oy * y + oz * z
        c = ox * ox + oy * oy + oz * oz - np.float32(1)
        with np.errstate(invalid="ignore"):
            root = np.sqrt(b * b - a * c)  # NaN where missed, which compares false below
            near = (-b - root) / a
            least = np.float32(_NEAR - rays.pivot)
            pivot = np.float32(rays.pivot)
            if not self.clips:
                return np.where(near > least, near + pivot, MISS)
            best = np.full_like(near, MISS)
            for t in ((root - b) / a, near):
                good = t > least
                for clip in self.clips:
                    good &= clip.keeps(middles, directions, t)
                best = np.where(good, t + pivot, best)
        return best

    def normals(self, points: Array) -> Array:
        return points

    def faces(self, point: Array) -> Array:
        return point[None]

    def outline(self) -> list[tuple[Array, Array]]:
        return [(np.eye(3), np.zeros(3))]


@dataclass(frozen=True, eq=False)
class Tube:
    """A frustum about the y axis from y = -1 (radius `bottom`) to y = 1 (radius `top`), with flat ends.

    `inner` is the radius of the hole as a share of the outer radius: 0 is solid, 0.9 a thin wall.
    """

    bottom: float = 1.0
    top: float = 1.0
    inner: float = 0.0
    clips: tuple[Clip, ...] = ()

    def __post_init__(self) -> None:
        check(self)

    def radius(self, y: float) -> float:
        """Outer radius at height y in [-1, 1]."""
        return (self.top + self.bottom) / 2 + (self.top - self.bottom) / 2 * y

    def hit(self, rays: Rays) -> Array:
        x, y, z = directions = rays.directions()
        ox, oy, oz = middles = rays.middles()
        least = np.float32(_NEAR - rays.pivot)
        best: Array = np.full(np.broadcast_shapes(rays.x.shape, rays.y.shape), MISS)
        middle, slope = (self.top + self.bottom) / 2, (self.top - self.bottom) / 2

        def nearer(best: Array, t: Array, good: Array) -> Array:
            for clip in self.clips:
                good = good & clip.keeps(middles, directions, t)
            return np.minimum(best, np.where(good, t, MISS))

        across, to_axis, off_axis = x * x + z * z, ox * x + oz * z, ox * ox + oz * oz
        with np.errstate(invalid="ignore", divide="ignore"):
            for scale in (1.0, self.inner) if self.inner else (1.0,):
                m, g = np.float32(middle * scale), np.float32(slope * scale)
                radius: Array = m + g * oy
                a, b = across, to_axis
                if g:
                    a, b = a - g * g * (y * y), b - g * radius * y
                root = np.sqrt(b * b - a * (off_axis - radius * radius))
                for t in ((-b - root) / a, (root - b) / a):
                    best = nearer(best, t, (np.abs(oy + t * y) <= 1) & (t > least))
            # Only the end that faces the camera can be met first, unless a cut lets the ray in elsewhere.
            for end in (np.float32(-1), np.float32(1)):
                if end * rays.eye[1] <= 1 and not self.clips:
                    continue
                rim = np.float32(middle + slope * end)
                t = (end - oy) / y
                distance = (ox + t * x) ** 2 + (oz + t * z) ** 2
                good = (t > least) & (distance <= rim * rim)
                if self.inner:
                    good &= distance >= (rim * np.float32(self.inner)) ** 2
                best = nearer(best, t, good)
        return best + np.float32(rays.pivot)

    def normals(self, points: Array) -> Array:
        x, y, z = points
        middle, slope = (self.top + self.bottom) / 2, (self.top - self.bottom) / 2
        radius = middle + slope * y
        distance = np.sqrt(x * x + z * z)
        wall = np.abs(distance - radius)
        normal = np.stack([x, -slope * distance, z])
        if self.inner:
            hole = np.abs(distance - self.inner * radius)
            within = hole < wall
            wall = np.minimum(wall, hole)
            normal[1, within] *= self.inner
            normal[:, within] *= -1
        cap = 1 - np.abs(y) < wall
        normal[0, cap] = normal[2, cap] = 0
        normal[1, cap] = np.sign(y[cap])
        return normal

    def faces(self, point: Array) -> Array:
        normals = []
        distance = np.hypot(point[0], point[2])
        if distance > 1e-6 and abs(distance - self.radius(point[1])) < _TOUCH:
            normals.append([point[0], -(self.top - self.bottom) / 2 * distance, point[2]])
        if 1 - abs(point[1]) < _TOUCH:
            normals.append([0.0, np.sign(point[1]), 0.0])
        return np.array(normals)

    def outline(self) -> list[tuple[Array, Array]]:
        return [
            (np.diag([radius, 0.0, radius]), np.array([0.0, end, 0.0]))
            for radius, end in ((self.bottom, -1.0), (self.top, 1.0))
        ]


@dataclass(frozen=True, eq=False)
class Hull:
    """A convex body: the points with planes[i, :3] . point <= planes[i, 3] for every i."""

    planes: Array  # (k, 4)
    corners: Array  # (n, 3), a box around them holds the body

    def hit(self, rays: Rays) -> Array:
        shape = np.broadcast_shapes(rays.x.shape, rays.y.shape)
        near: Array = np.full(shape, np.float32(_NEAR))
        far: Array = np.full(shape, MISS)
        with np.errstate(divide="ignore", invalid="ignore"):
            for plane in self.planes:
                gap = np.float32(plane[3] - plane[:3] @ rays.eye)
                along = rays.linear(plane[:3] @ rays.matrix)
                t = gap / along
                if gap < 0:  # the camera is outside this plane: a ray enters through it or never
                    near = np.maximum(near, np.where(along < 0, t, MISS))
                else:
                    far = np.minimum(far, np.where(along > 0, t, MISS))
        return np.where((near < far) & (near > _NEAR), near, MISS)

    def normals(self, points: Array) -> Array:
        planes = self.planes.astype(np.float32)
        gaps = np.abs(planes[:, :3] @ points - planes[:, 3:])
        return planes[np.argmin(gaps, axis=0), :3].T

    def faces(self, point: Array) -> Array:
        return self.planes[np.abs(self.planes[:, :3] @ point - self.planes[:, 3]) < _TOUCH, :3]

    def outline(self) -> list[tuple[Array, Array]]:
        return [(np.zeros((3, 3)), corner) for corner in self.corners]


def block(taper: tuple[float, float] = (1.0, 1.0), bevel: float = 0.0) -> Hull:
    """A box [-1, 1]^3 whose top is `taper` (x, z) times as large; `bevel` cuts its upright edges and its top.

    The bevel is a share of the half side.
    """
    sides = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    if bevel:
        e = 1 - bevel
        sides = [(-e, -1), (e, -1), (1, -e), (1, e), (e, 1), (-e, 1), (-1, e), (-1, -e)]
    hull = prism([(z, x) for x, z in sides], axis="y", taper=(taper[1], taper[0]))
    if not bevel:
        return hull
    extra = []
    for axis, scale in ((0, taper[0]), (2, taper[1])):
        for sign in (-1.0, 1.0):
            normal = np.zeros(4)
            normal[axis], normal[1] = sign, 1.0
            normal[3] = scale + 1 - bevel
            extra.append(normal / np.sqrt(2))
    return Hull(np.concatenate([hull.planes, extra]), hull.corners)


def prism(polygon: Sequence[tuple[float, float]], *, axis: str = "x", taper: tuple[float, float] = (1.0, 1.0)) -> Hull:
    """A convex polygon drawn out along one axis from -1 to 1.

    Args:
        polygon: corners in order, either way round. For axis "x" they are (z, y), a profile seen from the
            side; for axis "y" they are (z, x), a plan seen from above.
        axis: the axis along which the polygon is drawn out.
        taper: for axis "x": the half width at the top and at the bottom of the profile, as shares; for axis
            "y": the size of the polygon at y = 1 in (z, x), as shares of that at y = -1.
    """
    points = np.array(polygon, dtype=float)
    area = np.sum(points[:, 0] * np.roll(points[:, 1], -1) - points[:, 1] * np.roll(points[:, 0], -1))
    if area < 0:
        points = points[::-1]
    following = np.roll(points, -1, axis=0)
    planes, corners = [], []
    if axis == "x":
        edge = following - points
        for (u, v), (du, dv) in zip(points, edge, strict=True):
            length = np.hypot(du, dv)
            planes.append([0.0, -du / length, dv / length, (dv * u - du * v) / length])
        low, high = points[:, 1].min(), points[:, 1].max()
        top, bottom = taper
        slope = (bottom - top) / (high - low)
        for sign in (-1.0, 1.0):  # sign * x + slope * (y - low) <= bottom
            normal = np.array([sign, slope, 0.0, bottom + slope * low])
            planes.append(normal / np.linalg.norm(normal[:3]))
        corners = [[s * max(taper), v, u] for u, v in points for s in (-1, 1)]
        return Hull(np.array(planes), np.array(corners))
    scale = np.array(taper)
    for p, q in zip(points, following, strict=True):
        # the plane through p, q at y = -1 and their scaled copies at y = 1
        low_p, low_q = np.array([p[1], -1, p[0]]), np.array([q[1], -1, q[0]])
        high = np.array([p[1] * scale[1], 1, p[0] * scale[0]])
        high_q = np.array([q[1] * scale[1], 1, q[0] * scale[0]])
        normal = cross(low_q - low_p, (high + high_q) / 2 - (low_p + low_q) / 2)
        normal /= np.linalg.norm(normal)
        if normal @ low_p < 0:
            normal = -normal
        planes.append([*normal, max(normal @ c for c in (low_p, low_q, high, high_q))])
    planes += [[0, 1, 0, 1], [0, -1, 0, 1]]
    corners = [[x, -1, z] for z, x in points] + [[x * scale[1], 1, z * scale[0]] for z, x in points]
    return Hull(np.array(planes, dtype=float), np.array(corners, dtype=float))
