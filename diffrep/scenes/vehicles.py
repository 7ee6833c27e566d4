"""Car, plane, boat and truck."""

from __future__ import annotations

import numpy as np

from diffrep.scenes.build import SIDES, Body, turn, xyz
from diffrep.scenes.shapes import block, prism


def _wheel(b: Body, name: str, s: float, at: np.ndarray, radius: float, width: float) -> None:
    """A tyre with a hub on its outer side, named at the hub."""
    out = xyz(s * width / 2, 0, 0)
    b.tube(name, "dark", at - out, at + out, radius)
    b.tube(name, "metal", at, at + out * 1.12, radius * 0.6)
    b.tube(name, "dark", at, at + out * 1.2, radius * 0.16)
    b.point(name, b.primitives[-1], (0, 1, 0))


def _lights(b: Body, front: float, back: float, x: float, y: float, size: float) -> None:
    for s, side in SIDES:
        lamp = b.ball(f"{side} headlight", "light", (s * x, y, front), (size * 1.2, size, size * 0.5))
        b.point(f"{side} headlight", lamp, (0, 0, 1))
        rear = b.ball(f"{side} tail light", "red", (s * x, y, back), (size * 1.1, size * 0.8, size * 0.5))
        b.point(f"{side} tail light", rear, (0, 0, -1))


def car(b: Body) -> None:
    """A car with a cabin of one of four forms."""
    d = b.draw
    long, half = d.between(0.82, 1.0), d.between(0.34, 0.42)
    deck, low = d.between(0.40, 0.48), d.between(0.13, 0.18)
    wheel = d.between(0.155, 0.200)
    form = d.choice(("sedan", "hatchback", "wagon", "pickup"))
    b.variant = form
    lower = prism(
        [(-0.98, -1.0), (0.97, -1.0), (1.0, -0.1), (0.93, 0.62), (0.4, 1.0), (-0.9, 1.0), (-1.0, 0.5)],
        axis="x",
        taper=(0.9, 1.0),
    )
    b.add(lower, "body", "main", (0, (deck + low) / 2, 0), (half, (deck - low) / 2, long))
    for end, s in (("front", 1.0), ("rear", -1.0)):
        bumper = b.add(block(), "bumper", "dark", (0, low + 0.03, s * long * 0.98), (half * 0.94, 0.045, 0.045))
        b.point(f"{end} bumper", bumper, (0, 0, s))
    tall = d.between(0.23, 0.30)
    front = d.between(0.36, 0.46)
    back, rake = {
        "sedan": (-0.62, 0.24),
        "hatchback": (-0.86, 0.26),
        "wagon": (-0.94, 0.10),
        "pickup": (-0.16, 0.06),
    }[form]
    back, rake = d.form(back, -0.66), d.form(rake, 0.17)
    slope = d.between(0.26, 0.36)
    profile = [(front, -1.0), (front - slope, 1.0), (back + rake, 1.0), (back, -1.0)]
    b.add(
        prism(profile, axis="x", taper=(0.80, 1.0)),
        "windows",
        "glass",
        (0, deck + tall / 2, 0),
        (half * 0.88, tall / 2, long),
    )
    length = (front - slope) - (back + rake)
    roof = b.add(
        block((0.97, 0.97)),
        "roof",
        "main",
        (0, deck + tall, (front - slope + back + rake) / 2 * long),
        (half * 0.74, 0.022, length / 2 * long + 0.03),
    )
    for s, side in SIDES:
        b.point(f"front {side} roof corner", roof, (s * 0.97, 1, 0.97))
        b.point(f"rear {side} roof corner", roof, (s * 0.97, 1, -0.97))
        for end, z in (("front", 0.60), ("rear", -0.62)):
            _wheel(b, f"{end} {side} wheel", s, xyz(s * half * 0.9, wheel, z * long), wheel, half * 0.36)
        b.tube(
            "windows",
            "main",
            (s * half * 0.87, deck - 0.02, (front - slope * 0.5 - 0.34) * long),
            (s * half * 0.74, deck + tall, (front - slope * 0.5 - 0.34) * long),
            0.02,
        )
        b.ball(
            f"{side} mirror",
            "main",
            (s * half * 1.06, deck + 0.05, (front - 0.06) * long),
            (0.055, 0.04, 0.035),
        )
        b.point(f"{side} mirror", b.primitives[-1], (s, 0, 0.2))
    _lights(b, long * 0.965, -long * 0.975, half * 0.66, (deck + low) / 2 + 0.05, 0.06)
    if form == "pickup":
        b.add(block(), "body", "dark", (0, deck, -0.58 * long), (half * 0.74, 0.012, long * 0.34))
    extra = d.choice(("none", "antenna", "spoiler", "rack"))
    if extra == "antenna":
        b.tube(
            "antenna",
            "dark",
            (0, deck + tall, (back + rake + 0.06) * long),
            (0, deck + tall + 0.24, (back + rake - 0.06) * long),
            0.011,
        )
    elif extra == "spoiler":
        b.add(block(), "spoiler", "second", (0, deck + 0.12, -0.93 * long), (half * 0.8, 0.018, 0.08))
        for s, _ in SIDES:
            b.tube(
                "spoiler",
                "second",
                (s * half * 0.5, deck - 0.03, -0.93 * long),
                (s * half * 0.5, deck + 0.12, -0.93 * long),
                0.02,
            )
    elif extra == "rack":
        for s, _ in SIDES:
            b.tube(
                "rack",
                "metal",
                (s * half * 0.58, deck + tall + 0.06, roof.centre[2] - length * long * 0.38),
                (s * half * 0.58, deck + tall + 0.06, roof.centre[2] + length * long * 0.38),
                0.016,
            )
        for z in (-0.25, 0.25):
            b.tube(
                "rack",
                "metal",
                (-half * 0.62, deck + tall + 0.035, roof.centre[2] + z * length * long),
                (half * 0.62, deck + tall + 0.035, roof.centre[2] + z * length * long),
                0.014,
            )


