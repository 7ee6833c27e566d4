"""Pixels in and out: reading images, bringing them to a network's canvas, and finding the way back.

Inside diffrep an image is RGB, float in [0, 1], (3, H, W). Files, PIL images and arrays come in through
`load_image`; `fit_image` resizes and pads as a `Sizing` says and returns the `Placement` that maps
points of the original image to the canvas and back.

Points are (x, y) in pixels; (0, 0) is the centre of the first pixel, (W - 1, H - 1) that of the last.
Sizes are (H, W). Videos come in and go out frame by frame, through PyAV (the extra ``video``).
"""

from __future__ import annotations

import glob
import io
import logging
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from diffrep.files import DRAWING, is_written_by_diffrep, optional_import, printable, write_whole
from diffrep.settings import MAX_CANVAS, Sizing

logger = logging.getLogger(__name__)

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"

MAX_PIXELS = 2**28  # 268 megapixels: above this a file is taken for a decompression bomb
LUMINANCE = (0.299, 0.587, 0.114)  # weights of red, green and blue, ITU-R BT.601

FORMATS = {  # that photographs come in, as Pillow calls them, and their endings; others are not even tried
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "GIF": (".gif",),
}
SUFFIXES = frozenset(ending for endings in FORMATS.values() for ending in endings)
_LACKING = {  # formats that a system may not read -> what reads them
    "AVIF": "a Pillow that has it",
    "WEBP": "a Pillow that has it",
    "HEIF": "pillow-heif: pip install 'diffrep[heif]'",
}

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"})

_MAP = re.compile(  # names of maps and masks that diffrep writes
    r"_(disparity|depth|normals|uncertainty|labels|mask|binary|edge|cutout|composite|\w+_preview)\.(png|tiff)$"
)

# values of the EXIF tag Orientation from 2 on -> what brings the image upright
_TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]


class ImageError(ValueError):
    """An image that cannot be read or used; the message names it."""


