"""What depth and normal heads give: maps that know what they measure, show themselves and are written into files.

As files they are 16-bit PNG, NPY or float TIFF; each says what it measures.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffrep.alignment import LEAST_DISPARITY, Space, fit_robust, fit_scale_shift
from diffrep.files import MARK, write_whole
from diffrep.heads.families import FRAME_SIGNS, Frame
from diffrep.results import Result

MILLIMETRES = 1000  # a metric 16-bit PNG counts these per metre, as the public data sets do
_FULL = 65535


class _Map(Result):
    """What both kinds of maps share."""

    MAIN = "values"

    values: Tensor
    uncertainty: Tensor | None

    def metadata(self) -> dict[str, object]:
        """What a reader of the values must know."""
        raise NotImplementedError

    def uncertainty_picture(self) -> Image.Image:
        """Grey, white where the members of the ensemble agree least (the 99th percentile of this image).

        Raises:
            ValueError: the map comes from a single prediction.
        """
        if self.uncertainty is None:
            raise ValueError("there is no uncertainty: it needs an ensemble of at least two predictions")
        array = self.uncertainty.float().numpy()
        share = (array / max(np.percentile(array, 99), 1e-12)).clip(0, 1)
        return Image.fromarray(np.round(255 * share).astype(np.uint8))

    def _writers(self) -> dict[str, Callable[[Path], object]]:
        measured = {ending: partial(_write_bytes, write, self) for ending, write in WRITERS.values()}
        return {**super()._writers(), **measured, ".tif": measured[".tiff"]}


@dataclass(frozen=True, repr=False)
class DepthMap(_Map):
    """Depth or disparity of one image.

    Attributes:
        values: (H, W) float32. Relative: in [0, 1], up to an unknown scale and shift. Metric: metres.
        space: "depth" grows with the distance (0 near, 1 far), "disparity" falls with it (1 near, 0 far).
        metric: values are metres along the optical axis (`space` is "depth" then).
        uncertainty: (H, W) spread of an ensemble in the unit of `values`, or None.
        settings: what made the map, JSON-ready.
    """

    values: Tensor
    space: Space
    metric: bool = False
    uncertainty: Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What is measured: "depth" or "disparity"."""
        return self.space

    @property
    def near_is_one(self) -> bool:
        """Large values are near."""
        return self.space == "disparity"

    def metadata(self) -> dict[str, object]:
        """What a reader of the values must know."""
        unit = "metres" if self.metric else "relative, up to an unknown scale and shift"
        large = "near" if self.near_is_one else "far"
        return {"kind": self.space, "unit": unit, "large_values_are": large, "settings": dict(self.settings)}

    def align(
        self, reference: Tensor, valid: Tensor | None = None, *, method: Literal["least squares", "robust"] = "robust"
    ) -> DepthMap:
        """Metric depth by scale and shift fitted to known depths, for example sparse ones of a lidar.

        Fitted in the map's own space: a disparity map to 1 / reference.

        Args:
            reference: (H, W), metres; what is not finite or not positive does not count.
            valid: (H, W) bool, further pixels that do not count; None: all do.
            method: "robust" is hardly moved by wrong references (see `diffrep.alignment.fit_robust`).

        Raises:
            ValueError: another shape, fewer than two known depths, or a fit that turns near and far around.
        """
        if self.metric:
            raise ValueError("this map is metric already")
        if reference.shape != self.values.shape:
            raise ValueError(
                f"the known depths must be {tuple(self.values.shape)} like the map, got {tuple(reference.shape)}"
            )
        keep = torch.isfinite(reference) & (reference > 0)
        keep = keep if valid is None else keep & valid
        if int(keep.sum()) < 2:
            raise ValueError(f"scale and shift need at least two known depths, got {int(keep.sum())}")
        target = torch.where(keep, reference.float(), 1.0)
        target = 1 / target if self.space == "disparity" else target
        fit = fit_robust if method == "robust" else fit_scale_shift
        scale, shift = (x.item() for x in fit(self.values[None], target[None], keep[None]))
        if scale <= 0:
            raise ValueError(
                f"the fitted scale is {scale:.3g}: the known depths contradict the map (is it a {self.space} map, and"
                " are they metres?)"
            )
        values = scale * self.values + shift
        if self.space == "disparity":
            values = 1 / values.clamp(min=LEAST_DISPARITY)
        settings = {**self.settings, "scale": scale, "shift": shift, "fit": method, "known_depths": int(keep.sum())}
        return DepthMap(values.clamp(min=0), "depth", metric=True, settings=settings)

    def relative_depth(self, nearest: float = 1.0, farthest: float = 10.0) -> Tensor:
        """(H, W) positive depth for a picture in space, between an assumed nearest and farthest distance.

        A relative map does not know its scale and shift, so the shape in depth is a guess; metric maps are returned
        as they are.
        """
        if self.metric:
            return self.values
        if self.space == "disparity":
            return 1 / (self.values * (1 / nearest - 1 / farthest) + 1 / farthest)
        return nearest + self.values * (farthest - nearest)

    def picture(self) -> Image.Image:
        """The map in colours: near is red and far is blue (Spectral)."""
        import matplotlib

        array = array_of(self).astype(np.float64)
        if self.metric:  # in disparity, where near things keep their differences
            array = 1 / array.clip(min=1e-6)
        low, high = np.percentile(array, [1, 99]) if self.metric else (0.0, 1.0)
        share = ((array - low) / max(high - low, 1e-12)).clip(0, 1)
        near = share if self.metric or self.near_is_one else 1 - share
        colours = matplotlib.colormaps["Spectral"](1 - near)[..., :3]
        return Image.fromarray(np.round(colours * 255).astype(np.uint8))


