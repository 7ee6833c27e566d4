"""Dog, giraffe, bird, fish and person."""

from __future__ import annotations

import numpy as np

from diffrep.scenes.build import SIDES, Body, Points, turn, xyz
from diffrep.scenes.shapes import Array, Ball, Clip, prism


def _eyes(b: Body, centre: Array, radii: Array, facing: Array, direction: Array, size: float) -> None:
    """A pair of eyes on an ellipsoid head, named as keypoints."""
    for s, side in SIDES:
        local = direction * xyz(s, 1, 1)
        local = local / np.linalg.norm(local)
        at = facing @ (radii * local) + centre
        white = b.ball("head", "light", at, (size, size, size))
        outward = facing @ (local / radii)
        outward /= np.linalg.norm(outward)
        frame = np.linalg.solve(white.linear, outward)
        looks = frame / np.linalg.norm(frame)
        b.ball("head", "dark", at + outward * size * 0.5, size * 0.68, points={f"{side} eye": looks})


def _jointed(start: Array, lengths: tuple[float, float], angles: tuple[float, float]) -> list[Array]:
    """Two bones that hang from `start`, at angles from straight down towards the front: their three ends."""
    ends = [start]
    for length, angle in zip(lengths, angles, strict=True):
        ends.append(ends[-1] + length * xyz(0, -np.cos(angle), np.sin(angle)))
    return ends


def _trunk(b: Body, height: float, half: Array, back: float) -> None:
    points: Points = {"back": (0, 1, back)} | {f"{side} flank": (s, 0.15, 0) for s, side in SIDES}
    b.ball("body", "main", (0, height, 0), half, points=points)


def _legs(
    b: Body,
    girth: float,
    height: float,
    ends: tuple[float, float],
    swing: float,
    bends: tuple[tuple[float, float], tuple[float, float]],
    size: tuple[float, float],
) -> None:
    """Four legs with paws, named at the paws and the knees.

    Args:
        ends: where the front and the hind legs are along the body.
        swing: of a leg, in degrees.
        bends: of the front and the hind knees: spread and rest in degrees.
        size: length and radius of a leg.
    """
    length, radius = size
    for end, z, bending in zip(("front", "hind"), ends, bends, strict=True):
        for s, side in SIDES:
            name = f"{side} {end}"
            swung, bend = b.draw.angle(swing), b.draw.angle(*bending)
            first = swung - bend / 2
            hip = xyz(s * girth * 0.62, height - girth * 0.2, z)
            joints = _jointed(hip, (length * 0.5, length * 0.5), (first, first + bend))
            thigh = b.limb(f"{name} leg", "main", joints, [radius * 1.3, radius, radius * 0.75])[0]
            b.ball(f"{name} leg", "main", hip, radius * xyz(1.15, 1.9, 1.7))
            paw = {f"{name} paw": (0, -0.3, 1)}
            b.ball(
                f"{name} leg", "second", joints[2] + xyz(0, 0, radius * 0.5), radius * xyz(1.05, 0.8, 1.5), points=paw
            )
            b.point(f"{name} knee", thigh, (0, 1, 1 if bend <= 0 else -1))


