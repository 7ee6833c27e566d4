"""Features of the images of a data set, kept on disk, so that each image is extracted once whatever is done
with it.

One safetensors file per image, written under another name and then renamed: a run that is killed leaves
whole files only. The settings that made the features lie beside them; a folder made with other settings is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffrep.backbones import Grid
from diffrep.eval.datasets.pairs import PairSet, Problem
from diffrep.features import FeatureMaps
from diffrep.files import claim_folder
from diffrep.images import ImageError, Placement
from diffrep.recipes import Correspondence, Recipe

SETTINGS = "settings.json"


class FeatureCache:
    """Features by image, in a folder.

    Args:
        folder: created where it is missing.
        settings: JSON-ready; what the features depend on.
        dtype: in which they are kept. What is read back is float32 in either case; float16 halves the space
            and moves similarities in the fourth digit.

    Raises:
        ValueError: the folder holds features made with other settings; the message names the first
        difference.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, object],
        *,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        self.folder, self.dtype = Path(folder), dtype
        claim_folder(self.folder, {**settings, "kept_as": dtype})

    def file(self, image: str) -> Path:
        """Where the features of an image lie; `image` is its path relative to the data set's folder."""
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"image paths must be relative to the data set's folder, got {image}")
        return self.folder / f"{path}.safetensors"

    def __contains__(self, image: str) -> bool:
        return self.file(image).is_file()

    def save(self, image: str, features: Sequence[FeatureMaps]) -> None:
        """Keep all features of one image: one batch of one per backbone."""
        tensors, notes = {}, []
        for number, maps in enumerate(features):
            for tap, values in maps.maps.items():
                tensors[f"{number}/{tap}"] = values.detach().to("cpu", getattr(torch, self.dtype)).contiguous()
            notes.append(
                {
                    "placement": asdict(maps.placements[0]),
                    "grids": {tap: asdict(grid) for tap, grid in maps.grids.items()},
                    "settings": dict(maps.settings),
                }
            )
        file = self.file(image)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        save_file(tensors, partial, metadata={"features": json.dumps(notes, default=str)})
        partial.replace(file)

    def load(self, image: str) -> tuple[FeatureMaps, ...]:
        """Read the features of one image back, float32.

        Raises:
            ValueError: the file is no file of features; delete it to have them extracted again.
        """
        file = self.file(image)
        try:
            with safe_open(file, "pt") as opened:
                notes = json.loads(opened.metadata()["features"])
                tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: not a file of kept features ({error}); delete it") from None
        return tuple(_features(number, note, tensors) for number, note in enumerate(notes))


def _features(number: int, note: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> FeatureMaps:
    placed = note["placement"]
    height, width = placed["image_size"]
    rows, columns = placed["canvas_size"]
    placement = Placement((height, width), (rows, columns), tuple(placed["content_box"]))
    grids = {tap: Grid(tuple(g["origin"]), tuple(g["stride"])) for tap, g in note["grids"].items()}
    maps = {tap: tensors[f"{number}/{tap}"] for tap in grids}
    return FeatureMaps(maps, (placement,), grids, note["settings"])


def fingerprint(value: object) -> str:
    """Short text that is the same for the same JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


Sample = TypeVar("Sample", bound="Named", covariant=True)


class Named(Protocol):
    """Something with a name."""

    @property
    def name(self) -> str: ...


class SampleSet(Protocol[Sample]):
    """Images of a benchmark, read one by one."""

    def __len__(self) -> int: ...

    def samples(self, skip: frozenset[str]) -> Iterator[Sample | Problem]: ...


def count_images(
    data: SampleSet[Sample], done: frozenset[str], count: Callable[[Sample], None], *, title: str, progress: bool
) -> list[Problem]:
    """Call `count` with every image that is not done; what could not be read or raised ValueError comes back."""
    problems = []
    with tqdm(total=len(data), initial=len(done), desc=title, unit="image", disable=not progress) as bar:
        for sample in data.samples(done):
            bar.update(1)
            if isinstance(sample, Problem):
                problems.append(sample)
                continue
            try:
                count(sample)
            except ValueError as error:
                problems.append(Problem(sample.name, str(error)))
    return problems


class ResultFile:
    """One JSON object a line: an image's name and its numbers. A line that was cut off is dropped.

    Args:
        path: None keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Mapping[str, float]] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                self.rows[row.pop("image")] = row
        path.write_text("".join(json.dumps({"image": name, **row}) + "\n" for name, row in self.rows.items()))

    def add(self, image: str, values: Mapping[str, float]) -> None:
        """Keep the numbers of one image."""
        self.rows[image] = dict(values)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"image": image, **values}) + "\n")


