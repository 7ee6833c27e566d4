"""Where in the collection is this? From an image, or a part of one, to the places in a collection that look alike."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.repositories import without_fetching
from diffrep.draw import draw_contact_sheet
from diffrep.features import ExtractConfig, FeatureMaps, extract
from diffrep.files import printable
from diffrep.images import ImageError, ImageLike, load_image
from diffrep.index.stored import IndexConfig, Level, Place, StoredIndex, index_store, open_index
from diffrep.store import BulkConfig, Extracted, Keep, extract_store, open_store
from diffrep.store.manifest import difference, extract_config, provenance
from diffrep.store.shards import pooled
from diffrep.store.sources import find_sources, read_image

_MORE = 8  # times as many places as images are searched, and more again, for one image can have several
_MOST = 4096  # places that are searched at most


@dataclass(frozen=True)
class Hit:
    """One answer.

    Attributes:
        place: image and point.
        score: cosine.
        vector: its row in the index.
    """

    place: Place
    score: float
    vector: int

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        values: dict[str, Any] = {"image": self.place.image, "path": str(self.place.root / self.place.image)}
        if self.place.point is not None:
            values["point"] = [round(value, 1) for value in self.place.point]
        return values | {"score": self.score}


def query_image(
    index: StoredIndex,
    image: ImageLike,
    *,
    point: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    k: int = 10,
    backbone: str | Backbone | None = None,
    device: str = "auto",
) -> list[Hit]:
    """The k images of a collection that look most like an image, or have the places most like a part of it.

    An index of level ``patch`` is searched for the part; without a part, for the mean of the image. One of level
    ``image`` has no places: where a part is asked for, it gives the k most similar images, in which the part is then
    looked for.

    Args:
        point: (x, y) in pixels of the image: a place in it.
        box: (x0, y0, x1, y1) in pixels of the image: the mean over a part of it.
        backbone: the one that made the index: loaded, or by the name under which it lies now. None: as the index
            names it, where nothing has to be fetched for that.

    Returns:
        At most k hits, best first, one per image: its best place.

    Raises:
        ImageError: the image cannot be read.
        ValueError: the part lies outside of the image, or the backbone is not the one of the index.
    """
    picture = load_image(image)
    _check_question(point, box, k, picture.size)
    loaded, config = _backbone_of(index, backbone, device)
    features = extract(loaded, [picture], config)
    whole = pooled(features, index.tap)[0].cpu()
    part = _part(features, index.tap, point, box)
    if index.level == "image" and part is not None:
        return _look_inside(_best_images(index, whole, k), part, index.tap, loaded, config)
    return _best_images(index, whole if part is None else part, k)


@dataclass(frozen=True)
class FolderSearch:
    """What `search_folder` did.

    Attributes:
        hits: best first, one per image.
        extracted: what was added to the features of the folder.
        index: that was asked.
    """

    hits: list[Hit]
    extracted: Extracted
    index: StoredIndex


def search_folder(
    folder: str | Path,
    image: ImageLike,
    *,
    point: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    k: int = 10,
    backbone: str | Backbone = "tiny",
    config: ExtractConfig | None = None,
    bulk: BulkConfig | None = None,
    work: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> FolderSearch:
    """Search a folder of images: extract what is new or has changed, index it, and ask, all in one call.

    Args:
        folder: the images.
        image, point, box, k: what to look for; see `query_image`.
        work: where features and indexes stay, so that the next question is answered at once; None: the folder
            ``NAME.search`` beside `folder`.

    Raises:
        ImageError: the image cannot be read, or there are none in the folder.
        ValueError: the part lies outside of the image.
        OSError: the work folder cannot be written to.
    """
    picture = load_image(image)
    _check_question(point, box, k, picture.size)
    root, sources = find_sources([folder])
    loaded = load_backbone(backbone, device=device, dtype=dtype) if isinstance(backbone, str) else backbone
    settings = json.dumps(provenance(loaded, config or ExtractConfig()), sort_keys=True)
    beside = Path(folder).absolute().with_name(f"{Path(folder).absolute().name}.search")
    # each backbone and way of extraction has its place
    base = Path(work or beside) / hashlib.sha256(settings.encode()).hexdigest()[:12]
    bulk = replace(bulk or BulkConfig(), changed="update")
    keep = Keep(kind="maps")
    extracted = extract_store([folder], base / "store", loaded, config, keep, bulk, root=root, progress=progress)
    store = open_store(base / "store")
    if not len(store):
        name, reason = store.quarantined[0]
        raise ImageError(f"{printable(folder)}: no image in it can be used, first {printable(name)}: {reason}")
    level: Level = "image" if point is None and box is None else "patch"
    place = base / ("images.index" if level == "image" else "places.index")
    index = None
    with contextlib.suppress(ValueError):  # there is none, or it is damaged
        index = open_index(place)
    if index is None or not index.holds([store]):
        index = index_store([store], place, IndexConfig(level=level), replace=True, progress=progress)
    present = {source.name for source in sources}
    gone = len(set(store.names) - present)
    hits = query_image(index, picture, point=point, box=box, k=k + gone, backbone=loaded)
    return FolderSearch([hit for hit in hits if hit.place.image in present][:k], extracted, index)


def contact_sheet(
    picture: Image.Image,
    hits: Sequence[Hit],
    *,
    point: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    relevant: Sequence[bool] = (),
) -> Image.Image:
    """The image that was asked with, and what was found; images that are gone are named on an empty sheet.

    Args:
        relevant: of each hit whether it is one that was looked for; those get a frame.
    """
    shown = []
    for hit in hits:
        try:
            image: Image.Image | None = read_image(hit.place.root, hit.place.image)
        except ImageError:
            image = None
        shown.append((image, f"{hit.score:.3f}  {printable(hit.place.image)}", hit.place.point))
    return draw_contact_sheet(picture, shown, point=point, box=box, relevant=relevant)


def needs_fetching(index: StoredIndex) -> str | None:
    """The backbone of an index where it is neither part of the package nor on this machine, else None."""
    name = str(index.features.get("backbone"))
    return None if without_fetching(name) else name


def _backbone_of(index: StoredIndex, backbone: str | Backbone | None, device: str) -> tuple[Backbone, ExtractConfig]:
    """The backbone that made an index, checked, and how it was used.

    Raises:
        ValueError: the backbone has other weights or settings than the index's, or would have to be fetched.
    """
    if backbone is None and (name := needs_fetching(index)) is not None:
        raise ValueError(
            f"{index.folder} was made with the backbone {name!r}, which would have to be fetched: nothing is fetched"
            f" because an index says so; to have it fetched say --backbone {name}"
        )
    try:
        config = extract_config(index.features)
        name, dtype = index.features["backbone"], getattr(torch, index.features["dtype"])
        if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
            raise TypeError("backbone and dtype must be names")
        if index.tap not in (config.taps or ()):
            raise ValueError(f"its tap {index.tap!r} is none of its features")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{index.folder}: the index does not say how it was made ({error})") from None
    if backbone is None or isinstance(backbone, str):
        backbone = load_backbone(backbone or without_fetching(name) or name, device=device, dtype=dtype)
    try:
        way = provenance(backbone, config)
    except ValueError as error:  # a tap that the backbone does not have
        raise ValueError(f"{index.folder}: {error}") from None
    differing = difference(index.features, way, ignore=frozenset({"backbone", "points_sha256"}))
    if differing is not None:
        raise ValueError(f"{backbone.name} is not the backbone of the index {index.folder} ({differing})")
    return backbone, config


def _best_images(index: StoredIndex, vector: Tensor, k: int) -> list[Hit]:
    """The k images with the vectors nearest to one of (C,), one hit per image."""
    count = k if index.level == "image" else _MORE * k
    while True:
        count = min(count, len(index))
        answer, hits = index.search(vector[None], count), dict[int, Hit]()
        for row, score in zip(answer.indices[0].tolist(), answer.scores[0].tolist(), strict=True):
            if row >= 0 and (number := index.image_of(row)) not in hits:
                hits[number] = Hit(index.place(row), score, row)
        if len(hits) >= k or count >= min(len(index), _MOST):
            return list(hits.values())[:k]
        count *= _MORE


def _look_inside(hits: Sequence[Hit], part: Tensor, tap: str, backbone: Backbone, config: ExtractConfig) -> list[Hit]:
    """The same images with the place in each that is most like a part (C,); those that are gone come last."""
    inside, unread = [], []
    for hit in hits:
        try:
            maps = extract(backbone, [read_image(hit.place.root, hit.place.image)], config)
        except ImageError:
            unread.append(hit)
            continue
        mask = maps.content_mask(tap)
        if not mask.any():  # thinner than a cell
            unread.append(hit)
            continue
        cells = F.normalize(maps.maps[tap][0].float().cpu().permute(1, 2, 0)[mask], dim=1)
        scores = cells @ F.normalize(part, dim=0)
        best = int(scores.argmax())
        x, y = maps.cell_centres(tap)[mask][best].tolist()
        inside.append(Hit(replace(hit.place, point=(x, y)), float(scores[best]), hit.vector))
    return sorted(inside, key=lambda hit: -hit.score) + unread


def _part(features: FeatureMaps, tap: str, point: Sequence[float] | None, box: Sequence[float] | None) -> Tensor | None:
    """(C,) float32 of a place, or the mean over the cells whose centre lies in a box; None where there is no part."""
    if box is not None:
        x0, y0, x1, y1 = box
        x, y = features.cell_centres(tap).unbind(-1)
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        if bool(inside.any()):
            return features.maps[tap][0].float().cpu()[:, inside].mean(1)
        point = ((x0 + x1) / 2, (y0 + y1) / 2)  # no cell has its centre in it: the feature at its own
    if point is None:
        return None
    return features.at(tap, torch.tensor([[list(point)]], dtype=torch.float32))[0, 0].float().cpu()


def _check_question(point: Sequence[float] | None, box: Sequence[float] | None, k: int, size: tuple[int, int]) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if point is not None and box is not None:
        raise ValueError("a part is one point or one box, not both")
    part = list(point or box or ())
    for x, y in zip(part[::2], part[1::2], strict=True):
        if not (-0.5 <= x <= size[0] - 0.5 and -0.5 <= y <= size[1] - 0.5):
            raise ValueError(f"({x:g}, {y:g}) lies outside of the image of {size[0]} x {size[1]} pixels")
    if len(part) == 4 and not (part[0] < part[2] and part[1] < part[3]):
        raise ValueError(f"a box is x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {','.join(f'{v:g}' for v in part)}")
