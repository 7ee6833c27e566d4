"""One shard: a safetensors file with the numbers, and a JSON file that says which images they are of.

Both are pure functions of what is added, so that two runs over the same images give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffrep.backbones import Grid
from diffrep.features import FeatureMaps
from diffrep.files import one_line, partial_path, printable, read_document, write_whole
from diffrep.images import Placement
from diffrep.settings import check

SHARD_NAME = re.compile(r"\d{6,}-[0-9a-f]{12}")
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors writes them
SHARDS = "shards"


Kind: TypeAlias = Literal["maps", "pooled", "points"]
StoreType: TypeAlias = Literal["float16", "bfloat16", "float32"]


class StoreError(ValueError):
    """A store that cannot be used, or not in this way; the message names the file and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What of an image's feature maps is kept, and in which precision.

    ``maps`` keeps them whole, ``pooled`` their mean over the image (padding left out), one vector per tap, and
    ``points`` the vectors at chosen places, interpolated bilinearly.
    """

    kind: Kind = "pooled"
    dtype: StoreType = "float16"
    points: str = "grid:8"  # grid:N (N x N places), random:N (seeded by the image's name), or a .json file of places

    def __post_init__(self) -> None:
        check(self)
        if not re.fullmatch(r"(grid|random):[1-9]\d*|.+\.json", self.points):
            raise ValueError(f"points must be grid:N, random:N or a .json file of places, got {self.points!r}")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: ``shards/NAME.safetensors`` holds the numbers, ``shards/NAME.json`` says which images they are of."""

    name: str  # number, then the first digits of the hash: a shard is never overwritten
    images: int  # whose features it holds
    quarantined: int  # images that could not be used
    bytes: int  # of the .safetensors file
    sha256: str  # of the .safetensors file
    records_bytes: int  # of the .json file
    records_sha256: str  # of the .json file
    environment: int = 0  # which of the manifest's environments made it

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SHARD_NAME.fullmatch(self.name):  # it becomes part of a path
            raise ValueError(f"{self.name!r} is no name of a shard")
        for key in ("images", "quarantined", "bytes", "records_bytes", "environment"):
            if type(value := getattr(self, key)) is not int or value < 0:
                raise ValueError(f"{key} of shard {self.name} must be a number from 0 on, got {value!r}")


def shard_number(name: str) -> int:
    """
    >>> shard_number("000012-5f3a9c01d2e4")
    12
    """
    return int(name.partition("-")[0])


class PlacesError(ValueError):
    """Places that an image does not have."""


@dataclass(frozen=True)
class ImageFile:
    """An image as it was when it was read.

    Attributes:
        name: relative to the store's root, with ``/``; ``a.tar/cat.jpg`` inside an archive.
        bytes: its size on disk.
        modified: time of the last change, in nanoseconds since 1970; the archive's for images inside one.
        sha256: of its bytes.
    """

    name: str
    bytes: int
    modified: int
    sha256: str = ""


@dataclass(frozen=True)
class StoredImage:
    """What a store holds of one image.

    Attributes:
        file: name, size, time of change and hash of the image.
        placement: how it lay on the network's canvas; `placement.image_size` is its (H, W).
        features: tap -> (C, h, w) whole maps, (C,) pooled, or (P, C) at points, on the CPU and in the store's
            precision; where they are read, views of the memory map.
        points: (P, 2) float32 as (x, y) in pixels of the image, where points are kept.
    """

    file: ImageFile
    placement: Placement
    features: Mapping[str, Tensor]
    points: Tensor | None = None