def dog(b: Body) -> None:
    """A four-legged animal with a snout."""
    d = b.draw
    length, girth = d.between(0.40, 0.58), d.between(0.155, 0.235)
    legs, neck = d.between(0.34, 0.58), d.between(0.18, 0.34)
    height = legs + girth * 0.75
    ears = d.choice(("pointed", "floppy", "round"))
    b.variant = f"{ears} ears"
    _trunk(b, height, xyz(girth, girth * 1.02, length), -0.08)
    b.ball("body", "main", (0, height + girth * 0.08, length * 0.55), (girth * 1.02, girth * 1.12, length * 0.44))
    b.ball("body", "main", (0, height + girth * 0.02, -length * 0.6), (girth * 0.98, girth, length * 0.38))
    leg = height - girth * 0.3, girth * 0.33
    _legs(b, girth, height, (length * 0.66, -length * 0.7), 26, ((10, -14), (10, 16)), leg)
    lift, yaw = d.angle(16, 52), d.angle(22)
    base = xyz(0, height + girth * 0.45, length * 0.78)
    head = base + neck * xyz(0, np.sin(lift), np.cos(lift)) + xyz(0, 0.05, 0.05)
    b.tube("neck", "main", base - xyz(0, girth * 0.45, girth * 0.35), head, girth * 0.8, girth * 0.52)
    size = girth * d.between(0.72, 0.92)
    facing = turn("y", yaw) @ turn("x", d.angle(14, 8))
    radii = size * xyz(0.92, 0.9, 1.05)
    b.ball("head", "main", head, radii, facing, points={"top of the head": (0, 1, -0.1)})
    long = d.between(0.75, 1.25) * size
    tip = head + facing @ xyz(0, -size * 0.28, size * 0.75 + long)
    b.tube("snout", "second", head + facing @ (size * xyz(0, -0.2, 0.45)), tip, size * 0.6, size * 0.4)
    b.ball("snout", "second", tip, size * 0.42, facing, points={"chin": (0, -1, 0.1)})
    nose = tip + facing @ (size * xyz(0, 0.22, 0.3))
    b.ball("snout", "dark", nose, size * 0.2, facing, points={"nose": (0, 0.25, 1)})
    _eyes(b, head, radii, facing, xyz(0.5, 0.42, 0.76), size * 0.2)
    for s, side in SIDES:
        ear, tip_name = f"{side} ear", f"{side} ear tip"
        root = head + facing @ (size * xyz(s * 0.6, 0.66, -0.15))
        if ears == "pointed":
            end = root + facing @ (size * xyz(s * 0.28, 0.95, 0))
            b.tube(ear, "second", root - (end - root) * 0.25, end, size * 0.42, 0.02, points={tip_name: (0, 1, 0)})
            continue
        droop, half, tilt, up = {
            "floppy": (xyz(s * 0.42, -0.75, 0), xyz(0.16, 0.75, 0.42), 0.35, -1),
            "round": (xyz(s * 0.5, 0.55, 0), xyz(0.42, 0.42, 0.16), -0.5, 1),
        }[ears]
        at, turned = root + facing @ (droop * size * 0.75), facing @ turn("z", s * tilt)
        b.ball(ear, "second", at, size * half, turned, points={tip_name: (0, up, 0)})
    rump = xyz(0, height + girth * 0.5, -length * 0.9)
    raised, wag, tail = d.angle(30, 38), d.angle(30), d.between(0.26, 0.46)
    along = turn("y", wag) @ xyz(0, np.sin(raised), -np.cos(raised))
    middle = rump + along * tail * 0.5
    end = middle + (along + xyz(0, 0.5, 0)) * tail * 0.45
    pieces = b.limb("tail", "main", [rump, middle, end], [girth * 0.24, girth * 0.19, girth * 0.12])
    b.point("tail tip", pieces[-1], (0, 1, -0.6))
    b.point("tail root", pieces[0], (0, -0.3, -1))


