"""Photographs with all that is in their files: 16 bits, transparency, orientation, EXIF tags and the colour profile."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from torch import Tensor

from diffrep.files import marked_exif, one_line, write_whole
from diffrep.images import ImageError, ImageLike, decode_image, load_image, orientation, upright
from diffrep.pictures import PNG, png16
from diffrep.results import Result

_LAYOUT = (  # of TIFF
    *range(254, 260), 262, 266, 273, *range(277, 281), 284, 317, 320, *range(322, 326), 338, 339, 34675,
)  # fmt: skip
_TURNS: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF's numbers
    2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1], 7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Photograph(Result):
    """An upright image.

    Attributes:
        pixels: (H, W, 3) uint8 or uint16, RGB.
        alpha: (H, W) of the same kind; None where it is opaque.
        exif: tags without the orientation, as files hold them; icc: the colour profile.
        grey: its file holds one channel, which it is saved with again.
    """

    MAIN = "pixels"

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    exif: bytes = b""
    icc: bytes | None = None
    grey: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(W, H), as Pillow has it."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def levels(self) -> int:
        """The largest value, 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)

    @classmethod
    def open(cls, source: ImageLike | Photograph) -> Photograph:
        """Read a file, or take over an image in memory.

        Raises:
            ImageError: as `diffrep.images.load_image` has it.
        """
        if isinstance(source, Photograph):
            return source
        if not isinstance(source, (str, os.PathLike)):
            image = source if isinstance(source, Image.Image) else load_image(source)
            return cls._of(image, image)
        source = os.path.expanduser(source)
        load_image(source)  # refuses what is missing, damaged or too large, in one line
        content = Path(source).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            turn = orientation(image)
            image.load()  # which turns a TIFF
            bits = image.tag_v2.get(258, ()) if isinstance(image, TiffImageFile) else ()
            photograph = cls._of(image, decode_image(content, str(source)))
        if len(bits) > 1 and set(bits) == {16}:
            return replace(photograph, **_upright_parts(_tiff_pixels(content, str(source)), turn))
        if content.startswith(PNG) and content[24] == 16 and content[25] in (2, 4, 6):
            return replace(photograph, grey=content[25] == 4, **_upright_parts(_png_pixels(content), turn))
        return photograph

    @classmethod
    def _of(cls, image: Image.Image, plain: Image.Image) -> Photograph:
        """Of an image as its file has it; `plain` serves where its mode says nothing more."""
        turned = upright(image)
        icc = None if image.mode in ("CMYK", "YCbCr", "LAB") else image.info.get("icc_profile")  # of other colours
        about: dict[str, Any] = {"exif": _tags(image), "icc": icc}
        if turned.mode.startswith("I;16") or turned.mode == "I":
            values = np.asarray(turned).astype(np.uint16)
            return cls(np.repeat(values[..., None], 3, 2), grey=True, **about)
        if turned.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in turned.info:
            pixels = np.array(turned.convert("RGBA"))
            grey = turned.mode.startswith("L")
            return cls(pixels[..., :3].copy(), pixels[..., 3].copy(), grey=grey, **about)
        return cls(np.array(plain.convert("RGB")), grey=turned.mode in ("L", "1"), **about)

    def tensor(self) -> Tensor:
        """(3, H, W) float32 in [0, 1]."""
        return torch.from_numpy(self.pixels.astype(np.float32) / self.levels).permute(2, 0, 1)

    def picture(self) -> Image.Image:
        """8 bits, with alpha where it has one."""
        pixels = self._bytes(self.pixels)
        if self.alpha is None:
            return Image.fromarray(pixels)
        return Image.fromarray(np.dstack([pixels, self._bytes(self.alpha)]))

    def _bytes(self, values: np.ndarray) -> np.ndarray:
        return np.round(values / 257).astype(np.uint8) if values.dtype == np.uint16 else values

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it whole or not at all: ``.png`` or ``.tif`` (with all of it), ``.jpg`` or ``.webp``; one more EXIF
        tag, ProcessingSoftware, says that diffrep did.

        Returns:
            The path.

        Raises:
            ValueError: another ending, or one that cannot hold it: 16 bits go into png and tif, transparency not into
                jpg.
        """
        path = Path(os.path.expanduser(path))
        kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
        if (form := kind.get(path.suffix.lower())) is None:
            raise ValueError(f"{path}: restored images are written as {', '.join(kind)}")
        if self.levels > 255 and form not in ("PNG", "TIFF"):
            raise ValueError(f"{path}: has 16 bits, which are written as .png or .tif")
        if self.alpha is not None and form == "JPEG":
            raise ValueError(f"{path}: is partly transparent, which is written as .png, .tif or .webp")
        if self.levels > 255:
            write_whole(path, self._png16() if form == "PNG" else self._tiff16())
            return path
        image = self.picture()
        if self.grey:
            image = image.convert("L" if self.alpha is None else "LA")
        options: dict[str, Any] = {"quality": 95} if form in ("JPEG", "WEBP") else {}
        options |= {"icc_profile": self.icc, "exif": marked_exif(self.exif)}
        write_whole(path, lambda partial: image.save(partial, form, **options))
        return path

    def _channels(self) -> np.ndarray:
        """(H, W, 1 to 4), one channel of colour where it is grey."""
        colours = self.pixels[..., :1] if self.grey else self.pixels
        return colours if self.alpha is None else np.dstack([colours, self.alpha])

    def _png16(self) -> bytes:
        chunks = {b"eXIf": marked_exif(self.exif).removeprefix(b"Exif\x00\x00")}
        if self.icc:
            chunks[b"iCCP"] = b"icc\x00\x00" + zlib.compress(self.icc)
        return png16(self._channels(), chunks)

    def _tiff16(self) -> bytes:
        """One strip, compressed by Deflate, behind a directory that holds the EXIF tags too."""
        whole = replace(self, grey=self.grey and self.alpha is None)  # Pillow does not read grey beside alpha
        values, tags, exif = whole._channels().astype("<u2"), ImageFileDirectory_v2(), Image.Exif()
        exif.load(marked_exif(self.exif))
        for tag in exif:
            tags[tag] = exif.get_ifd(tag) if tag in (0x8769, 0x8825) else exif[tag]
        (width, height), count, strip = self.size, values.shape[2], zlib.compress(values.tobytes(), 6)
        about = {
            256: width, 257: height, 258: (16,) * count, 259: 8, 262: 1 if count == 1 else 2, 273: 0, 277: count,
            278: height, 279: len(strip), 284: 1,
        }  # fmt: skip
        about |= ({338: 2} if count == 4 else {}) | ({34675: self.icc} if self.icc else {})
        for tag, value in about.items():
            tags[tag] = value
        return b"II*\x00" + struct.pack("<I", 8) + tags.tobytes(8) + strip


def _tags(image: Image.Image) -> bytes:
    """EXIF tags as files hold them, without those of `save`; none where damage keeps them from being written."""
    try:
        exif = image.getexif()
        for tag in (Base.ProcessingSoftware, Base.Orientation, *_LAYOUT):
            exif.pop(tag, None)
        return exif.tobytes() if len(exif) else b""
    except Exception:
        return b""


def _png_pixels(content: bytes) -> np.ndarray:
    """(H, W, 3 or 4) uint16 of a PNG, of which Pillow reads 8 bits."""
    from torchvision.io import ImageReadMode  # type: ignore[import-untyped]
    from torchvision.io import decode_image as decode

    values = decode(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    pixels: np.ndarray = values.permute(1, 2, 0).numpy()
    return pixels if pixels.shape[2] > 2 else pixels[..., [0, 0, 0, 1]]


def _tiff_pixels(content: bytes, name: str) -> np.ndarray:
    """(H, W, 3 or 4) uint16 of a TIFF, of which Pillow reads 8 bits.

    Raises:
        ImageError: tifffile is not installed, or cannot read this form of TIFF.
    """
    try:
        import tifffile

        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page: Any = file.pages[0]
            values, extra = page.asarray(), [int(kind) for kind in page.extrasamples]
            pixels = np.moveaxis(values, 0, 2) if int(page.planarconfig) == 2 else values
    except ImportError:
        raise ImageError(f'{name}: 16 bits of a TIFF need tifffile: pip install "diffrep[dense]"') from None
    except Exception as error:  # compressions that need another package, among others
        raise ImageError(f"{name}: cannot be read as a TIFF of 16 bits ({one_line(error)})") from None
    if extra[:1] == [1]:  # colours are multiplied by their transparency
        share = np.maximum(pixels[..., 3:], 1) / 65535
        pixels = np.dstack([np.minimum((pixels[..., :3] / share).round(), 65535), pixels[..., 3]]).astype(np.uint16)
    return pixels[..., : 4 if extra[:1] in ([1], [2]) else 3]


def _upright_parts(pixels: np.ndarray, turn: int) -> dict[str, Any]:
    """Colours and alpha, turned as EXIF's number says."""
    pixels = _TURNS[turn](pixels) if turn in _TURNS else pixels
    parts = {"pixels": np.ascontiguousarray(pixels[..., :3])}
    return parts | ({"alpha": np.ascontiguousarray(pixels[..., 3])} if pixels.shape[2] == 4 else {})