def truck(b: Body) -> None:
    """A truck: a tall cab before a long load. Never in training."""
    d = b.draw
    long, half = d.between(0.92, 1.08), d.between(0.32, 0.38)
    wheel = d.between(0.150, 0.185)
    floor = wheel * 1.5
    load = d.choice(("box", "tank", "open"))
    b.variant = f"{load} load"
    cab, tall = d.between(0.42, 0.52), d.between(0.52, 0.64)
    b.add(block(), "chassis", "dark", (0, floor - 0.04, -0.02), (half * 0.72, 0.05, long * 0.97))
    start = long - cab
    body = prism([(-1.0, -1.0), (1.0, -1.0), (1.0, 0.05), (0.55, 1.0), (-1.0, 1.0)], axis="x", taper=(0.92, 1.0))
    b.add(body, "body", "main", (0, floor + tall / 2, start + cab / 2), (half, tall / 2, cab / 2))
    pane = prism([(1.01, 0.12), (0.62, 0.88), (0.2, 0.88), (0.2, 0.12)], axis="x", taper=(0.94, 1.02))
    b.add(pane, "windows", "glass", (0, floor + tall / 2, start + cab / 2 + 0.008), (half, tall / 2, cab / 2))
    roof = b.add(
        block((0.97, 0.97)),
        "roof",
        "main",
        (0, floor + tall, start + cab * 0.38),
        (half * 0.86, 0.022, cab * 0.39),
    )
    high = tall * d.between(1.0, 1.35)
    rear, front = -long, start - 0.05
    middle, reach = (rear + front) / 2, (front - rear) / 2
    if load == "box":
        b.add(block(), "load", "second", (0, floor + high / 2, middle), (half * 1.04, high / 2, reach))
    elif load == "tank":
        b.tube("load", "second", (0, floor + half * 0.95, rear), (0, floor + half * 0.95, front), half * 0.95)
        b.tube(
            "load",
            "metal",
            (0, floor + half * 0.95, middle - 0.04),
            (0, floor + half * 0.95, middle + 0.04),
            half * 0.98,
        )
    else:
        b.add(block(), "load", "second", (0, floor + 0.03, middle), (half, 0.03, reach))
        for z in (rear + 0.02, front - 0.02):
            b.add(block(), "load", "second", (0, floor + 0.14, z), (half, 0.14, 0.02))
        for s, _ in SIDES:
            b.add(block(), "load", "second", (s * half * 0.96, floor + 0.14, middle), (0.02, 0.14, reach))
    for s, side in SIDES:
        b.point(f"front {side} roof corner", roof, (s * 0.97, 1, 0.97))
        b.point(f"rear {side} roof corner", roof, (s * 0.97, 1, -0.97))
        for end, z in (("front", long - cab * 0.45), ("rear", -0.66 * long)):
            _wheel(b, f"{end} {side} wheel", s, xyz(s * half * 0.86, wheel, z), wheel, half * 0.4)
        arm = b.add(
            block(),
            f"{side} mirror",
            "dark",
            (s * half * 1.12, floor + tall * 0.66, long - cab * 0.14),
            (0.03, 0.075, 0.025),
        )
        b.point(f"{side} mirror", arm, (s, 0, 0))
        if d.chance(0.5):
            b.tube(
                "exhaust",
                "metal",
                (s * half * 0.8, floor, start - 0.025),
                (s * half * 0.8, floor + tall * 1.2, start - 0.025),
                0.028,
            )
    _lights(b, long, -long * 0.99, half * 0.7, floor + 0.03, 0.055)


