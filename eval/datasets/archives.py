"""Files of a data set, from its folder or from the tar archive it was released as."""

from __future__ import annotations

import io
import tarfile
from functools import cached_property
from pathlib import Path

from PIL import Image

from diffrep.eval.datasets.pairs import DatasetError


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
            try:
                tarfile.open(self.root, "r:").close()
            except tarfile.TarError as error:
                raise DatasetError(f"{self.root}: is no uncompressed tar archive ({error})") from None

    @cached_property
    def _members(self) -> dict[str, tuple[int, int]]:
        """Path -> where a file's bytes start in the archive, and their number."""
        with tarfile.open(self.root, "r:") as tar:
            files = [member for member in tar.getmembers() if member.isfile()]
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
        """
        if self.root.is_dir():
            path = self.root / name
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
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{name}: cannot be decoded ({error})") from None
        return opened
