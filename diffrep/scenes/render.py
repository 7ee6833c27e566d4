"""Drawing a scene: camera, ray casting, light, labels.

Camera axes are x right, y down, z forward; a pixel's ray is ((x - cx) / fx, (y - cy) / fy, 1) t, so t is the
depth. All samples of a pixel are cast together: arrays are (S, rows, columns), the last sample lies at the
pixel's centre and is the one that labels are taken from. Large images are drawn in bands of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from diffrep.scenes.build import Keypoint, turn
from diffrep.scenes.categories import CATEGORIES, CATEGORY, KEYPOINT_MIRROR, PART_ID, PART_MIRROR
from diffrep.scenes.look import describe, smooth_noise, view_name
from diffrep.scenes.shapes import MISS, Array, Rays
from diffrep.scenes.stage import Stage, set_stage

_BAND = 42_000  # samples drawn at once: about what stays in a core's cache
_SKY, _FLOOR, _WALL, _FIRST = 0, 1, 2, 3  # surface numbers; primitives follow
_DEPTH_TOLERANCE = 0.015  # of the depth, between a keypoint and the surface that its pixel shows


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


def _lookup(table: Array, reach: float, x: Array, z: Array) -> Array:
    """Bilinear values of the shadow table at floor points; those of its border beyond it."""
    n = len(table)
    u = np.clip((x / np.float32(2 * reach) + np.float32(0.5)) * np.float32(n - 1), 0, n - 1.001)
    v = np.clip((z / np.float32(2 * reach) + np.float32(0.5)) * np.float32(n - 1), 0, n - 1.001)
    i, j = v.astype(np.int32), u.astype(np.int32)
    a, b = u - j, v - i
    flat, at = table.ravel(), i * n + j
    top = flat[at] * (1 - a) + flat[at + 1] * a
    bottom = flat[at + n] * (1 - a) + flat[at + n + 1] * a
    return top * (1 - b) + bottom * b


def _offsets(supersample: int) -> Array:
    """(S, 2) of the samples in a pixel; the last is its centre."""
    ticks = (np.arange(supersample) + 0.5) / supersample - 0.5
    grid = np.array([(x, y) for y in ticks for x in ticks])
    grid = grid[np.abs(grid).max(1) > 1e-9]
    return np.concatenate([grid, np.zeros((1, 2))])


def _draw_band(stage: Stage, size: tuple[int, int], rows: slice, offsets: Array) -> dict[str, Array]:
    """Some rows of the picture, (rows, W, 3) float32, and of its labels."""
    fx, fy, cx, cy = stage.camera.intrinsics(size)
    height, width = rows.stop - rows.start, size[1]
    columns = np.arange(width)
    x = ((columns[None, None, :] + offsets[:, 0, None, None] - cx) / fx).astype(np.float32)
    lines = np.arange(rows.start, rows.stop)
    y = ((lines[None, :, None] + offsets[:, 1, None, None] - cy) / fy).astype(np.float32)
    depth = np.full((len(offsets), height, width), MISS)
    surface = np.zeros(depth.shape, dtype=np.uint8)
    _cast_surroundings(stage, x, y, depth, surface)
    for number, s in enumerate(stage.surfaces, start=_FIRST):
        # half a pixel of margin holds every sample of the pixels that the outline touches
        if not np.isfinite(s.reach).all():
            i0, i1, j0, j1 = 0, height, 0, width
        else:
            j0 = max(int(np.floor(s.reach[0] * fx + cx - 0.5)), 0)
            j1 = min(int(np.ceil(s.reach[2] * fx + cx + 0.5)) + 1, width)
            i0 = max(int(np.floor(s.reach[1] * fy + cy - 0.5)) - rows.start, 0)
            i1 = min(int(np.ceil(s.reach[3] * fy + cy + 0.5)) + 1 - rows.start, height)
        if i0 >= i1 or j0 >= j1:
            continue
        t = s.primitive.shape.hit(Rays(x[:, :, j0:j1], y[:, i0:i1], s.matrix, s.eye, s.pivot))
        window = depth[:, i0:i1, j0:j1]
        closer = t < window
        np.copyto(window, t, where=closer)
        np.copyto(surface[:, i0:i1, j0:j1], np.uint8(number), where=closer)
    return _shade(stage, x, y, depth, surface)


def _cast_surroundings(stage: Stage, x: Array, y: Array, depth: Array, surface: Array) -> None:
    """Floor and wall into `depth` and `surface`."""
    camera, position = stage.camera, stage.camera.position
    with np.errstate(divide="ignore", invalid="ignore"):
        if stage.look.floor is not None:
            row = camera.rotation[:, 1].astype(np.float32)
            t = np.float32(stage.floor_height - position[1]) / (row[0] * x + row[1] * y + row[2])
            below = (t > 0) & (t < 400 * stage.size)
            np.copyto(depth, t, where=below)
            np.copyto(surface, np.uint8(_FLOOR), where=below)
        if stage.look.wall is not None:
            normal = turn("y", camera.yaw)[:, 2]
            row = (camera.rotation @ normal).astype(np.float32)
            t = np.float32(-stage.look.wall_distance - normal @ position) / (row[0] * x + row[1] * y + row[2])
            closer = (t > 0) & (t < depth)
            np.copyto(depth, t, where=closer)
            np.copyto(surface, np.uint8(_WALL), where=closer)


def _shade(stage: Stage, x: Array, y: Array, depth: Array, surface: Array) -> dict[str, Array]:
    look, rotation = stage.look, stage.camera.rotation.astype(np.float32)
    samples, height, width = depth.shape
    # Samples are sorted by surface, so that each surface is one slice of every array.
    order = np.argsort(surface.ravel(), kind="stable")
    counts = np.bincount(surface.ravel(), minlength=_FIRST + len(stage.surfaces))
    ends = np.cumsum(counts)
    ray = np.ones((3, order.size), dtype=np.float32)
    ray[0] = np.broadcast_to(x, depth.shape).ravel()[order]
    ray[1] = np.broadcast_to(y, depth.shape).ravel()[order]
    t = depth.ravel()[order]
    normal, albedo = np.zeros_like(ray), np.empty_like(ray)
    gloss, light = np.zeros_like(t), np.ones_like(t)
    canonical = np.zeros_like(ray)
    part = np.zeros(t.shape, dtype=np.uint8)
    frame = CATEGORY[stage.category].frame

    for number, s in enumerate(stage.surfaces, start=_FIRST):
        here = slice(ends[number - 1], ends[number])
        if here.start == here.stop:
            continue
        points = (s.matrix.astype(np.float32) @ ray[:, here]) * t[here] + s.eye.astype(np.float32)[:, None]
        local = s.primitive.shape.normals(points)
        facing = s.matrix.T.astype(np.float32) @ local
        facing *= 1 / np.sqrt((facing * facing).sum(0))
        facing *= np.where((facing * ray[:, here]).sum(0) > 0, np.float32(-1), np.float32(1))  # insides of shells
        normal[:, here] = facing
        gloss[here] = s.gloss
        linear, middle = (s.template or s.primitive).resting
        at = linear.astype(np.float32) @ points + middle.astype(np.float32)[:, None]
        albedo[:, here] = s.texture.colour(at)
        if s.template is not None:
            part[here] = s.part
            centred = (at - frame[0].astype(np.float32)[:, None]) / frame[1].astype(np.float32)[:, None]
            canonical[:, here] = np.clip(centred, -1, 1)

    position = stage.camera.position.astype(np.float32)[:, None]
    ground = slice(ends[_FLOOR - 1], ends[_FLOOR])
    if look.floor is not None and ground.start < ground.stop:
        points = rotation.T @ ray[:, ground] * t[ground] + position
        albedo[:, ground] = look.floor.colour(points)
        normal[:, ground] = rotation[:, 1:2]
        light[ground] = _lookup(stage.shadow.astype(np.float32), stage.shadow_reach, points[0], points[2])
    wall = slice(ends[_WALL - 1], ends[_WALL])
    if look.wall is not None and wall.start < wall.stop:
        spin = turn("y", stage.camera.yaw).astype(np.float32)
        points = rotation.T @ ray[:, wall] * t[wall] + position
        albedo[:, wall] = look.wall.colour(spin.T @ points)
        normal[:, wall] = (rotation @ spin[:, 2])[:, None]

    sky, solid = slice(0, ends[_SKY]), slice(ends[_SKY], None)
    colour = np.empty_like(ray)
    colour[:, sky] = _sky(stage, rotation.T @ ray[:, sky])
    colour[:, solid] = _light(stage, ray[:, solid], normal[:, solid], albedo[:, solid], gloss[solid], light[solid])
    horizon = look.sky[0].astype(np.float32)
    if look.wall is None and look.floor is not None:  # the floor fades into the horizon
        away = np.float32(2.2 * np.linalg.norm(stage.camera.shift))
        fade = 1 - np.exp(-np.maximum(t[ground] / away - np.float32(0.7), 0))
        colour[:, ground] += (horizon[:, None] - colour[:, ground]) * fade
    if look.place == "water":
        fade = 1 - np.exp(-t[solid] * np.float32(0.45 / np.linalg.norm(stage.camera.shift)))
        colour[:, solid] += (horizon[:, None] - colour[:, solid]) * fade

    back = np.empty_like(colour)
    back[:, order] = colour
    image = back.reshape(3, samples, height * width).mean(axis=1)
    first = (samples - 1) * height * width
    central = np.flatnonzero(order >= first)
    pixel = order[central] - first

    def centre(values: Array) -> Array:
        placed = np.empty((height * width, *values.shape[:-1]), values.dtype)
        placed[pixel] = values[..., central].T
        return placed.reshape(height, width, *values.shape[:-1])

    labels: dict[str, Array] = {"normals": normal, "part": part, "canonical": canonical}
    return {
        "image": image.T.reshape(height, width, 3),  # 1 is white but not the most
        "depth": depth[-1],
        **{name: centre(values) for name, values in labels.items()},
    }


def _light(stage: Stage, ray: Array, normal: Array, albedo: Array, gloss: Array, light: Array) -> Array:
    """Sun, sky light from above, a little light back from the ground, and a highlight."""
    rotation = stage.camera.rotation
    sun, up = (rotation @ stage.sun).astype(np.float32), rotation[:, 1].astype(np.float32)
    direct = np.maximum(sun @ normal, 0)
    upward = up @ normal
    ambient = (np.float32(0.78) + np.float32(0.30) * upward) * (np.float32(0.45) + np.float32(0.55) * light)
    look = stage.look
    colour = look.sun.astype(np.float32)[:, None] * (direct * light)
    colour += look.ambient.astype(np.float32)[:, None] * ambient
    colour *= albedo
    view = 1 / np.sqrt((ray * ray).sum(0))
    towards = -(normal * ray).sum(0) * view
    shine = np.maximum(2 * direct * towards + (sun @ ray) * view, 0) * (direct > 0)
    for _ in range(4):  # to the 16th power
        shine = shine * shine
    rim = 1 - np.maximum(towards, 0)
    rim = rim * rim * rim
    colour += gloss * light * (shine + np.float32(0.25) * rim)
    return colour


def _sky(stage: Stage, directions: Array) -> Array:
    """(3, n) colour of the sky in world directions (3, n)."""
    horizon, overhead = stage.look.sky.astype(np.float32)
    rise = directions[1] / np.sqrt((directions * directions).sum(0))
    blend = np.clip(rise * np.float32(1.3) + np.float32(0.12), 0, 1)
    colour = horizon[:, None] + (overhead - horizon)[:, None] * blend
    if stage.look.clouds:
        spin = turn("y", stage.camera.yaw).astype(np.float32)
        across = (spin.T @ directions)[0]
        u, v = across * 2.6 + rise * 1.1 + stage.look.clouds * 40, rise * 6.5 - across * 0.9
        wave = smooth_noise(u, v) + 0.5 * smooth_noise(u * 2.7 - v * 0.8, v * 2.7 + u * 0.8)
        cloud = np.clip((wave - np.float32(1.02 - 0.42 * stage.look.clouds)) * np.float32(1.9), 0, np.float32(0.85))
        colour += (np.float32(0.97) - colour) * cloud
    return colour


def render_scene(
    seed: int, *, category: str | None = None, size: int | tuple[int, int] = 128, supersample: int = 2
) -> Scene:
    """Render one scene. The same seed and category give the same scene at every size, up to sampling.

    Args:
        seed: 0 or more; `scene_seed` gives those of a split.
        category: one of `CATEGORIES`; None lets the seed choose among `SEEN`.
        size: side or (H, W) in pixels, at least 8.
        supersample: colour samples along each side of a pixel, 1 to 8.

    Raises:
        ValueError: a value outside its range.
    """
    if category is not None and category not in CATEGORY:
        raise ValueError(f"no category {category!r}; there are {', '.join(CATEGORIES)}")
    if seed < 0:
        raise ValueError(f"a seed is 0 or more, got {seed}")
    height, width = shape = (size, size) if isinstance(size, int) else size
    if min(shape) < 8:
        raise ValueError(f"an image is at least 8 pixels wide and high, got {height} x {width}")
    if not 1 <= supersample <= 8:
        raise ValueError(f"supersample is 1 to 8, got {supersample}")
    stage = set_stage(seed, category)
    offsets = _offsets(supersample)
    step = max(_BAND // (width * len(offsets)), 1)
    slices = [slice(start, min(start + step, height)) for start in range(0, height, step)]
    bands = [_draw_band(stage, shape, rows, offsets) for rows in slices]
    drawn = {name: np.concatenate([band[name] for band in bands]) for name in bands[0]}
    image, depth, part = drawn["image"], drawn["depth"], drawn["part"]
    bright = np.maximum(image - np.float32(0.75), 0)  # highlights are compressed, not clipped
    image += bright / (1 + np.float32(2.2) * bright) - bright
    mask = part > 0
    intrinsics = stage.camera.intrinsics(shape)
    keypoints, visible = _place_keypoints(stage, intrinsics, depth, part)
    attributes = {"variant": stage.body.variant, "view": view_name(stage.camera.yaw), **stage.look.attributes}
    return Scene(
        image=(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8),
        depth=depth,
        normals=drawn["normals"],
        mask=mask,
        edge=outline_of(mask),
        part=part,
        canonical=drawn["canonical"],
        keypoint_names=CATEGORY[stage.category].keypoint_names,
        keypoints=keypoints,
        visible=visible,
        category=stage.category,
        caption=describe(stage.category, attributes["view"], attributes),
        attributes=attributes,
        box=_box_of(mask),
        intrinsics=intrinsics,
        seed=seed,
    )


def outline_of(mask: Array) -> Array:
    """Pixels of a mask (H, W) with a 4-neighbour outside it; the frame is no outside."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _box_of(mask: Array) -> tuple[float, float, float, float]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(columns[0]) - 0.5, float(rows[0]) - 0.5, float(columns[-1]) + 0.5, float(rows[-1]) + 0.5


