"""Readers of the published sets of image pairs with keypoints, in the layouts in which they are released.

SPair-71k: 1800 images, 70,958 pairs, 18 categories (Min et al. 2019, arXiv 1908.10543). Layout:
``{JPEGImages,ImageAnnotation}/<category>/<image>.{jpg,json}`` and
``PairAnnotation/{trn,val,test}/<id>-<source>-<target>:<category>.json``, the colon also as ``%3A``. SPair-U, other
keypoints on its test images (Mariotti et al. 2025, arXiv 2506.08220), has annotations in that layout and no images.

PF-PASCAL and PF-WILLOW (Ham et al. 2017, arXiv 1703.07144): ``PF-dataset-PASCAL/JPEGImages/*.jpg`` and
``PF-dataset-PASCAL/{test,val,trn}_pairs_pf_pascal.csv`` with columns source_image, target_image (paths that begin with
the folder's own name), class (1-based, VOC order), XA, YA, XB, YB (numbers separated by ";");
``PF-dataset/<class folder>/*.png`` and ``PF-dataset/test_pairs_pf.csv`` with the two paths and ten columns each of
XA, YA, XB, YB.

AP-10K as GeoAware-SC's scripts arrange it (arXiv 2311.17034), for its release see below:
``JPEGImages/<family>/<species>/<image>.jpg``, ``ImageAnnotation/<family>/<species>/<image>.json`` with COCO fields and
``PairAnnotation/<set>/<a>-<b>:<name>.json`` with src_json_path and trg_json_path.
"""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, combinations, islice, product
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from diffrep.eval.datasets.pairs import (
    AnnotatedImage,
    AnnotatedPair,
    DatasetError,
    PairSet,
    choose,
    image_size,
    inside,
    need_folder,
    read_lines,
    read_pairs,
)
from diffrep.eval.report import Problem
from diffrep.files import read_document

# -- AP-10K as released, in the layout of COCO, and the pairs that GeoAware-SC makes of it (arXiv 2311.17034)
# Layout: ``annotations/ap10k-{train,val,test}-split{1,2,3}.json`` and ``data/<image>.jpg``. Each image's first animal
# is taken, if it shows three keypoints or more. The images of a species, in order: the last 30 are for ``test``, the 20
# before them for ``val``, the others for ``trn``. Two images make a pair if they share three keypoints or more:
# - ``trn``, ``val``, ``test``: of one species; all such pairs, but at most 50 for each image of ``trn``;
# - ``test_cross_species``: of two species of a family, 900 drawn for each family;
# - ``test_cross_family``: of two families, 30 drawn for each two.
# The published benchmark lists the files in the order of its authors' disk, and leaves out a list of crowded images
# that is not part of the release. Here they are sorted, and nothing is left out, so pairs can differ from the published
# ones.


KEYPOINTS = 17
Ap10kSet = Literal["trn", "val", "test", "test_cross_species", "test_cross_family"]

SHARED = 3  # keypoints that a pair needs
_TEST, _VAL = 30, 20  # images of a species
_TRAIN_PAIRS = 50  # for each image
_OF_FAMILY, _OF_FAMILIES = 900, 30  # pairs that are drawn
_SEED = 42

Species = tuple[str, str]  # family, species
Drawn = tuple[str, AnnotatedImage, AnnotatedImage]  # category, source, target


def is_release(root: Path) -> bool:
    """Whether a folder holds AP-10K as its authors released it."""
    return any((root / "annotations").glob("ap10k-*-split*.json"))


