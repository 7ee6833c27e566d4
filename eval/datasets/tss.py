"""TSS: dense flow between images of one category (Taniai, Sinha and Sato 2016).

Layout: ``TSS_CVPR2016/{FG3DCar,JODS,PASCAL}/<pair>/{image1,image2}.png, flow1.flo, flow2.flo, mask1.png,
mask2.png``. Every pair counts in both directions: the flow that ends in image k is ``flow{k}.flo``, over
``mask{k}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.eval.datasets.pairs import DatasetError, choose, image_size
from diffrep.eval.report import Problem

SUBSETS = ("FG3DCar", "JODS", "PASCAL")
FLO_MAGIC = 202021.25
_CATEGORIES = {"busd": "bus", "bike": "bicycle", "plane": "aeroplane", "suv": "car"}  # folder's word -> VOC's name
_FILES = (("image", "png"), ("flow", "flo"), ("mask", "png"))


@dataclass(frozen=True)
class FlowItem:
    """One direction of one pair: for each pixel of the target, where it lies in the source."""

    name: str  # subset/folder/direction
    subset: str
    category: str
    source: str  # paths relative to the data set's folder
    target: str
    flow_file: str
    mask_file: str
    source_size: tuple[int, int]  # (H, W)
    target_size: tuple[int, int]

    @property
    def padded_size(self) -> tuple[int, int]:
        """(H, W) that both images have after padding on the right and at the bottom."""
        (h, w), (height, width) = self.source_size, self.target_size
        return max(h, height), max(w, width)

    def flow(self, root: Path) -> Tensor:
        """(2, H, W) float32 in pixels (x, y), padded by repetition: target pixel + flow = source pixel.

        Raises:
            ValueError: the file is no .flo file of the target's size.
        """
        return F.pad(
            self._fitting("flow", self.flow_file, read_flo(root / self.flow_file))[None], self._margins, "replicate"
        )[0]

    def mask(self, root: Path) -> Tensor:
        """(H, W) bool: the object in the target, padded with False."""
        try:
            with Image.open(root / self.mask_file) as image:
                mask = torch.from_numpy(np.asarray(image.convert("L")) > 0)
        except Exception as error:  # whatever a decoder raises for a damaged file
            raise ValueError(f"{self.mask_file}: is not an image ({error})") from None
        return F.pad(self._fitting("mask", self.mask_file, mask), self._margins)

    def _fitting(self, what: str, file: str, values: Tensor) -> Tensor:
        if tuple(values.shape[-2:]) != self.target_size:
            raise ValueError(f"{file}: the {what} is {tuple(values.shape[-2:])}, its image {self.target_size}")
        return values

    @property
    def _margins(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom, as `torch.nn.functional.pad` takes them."""
        bottom, right = (a - b for a, b in zip(self.padded_size, self.target_size, strict=True))
        return 0, right, 0, bottom


@dataclass(frozen=True)
class FlowSet:
    """TSS as read from disk."""

    root: Path
    items: tuple[FlowItem, ...]
    problems: tuple[Problem, ...]


def read_tss(root: str | Path, *, subsets: Sequence[str] | None = None) -> FlowSet:
    """Read TSS as released; `root` is the folder ``TSS_CVPR2016``.

    Raises:
        DatasetError: there is none of the subsets' folders.
        ValueError: there is no such subset.
    """
    root = Path(root)
    wanted = choose("TSS", "subset", SUBSETS, subsets)
    present = [subset for subset in wanted if (root / subset).is_dir()]
    if not present:
        raise DatasetError(f"{root}: none of the folders {', '.join(wanted)} is there")
    problems = [Problem(subset, "the subset's folder is missing") for subset in wanted if subset not in present]
    items: list[FlowItem] = []
    for subset in present:
        for folder in sorted(path for path in (root / subset).iterdir() if path.is_dir()):
            needed = [f"{kind}{k}.{end}" for k in (1, 2) for kind, end in _FILES]
            where = f"{subset}/{folder.name}"
            if missing := [name for name in needed if not (folder / name).is_file()]:
                problems.append(Problem(where, f"{', '.join(missing)} missing"))
                continue
            try:
                items += _directions(folder, subset)
            except (OSError, ValueError) as error:
                problems.append(Problem(where, f"cannot be read ({error})"))
    return FlowSet(root, tuple(items), tuple(problems))


def _directions(folder: Path, subset: str) -> Iterator[FlowItem]:
    sizes = {k: image_size(folder / f"image{k}.png") for k in (1, 2)}
    inside = f"{subset}/{folder.name}"
    for source, target in ((1, 2), (2, 1)):
        images = (f"{inside}/image{source}.png", f"{inside}/image{target}.png")
        truth = (f"{inside}/flow{target}.flo", f"{inside}/mask{target}.png")
        name, category = f"{inside}/{source}to{target}", tss_category(folder.name, subset)
        yield FlowItem(name, subset, category, *images, *truth, sizes[source], sizes[target])


def tss_category(folder: str, subset: str = "") -> str:
    """The VOC category of a pair: everything in FG3DCar is a car, elsewhere the folder's name begins with it.

    >>> tss_category("001_suv", "FG3DCar"), tss_category("plane_12_4", "JODS")
    ('car', 'aeroplane')
    """
    if subset == "FG3DCar":
        return "car"
    word = folder.partition("_")[0].rstrip("0123456789").lower()
    return _CATEGORIES.get(word, word)


def read_flo(path: Path) -> Tensor:
    """(2, H, W) float32 from a Middlebury .flo file.

    Raises:
        ValueError: the file is no .flo file, or is cut off.
    """
    raw = path.read_bytes()
    if len(raw) < 12 or np.frombuffer(raw, "<f4", 1)[0] != np.float32(FLO_MAGIC):
        raise ValueError(f"{path.name}: not a .flo file (it does not begin with {FLO_MAGIC})")
    width, height = (int(v) for v in np.frombuffer(raw, "<i4", 2, offset=4))
    if min(width, height) < 1 or len(raw) < 12 + 8 * width * height:
        raise ValueError(f"{path.name}: cut off, {len(raw)} bytes for a flow of {width} x {height}")
    values = np.frombuffer(raw, "<f4", 2 * width * height, offset=12).reshape(height, width, 2)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())
