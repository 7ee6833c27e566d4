"""Benchmarks of depth and normals as released: in the layouts of Marigold's evaluation archives (depth) and of DSINE's
``dsine_eval`` (normals), both of which Lotus and E2E-FT use too.

Depth: a list file names image and depth of each sample (and a filled depth, a mask or a focal length), one line each.
Normals: beside each ``*_img.png`` (or jpg) lies ``*_normal.png``, ``.exr`` or, for OASIS, ``.pkl``.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.cache import ImageResults
from diffrep.eval.datasets.archives import Archive, read_array
from diffrep.eval.datasets.pairs import DatasetError, read_lines
from diffrep.eval.datasets.plain_pickle import read_plain
from diffrep.eval.report import Problem
from diffrep.heads.training.vkitti import KITTI_SIZE, kitti_crop

# first and last row, first and last column, as shares of height and width
_KITTI_MASKS = {
    "eigen": ((0.3324324, 0.91351351), (0.0359477, 0.96405229)),
    "garg": ((0.40810811, 0.99189189), (0.03594771, 0.96405229)),
}
NYU_EIGEN_ROWS, NYU_EIGEN_COLUMNS = (45, 471), (41, 601)
PADDING = (-2.1179039478302, -2.0357143878936768, -1.804444432258606)
"""ImageNet's normalised black, which DSINE's harness puts around images whose range is [-1, 1]."""


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


def normal_padding(height: int, width: int, multiple: int = 32) -> tuple[int, int, int, int]:
    """Left, right, top, bottom: centred padding to a multiple, the odd pixel right and below."""
    x, y = -width % multiple, -height % multiple
    return x // 2, x - x // 2, y // 2, y - y // 2


@dataclass(frozen=True)
class DepthSample:
    """One image of a depth benchmark.

    Attributes:
        name: path of the image in the data set.
        content: `digest` of the image's and the annotation's files.
        image: (3, H, W) uint8, RGB.
        depth: (H, W) float32, metres; 0 where unknown.
        valid: (H, W) bool, the pixels that count.
    """

    name: str
    content: str
    image: Tensor
    depth: Tensor
    valid: Tensor


@dataclass(frozen=True)
class NormalSample:
    """One image of a normal benchmark.

    Attributes:
        name, content, image: as of `DepthSample`.
        normals: (3, H, W) float32, x left, y up, z towards the camera; zero where unknown.
        mask: (H, W) bool, the pixels that count.
    """

    name: str
    content: str
    image: Tensor
    normals: Tensor
    mask: Tensor


class NamedSample(Protocol):
    """An image with its place in a data set."""

    @property
    def name(self) -> str: ...

    @property
    def content(self) -> str: ...


AnySample = TypeVar("AnySample", bound=NamedSample)


@dataclass(frozen=True, kw_only=True)
class DenseLayout(ABC, Generic[AnySample]):
    """How a benchmark lies on disk and is counted.

    Attributes:
        lists: file names under which the list of samples may lie in the data set's folder or beside it.
        columns: names of a line of the list that a sample needs.
        images: how many the published numbers are over.
    """

    name: str
    title: str
    images: int
    lists: tuple[str, ...]
    columns: int

    @abstractmethod
    def files(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The files that a sample consists of; `names` is its line of the list, the image first."""

    @abstractmethod
    def sample(self, archive: Archive, names: tuple[str, ...], content: str) -> AnySample:
        """Read one sample.

        Raises:
            FileNotFoundError, ValueError, ImportError: a file is missing, holds something else, or needs a package.
        """

    @abstractmethod
    def discover(self, archive: Archive) -> list[tuple[str, ...]]:
        """Samples by the names of the files, where there is no list."""


@dataclass(frozen=True)
class DenseSet(Generic[AnySample]):
    """A benchmark on disk: what its list names, read one by one."""

    benchmark: DenseLayout[AnySample]
    archive: Archive
    entries: tuple[tuple[str, ...], ...]
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def samples(self, skip: Callable[[str, str], bool] = lambda name, content: False) -> Iterator[AnySample | Problem]:
        """The samples in the list's order, or what is wrong with them.

        Args:
            skip: whether an image, by name and content, is not wanted.

        Raises:
            ImportError: the files need a package that is not installed.
        """
        for names in self.entries:
            try:
                content = self.archive.digest(self.benchmark.files(names))
                if not skip(names[0], content):
                    yield self.benchmark.sample(self.archive, names, content)
            except FileNotFoundError as error:
                yield Problem(names[0], f"{error.filename} is missing")
            except (OSError, ValueError) as error:
                yield Problem(names[0], " ".join(str(error).split()))


