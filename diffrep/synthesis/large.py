"""Large images: from a grid of embeddings to pixels, in memory or in a file."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import diffrep
from diffrep.files import optional_import, replace_folder, write_whole
from diffrep.images import MAX_PIXELS
from diffrep.settings import POSITIVE, check
from diffrep.synthesis.canvas import LINES, Lines, Position, RowSweep, Run, WindowPlan, decode_weights, window_weights
from diffrep.synthesis.grids import EmbeddingGrid
from diffrep.synthesis.model import SynthesisModel
from diffrep.synthesis.sampler import SynthesisSettings, check_grid, deep_bytes, denoise_canvas

# -- Image files that are written piece by piece: PNG, pyramidal TIFF and OME-TIFF, OME-Zarr -----------------
# A file appears under its name only when it is whole.


PLAIN = (".png", ".jpg", ".jpeg", ".webp")
TIFF = (".tif", ".tiff")
OME = (".ome.tif", ".ome.tiff")
SUFFIXES = (*PLAIN, *TIFF, *OME, ".zarr")


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
    with optional_import(f'{path}: needs the packages tifffile and zarr: pip install "diffrep[synthesis]"'):
        if name.endswith(TIFF):
            import tifffile  # noqa: F401
        elif name.endswith(".zarr"):
            import zarr  # noqa: F401


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


def pyramid(pixels: Lines, tile: int, scratch: Callable[[str, tuple[int, ...]], Lines] | None) -> list[Lines]:
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


MOST_CARRIED = 5  # tensors that the hungriest sampler keeps from step to step, pndm


def scratch_bytes(size: tuple[int, int], channels: int, factor: int) -> int:
    """Bytes that a run needs at most on disk beside the output, for an image of (H, W) pixels."""
    height, width = size
    latents = math.ceil(height / factor) * math.ceil(width / factor) * channels * 4
    return 2 * (1 + MOST_CARRIED) * latents + 4 * height * width


# ------------------------------------------------------------------------------------------------------------


STRIP, WINDOWS = 2048, 8  # pixels, or windows: width of what is decoded from top to bottom before the next
DECODE_BATCH = 4  # windows that are decoded together: a decoder needs far more memory than the denoiser


def synthesize(
    model: SynthesisModel,
    grid: EmbeddingGrid,
    size: tuple[int, int] | None = None,
    settings: SynthesisSettings | None = None,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Paint an image in memory.

    Args:
        size: (H, W) pixels, any; the grid must have a cell for every window's side, begun or whole. None: the size of
            the grid.

    Returns:
        (H, W, 3) uint8.

    Raises:
        GridError: the grid does not fit the size or the model.
        ValueError: the image is smaller than one window.
    """
    size = size or grid_size(model, grid)
    pixels = paint(model, grid, size, settings or SynthesisSettings(), Run(None, {}), progress=progress)
    return pixels.read(0, size[0])


def synthesize_file(
    model: SynthesisModel,
    grid: EmbeddingGrid,
    path: Path,
    size: tuple[int, int] | None = None,
    settings: SynthesisSettings | None = None,
    *,
    file: FileSettings | None = None,
    work: Path | None = None,
    progress: bool = False,
) -> None:
    """Paint an image of any size into a file, with memory for a band of it.

    What is unfinished lies in a folder; called again with the same arguments after it was interrupted, the run goes
    on there and gives the same file. The folder is removed at the end.

    Args:
        path: see `write_pixels` for its endings.
        size: see `synthesize`.
        work: the folder; beside the output where left out.

    Raises:
        GridError: the grid does not fit the size or the model.
        ValueError: the image is smaller than one window, the output cannot be written so, or the folder holds a run
            with other arguments.
        OSError: there is no room on the disk.
    """
    settings, file = settings or SynthesisSettings(), file or FileSettings()
    size = size or grid_size(model, grid)
    if file.pixel_size is None:
        file = replace(file, pixel_size=model.about.pixel_size)
    check_output(path, size)
    check_canvas(model, grid, size, settings)
    check_room(path, size, model, settings, work)
    work = work or _run_folder(path)
    identity = {
        "settings": asdict(settings),
        "size": list(size),
        "grid": grid.checksum(),
        "model": model.checksum(),
        "record": asdict(model.about),
        "diffrep": diffrep.__version__,
    }
    run = Run(work, identity)
    try:
        pixels = paint(model, grid, size, settings, run, progress=progress)
        about = {**identity, "name": model.name, "encoder": grid.encoder or model.about.encoder}
        write_pixels(path, pixels, file, about=about, scratch=lambda name, shape: run.lines(name, shape, "uint8"))
    except BaseException as error:
        run.close()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                f"{path}: the disk is full; nothing is lost: make room and call it again, it goes on from {work}"
            ) from None
        raise
    run.close(delete=True)


def paint(
    model: SynthesisModel,
    grid: EmbeddingGrid,
    size: tuple[int, int],
    settings: SynthesisSettings,
    run: Run,
    *,
    latents: Lines | None = None,
    progress: bool = False,
) -> Lines:
    """Denoise and decode, going on where the run is; (H, W, 3) uint8 lines of the run.

    Args:
        latents: of a canvas that is denoised already.
    """
    check_canvas(model, grid, size, settings)
    pixels = run.lines("pixels", (*size, 3), "uint8")
    if run.position.stage == "done":
        return pixels
    if latents is None:
        latents = denoise_canvas(model, grid, latent_size(model, size), settings, run=run, progress=progress)
    for start, left, lines in decode_lines(model, latents, settings, run=run, progress=progress):
        inside = lines[: max(0, size[0] - start), :, : max(0, size[1] - left)]  # whole latents may cover more
        if inside.size:
            pixels.write_at(start, left, to_uint8(inside))
    run.checkpoint(Position("done"), None, force=True)
    return pixels


