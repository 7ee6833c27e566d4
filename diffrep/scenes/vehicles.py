"""Car, truck, plane, boat and motorbike."""

from __future__ import annotations

import numpy as np

from diffrep.scenes.build import SIDES, Body, Points, Vector, turn, xyz
from diffrep.scenes.shapes import Array, Clip, Hull, Tube, block, prism

_ROOF = block((0.97, 0.97))


def _wheels(b: Body, half: float, front: float, rear: float, radius: float, width: float, share: float) -> None:
    """Tyres with hubs on their outer sides, named at the hubs."""
    for s, side in SIDES:
        for end, z in (("front", front), ("rear", rear)):
            name, at, out = f"{end} {side} wheel", xyz(s * half * share, radius, z), xyz(s * width / 2, 0, 0)
            b.tube(name, "dark", at - out, at + out, radius)
            b.tube(name, "metal", at, at + out * 1.12, radius * 0.6)
            b.tube(name, "dark", at, at + out * 1.2, radius * 0.16, points={name: (0, 1, 0)})


def _lights(b: Body, front: float, back: float, x: float, y: float, size: float) -> None:
    for s, side in SIDES:
        for name, paint, z, half, facing in (
            ("headlight", "light", front, (size * 1.2, size, size * 0.5), 1),
            ("tail light", "red", back, (size * 1.1, size * 0.8, size * 0.5), -1),
        ):
            b.ball(f"{side} {name}", paint, (s * x, y, z), half, points={f"{side} {name}": (0, 0, facing)})


def _roof(b: Body, centre: Vector, half: Vector) -> None:
    corners = ((f"{end} {side}", s, z) for s, side in SIDES for end, z in (("front", 0.97), ("rear", -0.97)))
    points: Points = {f"{name} roof corner": (s * 0.97, 1, z) for name, s, z in corners}
    b.add(_ROOF, "roof", "main", centre, half, points=points)


def car(b: Body) -> None:
    """A car with a cabin of one of four forms."""
    d = b.draw
    points: Points
    long, half = d.between(0.82, 1.0), d.between(0.34, 0.42)
    deck, low = d.between(0.40, 0.48), d.between(0.13, 0.18)
    wheel = d.between(0.155, 0.200)
    form = d.choice(("sedan", "hatchback", "wagon", "pickup"))
    b.variant = form
    profile = [(-0.98, -1.0), (0.97, -1.0), (1.0, -0.1), (0.93, 0.62), (0.4, 1.0), (-0.9, 1.0), (-1.0, 0.5)]
    lower = prism(profile, axis="x", taper=(0.9, 1.0))
    b.add(lower, "body", "main", (0, (deck + low) / 2, 0), (half, (deck - low) / 2, long))
    for end, s in (("front", 1.0), ("rear", -1.0)):
        at, points = xyz(0, low + 0.03, s * long * 0.98), {f"{end} bumper": (0, 0, s)}
        b.box("bumper", "dark", at, (half * 0.94, 0.045, 0.045), points=points)
    tall = d.between(0.23, 0.30)
    top = deck + tall
    front = d.between(0.36, 0.46)
    ends = {"sedan": (-0.62, 0.24), "hatchback": (-0.86, 0.26), "wagon": (-0.94, 0.10), "pickup": (-0.16, 0.06)}
    back, rake = ends[form]
    back, rake = d.form(back, -0.66), d.form(rake, 0.17)
    slope = d.between(0.26, 0.36)
    profile = [(front, -1.0), (front - slope, 1.0), (back + rake, 1.0), (back, -1.0)]
    glass = prism(profile, axis="x", taper=(0.80, 1.0))
    b.add(glass, "windows", "glass", (0, deck + tall / 2, 0), (half * 0.88, tall / 2, long))
    length = (front - slope) - (back + rake)
    middle = (front - slope + back + rake) / 2 * long
    _roof(b, (0, top, middle), (half * 0.74, 0.022, length / 2 * long + 0.03))
    _wheels(b, half, 0.60 * long, -0.62 * long, wheel, half * 0.36, 0.9)
    post = (front - slope * 0.5 - 0.34) * long
    for s, side in SIDES:
        b.tube("windows", "main", (s * half * 0.87, deck - 0.02, post), (s * half * 0.74, top, post), 0.02)
        at, points = xyz(s * half * 1.06, deck + 0.05, (front - 0.06) * long), {f"{side} mirror": (s, 0, 0.2)}
        b.ball(f"{side} mirror", "main", at, (0.055, 0.04, 0.035), points=points)
    _lights(b, long * 0.965, -long * 0.975, half * 0.66, (deck + low) / 2 + 0.05, 0.06)
    if form == "pickup":
        b.box("body", "dark", (0, deck, -0.58 * long), (half * 0.74, 0.012, long * 0.34))
    extra = d.choice(("none", "antenna", "spoiler", "rack"))
    if extra == "antenna":
        foot, tip = (0, top, (back + rake + 0.06) * long), (0, top + 0.24, (back + rake - 0.06) * long)
        b.tube("antenna", "dark", foot, tip, 0.011)
    elif extra == "spoiler":
        z = -0.93 * long
        b.box("spoiler", "second", (0, deck + 0.12, z), (half * 0.8, 0.018, 0.08))
        for s, _ in SIDES:
            b.tube("spoiler", "second", (s * half * 0.5, deck - 0.03, z), (s * half * 0.5, deck + 0.12, z), 0.02)
    elif extra == "rack":
        reach = length * long * 0.38
        for s, _ in SIDES:
            x, y = s * half * 0.58, top + 0.06
            b.tube("rack", "metal", (x, y, middle - reach), (x, y, middle + reach), 0.016)
        for z in (middle + -0.25 * length * long, middle + 0.25 * length * long):
            b.tube("rack", "metal", (-half * 0.62, top + 0.035, z), (half * 0.62, top + 0.035, z), 0.014)


