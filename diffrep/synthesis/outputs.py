"""Image files that are written piece by piece: PNG, pyramidal TIFF and OME-TIFF, OME-Zarr.

A file appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffrep.files import replace_folder, write_whole
from diffrep.images import MAX_PIXELS
from diffrep.settings import POSITIVE, check
from diffrep.synthesis.canvas import LINES, Lines

PLAIN = (".png", ".jpg", ".jpeg", ".webp")
TIFF = (".tif", ".tiff")
OME = (".ome.tif", ".ome.tiff")
SUFFIXES = (*PLAIN, *TIFF, *OME, ".zarr")
_EXTRA = 'needs the packages tifffile and zarr: pip install "diffrep[synthesis]"'


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """How a large image is stored."""

    tile: int = 256  # pixels a side of the tiles of TIFF files and the chunks of zarr; a multiple of 16
    compression: Literal["deflate", "jpeg", "none"] = "deflate"  # of TIFF files; jpeg needs imagecodecs
    quality: int = 88  # of jpeg
    pixel_size: float | None = None  # micrometres a pixel; the model's where left out, if it is known

    def __post_init__(self) -> None:
        check(self, tile="16..", quality="1..100", pixel_size=POSITIVE)
        if self.tile % 16:
            raise ValueError(f"tile must be a multiple of 16 pixels, got {self.tile}")


def check_output(path: Path, size: tuple[int, int]) -> None:
    """Refuse an output before any work is done for it.

    Raises:
        ValueError: an unknown ending, a PNG of too many pixels, a zarr folder that is already there.
        ImportError: the packages for this kind of file are not installed.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{path}: the output must end in {', '.join(SUFFIXES)}")
    if name.endswith(PLAIN) and size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"{path}: {size[0]} x {size[1]} pixels are too many for this kind of file; use .tiff, .ome.tiff or .zarr"
        )
    if name.endswith(".zarr") and path.exists():
        raise ValueError(f"{path}: is already there; delete it first or give another name")
    try:
        if name.endswith(TIFF):
            import tifffile  # noqa: F401
        elif name.endswith(".zarr"):
            import zarr  # noqa: F401
    except ImportError:
        raise ImportError(f"{path}: {_EXTRA}") from None


def write_pixels(
    path: Path,
    pixels: Lines,
    settings: FileSettings,
    *,
    about: Mapping[str, Any] | None = None,
    scratch: Callable[[str, tuple[int, ...]], Lines] | None = None,
) -> None:
    """Write an image of any size.

    Args:
        path: its ending picks the kind: ``.tiff`` has its pyramid as further pages (OpenSlide reads all levels),
            ``.ome.tiff`` as sub-images (Bio-Formats and QuPath), ``.zarr`` is OME-Zarr.
        pixels: (H, W, 3) uint8.
        about: stored with the image, as JSON.
        scratch: makes the array of a smaller level, by its name and shape; in memory where left out.
    """
    name, note = path.name.lower(), json.dumps(dict(about or {}))
    if name.endswith(PLAIN):
        write_whole(path, Image.fromarray(pixels.read(0, pixels.shape[0])).save)
        return
    levels = pyramid(pixels, settings.tile, scratch)
    if name.endswith(".zarr"):
        replace_folder(path, lambda folder: _write_zarr(folder, levels, settings, note))
    else:
        write_whole(path, lambda partial: _write_tiff(partial, levels, settings, note, ome=name.endswith(OME)))


