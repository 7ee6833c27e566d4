"""Writing results so that nothing is ever half there."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffrep.files import MARK, write_whole

__all__ = ["check_writable", "write_image", "write_whole"]


def check_writable(path: Path, suffixes: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp")) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        ValueError: the ending is none that can be written, or the path is a folder.
        OSError: its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: the output must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, give a file name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"{path}: the folder {folder} cannot be written to")


def write_image(path: Path, image: Image.Image) -> None:
    """Write a picture; what was there is replaced only by a whole one. A PNG says that diffrep wrote it."""
    note = PngInfo()
    note.add_text("Software", MARK)
    write_whole(path, lambda partial: image.save(partial, **({"pnginfo": note} if path.suffix == ".png" else {})))