def truck(b: Body) -> None:
    """A truck: a tall cab before a long load. Never in training."""
    d = b.draw
    points: Points
    long, half = d.between(0.92, 1.08), d.between(0.32, 0.38)
    wheel = d.between(0.150, 0.185)
    floor = wheel * 1.5
    load = d.choice(("box", "tank", "open"))
    b.variant = f"{load} load"
    cab, tall = d.between(0.42, 0.52), d.between(0.52, 0.64)
    b.box("chassis", "dark", (0, floor - 0.04, -0.02), (half * 0.72, 0.05, long * 0.97))
    start = long - cab
    cabin = (half, tall / 2, cab / 2)
    body = prism([(-1.0, -1.0), (1.0, -1.0), (1.0, 0.05), (0.55, 1.0), (-1.0, 1.0)], axis="x", taper=(0.92, 1.0))
    b.add(body, "body", "main", (0, floor + tall / 2, start + cab / 2), cabin)
    pane = prism([(1.01, 0.12), (0.62, 0.88), (0.2, 0.88), (0.2, 0.12)], axis="x", taper=(0.94, 1.02))
    b.add(pane, "windows", "glass", (0, floor + tall / 2, start + cab / 2 + 0.008), cabin)
    _roof(b, (0, floor + tall, start + cab * 0.38), (half * 0.86, 0.022, cab * 0.39))
    high = tall * d.between(1.0, 1.35)
    rear, front = -long, start - 0.05
    middle, reach = (rear + front) / 2, (front - rear) / 2
    if load == "box":
        b.box("load", "second", (0, floor + high / 2, middle), (half * 1.04, high / 2, reach))
    elif load == "tank":
        y = floor + half * 0.95
        b.tube("load", "second", (0, y, rear), (0, y, front), half * 0.95)
        b.tube("load", "metal", (0, y, middle - 0.04), (0, y, middle + 0.04), half * 0.98)
    else:
        b.box("load", "second", (0, floor + 0.03, middle), (half, 0.03, reach))
        for z in (rear + 0.02, front - 0.02):
            b.box("load", "second", (0, floor + 0.14, z), (half, 0.14, 0.02))
        for s, _ in SIDES:
            b.box("load", "second", (s * half * 0.96, floor + 0.14, middle), (0.02, 0.14, reach))
    _wheels(b, half, long - cab * 0.45, -0.66 * long, wheel, half * 0.4, 0.86)
    for s, side in SIDES:
        at, points = (s * half * 1.12, floor + tall * 0.66, long - cab * 0.14), {f"{side} mirror": (s, 0, 0)}
        b.box(f"{side} mirror", "dark", at, (0.03, 0.075, 0.025), points=points)
        if d.chance(0.5):
            x, z = s * half * 0.8, start - 0.025
            b.tube("exhaust", "metal", (x, floor, z), (x, floor + tall * 1.2, z), 0.028)
    _lights(b, long, -long * 0.99, half * 0.7, floor + 0.03, 0.055)


