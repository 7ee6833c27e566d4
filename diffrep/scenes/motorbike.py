"""Motorbike."""

from __future__ import annotations

import numpy as np

from diffrep.scenes.build import SIDES, Body, turn, xyz
from diffrep.scenes.shapes import Clip, Tube, block


def motorbike(b: Body) -> None:
    """A motorbike with spoked wheels."""
    d = b.draw
    base, wheel = d.between(0.50, 0.60), d.between(0.235, 0.285)
    kind = d.choice(("low bars", "high bars"))
    b.variant = kind
    steer = turn("y", d.angle(20))
    axle = xyz(0, wheel, -base)
    front = xyz(0, wheel, base)
    head = np.array([0, wheel + d.between(0.40, 0.48), base * 0.60])
    for name, hub, rotation in (("rear wheel", axle, np.eye(3)), ("front wheel", front, None)):
        matrix = steer if rotation is None else rotation
        side = matrix @ xyz(1.0, 0, 0)
        centre = hub if rotation is not None else head + steer @ (hub - head)
        b.tube(name, "dark", centre - side * 0.055, centre + side * 0.055, wheel, inner=0.76)
        b.tube(name, "metal", centre - side * 0.045, centre + side * 0.045, wheel * 0.77, inner=0.9)
        for angle in (0.0, np.pi / 3, 2 * np.pi / 3):
            arm = matrix @ xyz(0, np.cos(angle), np.sin(angle)) * wheel * 0.72
            b.tube(name, "metal", centre - arm, centre + arm, 0.018)
        middle = b.tube(name, "metal", centre - side * 0.075, centre + side * 0.075, 0.055)
        for s, label in SIDES:
            b.point(f"{name} {label} hub", middle, (0, s, 0))
        if rotation is None:
            front = centre
    guard = Tube(1.0, 1.0, 0.93, (Clip((0.0, 0.0, 1.0), -0.15),))  # the upper arc only
    for name, centre, matrix in (("rear fender", axle, np.eye(3)), ("front fender", front, steer)):
        frame = matrix @ np.stack([[0, 0, 1.0], [1.0, 0, 0], [0, -1.0, 0]], axis=1)
        b.add(guard, name, "main", centre, (wheel * 1.13, 0.07, wheel * 1.13), frame)
    side = steer @ xyz(1.0, 0, 0)
    for s, _ in SIDES:
        b.tube("fork", "metal", front + side * s * 0.085, head + side * s * 0.085, 0.022)
    b.tube("frame", "second", head - xyz(0, 0.06, 0.02), axle + xyz(0, 0.26, 0.30), 0.035)
    b.tube("frame", "second", head - xyz(0, 0.10, 0.02), (0, wheel * 0.75, base * 0.12), 0.03)
    b.tube("frame", "second", axle, (0, wheel * 0.9, 0), 0.04)
    b.add(block((0.9, 0.8), 0.2), "engine", "metal", (0, wheel * 0.98, base * 0.04), (0.115, 0.13, 0.155))
    b.tube("engine", "dark", (0, wheel + 0.06, 0.02), (0, wheel + 0.24, 0.05), 0.095)
    top = head[1]
    tank = b.ball("tank", "main", (0, top - 0.045, base * 0.24), (0.125, 0.115, 0.225), turn("x", -0.14))
    b.point("tank top", tank, (0, 1, 0))
    seat = b.ball("seat", "dark", (0, top - 0.10, -base * 0.34), (0.12, 0.062, 0.24), turn("x", 0.10))
    b.point("seat", seat, (0, 1, -0.1))
    hump = b.ball("seat", "main", (0, top - 0.085, -base * 0.34 - 0.24), (0.09, 0.06, 0.13), turn("x", 0.3))
    b.point("tail", hump, (0, 0.2, -1))
    lamp = b.ball("headlight", "light", head + steer @ xyz(0, -0.02, 0.10), (0.085, 0.085, 0.07), steer)
    b.point("headlight", lamp, (0, 0, 1))
    rise = 0.06 if kind == "low bars" else 0.20
    for s, label in SIDES:
        grip = head + steer @ xyz(s * 0.17, 0.03 + rise, -0.03)
        end = grip + steer @ xyz(s * 0.13, 0.0, -0.08)
        b.tube(f"{label} handlebar", "metal", head + steer @ xyz(s * 0.02, 0.01, 0), grip, 0.018)
        bar = b.tube(f"{label} handlebar", "dark", grip, end, 0.026)
        b.point(f"{label} grip", bar, (0, 1, 0))
        pipe = b.tube(
            f"{label} exhaust",
            "metal",
            (s * 0.12, wheel * 0.62, base * 0.05),
            (s * 0.15, wheel * 0.80, -base * 1.02),
            0.034,
            0.046,
        )
        b.point(f"{label} exhaust end", pipe, (0, 1, 0))
        b.tube(f"{label} mirror", "dark", grip, grip + xyz(s * 0.03, 0.15, 0), 0.010)
        glass = b.ball(f"{label} mirror", "dark", grip + xyz(s * 0.04, 0.17, 0), (0.055, 0.035, 0.015))
        b.point(f"{label} mirror", glass, (s, 0, 0))
