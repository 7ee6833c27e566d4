"""Chair, lamp, mug and teapot."""

from __future__ import annotations

import numpy as np

from diffrep.scenes.build import SIDES, Body, turn, xyz
from diffrep.scenes.shapes import Clip, Tube, block


def chair(b: Body) -> None:
    """A chair with a panel, slats or bars as its back, with or without arm rests."""
    d = b.draw
    half, depth, height = d.between(0.25, 0.34), d.between(0.25, 0.33), d.between(0.42, 0.54)
    back, lean = d.between(0.46, 0.68), d.angle(6, 8)
    kind = d.choice(("panel", "slats", "bars"))
    b.variant = f"{kind} back"
    thick, leg = d.between(0.03, 0.06), d.between(0.022, 0.036)
    splay = d.between(0.0, 0.06)
    seat = b.add(block(), "seat", "main", (0, height, 0), (half, thick, depth))
    if d.chance(0.5):
        b.ball("seat", "second", (0, height + thick * 0.7, 0.01), (half * 0.88, 0.055, depth * 0.86))
    for s, side in SIDES:
        for end, z in (("front", 0.86), ("rear", -0.86)):
            top = xyz(s * half * 0.86, height - thick * 0.5, z * depth)
            foot = np.array([s * (half * 0.86 + splay), 0.0, z * depth + np.sign(z) * splay])
            post = b.tube(f"{side} {end} leg", "wood", foot, top, leg * 0.85, leg)
            b.point(f"{side} {end} foot", post, (0, -0.96, np.sign(z)))
        b.point(f"{side} front seat corner", seat, (s, 1, 1))
        b.point(f"{side} edge of the seat", seat, (s, 0, 0))
    if d.chance(0.6):
        for s, _ in SIDES:
            b.tube(
                "stretcher",
                "wood",
                (s * half * 0.88, height * 0.4, -depth * 0.86),
                (s * half * 0.88, height * 0.4, depth * 0.86),
                leg * 0.6,
            )
    tilt = turn("x", -lean)
    root = xyz(0, height, -depth * 0.88)

    def on_back(x: float, y: float) -> np.ndarray:
        return root + tilt @ xyz(x, y, 0.0)

    for s, side in SIDES:
        post = b.tube(f"{side} back post", "wood", on_back(s * half * 0.86, -0.02), on_back(s * half * 0.86, back), leg)
        b.point(f"{side} top corner of the back", post, (0, 1, 0))
    if kind == "panel":
        b.add(block(), "back rest", "main", on_back(0, back * 0.56), (half * 0.86, back * 0.36, 0.024), tilt)
    elif kind == "slats":
        for share in (0.32, 0.6, 0.88):
            b.add(
                block(),
                "back rest",
                "main",
                on_back(0, back * share),
                (half * 0.86, back * 0.09, 0.018),
                tilt,
            )
    else:
        for x in (-0.48, -0.16, 0.16, 0.48):
            b.tube("back rest", "wood", on_back(x * half, 0), on_back(x * half, back * 0.86), leg * 0.6)
    rail = b.add(block(), "back rest", "main", on_back(0, back * 0.90), (half * 0.86, back * 0.10, 0.028), tilt)
    b.point("middle of the back, front", rail, (0, 0, 1))
    b.point("middle of the back, rear", rail, (0, 0, -1))
    b.point("front edge of the seat", seat, (0, 0, 1))
    if d.chance(0.4):
        for s, side in SIDES:
            high = height + back * 0.36
            b.tube(
                f"{side} arm rest",
                "wood",
                (s * half * 0.94, height, depth * 0.72),
                (s * half * 0.94, high, depth * 0.72),
                leg * 0.8,
            )
            b.add(
                block(),
                f"{side} arm rest",
                "wood",
                (s * half * 0.94, high, -depth * 0.05),
                (0.035, 0.02, depth * 0.88),
            )


