"""Setting a scene up: the object, its surroundings and the camera; everything but the resolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffrep.scenes.build import Body, Primitive, turn, xyz
from diffrep.scenes.categories import PART_ID, SEEN, build
from diffrep.scenes.look import Look, Texture, distractor_paint, draw_look
from diffrep.scenes.shapes import Array, cross

_SHADOW_CELLS = 112


@dataclass(frozen=True, eq=False)
class Camera:
    """Pose and pinhole: camera point = rotation @ world point + shift; the focal length in short sides."""

    rotation: Array  # (3, 3)
    shift: Array  # (3,)
    focal: float
    yaw: float

    @property
    def position(self) -> Array:
        return -self.rotation.T @ self.shift

    def intrinsics(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in pixels for an image of (H, W)."""
        focal = self.focal * min(size)
        return focal, focal, (size[1] - 1) / 2, (size[0] - 1) / 2


@dataclass(frozen=True, eq=False)
class Surface:
    """A primitive of the object (with its template) or of a distractor (without), ready to be drawn."""

    primitive: Primitive
    template: Primitive | None
    part: int
    texture: Texture
    gloss: float
    matrix: Array  # camera -> local
    eye: Array  # the camera in local coordinates
    pivot: float
    reach: tuple[float, float, float, float]  # x0, y0, x1, y1 on the plane z = 1 of the camera


@dataclass(frozen=True, eq=False)
class Stage:
    """Everything about a scene but its resolution."""

    category: str
    body: Body
    camera: Camera
    look: Look
    surfaces: tuple[Surface, ...]
    sun: Array  # (3,) world axes
    floor_height: float
    shadow: Array  # (n, n) light that reaches the floor, rows z, columns x
    shadow_reach: float
    size: float


def _outlines(primitives: list[Primitive], camera_rotation: Array, shift: Array) -> Array:
    """(n, 4) x0, y0, x1, y1 of each primitive on the plane z = 1; infinite if it goes behind the camera."""
    linears: list[Array] = []
    centres: list[Array] = []
    starts: list[int] = []
    for p in primitives:
        starts.append(len(linears))
        for linear, centre in p.shape.outline():
            linears.append(p.linear @ linear)
            centres.append(p.at(centre))
    a = camera_rotation @ np.array(linears)
    t = np.array(centres) @ camera_rotation.T + shift
    # An ellipsoid's silhouette is a conic; the dual of that conic is a a^T - t t^T.
    dual = a @ np.swapaxes(a, 1, 2) - t[:, :, None] * t[:, None, :]
    depth = dual[:, 2, 2]
    behind = (t[:, 2] <= 0) | (depth >= 0)
    depth = np.where(behind, -1.0, depth)
    low, high = [], []
    for axis in (0, 1):
        root = np.sqrt(np.maximum(dual[:, axis, 2] ** 2 - dual[:, axis, axis] * depth, 0))
        ends = np.stack([(dual[:, axis, 2] + root) / depth, (dual[:, axis, 2] - root) / depth])
        low.append(np.minimum.reduceat(np.where(behind, -np.inf, ends.min(0)), starts))
        high.append(np.maximum.reduceat(np.where(behind, np.inf, ends.max(0)), starts))
    return np.stack([*low, *high], axis=1)


def _draw_camera(body: Body, rng: np.random.Generator) -> Camera:
    """A camera that sees the whole object, from any side, at 55-90 % of the frame's short side."""
    yaw = rng.uniform(0, 2 * np.pi)
    elevation = np.radians(rng.uniform(0, 1) ** 0.8 * 40)
    roll = np.radians(rng.uniform(-4, 4))
    closeness = rng.uniform(2.4, 4.8)  # distance in shares of the radius: how strong the perspective is
    fill = rng.uniform(0.55, 0.90)
    place = rng.uniform(-1, 1, 2)
    towards = np.array([np.sin(yaw) * np.cos(elevation), np.sin(elevation), np.cos(yaw) * np.cos(elevation)])
    forward = -towards
    right = cross(forward, np.array([0.0, 1.0, 0.0]))
    right /= np.linalg.norm(right)
    rotation = turn("z", roll) @ np.stack([right, cross(forward, right), forward])
    low, high = body.bounds()
    shift = np.array([0, 0, closeness * np.linalg.norm(high - low) / 2]) - rotation @ ((low + high) / 2)
    for _ in range(3):  # panning changes the outline a little, so the offset is reached in steps
        boxes = _outlines(body.primitives, rotation, shift)
        low_end, high_end = boxes[:, :2].min(0), boxes[:, 2:].max(0)
        extent = high_end - low_end
        focal = fill / extent.max()
        room = np.maximum(0.97 - focal * extent, 0) / 2
        x, y = np.arctan(place * room / focal) - np.arctan((low_end + high_end) / 2)
        pan = turn("y", x) @ turn("x", -y)
        rotation, shift = pan @ rotation, pan @ shift
    return Camera(rotation, shift, float(focal), yaw)


