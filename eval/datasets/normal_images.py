"""Surface normal benchmarks in the layout of DSINE's ``dsine_eval``, which Lotus and E2E-FT use too.

Beside each ``*_img.png`` (or jpg) lies ``*_normal.png``, ``.exr`` or, for OASIS, ``.pkl``. Everything comes out in
camera axes x left, y up, z towards the camera.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.eval.datasets.archives import Archive
from diffrep.eval.datasets.pairs import DatasetError, Problem
from diffrep.eval.datasets.plain_pickle import read_plain

PADDING = (-2.1179039478302, -2.0357143878936768, -1.804444432258606)
"""ImageNet's normalised black, which the official harness puts around images whose range is [-1, 1]."""


def normal_padding(height: int, width: int, multiple: int = 32) -> tuple[int, int, int, int]:
    """Left, right, top, bottom: centred padding to a multiple, the odd pixel right and below."""
    x, y = -width % multiple, -height % multiple
    return x // 2, x - x // 2, y // 2, y - y // 2


@dataclass(frozen=True)
class NormalSample:
    """One image of a benchmark.

    Attributes:
        name: path of the image in the data set.
        image: (3, H, W) uint8, RGB.
        normals: (3, H, W) float32, x left, y up, z towards the camera; zero where unknown.
        mask: (H, W) bool, the pixels that count.
    """

    name: str
    image: Tensor
    normals: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class NormalBenchmark:
    """How a data set is laid out."""

    name: str
    title: str
    kind: Literal["png", "exr", "pkl"]
    images: int  # behind the published numbers

    def sample(self, archive: Archive, name: str) -> NormalSample:
        """Read one sample.

        Raises:
            FileNotFoundError, ValueError, ImportError: a file is missing, holds something else, or needs a package.
        """
        image = torch.from_numpy(np.array(archive.image(name).convert("RGB"))).permute(2, 0, 1)
        stem = name.rpartition("_img")[0]
        file = f"{stem}_normal.{self.kind}"
        height, width = int(image.shape[1]), int(image.shape[2])
        if self.kind == "png":
            values = np.array(archive.image(file).convert("RGB"))
            normals, mask = values.astype(np.float32) / 255 * 2 - 1, values.sum(-1, dtype=np.int64) > 0
        elif self.kind == "exr":
            normals = read_exr(archive.read(file), file)
            mask = np.linalg.norm(normals, axis=-1) > 0.5
        else:
            normals, mask = _oasis(archive.read(file), file, height, width)
        if normals.shape != (height, width, 3):
            raise ValueError(f"{file}: is {normals.shape}, the image is {height} x {width}")
        return NormalSample(name, image, torch.from_numpy(normals).permute(2, 0, 1), torch.from_numpy(mask))


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
        path = os.path.join(folder, "picture.exr")
        Path(path).write_bytes(data)
        try:
            with OpenEXR.File(path, separate_channels=True) as file:
                channels = file.channels()
                rgb = [np.array(channels[c].pixels, dtype=np.float32) for c in "RGB"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{name}: is no OpenEXR picture with R, G and B ({error})") from None
    return np.stack(rgb, axis=-1)


def _oasis(data: bytes, name: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Normals of a box in the image; the file's x and y point the other way."""
    values = read_plain(data, name)
    try:
        box = np.asarray(values["normal"], dtype=np.float32)
        rows = slice(int(values["min_y"]), int(values["max_y"]) + 1)
        columns = slice(int(values["min_x"]), int(values["max_x"]) + 1)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: holds no normals of a box ({error})") from None
    normals, mask = np.zeros((height, width, 3), np.float32), np.zeros((height, width), bool)
    normals[rows, columns] = box * np.array([-1, -1, 1], np.float32)
    mask[rows, columns] = (box != 0).any(-1)
    return normals, mask


NORMAL_BENCHMARKS: Mapping[str, NormalBenchmark] = {
    one.name: one
    for one in (
        NormalBenchmark(name="nyuv2", title="NYUv2", kind="png", images=654),
        NormalBenchmark(name="scannet", title="ScanNet", kind="png", images=300),
        NormalBenchmark(name="ibims", title="iBims-1", kind="exr", images=100),
        NormalBenchmark(name="sintel", title="Sintel", kind="exr", images=1064),
        NormalBenchmark(name="oasis", title="OASIS", kind="pkl", images=10000),
    )
}


@dataclass(frozen=True)
class NormalSet:
    """A benchmark on disk."""

    benchmark: NormalBenchmark
    archive: Archive
    entries: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def samples(self, skip: frozenset[str] = frozenset()) -> Iterator[NormalSample | Problem]:
        """The samples in the list's order, or what is wrong with them.

        Raises:
            ImportError: the files need a package that is not installed.
        """
        for name in self.entries:
            if name in skip:
                continue
            try:
                yield self.benchmark.sample(self.archive, name)
            except FileNotFoundError as error:
                yield Problem(name, f"{error.filename} is missing")
            except (OSError, ValueError) as error:
                yield Problem(name, " ".join(str(error).split()))


def open_normal_set(name: str, root: str | Path, listing: str | Path | None = None) -> NormalSet:
    """Open a benchmark.

    Args:
        root: the folder ``dsine_eval``, or that of the data set inside it, or its tar archive.
        listing: the file that lists its images; NAME_test_list.txt in the folder or beside it where None, and else
            all images that are there.

    Raises:
        DatasetError: no such folder, or no image in it.
        ValueError: no such benchmark.
    """
    if name not in NORMAL_BENCHMARKS:
        raise ValueError(f"there is no normal benchmark {name!r}; there are {', '.join(NORMAL_BENCHMARKS)}")
    root = Path(root)
    folder = root / name if (root / name).is_dir() else root
    archive = Archive(folder)
    places = [place / f"{name}_test_list.txt" for place in (folder, folder.parent)]
    found = Path(listing) if listing is not None else next((p for p in places if p.is_file()), None)
    if found is not None and not found.is_file():
        raise DatasetError(f"{found}: no such list of images")
    if found is not None:
        entries = [line.split()[0] for line in found.read_text().splitlines() if line.strip()]
    else:
        entries = [n for n in archive.names() if Path(n).stem.endswith("_img")]
    if not entries:
        raise DatasetError(f"{archive.root}: no image of {name} (*_img.png)")
    return NormalSet(NORMAL_BENCHMARKS[name], archive, tuple(entries))