def giraffe(b: Body) -> None:
    """A long-necked four-legged animal. Never in training."""
    d = b.draw
    points: Points
    length, girth = d.between(0.30, 0.38), d.between(0.15, 0.19)
    legs, neck = d.between(0.62, 0.80), d.between(0.62, 0.85)
    height = legs + girth * 0.75
    b.variant = d.choice(("short horns", "long horns"))
    _trunk(b, height, xyz(girth, girth * 1.05, length), -0.25)
    b.ball("body", "main", (0, height + girth * 0.2, length * 0.5), (girth * 0.96, girth * 1.2, length * 0.46))
    leg = height - girth * 0.25, girth * 0.26
    _legs(b, girth, height, (length * 0.62, -length * 0.66), 20, ((6, -7), (6, 9)), leg)
    lift, yaw = d.angle(11, 64), d.angle(20)
    base = xyz(0, height + girth * 0.5, length * 0.78)
    head = base + neck * xyz(0, np.sin(lift), np.cos(lift))
    b.tube("neck", "main", base - xyz(0, girth * 0.7, girth * 0.5), head, girth * 0.82, girth * 0.36)
    size = girth * d.between(0.56, 0.68)
    facing = turn("y", yaw) @ turn("x", d.angle(12, 20))
    radii = size * xyz(0.85, 0.85, 1.15)
    b.ball("head", "main", head, radii, facing, points={"top of the head": (0, 1, -0.1)})
    tip = head + facing @ np.array([0, -size * 0.35, size * d.between(1.6, 2.1)])
    b.tube("snout", "second", head + facing @ (size * xyz(0, -0.15, 0.3)), tip, size * 0.66, size * 0.42)
    b.ball("snout", "second", tip, size * 0.45, facing, points={"chin": (0, -1, 0.1)})
    nose = tip + facing @ (size * xyz(0, 0.2, 0.32))
    b.ball("snout", "dark", nose, size * 0.18, facing, points={"nose": (0, 0.25, 1)})
    _eyes(b, head, radii, facing, xyz(0.66, 0.45, 0.6), size * 0.2)
    horn = 0.75 if b.variant == "short horns" else 1.2
    for s, side in SIDES:
        ear = head + facing @ (size * xyz(s * 0.75, 0.45, -0.4)) + facing @ (size * xyz(s * 0.45, 0.1, 0))
        tilt, points = facing @ turn("z", s * 0.3), {f"{side} ear tip": (s, 0, 0)}
        b.ball(f"{side} ear", "second", ear, size * xyz(0.62, 0.3, 0.16), tilt, points=points)
        foot = head + facing @ (size * xyz(s * 0.38, 0.6, -0.25))
        top = foot + facing @ (size * xyz(s * 0.12, horn, -0.1))
        b.tube("horns", "second", foot, top, size * 0.13)
        b.ball("horns", "dark", top, size * 0.2)
    rump = xyz(0, height + girth * 0.35, -length * 0.92)
    drop, tail = d.angle(14, -62), d.between(0.30, 0.42)
    end = rump + tail * (turn("y", d.angle(20)) @ xyz(0, np.sin(drop), -np.cos(drop)))
    b.tube("tail", "main", rump, end, girth * 0.16, girth * 0.09, points={"tail root": (0, -0.5, -1)})
    b.ball("tail", "dark", end, girth * xyz(0.16, 0.34, 0.16), points={"tail tip": (0, -0.4, -1)})


