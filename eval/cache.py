"""What an evaluation keeps on disk, so that a killed run goes on where it was: features and numbers by image.

Everything that is kept knows the content of the files that it was made from. What was made from other content, of an
image that was replaced for example, is made again; a folder that was made with other settings is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffrep.backbones import Grid
from diffrep.eval.datasets.pairs import inside
from diffrep.features import FeatureMaps
from diffrep.files import (
    JsonLines,
    claim_folder,
    read_document,
    read_weights,
    save_weights,
    sweep_partials,
    write_whole,
)
from diffrep.images import ImageError, Placement
from diffrep.recipes import CATEGORY, Correspondence
from diffrep.store.manifest import weights_sha256

StoredType = Literal["float32", "float16"]


def fingerprint(value: object) -> str:
    """Short text that is the same for the same JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest(*contents: bytes) -> str:
    """Short text that is the same for the same contents of files."""
    whole = hashlib.sha256()
    for content in contents:
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()[:16]


def resumed(file: Path, content: str, make: Callable[[], Mapping[str, object]]) -> dict[str, Any]:
    """What `make` gave for some content, from a JSON file: made, and written, where it was made from other content.

    Read back also what was just written, so that a run in two halves sees the same numbers as a run in one.

    Args:
        content: see `digest`.
    """
    try:
        document = read_document(file)
    except ValueError:
        document = {}
    if document.get("content") != content:
        write_whole(file, json.dumps({"content": content, **make()}))
        document = read_document(file)
    return document


class ImageResults:
    """Numbers of each image, one JSON line each, and where there are any the errors of its pixels as ``.npy`` files.

    Args:
        folder: None keeps them in memory only.
        name: of the file, ``NAME.jsonl``, and of the folder of errors.
    """

    def __init__(self, folder: Path | None, name: str = "images") -> None:
        self._log = JsonLines(None if folder is None else folder / f"{name}.jsonl")
        self._errors_folder = None if folder is None else folder / f"{name}.errors"
        self._in_memory: dict[str, Tensor] = {}
        self.rows: dict[str, Mapping[str, float]] = {}
        self._contents: dict[str, str] = {}
        for row in self._log.rows:
            self._take(row)
        if self._errors_folder is not None:
            sweep_partials(self._errors_folder)

    def _take(self, row: Mapping[str, Any]) -> None:
        image = str(row.get("image", ""))
        self.rows[image] = {key: value for key, value in row.items() if key not in ("image", "content")}
        self._contents[image] = str(row.get("content", ""))

    def holds(self, image: str, content: str) -> bool:
        """Whether there are numbers of an image with that content (see `digest`)."""
        return image in self.rows and self._contents[image] == content

    def add(self, image: str, values: Mapping[str, float], content: str = "", errors: Tensor | None = None) -> None:
        """Keep the numbers of one image, and the errors of its pixels: (N,)."""
        if errors is not None and self._errors_folder is None:
            self._in_memory[image] = errors
        elif errors is not None:
            out = io.BytesIO()
            np.save(out, errors.numpy(), allow_pickle=False)
            write_whole(self._file(image), out.getvalue())
        row = {"image": image, "content": content, **values}
        self._log.add(row)
        self._take(row)

    def errors(self, image: str) -> Tensor:
        """The errors of the pixels of one image: (N,).

        Raises:
            ValueError: their file is damaged.
        """
        if self._errors_folder is None:
            return self._in_memory[image]
        file = self._file(image)
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: not a file of kept errors ({error}); delete the folder") from None

    def _file(self, image: str) -> Path:
        assert self._errors_folder is not None
        return self._errors_folder / f"{fingerprint(image)}.npy"  # names of data sets may lead anywhere


MIRRORED = "mirrored/"  # before the path of an image whose mirror image is meant


