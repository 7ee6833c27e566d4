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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffrep.backbones import Grid
from diffrep.features import FeatureMaps
from diffrep.files import write_text
from diffrep.images import Placement

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


def claim_folder(folder: Path, settings: Mapping[str, object]) -> None:
    """Write settings into a folder, or check that those that are there are the same.

    Raises:
        ValueError: they are not; the message names the first difference.
    """
    wanted = json.loads(json.dumps(settings, default=str))
    file = folder / SETTINGS
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=2))
        return
    found = json.loads(file.read_text())
    for key in {**wanted, **found}:
        if wanted.get(key) != found.get(key):
            raise ValueError(
                f"{folder} was made with {key} = {found.get(key)!r}, this run has {wanted.get(key)!r}:"
                " use another folder, or the same settings"
            )


def fingerprint(value: object) -> str:
    """Short text that is the same for the same JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