def lamp(b: Body) -> None:
    """A desk lamp: base, two arms, a shade that looks forwards and down."""
    d = b.draw
    base, lower, upper = d.between(0.20, 0.28), d.between(0.42, 0.58), d.between(0.40, 0.54)
    kind = d.choice(("round base", "square base"))
    b.variant = kind
    thick = d.between(0.016, 0.026)
    first, second, nod = d.angle(14, -22), d.angle(16, 48), d.angle(20, 140)
    if kind == "round base":
        foot = b.tube("base", "main", (0, 0, 0), (0, 0.06, 0), base, base * 0.92)
    else:
        foot = b.add(block((0.92, 0.92)), "base", "main", (0, 0.03, 0), (base * 0.88, 0.03, base * 0.88))
    b.point("front of the base", foot, (0, 0, 0.96))
    b.point("rear of the base", foot, (0, 0, -0.96))
    for s, side in SIDES:
        b.point(f"{side} of the base", foot, (s * 0.96, 0, 0))
    root = xyz(0, 0.07, -base * 0.45)
    b.ball("joint", "dark", root, 0.05)
    elbow = root + lower * xyz(0, np.cos(first), np.sin(first))
    wrist = elbow + upper * xyz(0, np.cos(second), np.sin(second))
    double = d.chance(0.5)
    for s in (1.0, -1.0) if double else (0.0,):
        off = xyz(s * 0.035, 0, 0)
        b.tube("lower arm", "metal", root + off, elbow + off, thick)
        b.tube("upper arm", "metal", elbow + off, wrist + off, thick)
    joint = b.tube("joint", "dark", elbow - xyz(0.065, 0, 0), elbow + xyz(0.065, 0, 0), 0.045)
    for s, side in SIDES:
        b.point(f"{side} of the elbow", joint, (0, s, 0))
    look = xyz(0, np.cos(nod), np.sin(nod))
    across = xyz(0, -np.sin(nod), np.cos(nod))
    wide, deep = d.between(0.17, 0.24), d.between(0.24, 0.32)
    neck = wrist + look * 0.02
    shade = b.tube("shade", "second", neck, neck + look * deep, wide * 0.36, wide, inner=0.92)
    b.tube("shade", "second", neck - look * 0.07, neck + look * 0.02, wide * 0.26, wide * 0.40)
    b.point("top of the shade", b.primitives[-1], (0, -1, 0))
    bulb = b.ball("bulb", "light", neck + look * deep * 0.62, wide * 0.34)
    b.point("bulb", bulb, look)
    inverse = np.linalg.inv(shade.linear[:, [0, 2]].T @ shade.linear[:, [0, 2]]) @ shade.linear[:, [0, 2]].T
    for name, direction in (
        ("left of the rim", [1.0, 0, 0]),
        ("right of the rim", [-1.0, 0, 0]),
        ("front of the rim", across),
        ("rear of the rim", -across),
    ):
        x, z = inverse @ np.asarray(direction)
        b.point(name, shade, (x, 0.94, z))
    b.ball("joint", "dark", wrist, 0.045)


def mug(b: Body) -> None:
    """A mug; its handle is at the rear."""
    d = b.draw
    radius, tall = d.between(0.34, 0.44), d.between(0.36, 0.52)
    taper = d.between(0.80, 1.0)
    kind = d.choice(("round handle", "square handle"))
    b.variant = kind
    wall = b.tube("body", "main", (0, 0, 0), (0, 2 * tall, 0), radius * taper, radius, inner=0.88)
    b.tube("body", "main", (0, 0.01, 0), (0, 0.07, 0), radius * taper * 0.97)
    drink = d.chance(0.5)
    if drink:
        level = tall * 2 * 0.8
        b.tube("drink", "drink", (0, level - 0.02, 0), (0, level, 0), radius * 0.86)
    if d.chance(0.6):
        low, high = 0.3, d.between(0.5, 0.75)
        widths = [radius * (taper + (1 - taper) * share) * 1.012 for share in (low, high)]
        b.tube("band", "second", (0, 2 * tall * low, 0), (0, 2 * tall * high, 0), *widths, inner=0.9)
    around = (("front", (0.0, 1.0)), ("rear", (0.0, -1.0)), ("left", (1.0, 0.0)), ("right", (-1.0, 0.0)))
    into = np.linalg.inv(wall.linear)
    for name, (x, z) in around:
        local = into @ xyz(x, 0, z)
        b.point(f"{name} of the rim", wall, (local[0], 1, local[2]))
        b.point(f"{name} of the foot", wall, (local[0], -1, local[2]))
        b.point(f"{name} of the wall", wall, (local[0], 0.62, local[2]))
    # The handle leans with the wall and ends inside it.
    size, middle = tall * d.between(0.52, 0.66), tall * d.between(0.95, 1.08)
    lean = turn("x", -np.arctan(radius * (1 - taper) / (2 * tall)))
    root = xyz(0, middle, -radius * (taper + (1 - taper) * middle / (2 * tall)))
    inside = radius * 0.05
    reach = size * d.between(0.75, 1.0)
    if kind == "round handle":
        ring = Tube(1.0, 1.0, 0.72, (Clip((1.0, 0.0, 0.0), 0.0),))
        frame = lean @ np.stack([[0, 0, 1.0], [1.0, 0, 0], [0, 1.0, 0]], axis=1)
        handle = b.add(ring, "handle", "second", root + xyz(0, 0, inside), (reach, 0.06, size), frame)
        b.point("handle top", handle, (-0.2, 0, 1))
        b.point("handle rear", handle, (-1, 0, 0))
    else:
        for y in (-size * 0.8, size * 0.8):
            at = root + lean @ xyz(0, y, (inside - reach) / 2)
            bar = b.add(block(), "handle", "second", at, (0.055, 0.05, (inside + reach) / 2), lean)
        b.point("handle top", bar, (0, 1, -0.5))
        at = root + lean @ xyz(0, 0, -reach)
        bar = b.add(block(), "handle", "second", at, (0.055, size * 0.8 + 0.05, 0.05), lean)
        b.point("handle rear", bar, (0, 0, -1))


