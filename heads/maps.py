"""What depth and normal heads give: maps that know what they measure, show themselves and are written into files.

As files they are 16-bit PNG, NPY or float TIFF; each says what it measures.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.alignment import LEAST_DISPARITY, Space, fit_robust, fit_scale_shift
from diffrep.files import MARK, one_line, optional_import, shortened, write_whole
from diffrep.heads.families import FRAME_SIGNS, Frame
from diffrep.pictures import png16
from diffrep.results import Result, read_array

MILLIMETRES = 1000  # a metric 16-bit PNG counts these per metre, as the public data sets do
_FULL = 65535


class _Map(Result):
    """What both kinds of maps share."""

    MAIN = "values"

    values: Tensor
    uncertainty: Tensor | None

    def metadata(self) -> dict[str, object]:
        """What a reader of the values must know, JSON-ready."""
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
        def writer(content: Callable[[Any], bytes]) -> Callable[[Path], object]:
            return lambda path: path.write_bytes(content(self))

        measured = {ending: writer(content) for ending, content in WRITERS.values()}
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
        unit, count = ("metres", "metres") if self.metric else ("relative, up to an unknown scale and shift", "value")
        return {
            "kind": self.space,
            "unit": unit,
            "large_values_are": "near" if self.near_is_one else "far",
            "png": f"{count} = count / {MILLIMETRES if self.metric else _FULL}",
            "settings": dict(self.settings),
        }

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
        if valid is not None:
            keep = keep & valid
        if (known := int(keep.sum())) < 2:
            raise ValueError(f"scale and shift need at least two known depths, got {known}")
        target = torch.where(keep, reference.float(), 1.0)
        inverse = self.space == "disparity"
        target = 1 / target if inverse else target
        fit = fit_robust if method == "robust" else fit_scale_shift
        scale, shift = (x.item() for x in fit(self.values[None], target[None], keep[None]))
        if scale <= 0:
            raise ValueError(
                f"the fitted scale is {scale:.3g}: the known depths contradict the map (is it a {self.space} map, and"
                " are they metres?)"
            )
        values = scale * self.values + shift
        if inverse:
            values = 1 / values.clamp(min=LEAST_DISPARITY)
        fitted = f"{'1 / (' * inverse}scale * {self.space} + shift{')' * inverse}"
        settings = {**self.settings, "scale": scale, "shift": shift, "metres": fitted}
        settings |= {"fit": method, "known_depths": known}
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

    kind = "normals"  # what is measured

    values: Tensor
    frame: Frame
    uncertainty: Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    def metadata(self) -> dict[str, object]:
        about = {"kind": self.kind, "frame": self.frame, "axes": AXES[self.frame]}
        return {**about, "png": f"value = count / {_FULL} * 2 - 1", "settings": dict(self.settings)}

    def picture(self) -> Image.Image:
        """The normals as colours, (n + 1) / 2, with x right and y up whatever the frame."""
        array = array_of(self.to_frame("rub"))
        return Image.fromarray(np.round((array.clip(-1, 1) + 1) * 127.5).astype(np.uint8))

    def to_frame(self, frame: Frame) -> NormalMap:
        """The same normals in other camera axes."""
        return dataclasses.replace(self, values=change_frame(self.values, self.frame, frame), frame=frame)


def change_frame(vectors: Tensor, source: Frame, target: Frame) -> Tensor:
    """(..., 3, H, W) vectors in other camera axes."""
    signs = [a * b for a, b in zip(FRAME_SIGNS[source], FRAME_SIGNS[target], strict=True)]
    return vectors * vectors.new_tensor(signs)[:, None, None]


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
        counts = (array + 1) * (_FULL / 2)
    elif values.metric:
        counts = array * MILLIMETRES
        if counts.max() > _FULL:
            raise ValueError(
                f"a 16-bit PNG holds up to 65.535 m, the map reaches {array.max():.1f} m; write npy or tiff instead"
            )
    else:
        counts = array * _FULL
    pixels = np.round(counts.clip(0, _FULL)).astype(np.uint16).reshape(*array.shape[:2], -1)
    note = MARK.encode() + b"\0" + json.dumps(values.metadata()).encode("latin-1", "replace")
    return png16(pixels, {b"tEXt": note}, differences=True)


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
    with optional_import('writing TIFF needs tifffile: pip install "diffrep[dense]"'):
        import tifffile
    array, note, buffer = array_of(values), json.dumps(values.metadata()), io.BytesIO()
    kind = "minisblack" if array.ndim == 2 else "rgb"
    about: dict[str, Any] = {"photometric": kind, "software": MARK, "description": note, "metadata": None}
    tifffile.imwrite(buffer, array, compression="zlib", **about)
    return buffer.getvalue()


WRITERS: dict[str, tuple[str, Callable[[DepthMap | NormalMap], bytes]]] = {  # format -> (ending, writer)
    "png": (".png", png_bytes),
    "npy": (".npy", npy_bytes),
    "tiff": (".tiff", tiff_bytes),
}


def preview(values: DepthMap | NormalMap) -> Image.Image:
    """The picture of a map, see `DepthMap.picture`."""
    return values.picture()


def save_map(path: Path, values: DepthMap | NormalMap) -> None:
    """Write a map in the format that the ending names: ``.png``, ``.npy`` or ``.tiff``.

    Raises:
        ValueError: another ending, or values that the format does not hold.
    """
    writers = {ending: writer for ending, writer in WRITERS.values()}
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path}: a map is written as {', '.join(writers)}")
    write_whole(path, writers[path.suffix.lower()](values))


def nearest_known(known: Tensor) -> Tensor:
    """(H, W): every pixel takes the value of the nearest that is above 0; what is left is 0 where none is."""
    from scipy.ndimage import distance_transform_edt

    if not bool((known > 0).any()):
        return torch.zeros_like(known)
    rows, columns = distance_transform_edt((known <= 0).numpy(), return_distances=False, return_indices=True)
    return known[torch.from_numpy(rows), torch.from_numpy(columns)]


# -- known depths, for example of a lidar, that make a relative map metric ----------------------------------


class KnownDepthError(ValueError):
    """Known depths that are missing, cannot be read or do not belong to the image; the message names the file."""


def known_files(source: Path, images: Mapping[Path, Iterable[Path]]) -> dict[Path, Path]:
    """Which file of known depths belongs to which image.

    Args:
        source: one file, or a folder that has a file for each image, laid out as the images are, or flat.
        images: image -> its paths below their folder, without an ending, the most exact first.

    Returns:
        Image -> its file, for the images that have one.

    Raises:
        KnownDepthError: two images would get one file.
    """
    owners: dict[Path, Path] = {}
    for image, names in images.items():
        file = _known_file(source, image, names) if source.is_dir() else source
        if file in owners:
            raise KnownDepthError(f"{file}: known depths of two images, {owners[file]} and {image}: which one is it?")
        if file is not None:
            owners[file] = image
    return {image: file for file, image in owners.items()}


def _known_file(folder: Path, image: Path, names: Iterable[Path]) -> Path | None:
    """The first that exists of FOLDER/NAME.ENDING; flat, by the image's own name, at last."""
    stems = (folder / name for name in (*names, Path(image.stem)))
    candidates = (stem.with_name(f"{stem.name}{ending}") for stem in stems for ending in KNOWN_READERS)
    return next((file for file in candidates if file.is_file()), None)


