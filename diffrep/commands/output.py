"""Writing results so that nothing is ever half there."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffrep.files import MARK, check_writable, write_whole

__all__ = ["check_writable", "write_image", "write_whole"]


def write_image(path: Path, image: Image.Image) -> None:
    """Write a picture; what was there is replaced only by a whole one. A PNG says that diffrep wrote it."""
    note = PngInfo()
    note.add_text("Software", MARK)
    write_whole(path, (lambda partial: image.save(partial, pnginfo=note)) if path.suffix == ".png" else image.save)
