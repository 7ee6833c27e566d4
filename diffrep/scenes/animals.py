"""Dog, bird, fish and giraffe."""

from __future__ import annotations

import numpy as np

from diffrep.scenes.build import SIDES, Body, turn, xyz
from diffrep.scenes.shapes import Array, Ball, prism


def eyes(b: Body, part: str, centre: Array, radii: Array, rotation: Array, direction: Array, size: float) -> None:
    """A pair of eyes on an ellipsoid head, named as keypoints."""
    for s, side in SIDES:
        local = direction * xyz(s, 1, 1)
        local = local / np.linalg.norm(local)
        at = rotation @ (radii * local) + centre
        white = b.ball(part, "light", at, (size, size, size))
        outward = rotation @ (local / radii)
        outward /= np.linalg.norm(outward)
        b.ball(part, "dark", at + outward * size * 0.5, size * 0.68)
        frame = np.linalg.solve(white.linear, outward)
        pupil = b.primitives[-1]
        b.point(f"{side} eye", pupil, frame / np.linalg.norm(frame))


def _leg(b: Body, name: str, hip: Array, knee_bend: float, swing: float, length: float, radius: float) -> None:
    """A four-legged animal's leg from the hip down, with a paw, named at the paw and the knee."""
    thigh = length * 0.5
    first = swing
    second = swing + knee_bend
    knee = hip + thigh * xyz(0, -np.cos(first), np.sin(first))
    ankle = knee + (length * 0.5) * xyz(0, -np.cos(second), np.sin(second))
    tubes = b.limb(name, "main", [hip, knee, ankle], [radius * 1.3, radius, radius * 0.75])
    b.ball(name, "main", hip, (radius * 1.15, radius * 1.9, radius * 1.7))
    paw = b.ball(name, "second", ankle + xyz(0, 0, radius * 0.5), (radius * 1.05, radius * 0.8, radius * 1.5))
    b.point(name.replace("leg", "paw"), paw, (0, -0.3, 1))
    b.point(name.replace("leg", "knee"), tubes[0], (0, 1, 1) if knee_bend <= 0 else (0, 1, -1))