def count_images(
    data: DenseSet[AnySample], results: ImageResults, count: Callable[[AnySample], None], *, progress: bool
) -> tuple[list[str], list[Problem]]:
    """Call `count` with every image whose results are not kept.

    Returns:
        The images that have results, in the list's order, and what could not be read or raised ValueError.
    """
    counted, problems = set[str](), []
    with tqdm(total=len(data), desc=data.benchmark.name, unit="image", disable=not progress) as bar:

        def is_kept(name: str, content: str) -> bool:
            kept = results.holds(name, content)
            if kept:
                counted.add(name)
                bar.update(1)
            return kept

        for sample in data.samples(is_kept):
            bar.update(1)
            if isinstance(sample, Problem):
                problems.append(sample)
                continue
            try:
                count(sample)
                counted.add(sample.name)
            except ValueError as error:
                problems.append(Problem(sample.name, str(error)))
    return [names[0] for names in data.entries if names[0] in counted], problems


def _image(archive: Archive, name: str) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(archive.image(name).convert("RGB"))).permute(2, 0, 1)


# -- depth ----------------------------------------------------------------------------------------------------------

_ReadDepth: TypeAlias = Callable[[Archive, str, tuple[int, int]], Tensor]
"""(archive, name, (H, W) of the image) -> (H, W) float32, metres."""


def _integers(unit: float) -> _ReadDepth:
    """Depth from a picture of whole numbers, so many of them a metre."""

    def read(archive: Archive, name: str, size: tuple[int, int]) -> Tensor:
        return torch.from_numpy(np.asarray(archive.image(name)).astype(np.float32)) / unit

    return read


def _raw_floats(archive: Archive, name: str, size: tuple[int, int]) -> Tensor:
    data = archive.read(name)
    if len(data) != 4 * size[0] * size[1]:
        raise ValueError(f"{name}: holds {len(data) / 4:g} numbers, the image has {size[0]} x {size[1]} pixels")
    depth = torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(size).copy())
    return torch.where(torch.isfinite(depth), depth, 0.0)


