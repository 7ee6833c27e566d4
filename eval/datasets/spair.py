"""SPair-71k: 1800 images, 70,958 pairs, 18 categories (Min et al. 2019, arXiv 1908.10543); and SPair-U, other
keypoints on its test images (Mariotti et al. 2025, arXiv 2506.08220).

Layout: ``{JPEGImages,ImageAnnotation}/<category>/<image>.{jpg,json}`` and
``PairAnnotation/{trn,val,test}/<id>-<source>-<target>:<category>.json``, the colon also as ``%3A``. SPair-U has the
annotations of the test split in that layout and no images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from diffrep.eval.datasets.pairs import (
    AnnotatedImage,
    AnnotatedPair,
    DatasetError,
    PairSet,
    annotation_files,
    choose,
    collect,
    common,
    inside,
    need_folder,
    pair_name,
)
from diffrep.files import read_document

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "train", "tvmonitor",
)  # fmt: skip


def read_spair(
    root: str | Path,
    *,
    split: Literal["trn", "val", "test"] = "test",
    categories: Sequence[str] | None = None,
    keypoints: Literal["pair", "image"] = "pair",
) -> PairSet:
    """Read SPair-71k as released.

    Args:
        categories: all 18 where None.
        keypoints: ``pair`` takes the common keypoints that the pair's file lists (DIFT, sd-dino); ``image``
            takes all keypoints of both images from their own files (GeoAware), so that what is visible in
            only one of them is known too.

    Raises:
        DatasetError: this is not a folder of SPair-71k, or has no pair of that split.
        ValueError: there is no such category.
    """
    root = Path(root)
    need_folder(root, *_folders(split, keypoints), "JPEGImages")
    return _read(f"SPair-71k {split}", root, root, split, categories, keypoints)


def read_spair_u(
    root: str | Path, *, categories: Sequence[str] | None = None, keypoints: Literal["pair", "image"] = "pair"
) -> PairSet:
    """Read SPair-U: keypoints that SPair-71k has no annotation of, on the images of its test split.

    Args:
        root: folder of the annotations. The images are those of SPair-71k: in ``JPEGImages`` of this folder, or of
            a folder ``SPair-71k`` beside it.
        categories, keypoints: as in `read_spair`.

    Raises:
        DatasetError: there are no such annotations, or no images.
        ValueError: there is no such category.
    """
    root = Path(root)
    need_folder(root, *_folders("test", keypoints))
    homes = (root, root.absolute().parent / "SPair-71k")
    home = next((folder for folder in homes if (folder / "JPEGImages").is_dir()), None)
    if home is None:
        raise DatasetError(
            f"{root}: SPair-U is annotated on the images of SPair-71k, which are neither in"
            f" {homes[0] / 'JPEGImages'} nor in {homes[1] / 'JPEGImages'}"
        )
    return _read("SPair-U", root, home, "test", categories, keypoints)


def _folders(split: str, keypoints: Literal["pair", "image"]) -> tuple[str, ...]:
    return (f"PairAnnotation/{split}", *(["ImageAnnotation"] if keypoints == "image" else []))


def _read(
    name: str,
    root: Path,
    images: Path,
    split: str,
    categories: Sequence[str] | None,
    keypoints: Literal["pair", "image"],
) -> PairSet:
    wanted = choose(name, "category", CATEGORIES, categories)
    files = annotation_files(root / "PairAnnotation" / split)
    image_notes = cache(read_document)  # an image is in many pairs

    def read(file: Path) -> AnnotatedPair:
        pair = read_document(file)
        category, (source_name, target_name) = str(pair["category"]), (pair["src_imname"], pair["trg_imname"])
        if keypoints == "image":
            notes = [
                image_notes(root / inside(f"ImageAnnotation/{category}/{Path(str(name)).stem}.json"))
                for name in (source_name, target_name)
            ]
            source, target = (_image_from_own_note(category, note) for note in notes)
            ids = common(source, target)
        else:
            ids = tuple(int(i) for i in _list(pair["kps_ids"]))
            source, target = (_image_from_pair(category, pair, side, ids) for side in ("src", "trg"))
        return AnnotatedPair(pair_name(file), category, source, target, ids)

    entries = [(file.name, partial(read, file)) for file in files if pair_name(file).rpartition(":")[2] in wanted]
    return collect(name, images, wanted, entries, split=split)


def _image_from_pair(category: str, pair: Mapping[str, Any], side: str, ids: Sequence[int]) -> AnnotatedImage:
    width, height = (int(v) for v in pair[f"{side}_imsize"][:2])
    points = pair[f"{side}_kps"]
    if len(points) != len(ids):
        raise ValueError(f"{side}_kps has {len(points)} points for {len(ids)} kps_ids")
    keypoints = {i: _point(p) for i, p in zip(ids, points, strict=True)}
    path = f"JPEGImages/{category}/{pair[f'{side}_imname']}"
    return AnnotatedImage(path, (height, width), keypoints, _box(pair[f"{side}_bndbox"]))


def _image_from_own_note(category: str, note: Mapping[str, Any]) -> AnnotatedImage:
    keypoints = {int(i): _point(p) for i, p in sorted(note["kps"].items(), key=lambda kv: int(kv[0])) if p is not None}
    size = (int(note["image_height"]), int(note["image_width"]))
    return AnnotatedImage(f"JPEGImages/{category}/{note['filename']}", size, keypoints, _box(note["bndbox"]))


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a list was expected, got {value!r}")
    return value


def _point(value: Sequence[float]) -> tuple[float, float]:
    x, y = value
    return float(x), float(y)


def _box(value: Sequence[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(v) for v in value)
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"the box {list(value)} is empty")
    return x0, y0, x1, y1