def dog(b: Body) -> None:
    """A four-legged animal with a snout."""
    d = b.draw
    length, girth = d.between(0.40, 0.58), d.between(0.155, 0.235)
    legs, neck = d.between(0.34, 0.58), d.between(0.18, 0.34)
    height = legs + girth * 0.75
    ears = d.choice(("pointed", "floppy", "round"))
    b.variant = f"{ears} ears"
    body = b.ball("body", "main", (0, height, 0), (girth, girth * 1.02, length))
    b.ball("body", "main", (0, height + girth * 0.08, length * 0.55), (girth * 1.02, girth * 1.12, length * 0.44))
    b.ball("body", "main", (0, height + girth * 0.02, -length * 0.6), (girth * 0.98, girth, length * 0.38))
    b.point("back", body, (0, 1, -0.08))
    for s, side in SIDES:
        b.point(f"{side} flank", body, (s, 0.15, 0))
    for end, z, rest in (("front", length * 0.66, 0.0), ("hind", -length * 0.7, 0.0)):
        for s, side in SIDES:
            hip = xyz(s * girth * 0.62, height - girth * 0.2, z)
            swing = d.angle(26, rest)
            bend = d.angle(10, -14) if end == "front" else d.angle(10, 16)
            _leg(b, f"{side} {end} leg", hip, bend, swing - bend / 2, height - girth * 0.3, girth * 0.33)
    lift, yaw = d.angle(16, 52), d.angle(22)
    base = xyz(0, height + girth * 0.45, length * 0.78)
    head = base + neck * xyz(0, np.sin(lift), np.cos(lift)) + xyz(0, 0.05, 0.05)
    b.tube("neck", "main", base - xyz(0, girth * 0.45, girth * 0.35), head, girth * 0.8, girth * 0.52)
    size = girth * d.between(0.72, 0.92)
    facing = turn("y", yaw) @ turn("x", d.angle(14, 8))
    radii = xyz(size * 0.92, size * 0.9, size * 1.05)
    skull = b.ball("head", "main", head, radii, facing)
    b.point("top of the head", skull, (0, 1, -0.1))
    long = d.between(0.75, 1.25) * size
    tip = head + facing @ xyz(0, -size * 0.28, size * 0.75 + long)
    b.tube(
        "snout",
        "second",
        head + facing @ xyz(0, -size * 0.2, size * 0.45),
        tip,
        size * 0.6,
        size * 0.4,
    )
    muzzle = b.ball("snout", "second", tip, size * 0.42, facing)
    nose = b.ball("snout", "dark", tip + facing @ xyz(0, size * 0.22, size * 0.3), size * 0.2, facing)
    b.point("nose", nose, (0, 0.25, 1))
    b.point("chin", muzzle, (0, -1, 0.1))
    eyes(b, "head", head, radii, facing, xyz(0.5, 0.42, 0.76), size * 0.2)
    for s, side in SIDES:
        root = head + facing @ xyz(s * size * 0.6, size * 0.66, -size * 0.15)
        if ears == "pointed":
            end = root + facing @ xyz(s * size * 0.28, size * 0.95, 0)
            ear = b.tube(f"{side} ear", "second", root - (end - root) * 0.25, end, size * 0.42, 0.02)
            b.point(f"{side} ear tip", ear, (0, 1, 0))
        else:
            droop = xyz(s * 0.42, -0.75, 0) if ears == "floppy" else xyz(s * 0.5, 0.55, 0)
            half = size * xyz(0.16, 0.75, 0.42) if ears == "floppy" else size * xyz(0.42, 0.42, 0.16)
            tilt = facing @ turn("z", s * (0.35 if ears == "floppy" else -0.5))
            ear = b.ball(f"{side} ear", "second", root + facing @ (droop * size * 0.75), half, tilt)
            b.point(f"{side} ear tip", ear, (0, -1, 0) if ears == "floppy" else (0, 1, 0))
    rump = xyz(0, height + girth * 0.5, -length * 0.9)
    raise_, wag, tail = d.angle(30, 38), d.angle(30), d.between(0.26, 0.46)
    along = turn("y", wag) @ xyz(0, np.sin(raise_), -np.cos(raise_))
    middle = rump + along * tail * 0.5
    end = middle + (along + xyz(0, 0.5, 0)) * tail * 0.45
    tubes = b.limb("tail", "main", [rump, middle, end], [girth * 0.24, girth * 0.19, girth * 0.12])
    b.point("tail tip", tubes[-1], (0, 1, -0.6))
    b.point("tail root", tubes[0], (0, -0.3, -1))


