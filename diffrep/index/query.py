"""Where in the collection is this? From an image, or a part of one, to the places in a collection that look alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones import Backbone, load_backbone
from diffrep.features import FeatureMaps, extract
from diffrep.images import ImageLike, load_image
from diffrep.index.stored import Place, StoredIndex
from diffrep.store.manifest import difference, extract_config, provenance
from diffrep.store.shards import pooled

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
    device: str = "cpu",
) -> list[Hit]:
    """The k images of a collection that look most like an image, or have the places most like a part of it.

    Args:
        point: (x, y) in pixels of the image: a place in it. For indexes of level ``patch``.
        box: (x0, y0, x1, y1) in pixels of the image: the mean over a part of it. For indexes of level ``patch``.
        backbone: where the one that made the index lies now, or a loaded one; None: as the index names it.

    Returns:
        At most k hits, best first, one per image: its best place.

    Raises:
        ImageError: the image cannot be read.
        ValueError: a part is missing or lies outside of the image, or the backbone is not the one of the index.
    """
    picture = load_image(image)
    if (point is not None) + (box is not None) != (index.level == "patch"):
        raise ValueError(
            "the index holds whole images: ask without a point or a box"
            if index.level == "image"
            else "the index holds places in images: say which part of yours, by one point or one box"
        )
    _check_inside(point or box, picture.size)
    features = read_as_index(index, picture, backbone, device)
    if index.level == "image":
        vector = pooled(features, index.tap)[0]
    elif point is not None:
        vector = features.at(index.tap, torch.tensor([[list(point)]], dtype=torch.float32))[0, 0].float()
    else:
        assert box is not None
        vector = mean_in_box(features, index.tap, box)
    hits: dict[int, Hit] = {}
    wanted = k if index.level == "image" else _MORE * k
    while True:
        wanted = min(wanted, len(index))
        found = index.search(vector[None], wanted)
        for row, score in zip(found.indices[0].tolist(), found.scores[0].tolist(), strict=True):
            if row >= 0 and (number := int(index.image_of(torch.tensor(row)))) not in hits:
                hits[number] = Hit(index.place(row), score, row)
        if len(hits) >= k or wanted >= min(len(index), _MOST):
            break
        hits.clear()
        wanted *= _MORE
    return list(hits.values())[:k]


def read_as_index(index: StoredIndex, picture: ImageLike, backbone: str | Backbone | None, device: str) -> FeatureMaps:
    """Features of an image, made as those of the index were.

    Raises:
        ValueError: the backbone has other weights or settings than the index's.
    """
    if backbone is None or isinstance(backbone, str):
        dtype = getattr(torch, index.features["dtype"])
        backbone = load_backbone(backbone or index.features["backbone"], device=device, dtype=dtype)
    config = extract_config(index.features)
    own = provenance(backbone, config)
    found = difference(index.features, own, ignore=frozenset({"backbone", "points_sha256"}))
    if found is not None:
        raise ValueError(f"{backbone.name} is not the backbone of the index {index.folder} ({found})")
    return extract(backbone, [picture], config)


def mean_in_box(features: FeatureMaps, tap: str, box: Sequence[float]) -> Tensor:
    """(C,) float32: the mean over the cells whose centre lies in a box of the image; at its centre if none does."""
    x0, y0, x1, y1 = box
    x, y = features.cell_centres(tap).unbind(-1)
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    if not inside.any():
        return features.at(tap, torch.tensor([[[(x0 + x1) / 2, (y0 + y1) / 2]]]))[0, 0].float()
    return features.maps[tap][0].float().cpu()[:, inside].mean(1)


def _check_inside(part: Sequence[float] | None, size: tuple[int, int]) -> None:
    if part is None:
        return
    for x, y in zip(part[::2], part[1::2], strict=True):
        if not (-0.5 <= x <= size[0] - 0.5 and -0.5 <= y <= size[1] - 0.5):
            raise ValueError(f"({x:g}, {y:g}) lies outside of the image of {size[0]} x {size[1]} pixels")
    if len(part) == 4 and not (part[0] < part[2] and part[1] < part[3]):
        raise ValueError(f"a box is x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {','.join(f'{v:g}' for v in part)}")
