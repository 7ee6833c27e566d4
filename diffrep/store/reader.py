"""Reading a store: by image, by batch, as a torch data set, as an Arrow table. Tensors are memory-mapped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from diffrep.features import FeatureMaps
from diffrep.files import number_of, optional_import, printable
from diffrep.results import ROWS, Result, html_table, to_numpy, write_csv, write_safetensors
from diffrep.store.manifest import Manifest, load_manifest
from diffrep.store.shards import (
    SHARDS,
    ImageFile,
    Records,
    StoredImage,
    StoreError,
    damage,
    load_records,
    pooled,
    tensor_name,
)

_OPEN_SHARDS = 64  # memory maps kept open


@dataclass(frozen=True)
class Vectors:
    """A run of vectors of a store.

    Attributes:
        values: (n, C) float32.
        images: (n,) int64, the number of the image that each is of.
        points: (n, 2) float32, where in the image it lies, (x, y) in pixels; None for whole images.
    """

    values: Tensor
    images: Tensor
    points: Tensor | None = None

    @classmethod
    def join(cls, runs: Sequence[Vectors]) -> Vectors:
        """All vectors of the runs, in order."""
        points = [run.points for run in runs if run.points is not None]
        values, images = (torch.cat(column) for column in ([r.values for r in runs], [r.images for r in runs]))
        return cls(values, images, torch.cat(points) if points else None)


class Store(Result):
    """Features of a collection of images, on disk. Images are numbered in the order of the store.

    `to_pandas` lists the images, `numpy` gives the features, `save` writes the list (.csv, .parquet) or the features
    (.npz, .npy, .safetensors).

    Args:
        folder: the store.
        root: where the images lie now, if they have moved.

    Raises:
        StoreError: there is no store, or it is damaged; the message names the file.
    """

    def __init__(self, folder: str | Path, *, root: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = load_manifest(self.folder)
        self.root = Path(root if root is not None else self.manifest.root)
        for shard in self.manifest.shards:
            if (wrong := damage(self.folder, shard)) is not None:
                raise StoreError(wrong)
        self._starts = np.cumsum([0] + [shard.images for shard in self.manifest.shards])
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._records: dict[int, Records] = {}

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens its own memory maps
        return {**self.__dict__, "_open": OrderedDict()}

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r}, {number_of(len(self), 'image')}, {self.kind} of {', '.join(self.taps)})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), self._columns(ROWS))

    def _columns(self, count: int) -> dict[str, list[Any]]:
        """Names and sizes of the first images."""
        sizes = [self[number].placement.image_size for number in range(min(count, len(self)))]
        names = [printable(file.name) for file in self.files[: len(sizes)]]
        return {"image": names, "height": [height for height, _ in sizes], "width": [width for _, width in sizes]}

    def columns(self) -> dict[str, list[Any]]:
        """One row per image: its name and its size in pixels; `numpy` and `table` give the features."""
        return self._columns(len(self))

    def arrays(self) -> dict[str, np.ndarray]:
        """The features of every tap in memory, as `numpy` has them; `save` writes them."""
        return {tap: self.numpy(tap) for tap in self.taps}

    def _writers(self) -> dict[str, Callable[[Path], object]]:  # nothing is read before the form is known
        forms: dict[str, Callable[[Path], object]] = {
            ".csv": lambda path: write_csv(path, self.columns()),
            ".parquet": lambda path: self.to_pandas().to_parquet(path),
            ".npz": lambda path: np.savez(path, **self.arrays()),  # type: ignore[arg-type]  # numpy's stubs
            ".safetensors": lambda path: write_safetensors(path, self.arrays()),
        }
        return forms | ({".npy": lambda path: np.save(path, self.numpy())} if len(self.taps) == 1 else {})

    def numpy(self, tap: str | None = None) -> np.ndarray:
        """The features of one tap in memory: (N, C) pooled, (N, C, h, w) maps, (points of all images, C) points.

        Raises:
            StoreError: there is no such tap, no image, or maps differ in size (read those by image or by batch).
        """
        name = self._tap(tap)
        parts = [to_numpy(batch[name]) for _, batch in self.batches(1 << 30)]
        parts = [part.reshape(-1, part.shape[-1]) for part in parts] if self.kind == "points" else parts
        if len({part.shape[1:] for part in parts}) != 1:
            raise StoreError(
                f"{self.folder}: its maps differ in size, read them by image or by batch"
                if parts
                else f"{self.folder} holds no images"
            )
        return np.concatenate(parts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def kind(self) -> Literal["maps", "pooled", "points"]:
        return self.manifest.keep.kind

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(self.manifest.features["taps"])

    @cached_property
    def files(self) -> tuple[ImageFile, ...]:
        """Of every image: its name, size and hash, in order."""
        return tuple(file for number in range(len(self.manifest.shards)) for file in self.records(number).images)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the images, relative to the root, in order."""
        return tuple(file.name for file in self.files)

    @cached_property
    def quarantined(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the images that could not be used."""
        records = [self.records(number) for number in range(len(self.manifest.shards))]
        return tuple((file.name, reason) for one in records for file, reason in one.quarantined)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def number(self, image: int | str) -> int:
        """The number of an image by its name or number; -1 is the last.

        Raises:
            KeyError: no image of that name.
            IndexError: no image of that number.
        """
        if isinstance(image, str):
            if image not in self._numbers:
                raise KeyError(f"{image!r} is not in the store {self.folder}")
            return self._numbers[image]
        if not -len(self) <= image < len(self):
            raise IndexError(f"image {image} of a store of {len(self)}")
        return image % len(self)

    def path(self, image: int | str) -> Path:
        """Where the image's file lies; for images in archives, the archive and the name inside."""
        return self.root / self.names[self.number(image)]

    def records(self, shard: int) -> Records:
        """The images of one shard."""
        if shard not in self._records:
            self._records[shard] = load_records(self.folder, self.manifest.shards[shard])
        return self._records[shard]

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """The tensors of one shard, memory-mapped; see docs/store.md for their names and shapes.

        Raises:
            StoreError: the file is no shard.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        file = self.folder / SHARDS / f"{self.manifest.shards[shard].name}.safetensors"
        try:
            with safe_open(file, "pt") as opened:
                self._open[shard] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{file}: cannot be read ({error})") from None
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def __getitem__(self, image: int | str) -> StoredImage:
        """One image, by number or name.

        Raises:
            KeyError, IndexError: there is no such image.
        """
        shard, row = self._place(self.number(image))
        records, tensors = self.records(shard), self.tensors(shard)
        placement, (start, count) = records.placements[row], records.rows[row]
        features = {}
        for tap in self.taps:
            values = tensors[tensor_name(tap, self.kind, placement.canvas_size)]
            features[tap] = values[start : start + count] if self.kind == "points" else values[start]
        points = tensors["points"][start : start + count] if self.kind == "points" else None
        return StoredImage(records.images[row], placement, features, points)

    def maps(self, image: int | str) -> FeatureMaps:
        """The whole maps of one image, as `diffrep.extract` gave them, in the store's precision.

        Raises:
            StoreError: the store keeps vectors.
        """
        if self.kind != "maps":
            raise StoreError(f"{self.folder} keeps {self.kind}, not maps")
        shard, row = self._place(self.number(image))
        return self._maps(shard, row, 1)

    def batches(self, size: int) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """All images in order, in batches whose tensors have one shape.

        Yields:
            The numbers of the images, and tap -> (n, C, h, w) or (n, C); points: (n, P, C), and under "points"
            (n, P, 2). A batch is shorter than `size` where the shape changes or a shard ends.
        """
        for shard, offset in enumerate(self._starts[:-1].tolist()):
            records, tensors = self.records(shard), self.tensors(shard)
            shapes = [
                (placement.canvas_size if self.kind == "maps" else None, count)
                for placement, (_, count) in zip(records.placements, records.rows, strict=True)
            ]
            end = 0
            for (canvas, count), alike in groupby(shapes):
                begin, end = end, end + len(list(alike))
                for first in range(begin, end, size):
                    n, start = min(size, end - first), records.rows[first][0]
                    batch = {}
                    for tap in self.taps + (("points",) if self.kind == "points" else ()):
                        values = tensors[tensor_name(tap, self.kind, canvas) if canvas else tap]
                        values = values[start : start + n * count]
                        batch[tap] = values.unflatten(0, (n, count)) if self.kind == "points" else values
                    yield range(offset + first, offset + first + n), batch

    def vectors(
        self, tap: str | None = None, level: Literal["image", "patch"] = "image", *, size: int = 16384
    ) -> Iterator[Vectors]:
        """All vectors of one tap, in order, float32, in runs of about `size`.

        Args:
            tap: which; None where the store has one.
            level: ``image`` for one vector per image (pooled, or the mean of a whole map), ``patch`` for every
                cell of a map that lies on the image, or every point.

        Raises:
            StoreError: the store has no such tap, or keeps nothing of that level.
        """
        tap = self._tap(tap)
        if (level, self.kind) in (("image", "points"), ("patch", "pooled")):
            raise StoreError(f"{self.folder} keeps {self.kind}: it has no vectors of level {level!r}")
        gathered: list[Vectors] = []
        for numbers, batch in self.batches(64 if self.kind == "maps" else size):
            gathered.append(self._vectors(tap, level, numbers, batch))
            if sum(len(vectors.values) for vectors in gathered) >= size:
                yield Vectors.join(gathered)
                gathered = []
        if gathered:
            yield Vectors.join(gathered)

    def _vectors(self, tap: str, level: str, numbers: range, batch: dict[str, Tensor]) -> Vectors:
        owners = torch.arange(numbers.start, numbers.stop)
        if self.kind == "pooled":
            return Vectors(batch[tap].float(), owners)
        if self.kind == "points":
            owners = owners.repeat_interleave(batch[tap].shape[1])
            return Vectors(batch[tap].float().flatten(0, 1), owners, batch["points"].flatten(0, 1))
        maps = self._maps(*self._place(numbers.start), len(numbers))
        if level == "image":
            return Vectors(pooled(maps, tap), owners)
        masks = [maps.content_mask(tap, i) for i in range(len(maps))]
        cells = [maps.maps[tap][i].permute(1, 2, 0)[mask].float() for i, mask in enumerate(masks)]
        points = [maps.cell_centres(tap, i)[mask] for i, mask in enumerate(masks)]
        counts = torch.tensor([len(values) for values in cells])
        return Vectors(torch.cat(cells), owners.repeat_interleave(counts), torch.cat(points))

    def dataset(self, tap: str | None = None, *, target: Callable[[str], Any] | None = None) -> StoreDataset:
        """A map-style torch `Dataset` of one tap: (features, number), or (features, target of the image's name)."""
        return StoreDataset(self, self._tap(tap), target)

    def table(self, tap: str | None = None) -> Any:
        """A `pyarrow.Table`: one row per image (pooled, maps) or per point, with the features of one tap.

        Columns: image, sha256, height, width, features, and for points x and y. Float16 and float32 are views of
        the memory map; bfloat16, which Arrow lacks, becomes float32.

        Raises:
            ImportError: pyarrow is not installed.
            StoreError: there is no such tap, or the maps differ in size (read those by image or by batch).
        """
        tap = self._tap(tap)
        with optional_import("a store as an Arrow table needs pyarrow: pip install pyarrow"):
            import pyarrow as pa
        batches = []
        for numbers, tensors in self.batches(1 << 30):
            values = tensors[tap]
            repeat = values.shape[1] if self.kind == "points" else 1
            owners = [number for number in numbers for _ in range(repeat)]
            images = [self.files[number] for number in owners]
            sizes = [self[number].placement.image_size for number in numbers for _ in range(repeat)]
            columns: dict[str, Any] = {
                "image": pa.array([_text(image.name) for image in images]),
                "sha256": pa.array([image.sha256 for image in images]),
                "height": pa.array([height for height, _ in sizes], pa.int32()),
                "width": pa.array([width for _, width in sizes], pa.int32()),
            }
            if self.kind == "points":
                values = values.flatten(0, 1)
                x, y = tensors["points"].flatten(0, 1).numpy().T
                columns |= {"x": pa.array(x), "y": pa.array(y)}
            values = values.float() if values.dtype == torch.bfloat16 else values
            flat = pa.array(values.reshape(-1).numpy())
            features = pa.FixedSizeListArray.from_arrays(flat, values[0].numel())
            if values.ndim > 2:
                kind = pa.fixed_shape_tensor(flat.type, tuple(values.shape[1:]))
                features = pa.ExtensionArray.from_storage(kind, features)
            batches.append(pa.table({**columns, "features": features}))
        if not batches:
            raise StoreError(f"{self.folder} holds no images")
        if len({batch.schema.field("features").type for batch in batches}) > 1:
            raise StoreError(f"{self.folder}: its maps differ in size, read them by image or by batch")
        return pa.concat_tables(batches)

    def verify(self) -> list[str]:
        """Read all shards and compare with the manifest's hashes. Returns what is wrong, one line per shard."""
        damages = (damage(self.folder, shard, contents=True) for shard in self.manifest.shards)
        return [wrong for wrong in damages if wrong is not None]

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def _maps(self, shard: int, row: int, count: int) -> FeatureMaps:
        """Maps of images that follow each other in one shard and share a canvas."""
        records, tensors = self.records(shard), self.tensors(shard)
        placements, start = records.placements[row : row + count], records.rows[row][0]
        names = {tap: tensor_name(tap, "maps", placements[0].canvas_size) for tap in self.taps}
        maps = {tap: tensors[name][start : start + count] for tap, name in names.items()}
        grids = {tap: records.grids[name] for tap, name in names.items()}
        return FeatureMaps(maps, placements, grids, self.manifest.features)

    def _tap(self, tap: str | None) -> str:
        if tap is None and len(self.taps) == 1:
            return self.taps[0]
        if tap not in self.taps:
            asked = "say which tap" if tap is None else f"there is no tap {tap!r}"
            raise StoreError(f"{self.folder}: {asked}; it has {', '.join(self.taps)}")
        return tap


class StoreDataset(Dataset[tuple[Tensor, Any]]):
    """One tap of a store for `torch.utils.data.DataLoader`; workers open their own memory maps."""

    def __init__(self, store: Store, tap: str, target: Callable[[str], Any] | None = None) -> None:
        self.store, self.tap, self.target = store, tap, target

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, number: int) -> tuple[Tensor, Any]:
        image = self.store[number]
        return image.features[self.tap], number if self.target is None else self.target(image.file.name)


def open_store(folder: str | Path, *, root: str | Path | None = None) -> Store:
    """Open a store of features for reading.

    Args:
        folder: the store.
        root: where the images lie now, if they have moved since they were extracted.

    Raises:
        StoreError: there is no store, or a shard is missing or truncated; the message names the file.
    """
    return Store(folder, root=root)


def _text(name: str) -> str:
    """A name as Arrow can hold it: one whose bytes are no UTF-8 is escaped."""
    return name if name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name) else printable(name)