def read_release(root: Path, split: Ap10kSet, categories: Sequence[str] | None = None) -> PairSet:
    """Make the pairs of one set.

    Args:
        categories: species, families, or two families as ``Canidae-Felidae``, as the set has it; all where None.

    Raises:
        DatasetError: there are no pairs for that set.
        ValueError: the set has no such category.
    """
    images, problems = _read_images(root)
    ends = {"trn": (None, -_TEST - _VAL), "val": (-_TEST - _VAL, -_TEST)}.get(split, (-_TEST, None))
    drawn = [*_draw(split, {species: members[slice(*ends)] for species, members in sorted(images.items())})]
    if not drawn:
        raise DatasetError(f"{root / 'annotations'}: no two images that make a pair of the set {split}")
    wanted = choose(f"AP-10K {split}", "category", sorted({category for category, _, _ in drawn}), categories)
    items = [
        (f"{category}: {source.path}, {target.path}", (category, source, target))
        for one in wanted
        for category, source, target in drawn
        if category == one
    ]
    name = f"AP-10K {split} (pairs made here, images in sorted order)"
    return read_pairs(name, root, wanted, items, _pair, problems, split=split)


def as_image(path: str, note: Mapping[str, Any]) -> AnnotatedImage:
    """An image from COCO's fields: keypoints (x, y, visible)..., bbox (left, top, width, height), width, height.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or malformed.
    """
    values = note["keypoints"]
    if len(values) != 3 * KEYPOINTS:
        raise ValueError(f"{path} has {len(values)} keypoint numbers, expected {3 * KEYPOINTS}")
    keypoints = {i: (float(values[3 * i]), float(values[3 * i + 1])) for i in range(KEYPOINTS) if values[3 * i + 2] > 0}
    left, top, width, height = (float(v) for v in note["bbox"])
    box = (left, top, left + width, top + height)
    return AnnotatedImage(path, (int(note["height"]), int(note["width"])), keypoints, box)