def _flat(*corners: tuple[float, float]) -> Hull:
    """A wing or a tailplane: its outline from above, (z, x)."""
    return prism(corners, axis="y")


def plane(b: Body) -> None:
    """An aeroplane with jets or a propeller."""
    d = b.draw
    points: Points
    long, girth = d.between(0.85, 1.0), d.between(0.105, 0.145)
    engine = d.choice(("jet", "propeller"))
    b.variant = engine
    gear = d.chance(0.5)
    b.places = ("sky", "ground") if gear else ("sky",)
    y = 0.45
    tail, points = (0, y, -long * 0.45), {"tail end": (0, -1, 0)}
    b.tube("body", "main", tail, (0, y, long * 0.62), girth)
    b.ball("body", "main", (0, y, long * 0.62), (girth, girth, long * 0.30), points={"nose": (0, 0, 1)})
    b.tube("body", "main", (0, y + girth * 0.45, -long), tail, girth * 0.3, girth, points=points)
    pane, points = (girth * 0.72, girth * 0.55, long * 0.12), {"cockpit": (0, 0.8, 0.5)}
    b.ball("windows", "glass", (0, y + girth * 0.5, long * 0.66), pane, points=points)
    span, chord, sweep = d.between(0.78, 1.02), d.between(0.17, 0.25), d.between(0.02, 0.34)
    dihedral = d.angle(4, 5)
    root = xyz(0, y + d.form(d.choice((-0.55, 0.6)), 0) * girth, long * 0.10)
    tip, ratio = -sweep / chord, d.between(0.40, 0.70)
    tail_span, tail_chord = span * d.between(0.32, 0.42), chord * 0.6
    for s, side in SIDES:
        plan = _flat((1.0, 0.0), (tip + ratio, s), (tip - ratio, s), (-1.0, 0.0))
        points = {f"{side} wing tip front": (s, 1, tip + ratio), f"{side} wing tip rear": (s, 1, tip - ratio)}
        b.add(plan, f"{side} wing", "second", root, (span, 0.022, chord), turn("z", s * dihedral), points=points)
        if engine == "jet":
            share = 0.36
            up, along = np.sin(dihedral) * span * share - 0.075, chord * (1 + tip * share) - 0.06
            at = root + xyz(s * span * share, up, along)
            b.tube(f"{side} engine", "metal", at - xyz(0, 0, 0.13), at + xyz(0, 0, 0.10), 0.045, 0.062, inner=0.8)
            b.tube(f"{side} engine", "dark", at - xyz(0, 0, 0.12), at + xyz(0, 0, 0.05), 0.036, 0.05)
        plan, points = _flat((1.0, 0.0), (-0.1, s), (-1.0, s), (-1.0, 0.0)), {f"{side} tailplane tip": (s, 1, -0.5)}
        at, half = (0, y + girth * 0.45, -long * 0.86), (tail_span, 0.018, tail_chord)
        b.add(plan, f"{side} tailplane", "second", at, half, points=points)
    high = d.between(0.26, 0.38)
    fin = prism([(1.0, -1.0), (-0.35, 1.0), (-1.0, 1.0), (-1.0, -1.0)], axis="x")
    at, points = (
        (0, y + girth * 0.4 + high / 2, -long * 0.85),
        {"fin tip front": (0, 1, -0.35), "fin tip rear": (0, 1, -1)},
    )
    b.add(fin, "fin", "bright", at, (0.018, high / 2, tail_chord * 1.15), points=points)
    if engine == "propeller":
        at = xyz(0, y, long * 0.92)
        b.ball("propeller", "dark", at, (0.045, 0.045, 0.07))
        b.box("propeller", "dark", at, (0.018, 0.27, 0.012), turn("z", d.angle(80)))
    if gear:
        for s, z in ((1, -0.02), (-1, -0.02), (0, 0.5)):
            foot, out = xyz(s * 0.2, y - girth - 0.15, z * long), xyz(0.025, 0, 0)
            b.tube("gear", "metal", (s * 0.12, y - girth * 0.4, z * long), foot, 0.014)
            b.tube("gear", "dark", foot - out, foot + out, 0.05)