def _place_keypoints(
    stage: Stage, intrinsics: tuple[float, float, float, float], depth: Array, part: Array
) -> tuple[Array, Array]:
    """Keypoints (N, 2) in pixels, in the category's order, and which of them the picture shows."""
    fx, fy, cx, cy = intrinsics
    height, width = depth.shape
    named: dict[str, Keypoint] = {k.name: k for k in stage.body.keypoints}
    points, shown = [], []
    for name in CATEGORY[stage.category].keypoint_names:
        keypoint = named[name]
        at = stage.camera.rotation @ keypoint.primitive.at(keypoint.local) + stage.camera.shift
        # on a grid of 1/1024 pixel, where mirroring twice is exact
        x, y = (round(v * 1024) / 1024 for v in (fx * at[0] / at[2] + cx, fy * at[1] / at[2] + cy))
        points.append((x, y))
        j, i = round(x), round(y)
        if not (0 <= i < height and 0 <= j < width):
            shown.append(False)
            continue
        faces = keypoint.primitive.faces(keypoint.local) @ stage.camera.rotation.T
        # an edge or a corner is seen past the faces that meet in it, the middle of a face is not
        turned_here = (faces @ at < (0.05 if len(faces) == 1 else 0.5) * np.linalg.norm(at)).any()
        around = slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2)
        close = np.abs(depth[around] - at[2]) <= _DEPTH_TOLERANCE * at[2]
        its_part = part[around] == PART_ID[stage.category, keypoint.primitive.part]
        shown.append(bool(turned_here and (close & its_part).any()))
    return np.array(points, dtype=np.float32), np.array(shown)
