"""Person."""

from __future__ import annotations

import numpy as np

from diffrep.scenes.animals import eyes
from diffrep.scenes.build import SIDES, Body, turn, xyz
from diffrep.scenes.shapes import Ball, Clip, prism


def person(b: Body) -> None:
    """A standing or walking person."""
    d = b.draw
    leg, torso = d.between(0.66, 0.82), d.between(0.46, 0.58)
    shoulder, hip = d.between(0.19, 0.255), d.between(0.13, 0.17)
    thick = d.between(0.052, 0.072)
    hair = d.choice(("short hair", "long hair", "hat"))
    b.variant = hair
    waist = leg
    top = waist + torso
    chest = prism(
        [(1.0, -0.8), (1.0, 0.8), (0.6, 1.0), (-0.6, 1.0), (-1.0, 0.8), (-1.0, -0.8), (-0.6, -1), (0.6, -1)],
        axis="y",
        taper=(1.0, shoulder / hip * 0.92),
    )
    trunk = b.add(chest, "torso", "main", (0, waist + torso * 0.5, 0), (hip * 1.06, torso * 0.48, hip * 0.62))
    b.ball("torso", "main", (0, top - torso * 0.09, 0), (shoulder * 1.0, torso * 0.16, hip * 0.68))
    b.ball("hips", "second", (0, waist + 0.01, 0), (hip * 1.12, hip * 0.68, hip * 0.76))
    b.point("chest", trunk, (0, 0.5, 1.0))
    b.point("back", trunk, (0, 0.5, -1.0))
    for s, side in SIDES:
        joint = xyz(s * hip * 0.58, waist - 0.02, 0)
        swing, bend = d.angle(26), d.angle(14, -16)
        knee = joint + leg * 0.49 * xyz(0, -np.cos(swing), np.sin(swing))
        lower = swing + bend
        ankle = knee + leg * 0.46 * xyz(0, -np.cos(lower), np.sin(lower))
        tubes = b.limb(f"{side} leg", "second", [joint, knee, ankle], [thick * 1.35, thick * 1.02, thick * 0.72])
        b.point(f"{side} knee", tubes[0], (0, 1, 1))
        shoe = b.ball(f"{side} foot", "dark", ankle + xyz(0, -0.01, 0.055), (thick * 0.8, thick * 0.72, 0.13))
        b.point(f"{side} toe", shoe, (0, 0.2, 1))
        raise_, forward, elbow = d.angle(14, 16), d.angle(34), d.angle(28, 30)
        root = xyz(s * shoulder, top - torso * 0.1, 0)
        upper = turn("z", s * raise_) @ xyz(0, -np.cos(forward), np.sin(forward))
        fore = turn("z", s * raise_ * 0.6) @ xyz(0, -np.cos(forward + elbow), np.sin(forward + elbow))
        bow = root + upper * torso * 0.56
        wrist = bow + fore * torso * 0.5
        sleeves = b.limb(f"{side} arm", "main", [root, bow], [thick * 1.05, thick * 0.82])
        b.ball(f"{side} arm", "main", root, thick * 1.18)
        b.tube(f"{side} arm", "skin", bow, wrist, thick * 0.78, thick * 0.6)
        b.point(f"{side} elbow", sleeves[0], (0, 1, -1))
        hand = b.ball(f"{side} hand", "skin", wrist + fore * 0.06, (thick * 0.75, thick * 1.15, thick * 0.95))
        b.point(f"{side} hand", hand, (s, -0.5, 0))
        b.point(f"{side} shoulder", b.primitives[-4], (s * 0.7, 1, 0))
    size = d.between(0.125, 0.160)
    head = xyz(0, top + size * 1.18, 0.01)
    b.tube("neck", "skin", (0, top - 0.04, 0), head, size * 0.44)
    facing = turn("y", d.angle(28))
    radii = xyz(size * 0.84, size * 1.05, size * 0.92)
    face = b.ball("head", "skin", head, radii, facing)
    b.point("chin", face, (0, -0.92, 0.42))
    nose = b.ball("head", "skin", head + facing @ xyz(0, -size * 0.08, size * 0.93), size * 0.17, facing)
    b.point("nose", nose, (0, 0, 1))
    eyes(b, "head", head, radii, facing, xyz(0.4, 0.2, 0.88), size * 0.15)
    crown = b.add(
        Ball((Clip((0.0, -0.75, 0.66), 0.12),)),
        "hair",
        "dark" if hair != "hat" else "bright",
        head + xyz(0, size * 0.05, 0),
        radii * 1.12,
        facing,
    )
    b.point("top of the head", crown, (0, 1, -0.12))
    if hair == "hat":
        b.tube("hair", "bright", head + xyz(0, size * 0.58, 0), head + xyz(0, size * 0.66, 0), size * 1.55)
    elif hair == "long hair":
        b.ball(
            "hair",
            "dark",
            head + facing @ xyz(0, -size * 0.45, -size * 0.42),
            (size * 0.8, size * 1.15, size * 0.55),
            facing,
        )