def giraffe(b: Body) -> None:
    """A long-necked four-legged animal. Never in training."""
    d = b.draw
    length, girth = d.between(0.30, 0.38), d.between(0.15, 0.19)
    legs = d.between(0.62, 0.80)
    neck = d.between(0.62, 0.85)
    height = legs + girth * 0.75
    tuft = d.choice(("short horns", "long horns"))
    b.variant = tuft
    body = b.ball("body", "main", (0, height, 0), (girth, girth * 1.05, length))
    b.ball("body", "main", (0, height + girth * 0.2, length * 0.5), (girth * 0.96, girth * 1.2, length * 0.46))
    b.point("back", body, (0, 1, -0.25))
    for s, side in SIDES:
        b.point(f"{side} flank", body, (s, 0.15, 0))
    for end, z in (("front", length * 0.62), ("hind", -length * 0.66)):
        for s, side in SIDES:
            hip = xyz(s * girth * 0.62, height - girth * 0.2, z)
            swing = d.angle(20)
            bend = d.angle(6, -7) if end == "front" else d.angle(6, 9)
            _leg(b, f"{side} {end} leg", hip, bend, swing - bend / 2, height - girth * 0.25, girth * 0.26)
    lift, yaw = d.angle(11, 64), d.angle(20)
    base = xyz(0, height + girth * 0.5, length * 0.78)
    head = base + neck * xyz(0, np.sin(lift), np.cos(lift))
    b.tube("neck", "main", base - xyz(0, girth * 0.7, girth * 0.5), head, girth * 0.82, girth * 0.36)
    size = girth * d.between(0.56, 0.68)
    facing = turn("y", yaw) @ turn("x", d.angle(12, 20))
    radii = xyz(size * 0.85, size * 0.85, size * 1.15)
    skull = b.ball("head", "main", head, radii, facing)
    b.point("top of the head", skull, (0, 1, -0.1))
    tip = head + facing @ np.array([0, -size * 0.35, size * d.between(1.6, 2.1)])
    b.tube(
        "snout",
        "second",
        head + facing @ xyz(0, -size * 0.15, size * 0.3),
        tip,
        size * 0.66,
        size * 0.42,
    )
    muzzle = b.ball("snout", "second", tip, size * 0.45, facing)
    nose = b.ball("snout", "dark", tip + facing @ xyz(0, size * 0.2, size * 0.32), size * 0.18, facing)
    b.point("nose", nose, (0, 0.25, 1))
    b.point("chin", muzzle, (0, -1, 0.1))
    eyes(b, "head", head, radii, facing, xyz(0.66, 0.45, 0.6), size * 0.2)
    horn = 0.75 if tuft == "short horns" else 1.2
    for s, side in SIDES:
        root = head + facing @ xyz(s * size * 0.75, size * 0.45, -size * 0.4)
        ear = b.ball(
            f"{side} ear",
            "second",
            root + facing @ xyz(s * size * 0.45, size * 0.1, 0),
            size * xyz(0.62, 0.3, 0.16),
            facing @ turn("z", s * 0.3),
        )
        b.point(f"{side} ear tip", ear, (s, 0, 0))
        foot = head + facing @ xyz(s * size * 0.38, size * 0.6, -size * 0.25)
        top = foot + facing @ xyz(s * size * 0.12, size * horn, -size * 0.1)
        b.tube("horns", "second", foot, top, size * 0.13)
        b.ball("horns", "dark", top, size * 0.2)
    rump = xyz(0, height + girth * 0.35, -length * 0.92)
    drop, tail = d.angle(14, -62), d.between(0.30, 0.42)
    end = rump + tail * (turn("y", d.angle(20)) @ xyz(0, np.sin(drop), -np.cos(drop)))
    b.limb("tail", "main", [rump, end], [girth * 0.16, girth * 0.09], last_ball=False)
    brush = b.ball("tail", "dark", end, (girth * 0.16, girth * 0.34, girth * 0.16))
    b.point("tail tip", brush, (0, -0.4, -1))
    b.point("tail root", b.primitives[-2], (0, -0.5, -1))