@torch.inference_mode()
def decode_lines(
    model: SynthesisModel,
    latents: Lines,
    settings: SynthesisSettings,
    *,
    run: Run | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Decode a canvas with overlapping windows, in strips from top to bottom.

    Windows that lie across two strips are decoded for both.

    A decoder sees the whole of its input, so windows never agree exactly: they are blended. The official Gaussian is
    still a fifth of its height at a window's border, where it leaves a step; a raised cosine leaves none.

    Args:
        latents: (H, c, W) lines of scaled latents.
        run: where an interrupted run goes on; from the top where left out.

    Yields:
        (first line, first column, (lines, 3, columns) float32, about [0, 1], not clamped), in pixels.
    """
    height, _, width = latents.shape
    stride = settings.decode_stride or max(model.window // 2, 1)
    plan = WindowPlan((height, width), model.window, stride)
    factor = model.factor
    pixels = WindowPlan((height * factor, width * factor), model.window * factor, stride * factor)
    official = settings.decode_weights == "official"
    weights = (
        decode_weights(pixels.window, settings.decode_sigma) if official else window_weights("hann", pixels.window)
    )
    width, side = pixels.size[1], max(STRIP, WINDOWS * pixels.window)
    sweeps = {
        left: RowSweep(pixels, weights, 3, strip=(left, min(left + side, width))) for left in range(0, width, side)
    }
    run = run or Run(None, {})
    first = run.position
    total = sum(len(sweep.columns) for sweep in sweeps.values()) * len(plan.rows)
    bar = tqdm(total=total, desc="decode", unit="window", disable=not progress)
    for number, (left, sweep) in enumerate(sweeps.items()):
        start_row = len(plan.rows)
        if number >= first.step:
            start_row = run.take_up(sweep, first.row if number == first.step else 0)
        bar.update(start_row * len(sweep.columns))
        for row in range(start_row, len(plan.rows)):
            lines = latents.tensor(plan.rows[row], plan.rows[row] + plan.window).movedim(1, 0)
            for start in range(0, len(sweep.columns), DECODE_BATCH):
                part = sweep.columns[start : start + DECODE_BATCH]
                windows = torch.stack([lines[:, :, plan.columns[k] :][:, :, : plan.window] for k in part])
                decoded = model.decode(windows, quantize=settings.quantize).float().cpu().numpy()
                for column, value in zip(part, decoded, strict=True):
                    sweep.add(row, column, value)
                bar.update(len(part))
            for top, values in sweep.end_row():
                yield top, left, values
            run.checkpoint(Position("decode", number, row + 1), sweep.carry)
    bar.close()


def to_uint8(lines: np.ndarray) -> np.ndarray:
    """(n, 3, W) values in [0, 1] -> (n, W, 3) uint8."""
    return np.round(np.clip(lines, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 1)


def latent_size(model: SynthesisModel, size: tuple[int, int]) -> tuple[int, int]:
    """Latent pixels (H, W) that cover an image of (H, W) pixels."""
    return math.ceil(size[0] / model.factor), math.ceil(size[1] / model.factor)


def grid_size(model: SynthesisModel, grid: EmbeddingGrid) -> tuple[int, int]:
    """(H, W) pixels of an image with one whole window a cell."""
    cell = model.window * model.factor
    return grid.shape[0] * cell, grid.shape[1] * cell


def grid_shape(model: SynthesisModel, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the grid that an image of (H, W) pixels needs."""
    height, width = latent_size(model, size)
    return math.ceil(height / model.window), math.ceil(width / model.window)


def check_canvas(
    model: SynthesisModel, grid: EmbeddingGrid, size: tuple[int, int], settings: SynthesisSettings
) -> None:
    """Refuse what cannot be painted before any work is done.

    Raises:
        GridError, ValueError: see `synthesize`.
    """
    if min(size) < (side := model.window * model.factor):
        raise ValueError(f"this model paints images of at least {side} x {side} pixels, not {size[0]} x {size[1]}")
    for stride in (settings.stride, settings.decode_stride):
        WindowPlan(latent_size(model, size), model.window, stride or 1)
    check_grid(grid, latent_size(model, size), model)
    settings.part(model, len(settings.stepper(model)))


def check_room(
    path: Path, size: tuple[int, int], model: SynthesisModel, settings: SynthesisSettings, work: Path | None = None
) -> None:
    """Refuse an image for which the disk has no room, before any work is done for it; see `synthesize_file`.

    Raises:
        OSError: what a new run writes into its folder needs more than is free there.
    """
    folder = work or _run_folder(path)
    if (folder / "run.json").is_file():
        return
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed, free = scratch_bytes(size, model.channels, model.factor), shutil.disk_usage(place).free
    if deep := deep_bytes(model, settings):
        stride = settings.stride or max(model.window // 2, 1)
        needed += deep * len(WindowPlan(latent_size(model, size), model.window, stride))
    if needed > free:
        raise OSError(f"{folder}: up to {needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")


def _run_folder(path: Path) -> Path:
    """Where a run keeps what is unfinished: hidden, beside its output."""
    return path.with_name(f".{path.name}.run")