def load_image(
    source: ImageLike, *, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image as 8-bit RGB.

    The EXIF orientation is applied, transparency is composited on `background`, greyscale, palette, CMYK
    and 16-bit images are converted. Damaged metadata beside sound pixels are no reason to refuse an image.

    Args:
        source: a path; a PIL image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, uint16 or
            float in [0, 1]; or a tensor (3, H, W), float in [0, 1] or uint8.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        ImageError: the file is missing, empty, truncated, no image or too large, or the array has another
            shape, type or range.
    """
    if isinstance(source, Image.Image):
        with _decoding("the image"):
            return _to_rgb(source, background)
    if isinstance(source, Tensor):
        values = source.detach().cpu()
        if values.ndim != 3 or values.shape[0] not in (1, 3):
            raise ImageError(f"an image tensor must be (3, H, W), got {tuple(values.shape)}")
        if values.dtype == torch.bfloat16:  # which numpy lacks
            values = values.float()
        return _from_array(values.permute(1, 2, 0).numpy(), background)
    if isinstance(source, np.ndarray):
        return _from_array(source, background)
    if not isinstance(source, (str, os.PathLike)):
        kinds = "a path, a PIL image, an array or a tensor"
        raise ImageError(f"an image must be {kinds}, got {type(source).__name__}")
    path = Path(os.path.expanduser(source))
    name = printable(path)
    if not path.is_file():
        folder = "is not a file but a folder; `diffrep.images.find_images` lists the images in it"
        why = folder if path.is_dir() else "is not a file" if path.exists() else "no such image file"
        raise ImageError(f"{name}: {why}")
    if path.stat().st_size == 0:
        raise ImageError(f"{name}: the file is empty")
    return _decoded(path, name, background, max_pixels)


def decode_image(
    content: bytes, name: str, *, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image that is in memory, as `load_image` reads files; `name` stands for it in messages.

    Raises:
        ImageError: the content is empty, truncated, no image or too large.
    """
    name = printable(name)
    if not content:
        raise ImageError(f"{name}: the file is empty")
    return _decoded(io.BytesIO(content), name, background, max_pixels)


def _decoded(source: Path | io.BytesIO, name: str, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    with _decoding(name), Image.open(source, formats=_readable()) as image:
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}")
        image.load()
        return _to_rgb(image, background)


@lru_cache(maxsize=1)
def _readable() -> tuple[str, ...]:
    """The formats that can be read here."""
    Image.init()  # registers the plug-ins of all formats but HEIF
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(form for form in FORMATS if form in Image.OPEN)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Whatever a decoder raises, of whatever type, becomes an ImageError that begins with the image's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes below our own limit
            yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: has more pixels than Pillow reads") from None
    except Image.UnidentifiedImageError:
        for form in _LACKING.keys() - _readable():
            if name.lower().endswith(FORMATS[form]):
                raise ImageError(f"{name}: reading {form} needs {_LACKING[form]}") from None
        raise ImageError(f"{name}: is not an image that can be read ({', '.join(_readable())})") from None
    except Exception as error:  # decoders of broken files raise anything, from struct.error to NotImplementedError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded ({reason})") from None


def _from_array(array: np.ndarray, background: tuple[int, int, int]) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ImageError(f"an image array must be (H, W), (H, W, 3) or (H, W, 4), got {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.uint16:
        array = np.round(array / 257.0).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails too
            raise ImageError(f"a float image must lie in [0, 1], got [{low:.4g}, {high:.4g}]")
        array = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"an image array must be uint8, uint16 or float, got {array.dtype}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), background)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"has no pixels, its size is {image.width} x {image.height}")
    image = upright(image)
    if image.mode.startswith("I"):  # 16 or 32 bits of integer; what is larger than 16 bits has no known range
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"integer pixels must lie in 0..65535, got {values.min()}..{values.max()}")
        image = Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    elif image.mode == "F":
        return _from_array(np.asarray(image), background)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF tag says, in its own mode; a tag that cannot be read counts as none.

    Pillow's `exif_transpose` rewrites all tags, and one that is damaged stops it. Of the metadata only the transparency
    goes with a turned image: what is read once more must not be turned once more.
    """
    if (turn := orientation(image)) == 1:
        return image
    turned = image.transpose(Image.Transpose[_TURNS[turn - 2]])
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}
    return turned


def orientation(image: Image.Image) -> int:
    """The number from 1 to 8 that says how an image lies; 1, upright, where the tag is missing, odd or damaged."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return int(turn) if turn in range(2, 9) else 1


def find_images(sources: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Image files named by paths, folders and glob patterns, each once, in sorted order of each source.

    A folder is searched with those in it for the endings of `FORMATS`. Hidden files and folders (editors' copies, the
    sidecars of other systems) and maps, masks and drawings that diffrep wrote into a folder are left out unless named.
    A file that several spellings lead to (``..``, links to folders) is taken under the first.

    Raises:
        ImageError: a path does not exist, or a folder or pattern has no image.
    """
    files: dict[tuple[str, str], Path] = {}
    real: dict[Path, str] = {}  # folder -> where it lies, looked up once per folder and not once per image
    for source in map(os.path.expanduser, sources):
        path = Path(source)
        if not str(source):
            raise ImageError("the name of an image or folder is empty")
        if path.is_dir():
            matches = images_below(path)
        elif path.is_file():
            matches = [path]
        elif path.exists():  # a pipe would be waited for
            raise ImageError(f"{printable(path)}: is neither a file nor a folder")
        elif any(c in str(source) for c in "*?["):
            matches = sorted(p for p in map(Path, glob.glob(str(source), recursive=True)) if p.is_file())
        else:
            raise ImageError(f"{printable(path)}: no such file or folder")
        if not matches:
            own = "; maps, masks and drawings that diffrep wrote are passed over unless they are named"
            looked_for = ", ".join(sorted(SUFFIXES)) + ")" + (own if path.is_dir() else "")
            raise ImageError(f"{printable(source)}: no image found (looked for {looked_for}")
        for match in matches:
            if match.parent not in real:
                real[match.parent] = os.path.realpath(match.parent)
            files.setdefault((real[match.parent], match.name), match)
    return list(files.values())


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and the folders in it, sorted; see `find_images`. What cannot be opened is said."""

    def closed(error: OSError) -> None:
        name = printable(error.filename)
        if Path(error.filename) == folder:
            raise ImageError(f"{name}: the folder cannot be read ({error.strerror})")
        logger.warning("%s: passed over, the folder cannot be read (%s)", name, error.strerror)

    matches = []
    for parent, folders, files in os.walk(folder, onerror=closed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in files if not name.startswith(".") and is_image(name))
        matches += [path for path in paths if path.is_file() and not _is_own(path)]
    return sorted(matches)


def _is_own(path: Path) -> bool:
    """Whether diffrep made a picture of another image: a map or mask, by its name, or a drawing."""
    if _MAP.search(path.name):
        return is_written_by_diffrep(path)
    return path.suffix in (".png", ".jpg", ".jpeg", ".webp") and is_written_by_diffrep(path, DRAWING)


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


@dataclass(frozen=True)
class Placement:
    """How an image lies on a network's canvas after resizing and padding."""

    image_size: tuple[int, int]  # (H, W) of the original image
    canvas_size: tuple[int, int]  # (H, W) of what the network saw
    content_box: tuple[float, float, float, float]  # x0, y0, x1, y1: the image's edges on the canvas, in pixels

    @classmethod
    def identity(cls, size: tuple[int, int]) -> Placement:
        """The canvas is the image itself."""
        return cls(size, size, (0.0, 0.0, float(size[1]), float(size[0])))

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas pixels per image pixel, (x, y)."""
        x0, y0, x1, y1 = self.content_box
        return (x1 - x0) / self.image_size[1], (y1 - y0) / self.image_size[0]

    def to_canvas(self, points: Tensor) -> Tensor:
        """Map (..., 2) points in image pixels to canvas pixels, float32 or wider."""
        points, scale, offset = self._wide(points)
        return (points + 0.5) * scale + offset - 0.5

    def to_image(self, points: Tensor) -> Tensor:
        """Map (..., 2) points in canvas pixels to image pixels; what lies on the padding falls outside."""
        points, scale, offset = self._wide(points)
        return (points + 0.5 - offset) / scale - 0.5

    def _wide(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        return points, points.new_tensor(self.scale), points.new_tensor(self.content_box[:2])


def fit_image(image: Image.Image, sizing: Sizing) -> tuple[Tensor, Placement]:
    """Bring an RGB image to the canvas.

    Returns:
        uint8 (3, H, W) canvas, and where the image lies on it.
    """
    width, height = image.size
    side: Any = sizing.size  # an int but for squash, checked by Sizing
    if sizing.mode == "native":
        resized_height, resized_width = height, width
    elif sizing.mode == "squash":
        resized_height, resized_width = side if isinstance(side, tuple) else (side, side)
    else:  # Python's round goes half to even, as the published loaders' numpy does
        resized_height, resized_width = (max(1, round(side * n / max(image.size))) for n in (height, width))
    if resized_height * resized_width > MAX_CANVAS:
        raise ImageError(f"an image of {width} x {height} pixels makes a canvas of more than {MAX_CANVAS:,} pixels")
    if (resized_width, resized_height) != image.size:
        image = image.resize((resized_width, resized_height), Image.Resampling[sizing.resample.upper()])
    pixels = np.array(image)
    top = left = bottom = right = 0
    if sizing.mode == "pad":
        top, left = (side - resized_height) // 2, (side - resized_width) // 2
        bottom, right = side - resized_height - top, side - resized_width - left
    elif sizing.mode != "squash":
        bottom, right = -resized_height % sizing.multiple, -resized_width % sizing.multiple
    if top or left or bottom or right:
        edge = sizing.mode != "pad" or sizing.fill == "edge"
        pixels = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge" if edge else "constant")
    box = (float(left), float(top), float(left + resized_width), float(top + resized_height))
    placement = Placement((height, width), pixels.shape[:2], box)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), placement


def stack_pixels(canvases: Sequence[Tensor]) -> Tensor:
    """uint8 canvases (3, H, W) of one size -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.stack(list(canvases)).float() / 255


def shrink(pixels: Tensor, levels: int) -> list[Tensor]:
    """Images and their versions at 1/2, 1/4, ... of the size, bilinear, without antialiasing as published."""
    height, width = pixels.shape[-2:]
    smaller = [
        F.interpolate(pixels, size=(height // 2**k, width // 2**k), mode="bilinear", align_corners=False)
        for k in range(1, levels + 1)
    ]
    return [pixels, *smaller]


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image whose short side has been brought to `size` pixels, as guided-diffusion's loader.

    Large images are halved with a box filter before one bicubic resize.
    """
    image = _halved(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, random: Random, *, least: float = 0.8) -> Image.Image:
    """A random square of an image whose short side has been brought to a random length, as guided-diffusion's loader.

    Args:
        random: gives the short side, drawn from [size, ceil(size / least)], then the top, then the left edge.
        least: the smallest share of the short side that the crop shows.
    """
    image = _halved(image, random.randrange(size, math.ceil(size / least) + 1))
    top = random.randrange(image.height - size + 1)
    left = random.randrange(image.width - size + 1)
    return image.crop((left, top, left + size, top + size))


def _halved(image: Image.Image, short: int) -> Image.Image:
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a path ends as videos do.

    >>> is_video("clip.MP4"), is_video("photo.png")
    (True, False)
    """
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def read_frames(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The frames of a video, RGB, in order.

    Raises:
        ImageError: it cannot be decoded, or has no picture in it.
        ImportError: PyAV is not installed.
    """
    with _opened(path) as container:
        if not container.streams.video:
            raise ImageError(f"{path}: has no pictures in it")
        try:
            for frame in container.decode(container.streams.video[0]):
                yield frame.to_image()
        except _av().error.FFmpegError as error:
            raise ImageError(f"{path}: cannot be decoded ({error})") from None


def frame_rate(path: str | os.PathLike[str]) -> Fraction:
    """Frames per second; 25 where the file does not say.

    Raises:
        ImageError: it cannot be opened.
        ImportError: PyAV is not installed.
    """
    with _opened(path) as container:
        rates = [stream.average_rate for stream in container.streams.video]
        return Fraction(rates[0] or 25) if rates else Fraction(25)


def write_video(path: str | os.PathLike[str], frames: Iterable[Image.Image], rate: Fraction | int = 25) -> int:
    """Write a video, whole or not at all: H.264 (``.webm``: VP9).

    Args:
        frames: RGB. What has another size than the first is scaled and gets black bars, which a warning says; an odd
            side loses its last row or column, as the codecs want it.

    Returns:
        How many frames it has.

    Raises:
        ValueError: there is no frame.
        ImportError: PyAV is not installed.
    """
    count, mixed = 0, False

    def encode(partial: Path) -> None:
        nonlocal count, mixed
        with _av().open(os.fspath(partial), "w") as container:
            stream = container.add_stream("libvpx-vp9" if partial.suffix == ".webm" else "libx264", rate=rate)
            stream.pix_fmt = "yuv420p"
            size = None
            for image in frames:
                if size is None:
                    size = image.size
                    stream.width, stream.height = max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2)
                if image.size != size:
                    if not mixed:
                        logger.warning("%s: frames of other sizes than the first's %d x %d get bars", path, *size)
                    mixed, image = True, ImageOps.pad(image.convert("RGB"), size)
                even = image.convert("RGB").crop((0, 0, stream.width, stream.height))
                container.mux(stream.encode(_av().VideoFrame.from_image(even)))
                count += 1
            if not count:
                raise ValueError(f"{path}: there is no frame to write")
            container.mux(stream.encode())

    write_whole(path, encode)
    return count


def _opened(path: str | os.PathLike[str]) -> Any:
    av = _av()
    try:
        return av.open(os.fspath(path))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ImageError(f"{path}: is not a video that can be read ({error})") from None


def _av() -> Any:
    with optional_import('videos need PyAV: pip install "diffrep[video]"'):
        import av
    return av