@dataclass(frozen=True)
class Records:
    """The images of one shard, column by column, in the order of the shard.

    Attributes:
        images: name, bytes, modified and sha256 of each; see `ImageFile`.
        placements: of each image.
        rows: of each image, the first of its rows in every tensor that holds it, and how many there are.
        grids: tensor -> where the cells of the map lie on the canvas.
        quarantined: the images that could not be used, and why.
    """

    images: tuple[ImageFile, ...]
    placements: tuple[Placement, ...]
    rows: tuple[tuple[int, int], ...]
    grids: Mapping[str, Grid] = field(default_factory=dict)
    quarantined: tuple[tuple[ImageFile, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all images, those that could not be used too."""
        return tuple(file.name for file in (*self.images, *(file for file, _ in self.quarantined)))

    def to_json(self) -> bytes:
        """Columns as JSON."""
        columns = {
            "images": _columns(self.images, _IMAGE),
            "placements": _columns(self.placements, _PLACEMENT),
            "rows": {"start": [start for start, _ in self.rows], "count": [count for _, count in self.rows]},
            "grids": {name: asdict(grid) for name, grid in self.grids.items()},
            "quarantined": {
                **_columns([image for image, _ in self.quarantined], _IMAGE),
                "reason": [reason for _, reason in self.quarantined],
            },
        }
        return json.dumps(columns, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Records:
        """Read what `to_json` wrote."""
        columns = json.loads(content)
        grids, bad = columns["grids"], columns["quarantined"]
        records = cls(
            images=tuple(ImageFile(*values) for values in _rows(columns["images"], _IMAGE)),
            placements=tuple(Placement(*map(tuple, values)) for values in _rows(columns["placements"], _PLACEMENT)),
            rows=tuple(_rows(columns["rows"], ("start", "count"))),
            grids={name: Grid(tuple(grid["origin"]), tuple(grid["stride"])) for name, grid in grids.items()},
            quarantined=tuple((ImageFile(*file), reason) for *file, reason in _rows(bad, (*_IMAGE, "reason"))),
        )
        if not len(records.images) == len(records.placements) == len(records.rows):
            raise ValueError("its columns differ in length")
        if not all(isinstance(name, str) for name in records.names):
            raise TypeError("the name of an image is no text")
        return records


_PLACEMENT = ("image_size", "canvas_size", "content_box")
_IMAGE = ("name", "bytes", "modified", "sha256")


def _columns(items: Sequence[object], keys: Sequence[str]) -> dict[str, list[Any]]:
    return {key: [getattr(item, key) for item in items] for key in keys}


def _rows(columns: Mapping[str, list[Any]], keys: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(columns[key] for key in keys), strict=True)


def tensor_name(tap: str, kind: Kind, canvas_size: Sequence[int]) -> str:
    """The tensor of a shard that holds a tap: whole maps have one per size of canvas.

    >>> tensor_name("up.1", "maps", (512, 768))
    'up.1@512x768'
    """
    return f"{tap}@{canvas_size[0]}x{canvas_size[1]}" if kind == "maps" else tap


class ShardBuilder:
    """Collects what is kept of the images of one shard, in any order, and writes it.

    Args:
        keep: what is kept of each image, and in which precision.
    """

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self._images: dict[int, tuple[StoredImage, Mapping[str, Grid]]] = {}
        self._quarantined: dict[int, tuple[ImageFile, str]] = {}

    def __len__(self) -> int:
        return len(self._images) + len(self._quarantined)

    def add(self, position: int, image: StoredImage, grids: Mapping[str, Grid]) -> None:
        """Add image number `position` of the shard; one whose features are not finite is quarantined.

        Args:
            grids: tap -> where the cells of its map lie on the canvas.
        """
        for tap, values in image.features.items():
            if not bool(torch.isfinite(values).all()):
                hint = " (bfloat16 has the range of float32)" if self.keep.dtype == "float16" else ""
                self.quarantine(position, image.file, f"features of {tap} are not finite in {self.keep.dtype}{hint}")
                return
        self._images[position] = (image, grids)

    def quarantine(self, position: int, image: ImageFile, reason: str) -> None:
        """Note that image number `position` cannot be used."""
        self._quarantined[position] = (image, reason)

    def save(self, folder: Path, number: int) -> ShardEntry:
        """Write both files into the store `folder`; a manifest has to list the result for it to count.

        Raises:
            OSError: the disk is full or cannot be written to; nothing is left behind.
        """
        kind = self.keep.kind
        tensors: dict[str, list[Tensor]] = {}
        rows: list[tuple[int, int]] = []
        grids: dict[str, Grid] = {}
        filled: Counter[str] = Counter()  # tensor -> its rows so far
        ordered = [self._images[position] for position in sorted(self._images)]
        for image, image_grids in ordered:
            count = 1 if image.points is None else len(image.points)
            for tap, values in image.features.items():
                name = tensor_name(tap, kind, image.placement.canvas_size)
                tensors.setdefault(name, []).append(values if kind == "points" else values[None])
                if kind == "maps":
                    grids[name] = image_grids[tap]
            if image.points is not None:
                tensors.setdefault("points", []).append(image.points)
            rows.append((filled[name], count))
            filled.update({tensor_name(tap, kind, image.placement.canvas_size): count for tap in image.features})
        records = Records(
            images=tuple(image.file for image, _ in ordered),
            placements=tuple(image.placement for image, _ in ordered),
            rows=tuple(rows),
            grids=grids,
            quarantined=tuple(self._quarantined[position] for position in sorted(self._quarantined)),
        )
        partial = partial_path(folder / SHARDS / f"{number:06d}.safetensors")
        try:
            digest = write_tensors(partial, tensors)
            content = records.to_json()
            text_digest = hashlib.sha256(content).hexdigest()
            # named after both files, so that a change in either gives new names
            name = f"{number:06d}-{hashlib.sha256((digest + text_digest).encode()).hexdigest()[:12]}"
            size = partial.stat().st_size
            write_whole(folder / SHARDS / f"{name}.json", content, sync=True)
            partial.replace(folder / SHARDS / f"{name}.safetensors")
        finally:
            partial.unlink(missing_ok=True)
        return ShardEntry(
            name=name,
            images=len(ordered),
            quarantined=len(records.quarantined),
            bytes=size,
            sha256=digest,
            records_bytes=len(content),
            records_sha256=text_digest,
        )


def write_tensors(file: Path, tensors: Mapping[str, Sequence[Tensor]]) -> str:
    """Write a safetensors file piece by piece, without a second copy in memory, and on to the disk.

    Args:
        tensors: name -> pieces (n_i, ...) that are joined along their first axis.

    Returns:
        The SHA-256 of the file.
    """
    header: dict[str, Any] = {}
    # wide types first, so that every tensor starts at a multiple of its own width, as safetensors does it
    names = sorted(tensors, key=lambda name: (-tensors[name][0].element_size(), name))
    offset = 0
    for name in names:
        pieces, first = tensors[name], tensors[name][0]
        shape, end = [sum(map(len, pieces)), *first.shape[1:]], offset + sum(piece.nbytes for piece in pieces)
        header[name] = {"dtype": _NAMES[first.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    file.unlink(missing_ok=True)
    with file.open("xb") as opened:  # never through a link that lies in wait under the name
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            opened.write(part)
        for name in names:
            for piece in tensors[name]:
                content = piece.contiguous().view(torch.uint8).numpy().data.cast("B") if piece.numel() else b""
                digest.update(content)
                opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    return digest.hexdigest()


def load_records(folder: Path, shard: ShardEntry) -> Records:
    """Read the images of a shard.

    Raises:
        StoreError: the file is missing or damaged.
    """
    file = folder / SHARDS / f"{shard.name}.json"
    try:
        records = Records.from_json(file.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{file}: is missing, the manifest lists it; {_REPAIR}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise StoreError(f"{file}: is damaged ({one_line(error)}); {_REPAIR}") from None
    if (count := len(records.images)) != shard.images:
        raise StoreError(f"{file}: lists {count} images where the manifest says {shard.images}; {_REPAIR}")
    return records


_REPAIR = "run `diffrep extract` again on the same images to have the shard made again"


def damage(folder: Path, shard: ShardEntry, *, contents: bool = False) -> str | None:
    """What is wrong with a shard's files, if anything: missing, of another length, and with `contents` other bytes."""
    for ending, size, digest in (
        ("safetensors", shard.bytes, shard.sha256),
        ("json", shard.records_bytes, shard.records_sha256),
    ):
        file = folder / SHARDS / f"{shard.name}.{ending}"
        if not file.is_file():
            return f"{file}: is missing, the manifest lists it; {_REPAIR}"
        if (length := file.stat().st_size) != size:
            word = "truncated" if length < size else "too long"
            return f"{file}: is {word}, {length:,} bytes where the manifest says {size:,}; {_REPAIR}"
        if contents and _digest(file) != digest:
            return f"{file}: its bytes have changed since it was written; {_REPAIR}"
    return None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def select(maps: FeatureMaps, keep: Keep, files: Sequence[ImageFile]) -> list[StoredImage | PlacesError]:
    """What is kept of each image of a batch, on the CPU and in the precision of the store.

    Args:
        files: the images; places are looked up, or drawn, by their names.

    Returns:
        Of each image what is stored, or why its places are none.
    """
    dtype = getattr(torch, keep.dtype)
    chosen: list[StoredImage | PlacesError] = []
    if keep.kind == "points":
        for file, one in zip(files, maps, strict=True):
            try:
                points = places_of(keep.points, file.name, one.placements[0].image_size)
            except PlacesError as error:
                chosen.append(error)
                continue
            features = {tap: one.at(tap, points[None])[0].to(dtype).cpu() for tap in maps.taps}
            chosen.append(StoredImage(file, one.placements[0], features, points))
        return chosen
    whole = {tap: pooled(maps, tap) for tap in maps.taps} if keep.kind == "pooled" else maps.maps
    narrow = {tap: values.to(dtype).cpu() for tap, values in whole.items()}
    for i, (file, placement) in enumerate(zip(files, maps.placements, strict=True)):
        chosen.append(StoredImage(file, placement, {tap: values[i] for tap, values in narrow.items()}))
    return chosen


def pooled(maps: FeatureMaps, tap: str) -> Tensor:
    """(B, C) float32: the mean of each map over the cells whose centre lies on the image."""
    values = maps.maps[tap].float()
    masks = torch.stack([maps.content_mask(tap, i) for i in range(len(maps))]).to(values)
    means = (values * masks[:, None]).sum((-2, -1)) / masks.sum((-2, -1)).clamp(min=1)[:, None]
    for i in (masks.sum((-2, -1)) == 0).nonzero()[:, 0].tolist():  # an image thinner than a cell
        height, width = maps.placements[i].image_size
        means[i] = maps[i].at(tap, torch.tensor([[[(width - 1) / 2, (height - 1) / 2]]]))[0, 0].float()
    return means


def places_of(rule: str, name: str, image_size: tuple[int, int]) -> Tensor:
    """The places of an image, (P, 2) float32 as (x, y) in its pixels.

    Args:
        rule: ``grid:N`` for the centres of N x N equal parts, ``random:N`` for N draws that depend on nothing
            but the name, or a JSON file ``{"name": [[x, y], ...], ...}``.

    Raises:
        PlacesError: the file has no places, or outside ones, for the image.
        ValueError: the file cannot be read.
    """
    height, width = image_size
    word, _, number = rule.partition(":")
    if word == "grid":
        steps = (torch.arange(int(number)) + 0.5) / int(number)
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        shares = torch.stack([x, y], dim=-1).reshape(-1, 2)
    elif word == "random":
        seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 1
        shares = torch.rand(int(number), 2, generator=torch.Generator().manual_seed(seed))
    else:
        places = places_in(rule)
        if name not in places:
            raise PlacesError(f"{rule} has no places for {name}")
        points = torch.tensor(places[name], dtype=torch.float32).reshape(-1, 2)
        x, y = points.unbind(-1)
        if not bool(((x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)).all()):  # NaN too
            raise PlacesError(f"{rule}: places of {name} lie outside of its {width} x {height} pixels")
        return points
    return shares * torch.tensor([width, height]) - 0.5


@lru_cache(maxsize=4)
def places_in(file: str) -> Mapping[str, list[list[float]]]:
    """Read a file of places, {"name": [[x, y], ...], ...}.

    Raises:
        ValueError: it is missing or holds something else.
    """
    places = read_document(file)
    for name, points in places.items():
        try:
            shape = np.shape(np.asarray(points, dtype=np.float64))
        except (TypeError, ValueError):
            shape = ()
        if shape[1:] != (2,) or not shape[0]:
            raise ValueError(f"{file}: the places of {printable(name)} must be a list of [x, y]")
    return places