def boat(b: Body) -> None:
    """A boat on the water with a cabin, a mast and perhaps sails."""
    d = b.draw
    points: Points
    long, half = d.between(0.80, 1.0), d.between(0.27, 0.36)
    deep = d.between(0.24, 0.32)
    kind = d.choice(("sailing boat", "motor boat"))
    b.variant = kind
    b.places = ("sea",)
    plan = [(1.0, 0.0), (0.72, 0.42), (0.3, 0.86), (-0.2, 1.0), (-1.0, 0.86)]
    plan += [(z, -x) for z, x in reversed(plan[1:])]
    flare = 1.28
    low, high = -0.09, deep - 0.09
    hull, extent = prism(plan, axis="y", taper=(flare, flare)), xyz(half, deep / 2, long) / [flare, 1, flare]
    b.add(hull, "hull", "main", (0, (low + high) / 2, 0), extent, points={"bow": (0, 1, flare)})
    deck = prism(plan, axis="y")
    points = {f"{side} stern corner": (s * 0.86, 1, -1) for s, side in SIDES}
    points |= {f"{side} widest point": (s * 1.0, 1, -0.2) for s, side in SIDES}
    b.add(deck, "deck", "second", (0, high + 0.012, 0), (half * 1.03, 0.022, long * 1.02), points=points)
    b.add(deck, "deck", "wood", (0, high + 0.022, -0.02), (half * 0.9, 0.016, long * 0.9))
    tall, size = d.between(0.15, 0.24), d.between(0.20, 0.30)
    sails = kind == "sailing boat"
    z = (d.between(-0.13, 0.13) + d.form(-0.23 if sails else -0.07, -0.15)) * long
    cabin = prism([(1.0, -1.0), (0.6, 1.0), (-0.92, 1.0), (-1.0, -1.0)], axis="x", taper=(0.86, 1.0))
    at, room = xyz(0, high + 0.03 + tall / 2, z), (half * 0.6, tall / 2, size)
    ends = ((f"{end} {side}", s, length) for s, side in SIDES for end, length in (("front", 0.6), ("rear", -0.92)))
    points = {f"{name} cabin corner": (s * 0.86, 1, length) for name, s, length in ends}
    b.add(cabin, "cabin", "light", at, room, points=points)
    pane = prism([(0.93, -0.1), (0.68, 0.7), (-0.86, 0.7), (-0.9, -0.1)], axis="x", taper=(0.9, 1.02))
    b.add(pane, "windows", "glass", at + xyz(0, 0, 0.012), room)
    stern = -long * 1.02
    b.tube("rudder", "dark", (0, low, stern), (0, high + 0.05, stern), 0.03, points={"rudder": (0, 1, -1)})
    foot = z + size + 0.09
    mast = d.form(1.1 if sails else 0.48, 0.8) * d.between(0.86, 1.14)
    b.tube("mast", "wood", (0, high, foot), (0, high + mast, foot), 0.026, 0.017, points={"mast top": (0, 1, 0)})
    if sails:
        boom, swing = d.between(0.45, 0.62), turn("y", d.angle(18))
        sail = prism([(0.0, -1.0), (0.0, 1.0), (-1.0, -1.0)], axis="x")
        reach = (mast - tall - 0.16) / 2
        b.add(sail, "sail", "light", (0, high + tall + 0.12 + reach, foot - 0.02), (0.010, reach, boom), swing)
        jib, cloth = prism([(0.0, 1.0), (1.0, -1.0), (0.12, -1.0)], axis="x"), (0.010, reach * 0.85, long * 0.9 - foot)
        b.add(jib, "jib", "bright", (0, high + 0.06 + reach * 0.85, foot + 0.03), cloth)
    else:
        b.tube("motor", "dark", (0, high - 0.04, -long * 1.06), (0, high + 0.12, -long * 1.06), 0.07, 0.06)
        b.tube("mast", "wood", (-0.1, high + mast * 0.85, foot), (0.1, high + mast * 0.85, foot), 0.012)
    b.tube("flag", "dark", (0, high, -long * 0.9), (0, high + 0.30, -long * 0.98), 0.011)
    b.box("flag", "bright", (0, high + 0.245, -long * 1.045), (0.008, 0.05, 0.085))


def _spoked_wheel(b: Body, name: str, hub: Array, turned: Array, radius: float) -> None:
    side = turned @ xyz(1.0, 0, 0)
    b.tube(name, "dark", hub - side * 0.055, hub + side * 0.055, radius, inner=0.76)
    b.tube(name, "metal", hub - side * 0.045, hub + side * 0.045, radius * 0.77, inner=0.9)
    for angle in (0.0, np.pi / 3, 2 * np.pi / 3):
        arm = turned @ xyz(0, np.cos(angle), np.sin(angle)) * radius * 0.72
        b.tube(name, "metal", hub - arm, hub + arm, 0.018)
    points: Points = {f"{name} {label} hub": (0, s, 0) for s, label in SIDES}
    b.tube(name, "metal", hub - side * 0.075, hub + side * 0.075, 0.055, points=points)