class AngleFiles:
    """Angular errors of every image, one .npy file each.

    Args:
        folder: None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder / "angles" if folder is not None else None
        self.kept: dict[str, Tensor] = {}

    def _file(self, image: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{image}.npy"

    def __contains__(self, image: str) -> bool:
        return image in self.kept if self.folder is None else self._file(image).is_file()

    def add(self, image: str, errors: Tensor) -> None:
        """Keep the errors of one image: (N,) degrees."""
        if self.folder is None:
            self.kept[image] = errors
            return
        file = self._file(image)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial.npy")
        np.save(partial, errors.numpy())
        partial.replace(file)

    def errors(self, image: str) -> Tensor:
        """What was kept: (N,) degrees."""
        return self.kept[image] if self.folder is None else torch.from_numpy(np.load(self._file(image)))


CATEGORY = "{category}"  # in a prompt: stands for the name of the image's category


def extract_images(
    groups: Mapping[str, Sequence[str]],
    load: Callable[[str], Image.Image],
    correspondence: Correspondence,
    cache: FeatureCache,
    *,
    batch_size: int,
    progress: bool,
) -> dict[str, str]:
    """Extract every image that the cache lacks.

    Batches are fixed by the list of images, and a batch that is not complete is extracted as a whole, so
    that a run in two halves gives the very numbers of a run in one.

    Args:
        groups: category -> images, as `images_by_prompt` gives them.
        load: reads an image by its name.

    Returns:
        Image -> what was wrong, for those that cannot be read.
    """
    unreadable: dict[str, str] = {}
    with tqdm(total=sum(map(len, groups.values())), desc="extract", unit="image", disable=not progress) as bar:
        for category, images in groups.items():
            own = _with_prompt(correspondence, category)
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not all(cache_key(category, image) in cache for image in batch):
                    pictures: dict[str, Image.Image] = {}
                    for image in batch:
                        try:
                            pictures[image] = load(image)
                        except ImageError as error:
                            unreadable[image] = str(error)
                    for image, features in zip(pictures, own.features(list(pictures.values())), strict=True):
                        cache.save(cache_key(category, image), features)
                bar.update(len(batch))
    return unreadable


def cache_key(category: str, image: str) -> str:
    """The name of an image's features: with the category where the prompt depends on it."""
    return f"{category}/{image}" if category else image


def prompts_by_category(recipe: Recipe) -> bool:
    """Whether an image's features depend on its category's name."""
    return any(CATEGORY in reading.extract.prompt for reading in recipe.readings)


def images_by_prompt(pairs: PairSet, recipe: Recipe) -> dict[str, list[str]]:
    """Category -> its images, sorted; one entry "" with all images where the prompt is the same for all."""
    if not prompts_by_category(recipe):
        return {"": list(pairs.images())}
    names = sorted({pair.category for pair in pairs.pairs})
    return {name: list(replace(pairs, pairs=pairs.of(name)).images()) for name in names}


def _with_prompt(correspondence: Correspondence, category: str) -> Correspondence:
    if not category:
        return correspondence
    recipe = correspondence.recipe
    readings = tuple(
        replace(r, extract=replace(r.extract, prompt=r.extract.prompt.replace(CATEGORY, category)))
        for r in recipe.readings
    )
    backbones = {r.backbone: b for r, b in zip(readings, correspondence.backbones, strict=True)}
    return Correspondence(replace(recipe, readings=readings), backbones=backbones)
