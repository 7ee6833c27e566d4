"""Scenes stay what they were when the embedded models were trained on them.

`tests/data/scenes.json` holds a digest of what every seed draws (shapes, places, paints, camera, light, keypoints) and
of each category one small picture. A change of either would make the models' numbers meaningless.
`python tests/test_scene_renders.py` writes the file anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffrep.scenes import CATEGORIES, PARTS, render_scene, scene_pairs
from diffrep.scenes.stage import set_stage

DATA = Path(__file__).parent / "data" / "scenes.json"
SEEDS = 12


def rounded(*values: object) -> str:
    """Numbers to 5 places, which the last bits of another machine's sines do not reach."""
    return str([(np.round(np.asarray(value, dtype=float), 5) + 0.0).tolist() for value in values])


def digest_of(category: str, seed: int) -> str:
    """All that a seed decides, in no particular order of the pieces."""
    stage = set_stage(seed, category)
    rows = []
    for s in stage.surfaces:
        rest = (s.template or s.primitive).resting
        paint = s.texture.first, s.texture.second, s.texture.frame, s.texture.phase, s.gloss
        placed = rounded(s.primitive.linear, s.primitive.centre, *rest, s.matrix, s.eye, *paint)
        rows.append(f"{type(s.primitive.shape).__name__} {s.part} {s.texture.kind} {placed}")
    rows += [f"{k.name} {rounded(k.local)}" for k in stage.body.keypoints]
    look, camera = stage.look, stage.camera
    light = rounded(look.sun, look.ambient, look.sky, look.sun_direction, look.clouds, look.wall_distance)
    rows += [light, rounded(camera.rotation, camera.shift, camera.focal), f"{stage.body.variant} {look.attributes}"]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


def picture_of(category: str) -> dict[str, Any]:
    """One scene in small: block means of the image, pixels of each part, keypoints and which of them are seen."""
    scene = render_scene(1, category=category, size=64)
    ids, counts = np.unique(scene.part, return_counts=True)
    return {
        "image": np.round(scene.image.reshape(4, 16, 4, 16, 3).mean((1, 3)), 1).tolist(),
        "parts": dict(zip(map(str, ids.tolist()), counts.tolist(), strict=True)),
        "keypoints": np.round(scene.keypoints.astype(float), 3).tolist(),
        "visible": scene.visible.tolist(),
        "depth": round(float(scene.depth[scene.mask].mean()), 4),
        "caption": scene.caption,
    }


def document() -> dict[str, Any]:
    return {
        "parts": [[p.category, p.name, p.part_class, p.mirror] for p in PARTS],
        "pairs": [list(pair) for pair in scene_pairs("test", 2, categories=CATEGORIES)],
        "stages": {category: [digest_of(category, seed) for seed in range(SEEDS)] for category in CATEGORIES},
        "pictures": {category: picture_of(category) for category in CATEGORIES},
    }


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return dict(json.loads(DATA.read_text()))


def test_part_ids_and_pairs_are_those_of_the_embedded_models(stored: dict[str, Any]) -> None:
    assert [[p.category, p.name, p.part_class, p.mirror] for p in PARTS] == stored["parts"]
    assert [list(pair) for pair in scene_pairs("test", 2, categories=CATEGORIES)] == stored["pairs"]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_seed_draws_what_it_always_drew(category: str, stored: dict[str, Any]) -> None:
    assert [digest_of(category, seed) for seed in range(SEEDS)] == stored["stages"][category]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_scene_looks_as_it_always_looked(category: str, stored: dict[str, Any]) -> None:
    now, before = picture_of(category), stored["pictures"][category]
    np.testing.assert_allclose(now["image"], before["image"], atol=0.5)
    np.testing.assert_allclose(now["keypoints"], before["keypoints"], atol=2e-3)
    assert now["parts"].keys() == before["parts"].keys()
    assert all(abs(now["parts"][part] - count) <= 2 for part, count in before["parts"].items())
    assert now["depth"] == pytest.approx(before["depth"], rel=1e-3)
    assert (now["visible"], now["caption"]) == (before["visible"], before["caption"])


if __name__ == "__main__":
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(document()) + "\n")