def bird(b: Body) -> None:
    """A bird, standing or flying."""
    d = b.draw
    flying = d.choice((False, True))
    b.variant = "flying" if flying else "standing"
    b.places = ("sky",) if flying else ("ground",)
    length, girth = d.between(0.36, 0.50), d.between(0.17, 0.25)
    legs = d.between(0.16, 0.34)
    height = legs + girth * 1.1
    pitch = d.angle(10, d.form(6 if flying else 26, 16))  # chest up
    lean = turn("x", -pitch)
    centre = xyz(0.0, height, 0.0)
    body = b.ball("body", "main", centre, (girth, girth * 1.02, length), lean)
    b.ball(
        "body",
        "second",
        centre + lean @ xyz(0, -girth * 0.16, length * 0.3),
        (girth * 0.93, girth * 0.94, length * 0.62),
        lean,
    )
    b.point("breast", b.primitives[-1], (0, -0.25, 1))
    b.point("back", body, (0, 1, -0.1))
    yaw = d.angle(30)
    size = girth * d.between(0.62, 0.82)
    head = centre + lean @ xyz(0, girth * 0.75, length * 0.86)
    neck = d.between(0.0, 0.22)
    head = head + xyz(0, neck, neck * 0.3)
    b.tube(
        "neck",
        "main",
        centre + lean @ xyz(0, girth * 0.2, length * 0.5),
        head,
        girth * 0.66,
        size * 0.7,
    )
    facing = turn("y", yaw)
    radii = xyz(size * 0.92, size, size * 1.02)
    skull = b.ball("head", "main", head, radii, facing)
    b.point("top of the head", skull, (0, 1, -0.15))
    beak = d.between(0.7, 1.5) * size
    root = head + facing @ xyz(0, -size * 0.08, size * 0.6)
    tip = root + facing @ xyz(0, -beak * 0.18, size * 0.4 + beak)
    bill = b.tube("beak", "bright", root, tip, size * 0.46, 0.012, flat=0.8)
    b.point("beak tip", bill, (0, 1, 0))
    eyes(b, "head", head, radii, facing, xyz(0.68, 0.32, 0.64), size * 0.2)
    span, chord = d.between(0.62, 0.9), length * d.between(0.55, 0.75)
    plan = [(1.0, 0.0), (0.75, 0.5), (0.0, 1.0), (-0.5, 0.95), (-1.0, 0.45), (-1.05, 0.0)]
    dihedral = d.angle(32, 14)
    for s, side in SIDES:
        name = f"{side} wing"
        shoulder = centre + lean @ xyz(s * girth * 0.72, girth * 0.35, length * 0.18)
        if flying:
            outline = prism([(z, s * x) for z, x in plan], axis="y")
            rotation = lean @ turn("z", s * dihedral) @ turn("x", -0.12)
            wing = b.add(outline, name, "second", shoulder, (span, 0.022, chord), rotation)
            b.point(f"{side} wing tip", wing, (s * 1.0, 1, 0.0))
            b.point(f"{side} wing front", wing, (s * 0.5, 1, 0.75))
        else:
            fold = lean @ turn("y", s * 0.1) @ turn("x", -0.1) @ turn("z", s * -0.22)
            at = centre + lean @ xyz(s * girth * 0.84, girth * 0.22, -length * 0.16)
            spread = lean @ turn("z", s * dihedral) @ turn("x", -0.12)
            reach = np.stack([[0, 0.022, 0], [0, 0, chord], [-s * span / 2, 0, 0]], axis=1)
            rest = spread @ reach, shoulder + spread @ xyz(s * span / 2, 0, 0)
            half = (girth * 0.26, girth * 0.62, length * 0.78)
            wing = b.add(Ball(), name, "second", at, half, fold, rest)
            b.point(f"{side} wing tip", wing, (s * 0.3, 0, -1))
            b.point(f"{side} wing front", wing, (s * 0.7, 0, 0.8))
        foot = centre + lean @ xyz(s * girth * 0.42, -girth * 0.75, -length * 0.1)
        swing = d.angle(14)
        if d.form(flying, False):
            ankle = foot + xyz(0, -legs * 0.35, -legs * 0.55)
            toe = ankle + xyz(0, -0.02, -0.1)
        else:
            ankle = np.array([foot[0], 0.03, foot[2] + np.sin(swing) * legs])
            toe = ankle + xyz(0, -0.015, 0.15)
        b.limb(f"{side} leg", "bright", [foot, ankle], [girth * 0.13, girth * 0.09])
        web = b.ball(f"{side} leg", "bright", (ankle + toe) / 2, (girth * 0.3, 0.025, 0.1))
        b.point(f"{side} foot", web, (0, 0.2, 1 if not flying else -1))
    fan = d.between(0.24, 0.40)
    tail = prism([(0.9, 0.3), (0.9, -0.3), (-1.0, -0.85), (-1.0, 0.85)], axis="y")
    at = centre + lean @ xyz(0, 0.0, -length - fan * 0.55)
    feather = b.add(tail, "tail", "second", at, (girth * 0.8, 0.025, fan), lean @ turn("x", d.angle(10, -4)))
    b.point("tail tip", feather, (0, 1, -1))