def set_stage(seed: int, category: str | None) -> Stage:
    pick, form, look_rng, view = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    if category is None:
        category = SEEN[int(pick.integers(len(SEEN)))]
    body, template = build(category, form)
    camera = _draw_camera(body, view)
    low, high = body.bounds()
    size = float((high - low).max())
    place = body.places[int(look_rng.integers(len(body.places)))]
    radius = float(np.linalg.norm(np.maximum(np.abs(low), np.abs(high))[[0, 2]]))
    look = draw_look(place, size, radius, look_rng)
    floor = float(low[1]) if place == "ground" else 0.0

    spin = turn("y", camera.yaw)
    things = [
        Primitive(p.shape, spin @ p.linear, spin @ p.centre + xyz(0, floor, 0), "", p.paint)
        for p in look.distractors.primitives
    ]
    paints = {name: distractor_paint(look_rng) for name in dict.fromkeys(p.paint for p in things)}
    primitives = body.primitives + things
    boxes = _outlines(primitives, camera.rotation, camera.shift)
    linear = np.linalg.inv(camera.rotation @ np.array([p.linear for p in primitives]))
    centres = np.array([p.centre for p in primitives]) @ camera.rotation.T + camera.shift
    eyes = -np.einsum("nij,nj->ni", linear, centres)
    surfaces = []
    for i, p in enumerate(primitives):
        of_object = i < len(body.primitives)
        surfaces.append(
            Surface(
                primitive=p,
                template=template.primitives[i] if of_object else None,
                part=PART_ID[category, p.part] if of_object else 0,
                texture=look.paints[p.paint] if of_object else paints[p.paint],
                gloss=look.gloss[p.paint] if of_object else 0.1,
                matrix=linear[i],
                eye=eyes[i],
                pivot=max(float(centres[i, 2]), 0.0),
                reach=(boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]),
            )
        )
    sun = spin @ look.sun_direction
    reach = radius * 2.6
    shadow = _cast_shadow(primitives, sun, floor, reach) if look.floor is not None else np.ones((1, 1))
    return Stage(category, body, camera, look, tuple(surfaces), sun, floor, shadow, reach, size)


def _cast_shadow(primitives: list[Primitive], sun: Array, floor: float, reach: float) -> Array:
    """Light that reaches the floor around the origin, in [0, 1]: soft shadows of ellipsoids, not of shapes.

    The sun's shadow, times a wide one straight below that stands for the sky's light.
    """
    n = _SHADOW_CELLS
    ticks = np.linspace(-reach, reach, n, dtype=np.float32)
    dark = np.zeros((2, n, n), dtype=np.float32)
    for p in primitives:
        inverse = np.linalg.inv(p.linear)
        radius = np.linalg.norm(p.linear, axis=1)
        for layer, (light, edge, share) in enumerate(((sun, 1.25, 1.0), (np.array([0, 1.0, 0]), 2.6, 0.8))):
            drop = (p.centre[1] - floor) / light[1]
            if drop < 0 or (layer and radius.max() < 0.02 * reach):
                continue
            at = p.centre - light * drop
            along = np.abs(light[[0, 2]]) / light[1] * radius[1]
            wide = (radius[[0, 2]] + along) * np.sqrt(edge) * 1.05
            i0, i1 = np.searchsorted(ticks, [at[2] - wide[1], at[2] + wide[1]])
            j0, j1 = np.searchsorted(ticks, [at[0] - wide[0], at[0] + wide[0]])
            if i0 >= i1 or j0 >= j1:
                continue
            x, z = ticks[None, j0:j1] - np.float32(p.centre[0]), ticks[i0:i1, None] - np.float32(p.centre[2])
            rows = inverse.astype(np.float32)
            below = np.float32(floor - p.centre[1])
            u = [row[0] * x + row[2] * z + row[1] * below for row in rows]
            d = (inverse @ light).astype(np.float32)
            d /= np.linalg.norm(d)
            along_light = u[0] * d[0] + u[1] * d[1] + u[2] * d[2]
            miss = u[0] * u[0] + u[1] * u[1] + u[2] * u[2] - along_light * along_light
            fade = np.float32(share)
            if layer:  # the sky is hidden less by what is high above
                fade = np.float32(share / (1 + 3 * (drop / radius[[0, 2]].max()) ** 2))
            cover = np.clip((np.float32(edge) - miss) * np.float32(1.4 / edge), 0, 1) * fade
            target = dark[layer, i0:i1, j0:j1]
            np.maximum(target, cover, out=target)
    return (1 - 0.62 * dark[0]) * (1 - 0.5 * dark[1])