def motorbike(b: Body) -> None:
    """A motorbike with spoked wheels."""
    d = b.draw
    points: Points
    base, wheel = d.between(0.50, 0.60), d.between(0.235, 0.285)
    kind = d.choice(("low bars", "high bars"))
    b.variant = kind
    steer = turn("y", d.angle(20))
    rear = xyz(0, wheel, -base)
    head = np.array([0, wheel + d.between(0.40, 0.48), base * 0.60])
    front = head + steer @ (xyz(0, wheel, base) - head)
    guard = Tube(1.0, 1.0, 0.93, (Clip((0.0, 0.0, 1.0), -0.15),))  # the upper arc only
    for name, hub, turned in (("rear", rear, np.eye(3)), ("front", front, steer)):
        _spoked_wheel(b, f"{name} wheel", hub, turned, wheel)
        frame = turned @ np.stack([[0, 0, 1.0], [1.0, 0, 0], [0, -1.0, 0]], axis=1)
        b.add(guard, f"{name} fender", "main", hub, (wheel * 1.13, 0.07, wheel * 1.13), frame)
    side = steer @ xyz(1.0, 0, 0)
    for s, _ in SIDES:
        b.tube("fork", "metal", front + side * s * 0.085, head + side * s * 0.085, 0.022)
    b.tube("frame", "second", head - xyz(0, 0.06, 0.02), rear + xyz(0, 0.26, 0.30), 0.035)
    b.tube("frame", "second", head - xyz(0, 0.10, 0.02), (0, wheel * 0.75, base * 0.12), 0.03)
    b.tube("frame", "second", rear, (0, wheel * 0.9, 0), 0.04)
    b.add(block((0.9, 0.8), 0.2), "engine", "metal", (0, wheel * 0.98, base * 0.04), (0.115, 0.13, 0.155))
    b.tube("engine", "dark", (0, wheel + 0.06, 0.02), (0, wheel + 0.24, 0.05), 0.095)
    top, saddle = head[1], -base * 0.34
    for part, paint, at, half, tilt, points in (
        ("tank", "main", (0, top - 0.045, base * 0.24), (0.125, 0.115, 0.225), -0.14, {"tank top": (0, 1, 0)}),
        ("seat", "dark", (0, top - 0.10, saddle), (0.12, 0.062, 0.24), 0.10, {"seat": (0, 1, -0.1)}),
        ("seat", "main", (0, top - 0.085, saddle - 0.24), (0.09, 0.06, 0.13), 0.3, {"tail": (0, 0.2, -1)}),
    ):
        b.ball(part, paint, at, half, turn("x", tilt), points=points)
    lamp, points = head + steer @ xyz(0, -0.02, 0.10), {"headlight": (0, 0, 1)}
    b.ball("headlight", "light", lamp, (0.085, 0.085, 0.07), steer, points=points)
    rise = 0.06 if kind == "low bars" else 0.20
    for s, label in SIDES:
        grip = head + steer @ xyz(s * 0.17, 0.03 + rise, -0.03)
        end = grip + steer @ xyz(s * 0.13, 0.0, -0.08)
        b.tube(f"{label} handlebar", "metal", head + steer @ xyz(s * 0.02, 0.01, 0), grip, 0.018)
        b.tube(f"{label} handlebar", "dark", grip, end, 0.026, points={f"{label} grip": (0, 1, 0)})
        pipe, points = (s * 0.12, wheel * 0.62, base * 0.05), {f"{label} exhaust end": (0, 1, 0)}
        b.tube(f"{label} exhaust", "metal", pipe, (s * 0.15, wheel * 0.80, -base * 1.02), 0.034, 0.046, points=points)
        b.tube(f"{label} mirror", "dark", grip, grip + xyz(s * 0.03, 0.15, 0), 0.010)
        glass, points = grip + xyz(s * 0.04, 0.17, 0), {f"{label} mirror": (s, 0, 0)}
        b.ball(f"{label} mirror", "dark", glass, (0.055, 0.035, 0.015), points=points)