def read_known_depths(source: Path, image: Path, size: tuple[int, int], *, per_metre: float = 1000.0) -> Tensor:
    """Known depths of an image as a map.

    Args:
        source: ``.npy``, (H, W) metres, floating point; ``.png``, 16 bits, millimetres unless `per_metre` says
            otherwise; ``.csv``, UTF-8, lines x,y,metres with x, y in pixels of the image; or a folder with such a file
            for each image, of the same name.
        image: the image's path, for its name.
        size: (width, height) of the image.
        per_metre: counts of a ``.png`` that make a metre.

    Returns:
        (H, W) float32 metres; 0 where nothing is known.

    Raises:
        KnownDepthError: the file is missing, cannot be read, is of another size than the image, or holds millimetres.
    """
    width, height = size
    if source.is_dir():
        if (file := _known_file(source, image, ())) is None:
            raise KnownDepthError(f"{source}: has no known depths for {image.name} ({image.stem}.npy, .png or .csv)")
        source = file
    if not source.is_file() or source.suffix.lower() not in KNOWN_READERS:
        raise KnownDepthError(f"{source}: known depths are a file that ends in {', '.join(KNOWN_READERS)}")
    try:
        array = KNOWN_READERS[source.suffix.lower()](source, height, width, per_metre)
    except Exception as error:  # whatever the readers of damaged files raise
        raise KnownDepthError(f"{source}: cannot be read as known depths ({one_line(error)})") from None
    if array.shape != (height, width):
        raise KnownDepthError(f"{source}: has the shape {array.shape}, its image {(height, width)}")
    array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    known = array[array > 0]
    if known.size and np.median(known) > _FARTHEST:
        raise KnownDepthError(
            f"{source}: known depths are metres, half of these are above {np.median(known):g}: are they millimetres?"
        )
    return torch.from_numpy(array)


def _from_npy(file: Path, height: int, width: int, per_metre: float) -> np.ndarray:
    array = read_array(file)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"they are metres in floating point, this array is {array.dtype}")
    return array.astype(np.float32)


def _from_png(file: Path, height: int, width: int, per_metre: float) -> np.ndarray:
    with Image.open(file) as opened:
        if not opened.mode.startswith("I"):
            raise ValueError(f"a depth picture has one channel of 16 bits, this one is of mode {opened.mode}")
        return np.asarray(opened).astype(np.float32) / np.float32(per_metre)


def _from_csv(file: Path, height: int, width: int, per_metre: float) -> np.ndarray:
    depths, unit = np.zeros((height, width), dtype=np.float32), 1.0
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = [word.strip() for word in line.split(",")]
        if not any(words):
            continue
        try:
            x, y, metres = map(float, words)
        except ValueError:
            if number > 1 or len(words) != 3 or not re.match(r"[A-Za-z\"']", words[0]):
                raise ValueError(f"line {number} is {shortened(line)}, not x,y,metres") from None
            unit = 1000.0 if re.search(r"\bmm\b|millimet", words[2].lower()) else 1.0  # a line of names
            continue
        if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):  # written so that NaN fails too
            raise ValueError(f"line {number} lies at {x:g}, {y:g}, outside the image of {width} x {height}")
        depths[min(max(round(y), 0), height - 1), min(max(round(x), 0), width - 1)] = metres / unit
    return depths


KNOWN_READERS = {".npy": _from_npy, ".png": _from_png, ".csv": _from_csv}  # ending -> reader
_FARTHEST = 1000.0  # metres: known depths that are mostly farther are taken for millimetres, and refused
