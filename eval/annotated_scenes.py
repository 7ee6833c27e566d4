"""Rendered scenes as images with annotated pixels: depth, normals, parts and categories as files beside them.

They go through the same path as anybody's images, see `diffrep.heads.probes.annotated`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffrep.eval.scene_maps import SceneMapSettings, scene_batches
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
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(about, json.dumps(asdict(settings)).encode())
    jobs = {}
    for place, (part, count) in enumerate((("train", settings.scenes), ("test", settings.test_scenes))):
        for number in range(count):
            seed = scene_seed("test", (place + 4) * 2**30 + number)  # labelled images lie at 1 to 3 times 2**30
            jobs[folder / part, f"{number:06d}"] = (seed, SEEN[number % len(SEEN)], settings.scene_size)
    missing = [place for place in jobs if not _files(*place)["images"].is_file()]
    rendering = SceneMapSettings(workers=workers if workers > 1 and len(missing) > 16 else 0)
    done = iter(missing)
    with tqdm(total=len(missing), desc="rendering", unit="scene", disable=not progress or not missing) as bar:
        for batch in scene_batches([jobs[place] for place in missing], rendering):
            for scene in batch:
                _write(scene, _files(*next(done)))
                bar.update()
    sets = []
    for part in ("train", "test"):
        files = [_files(*place) for place in jobs if place[0].name == part]
        sets.append(
            AnnotatedFiles(str(folder / part), tuple(f["images"] for f in files), tuple(f[what] for f in files))
        )
    return sets[0], sets[1]


def _files(folder: Path, name: str) -> dict[str, Path]:
    endings = {"images": "png", "depth": "npy", "normals": "npy", "parts": "png", "categories": "png"}
    return {what: folder / what / f"{name}.{ending}" for what, ending in endings.items()}


def _write(scene: Scene, files: Mapping[str, Path]) -> None:
    category = np.where(scene.mask, 1 + SEEN.index(scene.category), 0).astype(np.uint8)
    normals = (scene.normals * np.array(FRAME_SIGNS["rdf"])).astype(np.float16)
    content = {
        "depth": _npy(np.where(np.isfinite(scene.depth), scene.depth, 0).astype(np.float32)),
        "normals": _npy(normals),
        "parts": _png(PART_CLASS_OF[scene.part]),
        "categories": _png(category),
        "images": _png(scene.image),  # last: it says that all is there
    }
    for what, values in content.items():
        files[what].parent.mkdir(parents=True, exist_ok=True)
        write_whole(files[what], values)


def _npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()


def _png(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, format="png")
    return out.getvalue()
