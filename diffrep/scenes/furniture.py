"""Chair, lamp, mug and teapot."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffrep.scenes.build import SIDES, Body, Points, Primitive, turn, xyz
from diffrep.scenes.shapes import Array, Clip, Tube, block

_AROUND = {"front": (0, 1), "rear": (0, -1), "left": (1, 0), "right": (-1, 0)}  # x, z
_UPRIGHT = np.stack([[0, 0, 1.0], [1.0, 0, 0], [0, 1.0, 0]], axis=1)  # a ring's axis along x


def chair(b: Body) -> None:
    """A chair with a panel, slats or bars as its back, with or without arm rests."""
    d = b.draw
    points: Points
    half, depth, height = d.between(0.25, 0.34), d.between(0.25, 0.33), d.between(0.42, 0.54)
    back, lean = d.between(0.46, 0.68), d.angle(6, 8)
    kind = d.choice(("panel", "slats", "bars"))
    b.variant = f"{kind} back"
    thick, leg = d.between(0.03, 0.06), d.between(0.022, 0.036)
    splay = d.between(0.0, 0.06)
    points = {"front edge of the seat": (0, 0, 1)}
    for s, side in SIDES:
        points |= {f"{side} front seat corner": (s, 1, 1), f"{side} edge of the seat": (s, 0, 0)}
    b.box("seat", "main", (0, height, 0), (half, thick, depth), points=points)
    if d.chance(0.5):
        b.ball("seat", "second", (0, height + thick * 0.7, 0.01), (half * 0.88, 0.055, depth * 0.86))
    for s, side in SIDES:
        for end, z in (("front", 0.86), ("rear", -0.86)):
            top = xyz(s * half * 0.86, height - thick * 0.5, z * depth)
            foot = np.array([s * (half * 0.86 + splay), 0.0, z * depth + np.sign(z) * splay])
            points = {f"{side} {end} foot": (0, -0.96, np.sign(z))}
            b.tube(f"{side} {end} leg", "wood", foot, top, leg * 0.85, leg, points=points)
    if d.chance(0.6):
        for s, _ in SIDES:
            x, y, z = s * half * 0.88, height * 0.4, depth * 0.86
            b.tube("stretcher", "wood", (x, y, -z), (x, y, z), leg * 0.6)
    tilt = turn("x", -lean)
    root = xyz(0, height, -depth * 0.88)

    def on_back(x: float, y: float) -> Array:
        return root + tilt @ xyz(x, y, 0.0)

    for s, side in SIDES:
        x, points = s * half * 0.86, {f"{side} top corner of the back": (0, 1, 0)}
        b.tube(f"{side} back post", "wood", on_back(x, -0.02), on_back(x, back), leg, points=points)
    if kind == "panel":
        b.box("back rest", "main", on_back(0, back * 0.56), (half * 0.86, back * 0.36, 0.024), tilt)
    elif kind == "slats":
        for share in (0.32, 0.6, 0.88):
            b.box("back rest", "main", on_back(0, back * share), (half * 0.86, back * 0.09, 0.018), tilt)
    else:
        for x in (-0.48, -0.16, 0.16, 0.48):
            b.tube("back rest", "wood", on_back(x * half, 0), on_back(x * half, back * 0.86), leg * 0.6)
    points = {"middle of the back, front": (0, 0, 1), "middle of the back, rear": (0, 0, -1)}
    b.box("back rest", "main", on_back(0, back * 0.90), (half * 0.86, back * 0.10, 0.028), tilt, points=points)
    if d.chance(0.4):
        high = height + back * 0.36
        for s, side in SIDES:
            x, z = s * half * 0.94, depth * 0.72
            b.tube(f"{side} arm rest", "wood", (x, height, z), (x, high, z), leg * 0.8)
            b.box(f"{side} arm rest", "wood", (x, high, -depth * 0.05), (0.035, 0.02, depth * 0.88))


def lamp(b: Body) -> None:
    """A desk lamp: base, two arms, a shade that looks forwards and down."""
    d = b.draw
    points: Points
    base, lower, upper = d.between(0.20, 0.28), d.between(0.42, 0.58), d.between(0.40, 0.54)
    b.variant = d.choice(("round base", "square base"))
    thick = d.between(0.016, 0.026)
    first, second, nod = d.angle(14, -22), d.angle(16, 48), d.angle(20, 140)
    points = {f"{name} of the base": (x * 0.96, 0, z * 0.96) for name, (x, z) in _AROUND.items()}
    if b.variant == "round base":
        b.tube("base", "main", (0, 0, 0), (0, 0.06, 0), base, base * 0.92, points=points)
    else:
        half = (base * 0.88, 0.03, base * 0.88)
        b.add(block((0.92, 0.92)), "base", "main", (0, 0.03, 0), half, points=points)
    root = xyz(0, 0.07, -base * 0.45)
    b.ball("joint", "dark", root, 0.05)
    elbow = root + lower * xyz(0, np.cos(first), np.sin(first))
    wrist = elbow + upper * xyz(0, np.cos(second), np.sin(second))
    for s in (1.0, -1.0) if d.chance(0.5) else (0.0,):  # double arms
        off = xyz(s * 0.035, 0, 0)
        b.tube("lower arm", "metal", root + off, elbow + off, thick)
        b.tube("upper arm", "metal", elbow + off, wrist + off, thick)
    points = {f"{side} of the elbow": (0, s, 0) for s, side in SIDES}
    b.tube("joint", "dark", elbow - xyz(0.065, 0, 0), elbow + xyz(0.065, 0, 0), 0.045, points=points)
    look = xyz(0, np.cos(nod), np.sin(nod))
    across = xyz(0, -np.sin(nod), np.cos(nod))
    wide, deep = d.between(0.17, 0.24), d.between(0.24, 0.32)
    neck = wrist + look * 0.02
    shade = b.tube("shade", "second", neck, neck + look * deep, wide * 0.36, wide, inner=0.92)
    points = {"top of the shade": (0, -1, 0)}
    b.tube("shade", "second", neck - look * 0.07, neck + look * 0.02, wide * 0.26, wide * 0.40, points=points)
    b.ball("bulb", "light", neck + look * deep * 0.62, wide * 0.34, points={"bulb": look})
    flat = shade.linear[:, [0, 2]]
    inverse = np.linalg.inv(flat.T @ flat) @ flat.T
    for name, (side, ahead) in _AROUND.items():
        x, z = inverse @ np.asarray([float(side), 0, 0] if side else ahead * across)
        b.point(f"{name} of the rim", shade, (x, 0.94, z))
    b.ball("joint", "dark", wrist, 0.045)


def _points_around(b: Body, vessel: Primitive, heights: Mapping[str, float]) -> None:
    """Name points of a round wall on its four sides, at local heights."""
    for name, (x, z) in _AROUND.items():
        local = np.linalg.inv(vessel.linear) @ xyz(x, 0, z)
        for where, y in heights.items():
            b.point(f"{name} of the {where}", vessel, (local[0], y, local[2]))


def mug(b: Body) -> None:
    """A mug; its handle is at the rear."""
    d = b.draw
    points: Points
    radius, tall = d.between(0.34, 0.44), d.between(0.36, 0.52)
    taper = d.between(0.80, 1.0)
    b.variant = d.choice(("round handle", "square handle"))
    wall = b.tube("body", "main", (0, 0, 0), (0, 2 * tall, 0), radius * taper, radius, inner=0.88)
    b.tube("body", "main", (0, 0.01, 0), (0, 0.07, 0), radius * taper * 0.97)
    if d.chance(0.5):
        level = tall * 2 * 0.8
        b.tube("drink", "drink", (0, level - 0.02, 0), (0, level, 0), radius * 0.86)
    if d.chance(0.6):
        low, high = 0.3, d.between(0.5, 0.75)
        widths = [radius * (taper + (1 - taper) * share) * 1.012 for share in (low, high)]
        b.tube("band", "second", (0, 2 * tall * low, 0), (0, 2 * tall * high, 0), *widths, inner=0.9)
    _points_around(b, wall, {"rim": 1, "foot": -1, "wall": 0.62})
    # The handle leans with the wall and ends inside it.
    size, middle = tall * d.between(0.52, 0.66), tall * d.between(0.95, 1.08)
    lean = turn("x", -np.arctan(radius * (1 - taper) / (2 * tall)))
    root = xyz(0, middle, -radius * (taper + (1 - taper) * middle / (2 * tall)))
    inside = radius * 0.05
    reach = size * d.between(0.75, 1.0)
    if b.variant == "round handle":
        ring = Tube(1.0, 1.0, 0.72, (Clip((1.0, 0.0, 0.0), 0.0),))
        points = {"handle top": (-0.2, 0, 1), "handle rear": (-1, 0, 0)}
        at = root + xyz(0, 0, inside)
        b.add(ring, "handle", "second", at, (reach, 0.06, size), lean @ _UPRIGHT, points=points)
    else:
        for y, points in ((-size * 0.8, {}), (size * 0.8, {"handle top": (0, 1, -0.5)})):
            at = root + lean @ xyz(0, y, (inside - reach) / 2)
            b.box("handle", "second", at, (0.055, 0.05, (inside + reach) / 2), lean, points=points)
        at, points = root + lean @ xyz(0, 0, -reach), {"handle rear": (0, 0, -1)}
        b.box("handle", "second", at, (0.055, size * 0.8 + 0.05, 0.05), lean, points=points)


def teapot(b: Body) -> None:
    """A teapot: spout in front, handle at the rear. Never in training."""
    d = b.draw
    points: Points
    radius, tall = d.between(0.42, 0.52), d.between(0.32, 0.44)
    b.variant = d.choice(("low lid", "high lid"))
    middle = tall * 0.95
    b.ball("body", "main", (0, middle, 0), (radius, tall, radius))
    low, high = (0, middle + tall * 0.62, 0), (0, middle + tall * 1.02, 0)
    rim = b.tube("body", "main", low, high, radius * 0.66, radius * 0.52)
    foot = b.tube("body", "main", (0, 0, 0), (0, tall * 0.32, 0), radius * 0.62, radius * 0.66)
    raised = tall * (0.28 if b.variant == "low lid" else 0.55)
    top = middle + tall * 1.0
    b.ball("lid", "second", (0, top, 0), (radius * 0.52, raised, radius * 0.52))
    b.ball("lid", "bright", (0, top + raised + 0.035, 0), 0.065, points={"lid knob": (0, 1, 0)})
    _points_around(b, rim, {"rim": 1})
    _points_around(b, foot, {"foot": -1})
    reach, rise = d.between(0.34, 0.46), d.between(0.34, 0.50)
    start = xyz(0, middle - tall * 0.25, radius * 0.72)
    bend = start + xyz(0, rise * 0.35, reach * 0.62)
    end = bend + xyz(0, rise * 0.72, reach * 0.36)
    b.tube("spout", "main", start, bend, 0.15, 0.09)
    b.ball("spout", "main", bend, 0.09)
    b.tube("spout", "main", bend, end, 0.09, 0.06, inner=0.7, points={"spout tip": (0, 1, 1)})
    size, attach = tall * d.between(0.62, 0.78), -radius * 0.86
    ring = Tube(1.0, 1.0, 0.76, (Clip((1.0, 0.0, 0.0), 0.65),))
    at, points = (0, middle + tall * 0.1, attach), {"handle top": (0, 0, 1), "handle rear": (-1, 0, 0)}
    b.add(ring, "handle", "second", at, (size * 0.9, 0.055, size), _UPRIGHT, points=points)