@dataclass(frozen=True, repr=False)
class NormalMap(_Map):
    """Surface normals of one image.

    Attributes:
        values: (3, H, W) float32; of unit length unless predicted with `official`.
        frame: their camera axes.
        uncertainty: (H, W) mean angle of an ensemble's members to their mean direction divided by pi, or None.
        settings: what made the map, JSON-ready.
    """

    values: Tensor
    frame: Frame
    uncertainty: Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    def metadata(self) -> dict[str, object]:
        """What a reader of the values must know."""
        return {"kind": self.kind, "frame": self.frame, "axes": AXES[self.frame], "settings": dict(self.settings)}

    @property
    def kind(self) -> str:
        """What is measured."""
        return "normals"

    def picture(self) -> Image.Image:
        """The normals as colours, (n + 1) / 2, with x right and y up whatever the frame."""
        array = array_of(self.to_frame("rub"))
        return Image.fromarray(np.round((array.clip(-1, 1) + 1) * 127.5).astype(np.uint8))

    def to_frame(self, frame: Frame) -> NormalMap:
        """The same normals in other camera axes."""
        signs = [a * b for a, b in zip(FRAME_SIGNS[self.frame], FRAME_SIGNS[frame], strict=True)]
        values = self.values * self.values.new_tensor(signs)[:, None, None]
        return dataclasses.replace(self, values=values, frame=frame)


def facing_camera(like: Tensor, frame: Frame) -> Tensor:
    """The normal (3, 1, 1) of a surface that faces the camera."""
    return like.new_tensor([0, 0, FRAME_SIGNS[frame][2]]).view(3, 1, 1)


def unit_length(normals: Tensor, frame: Frame) -> Tensor:
    """(..., 3, h, w) divided by their length; what has none faces the camera."""
    length = normals.norm(dim=-3, keepdim=True)
    return torch.where(length > 1e-6, normals / length.clamp(min=1e-6), facing_camera(normals, frame))


AXES: dict[Frame, str] = {
    "lub": "x left, y up, z towards the camera",
    "rub": "x right, y up, z towards the camera",
    "rdf": "x right, y down, z forward",
}


def _write_bytes(write: Callable[[DepthMap | NormalMap], bytes], values: Any, path: Path) -> None:
    path.write_bytes(write(values))


def array_of(values: DepthMap | NormalMap) -> np.ndarray:
    """float32, (H, W) or (H, W, 3)."""
    tensor = values.values if isinstance(values, DepthMap) else values.values.permute(1, 2, 0)
    return np.ascontiguousarray(tensor.float().numpy())


def png_bytes(values: DepthMap | NormalMap) -> bytes:
    """A 16-bit PNG with the metadata in its text chunk `MARK`.

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
        text.add_text(MARK, note)
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
    text = MARK.encode() + b"\0" + note.encode("latin-1", "replace")
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
        buffer, array, photometric=kind, compression="zlib", software=MARK,
        description=json.dumps(values.metadata()), metadata=None,
    )  # fmt: skip
    return buffer.getvalue()


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