def plane(b: Body) -> None:
    """An aeroplane with jets or a propeller."""
    d = b.draw
    long, girth = d.between(0.85, 1.0), d.between(0.105, 0.145)
    engine = d.choice(("jet", "propeller"))
    b.variant = engine
    gear = d.chance(0.5)
    b.places = ("sky", "ground") if gear else ("sky",)
    y = 0.45
    b.tube("body", "main", (0, y, -long * 0.45), (0, y, long * 0.62), girth)
    nose = b.ball("body", "main", (0, y, long * 0.62), (girth, girth, long * 0.30))
    b.tube("body", "main", (0, y + girth * 0.45, -long), (0, y, -long * 0.45), girth * 0.3, girth)
    b.ball("windows", "glass", (0, y + girth * 0.5, long * 0.66), (girth * 0.72, girth * 0.55, long * 0.12))
    b.point("nose", nose, (0, 0, 1))
    b.point("tail end", b.primitives[2], (0, -1, 0))
    b.point("cockpit", b.primitives[-1], (0, 0.8, 0.5))
    span, chord, sweep = d.between(0.78, 1.02), d.between(0.17, 0.25), d.between(0.02, 0.34)
    dihedral = d.angle(4, 5)
    mount = y + d.form(d.choice((-0.55, 0.6)), 0) * girth
    tip, ratio = -sweep / chord, d.between(0.40, 0.70)
    tail_span, tail_chord = span * d.between(0.32, 0.42), chord * 0.6
    for s, side in SIDES:
        root = xyz(0, mount, long * 0.10)
        plan = prism([(1.0, 0.0), (tip + ratio, s), (tip - ratio, s), (-1.0, 0.0)], axis="y")
        wing = b.add(plan, f"{side} wing", "second", root, (span, 0.022, chord), turn("z", s * dihedral))
        b.point(f"{side} wing tip front", wing, (s, 1, tip + ratio))
        b.point(f"{side} wing tip rear", wing, (s, 1, tip - ratio))
        if engine == "jet":
            share = 0.36
            at = root + np.array(
                [s * span * share, np.sin(dihedral) * span * share - 0.075, chord * (1 + tip * share) - 0.06]
            )
            b.tube(f"{side} engine", "metal", at - xyz(0, 0, 0.13), at + xyz(0, 0, 0.10), 0.045, 0.062, inner=0.8)
            b.tube(f"{side} engine", "dark", at - xyz(0, 0, 0.12), at + xyz(0, 0, 0.05), 0.036, 0.05)
        plan = prism([(1.0, 0.0), (-0.1, s), (-1.0, s), (-1.0, 0.0)], axis="y")
        at = xyz(0, y + girth * 0.45, -long * 0.86)
        tail = b.add(plan, f"{side} tailplane", "second", at, (tail_span, 0.018, tail_chord))
        b.point(f"{side} tailplane tip", tail, (s, 1, -0.5))
    high = d.between(0.26, 0.38)
    fin = prism([(1.0, -1.0), (-0.35, 1.0), (-1.0, 1.0), (-1.0, -1.0)], axis="x")
    rudder = b.add(
        fin,
        "fin",
        "bright",
        (0, y + girth * 0.4 + high / 2, -long * 0.85),
        (0.018, high / 2, tail_chord * 1.15),
    )
    b.point("fin tip front", rudder, (0, 1, -0.35))
    b.point("fin tip rear", rudder, (0, 1, -1))
    if engine == "propeller":
        tilt = d.angle(80)
        at = xyz(0, y, long * 0.92)
        b.ball("propeller", "dark", at, (0.045, 0.045, 0.07))
        b.add(block(), "propeller", "dark", at, (0.018, 0.27, 0.012), turn("z", tilt))
    if gear:
        for s, z in ((1, -0.02), (-1, -0.02), (0, 0.5)):
            foot = xyz(s * 0.2, y - girth - 0.15, z * long)
            b.tube("gear", "metal", (s * 0.12, y - girth * 0.4, z * long), foot, 0.014)
            b.tube("gear", "dark", foot - xyz(0.025, 0, 0), foot + xyz(0.025, 0, 0), 0.05)


