"""Benchmarks of depth and normals as released: in the layouts of Marigold's evaluation archives (depth) and of DSINE's
``dsine_eval`` (normals), both of which Lotus and E2E-FT use too. They are listed in ``eval/data/dense.toml``.

Depth: a list file names image and depth of each sample (and a filled depth, a mask or a focal length), one line each.
Normals: beside each ``*_img.png`` (or jpg) lies ``*_normal.png``, ``.exr`` or, for OASIS, ``.pkl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.eval.datasets.archives import Archive, read_array, read_exr, read_plain
from diffrep.eval.datasets.pairs import DatasetError, read_lines
from diffrep.eval.report import Problem, read_tables
from diffrep.heads.training.datasets import KITTI_SIZE, kitti_crop

Kind = Literal["depth", "normals"]

# first and last row, first and last column, as shares of height and width
_KITTI_MASKS = {
    "eigen": ((0.3324324, 0.91351351), (0.0359477, 0.96405229)),
    "garg": ((0.40810811, 0.99189189), (0.03594771, 0.96405229)),
}
NYU_EIGEN_ROWS, NYU_EIGEN_COLUMNS = (45, 471), (41, 601)


def kitti_mask(height: int, width: int, kind: Literal["eigen", "garg"] = "eigen") -> Tensor:
    """(H, W) bool: the pixels of a cropped image that Eigen or Garg evaluate."""
    (top, bottom), (left, right) = _KITTI_MASKS[kind]
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    return mask


def nyu_mask(height: int, width: int) -> Tensor:
    """(H, W) bool: Eigen's crop of the 480 x 640 images of NYUv2."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[slice(*NYU_EIGEN_ROWS), slice(*NYU_EIGEN_COLUMNS)] = True
    return mask


@dataclass(frozen=True)
class DenseSample:
    """One image of a benchmark.

    Attributes:
        image: (3, H, W) uint8, RGB.
        truth: depth, (H, W) float32 metres, 0 where unknown; or normals, (3, H, W) float32, x left, y up, z towards the
            camera, zero where unknown.
        valid: (H, W) bool, the pixels that count.
    """

    image: Tensor
    truth: Tensor
    valid: Tensor