def _read_images(root: Path) -> tuple[dict[Species, list[AnnotatedImage]], list[Problem]]:
    """The images of every species, sorted by name, and what could not be used.

    Raises:
        DatasetError: a file of annotations is not COCO's.
    """
    images: dict[Species, dict[str, AnnotatedImage]] = defaultdict(dict)
    problems = []
    seen = set()  # each of the three splits of the release has all images
    for file in sorted((root / "annotations").glob("ap10k-*-split*.json")):
        try:
            note = read_document(file)
            if not all(isinstance(note[field], list) for field in ("categories", "images", "annotations")):
                raise ValueError("categories, images and annotations should be lists")
            species = {c["id"]: (str(c["supercategory"]), str(c["name"])) for c in note["categories"]}
            of_image = {image["id"]: image for image in note["images"]}
            animals = [(animal["image_id"], animal) for animal in note["annotations"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{file}: annotations as COCO has them were expected ({error!r})") from None
        for number, animal in animals:
            if number in seen:
                continue
            seen.add(number)
            try:
                about = of_image[number]
                name = str(about["file_name"])
                image = as_image(inside(f"data/{name}"), {**about, **animal})
                kind = species[animal["category_id"]]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                problems.append(Problem(f"{file.name}, image {number}", f"malformed annotation ({error!r})"))
                continue
            if len(image.keypoints) >= SHARED:
                images[kind][name] = image
    return {kind: [members[name] for name in sorted(members)] for kind, members in images.items()}, problems


def _draw(split: Ap10kSet, taken: Mapping[Species, Sequence[AnnotatedImage]]) -> Iterator[Drawn]:
    """The pairs of a set, of the images that it may take of each species."""
    drawing = random.Random(_SEED)
    families: dict[str, list[Sequence[AnnotatedImage]]] = defaultdict(list)
    for (family, _), images in taken.items():
        families[family].append(images)
    if split == "test_cross_family":
        for one, other in combinations(families, 2):
            sides = [list(chain(*families[family])) for family in (one, other)]
            fitting = (pair for pair in _products(sides[0], sides[1], drawing) if _match(*pair))
            yield from ((f"{one}-{other}", *pair) for pair in islice(fitting, _OF_FAMILIES))
    elif split == "test_cross_species":
        for family, members in families.items():
            across = (product(one, other) for one, other in combinations(members, 2))
            pairs = [pair for pair in chain.from_iterable(across) if _match(*pair)]
            yield from ((family, *pair) for pair in drawing.sample(pairs, min(_OF_FAMILY, len(pairs))))
    else:
        for (_, species), images in taken.items():
            pairs = [pair for pair in combinations(images, 2) if _match(*pair)]
            if split == "trn" and len(pairs) > _TRAIN_PAIRS * len(images):
                pairs = drawing.sample(pairs, _TRAIN_PAIRS * len(images))
            yield from ((species, *pair) for pair in pairs)


def _products(
    one: Sequence[AnnotatedImage], other: Sequence[AnnotatedImage], drawing: random.Random
) -> Iterator[tuple[AnnotatedImage, AnnotatedImage]]:
    """All pairs of two sets in random order; drawn one by one, for there are many and few are wanted."""
    total, seen = len(one) * len(other), set[int]()
    while len(seen) < total:
        number = drawing.randrange(total)
        if number not in seen:
            seen.add(number)
            yield one[number // len(other)], other[number % len(other)]


def _match(a: AnnotatedImage, b: AnnotatedImage) -> bool:
    return len(a.keypoints.keys() & b.keypoints.keys()) >= SHARED


def _pair(drawn: Drawn) -> AnnotatedPair:
    category, source, target = drawn
    name = f"{Path(source.path).stem}-{Path(target.path).stem}:{category}"
    return AnnotatedPair.of(name, category, source, target)


# ------------------------------------------------------------------------------------------------------------


PASCAL_CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPAIR_CATEGORIES = tuple(name for name in PASCAL_CATEGORIES if name not in ("diningtable", "sofa"))
WILLOW_CATEGORIES = ("car", "duck", "motorbike", "winebottle")
WILLOW_POINTS = 10
Keypoints = Literal["pair", "image"]


# -- a JSON file for each pair: SPair-71k, SPair-U, AP-10K -----------------------------------------------------------


def _annotated(
    name: str,
    root: Path,
    split: str,
    categories: Sequence[str] | None,
    read: Callable[[str, str, Mapping[str, Any]], AnnotatedPair],
    *,
    images: Path | None = None,
    known: Sequence[str] | None = None,
) -> PairSet:
    """The pairs of ``PairAnnotation/<split>/<pair>:<category>.json``.

    Args:
        read: makes a pair of the name and category of its file and of what is in it.
        images: the folder that has the images; `root` where None.
        known: the benchmark's categories; those of the files where None.
    """
    folder = root / "PairAnnotation" / split
    pairs = {file: file.stem.replace("%3A", ":") for file in sorted(folder.glob("*.json"))}
    if not pairs:
        raise DatasetError(f"{folder}: no pair annotation (*.json) in it")
    category_of = {file: pair.rpartition(":")[2] for file, pair in pairs.items()}
    wanted = choose(name, "category", known or sorted(set(category_of.values())), categories)
    files = [(file.name, file) for file in pairs if category_of[file] in wanted]

    def read_file(file: Path) -> AnnotatedPair:
        return read(pairs[file], category_of[file], read_document(file))

    return read_pairs(name, images or root, wanted, files, read_file, split=split)


def read_spair(
    root: str | Path,
    *,
    split: Literal["trn", "val", "test"] = "test",
    categories: Sequence[str] | None = None,
    keypoints: Keypoints = "pair",
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
    need_folder(root, *_spair_folders(split, keypoints), "JPEGImages")
    return _read_spair(f"SPair-71k {split}", root, root, split, categories, keypoints)


def read_spair_u(
    root: str | Path, *, categories: Sequence[str] | None = None, keypoints: Keypoints = "pair"
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
    need_folder(root, *_spair_folders("test", keypoints))
    homes = (root, root.absolute().parent / "SPair-71k")
    home = next((folder for folder in homes if (folder / "JPEGImages").is_dir()), None)
    if home is None:
        raise DatasetError(
            f"{root}: SPair-U is annotated on the images of SPair-71k, which are neither in"
            f" {homes[0] / 'JPEGImages'} nor in {homes[1] / 'JPEGImages'}"
        )
    return _read_spair("SPair-U", root, home, "test", categories, keypoints)


def _spair_folders(split: str, keypoints: Keypoints) -> tuple[str, ...]:
    return (f"PairAnnotation/{split}", *(["ImageAnnotation"] if keypoints == "image" else []))


def _read_spair(
    name: str, root: Path, images: Path, split: str, categories: Sequence[str] | None, keypoints: Keypoints
) -> PairSet:
    image_notes = cache(read_document)  # an image is in many pairs

    def read(pair: str, _: str, note: Mapping[str, Any]) -> AnnotatedPair:
        category = str(note["category"])
        if keypoints == "image":
            stems = [Path(str(note[f"{side}_imname"])).stem for side in ("src", "trg")]
            notes = [image_notes(root / inside(f"ImageAnnotation/{category}/{stem}.json")) for stem in stems]
            return AnnotatedPair.of(pair, category, *(_image_from_note(category, one) for one in notes))
        if not isinstance(note["kps_ids"], list):
            raise ValueError(f"a list was expected, got {note['kps_ids']!r}")
        ids = tuple(int(i) for i in note["kps_ids"])
        source, target = (_image_from_pair(category, note, side, ids) for side in ("src", "trg"))
        return AnnotatedPair(pair, category, source, target, ids)

    return _annotated(name, root, split, categories, read, images=images, known=SPAIR_CATEGORIES)


def _image_from_pair(category: str, pair: Mapping[str, Any], side: str, ids: Sequence[int]) -> AnnotatedImage:
    width, height = (int(v) for v in pair[f"{side}_imsize"][:2])
    points = pair[f"{side}_kps"]
    if len(points) != len(ids):
        raise ValueError(f"{side}_kps has {len(points)} points for {len(ids)} kps_ids")
    keypoints = {i: _point(p) for i, p in zip(ids, points, strict=True)}
    path = f"JPEGImages/{category}/{pair[f'{side}_imname']}"
    return AnnotatedImage(path, (height, width), keypoints, _box(pair[f"{side}_bndbox"]))


def _image_from_note(category: str, note: Mapping[str, Any]) -> AnnotatedImage:
    keypoints = {int(i): _point(p) for i, p in sorted(note["kps"].items(), key=lambda kv: int(kv[0])) if p is not None}
    size = (int(note["image_height"]), int(note["image_width"]))
    return AnnotatedImage(f"JPEGImages/{category}/{note['filename']}", size, keypoints, _box(note["bndbox"]))


def _point(value: Sequence[float]) -> tuple[float, float]:
    x, y = value
    return float(x), float(y)


def _box(value: Sequence[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(v) for v in value)
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"the box {list(value)} is empty")
    return x0, y0, x1, y1


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
    image_notes = cache(read_document)  # an image is in many pairs

    def image(path: str) -> AnnotatedImage:
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if "ImageAnnotation" not in parts:
            raise ValueError(f"the path {path!r} does not lead into ImageAnnotation")
        # what is before ImageAnnotation is another machine's folder
        note = inside("/".join(parts[parts.index("ImageAnnotation") :]))
        file = PurePosixPath(note.replace("ImageAnnotation", "JPEGImages", 1)).with_suffix(".jpg")
        return as_image(str(file), image_notes(root / note))

    def read(pair: str, category: str, note: Mapping[str, Any]) -> AnnotatedPair:
        return AnnotatedPair.of(pair, category, image(str(note["src_json_path"])), image(str(note["trg_json_path"])))

    return _annotated(f"AP-10K {split}", root, split, categories, read)


# -- one table of all pairs: PF-PASCAL, PF-WILLOW ---------------------------------------------------------------------


def read_pf_pascal(
    root: str | Path, *, split: Literal["trn", "val", "test"] = "test", categories: Sequence[str] | None = None
) -> PairSet:
    """Read PF-PASCAL as released; `root` is the folder ``PF-dataset-PASCAL``.

    Raises:
        DatasetError: the folder or its list of pairs is missing, or the list has other columns.
        ValueError: there is no such category.
    """
    root = Path(root)
    need_folder(root, "JPEGImages")
    wanted = choose("PF-PASCAL", "category", PASCAL_CATEGORIES, categories)

    def category_of(row: Sequence[str]) -> str:
        return PASCAL_CATEGORIES[int(row[2]) - 1]

    def is_wanted(row: Sequence[str]) -> bool:
        known = len(row) > 2 and row[2].strip().isdigit() and 1 <= int(row[2]) <= len(PASCAL_CATEGORIES)
        return not known or category_of(row) in wanted  # a row without a class is a problem, not another class

    def read(row: _Row) -> AnnotatedPair:
        name, cells = row
        return _pair_of_row(root, name, category_of(cells), cells, [cell.split(";") for cell in cells[3:7]])

    table = root / f"{split}_pairs_pf_pascal.csv"
    rows = _rows(table, ("source_image", "target_image", "class", "XA", "YA", "XB", "YB"))
    items = [(row[0], row) for row in rows if is_wanted(row[1])]
    return read_pairs(f"PF-PASCAL {split}", root, wanted, items, read, split=split)


def read_pf_willow(root: str | Path, *, categories: Sequence[str] | None = None) -> PairSet:
    """Read PF-WILLOW as released; `root` is the folder ``PF-dataset``. It has no boxes and no splits.

    Raises:
        DatasetError: the folder or its list of pairs is missing.
        ValueError: there is no such category.
    """
    root = Path(root)
    need_folder(root)
    wanted = choose("PF-WILLOW", "category", WILLOW_CATEGORIES, categories)

    def category_of(row: Sequence[str]) -> str:
        return Path(row[0]).parent.name.partition("(")[0]  # "car(G)" -> "car"

    def read(row: _Row) -> AnnotatedPair:
        name, cells = row
        if len(cells) != 2 + 4 * WILLOW_POINTS:
            raise ValueError(f"{len(cells)} columns, expected {2 + 4 * WILLOW_POINTS}")
        axes = [cells[2 + i * WILLOW_POINTS : 2 + (i + 1) * WILLOW_POINTS] for i in range(4)]
        return _pair_of_row(root, name, category_of(cells), cells, axes)

    rows = _rows(root / "test_pairs_pf.csv", ("source_image", "target_image"))
    return read_pairs("PF-WILLOW", root, wanted, [(row[0], row) for row in rows if category_of(row[1]) in wanted], read)


_Row = tuple[str, list[str]]  # name, cells


def _rows(table: Path, columns: Sequence[str]) -> list[_Row]:
    """The rows of a CSV file whose header begins with these columns."""
    try:
        head, *rows = [row for row in csv.reader(read_lines(table)) if row] or [[]]
    except csv.Error as error:
        raise DatasetError(f"{table}: is no table of pairs ({error})") from None
    if [cell.strip().lower() for cell in head[: len(columns)]] != [column.lower() for column in columns]:
        raise DatasetError(f"{table}: the columns should begin with {', '.join(columns)}, they are {', '.join(head)}")
    return [(f"{table.name} row {number}", row) for number, row in enumerate(rows, start=1)]


def _pair_of_row(
    root: Path, name: str, category: str, paths: Sequence[str], axes: Sequence[Sequence[str]]
) -> AnnotatedPair:
    """A pair from the two paths and from the cells of XA, YA, XB, YB."""
    xa, ya, xb, yb = ([float(cell) for cell in cells if cell.strip()] for cells in axes)
    if not len(xa) == len(ya) == len(xb) == len(yb):
        raise ValueError(f"XA, YA, XB, YB have {len(xa)}, {len(ya)}, {len(xb)}, {len(yb)} numbers")
    images = []
    for path, x, y in ((paths[0], xa, ya), (paths[1], xb, yb)):
        file = inside(path.removeprefix(f"{root.name}/"))
        if not (root / file).is_file():
            raise FileNotFoundError(f"image {file} is missing")
        images.append(AnnotatedImage(file, image_size(root / file), dict(enumerate(zip(x, y, strict=True)))))
    return AnnotatedPair(name, category, images[0], images[1], tuple(range(len(xa))))