def pyramid(pixels: Lines, tile: int, scratch: Callable[[str, tuple[int, ...]], Lines] | None = None) -> list[Lines]:
    """The image and its halves, down to one that fits into a tile; each is the mean of 2 x 2 pixels of the last."""
    levels = [pixels]
    while max(levels[-1].shape[:2]) > tile:
        above = levels[-1]
        shape = (-(-above.shape[0] // 2), -(-above.shape[1] // 2), 3)
        name = f"level-{len(levels)}"
        below = Lines(shape, "uint8") if scratch is None else scratch(name, shape)
        for start in range(0, shape[0], LINES):
            stop = min(start + LINES, shape[0])
            lines = above.read(2 * start, min(2 * stop, above.shape[0])).astype(np.uint16)
            odd = ((0, len(lines) % 2), (0, lines.shape[1] % 2), (0, 0))
            lines = np.pad(lines, odd, mode="edge")
            sums = lines[::2, ::2] + lines[1::2, ::2] + lines[::2, 1::2] + lines[1::2, 1::2]
            below.write(start, ((sums + 2) // 4).astype(np.uint8))
        levels.append(below)
    return levels


def _tiles(pixels: Lines, tile: int) -> Iterator[np.ndarray]:
    """(tile, tile, 3), row by row; those at the border are filled up by the border."""
    height, width, _ = pixels.shape
    for top in range(0, height, tile):
        lines = pixels.read(top, min(top + tile, height))
        lines = np.pad(lines, ((0, tile - len(lines)), (0, -width % tile), (0, 0)), mode="edge")
        for left in range(0, width, tile):
            yield np.ascontiguousarray(lines[:, left : left + tile])


def _write_tiff(path: Path, levels: list[Lines], settings: FileSettings, note: str, *, ome: bool) -> None:
    import tifffile

    height, width, _ = levels[0].shape
    options: dict[str, Any] = {"dtype": "uint8", "tile": (settings.tile, settings.tile), "photometric": "rgb"}
    if settings.compression == "deflate":
        options |= {"compression": "adobe_deflate", "predictor": 2}
    elif settings.compression == "jpeg":
        options |= {"compression": "jpeg", "compressionargs": {"level": settings.quality}}
    size = settings.pixel_size
    metadata: dict[str, Any] | None = None
    if ome:
        metadata = {"axes": "YXS", "Description": note}
        if size is not None:
            metadata |= {"PhysicalSizeX": size, "PhysicalSizeY": size}
    with tifffile.TiffWriter(path, bigtiff=4 * height * width > 2**32 - 2**25, ome=ome) as file:
        for number, level in enumerate(levels):
            first = number == 0
            if size is not None:
                density = 1e4 / (size * width / level.shape[1])  # pixels a centimetre
                options |= {"resolution": (density, density), "resolutionunit": "CENTIMETER"}
            file.write(
                _tiles(level, settings.tile),
                shape=level.shape,
                subfiletype=0 if first else 1,
                subifds=len(levels) - 1 if ome and first else None,
                metadata=metadata if first else None,
                description=note if first and not ome else None,
                software="diffrep",
                **options,
            )


def _write_zarr(path: Path, levels: list[Lines], settings: FileSettings, note: str) -> None:
    import zarr

    size = settings.pixel_size
    data_sets = []
    group = zarr.open_group(str(path), mode="w")
    for number, level in enumerate(levels):
        height, width, _ = level.shape
        array = zarr.open_array(
            str(path / str(number)), mode="w", shape=(3, height, width), chunks=(3, settings.tile, settings.tile),
            dtype="uint8",
        )  # fmt: skip
        for top in range(0, height, settings.tile):
            lines = level.read(top, min(top + settings.tile, height))
            array[:, top : top + len(lines)] = lines.transpose(2, 0, 1)
        steps = [levels[0].shape[axis] / level.shape[axis] * (size or 1.0) for axis in (0, 1)]
        transforms = [{"type": "scale", "scale": [1.0, *steps]}]
        data_sets.append({"path": str(number), "coordinateTransformations": transforms})
    unit = {} if size is None else {"unit": "micrometer"}
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space", **unit} for name in "yx")]
    modern = int(zarr.__version__.split(".")[0]) >= 3
    scales: list[Any] = [{"axes": axes, "datasets": data_sets, **({} if modern else {"version": "0.4"})}]
    group.attrs.update({"ome": {"version": "0.5", "multiscales": scales}} if modern else {"multiscales": scales})
    group.attrs["diffrep"] = json.loads(note)


def scratch_bytes(size: tuple[int, int], channels: int, factor: int, kept: int) -> int:
    """Bytes that a run needs on disk beside the output, for an image of (H, W) pixels.

    Args:
        kept: tensors that the scheduler keeps from step to step.
    """
    height, width = size
    latents = math.ceil(height / factor) * math.ceil(width / factor) * channels * 4
    return 2 * (1 + kept) * latents + 4 * height * width
