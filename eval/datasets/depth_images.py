"""Depth benchmarks in the layouts of Marigold's evaluation archives, which Lotus and E2E-FT use too.

A list file names image and depth of each sample (and a filled depth, a mask or a focal length), one line each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.eval.datasets.archives import Archive
from diffrep.eval.datasets.pairs import DatasetError, Problem
from diffrep.heads.training.vkitti import KITTI_SIZE, kitti_crop

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
class DepthSample:
    """One image of a benchmark.

    Attributes:
        name: path of the image in the data set.
        image: (3, H, W) uint8, RGB.
        depth: (H, W) float32, metres; 0 where unknown.
        valid: (H, W) bool, the pixels that count.
    """

    name: str
    image: Tensor
    depth: Tensor
    valid: Tensor


Read = Callable[[Archive, tuple[str, ...], tuple[int, int]], Tensor]


def _millimetres(archive: Archive, names: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    return _integers(archive, names[1]) / 1000


def _kitti_units(archive: Archive, names: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    return _integers(archive, names[1]) / 256


def _integers(archive: Archive, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(archive.image(name)).astype(np.float32))


def _raw_floats(archive: Archive, names: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    values = np.frombuffer(archive.read(names[1]), dtype=np.float32)
    if values.size != size[0] * size[1]:
        raise ValueError(f"{names[1]}: holds {values.size} numbers, the image has {size[0]} x {size[1]} pixels")
    depth = torch.from_numpy(values.reshape(size).copy())
    return torch.where(torch.isfinite(depth), depth, 0.0)


def _array(archive: Archive, names: tuple[str, ...], size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(archive.read(names[1]))).astype(np.float32).squeeze())


@dataclass(frozen=True, kw_only=True)
class DepthBenchmark:
    """How a data set is laid out and counted.

    Attributes:
        lists: file names under which the list may lie in the data set's folder or beside it.
        pattern: (ending of an image, replaced by each ending) to find samples where there is no list.
        bounds: metres, exclusive; predictions are clipped to them.
        by_mask_file: valid is what a mask file says, not the bounds.
        mask: further restriction of the valid pixels.
        sides: long side at which Lotus and Marigold run it; None: as it is.
        fit_size: longest side in the fit of scale and shift.
        images: how many the published numbers are over.
    """

    name: str
    title: str
    lists: tuple[str, ...]
    pattern: tuple[tuple[str, str], ...]
    read: Read
    bounds: tuple[float, float]
    by_mask_file: bool = False
    mask: Literal["none", "nyu", "eigen", "garg"] = "none"
    sides: Mapping[str, int | None]
    fit_size: int | None = None
    images: int

    def sample(self, archive: Archive, names: tuple[str, ...]) -> DepthSample:
        """Read one sample.

        Raises:
            FileNotFoundError, ValueError: a file is missing or holds something else.
        """
        image = torch.from_numpy(np.array(archive.image(names[0]).convert("RGB"))).permute(2, 0, 1)
        size = (int(image.shape[1]), int(image.shape[2]))
        depth = self.read(archive, names, size)
        if tuple(depth.shape) != size:
            raise ValueError(f"{names[1]}: is {tuple(depth.shape)}, the image is {size}")
        if self.by_mask_file:
            if len(names) < 3:
                raise ValueError(f"{names[0]}: the list names no mask file for it")
            valid = torch.from_numpy(np.load(io.BytesIO(archive.read(names[2]))).squeeze()).bool()
        else:
            valid = (depth > self.bounds[0]) & (depth < self.bounds[1])
        if self.mask in ("eigen", "garg"):
            top, left = kitti_crop(*size)
            rows, columns = slice(top, top + KITTI_SIZE[0]), slice(left, left + KITTI_SIZE[1])
            image, depth, valid = image[:, rows, columns], depth[rows, columns], valid[rows, columns]
            valid = valid & kitti_mask(*KITTI_SIZE, kind=self.mask)  # type: ignore[arg-type]  # of the two, see above
        elif self.mask == "nyu":
            valid = valid & nyu_mask(*size)
        return DepthSample(names[0], image, depth, valid)


_NATIVE: Mapping[str, int | None] = {"lotus": None, "marigold": None}
DEPTH_BENCHMARKS: Mapping[str, DepthBenchmark] = {
    one.name: one
    for one in (
        DepthBenchmark(
            name="nyuv2", title="NYUv2", lists=("filename_list_test.txt", "nyu_list.txt"),
            pattern=(("rgb_", "rgb_"), ("rgb_", "depth_")), read=_millimetres, bounds=(1e-3, 10.0), mask="nyu",
            sides=_NATIVE, images=654,
        ),
        DepthBenchmark(
            name="kitti", title="KITTI Eigen", lists=("eigen_test_files_with_gt.txt", "kitti_list.txt"),
            pattern=(), read=_kitti_units, bounds=(1e-5, 80.0), mask="eigen", sides=_NATIVE, images=652,
        ),
        DepthBenchmark(
            name="eth3d", title="ETH3D", lists=("eth3d_filename_list.txt", "eth3d_list.txt"),
            pattern=(("rgb/", "rgb/"), ("rgb/", "depth/")), read=_raw_floats, bounds=(1e-5, 1e9),
            sides={"lotus": 768, "marigold": 756}, fit_size=1024, images=454,
        ),
        DepthBenchmark(
            name="scannet", title="ScanNet",
            lists=("scannet_val_sampled_list_800_1.txt", "scannet_list.txt"),
            pattern=(("/color/", "/color/"), ("/color/", "/depth/")), read=_millimetres, bounds=(1e-3, 10.0),
            sides=_NATIVE, images=800,
        ),
        DepthBenchmark(
            name="diode", title="DIODE", lists=("diode_val_all_filename_list.txt", "diode_list.txt"),
            pattern=((".png", ".png"), (".png", "_depth.npy"), (".png", "_depth_mask.npy")), read=_array,
            bounds=(0.6, 350.0), by_mask_file=True, sides={"lotus": 640, "marigold": 640}, images=771,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class DepthSet:
    """A benchmark on disk: what its list names, read one by one."""

    benchmark: DepthBenchmark
    archive: Archive
    entries: tuple[tuple[str, ...], ...]
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def samples(self, skip: frozenset[str] = frozenset()) -> Iterator[DepthSample | Problem]:
        """The samples in the list's order, or what is wrong with them.

        Args:
            skip: names of images that are not wanted.
        """
        for names in self.entries:
            if names[0] in skip:
                continue
            try:
                yield self.benchmark.sample(self.archive, names)
            except FileNotFoundError as error:
                yield Problem(names[0], f"{error.filename} is missing")
            except (OSError, ValueError) as error:
                yield Problem(names[0], " ".join(str(error).split()))


def open_depth_set(name: str, root: str | Path, listing: str | Path | None = None) -> DepthSet:
    """Open a benchmark.

    Args:
        root: its folder, or the tar archive.
        listing: the file that lists its samples; looked for in the folder and beside it where None, and else made
            from the files that are there.

    Raises:
        DatasetError: no such folder, no list for a data set that needs one, or nothing in it.
        ValueError: no such benchmark.
    """
    if name not in DEPTH_BENCHMARKS:
        raise ValueError(f"there is no depth benchmark {name!r}; there are {', '.join(DEPTH_BENCHMARKS)}")
    benchmark, archive = DEPTH_BENCHMARKS[name], Archive(root)
    places = [folder / file for file in benchmark.lists for folder in (archive.root, archive.root.parent)]
    found = Path(listing) if listing is not None else next((p for p in places if p.is_file()), None)
    if found is not None:
        entries, problems = _listed(found)
    else:
        entries, problems = _discovered(benchmark, archive), []
    if not entries:
        looked = f"{found} names none" if found else f"no list ({', '.join(benchmark.lists)}) and no file like it"
        raise DatasetError(f"{archive.root}: no sample of {benchmark.title}: {looked}")
    return DepthSet(benchmark, archive, tuple(entries), tuple(problems))


def _listed(file: Path) -> tuple[list[tuple[str, ...]], list[Problem]]:
    """Samples of a list; lines without depth (KITTI's "None") are left out, as the published numbers leave them."""
    if not file.is_file():
        raise DatasetError(f"{file}: no such list of samples")
    entries, problems = [], []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        names = tuple(line.split())
        if len(names) == 1:
            problems.append(Problem(f"{file.name}, line {number}", "names no depth file"))
        elif names and names[1] != "None":
            entries.append(names)
    return entries, problems


def _discovered(benchmark: DepthBenchmark, archive: Archive) -> list[tuple[str, ...]]:
    """Image and depth files that belong together by their names."""
    if not benchmark.pattern:
        return []
    names = archive.names()
    known = set(names)
    marker = benchmark.pattern[0][0]
    entries = []
    for name in names:
        if marker not in name or name.endswith((".npy", ".txt")):
            continue
        files = tuple(_sibling(name, old, new, known) for old, new in benchmark.pattern)
        if all(files):
            entries.append(files)
    return entries


def _sibling(name: str, old: str, new: str, known: set[str]) -> str:
    """The name with its last `old` replaced by `new`, with any ending that exists; "" where there is none."""
    head, _, tail = name.rpartition(old)
    changed = f"{head}{new}{tail}"
    endings = ("", ".png", ".npy", ".JPG")
    return next((c for c in (changed, *(str(Path(changed).with_suffix(e)) for e in endings[1:])) if c in known), "")