def _array(archive: Archive, name: str, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(read_array(archive.read(name), name).astype(np.float32).squeeze())


@dataclass(frozen=True, kw_only=True)
class DepthLayout(DenseLayout[DepthSample]):
    """A depth benchmark.

    Attributes:
        pattern: (ending of an image, replaced by each ending) to find samples where there is no list.
        bounds: metres, exclusive; predictions are clipped to them.
        by_mask_file: valid is what a mask file says, not the bounds.
        mask: further restriction of the valid pixels.
        sides: long side at which Lotus and Marigold run it; None: as it is.
        fit_size: longest side in the fit of scale and shift.
    """

    columns: int = 2
    pattern: tuple[tuple[str, str], ...]
    read: _ReadDepth
    bounds: tuple[float, float]
    by_mask_file: bool = False
    mask: Literal["none", "nyu", "eigen", "garg"] = "none"
    sides: Mapping[str, int | None]
    fit_size: int | None = None

    def files(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if self.by_mask_file and len(names) < 3:
            raise ValueError(f"{names[0]}: the list names no mask file for it")
        return names[: 3 if self.by_mask_file else 2]

    def sample(self, archive: Archive, names: tuple[str, ...], content: str) -> DepthSample:
        image = _image(archive, names[0])
        size = (int(image.shape[1]), int(image.shape[2]))
        depth = self.read(archive, names[1], size)
        valid = (depth > self.bounds[0]) & (depth < self.bounds[1])
        if self.by_mask_file:
            valid = torch.from_numpy(read_array(archive.read(names[2]), names[2]).squeeze() != 0)
        for name, values in ((names[1], depth), (names[-1], valid)):
            if tuple(values.shape) != size:
                raise ValueError(f"{name}: is {tuple(values.shape)}, the image is {size}")
        if self.mask == "nyu":
            valid = valid & nyu_mask(*size)
        elif self.mask != "none":
            top, left = kitti_crop(*size)
            rows, columns = slice(top, top + KITTI_SIZE[0]), slice(left, left + KITTI_SIZE[1])
            image, depth, valid = image[:, rows, columns], depth[rows, columns], valid[rows, columns]
            valid = valid & kitti_mask(*KITTI_SIZE, kind=self.mask)
        return DepthSample(names[0], content, image, depth, valid)

    def discover(self, archive: Archive) -> list[tuple[str, ...]]:
        if not self.pattern:
            return []
        names = archive.names()
        known, marker = set(names), self.pattern[0][0]
        images = [name for name in names if marker in name and not name.endswith((".npy", ".txt"))]
        entries = [tuple(_sibling(name, old, new, known) for old, new in self.pattern) for name in images]
        return [files for files in entries if all(files)]


def _sibling(name: str, old: str, new: str, known: set[str]) -> str:
    """The name with its last `old` replaced by `new`, with any ending that exists; "" where there is none."""
    head, _, tail = name.rpartition(old)
    changed = f"{head}{new}{tail}"
    endings = (".png", ".npy", ".JPG")
    return next((c for c in (changed, *(str(Path(changed).with_suffix(e)) for e in endings)) if c in known), "")


_NATIVE: Mapping[str, int | None] = {"lotus": None, "marigold": None}
DEPTH_BENCHMARKS: Mapping[str, DepthLayout] = {
    one.name: one
    for one in (
        DepthLayout(
            name="nyuv2", title="NYUv2", lists=("filename_list_test.txt", "nyu_list.txt"),
            pattern=(("rgb_", "rgb_"), ("rgb_", "depth_")), read=_integers(1000), bounds=(1e-3, 10.0), mask="nyu",
            sides=_NATIVE, images=654,
        ),
        DepthLayout(
            name="kitti", title="KITTI Eigen", lists=("eigen_test_files_with_gt.txt", "kitti_list.txt"),
            pattern=(), read=_integers(256), bounds=(1e-5, 80.0), mask="eigen", sides=_NATIVE, images=652,
        ),
        DepthLayout(
            name="eth3d", title="ETH3D", lists=("eth3d_filename_list.txt", "eth3d_list.txt"),
            pattern=(("rgb/", "rgb/"), ("rgb/", "depth/")), read=_raw_floats, bounds=(1e-5, 1e9),
            sides={"lotus": 768, "marigold": 756}, fit_size=1024, images=454,
        ),
        DepthLayout(
            name="scannet", title="ScanNet",
            lists=("scannet_val_sampled_list_800_1.txt", "scannet_list.txt"),
            pattern=(("/color/", "/color/"), ("/color/", "/depth/")), read=_integers(1000), bounds=(1e-3, 10.0),
            sides=_NATIVE, images=800,
        ),
        DepthLayout(
            name="diode", title="DIODE", lists=("diode_val_all_filename_list.txt", "diode_list.txt"),
            pattern=((".png", ".png"), (".png", "_depth.npy"), (".png", "_depth_mask.npy")), read=_array,
            bounds=(0.6, 350.0), by_mask_file=True, sides={"lotus": 640, "marigold": 640}, images=771,
        ),
    )
}  # fmt: skip


# -- normals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NormalLayout(DenseLayout[NormalSample]):
    """A normal benchmark, its normals in files of one kind."""

    columns: int = 1
    kind: Literal["png", "exr", "pkl"]

    def files(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names[0], f"{names[0].rpartition('_img')[0]}_normal.{self.kind}"

    def sample(self, archive: Archive, names: tuple[str, ...], content: str) -> NormalSample:
        name, file = self.files(names)
        image = _image(archive, name)
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
        return NormalSample(name, content, image, torch.from_numpy(normals).permute(2, 0, 1), torch.from_numpy(mask))

    def discover(self, archive: Archive) -> list[tuple[str, ...]]:
        return [(name,) for name in archive.names() if Path(name).stem.endswith("_img")]


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
            return np.stack(rgb, axis=-1)
        except Exception as error:  # whatever the library raises for a damaged file
            raise ValueError(f"{name}: is no OpenEXR picture with R, G and B ({error})") from None


def _oasis(data: bytes, name: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Normals of a box in the image; the file's x and y point the other way."""
    values = read_plain(data, name)
    normals, mask = np.zeros((height, width, 3), np.float32), np.zeros((height, width), bool)
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


NORMAL_BENCHMARKS: Mapping[str, NormalLayout] = {
    name: NormalLayout(name=name, title=title, kind=kind, images=images, lists=(f"{name}_test_list.txt",))  # type: ignore[arg-type]
    for name, title, kind, images in (
        ("nyuv2", "NYUv2", "png", 654),
        ("scannet", "ScanNet", "png", 300),
        ("ibims", "iBims-1", "exr", 100),
        ("sintel", "Sintel", "exr", 1064),
        ("oasis", "OASIS", "pkl", 10000),
    )
}


# -- opening --------------------------------------------------------------------------------------------------------


def open_depth_set(name: str, root: str | Path, listing: str | Path | None = None) -> DenseSet[DepthSample]:
    """Open a depth benchmark.

    Args:
        root: its folder, or the tar archive.
        listing: the file that lists its samples; looked for in the folder and beside it where None, and else made
            from the files' names.

    Raises:
        DatasetError: no such folder, no list for a data set that needs one, or nothing in it.
        ValueError: no such benchmark.
    """
    return _open(DEPTH_BENCHMARKS, "depth", name, Path(root), listing)


def open_normal_set(name: str, root: str | Path, listing: str | Path | None = None) -> DenseSet[NormalSample]:
    """Open a normal benchmark, as `open_depth_set`; `root` may also be the folder ``dsine_eval`` around it."""
    root = Path(root)
    return _open(NORMAL_BENCHMARKS, "normal", name, root / name if (root / name).is_dir() else root, listing)


def _open(
    benchmarks: Mapping[str, DenseLayout[AnySample]], kind: str, name: str, root: Path, listing: str | Path | None
) -> DenseSet[AnySample]:
    if name not in benchmarks:
        raise ValueError(f"there is no {kind} benchmark {name!r}; there are {', '.join(benchmarks)}")
    layout, archive = benchmarks[name], Archive(root)
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