def fish(b: Body) -> None:
    """A fish in the water."""
    d = b.draw
    length = d.between(0.60, 0.78)
    tall, wide = d.between(0.24, 0.42), d.between(0.13, 0.20)
    fin = d.choice(("forked", "round"))
    b.variant = f"{fin} tail"
    b.places = ("water",)
    centre = xyz(0.0, 0.75, 0.0)
    body = b.ball("body", "main", centre, (wide, tall, length))
    b.point("back", body, (0, 1, -0.35))
    for s, side in SIDES:
        b.point(f"{side} flank", body, (s, 0, -0.25))
    b.ball("head", "second", centre + xyz(0, 0, length * 0.42), (wide * 0.97, tall * 0.84, length * 0.52))
    radii, at = xyz(wide * 0.97, tall * 0.84, length * 0.52), centre + xyz(0, 0, length * 0.42)
    mouth = b.ball("head", "bright", centre + xyz(0, -tall * 0.06, length * 0.93), (wide * 0.4, tall * 0.13, 0.05))
    b.point("mouth", mouth, (0, 0.1, 1))
    eyes(b, "head", at, radii, np.eye(3), xyz(0.72, 0.36, 0.5), wide * 0.34)
    bend = d.angle(26)
    sway = turn("y", bend)
    root = centre + xyz(0, 0, -length * 0.86)
    stem = b.tube(
        "tail",
        "main",
        root + xyz(0, 0, length * 0.3),
        root + sway @ xyz(0, 0, -length * 0.16),
        tall * 0.5,
        tall * 0.24,
        flat=wide / tall * 0.9,
    )
    b.point("tail root", stem, (0, 0.9, 1))
    span, chord = tall * d.between(0.85, 1.25), length * d.between(0.26, 0.38)
    reach = 1.0 if fin == "forked" else 0.72
    for sign, name in ((1, "upper"), (-1, "lower")):
        plan = [
            (1.0, 0.0),
            (1.0, 0.3),
            (-0.75, reach),
            (-1.1, reach * 0.85),
            (-0.35 if fin == "forked" else -1.1, 0),
        ]
        lobe = prism([(z, sign * y) for z, y in plan], axis="x")
        at = root + sway @ xyz(0, 0, -length * 0.1 - chord * 0.8)
        part = b.add(lobe, "tail", "second", at, (0.02, span, chord), sway)
        b.point(f"{name} tail tip", part, (0, sign * reach, -0.75))
    high = tall * d.between(0.45, 0.8)
    dorsal = prism([(1.0, -0.6), (0.25, 0.75), (-0.55, 1.0), (-1.0, 0.5), (-0.9, -0.6)], axis="x")
    back = b.add(
        dorsal,
        "dorsal fin",
        "second",
        centre + xyz(0, tall * 0.93, -length * 0.12),
        (0.02, high, length * 0.42),
    )
    b.point("dorsal fin tip", back, (0, 1.0, -0.55))
    for s, side in SIDES:
        spread = d.angle(18, 42)
        outline = prism([(1.0, 0.0), (0.2, s * 0.6), (-0.9, s * 1.0), (-1.0, s * 0.45), (-0.3, 0.0)], axis="y")
        rotation = turn("z", -s * spread)
        at = centre + xyz(s * wide * 0.72, -tall * 0.32, length * 0.22)
        pectoral = b.add(outline, f"{side} fin", "second", at, (tall * 0.95, 0.018, length * 0.2), rotation)
        b.point(f"{side} fin tip", pectoral, (s * 1.0, 1, -0.9))
    if d.chance(0.6):
        anal = prism([(1.0, 0.5), (-0.5, -0.9), (-1.0, -0.6), (-0.8, 0.5)], axis="x")
        b.add(
            anal,
            "anal fin",
            "second",
            centre + xyz(0, -tall * 0.85, -length * 0.34),
            (0.02, tall * 0.4, length * 0.22),
        )