def save_features(file: Path, features: Sequence[FeatureMaps], dtype: StoredType, content: str) -> None:
    """Write all features of one image, one batch of one per backbone, as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    notes = []
    for number, maps in enumerate(features):
        tensors |= {f"{number}/{tap}": values.to(getattr(torch, dtype)) for tap, values in maps.maps.items()}
        grids = {tap: asdict(grid) for tap, grid in maps.grids.items()}
        notes.append({"placement": asdict(maps.placements[0]), "grids": grids, "settings": dict(maps.settings)})
    save_weights(file, tensors, features=json.dumps(notes, default=str), content=content)


def load_features(file: Path) -> tuple[FeatureMaps, ...]:
    """Read the features of one image back, float32.

    Raises:
        ValueError: the file is no file of features; delete it to have them extracted again.
    """
    try:
        tensors, metadata = read_weights(file)
        features, notes = [], json.loads(metadata["features"])
        for number, note in enumerate(notes):
            placed: Any = {name: tuple(value) for name, value in note["placement"].items()}
            grids = {tap: Grid(tuple(grid["origin"]), tuple(grid["stride"])) for tap, grid in note["grids"].items()}
            maps = {tap: tensors[f"{number}/{tap}"].float() for tap in grids}
            features.append(FeatureMaps(maps, (Placement(**placed),), grids, note["settings"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a file of kept features ({error}); delete it") from None
    return tuple(features)


class ImageFeatures:
    """The features of a data set's images under a recipe, extracted once each, one file each.

    Args:
        root: of the data set; image paths are relative to it.
        load: reads an image; given its path with `MIRRORED` before it where the mirror image is meant.
        folder: of the files.
        dataset: its name, by which the folder is recognised.
        kept_as: type in which features lie on disk. What is read back is float32 in either case; float16 halves the
            space and moves similarities in the fourth digit.
        batch_size: images that are extracted together; all that is lost when a run is killed.

    Attributes:
        settings: what the features depend on beside the images, and the recipe, for reports.

    Raises:
        ValueError: the folder is of other settings; the message names the first difference.
    """

    def __init__(
        self,
        root: Path,
        load: Callable[[str], Image.Image],
        correspondence: Correspondence,
        folder: Path,
        dataset: str,
        *,
        kept_as: StoredType = "float32",
        batch_size: int = 8,
    ) -> None:
        self.root, self.load, self.correspondence, self.folder = root, load, correspondence, folder
        self.kept_as, self.batch_size = kept_as, batch_size
        recipe, backbones = correspondence.recipe, correspondence.backbones
        depends: dict[str, object] = {
            "readings": [asdict(reading) for reading in recipe.readings],
            "weights": [backbone.source for backbone in backbones],
            "dataset": dataset,
            "batch_size": batch_size,
            "kept_as": kept_as,
        }
        claim_folder(folder, {**depends, "weights_sha256": [weights_sha256(backbone) for backbone in backbones]})
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sweep_partials(place)
        self.settings = {**depends, "recipe": asdict(recipe)}
        self.by_category = any(CATEGORY in reading.extract.prompt for reading in recipe.readings)
        self._contents: dict[str, str] = {}

    def content(self, image: str) -> str:
        """`digest` of an image's file; read once.

        Raises:
            OSError: it cannot be read.
        """
        path = image.removeprefix(MIRRORED)
        if path not in self._contents:
            self._contents[path] = digest((self.root / path).read_bytes())
        return self._contents[path]

    def file(self, category: str, image: str) -> Path:
        """Where an image's features lie: below its category where the prompt depends on it.

        Raises:
            ValueError: the path leads out of the folder.
        """
        return self.folder / f"{inside(f'{category}/{image}' if category and self.by_category else image)}.safetensors"

    def get(self, category: str, image: str) -> tuple[FeatureMaps, ...]:
        """Read the features of one image.

        Raises:
            ValueError: they are damaged.
        """
        return load_features(self.file(category, image))

    def holds(self, category: str, image: str) -> bool:
        """Whether there are features of the image as it is."""
        try:
            return read_weights(self.file(category, image), only=())[1].get("content") == self.content(image)
        except ValueError:
            return False

    def extract(self, images: Iterable[tuple[str, str]], *, progress: bool = True) -> dict[str, str]:
        """Extract every image whose features are missing or of other content.

        Batches are fixed by the list of images, and a batch that is not complete is extracted as a whole, so
        that a run in two halves gives the very numbers of a run in one.

        Args:
            images: (category, image), repeated as often as one likes.

        Returns:
            Image -> what was wrong, for those that cannot be read.
        """
        groups: dict[str, list[str]] = {}
        for category, image in dict.fromkeys((c if self.by_category else "", i) for c, i in images):
            groups.setdefault(category, []).append(image)
        unreadable: dict[str, str] = {}
        with tqdm(total=sum(map(len, groups.values())), desc="extract", unit="image", disable=not progress) as bar:
            for category, members in groups.items():
                reader = with_prompt(self.correspondence, category)
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    unreadable |= self._extract_batch(reader, category, batch)
                    bar.update(len(batch))
        return unreadable

    def _extract_batch(self, reader: Correspondence, category: str, batch: Sequence[str]) -> dict[str, str]:
        pictures, unreadable = {}, {}
        for image in batch:
            try:
                self.content(image)
            except OSError as error:
                unreadable[image] = str(error)
        readable = [image for image in batch if image not in unreadable]
        if all(self.holds(category, image) for image in readable):
            return unreadable
        for image in readable:
            try:
                pictures[image] = self.load(image)
            except ImageError as error:
                unreadable[image] = str(error)
        for image, features in zip(pictures, reader.features(list(pictures.values())), strict=True):
            save_features(self.file(category, image), features, self.kept_as, self.content(image))
        return unreadable


def with_prompt(correspondence: Correspondence, category: str) -> Correspondence:
    """The recipe with a category's name in its prompts; "" changes nothing."""
    if not category:
        return correspondence
    recipe = correspondence.recipe
    readings = tuple(
        replace(r, extract=replace(r.extract, prompt=r.extract.prompt.replace(CATEGORY, category)))
        for r in recipe.readings
    )
    backbones = {r.backbone: b for r, b in zip(readings, correspondence.backbones, strict=True)}
    return Correspondence(replace(recipe, readings=readings), backbones=backbones)
