"""Collections of images: folders, glob patterns, archives in webdataset's layout, Parquet files of paths."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffrep.files import optional_import, printable
from diffrep.images import SUFFIXES, ImageError, Placement, Sizing, decode_image, find_images, fit_image, load_image
from diffrep.processes import end_with_parent
from diffrep.store.shards import ImageFile


@dataclass(frozen=True)
class ImageSource:
    """An image of a collection, not read yet.

    Attributes:
        name: unique in the collection: the path relative to the collection's root, with ``/``.
        file: that holds it.
        size: bytes that it has; -1 where the file does not exist.
        modified: the file's time of change, nanoseconds since 1970.
        offset: where it begins in the file; None: it is the file.
    """

    name: str
    file: str
    size: int
    modified: int
    offset: int | None = None

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            ImageError: it cannot be read.
        """
        try:
            if not os.path.isfile(self.file):  # a pipe would be waited for
                raise FileNotFoundError
            with open(self.file, "rb") as opened:
                if self.offset is None:
                    return opened.read()
                opened.seek(self.offset)
                return opened.read(self.size)
        except FileNotFoundError:
            raise ImageError(f"{self.name}: no such image file") from None
        except OSError as error:
            raise ImageError(f"{self.name}: cannot be read ({error.strerror})") from None


def find_sources(
    inputs: Sequence[str | os.PathLike[str]], root: str | Path | None = None
) -> tuple[Path, list[ImageSource]]:
    """The images of a collection, each once, in sorted order of each input.

    Args:
        inputs: image files, folders, glob patterns, ``.tar`` archives in webdataset's layout (images beside
            their other files), and ``.parquet`` files with a column ``path``.
        root: the folder to which names are relative; None: the folder that is given, or the deepest one that
            holds all inputs. Images outside of it are named by their whole path.

    Returns:
        The root and the images.

    Raises:
        ImageError: an input does not exist, has no image, or is no archive.
    """
    files = [_absolute(path) for path in find_images(inputs)]  # archives and tables too, where they are named
    if not files:
        raise ImageError("no images were given")
    if root is not None:
        base = _absolute(Path(root))
    elif len(inputs) == 1 and Path(inputs[0]).is_dir():
        base = _absolute(Path(inputs[0]))
    else:
        base = Path(os.path.commonpath([file.parent for file in files]))
    sources: dict[str, ImageSource] = {}
    for file in files:
        ending = file.suffix.lower()
        paths = _paths_in(file) if ending == ".parquet" else [file]
        for source in _archive(file, base) if ending == ".tar" else [_image_file(path, base) for path in paths]:
            sources.setdefault(source.name, source)
    return base, list(sources.values())


def _absolute(path: Path) -> Path:
    """The whole path, without ``..``, so that one place has one name."""
    return path.resolve() if ".." in path.parts else path.absolute()


def locate(root: Path, name: str) -> ImageSource:
    """An image file by the name that a store has for it."""
    return _image_file(root / name, root)