def bird(b: Body) -> None:
    """A bird, standing or flying."""
    d = b.draw
    points: Points
    flying = d.choice((False, True))
    b.variant = "flying" if flying else "standing"
    b.places = ("sky",) if flying else ("ground",)
    length, girth = d.between(0.36, 0.50), d.between(0.17, 0.25)
    legs = d.between(0.16, 0.34)
    height = legs + girth * 1.1
    lean = turn("x", -d.angle(10, d.form(6 if flying else 26, 16)))  # chest up
    centre = xyz(0.0, height, 0.0)
    b.ball("body", "main", centre, (girth, girth * 1.02, length), lean, points={"back": (0, 1, -0.1)})
    breast, half = centre + lean @ xyz(0, -girth * 0.16, length * 0.3), (girth * 0.93, girth * 0.94, length * 0.62)
    b.ball("body", "second", breast, half, lean, points={"breast": (0, -0.25, 1)})
    yaw = d.angle(30)
    size = girth * d.between(0.62, 0.82)
    head = centre + lean @ xyz(0, girth * 0.75, length * 0.86)
    neck = d.between(0.0, 0.22)
    head = head + xyz(0, neck, neck * 0.3)
    b.tube("neck", "main", centre + lean @ xyz(0, girth * 0.2, length * 0.5), head, girth * 0.66, size * 0.7)
    facing = turn("y", yaw)
    radii = size * xyz(0.92, 1, 1.02)
    b.ball("head", "main", head, radii, facing, points={"top of the head": (0, 1, -0.15)})
    beak = d.between(0.7, 1.5) * size
    root = head + facing @ (size * xyz(0, -0.08, 0.6))
    tip = root + facing @ xyz(0, -beak * 0.18, size * 0.4 + beak)
    b.tube("beak", "bright", root, tip, size * 0.46, 0.012, flat=0.8, points={"beak tip": (0, 1, 0)})
    _eyes(b, head, radii, facing, xyz(0.68, 0.32, 0.64), size * 0.2)
    span, chord = d.between(0.62, 0.9), length * d.between(0.55, 0.75)
    plan = [(1.0, 0.0), (0.75, 0.5), (0.0, 1.0), (-0.5, 0.95), (-1.0, 0.45), (-1.05, 0.0)]
    dihedral = d.angle(32, 14)
    for s, side in SIDES:
        name = f"{side} wing"
        shoulder = centre + lean @ xyz(s * girth * 0.72, girth * 0.35, length * 0.18)
        spread = lean @ turn("z", s * dihedral) @ turn("x", -0.12)
        if flying:
            points = {f"{name} tip": (s * 1.0, 1, 0.0), f"{name} front": (s * 0.5, 1, 0.75)}
            outline = prism([(z, s * x) for z, x in plan], axis="y")
            b.add(outline, name, "second", shoulder, (span, 0.022, chord), spread, points=points)
        else:
            points = {f"{name} tip": (s * 0.3, 0, -1), f"{name} front": (s * 0.7, 0, 0.8)}
            fold = lean @ turn("y", s * 0.1) @ turn("x", -0.1) @ turn("z", s * -0.22)
            at = centre + lean @ xyz(s * girth * 0.84, girth * 0.22, -length * 0.16)
            reach = np.stack([[0, 0.022, 0], [0, 0, chord], [-s * span / 2, 0, 0]], axis=1)
            rest = spread @ reach, shoulder + spread @ xyz(s * span / 2, 0, 0)
            b.add(Ball(), name, "second", at, (girth * 0.26, girth * 0.62, length * 0.78), fold, rest, points=points)
        foot = centre + lean @ xyz(s * girth * 0.42, -girth * 0.75, -length * 0.1)
        swing = d.angle(14)
        if d.form(flying, False):
            ankle = foot + xyz(0, -legs * 0.35, -legs * 0.55)
            toe = ankle + xyz(0, -0.02, -0.1)
        else:
            ankle = np.array([foot[0], 0.03, foot[2] + np.sin(swing) * legs])
            toe = ankle + xyz(0, -0.015, 0.15)
        b.limb(f"{side} leg", "bright", [foot, ankle], [girth * 0.13, girth * 0.09])
        points = {f"{side} foot": (0, 0.2, -1 if flying else 1)}
        b.ball(f"{side} leg", "bright", (ankle + toe) / 2, (girth * 0.3, 0.025, 0.1), points=points)
    fan = d.between(0.24, 0.40)
    tail = prism([(0.9, 0.3), (0.9, -0.3), (-1.0, -0.85), (-1.0, 0.85)], axis="y")
    at, tilt = centre + lean @ xyz(0, 0.0, -length - fan * 0.55), lean @ turn("x", d.angle(10, -4))
    b.add(tail, "tail", "second", at, (girth * 0.8, 0.025, fan), tilt, points={"tail tip": (0, 1, -1)})


