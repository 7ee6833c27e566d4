"""AP-10K as released, in the layout of COCO, and the pairs that GeoAware-SC makes of it (arXiv 2311.17034).

Layout: ``annotations/ap10k-{train,val,test}-split{1,2,3}.json`` and ``data/<image>.jpg``. Each image's first animal
is taken, if it shows three keypoints or more. The images of a species, in order: the last 30 are for ``test``, the 20
before them for ``val``, the others for ``trn``. Two images make a pair if they share three keypoints or more:

- ``trn``, ``val``, ``test``: of one species; all such pairs, but at most 50 for each image of ``trn``;
- ``test_cross_species``: of two species of a family, 900 drawn for each family;
- ``test_cross_family``: of two families, 30 drawn for each two.

The published benchmark lists the files in the order of its authors' disk, and leaves out a list of crowded images that
is not part of the release. Here they are sorted, and nothing is left out, so pairs can differ from the published ones.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, islice, product
from pathlib import Path
from typing import Any, Literal

from diffrep.eval.datasets.pairs import (
    AnnotatedImage,
    AnnotatedPair,
    DatasetError,
    PairSet,
    choose,
    inside,
    read_pairs,
)
from diffrep.eval.report import Problem
from diffrep.files import read_document

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
