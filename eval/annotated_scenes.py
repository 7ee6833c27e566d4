"""Rendered scenes as images with annotated pixels: depth, normals, parts and categories as files beside them.

They go through the same path as anybody's images, see `diffrep.heads.probes.annotated`.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffrep.eval.scene_maps import SceneJob, SceneMapSettings, render_job
from diffrep.files import write_whole
from diffrep.heads.families import FRAME_SIGNS
from diffrep.heads.probes.annotated import AnnotatedFiles
from diffrep.scenes import PART_CLASS_OF, PART_CLASSES, SEEN, Scene, scene_seed

What: TypeAlias = Literal["depth", "normals", "parts", "categories"]


@dataclass(frozen=True, kw_only=True)
class SceneFiles:
    """How many scenes are rendered, of the split "test", which the embedded models have not seen."""

    scenes: int = 400  # to train on
    test_scenes: int = 100  # to measure on
    scene_size: int = 128  # pixels

    def __post_init__(self) -> None:
        if min(self.scenes, self.test_scenes) < 1:
            raise ValueError(f"scenes and test_scenes must be at least 1, got {self.scenes} and {self.test_scenes}")


def scene_classes(what: What) -> tuple[str, ...]:
    """The names of the classes of parts or categories, by their numbers in the files."""
    return PART_CLASSES if what == "parts" else ("background", *SEEN)


def annotated_scenes(
    folder: str | Path, what: What, settings: SceneFiles | None = None, *, workers: int = 1, progress: bool = True
) -> tuple[AnnotatedFiles, AnnotatedFiles]:
    """Scenes to train on and scenes to measure on, rendered once.

    Args:
        folder: of the files; those that are there are kept.
        what: depth (metres, 0 in the sky), unit normals (x left, y up, z towards the camera), or labels: classes of
            parts, or categories of objects.

    Raises:
        ValueError: the folder holds scenes of other settings.
    """
    settings, folder = settings or SceneFiles(), Path(folder)
    about = folder / "scenes.json"
    if about.is_file() and about.read_text(encoding="utf-8") != json.dumps(asdict(settings)):
        raise ValueError(f"{folder}: holds scenes of other settings; name another folder or delete it")
    write_whole(about, json.dumps(asdict(settings)))
    jobs: dict[tuple[str, str], SceneJob] = {}  # part, name -> scene
    for place, (part, count) in enumerate((("train", settings.scenes), ("test", settings.test_scenes))):
        for number in range(count):
            seed = scene_seed("test", (place + 4) * 2**30 + number)  # labelled images lie at 1 to 3 times 2**30
            jobs[part, f"{number:06d}"] = (seed, SEEN[number % len(SEEN)], settings.scene_size)

    def file(kind: str, part: str, name: str) -> Path:
        return folder / part / kind / f"{name}{'.npy' if kind in ('depth', 'normals') else '.png'}"

    missing = [place for place in jobs if not file("images", *place).is_file()]
    rendering = SceneMapSettings(workers=workers if workers > 1 and len(missing) > 16 else 0)
    scenes = chain.from_iterable(rendering.batches(render_job, [jobs[place] for place in missing]))
    bar = tqdm(scenes, total=len(missing), desc="rendering", unit="scene", disable=not progress or not missing)
    for place, scene in zip(missing, bar, strict=True):
        for kind, values in _maps(scene).items():
            path = file(kind, *place)
            write_whole(path, _encoded(values, path.suffix))
    sets = []
    for part in ("train", "test"):
        places = [place for place in jobs if place[0] == part]
        images, annotations = (tuple(file(kind, *place) for place in places) for kind in ("images", what))
        sets.append(AnnotatedFiles(str(folder / part), images, annotations))
    return sets[0], sets[1]


def _maps(scene: Scene) -> dict[str, np.ndarray]:
    return {
        "depth": np.where(np.isfinite(scene.depth), scene.depth, 0).astype(np.float32),
        "normals": (scene.normals * np.array(FRAME_SIGNS["rdf"])).astype(np.float16),
        "parts": PART_CLASS_OF[scene.part],
        "categories": np.where(scene.mask, 1 + SEEN.index(scene.category), 0).astype(np.uint8),
        "images": scene.image,  # last: it says that all is there
    }


def _encoded(values: np.ndarray, suffix: str) -> bytes:
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, values, allow_pickle=False)
    else:
        Image.fromarray(values).save(out, format="png")
    return out.getvalue()