def teapot(b: Body) -> None:
    """A teapot: spout in front, handle at the rear. Never in training."""
    d = b.draw
    radius, tall = d.between(0.42, 0.52), d.between(0.32, 0.44)
    kind = d.choice(("low lid", "high lid"))
    b.variant = kind
    middle = tall * 0.95
    b.ball("body", "main", (0, middle, 0), (radius, tall, radius))
    rim = b.tube(
        "body",
        "main",
        (0, middle + tall * 0.62, 0),
        (0, middle + tall * 1.02, 0),
        radius * 0.66,
        radius * 0.52,
    )
    foot = b.tube("body", "main", (0, 0, 0), (0, tall * 0.32, 0), radius * 0.62, radius * 0.66)
    high = tall * (0.28 if kind == "low lid" else 0.55)
    top = middle + tall * 1.0
    b.ball("lid", "second", (0, top, 0), (radius * 0.52, high, radius * 0.52))
    knob = b.ball("lid", "bright", (0, top + high + 0.035, 0), 0.065)
    b.point("lid knob", knob, (0, 1, 0))
    around = (("front", (0.0, 1.0)), ("rear", (0.0, -1.0)), ("left", (1.0, 0.0)), ("right", (-1.0, 0.0)))
    for name, (x, z) in around:
        for primitive, where, y in ((rim, "rim", 1), (foot, "foot", -1)):
            local = np.linalg.inv(primitive.linear) @ xyz(x, 0, z)
            b.point(f"{name} of the {where}", primitive, (local[0], y, local[2]))
    reach, rise = d.between(0.34, 0.46), d.between(0.34, 0.50)
    start = xyz(0, middle - tall * 0.25, radius * 0.72)
    bend = start + xyz(0, rise * 0.35, reach * 0.62)
    end = bend + xyz(0, rise * 0.72, reach * 0.36)
    b.tube("spout", "main", start, bend, 0.15, 0.09)
    b.ball("spout", "main", bend, 0.09)
    tip = b.tube("spout", "main", bend, end, 0.09, 0.06, inner=0.7)
    b.point("spout tip", tip, (0, 1, 1))
    size, attach = tall * d.between(0.62, 0.78), -radius * 0.86
    ring = Tube(1.0, 1.0, 0.76, (Clip((1.0, 0.0, 0.0), 0.65),))
    frame = np.stack([[0, 0, 1.0], [1.0, 0, 0], [0, 1.0, 0]], axis=1)
    handle = b.add(ring, "handle", "second", (0, middle + tall * 0.1, attach), (size * 0.9, 0.055, size), frame)
    b.point("handle top", handle, (0, 0, 1))
    b.point("handle rear", handle, (-1, 0, 0))
