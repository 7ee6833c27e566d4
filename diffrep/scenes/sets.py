"""Many scenes: disjoint seeds of the splits, pairs to match, and sets rendered to disk once.

A set is a folder of .npy files, one per label, memory-mapped, beside settings.json. It is rendered chunk by
chunk; a chunk counts once its captions file is there, which is written last, so a killed render goes on where
it was.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from diffrep.files import read_document, write_whole
from diffrep.processes import process_pool
from diffrep.scenes.categories import CATEGORIES, KEYPOINTS, SEEN
from diffrep.scenes.render import Scene, mirror, render_scene
from diffrep.scenes.shapes import Array
from diffrep.settings import check

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_SEEDS_PER_SPLIT = 2**40
_CHUNK = 128
_MOST_KEYPOINTS = max(len(names) for names in KEYPOINTS.values())


def scene_seed(split: Split, index: int) -> int:
    """The seed of scene number `index` of a split; the splits' seeds never meet.

    Raises:
        ValueError: an unknown split, or an index outside [0, 2**40).
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if not 0 <= index < _SEEDS_PER_SPLIT:
        raise ValueError(f"a scene's index is in [0, 2**40), got {index}")
    return SPLITS.index(split) * _SEEDS_PER_SPLIT + int(index)


def scene_pairs(
    split: Split, per_category: int, *, categories: Sequence[str] = SEEN, seed: int = 0
) -> list[tuple[int, int, str, bool]]:
    """Pairs of different objects of one category: (seed of a, seed of b, category, whether to mirror b).

    No seed comes twice; every third pair is mirrored. A category's pairs do not depend on the other
    categories, and the first pairs stay the same when more are asked for.
    """
    _check_categories(categories)
    pairs = []
    for category in categories:
        draws = np.random.default_rng([seed, SPLITS.index(split), CATEGORIES.index(category)])
        used: dict[int, None] = {}
        while len(used) < 2 * per_category:
            used.setdefault(int(draws.integers(_SEEDS_PER_SPLIT)))
        seeds = [scene_seed(split, index) for index in used]
        pairs += [(a, b, category, i % 3 == 2) for i, (a, b) in enumerate(zip(seeds[::2], seeds[1::2], strict=True))]
    return pairs


def held_out_pair(category: str, number: int, size: int = 256) -> tuple[Scene, Scene]:
    """Render one of the pairs that `scene_pairs` draws of the test split.

    Args:
        number: of the pair, from 0.
        size: side of the images, pixels.

    Raises:
        ValueError: there is no such category.
    """
    seed_a, seed_b, _, mirrored = scene_pairs("test", number + 1, categories=(category,))[number]
    a, b = (render_scene(seed, category=category, size=size) for seed in (seed_a, seed_b))
    return a, mirror(b) if mirrored else b


