"""How a scene looks: colours, patterns, surroundings, light; and the words that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffrep.scenes.build import Body, Draw, turn, xyz
from diffrep.scenes.categories import CATEGORIES
from diffrep.scenes.shapes import Array, block
from diffrep.scenes.texture import Texture, texture

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.80, 0.16, 0.14),
    "orange": (0.93, 0.50, 0.13),
    "yellow": (0.93, 0.79, 0.20),
    "green": (0.24, 0.60, 0.27),
    "teal": (0.13, 0.58, 0.58),
    "blue": (0.18, 0.38, 0.78),
    "purple": (0.50, 0.28, 0.66),
    "pink": (0.93, 0.52, 0.66),
    "brown": (0.50, 0.32, 0.19),
    "beige": (0.85, 0.75, 0.58),
    "white": (0.93, 0.93, 0.91),
    "gray": (0.52, 0.53, 0.55),
    "black": (0.13, 0.13, 0.15),
}
PATTERNS = ("plain", "striped", "spotted", "checkered", "marbled")
FLOORS: Mapping[str, tuple[str, ...]] = {
    "checkered floor": ("white", "gray", "beige", "black", "teal", "red", "blue"),
    "wooden floor": ("brown", "beige", "orange"),
    "tiled floor": ("white", "beige", "gray", "teal", "pink"),
    "plain floor": tuple(COLOURS),
    "carpet": ("red", "blue", "purple", "green", "beige", "gray"),
    "grass": ("green",),
    "sand": ("beige", "yellow"),
    "road": ("gray", "black"),
}
BACKS = ("sky", "wall", "striped wall", "brick wall", "haze")
VIEWS = ("front view", "side view", "back view", "front corner view", "back corner view")
_PHRASES = {"sky": "in the sky", "water": "under the water", "sea": "on the sea"}

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {"a", "photo", "of", "on", "in", "the", "under", "sea", "water", "sky", "with", "and"}
        | {word for text in (*COLOURS, *PATTERNS, *FLOORS, *BACKS, *VIEWS) for word in text.split()}
        | set(CATEGORIES)
    )
)


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


def _pattern(kind: str, first: Array, second: Array, size: float, rng: np.random.Generator) -> Texture:
    """A surface pattern of a period of about `size` / 4 in a random direction."""
    periods = {"striped": (3.0, 6.5), "spotted": (3.5, 6.0), "checkered": (3.0, 5.0), "marbled": (1.6, 3.2)}
    low, high = periods.get(kind, (1.0, 1.0))
    frame = random_rotation(rng) * rng.uniform(low, high) * (2 * np.pi / size)
    if kind == "checkered":  # along the axes of the object, and off the planes of its flat faces
        frame = np.diag(np.diag(np.ones((3, 3)))) * rng.uniform(low, high) * (2 * np.pi / size)
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
    zero = np.zeros((3, 3))
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
    paints = {name: texture("plain", colour, colour, zero, rng) for name, colour in solid.items()}
    paints["main"] = _pattern(pattern, main, other, size, rng)
    if rng.random() < 0.25:
        kind = str(rng.choice(("striped", "spotted", "marbled")))
        paints["second"] = _pattern(kind, second, np.clip(second + rng.choice((-0.22, 0.22)), 0.03, 0.97), size, rng)
    body_gloss = float(rng.uniform(0.0, 0.35))
    gloss = dict.fromkeys(paints, body_gloss * 0.6) | {
        "main": body_gloss,
        "glass": 0.6,
        "metal": 0.5,
        "dark": 0.18,
        "light": 0.3,
        "skin": 0.05,
        "drink": 0.4,
        "red": 0.4,
    }

    attributes = {"colour": main_name, "second colour": second_name, "pattern": pattern}
    floor, wall, clouds = None, None, 0.0
    horizon, overhead = np.array([0.80, 0.87, 0.93]), np.array([0.36, 0.58, 0.85])
    floor_name = back = place
    if place == "ground":
        floor_name = str(rng.choice(list(FLOORS)))
        tone = _shade_of(str(rng.choice(FLOORS[floor_name])), rng)
        if np.linalg.norm(tone - main) < 0.25:  # an object of the colour of its floor would be invisible
            tone = np.clip(tone + (0.22 if main.mean() < 0.5 else -0.22), 0.05, 0.95)
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
        back = str(
            rng.choice(("sky", "sky", "haze") if outdoors else ("wall", "striped wall", "brick wall", "haze", "wall"))
        )
        if "wall" in back:
            paper = _shade_of(str(rng.choice([c for c in COLOURS if c not in ("black",)])), rng)
            if np.linalg.norm(paper - main) < 0.25:
                paper = np.clip(paper + (0.22 if main.mean() < 0.5 else -0.22), 0.05, 0.95)
            paper = paper * 0.65 + 0.28  # walls are paler than objects
            stripe = np.clip(paper + rng.choice((-1, 1)) * rng.uniform(0.05, 0.15), 0, 1)
            kind = {"wall": "marbled", "striped wall": "striped", "brick wall": "bricks"}[back]
            if back == "brick wall":
                paper, stripe = paper * np.array([0.9, 0.7, 0.6]), np.full(3, 0.75)
            if back == "wall":
                stripe = paper * rng.uniform(0.86, 1.0)
            frame = np.eye(3) * (np.pi / size) * {"wall": 0.6, "striped wall": 3.0, "brick wall": 4.5}[back]
            wall = texture(kind, paper, stripe, frame, rng)
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
    count = int(rng.integers(0, 7)) if place != "sea" else int(rng.integers(0, 3))
    for i in range(count):
        angle = rng.uniform(np.radians(75), np.radians(285))  # 0 is towards the camera
        distance = ground * rng.uniform(1.12, 2.1)
        half = size * rng.uniform(0.05, 0.16)
        at = np.array([np.sin(angle) * distance, 0.0, np.cos(angle) * distance])
        paint = f"thing {i}"
        kind = rng.choice(
            ("ball", "box", "cone", "column", "bubble", "weed")
            if place == "water"
            else ("ball", "box", "cone", "column")
        )
        spin = turn("y", rng.uniform(0, np.pi))
        if place == "sea":
            body.tube("", paint, at, at + xyz(0, half * 2, 0), half * 0.6, half * 0.2)
            body.ball("", paint, at, half)
        elif kind == "ball":
            body.ball("", paint, at + xyz(0, half, 0), half)
        elif kind == "box":
            tall = half * rng.uniform(0.6, 1.6)
            body.add(block(), "", paint, at + xyz(0, tall, 0), (half, tall, half * rng.uniform(0.6, 1.2)), spin)
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
    tone = _shade_of(str(rng.choice(list(COLOURS))), rng)
    return texture("plain", tone, tone, np.zeros((3, 3)), rng)


def view_name(yaw: float) -> str:
    """The word for the side that is seen; 0 is the front, radians."""
    turned = abs((np.degrees(yaw) + 180) % 360 - 180)
    for limit, name in (
        (25, "front view"),
        (65, "front corner view"),
        (115, "side view"),
        (155, "back corner view"),
    ):
        if turned < limit:
            return name
    return "back view"


def describe(category: str, view: str, attributes: Mapping[str, str]) -> str:
    """The caption: what, which side of it, where."""
    pattern = "" if attributes["pattern"] == "plain" else f"{attributes['pattern']} "
    floor = attributes["floor"]
    where = _PHRASES.get(floor, f"on a {floor}")
    return f"a photo of a {attributes['colour']} {pattern}{category} {view} {where}"
