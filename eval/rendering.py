"""Rendered scenes to measure on: which are taken, in batches, by as many processes as one likes; and as files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffrep.files import write_whole
from diffrep.heads.families import FRAME_SIGNS
from diffrep.images import load_image
from diffrep.processes import process_pool
from diffrep.scenes import (
    CATEGORIES,
    PART_CLASS_OF,
    PART_CLASSES,
    SEEN,
    UNSEEN,
    Scene,
    render_scene,
    scene_seed,
)
from diffrep.settings import ANY_WORKERS, check, check_ranges

if TYPE_CHECKING:
    from diffrep.heads.probes.annotated import AnnotatedFiles

LARGEST = 4096  # side of a rendered image, pixels
Job = TypeVar("Job")
Rendered = TypeVar("Rendered")
Place = TypeVar("Place")


@dataclass(frozen=True, kw_only=True)
class RenderedScenes:
    """Which scenes are rendered, and how. A subclass says how many.

    Raises:
        ValueError: naming a setting of which no scenes can be rendered.
    """

    categories: tuple[str, ...] = CATEGORIES
    split: Literal["train", "val", "test"] = "test"  # of disjoint seeds
    size: int = 128  # side of the rendered images, pixels
    batch_size: int = 8  # samples that are taken together
    workers: int = 2  # processes that render ahead; 0: none beside this one

    def __post_init__(self) -> None:
        check(self, size=f"16..{LARGEST}", batch_size="1..", workers=ANY_WORKERS)
        if not self.categories:
            raise ValueError("categories must name at least one")
        if unknown := sorted(set(self.categories) - set(CATEGORIES)):
            raise ValueError(f"no category {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")

    def batches(self, render: Callable[[Job], Rendered], jobs: Sequence[Job]) -> Iterator[list[Rendered]]:
        """What a function renders of every job, in order.

        Args:
            render: of a module, so that other processes can import it.
        """
        if not jobs:
            return
        with ExitStack() as stack:
            samples: Iterator[Rendered] = map(render, jobs)
            if self.workers:
                pool = stack.enter_context(process_pool(self.workers))
                samples = pool.map(render, jobs, chunksize=4)
            while batch := list(islice(samples, self.batch_size)):
                yield batch


SceneJob: TypeAlias = tuple[int, str, int]
"""Seed, category and size of a scene."""


@dataclass(frozen=True, kw_only=True)
class SceneMapSettings(RenderedScenes):
    """Which scenes are counted."""

    count: int = 600  # scenes
    first: int = 0  # number of the first scene
    batch_size: int = 16
    workers: int = 1  # processes that render ahead; 0: none beside this one
    # what stands behind the objects: as rendered, or cut out and pasted on photographs, where only the object counts
    background: Literal["rendered", "photographs"] = "rendered"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)
        check_ranges(self, count="1..", first="[0, 2^31)")

    def jobs(self) -> list[SceneJob]:
        """All scenes, categories in turn."""
        kinds, numbers = self.categories, range(self.first, self.first + self.count)
        return [(scene_seed(self.split, i), kinds[i % len(kinds)], self.size) for i in numbers]

    @property
    def title(self) -> str:
        """What reports call these scenes."""
        where = ", objects pasted on photographs" if self.background == "photographs" else ""
        return f"scenes ({self.split}, {self.size} px{where})"

    def scenes(self, jobs: Sequence[SceneJob]) -> Iterator[list[Scene]]:
        """Scenes in batches, in front of what they are to stand in front of."""
        return self.batches(pasted_job if self.background == "photographs" else render_job, jobs)


def render_job(job: SceneJob) -> Scene:
    """Render one scene."""
    seed, category, size = job
    return render_scene(seed, category=category, size=size)


def pasted_job(job: SceneJob) -> Scene:
    """Render one scene and paste its object, its outline smooth, on a part of a photograph; both are the seed's.

    What stands around the object has no depth (inf) and no normals (0): nobody knows those of the photograph.
    """
    from diffrep.eval.homography import photographs  # with matching and its backbones

    scene, (seed, category, size) = render_job(job), job
    fine = render_scene(seed, category=category, size=2 * size)

    def halved(values: np.ndarray) -> np.ndarray:
        """Means of 2 x 2 pixels."""
        return values.reshape(size, 2, size, 2, -1).mean((1, 3))

    cover = halved(fine.mask.astype(np.float64))
    colours = halved(fine.image * fine.mask[..., None].astype(np.float64)) / np.maximum(cover, 1e-6)
    draws = np.random.default_rng([seed, 1])
    files = sorted(photographs().values())
    photograph = load_image(files[int(draws.integers(len(files)))])
    side = int(draws.uniform(0.4, 1.0) * min(photograph.size))
    left, top = (int(draws.integers(length - side + 1)) for length in photograph.size)
    window = photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    image = cover * colours + (1 - cover) * np.asarray(window, dtype=np.float64)
    return replace(
        scene,
        image=(image.clip(0, 255) + 0.5).astype(np.uint8),
        depth=np.where(scene.mask, scene.depth, np.float32(np.inf)),
        normals=scene.normals * scene.mask[..., None],
    )


def name_of(job: SceneJob) -> str:
    """What a scene is called in reports."""
    return f"{job[1]} {job[0]}"


def scene_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Scenes by name, together and, where both kinds are there, by whether models in training see their categories."""
    seen = [name for name in names if name.partition(" ")[0] in SEEN]
    unseen = [name for name in names if name.partition(" ")[0] in UNSEEN]
    return {"all": list(names), **({"seen": seen, "unseen": unseen} if seen and unseen else {})}


