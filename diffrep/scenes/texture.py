"""Surface patterns: two colours mixed by a field over 3-D points, and the noise in some of the fields."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffrep.scenes.shapes import Array


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
