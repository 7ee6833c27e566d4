"""AP-10K as a correspondence benchmark: animals of 54 species, three test sets (GeoAware-SC, arXiv 2311.17034).

Layout: that of the release (see `ap10k_release`), or the one that GeoAware-SC's scripts make of it:
``JPEGImages/<family>/<species>/<image>.jpg``, ``ImageAnnotation/<family>/<species>/<image>.json`` with COCO fields
(keypoints, bbox as left, top, width, height, width, height), ``PairAnnotation/<set>/<a>-<b>:<name>.json`` with
src_json_path and trg_json_path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from diffrep.eval.datasets.ap10k_release import Ap10kSet, as_image, is_release, read_release
from diffrep.eval.datasets.pairs import (
    AnnotatedImage,
    AnnotatedPair,
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


def read_ap10k(root: str | Path, *, split: Ap10kSet = "test", categories: Sequence[str] | None = None) -> PairSet:
    """Read AP-10K pairs. A category is a species, a family or a pair of families, as the set has it.

    Raises:
        DatasetError: the folders are missing, or that set has no pair.
        ValueError: that set has no such category.
    """
    root = Path(root)
    if is_release(root):
        return read_release(root, split, categories)
    need_folder(root, "ImageAnnotation", "JPEGImages", f"PairAnnotation/{split}")
    files = annotation_files(root / "PairAnnotation" / split)
    wanted = choose(f"AP-10K {split}", "category", sorted({_category(file) for file in files}), categories)
    image_notes = cache(read_document)  # an image is in many pairs

    def read(file: Path) -> AnnotatedPair:
        pair = read_document(file)
        notes = [inside(_below(str(pair[key]))) for key in ("src_json_path", "trg_json_path")]
        source, target = (_image(note, image_notes(root / note)) for note in notes)
        return AnnotatedPair(pair_name(file), _category(file), source, target, common(source, target))

    entries = [(file.name, partial(read, file)) for file in files if _category(file) in wanted]
    return collect(f"AP-10K {split}", root, wanted, entries, split=split)


def _category(file: Path) -> str:
    return pair_name(file).rpartition(":")[2]


def _below(path: str) -> str:
    """The part of a stored path from ImageAnnotation on; what is before it is another machine's folder."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if "ImageAnnotation" not in parts:
        raise ValueError(f"the path {path!r} does not lead into ImageAnnotation")
    return "/".join(parts[parts.index("ImageAnnotation") :])


def _image(note_path: str, note: Mapping[str, Any]) -> AnnotatedImage:
    path = str(PurePosixPath(note_path.replace("ImageAnnotation", "JPEGImages", 1)).with_suffix(".jpg"))
    return as_image(path, note)
