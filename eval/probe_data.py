"""Labelled images that need no download: rendered scenes and scikit-learn's digits, as files on disk.

They go through the same path as anybody's images: files named in a table.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffrep.files import write_whole
from diffrep.heads.probes.labelled import PARTS, LabelledImages, Part, read_labelled
from diffrep.scenes import SEEN, render_scene, scene_seed

ATTRIBUTES = ("category", "colour", "second colour", "pattern", "view", "floor", "back")
DIGITS, SCENES = "digits", "scenes"


@dataclass(frozen=True, kw_only=True)
class SceneImages:
    """How many scenes of each part are rendered.

    The embedded models were trained on scenes of the split "train" and validated on "val": images that they have
    seen would flatter a probe, so all parts are taken from the split "test", at places far apart.
    """

    train: int = 1100
    val: int = 330
    test: int = 660
    size: int = 128  # pixels
    categories: tuple[str, ...] = SEEN

    def jobs(self) -> list[tuple[Part, int, str]]:
        """(part, index in the split "test", category) of each image."""
        jobs: list[tuple[Part, int, str]] = []
        for place, (part, count) in enumerate(zip(PARTS, (self.train, self.val, self.test), strict=True)):
            start = (place + 1) * 2**30  # the other benchmarks draw theirs at random from 2**40
            jobs += [(part, start + i, self.categories[i % len(self.categories)]) for i in range(count)]
        return jobs


def scene_images(
    folder: str | Path,
    label: str = "category",
    settings: SceneImages | None = None,
    *,
    workers: int = 1,
    progress: bool = True,
) -> LabelledImages:
    """Render scenes as PNG files once, and label them by their category or by one of their attributes.

    Args:
        folder: of the files; those that are there are kept.
        label: one of `ATTRIBUTES`.

    Raises:
        ValueError: there is no such attribute, or the folder holds other scenes.
    """
    if label not in ATTRIBUTES:
        raise ValueError(f"scenes have no label {label!r}; there are {', '.join(ATTRIBUTES)}")
    settings, folder = settings or SceneImages(), Path(folder)
    about = json.dumps(asdict(settings))
    if (folder / "scenes.json").is_file() and (folder / "scenes.json").read_text() != about:
        raise ValueError(f"{folder}: holds scenes of other settings; name another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "scenes.json", about.encode())
    jobs = [(str(folder), part, index, category, settings.size) for part, index, category in settings.jobs()]
    missing = [job for job in jobs if not _words(job).is_file()]
    with tqdm(total=len(missing), desc="rendering", unit="scene", disable=not progress or not missing) as bar:
        if workers > 1 and len(missing) > 16:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for _ in pool.map(_render, missing, chunksize=8):
                    bar.update()
        else:
            for job in missing:
                _render(job)
                bar.update()
    rows = []
    for job in jobs:
        words = json.loads(_words(job).read_text())
        if label in words:
            rows.append((_words(job).with_suffix(".png"), words[label], job[1]))
    return _from_table(folder / f"{label.replace(' ', '-')}.csv", rows)


_Job = tuple[str, Part, int, str, int]


def _words(job: _Job) -> Path:
    folder, part, index, _, _ = job
    return Path(folder) / part / f"{index:012d}.json"


def _render(job: _Job) -> None:
    _, _, index, category, size = job
    scene = render_scene(scene_seed("test", index), category=category, size=size)
    file = _words(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file.with_suffix(".png"), _png(scene.image))
    write_whole(file, json.dumps({"category": category, **scene.attributes}).encode())  # last: it says all is there


def digit_images(folder: str | Path) -> LabelledImages:
    """The 1797 handwritten digits that come with scikit-learn, 8 x 8 pixels, as PNG files; not split."""
    from sklearn.datasets import load_digits

    folder, digits, rows = Path(folder), load_digits(), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / f"{number:04d}.png"
        if not file.is_file():
            write_whole(file, _png(np.rint(255 - image * 255 / 16).astype(np.uint8)))  # ink is dark
        rows.append((file, str(digit), None))
    return _from_table(folder / "digits.csv", rows)


def _png(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="png")
    return out.getvalue()


def _from_table(file: Path, rows: Sequence[tuple[Path, str, Part | None]]) -> LabelledImages:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    for path, label, part in rows:
        writer.writerow([os.path.relpath(path, file.parent), label, part or ""])
    write_whole(file, out.getvalue().encode())
    return read_labelled(file)


def named_images(source: str, work: str | Path, *, workers: int = 1, image: str | None = None, label: str = "label",
                 group: str | None = None, scenes: SceneImages | None = None) -> LabelledImages:  # fmt: skip
    """What the command line calls DATA: ``scenes``, ``scenes:ATTRIBUTE``, ``digits``, or a source of `read_labelled`.

    Args:
        work: folder below which scenes and digits are written.
    """
    if source == DIGITS:
        return digit_images(Path(work) / DIGITS)
    if source == SCENES or source.startswith(f"{SCENES}:"):
        attribute = source.partition(":")[2] or "category"
        chosen = scenes or SceneImages()
        place = f"{SCENES}-{chosen.size}-{chosen.train}-{chosen.val}-{chosen.test}"
        return scene_images(Path(work) / place, attribute, chosen, workers=workers)
    return read_labelled(source, image=image, label=label, group=group)