@dataclass(frozen=True, kw_only=True)
class DenseLayout:
    """How a benchmark lies on disk and is counted.

    Attributes:
        images: how many the published numbers are over.
        lists: file names under which the list of samples may lie in the data set's folder or beside it.
        stored: how the annotation is written.
        per_metre: of depth in whole numbers.
        pattern: (part of an image's name, what takes its place) for each file of a sample, to find samples where there
            is no list.
        bounds: of depth that counts, metres, exclusive; predictions are clipped to them.
        by_mask_file: valid is what a mask file says, not the bounds.
        mask: further restriction of the valid pixels.
        sides: protocol -> long side at which it is run; where none is given, as it is.
        fit_size: longest side in the fit of scale and shift.
    """

    kind: Kind
    name: str
    title: str
    images: int
    lists: tuple[str, ...]
    stored: Literal["whole numbers", "raw floats", "npy", "png", "exr", "pkl"]
    per_metre: float = 1.0
    pattern: tuple[tuple[str, str], ...] = ()
    bounds: tuple[float, float] = (0.0, 0.0)
    by_mask_file: bool = False
    mask: Literal["none", "nyu", "eigen", "garg"] = "none"
    sides: Mapping[str, int] = field(default_factory=dict)
    fit_size: int | None = None

    @property
    def columns(self) -> int:
        """Names of a line of the list that a sample needs."""
        return 2 if self.kind == "depth" else 1

    def files(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The files that a sample consists of; `names` is its line of the list, the image first."""
        if self.kind == "normals":
            return names[0], f"{names[0].rpartition('_img')[0]}_normal.{self.stored}"
        if self.by_mask_file and len(names) < 3:
            raise ValueError(f"{names[0]}: the list names no mask file for it")
        return names[: 3 if self.by_mask_file else 2]

    def sample(self, archive: Archive, names: tuple[str, ...]) -> DenseSample:
        """Read one sample, named by its line of the list.

        Raises:
            FileNotFoundError, ValueError, ImportError: a file is missing, holds something else, or needs a package.
        """
        files = self.files(names)
        image = torch.from_numpy(np.array(archive.image(files[0]).convert("RGB"))).permute(2, 0, 1)
        size = (int(image.shape[1]), int(image.shape[2]))
        if self.kind == "normals":
            normals, valid = self._normals(archive, files[1], size)
            if normals.shape != (*size, 3):
                raise ValueError(f"{files[1]}: is {normals.shape}, the image is {size[0]} x {size[1]}")
            truth = torch.from_numpy(normals).permute(2, 0, 1)
            return DenseSample(image, truth, torch.from_numpy(valid))
        depth = torch.from_numpy(self._depth(archive, files[1], size))
        counted = (depth > self.bounds[0]) & (depth < self.bounds[1])
        if self.by_mask_file:
            counted = torch.from_numpy(read_array(archive.read(files[2]), files[2]).squeeze() != 0)
        for name, values in ((files[1], depth), (names[-1], counted)):
            if tuple(values.shape) != size:
                raise ValueError(f"{name}: is {tuple(values.shape)}, the image is {size}")
        if self.mask == "nyu":
            counted = counted & nyu_mask(*size)
        elif self.mask != "none":
            top, left = kitti_crop(*size)
            rows, columns = slice(top, top + KITTI_SIZE[0]), slice(left, left + KITTI_SIZE[1])
            image, depth, counted = image[:, rows, columns], depth[rows, columns], counted[rows, columns]
            counted = counted & kitti_mask(*KITTI_SIZE, kind=self.mask)
        return DenseSample(image, depth, counted)

    def _depth(self, archive: Archive, name: str, size: tuple[int, int]) -> np.ndarray:
        """(H, W) float32, metres."""
        if self.stored == "whole numbers":
            return np.asarray(archive.image(name)).astype(np.float32) / np.float32(self.per_metre)
        data = archive.read(name)
        if self.stored == "npy":
            return read_array(data, name).astype(np.float32).squeeze()
        if len(data) != 4 * size[0] * size[1]:
            raise ValueError(f"{name}: holds {len(data) / 4:g} numbers, the image has {size[0]} x {size[1]} pixels")
        depth = np.frombuffer(data, dtype="<f4").reshape(size)
        return np.where(np.isfinite(depth), depth, np.float32(0))

    def _normals(self, archive: Archive, name: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) float32 and the pixels that count."""
        if self.stored == "png":
            values = np.array(archive.image(name).convert("RGB"))
            return values.astype(np.float32) / 255 * 2 - 1, values.sum(-1, dtype=np.int64) > 0
        if self.stored == "exr":
            normals = read_exr(archive.read(name), name)
            return normals, np.linalg.norm(normals, axis=-1) > 0.5
        return _oasis(archive.read(name), name, size)

    def discover(self, archive: Archive) -> list[tuple[str, ...]]:
        """Samples by the names of the files, where there is no list."""
        names = archive.names()
        if self.kind == "normals":
            return [(name,) for name in names if Path(name).stem.endswith("_img")]
        known, marker = set(names), self.pattern[0][0] if self.pattern else "\0"
        images = [name for name in names if marker in name and not name.endswith((".npy", ".txt"))]
        entries = [tuple(_sibling(name, old, new, known) for old, new in self.pattern) for name in images]
        return [files for files in entries if all(files)]


def _sibling(name: str, old: str, new: str, known: set[str]) -> str:
    """The name with its last `old` replaced by `new`, with any ending that exists; "" where there is none."""
    head, _, tail = name.rpartition(old)
    changed = f"{head}{new}{tail}"
    endings = (".png", ".npy", ".JPG")
    return next((c for c in (changed, *(str(Path(changed).with_suffix(e)) for e in endings)) if c in known), "")


def _oasis(data: bytes, name: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Normals of a box in the image; the file's x and y point the other way."""
    values = read_plain(data, name)
    normals, mask = np.zeros((*size, 3), np.float32), np.zeros(size, bool)
    try:
        box = np.asarray(values["normal"], dtype=np.float32)
        top, bottom, left, right = (int(values[side]) for side in ("min_y", "max_y", "min_x", "max_x"))
        if box.shape != (bottom + 1 - top, right + 1 - left, 3) or min(top, left) < 0:
            raise ValueError(f"{box.shape} for rows {top} to {bottom} and columns {left} to {right}")
        rows, columns = slice(top, bottom + 1), slice(left, right + 1)
        normals[rows, columns] = box * np.array([-1, -1, 1], np.float32)
        mask[rows, columns] = (box != 0).any(-1)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: holds no normals of a box in the image ({error})") from None
    return normals, mask


_LAYOUTS = read_tables("dense", DenseLayout)
DEPTH_BENCHMARKS = {layout.name: layout for layout in _LAYOUTS if layout.kind == "depth"}
NORMAL_BENCHMARKS = {layout.name: layout for layout in _LAYOUTS if layout.kind == "normals"}


@dataclass(frozen=True)
class DenseSet:
    """A benchmark on disk: what its list names, read one by one."""

    layout: DenseLayout
    archive: Archive
    entries: tuple[tuple[str, ...], ...]
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def content(self, names: tuple[str, ...]) -> str:
        """What tells the files of a sample, one of `entries`, from others.

        Raises:
            FileNotFoundError, ValueError: one is missing, or its name leads out of the data set.
        """
        return self.archive.digest(self.layout.files(names))

    def sample(self, names: tuple[str, ...]) -> DenseSample:
        """Read a sample, one of `entries`; errors as of `DenseLayout.sample`."""
        return self.layout.sample(self.archive, names)


def open_benchmark(kind: Kind, name: str, root: str | Path, listing: str | Path | None = None) -> DenseSet:
    """Open a benchmark of depth or of normals.

    Args:
        root: its folder, or the tar archive; of normals also the folder ``dsine_eval`` around it.
        listing: the file that lists its samples; looked for in the folder and beside it where None, and else made
            from the files' names.

    Raises:
        DatasetError: no such folder, no list for a data set that needs one, or nothing in it.
        ValueError: no such benchmark.
    """
    benchmarks, root = DEPTH_BENCHMARKS if kind == "depth" else NORMAL_BENCHMARKS, Path(root)
    if name not in benchmarks:
        raise ValueError(f"there is no {kind.removesuffix('s')} benchmark {name!r}; there are {', '.join(benchmarks)}")
    inner = kind == "normals" and (root / name).is_dir()
    layout, archive = benchmarks[name], Archive(root / name if inner else root)
    places = [folder / file for file in layout.lists for folder in (archive.root, archive.root.parent)]
    file = Path(listing) if listing is not None else next((place for place in places if place.is_file()), None)
    entries, problems = (layout.discover(archive), []) if file is None else _listed(file, layout.columns)
    if not entries:
        looked = f"no list ({', '.join(layout.lists)}) and no file like it" if file is None else f"{file} names none"
        raise DatasetError(f"{archive.root}: no sample of {layout.title}: {looked}")
    return DenseSet(layout, archive, tuple(entries), tuple(problems))


def _listed(file: Path, columns: int) -> tuple[list[tuple[str, ...]], list[Problem]]:
    """Samples of a list; lines without depth (KITTI's "None") are left out, as the published numbers leave them."""
    entries, problems = [], []
    for number, line in enumerate(read_lines(file), start=1):
        names = tuple(line.split())
        if 0 < len(names) < columns:
            problems.append(Problem(f"{file.name}, line {number}", "names no depth file"))
        elif names and "None" not in names[:columns]:
            entries.append(names)
    return entries, problems
