"""Pooled features on disk: memory-mapped safetensors shards, one per timestep and a few hundred images.

A folder belongs to one backbone with one set of settings and one list of images, known by their names and contents;
its manifest says which. Shards are written whole, so a run that is killed goes on where it was. A row of NaN stands
for an image that cannot be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffrep.backbones import Backbone
from diffrep.files import claim_folder, read_document, sweep_partials, write_whole
from diffrep.heads.probes.cells import Cell, ReadPlan, read_cells
from diffrep.heads.probes.labelled import DataError, Readable, images_sha256
from diffrep.heads.probes.rows import MappedRows, map_tensor
from diffrep.images import ImageError, Placement, Sizing, decode_image, fit_image
from diffrep.store.manifest import provenance
from diffrep.store.shards import write_tensors

SHARD_IMAGES = 256
MANIFEST = "features.json"
_PLANNED = frozenset({"taps", "timestep"})  # of the provenance: named in the reading instead


@dataclass(frozen=True)
class PooledFeatures:
    """Features of N images at all cells of a reading; rows are those of the list of images.

    Attributes:
        features: provenance: backbone, hash of its weights, and every extraction setting.
        images_sha256: hash of the images' names and contents, see `diffrep.heads.probes.labelled.images_sha256`.
    """

    folder: Path
    reading: ReadPlan
    features: dict[str, Any]
    images: int
    dtype: Literal["float16", "float32"]
    images_sha256: str

    def rows(self, cell: Cell) -> MappedRows:
        """The memory-mapped matrix (N, D) of a cell.

        Raises:
            ValueError: the cell is not among those that were read.
        """
        if cell not in self.reading.cells():
            raise ValueError(f"{self.folder} holds no features of {cell}")
        name = _tensor(cell.tap, cell.pool)
        files = [_file(self.folder, cell.timestep, n) for n in range(_shards(self.images))]
        return MappedRows([map_tensor(file, name) for file in files])

    @cached_property
    def readable(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(N,) bool: the images that could be read."""
        first = self.rows(self.reading.cells()[0])
        return np.concatenate([~np.isnan(piece[:, 0]) for piece in first.pieces])

    def unreadable(self) -> list[str]:
        """Why images could not be read, one line each."""
        log = self.folder / "unreadable.txt"
        return sorted(set(log.read_text(encoding="utf-8", errors="replace").splitlines())) if log.exists() else []


