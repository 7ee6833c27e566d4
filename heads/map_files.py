"""Depth and normal maps as files: 16-bit PNG, NPY, float TIFF, a coloured preview. Each says what it measures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffrep.files import write_whole
from diffrep.heads.maps import DepthMap, NormalMap

MILLIMETRES = 1000  # a metric 16-bit PNG counts these per metre, as the public data sets do
_FULL = 65535


def array_of(values: DepthMap | NormalMap) -> np.ndarray:
    """float32, (H, W) or (H, W, 3)."""
    found = values.values if isinstance(values, DepthMap) else values.values.permute(1, 2, 0)
    return np.ascontiguousarray(found.float().numpy())


def png_bytes(values: DepthMap | NormalMap) -> bytes:
    """A 16-bit PNG with the metadata in its text chunk ``diffrep``.

    Relative depth and disparity: 0..65535 for 0..1. Metric depth: millimetres. Normals: 0..65535 for -1..1 in three
    channels.

    Raises:
        ValueError: metric depth of more than 65.535 m, which 16 bits do not hold.
    """
    array = array_of(values).astype(np.float64)
    if isinstance(values, NormalMap):
        counts, scale = (array + 1) * (_FULL / 2), "value = count / 65535 * 2 - 1"
    elif values.metric:
        counts, scale = array * MILLIMETRES, "metres = count / 1000"
        if counts.max() > _FULL:
            raise ValueError(
                f"a 16-bit PNG holds up to 65.535 m, the map reaches {array.max():.1f} m; write npy or tiff instead"
            )
    else:
        counts, scale = array * _FULL, "value = count / 65535"
    counts = np.round(counts.clip(0, _FULL)).astype(np.uint16)
    note = json.dumps({**values.metadata(), "stored": scale})
    if counts.ndim == 2:
        text = PngInfo()
        text.add_text("diffrep", note)
        buffer = io.BytesIO()
        Image.fromarray(counts).save(buffer, format="PNG", pnginfo=text)
        return buffer.getvalue()
    return _colour_png(counts, note)


def _colour_png(counts: np.ndarray, note: str) -> bytes:
    """16 bits in three channels, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = counts.shape
    big = counts.astype(">u2")
    # filter 1 of the PNG standard: differences to the pixel on the left, byte by byte
    left = np.concatenate([np.zeros_like(big[:, :1]), big[:, :-1]], axis=1).astype(">u2")
    rows = (big.view(np.uint8) - left.view(np.uint8)).reshape(height, -1)
    lines = np.concatenate([np.ones((height, 1), np.uint8), rows], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    text = b"diffrep\0" + note.encode("latin-1", "replace")
    parts = [chunk(b"IHDR", head), chunk(b"tEXt", text), chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def npy_bytes(values: DepthMap | NormalMap) -> bytes:
    """A NPY file, float32."""
    buffer = io.BytesIO()
    np.save(buffer, array_of(values), allow_pickle=False)
    return buffer.getvalue()


def tiff_bytes(values: DepthMap | NormalMap) -> bytes:
    """A float32 TIFF with the metadata as JSON in its description.

    Raises:
        ImportError: the package tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError:
        raise ImportError('writing TIFF needs tifffile: pip install "diffrep[dense]"') from None
    array = array_of(values)
    buffer = io.BytesIO()
    kind = "minisblack" if array.ndim == 2 else "rgb"
    tifffile.imwrite(
        buffer, array, photometric=kind, compression="zlib", description=json.dumps(values.metadata()), metadata=None
    )
    return buffer.getvalue()


def preview(values: DepthMap | NormalMap) -> Image.Image:
    """A picture to look at: near is red and far is blue (Spectral); normals as (n + 1) / 2 with x right, y up."""
    if isinstance(values, NormalMap):
        array = array_of(values.to_frame("rub"))
        return Image.fromarray(np.round((array.clip(-1, 1) + 1) * 127.5).astype(np.uint8))
    import matplotlib

    array = array_of(values).astype(np.float64)
    if values.metric:  # in disparity, where near things keep their differences
        array = 1 / array.clip(min=1e-6)
    low, high = np.percentile(array, [1, 99]) if values.metric else (0.0, 1.0)
    share = ((array - low) / max(high - low, 1e-12)).clip(0, 1)
    near = share if values.metric or values.near_is_one else 1 - share
    colours = matplotlib.colormaps["Spectral"](1 - near)[..., :3]
    return Image.fromarray(np.round(colours * 255).astype(np.uint8))


def preview_of_uncertainty(values: DepthMap | NormalMap) -> Image.Image:
    """Grey, white where the members of the ensemble agree least (the 99th percentile of this image).

    Raises:
        ValueError: the map comes from a single prediction.
    """
    if values.uncertainty is None:
        raise ValueError("there is no uncertainty: it needs an ensemble of at least two predictions")
    array = values.uncertainty.float().numpy()
    return Image.fromarray(np.round(255 * (array / max(np.percentile(array, 99), 1e-12)).clip(0, 1)).astype(np.uint8))


WRITERS: dict[str, tuple[str, Callable[[DepthMap | NormalMap], bytes]]] = {  # format -> (ending, writer)
    "png": (".png", png_bytes),
    "npy": (".npy", npy_bytes),
    "tiff": (".tiff", tiff_bytes),
}


def save_map(path: Path, values: DepthMap | NormalMap) -> None:
    """Write a map in the format that the ending names: ``.png``, ``.npy`` or ``.tiff``.

    Raises:
        ValueError: another ending, or values that the format does not hold.
    """
    writers = {ending: writer for ending, writer in WRITERS.values()}
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path}: a map is written as {', '.join(writers)}")
    write_whole(path, writers[path.suffix.lower()](values))