def shared_keypoints(a: Scene, b: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The keypoints that two scenes of one category both show, in the same order.

    Returns:
        (N, 2) float32 each, (x, y) in pixels.
    """
    shown = {name: point for name, point, seen in zip(b.keypoint_names, b.keypoints, b.visible, strict=True) if seen}
    named = zip(a.keypoint_names, a.keypoints, a.visible, strict=True)
    both = [(point, shown[name]) for name, point, seen in named if seen and name in shown]
    points = np.array(both, dtype=np.float32).reshape(-1, 2, 2)
    return points[:, 0], points[:, 1]


def _check_categories(categories: Sequence[str]) -> None:
    if unknown := sorted(set(categories) - set(CATEGORIES)):
        raise ValueError(f"no category {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")
    if not categories:
        raise ValueError(f"at least one category is needed; there are {', '.join(CATEGORIES)}")


@dataclass(frozen=True)
class SetSettings:
    """What a set on disk holds."""

    split: Split
    count: int
    size: int
    categories: tuple[str, ...]
    renderer: str  # changes with every change of the code that draws

    def __post_init__(self) -> None:
        check(self, count="0..", size="1..")


def renderer_version() -> str:
    """A hash of the code that draws; sets drawn by another version are not continued."""
    folder = Path(__file__).parent
    drawing = [f for f in sorted(folder.glob("*.py")) if f.name not in ("__init__.py", "sets.py")]
    code = [ast.unparse(ast.parse(f.read_text(encoding="utf-8"))) for f in drawing]  # not its layout
    code.append((folder / "scenes.json").read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def _layout(settings: SetSettings) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Array name -> (dtype, shape of one scene)."""
    side = settings.size, settings.size
    return {
        "image": (np.uint8, (*side, 3)),
        "part": (np.uint8, side),
        "mask": (np.bool_, side),
        "canonical": (np.int8, (*side, 3)),
        "depth": (np.float16, side),
        "normals": (np.int8, (*side, 3)),
        "keypoints": (np.float32, (_MOST_KEYPOINTS, 2)),
        "visible": (np.bool_, (_MOST_KEYPOINTS,)),
        "box": (np.float32, (4,)),
        "intrinsics": (np.float32, (4,)),
        "category": (np.uint8, ()),
    }


class SceneSet:
    """A rendered set of N scenes.

    Attributes (arrays over scenes, memory-mapped, read only):
        image: uint8 (N, H, W, 3); part: uint8 (N, H, W); mask: bool (N, H, W).
        canonical, normals: int8 (N, H, W, 3), round(127 * value); depth: float16 (N, H, W), inf in the sky.
        keypoints: float32 (N, K, 2), NaN after the category's last; visible: bool (N, K).
        box, intrinsics: float32 (N, 4); category: uint8 (N,), index into `CATEGORIES`.

    Raises:
        ValueError: the folder holds no set, or one that is not complete.
    """

    image: Array
    part: Array
    mask: Array
    canonical: Array
    normals: Array
    depth: Array
    keypoints: Array
    visible: Array
    box: Array
    intrinsics: Array
    category: Array

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        settings = _read_settings(self.folder)
        if settings is None:
            raise ValueError(f"{self.folder}: holds no set of scenes (no settings.json)")
        self.settings = settings
        if missing := len(_missing_chunks(self.folder, settings)):
            count = len(_chunks(settings.count))
            raise ValueError(
                f"{self.folder}: only {count - missing} of {count} chunks are rendered;"
                " call render_set with the same settings to go on"
            )

    def __len__(self) -> int:
        return self.settings.count

    def __getattr__(self, name: str) -> Array:
        settings = self.__dict__.get("settings")
        if settings is None or name not in _layout(settings):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        setattr(self, name, array)
        return array

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """One caption per scene."""
        return tuple(row["caption"] for row in self._rows)

    @cached_property
    def attributes(self) -> tuple[Mapping[str, str], ...]:
        """The attributes of each scene."""
        return tuple(row["attributes"] for row in self._rows)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        chunks = _chunks(self.settings.count)
        return [row for c in chunks for row in json.loads(_words_file(self.folder, c).read_text())]

    def seed(self, index: int) -> int:
        """The seed that renders scene `index` again, with its category."""
        return scene_seed(self.settings.split, index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Views of one scene's arrays by name, with its caption, attributes and category name."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of a set of {len(self)}")
        index %= len(self)
        row: dict[str, Any] = {name: getattr(self, name)[index] for name in _layout(self.settings)}
        words = {"caption": self.captions[index], "attributes": self.attributes[index]}
        return row | {"category": CATEGORIES[int(row["category"])]} | words


def open_or_render(folder: Path | None, work: Path, count: int, *, workers: int = 2) -> SceneSet:
    """A rendered set to train on; where none is named, WORK/scenes is rendered; errors as of `render_set`."""
    return SceneSet(folder) if folder else render_set(work / "scenes", "train", count, workers=workers)


def render_set(
    folder: str | os.PathLike[str],
    split: Split,
    count: int,
    *,
    size: int = 128,
    categories: Sequence[str] = SEEN,
    workers: int = 2,
    progress: bool = True,
) -> SceneSet:
    """Render scenes 0 .. count - 1 of a split into a folder, or go on with a render that was interrupted.

    Scene i shows category i modulo their number, and is `render_scene(scene_seed(split, i), category=...)`.

    Args:
        folder: made where it is missing.
        workers: processes; 1 renders in this one.

    Raises:
        ValueError: the folder holds a set of other settings, or a value is out of range.
    """
    _check_categories(categories)
    scene_seed(split, max(count - 1, 0))
    if count < 1 or workers < 1:
        raise ValueError(f"count and workers are at least 1, got {count} and {workers}")
    folder = Path(folder)
    settings = SetSettings(split, count, size, tuple(categories), renderer_version())
    _prepare(folder, settings)
    missing = _missing_chunks(folder, settings)
    done = count - sum(stop - start for start, stop in missing)
    with tqdm(total=count, initial=done, desc=f"rendering {split}", unit="scene", disable=not progress) as bar:
        if workers == 1:
            for chunk in missing:
                bar.update(_render_chunk(folder, settings, chunk))
        elif missing:
            with process_pool(workers) as pool:
                jobs = [pool.submit(_render_chunk, folder, settings, chunk) for chunk in missing]
                for job in as_completed(jobs):
                    bar.update(job.result())
    return SceneSet(folder)


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def _words_file(folder: Path, chunk: tuple[int, int]) -> Path:
    return folder / "captions" / f"{chunk[0]:08d}.json"


def _missing_chunks(folder: Path, settings: SetSettings) -> list[tuple[int, int]]:
    return [c for c in _chunks(settings.count) if not _words_file(folder, c).exists()]


def _read_settings(folder: Path) -> SetSettings | None:
    if not (folder / "settings.json").exists():
        return None
    values = read_document(folder / "settings.json")
    return SetSettings(**{**values, "categories": tuple(values["categories"])})


def _prepare(folder: Path, settings: SetSettings) -> None:
    """Settings and empty arrays, or the error that says how the folder's settings differ."""
    earlier = _read_settings(folder)
    if earlier is not None:
        ours, theirs = asdict(settings), asdict(earlier)
        if changed := [f"{k} {theirs[k]!r}, not {ours[k]!r}" for k in ours if ours[k] != theirs[k]]:
            raise ValueError(
                f"{folder}: holds a set with {'; '.join(changed)}; choose another folder or delete this one"
            )
        return
    (folder / "captions").mkdir(parents=True, exist_ok=True)
    for name, (dtype, shape) in _layout(settings).items():
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(settings.count, *shape)).flush()
    write_whole(folder / "settings.json", json.dumps(asdict(settings), indent=2))


def _render_chunk(folder: Path, settings: SetSettings, chunk: tuple[int, int]) -> int:
    """Render one chunk into the arrays, then mark it by its captions; returns the number of scenes."""
    start, stop = chunk
    arrays = {name: open_memmap(folder / f"{name}.npy", mode="r+") for name in _layout(settings)}
    words = []
    for index in range(start, stop):
        category = settings.categories[index % len(settings.categories)]
        scene = render_scene(scene_seed(settings.split, index), category=category, size=settings.size)
        for name in ("image", "part", "mask", "depth", "box", "intrinsics"):
            arrays[name][index] = getattr(scene, name)
        for name in ("canonical", "normals"):
            arrays[name][index] = np.rint(getattr(scene, name) * 127)
        arrays["category"][index] = CATEGORIES.index(category)
        count = len(scene.keypoints)
        arrays["keypoints"][index] = np.pad(
            scene.keypoints, ((0, _MOST_KEYPOINTS - count), (0, 0)), constant_values=np.nan
        )
        arrays["visible"][index] = np.pad(scene.visible, (0, _MOST_KEYPOINTS - count))
        words.append({"caption": scene.caption, "attributes": dict(scene.attributes)})
    for array in arrays.values():
        array.flush()
    write_whole(_words_file(folder, chunk), json.dumps(words))
    return stop - start