def boat(b: Body) -> None:
    """A boat on the water with a cabin, a mast and perhaps sails."""
    d = b.draw
    long, half = d.between(0.80, 1.0), d.between(0.27, 0.36)
    deep = d.between(0.24, 0.32)
    kind = d.choice(("sailing boat", "motor boat"))
    b.variant = kind
    b.places = ("sea",)
    plan = [(1.0, 0.0), (0.72, 0.42), (0.3, 0.86), (-0.2, 1.0), (-1.0, 0.86)]
    flare = 1.28
    polygon = [(z, x) for z, x in plan] + [(z, -x) for z, x in reversed(plan[1:])]
    low, high = -0.09, deep - 0.09
    scale = xyz(half, deep / 2, long) / [flare, 1, flare]
    b.add(prism(polygon, axis="y", taper=(flare, flare)), "hull", "main", (0, (low + high) / 2, 0), scale)
    hull = b.primitives[-1]
    b.point("bow", hull, (0, 1, flare))
    rim = b.add(prism(polygon, axis="y"), "deck", "second", (0, high + 0.012, 0), (half * 1.03, 0.022, long * 1.02))
    for s, side in SIDES:
        b.point(f"{side} stern corner", rim, (s * 0.86, 1, -1))
        b.point(f"{side} widest point", rim, (s * 1.0, 1, -0.2))
    b.add(prism(polygon, axis="y"), "deck", "wood", (0, high + 0.022, -0.02), (half * 0.9, 0.016, long * 0.9))
    tall, size = d.between(0.15, 0.24), d.between(0.20, 0.30)
    sails = kind == "sailing boat"
    z = (d.between(-0.13, 0.13) + d.form(-0.23 if sails else -0.07, -0.15)) * long
    profile = [(1.0, -1.0), (0.6, 1.0), (-0.92, 1.0), (-1.0, -1.0)]
    b.add(
        prism(profile, axis="x", taper=(0.86, 1.0)),
        "cabin",
        "light",
        (0, high + 0.03 + tall / 2, z),
        (half * 0.6, tall / 2, size),
    )
    cabin = b.primitives[-1]
    b.add(
        prism([(0.93, -0.1), (0.68, 0.7), (-0.86, 0.7), (-0.9, -0.1)], axis="x", taper=(0.9, 1.02)),
        "windows",
        "glass",
        (0, high + 0.03 + tall / 2, z + 0.012),
        (half * 0.6, tall / 2, size * 1.0),
    )
    for s, side in SIDES:
        b.point(f"front {side} cabin corner", cabin, (s * 0.86, 1, 0.6))
        b.point(f"rear {side} cabin corner", cabin, (s * 0.86, 1, -0.92))
    b.tube("rudder", "dark", (0, low, -long * 1.02), (0, high + 0.05, -long * 1.02), 0.03)
    b.point("rudder", b.primitives[-1], (0, 1, -1))
    foot = z + size + 0.09
    mast = d.form(1.1 if sails else 0.48, 0.8) * d.between(0.86, 1.14)
    pole = b.tube("mast", "wood", (0, high, foot), (0, high + mast, foot), 0.026, 0.017)
    b.point("mast top", pole, (0, 1, 0))
    if sails:
        boom = d.between(0.45, 0.62)
        swing = turn("y", d.angle(18))
        sail = prism([(0.0, -1.0), (0.0, 1.0), (-1.0, -1.0)], axis="x")
        reach = (mast - tall - 0.16) / 2
        b.add(sail, "sail", "light", (0, high + tall + 0.12 + reach, foot - 0.02), (0.010, reach, boom), swing)
        jib = prism([(0.0, 1.0), (1.0, -1.0), (0.12, -1.0)], axis="x")
        b.add(
            jib,
            "jib",
            "bright",
            (0, high + 0.06 + reach * 0.85, foot + 0.03),
            (0.010, reach * 0.85, (long * 0.9 - foot)),
        )
    else:
        b.tube("motor", "dark", (0, high - 0.04, -long * 1.06), (0, high + 0.12, -long * 1.06), 0.07, 0.06)
        b.tube("mast", "wood", (-0.1, high + mast * 0.85, foot), (0.1, high + mast * 0.85, foot), 0.012)
    b.tube("flag", "dark", (0, high, -long * 0.9), (0, high + 0.30, -long * 0.98), 0.011)
    b.add(block(), "flag", "bright", (0, high + 0.245, -long * 1.045), (0.008, 0.05, 0.085))
