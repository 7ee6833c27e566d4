"""Files of a data set, from its folder or from the tar archive it was released as."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from diffrep.eval.cache import digest
from diffrep.eval.datasets.pairs import DatasetError, inside


class Archive:
    """A folder, or an uncompressed tar file, by paths inside it.

    Raises:
        DatasetError: there is neither.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir() and not self.root.is_file():
            raise DatasetError(f"{self.root}: no such folder or tar archive")
        if self.root.is_file():
            _ = self._members

    @cached_property
    def _members(self) -> dict[str, tuple[int, int]]:
        """Path -> where a file's bytes start in the archive, and their number."""
        try:
            with tarfile.open(self.root, "r:") as tar:
                files = [member for member in tar.getmembers() if member.isfile()]
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise DatasetError(f"{self.root}: is no uncompressed tar archive ({error})") from None
        return {file.name.removeprefix("./"): (file.offset_data, file.size) for file in files}

    def names(self) -> list[str]:
        """Paths of all files, sorted."""
        if self.root.is_dir():
            return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        """A file's bytes; a folder of the archive's own name around everything is looked through.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the name leads out of the data set's folder.
        """
        if self.root.is_dir():
            path = self.root / inside(name)
            if not path.is_file():
                raise FileNotFoundError(2, "no such file", str(path))
            return path.read_bytes()
        member = self._members.get(name) or self._members.get(f"{self.root.stem}/{name}")
        if member is None:
            raise FileNotFoundError(2, "no such file in the archive", f"{self.root}:{name}")
        start, size = member
        with self.root.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def digest(self, names: Sequence[str]) -> str:
        """What tells these files' contents from others.

        Raises:
            FileNotFoundError, ValueError: as `read`.
        """
        return digest(*(self.read(name) for name in names))

    def image(self, name: str) -> Image.Image:
        """A picture, decoded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be decoded.
        """
        data = self.read(name)
        try:
            opened = Image.open(io.BytesIO(data))
            opened.load()
        except Exception as error:  # decoders raise almost anything for damaged files
            raise ValueError(f"{name}: cannot be decoded ({error})") from None
        return opened


def read_array(data: bytes, name: str) -> np.ndarray:
    """The array of an ``.npy`` file, of numbers.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        values: np.ndarray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header raises SyntaxError, MemoryError and others too
        raise ValueError(f"{name}: is no .npy file of numbers ({error})") from None
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name}: holds {values.dtype}, not numbers")
    return values


def read_exr(data: bytes, name: str) -> np.ndarray:
    """Channels R, G, B of an OpenEXR picture: (H, W, 3) float32.

    Raises:
        ImportError: the package OpenEXR is not installed.
        ValueError: it is no such picture.
    """
    try:
        import OpenEXR
    except ImportError:
        raise ImportError(f'{name}: reading .exr needs OpenEXR: pip install "diffrep[dense]"') from None
    with tempfile.TemporaryDirectory() as folder:  # OpenEXR reads files by name only
        picture = Path(folder, "picture.exr")
        picture.write_bytes(data)
        try:
            with OpenEXR.File(str(picture), separate_channels=True) as file:
                channels = file.channels()
                return np.stack([np.array(channels[c].pixels, dtype=np.float32) for c in "RGB"], axis=-1)
        except Exception as error:  # whatever the library raises for a damaged file
            raise ValueError(f"{name}: is no OpenEXR picture with R, G and B ({error})") from None
