"""Photographs with all that is in their files: 16 bits, transparency, orientation, EXIF tags and the colour profile."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.files import write_whole
from diffrep.images import ImageLike, decode_image, load_image, upright

_ORIENTATION, _PNG = 0x0112, b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Photograph:
    """An upright image.

    Attributes:
        pixels: (H, W, 3) uint8 or uint16, RGB.
        alpha: (H, W) of the same kind; None where it is opaque.
        exif: tags without the orientation, as files hold them; icc: the colour profile.
        grey: its file holds one channel, which it is saved with again.
    """

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
        load_image(source)  # refuses what is missing, damaged or too large, in one line
        content = Path(source).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            photograph = cls._of(image, decode_image(content, str(source)))
        if content.startswith(_PNG) and content[24] == 16 and content[25] in (2, 6):
            return replace(photograph, **_deep(content, image))  # type: ignore[arg-type]
        return photograph

    @classmethod
    def _of(cls, image: Image.Image, plain: Image.Image) -> Photograph:
        """Of an image as its file has it; `plain` serves where its mode says nothing more."""
        exif = image.getexif()
        exif.pop(_ORIENTATION, None)
        about = {"exif": exif.tobytes() if len(exif) else b"", "icc": image.info.get("icc_profile")}
        turned = upright(image)
        if turned.mode.startswith("I;16") or turned.mode == "I":
            values = np.asarray(turned).astype(np.uint16)
            return cls(np.repeat(values[..., None], 3, 2), grey=True, **about)  # type: ignore[arg-type]
        if turned.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in turned.info:
            pixels = np.array(turned.convert("RGBA"))
            grey = turned.mode.startswith("L")
            return cls(pixels[..., :3].copy(), pixels[..., 3].copy(), grey=grey, **about)  # type: ignore[arg-type]
        return cls(np.array(plain.convert("RGB")), grey=turned.mode in ("L", "1"), **about)  # type: ignore[arg-type]

    def tensor(self) -> Tensor:
        """(3, H, W) float32 in [0, 1]."""
        return torch.from_numpy(self.pixels.astype(np.float32) / self.levels).permute(2, 0, 1)

    def image(self) -> Image.Image:
        """8 bits, with alpha where it has one."""
        pixels = self._bytes(self.pixels)
        if self.alpha is None:
            return Image.fromarray(pixels)
        return Image.fromarray(np.dstack([pixels, self._bytes(self.alpha)]))

    def _bytes(self, values: np.ndarray) -> np.ndarray:
        return np.round(values / 257).astype(np.uint8) if values.dtype == np.uint16 else values

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it whole or not at all: ``.png`` (with all of it), ``.tif``, ``.jpg`` or ``.webp``.

        Raises:
            ValueError: another ending, or one that cannot hold it: 16 bits go into png, transparency into png and webp.
        """
        path = Path(path)
        kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
        if (form := kind.get(path.suffix.lower())) is None:
            raise ValueError(f"{path}: restored images are written as {', '.join(kind)}")
        if self.levels > 255 and form != "PNG":
            raise ValueError(f"{path}: has 16 bits, which are written as .png")
        if self.alpha is not None and form == "JPEG":
            raise ValueError(f"{path}: is partly transparent, which is written as .png or .webp")
        if self.levels > 255:
            write_whole(path, self._png16())
            return
        image = self.image()
        if self.grey:
            image = image.convert("L" if self.alpha is None else "LA")
        options = {"quality": 95} if form in ("JPEG", "WEBP") else {}
        if self.exif:
            options["exif"] = self.exif  # type: ignore[assignment]
        write_whole(path, lambda partial: image.save(partial, form, icc_profile=self.icc, **options))

    def _png16(self) -> bytes:
        """Pillow writes 16 bits of one channel alone."""
        channels = [self.pixels[..., :1] if self.grey else self.pixels]
        channels += [] if self.alpha is None else [self.alpha[..., None]]
        values = np.concatenate(channels, 2).astype(">u2")
        colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]

        def chunk(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        head = struct.pack(">IIBBBBB", self.size[0], self.size[1], 16, colour, 0, 0, 0)
        rows = b"".join(b"\x00" + row.tobytes() for row in values)  # each row with filter 0
        parts = [_PNG, chunk(b"IHDR", head)]
        if self.icc:
            parts.append(chunk(b"iCCP", b"icc\x00\x00" + zlib.compress(self.icc)))
        if self.exif:
            parts.append(chunk(b"eXIf", self.exif.removeprefix(b"Exif\x00\x00")))
        return b"".join([*parts, chunk(b"IDAT", zlib.compress(rows, 6)), chunk(b"IEND", b"")])


def _deep(content: bytes, image: Image.Image) -> dict[str, np.ndarray]:
    """Colours and alpha of a PNG of 16 bits a channel, of which Pillow reads 8."""
    from torchvision.io import ImageReadMode  # type: ignore[import-untyped]
    from torchvision.io import decode_image as decode

    values = decode(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    pixels = values.permute(1, 2, 0).numpy()
    turned = [
        np.asarray(upright(Image.fromarray(np.ascontiguousarray(channel)))) for channel in pixels.transpose(2, 0, 1)
    ]
    if image.getexif().get(_ORIENTATION, 1) == 1:
        turned = list(pixels.transpose(2, 0, 1))
    parts = {"pixels": np.stack(turned[:3], 2)}
    return parts | ({"alpha": turned[3]} if len(turned) == 4 else {})