def fish(b: Body) -> None:
    """A fish in the water."""
    d = b.draw
    points: Points
    length = d.between(0.60, 0.78)
    tall, wide = d.between(0.24, 0.42), d.between(0.13, 0.20)
    fin = d.choice(("forked", "round"))
    b.variant = f"{fin} tail"
    b.places = ("water",)
    centre = xyz(0.0, 0.75, 0.0)
    flanks = {f"{side} flank": (s, 0, -0.25) for s, side in SIDES}
    b.ball("body", "main", centre, (wide, tall, length), points={"back": (0, 1, -0.35), **flanks})
    radii, head = xyz(wide * 0.97, tall * 0.84, length * 0.52), centre + xyz(0, 0, length * 0.42)
    b.ball("head", "second", head, radii)
    mouth = centre + xyz(0, -tall * 0.06, length * 0.93)
    b.ball("head", "bright", mouth, (wide * 0.4, tall * 0.13, 0.05), points={"mouth": (0, 0.1, 1)})
    _eyes(b, head, radii, np.eye(3), xyz(0.72, 0.36, 0.5), wide * 0.34)
    sway = turn("y", d.angle(26))
    root = centre + xyz(0, 0, -length * 0.86)
    stem = root + xyz(0, 0, length * 0.3), root + sway @ xyz(0, 0, -length * 0.16)
    points = {"tail root": (0, 0.9, 1)}
    b.tube("tail", "main", *stem, tall * 0.5, tall * 0.24, flat=wide / tall * 0.9, points=points)
    span, chord = tall * d.between(0.85, 1.25), length * d.between(0.26, 0.38)
    reach, notch = (1.0, -0.35) if fin == "forked" else (0.72, -1.1)
    for sign, name in ((1, "upper"), (-1, "lower")):
        plan = [(1.0, 0.0), (1.0, 0.3), (-0.75, reach), (-1.1, reach * 0.85), (notch, 0)]
        lobe = prism([(z, sign * y) for z, y in plan], axis="x")
        at = root + sway @ xyz(0, 0, -length * 0.1 - chord * 0.8)
        points = {f"{name} tail tip": (0, sign * reach, -0.75)}
        b.add(lobe, "tail", "second", at, (0.02, span, chord), sway, points=points)
    high = tall * d.between(0.45, 0.8)
    dorsal = prism([(1.0, -0.6), (0.25, 0.75), (-0.55, 1.0), (-1.0, 0.5), (-0.9, -0.6)], axis="x")
    at, points = centre + xyz(0, tall * 0.93, -length * 0.12), {"dorsal fin tip": (0, 1.0, -0.55)}
    b.add(dorsal, "dorsal fin", "second", at, (0.02, high, length * 0.42), points=points)
    for s, side in SIDES:
        spread = d.angle(18, 42)
        outline = prism([(1.0, 0.0), (0.2, s * 0.6), (-0.9, s * 1.0), (-1.0, s * 0.45), (-0.3, 0.0)], axis="y")
        at, half = centre + xyz(s * wide * 0.72, -tall * 0.32, length * 0.22), (tall * 0.95, 0.018, length * 0.2)
        points = {f"{side} fin tip": (s * 1.0, 1, -0.9)}
        b.add(outline, f"{side} fin", "second", at, half, turn("z", -s * spread), points=points)
    if d.chance(0.6):
        anal, at = prism([(1.0, 0.5), (-0.5, -0.9), (-1.0, -0.6), (-0.8, 0.5)], axis="x"), -length * 0.34
        b.add(anal, "anal fin", "second", centre + xyz(0, -tall * 0.85, at), (0.02, tall * 0.4, length * 0.22))


