"""How a scene looks: patterns on surfaces, colours, surroundings, light; and the words that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffrep.scenes.build import Body, Draw, turn, xyz
from diffrep.scenes.categories import CATEGORIES, COLOURS, FLOORS
from diffrep.scenes.shapes import Array

PATTERNS = ("plain", "striped", "spotted", "checkered", "marbled")
BACKS = ("sky", "wall", "striped wall", "brick wall", "haze")
VIEWS = {
    "front view": 25,
    "front corner view": 65,
    "side view": 115,
    "back corner view": 155,
    "back view": 181,
}  # up to
_PHRASES = {"sky": "in the sky", "water": "under the water", "sea": "on the sea"}

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {"a", "photo", "of", "on", "in", "the", "under", "sea", "water", "sky", "with", "and"}
        | {word for text in (*COLOURS, *PATTERNS, *FLOORS, *BACKS, *VIEWS) for word in text.split()}
        | set(CATEGORIES)
    )
)


@dataclass(frozen=True, eq=False)
class Texture:
    """Two colours and a field in [0, 1] over 3-D points that mixes them."""

    kind: str
    first: Array  # (3,) RGB in [0, 1]
    second: Array
    frame: Array  # (3, 3): points are multiplied by it before the field is read
    phase: Array  # (3,)

    def colour(self, points: Array) -> Array:
        """(3, n) RGB of points (3, n)."""
        first = self.first[:, None]
        mix = self._mix(points)
        if mix is None:
            return np.broadcast_to(first, points.shape)
        return first + (self.second - self.first)[:, None] * mix

    def _mix(self, points: Array) -> Array | None:
        if self.kind == "plain":
            return None
        q = self.frame @ points + self.phase[:, None]
        if self.kind == "striped":
            return _step(np.sin(q[0]), 0.15)
        if self.kind == "checkered":
            return _step(np.sin(q[0]) * np.sin(q[1]) * np.sin(q[2]), 0.04)
        if self.kind == "squares":  # the same in the plane of the first two axes
            return _step(np.sin(q[0]) * np.sin(q[1]), 0.02)
        if self.kind == "spotted":
            s = np.sin(q)
            return _step(s[0] * s[0] + s[1] * s[1] + s[2] * s[2] - 1.95, 0.12)
        if self.kind == "planks":
            row = np.floor(q[0] / np.pi)
            tone = 0.5 + 0.5 * np.sin(row * np.float32(12.9))
            grain = 0.5 + 0.5 * np.sin(q[1] * 0.7 + 3 * np.sin(q[0] * 3 + row) + row * 5)
            return np.clip(0.55 * tone + 0.25 * grain + (np.abs(np.sin(q[0])) < 0.06), 0, 1)
        if self.kind == "bricks":
            row = np.floor(q[1] / np.pi)
            along = q[0] * 0.5 + row * np.float32(np.pi / 2)
            mortar = (np.abs(np.sin(q[1])) < 0.16) | (np.abs(np.sin(along)) < 0.08)
            tone = 0.5 + 0.5 * np.sin(row * 7.1 + np.floor(along / np.pi) * 3.7)
            return np.where(mortar, np.float32(1), 0.28 * tone)
        if self.kind == "tiles":
            joint = (np.abs(np.sin(q[0])) < 0.05) | (np.abs(np.sin(q[1])) < 0.05)
            tone = 0.5 + 0.5 * np.sin(np.floor(q[0] / np.pi) * 5.3 + np.floor(q[1] / np.pi) * 9.1)
            return np.where(joint, np.float32(1), 0.22 * tone)
        if self.kind == "grain":  # fine, for grounds: over the plane of the first two axes
            return 0.6 * noise(q[0], q[1]) + 0.4 * noise(q[0] * 0.31 + 5, q[1] * 0.31)
        if self.kind == "waves":
            return 0.65 * noise(q[0], q[1] * 0.45) + 0.35 * noise(q[0] * 2.7, q[1] * 1.3)
        warp = smooth_noise(q[0] * 0.35 + 0.6 * q[2], q[1] * 0.35 - 0.4 * q[2])  # marbled
        return _step(np.sin(q[0] * 0.6 + 9 * warp), 0.55)


def _noise_table(n: int = 256) -> Array:
    """Smooth random values in [0, 1] that repeat every n cells; features of 8 to 32 cells."""
    rng = np.random.default_rng(20240)
    waves = np.fft.fft2(rng.normal(size=(n, n)))
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(n), np.fft.fftfreq(n)))
    band = np.exp(-((k * 14) ** 2)) * (k > 0.5 / n * 8)
    field = np.fft.ifft2(waves * band).real
    return np.clip(0.5 + field / (5 * field.std()), 0, 1).astype(np.float32)


_NOISE = _noise_table()


def noise(u: Array, v: Array) -> Array:
    """Smooth noise in [0, 1] with features of about one unit of (u, v), not interpolated: for fine grain."""
    i = np.rint(v * np.float32(12)).astype(np.int32) & 255
    j = np.rint(u * np.float32(12)).astype(np.int32) & 255
    return _NOISE.ravel()[(i << 8) | j]


def smooth_noise(u: Array, v: Array) -> Array:
    """`noise`, interpolated, for features of many pixels."""
    u, v = u * np.float32(12), v * np.float32(12)
    x, y = np.floor(u), np.floor(v)
    a, b = u - x, v - y
    j0, i0 = x.astype(np.int32) & 255, y.astype(np.int32) & 255
    j1, i1 = (j0 + 1) & 255, (i0 + 1) & 255
    i0 <<= 8
    i1 <<= 8
    flat = _NOISE.ravel()
    top, bottom = flat[i0 | j0], flat[i1 | j0]
    top = top + (flat[i0 | j1] - top) * a
    bottom = bottom + (flat[i1 | j1] - bottom) * a
    return top + (bottom - top) * b


def _step(value: Array, width: float) -> Array:
    return np.clip(value * np.float32(0.5 / width) + np.float32(0.5), 0, 1)


def texture(kind: str, first: Array, second: Array, frame: Array, rng: np.random.Generator) -> Texture:
    """A texture of a random phase."""
    phase = rng.uniform(0, 2 * np.pi, 3)
    return Texture(kind, *(np.asarray(a, dtype=np.float32) for a in (first, second, frame, phase)))


@dataclass(frozen=True, eq=False)
class Look:
    """Everything about a scene that is neither its object nor its camera."""

    paints: Mapping[str, Texture]
    gloss: Mapping[str, float]
    floor: Texture | None  # None: no ground
    wall: Texture | None  # None: sky
    wall_distance: float
    sky: Array  # (2, 3): colour at the horizon and overhead
    clouds: float  # 0 none .. 1
    sun: Array  # (3,) RGB
    ambient: Array  # (3,) RGB
    sun_direction: Array  # (3,) unit vector towards the light, world axes with the camera at yaw 0
    distractors: Body
    place: str
    attributes: Mapping[str, str]


def random_rotation(rng: np.random.Generator) -> Array:
    q = rng.normal(size=4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _shade_of(name: str, rng: np.random.Generator) -> Array:
    """A colour near the named one."""
    base = np.array(COLOURS[name])
    return np.clip(base * rng.uniform(0.85, 1.12) + rng.uniform(-0.045, 0.045, 3), 0.04, 0.97)


def _plain(colour: Array, rng: np.random.Generator) -> Texture:
    return texture("plain", colour, colour, np.zeros((3, 3)), rng)


def _apart(colour: Array, main: Array) -> Array:
    """A colour of the surroundings, moved away from that of the object where the object would be invisible."""
    if np.linalg.norm(colour - main) >= 0.25:
        return colour
    return np.clip(colour + (0.22 if main.mean() < 0.5 else -0.22), 0.05, 0.95)


def _pattern(kind: str, first: Array, second: Array, size: float, rng: np.random.Generator) -> Texture:
    """A surface pattern of a period of about `size` / 4 in a random direction."""
    periods = {"striped": (3.0, 6.5), "spotted": (3.5, 6.0), "checkered": (3.0, 5.0), "marbled": (1.6, 3.2)}
    low, high = periods.get(kind, (1.0, 1.0))
    frame = random_rotation(rng) * rng.uniform(low, high) * (2 * np.pi / size)
    if kind == "checkered":  # along the axes of the object
        frame = np.eye(3) * rng.uniform(low, high) * (2 * np.pi / size)
    return texture(kind, first, second, frame, rng)


def _far_from(colour: Array, rng: np.random.Generator, least: float = 0.42) -> tuple[str, Array]:
    """A colour that stands out from `colour`."""
    names = list(COLOURS)
    for index in rng.permutation(len(names)):
        other = _shade_of(names[index], rng)
        if np.linalg.norm(other - colour) >= least:
            return names[index], other
    return "white", np.array(COLOURS["white"])


def draw_look(place: str, size: float, ground: float, rng: np.random.Generator) -> Look:
    """Draw colours, surroundings and light for an object of longest side `size` metres.

    Args:
        place: "ground", "sky", "water" or "sea".
        ground: radius around the object that distractors keep clear of.
    """
    main_name = str(rng.choice(list(COLOURS)))
    main = _shade_of(main_name, rng)
    second_name, second = _far_from(main, rng)
    _, bright = _far_from(second, rng)
    pattern = str(rng.choice(PATTERNS, p=(0.36, 0.18, 0.18, 0.10, 0.18)))
    _, other = _far_from(main, rng, 0.3)
    if pattern == "marbled":
        other = np.clip(main + rng.choice((-1, 1)) * rng.uniform(0.12, 0.3), 0.03, 0.97)
    skin = np.array([0.93, 0.74, 0.60]) * rng.uniform(0.45, 1.0)
    wood = np.array([0.62, 0.42, 0.24]) * rng.uniform(0.5, 1.25)
    solid = {
        "second": second,
        "bright": bright,
        "dark": np.full(3, rng.uniform(0.07, 0.16)),
        "light": np.array([0.95, 0.94, 0.90]) * rng.uniform(0.9, 1.0),
        "glass": np.array([0.30, 0.40, 0.48]) * rng.uniform(0.55, 1.2),
        "metal": np.full(3, rng.uniform(0.45, 0.72)),
        "skin": skin,
        "wood": wood,
        "drink": np.array([0.30, 0.17, 0.08]) if rng.random() < 0.6 else np.array([0.72, 0.45, 0.14]),
        "red": np.array([0.80, 0.08, 0.06]),
    }
    paints = {name: _plain(colour, rng) for name, colour in solid.items()}
    paints["main"] = _pattern(pattern, main, other, size, rng)
    if rng.random() < 0.25:
        kind = str(rng.choice(("striped", "spotted", "marbled")))
        paints["second"] = _pattern(kind, second, np.clip(second + rng.choice((-0.22, 0.22)), 0.03, 0.97), size, rng)
    body_gloss = float(rng.uniform(0.0, 0.35))
    shiny = {"glass": 0.6, "metal": 0.5, "dark": 0.18, "light": 0.3, "skin": 0.05, "drink": 0.4, "red": 0.4}
    gloss = dict.fromkeys(paints, body_gloss * 0.6) | {"main": body_gloss} | shiny

    attributes = {"colour": main_name, "second colour": second_name, "pattern": pattern}
    floor, wall, clouds = None, None, 0.0
    horizon, overhead = np.array([0.80, 0.87, 0.93]), np.array([0.36, 0.58, 0.85])
    floor_name = back = place
    if place == "ground":
        floor_name = str(rng.choice(list(FLOORS)))
        tone = _apart(_shade_of(str(rng.choice(FLOORS[floor_name])), rng), main)
        scale = rng.uniform(0.8, 1.6) / size * np.pi
        spin = turn("y", rng.uniform(0, np.pi))[[0, 2, 1]]
        change = np.clip(tone + rng.choice((-1, 1)) * rng.uniform(0.10, 0.28), 0.04, 0.96)
        kinds = {
            "checkered floor": ("squares", 2.2, change),
            "wooden floor": ("planks", 3.6, tone * 0.55),
            "tiled floor": ("tiles", 2.4, tone * 0.6),
            "plain floor": ("plain", 1.0, tone),
            "carpet": (str(rng.choice(("grain", "striped", "squares"))), 4.0, change),
            "grass": ("grain", 14.0, tone * np.array([0.45, 0.55, 0.4])),
            "sand": ("grain", 7.0, tone * 0.72),
            "road": ("grain", 18.0, tone * 0.7),
        }
        kind, frequency, partner = kinds[floor_name]
        floor = texture(kind, tone, partner, spin * scale * frequency, rng)
        outdoors = floor_name in ("grass", "sand", "road")
        indoors = ("wall", "striped wall", "brick wall", "haze", "wall")
        back = str(rng.choice(("sky", "sky", "haze") if outdoors else indoors))
        if "wall" in back:
            paper = _apart(_shade_of(str(rng.choice([c for c in COLOURS if c != "black"])), rng), main)
            paper = paper * 0.65 + 0.28  # walls are paler than objects
            stripe = np.clip(paper + rng.choice((-1, 1)) * rng.uniform(0.05, 0.15), 0, 1)
            if back == "brick wall":
                paper, stripe = paper * np.array([0.9, 0.7, 0.6]), np.full(3, 0.75)
            if back == "wall":
                stripe = paper * rng.uniform(0.86, 1.0)
            walls = {"wall": ("marbled", 0.6), "striped wall": ("striped", 3.0), "brick wall": ("bricks", 4.5)}
            kind, frequency = walls[back]
            wall = texture(kind, paper, stripe, np.eye(3) * (np.pi / size) * frequency, rng)
        elif back == "haze":
            horizon = _shade_of(str(rng.choice(list(COLOURS))), rng) * 0.4 + 0.5
            overhead = horizon * rng.uniform(0.7, 1.05)
            if np.linalg.norm(horizon - main) < 0.22:
                horizon = np.clip(horizon - 0.25, 0, 1)
        else:
            clouds = float(rng.uniform(0, 1))
    elif place == "sky":
        evening = rng.random() < 0.3
        horizon = np.array([0.97, 0.72, 0.52]) if evening else horizon + rng.uniform(-0.06, 0.05, 3)
        overhead = np.array([0.40, 0.42, 0.66]) if evening else overhead * rng.uniform(0.8, 1.15)
        clouds = float(rng.uniform(0.2, 1))
    elif place == "sea":
        tone = np.array([0.12, 0.36, 0.50]) * rng.uniform(0.75, 1.25, 3)
        frame = turn("y", rng.uniform(0, np.pi))[[0, 2, 1]] * 9 / size
        floor = texture("waves", tone * 0.8, tone * 1.35 + 0.08, frame, rng)
        clouds = float(rng.uniform(0, 1))
        if rng.random() < 0.25:
            horizon, overhead = np.array([0.98, 0.76, 0.55]), np.array([0.48, 0.48, 0.70])
    else:  # under water
        horizon = np.array([0.10, 0.42, 0.56]) * rng.uniform(0.75, 1.3, 3)
        overhead = horizon * 1.5 + 0.08
        tone = np.array([0.72, 0.66, 0.48]) * rng.uniform(0.7, 1.0)
        frame = turn("y", rng.uniform(0, np.pi))[[0, 2, 1]] * 8 / size
        floor = texture("waves", tone, tone * 0.65, frame, rng)

    warm = rng.uniform(-0.06, 0.06)
    strength = rng.uniform(0.55, 0.78)
    azimuth, height = rng.uniform(-1.35, 1.35), rng.uniform(0.55, 1.15)
    direction = np.array([np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)])
    attributes |= {"floor": floor_name, "back": back}
    return Look(
        paints=paints,
        gloss=gloss,
        floor=floor,
        wall=wall,
        wall_distance=ground * float(rng.uniform(1.6, 3.2)),
        sky=np.stack([np.clip(horizon, 0, 1), np.clip(overhead, 0, 1)]),
        clouds=clouds,
        sun=np.array([1 + warm, 1.0, 1 - warm]) * strength,
        ambient=np.array([1 - warm, 1.0, 1 + warm]) * rng.uniform(0.40, 0.50),
        sun_direction=direction,
        distractors=_distractors(place, size, ground, rng),
        place=place,
        attributes=attributes,
    )


def _distractors(place: str, size: float, ground: float, rng: np.random.Generator) -> Body:
    """Small plain things beside and behind the object. World axes, the camera at yaw 0."""
    body = Body(Draw(rng))
    if place == "sky":
        return body
    shapes = ("ball", "box", "cone", "column") + (("bubble", "weed") if place == "water" else ())
    count = int(rng.integers(0, 3 if place == "sea" else 7))
    for i in range(count):
        angle = rng.uniform(np.radians(75), np.radians(285))  # 0 is towards the camera
        distance = ground * rng.uniform(1.12, 2.1)
        half = size * rng.uniform(0.05, 0.16)
        at = np.array([np.sin(angle) * distance, 0.0, np.cos(angle) * distance])
        paint = f"thing {i}"
        kind = rng.choice(shapes)
        spin = turn("y", rng.uniform(0, np.pi))
        if place == "sea":
            body.tube("", paint, at, at + xyz(0, half * 2, 0), half * 0.6, half * 0.2)
            body.ball("", paint, at, half)
        elif kind == "ball":
            body.ball("", paint, at + xyz(0, half, 0), half)
        elif kind == "box":
            tall = half * rng.uniform(0.6, 1.6)
            body.box("", paint, at + xyz(0, tall, 0), (half, tall, half * rng.uniform(0.6, 1.2)), spin)
        elif kind == "bubble":
            body.ball("", paint, at * 0.9 + xyz(0, size * rng.uniform(0.2, 1.1), 0), half * 0.4)
        elif kind == "weed":
            body.tube("", paint, at, at + xyz(rng.uniform(-0.2, 0.2), half * 9, 0), half * 0.4, 0.01)
        else:
            top = half * (0.02 if kind == "cone" else 0.9)
            body.tube("", paint, at, at + xyz(0, half * rng.uniform(1.4, 3.0), 0), half, top)
    return body


def distractor_paint(rng: np.random.Generator) -> Texture:
    """A plain colour for one distractor."""
    return _plain(_shade_of(str(rng.choice(list(COLOURS))), rng), rng)


def view_name(yaw: float) -> str:
    """The word for the side that is seen; 0 is the front, radians."""
    turned = abs((np.degrees(yaw) + 180) % 360 - 180)
    return next(name for name, limit in VIEWS.items() if turned < limit)


def describe(category: str, view: str, attributes: Mapping[str, str]) -> str:
    """The caption: what, which side of it, where."""
    pattern = "" if attributes["pattern"] == "plain" else f"{attributes['pattern']} "
    floor = attributes["floor"]
    where = _PHRASES.get(floor, f"on a {floor}")
    return f"a photo of a {attributes['colour']} {pattern}{category} {view} {where}"