def read_features(
    images: Sequence[Readable],
    backbone: Backbone,
    reading: ReadPlan,
    folder: str | Path,
    *,
    dtype: Literal["float16", "float32"] = "float16",
    workers: int = 0,
    progress: bool = True,
) -> PooledFeatures:
    """Read what a folder lacks of the features of some images.

    Args:
        images: their order is that of the rows.
        folder: below which each combination of backbone, settings and images has its own folder.
        workers: processes that decode ahead; 0: none beside this one.

    Raises:
        DataError: no image can be read.
        ValueError: the folder was made otherwise, or the features do not fit into float16.
    """
    reading = reading.resolve(backbone)
    features = {k: v for k, v in provenance(backbone, reading.extract).items() if k not in _PLANNED}
    about: dict[str, Any] = {
        # neither where the weights lie nor the size of a batch changes a number
        "features": {k: v for k, v in features.items() if k not in ("source", "batch_size")},
        "taps": list(reading.taps or ()),
        "pools": list(reading.pools),
        "images": len(images),
        "images_sha256": images_sha256(images),
        "dtype": dtype,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    home = Path(folder) / f"{Path(reading.backbone).name}-{digest}"
    wider = _wider(Path(folder), about, reading)
    cached = PooledFeatures(wider or home, reading, features, len(images), dtype, about["images_sha256"])
    if wider is not None:
        return cached
    claim_folder(home, about, name=MANIFEST)
    jobs = []
    for number in range(_shards(len(images))):
        if missing := [t for t in reading.timesteps or () if not _file(home, t, number).is_file()]:
            jobs.append((number, missing))
    if jobs:
        for timestep in reading.timesteps or ():
            sweep_partials(_file(home, timestep, 0).parent)
        _read_shards(images, backbone, cached, jobs, workers, progress)
    if not cached.readable.any():
        reasons = cached.unreadable()
        raise DataError(f"none of the {len(images)} images can be read: {reasons[0] if reasons else home}")
    return cached


def _wider(folder: Path, about: dict[str, Any], reading: ReadPlan) -> Path | None:
    """A complete folder that was read for more taps or pools, such as a sweep's, where there is one."""
    same = ("features", "images", "images_sha256", "dtype")
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            existing = read_document(manifest)
            covered = all(set(about[key]) <= set(existing[key]) for key in ("taps", "pools"))
        except (ValueError, KeyError, TypeError):  # damaged, or made by an older version: of no use here
            continue
        if covered and all(existing.get(key) == about[key] for key in same):
            shards = range(_shards(about["images"]))
            if all(_file(manifest.parent, t, n).is_file() for t in reading.timesteps or () for n in shards):
                return manifest.parent
    return None


def _shards(images: int) -> int:
    return -(-images // SHARD_IMAGES)


def _file(folder: Path, timestep: int, number: int) -> Path:
    return folder / f"t{timestep:04d}" / f"{number:06d}.safetensors"


def _tensor(tap: str, pool: int) -> str:
    return f"{tap}/{pool}"


class _Shards(Dataset[Any]):
    """The decoded images of some shards: (number of the shard, canvases by size, reasons)."""

    def __init__(self, images: Sequence[Readable], numbers: Sequence[int], sizing: Sizing) -> None:
        self.images, self.numbers, self.sizing = images, numbers, sizing

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, list[tuple[Tensor, list[Placement], list[int]]], list[str]]:
        start = self.numbers[index] * SHARD_IMAGES
        groups: dict[tuple[int, int], list[tuple[Tensor, Placement, int]]] = {}
        reasons = []
        for row, image in enumerate(self.images[start : start + SHARD_IMAGES]):
            try:
                canvas, placement = fit_image(decode_image(image.read(), image.name), self.sizing)
            except ImageError as error:
                reasons.append(str(error))
                continue
            groups.setdefault(placement.canvas_size, []).append((canvas, placement, row))
        joined = [
            (torch.stack([c for c, _, _ in group]), [p for _, p, _ in group], [r for _, _, r in group])
            for group in groups.values()
        ]
        return self.numbers[index], joined, reasons


def _read_shards(
    images: Sequence[Readable],
    backbone: Backbone,
    cached: PooledFeatures,
    jobs: Sequence[tuple[int, list[int]]],
    workers: int,
    progress: bool,
) -> None:
    missing = dict(jobs)
    assert cached.reading.extract.sizing is not None  # resolved
    shards = _Shards(images, list(missing), cached.reading.extract.sizing)
    loader = DataLoader(
        shards, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )
    total = sum(min(SHARD_IMAGES, len(images) - n * SHARD_IMAGES) * len(t) for n, t in jobs)
    with tqdm(total=total, desc=f"reading {cached.reading.backbone}", unit="pass", disable=not progress) as bar:
        for number, groups, reasons in loader:
            if reasons:
                with (cached.folder / "unreadable.txt").open("a", encoding="utf-8", errors="replace") as log:
                    log.writelines(f"{reason}\n" for reason in reasons)
            count = min(SHARD_IMAGES, len(images) - number * SHARD_IMAGES)
            for timestep, tensors in _shard_tensors(backbone, cached, groups, count, missing[number]):
                columns = {name: [value] for name, value in tensors.items()}
                write_whole(_file(cached.folder, timestep, number), partial(write_tensors, tensors=columns))
                bar.update(count)


def _shard_tensors(
    backbone: Backbone,
    cached: PooledFeatures,
    groups: Sequence[tuple[Tensor, list[Placement], list[int]]],
    count: int,
    timesteps: Sequence[int],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The tensors of each timestep of a shard; shards without any readable image are all NaN."""
    kind = getattr(torch, cached.dtype)
    passes = [read_cells(backbone, c, places, cached.reading, timesteps) for c, places, _ in groups]
    for timestep in timesteps:
        tensors: dict[str, Tensor] = {}
        for reader, (_, _, rows) in zip(passes, groups, strict=True):
            read_at, vectors = next(reader)
            assert read_at == timestep
            for (tap, pool), values in vectors.items():
                name = _tensor(tap, pool)
                if name not in tensors:
                    tensors[name] = torch.full((count, values.shape[1]), float("nan"), dtype=kind)
                rounded = values.to(kind)
                if not bool(torch.isfinite(rounded).all()):
                    raise ValueError(f"features of {tap} do not fit into {cached.dtype}: choose float32")
                tensors[name][rows] = rounded
        if not tensors:
            for cell in cached.reading.cells():
                if cell.timestep == timestep:
                    width = backbone.tap(cell.tap).channels * cell.pool**2
                    tensors[_tensor(cell.tap, cell.pool)] = torch.full((count, width), float("nan"), dtype=kind)
        yield timestep, tensors