def person(b: Body) -> None:
    """A standing or walking person."""
    d = b.draw
    points: Points
    leg, torso = d.between(0.66, 0.82), d.between(0.46, 0.58)
    shoulder, hip = d.between(0.19, 0.255), d.between(0.13, 0.17)
    thick = d.between(0.052, 0.072)
    hair = d.choice(("short hair", "long hair", "hat"))
    b.variant = hair
    top = leg + torso
    corners = [(1.0, -0.8), (1.0, 0.8), (0.6, 1.0), (-0.6, 1.0), (-1.0, 0.8), (-1.0, -0.8), (-0.6, -1), (0.6, -1)]
    chest = prism(corners, axis="y", taper=(1.0, shoulder / hip * 0.92))
    points = {"chest": (0, 0.5, 1.0), "back": (0, 0.5, -1.0)}
    half = (hip * 1.06, torso * 0.48, hip * 0.62)
    b.add(chest, "torso", "main", (0, leg + torso * 0.5, 0), half, points=points)
    b.ball("torso", "main", (0, top - torso * 0.09, 0), (shoulder * 1.0, torso * 0.16, hip * 0.68))
    b.ball("hips", "second", (0, leg + 0.01, 0), (hip * 1.12, hip * 0.68, hip * 0.76))
    for s, side in SIDES:
        swing, bend = d.angle(26), d.angle(14, -16)
        joints = _jointed(xyz(s * hip * 0.58, leg - 0.02, 0), (leg * 0.49, leg * 0.46), (swing, swing + bend))
        pieces = b.limb(f"{side} leg", "second", joints, [thick * 1.35, thick * 1.02, thick * 0.72])
        b.point(f"{side} knee", pieces[0], (0, 1, 1))
        foot, half = joints[2] + xyz(0, -0.01, 0.055), (thick * 0.8, thick * 0.72, 0.13)
        b.ball(f"{side} foot", "dark", foot, half, points={f"{side} toe": (0, 0.2, 1)})
        raised, forward, elbow = d.angle(14, 16), d.angle(34), d.angle(28, 30)
        root = xyz(s * shoulder, top - torso * 0.1, 0)
        upper = turn("z", s * raised) @ xyz(0, -np.cos(forward), np.sin(forward))
        fore = turn("z", s * raised * 0.6) @ xyz(0, -np.cos(forward + elbow), np.sin(forward + elbow))
        bow = root + upper * torso * 0.56
        wrist = bow + fore * torso * 0.5
        sleeve, joint = b.limb(f"{side} arm", "main", [root, bow], [thick * 1.05, thick * 0.82])
        b.point(f"{side} elbow", sleeve, (0, 1, -1))
        b.point(f"{side} shoulder", joint, (s * 0.7, 1, 0))  # of the sleeve's lower end, as all models have learnt it
        b.ball(f"{side} arm", "main", root, thick * 1.18)
        b.tube(f"{side} arm", "skin", bow, wrist, thick * 0.78, thick * 0.6)
        hand, points = wrist + fore * 0.06, {f"{side} hand": (s, -0.5, 0)}
        b.ball(f"{side} hand", "skin", hand, thick * xyz(0.75, 1.15, 0.95), points=points)
    size = d.between(0.125, 0.160)
    head = xyz(0, top + size * 1.18, 0.01)
    b.tube("neck", "skin", (0, top - 0.04, 0), head, size * 0.44)
    facing = turn("y", d.angle(28))
    radii = size * xyz(0.84, 1.05, 0.92)
    b.ball("head", "skin", head, radii, facing, points={"chin": (0, -0.92, 0.42)})
    nose = head + facing @ (size * xyz(0, -0.08, 0.93))
    b.ball("head", "skin", nose, size * 0.17, facing, points={"nose": (0, 0, 1)})
    _eyes(b, head, radii, facing, xyz(0.4, 0.2, 0.88), size * 0.15)
    cap, paint = Ball((Clip((0.0, -0.75, 0.66), 0.12),)), "bright" if hair == "hat" else "dark"
    at, points = head + xyz(0, size * 0.05, 0), {"top of the head": (0, 1, -0.12)}
    b.add(cap, "hair", paint, at, radii * 1.12, facing, points=points)
    if hair == "hat":
        b.tube("hair", "bright", head + xyz(0, size * 0.58, 0), head + xyz(0, size * 0.66, 0), size * 1.55)
    elif hair == "long hair":
        at = head + facing @ (size * xyz(0, -0.45, -0.42))
        b.ball("hair", "dark", at, size * xyz(0.8, 1.15, 0.55), facing)