What: TypeAlias = Literal["depth", "normals", "parts", "categories"]


@dataclass(frozen=True, kw_only=True)
class SceneFiles:
    """How many scenes are rendered, of the split "test", which the embedded models have not seen."""

    scenes: int = 400  # to train on
    test_scenes: int = 100  # to measure on
    scene_size: int = 128  # pixels

    def __post_init__(self) -> None:
        check(self, scenes="1..", test_scenes="1..")


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
    from diffrep.heads.probes.annotated import AnnotatedFiles  # who measures matches needs no probes

    settings, folder = settings or SceneFiles(), Path(folder)
    jobs: dict[tuple[str, str], SceneJob] = {}  # part, name -> scene
    for place, (part, count) in enumerate((("train", settings.scenes), ("test", settings.test_scenes))):
        for number in range(count):
            seed = scene_seed("test", (place + 4) * 2**30 + number)  # labelled images lie at 1 to 3 times 2**30
            jobs[part, f"{number:06d}"] = (seed, SEEN[number % len(SEEN)], settings.scene_size)

    def file(kind: str, part: str, name: str) -> Path:
        return folder / part / kind / f"{name}{'.npy' if kind in ('depth', 'normals') else '.png'}"

    missing = {place: job for place, job in jobs.items() if not file("images", *place).is_file()}
    for (part, name), scene in rendered_into(folder, settings, missing, workers=workers, progress=progress):
        for kind, values in _maps(scene).items():
            path = file(kind, part, name)
            write_whole(path, encoded(values, path.suffix))
    sets = []
    for part in ("train", "test"):
        places = [place for place in jobs if place[0] == part]
        images, annotations = (tuple(file(kind, *place) for place in places) for kind in ("images", what))
        sets.append(AnnotatedFiles(str(folder / part), images, annotations))
    return sets[0], sets[1]


def rendered_into(
    folder: Path, settings: Any, missing: Mapping[Place, SceneJob], *, workers: int, progress: bool
) -> Iterator[tuple[Place, Scene]]:
    """Render the scenes that a folder of files lacks; the folder says of which settings its scenes are.

    Raises:
        ValueError: the folder holds scenes of other settings.
    """
    about = folder / "scenes.json"
    if about.is_file() and about.read_text(encoding="utf-8") != json.dumps(asdict(settings)):
        raise ValueError(f"{folder}: holds scenes of other settings; name another folder or delete it")
    write_whole(about, json.dumps(asdict(settings)))
    rendering = SceneMapSettings(workers=workers if workers > 1 and len(missing) > 16 else 0)
    scenes = chain.from_iterable(rendering.batches(render_job, list(missing.values())))
    bar = tqdm(scenes, total=len(missing), desc="rendering", unit="scene", disable=not progress or not missing)
    yield from zip(missing, bar, strict=True)


def _maps(scene: Scene) -> dict[str, np.ndarray]:
    return {
        "depth": np.where(np.isfinite(scene.depth), scene.depth, 0).astype(np.float32),
        "normals": (scene.normals * np.array(FRAME_SIGNS["rdf"])).astype(np.float16),
        "parts": PART_CLASS_OF[scene.part],
        "categories": np.where(scene.mask, 1 + SEEN.index(scene.category), 0).astype(np.uint8),
        "images": scene.image,  # last: it says that all is there
    }


def encoded(values: np.ndarray, suffix: str) -> bytes:
    """The bytes of a ``.npy`` or ``.png`` file."""
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, values, allow_pickle=False)
    else:
        Image.fromarray(values).save(out, format="png")
    return out.getvalue()