def _name(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _image_file(path: Path, root: Path) -> ImageSource:
    try:
        status = path.stat()
        size, modified = status.st_size, status.st_mtime_ns
    except OSError:  # named in a table, but not there: it will be quarantined
        size, modified = -1, 0
    return ImageSource(_name(path, root), str(path), size, modified)


def _archive(file: Path, root: Path) -> list[ImageSource]:
    modified = file.stat().st_mtime_ns
    members = []
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile() and PurePosixPath(member.name).suffix.lower() in SUFFIXES:
                    name = f"{_name(file, root)}/{member.name.removeprefix('./')}"
                    members.append(ImageSource(name, str(file), member.size, modified, member.offset_data))
            refuse_damaged(archive)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{file}: is not an uncompressed tar archive ({error})") from None
    if not members:
        raise ImageError(f"{file}: no image found in the archive")
    return members


def refuse_damaged(archive: tarfile.TarFile) -> None:
    """tarfile.ReadError of an archive, listed before, that has a damaged header, which Python takes for its end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged or cut off after {archive.offset:,} bytes")


def _paths_in(file: Path) -> list[Path]:
    with optional_import(f"{file}: reading Parquet needs pyarrow: pip install 'diffrep[parquet]'"):
        import pyarrow.parquet as pq
    import pyarrow as pa

    try:
        names = pq.read_schema(file).names
        if "path" not in names:
            raise ImageError(f"{file}: has no column 'path', only {', '.join(names)}")
        paths = pq.read_table(file, columns=["path"])["path"].to_pylist()
    except pa.ArrowInvalid as error:
        raise ImageError(f"{file}: is not a Parquet file ({error})") from None
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ImageError(f"{file}: the column 'path' must hold one path per row")
    return [file.parent / path for path in paths]


def read_image(root: Path, name: str) -> Image.Image:
    """An image of a collection by its name, out of an archive too.

    Raises:
        ImageError: it is gone, or cannot be read.
    """
    archive, separator, member = name.rpartition(".tar/")
    if not separator:
        return load_image(root / name)
    try:
        with tarfile.open(root / f"{archive}.tar", "r:") as opened:
            entry = next((m for m in opened if m.name.removeprefix("./") == member), None)
            content = opened.extractfile(entry) if entry is not None else None
            return decode_image(content.read() if content is not None else b"", name)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{name}: cannot be read ({error})") from None


@dataclass(frozen=True)
class Job:
    """One shard to be made: its number, and the images that go into it, in order."""

    number: int
    sources: tuple[ImageSource, ...]


class CanvasImage(NamedTuple):
    """An image on the network's canvas: its position in its job, the file, and how it lies."""

    position: int
    file: ImageFile
    placement: Placement


@dataclass(frozen=True)
class Decoded:
    """A few images of one job that follow each other.

    Attributes:
        job: its place in the list of jobs.
        canvases: those that could be read, by size of canvas: pixels (n, 3, H, W) uint8, and n images.
        unusable: (position, file, reason) of the others.
    """

    job: int
    canvases: tuple[tuple[Tensor, tuple[CanvasImage, ...]], ...]
    unusable: tuple[tuple[int, ImageFile, str], ...]


class _Portions(Dataset[Decoded]):
    """Jobs, cut into portions of a few images; reading one decodes it, and sets apart what cannot be read."""

    def __init__(self, jobs: Sequence[Job], sizing: Sizing, portion: int) -> None:
        self.jobs, self.sizing, self.portion = jobs, sizing, portion
        self.places = [(j, start) for j, job in enumerate(jobs) for start in range(0, len(job.sources), portion)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Decoded:
        job, start = self.places[index]
        by_size: dict[tuple[int, int], list[tuple[Tensor, CanvasImage]]] = {}
        unusable = []
        for position, source in enumerate(self.jobs[job].sources[start : start + self.portion], start):
            file = ImageFile(source.name, source.size, source.modified)
            try:
                content = source.read()
                file = ImageFile(source.name, len(content), source.modified, hashlib.sha256(content).hexdigest())
                canvas, placement = fit_image(decode_image(content, source.name), self.sizing)
            except ImageError as error:
                unusable.append((position, file, str(error).removeprefix(f"{printable(source.name)}: ")))
                continue
            by_size.setdefault(placement.canvas_size, []).append((canvas, CanvasImage(position, file, placement)))
        columns = [zip(*items, strict=True) for items in by_size.values()]
        canvases = tuple((torch.stack(pixels), images) for pixels, images in columns)
        return Decoded(job, canvases, tuple(unusable))


def decode(jobs: Sequence[Job], sizing: Sizing, *, portion: int, workers: int) -> Iterator[Decoded]:
    """All images of the jobs, in order, decoded ahead in `workers` processes (0: in this one).

    Args:
        portion: images that a worker decodes at a time.
    """
    portions = _Portions(jobs, sizing, portion)
    loader = DataLoader(
        portions, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None,
        worker_init_fn=end_with_parent,
    )  # fmt: skip
    return iter(loader)
