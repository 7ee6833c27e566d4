"""Pixels in and out: reading images, bringing them to a network's canvas, and finding the way back.

Inside diffrep an image is RGB, float in [0, 1], (3, H, W). Files, PIL images and arrays come in through
`load_image`; `fit_image` resizes and pads as a `Sizing` says and returns the `Placement` that maps
points of the original image to the canvas and back.

Points are (x, y) in pixels; (0, 0) is the centre of the first pixel, (W - 1, H - 1) that of the last.
Sizes are (H, W).
"""

from __future__ import annotations

import glob
import importlib.util
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.files import printable
from diffrep.settings import MAX_CANVAS, Sizing

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
_PLUGINS = {"AVIF": "PIL._avif", "WEBP": "PIL._webp", "HEIF": "pillow_heif"}  # that a system may lack
SUFFIXES = frozenset(
    ending
    for form, endings in FORMATS.items()
    if form not in _PLUGINS or importlib.util.find_spec(_PLUGINS[form]) is not None
    for ending in endings
)

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # its value -> what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    path = Path(source)
    name = printable(path)
    if not path.is_file():
        raise ImageError(f"{name}: no such image file" if not path.exists() else f"{name}: is not a file")
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
    Image.init()  # registers the plug-ins of all formats
    with _decoding(name), Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN]) as image:
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}")
        image.load()
        return _to_rgb(image, background)


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
        raise ImageError(f"{name}: is not an image that can be read ({', '.join(FORMATS)})") from None
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
            raise ImageError(f"integer pixels must lie in 0..65535, got up to {values.max()}")
        image = Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    elif image.mode == "F":
        return _from_array(np.asarray(image), background)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF tag says, in its own mode; a tag that cannot be read counts as none.

    Pillow's `exif_transpose` rewrites all tags, and one that is damaged stops it.
    """
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def find_images(sources: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Image files named by paths, folders and glob patterns, each once, in sorted order of each source.

    A folder is searched with those in it for the endings of images that can be read here. Hidden files and folders
    (editors' copies, the sidecars of other systems) are left out unless they are named. A file that several
    spellings lead to (``..``, links to folders) is taken under the first.

    Raises:
        ImageError: a path does not exist, or a folder or pattern has no image.
    """
    files: dict[tuple[str, str], Path] = {}
    real: dict[Path, str] = {}  # folder -> where it lies, looked up once per folder and not once per image
    for source in sources:
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
            raise ImageError(f"{printable(source)}: no image found (looked for {', '.join(sorted(SUFFIXES))})")
        for match in matches:
            if match.parent not in real:
                real[match.parent] = os.path.realpath(match.parent)
            files.setdefault((real[match.parent], match.name), match)
    return list(files.values())


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and the folders in it, sorted; see `find_images`."""
    matches = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        matches += [Path(parent, name) for name in files if not name.startswith(".") and is_image(name)]
    return sorted(path for path in matches if path.is_file())


def is_image(name: str) -> bool:
    """Whether a file's name ends as images that can be read here do."""
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
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        scale, offset = points.new_tensor(self.scale), points.new_tensor(self.content_box[:2])
        return (points + 0.5) * scale + offset - 0.5

    def to_image(self, points: Tensor) -> Tensor:
        """Map (..., 2) points in canvas pixels to image pixels; what lies on the padding falls outside."""
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        scale, offset = points.new_tensor(self.scale), points.new_tensor(self.content_box[:2])
        return (points + 0.5 - offset) / scale - 0.5


def fit_image(image: Image.Image, sizing: Sizing) -> tuple[Tensor, Placement]:
    """Bring an RGB image to the canvas.

    Returns:
        uint8 (3, H, W) canvas, and where the image lies on it.
    """
    width, height = image.size
    resized_height, resized_width = _resized_size(height, width, sizing)
    if resized_height * resized_width > MAX_CANVAS:
        raise ImageError(f"an image of {width} x {height} pixels makes a canvas of more than {MAX_CANVAS:,} pixels")
    if (resized_width, resized_height) != image.size:
        image = image.resize((resized_width, resized_height), _RESAMPLE[sizing.resample])
    pixels = np.array(image)
    top = left = bottom = right = 0
    if sizing.mode == "pad":
        side = int(sizing.size)  # type: ignore[arg-type]  # pad has an int size, checked by Sizing
        top, left = (side - resized_height) // 2, (side - resized_width) // 2
        bottom, right = side - resized_height - top, side - resized_width - left
    elif sizing.mode in ("fit", "native"):
        bottom, right = -resized_height % sizing.multiple, -resized_width % sizing.multiple
    if top or left or bottom or right:
        edge = sizing.mode != "pad" or sizing.fill == "edge"
        pixels = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge" if edge else "constant")
    box = (float(left), float(top), float(left + resized_width), float(top + resized_height))
    placement = Placement((height, width), pixels.shape[:2], box)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), placement


def _resized_size(height: int, width: int, sizing: Sizing) -> tuple[int, int]:
    if sizing.mode == "native":
        return height, width
    if sizing.mode == "squash":
        return sizing.size if isinstance(sizing.size, tuple) else (int(sizing.size), int(sizing.size))  # type: ignore[arg-type]
    side = int(sizing.size)  # type: ignore[arg-type]
    long = max(height, width)
    # Python's round goes half to even, as the published loaders' numpy does
    return max(1, round(side * height / long)), max(1, round(side * width / long))


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
