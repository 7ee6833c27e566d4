"""Matching: from places in one image to the same places in another.

`match_points` carries single points, `match_dense` every location of the source, `mutual_matches` gives the
pairs that are best in both directions. All work on `Descriptors`, in pixels of the original images, whatever
resizing and padding the backbones needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.backbones import Grid
from diffrep.features import Descriptors, Rows, check_descriptors, lattice, numbers_of
from diffrep.images import Placement
from diffrep.masks import read_mask
from diffrep.results import Result
from diffrep.settings import MatchConfig
from diffrep.similarity import FAISS_FROM, Metric, Nearest, PixelScorer, Scorer, nearest, soft_argmax


@dataclass(frozen=True, repr=False)
class Matches(Result):
    """N points of the source and where they went.

    Attributes:
        points: (N, 2) float32, (x, y) in pixels of the target image.
        scores: (N,) float32, cosine (or minus the squared distance) of the best cell or pixel.
        mutual: (N,) bool: the target's own best match lies within one cell of the point; None: not asked for.
        sources: (N, 2) float32, the points, (x, y) in pixels of the source image.
        images: the two images, where they are known, to draw the matches on.
    """

    MAIN = "points"

    points: Tensor
    scores: Tensor
    mutual: Tensor | None = None
    sources: Tensor | None = None
    images: tuple[Image.Image, Image.Image] | None = None

    def picture(self) -> Image.Image | None:
        from diffrep.draw import draw_matches

        if self.images is None or self.sources is None:
            return None
        return draw_matches(*self.images, self.sources.cpu(), self)

    def columns(self) -> dict[str, Tensor]:
        places = {} if self.sources is None else {"source_x": self.sources[:, 0], "source_y": self.sources[:, 1]}
        mutual = {} if self.mutual is None else {"mutual": self.mutual}
        return {**places, "x": self.points[:, 0], "y": self.points[:, 1], "score": self.scores, **mutual}


@dataclass(frozen=True, repr=False)
class DenseMatches(Result):
    """Where each of the source's h x w locations went.

    Attributes:
        sources: (h, w, 2), the image points (x, y) of the locations.
        points: (h, w, 2), (x, y) in pixels of the target image; NaN where `valid` is not.
        scores: (h, w); NaN where `valid` is not.
        valid: (h, w) bool: the location lies on the image and in the mask.
        mutual: (h, w) bool: the location is the best of its best location too; None: not asked for.
        images: the two images, where they are known, to draw the field on.
    """

    MAIN = "points"

    sources: Tensor
    points: Tensor
    scores: Tensor
    valid: Tensor
    mutual: Tensor | None = None
    images: tuple[Image.Image, Image.Image] | None = None

    def picture(self) -> Image.Image | None:
        from diffrep.draw import draw_field

        return None if self.images is None else draw_field(*self.images, self)

    def columns(self) -> dict[str, Tensor]:
        """One row for each valid location."""
        inside = self.valid
        mutual = None if self.mutual is None else self.mutual[inside]
        return Matches(self.points[inside], self.scores[inside], mutual, self.sources[inside]).columns()


@torch.no_grad()
def match_points(
    source: Descriptors,
    target: Descriptors,
    points: Tensor | np.ndarray | Sequence[Sequence[float]],
    config: MatchConfig | None = None,
    *,
    mask: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> Matches:
    """Find the places in the target image that correspond to points of the source image.

    Args:
        points: (N, 2) as (x, y) in pixels of the source image.
        mask: (H', W') bool or 0/1 over the whole target image, at any resolution: where matches may lie.
            Padding is left out in any case.
        source_mask: the same for the source; only `mutual` looks at it.

    Raises:
        ValueError: a point lies outside the source image, a mask is no map or leaves nothing, or the two
            sides were not fused alike.
    """
    check_descriptors(source=source, target=target)
    config = config or MatchConfig()
    # a few numbers, on the host: a GPU would wait for the launches
    points = points.cpu() if isinstance(points, Tensor) else points
    places = check_points(points, source.placement.image_size)
    if config.source == "bilinear":
        queries = source.at(places)
    else:
        queries = source.rows()[source.nearest_cells(places).to(source.device)]
    points = places.to(source.device, non_blocking=True)
    allowed = open_cells(target, mask)
    matched, scores = _find(queries, target, allowed, mask, config)
    if not config.mutual:
        return Matches(matched, scores, None, points)
    back = open_cells(source, source_mask)
    home = nearest(target.rows()[target.nearest_cells(matched)], _take(source, back), config.metric)
    cells = back[home.indices]
    returned = torch.stack([cells % source.size[1], cells // source.size[1]], dim=-1)
    # not the very cell: a point at a cell's edge is as near to the next
    return Matches(matched, scores, ((returned - source.cells(points)).abs() <= 1).all(-1), points)


@torch.no_grad()
def match_dense(
    source: Descriptors,
    target: Descriptors,
    config: MatchConfig | None = None,
    *,
    mask: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> DenseMatches:
    """Find the corresponding place for every location of the source.

    Args and errors as in `match_points`; locations outside `source_mask` are not matched.
    """
    check_descriptors(source=source, target=target)
    config = config or MatchConfig()
    cells, allowed = open_cells(source, source_mask), open_cells(target, mask)
    queries, targets = _take(source, cells), _take(target, allowed)
    best = _best_cells(queries, targets, config) if config.mode == "cell" or config.mutual else None
    if best is not None and config.mode == "cell":
        matched, scores = _place(target, allowed[best.indices]), best.scores
    else:
        matched, scores = _find(queries, target, allowed, mask, config)

    def spread(values: Tensor, empty: float | bool) -> Tensor:
        if len(cells) == source.size[0] * source.size[1]:
            return values.unflatten(0, source.size)
        full = values.new_full((source.size[0] * source.size[1], *values.shape[1:]), empty)
        full[cells] = values
        return full.unflatten(0, source.size)

    valid = spread(torch.ones_like(cells, dtype=torch.bool), False)
    mutual = None if best is None or best.mutual is None else spread(best.mutual, False)
    centres = _layout(source)[1].clone()
    return DenseMatches(centres, spread(matched, torch.nan), spread(scores, torch.nan), valid, mutual)


@torch.no_grad()
def mutual_matches(
    source: Descriptors,
    target: Descriptors,
    metric: Metric = "cosine",
    *,
    mask: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> tuple[Tensor, Matches]:
    """The pairs of cells that are each other's best, best score first.

    Returns:
        (N, 2) source points and their matches, both at the centres of cells.
    """
    cells, allowed = open_cells(source, source_mask), open_cells(target, mask)
    best = nearest(_take(source, cells), _take(target, allowed), metric, mutual=True)
    assert best.mutual is not None
    pairs = best.mutual.nonzero()[:, 0]
    pairs = pairs[best.scores[pairs].argsort(descending=True, stable=True)]
    matched, sources = _place(target, allowed[best.indices[pairs]]), _place(source, cells[pairs])
    return sources, Matches(matched, best.scores[pairs], torch.ones_like(pairs, dtype=torch.bool), sources)


def check_points(points: Tensor | np.ndarray | Sequence[Sequence[float]], image_size: tuple[int, int]) -> Tensor:
    """(N, 2) float32 points that lie on an image of (H, W) pixels.

    Raises:
        ValueError: they do not; the message names the first that does not.
    """
    points = numbers_of(points, "(N, 2) numbers as (x, y)")
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be (N, 2) as (x, y), got {tuple(points.shape)}")
    points, (height, width) = points.float(), image_size
    inside = (points >= -0.5) & (points <= points.new_tensor([width - 0.5, height - 0.5]))  # false for NaN too
    if not bool(inside.all()):
        x, y = points[~inside.all(1)][0].tolist()
        raise ValueError(f"point ({x:g}, {y:g}) lies outside the image of {width} x {height} pixels")
    return points


def open_cells(descriptors: Descriptors, mask: Tensor | None) -> Tensor:
    """(M,) int64: the cells that lie on the image and in the mask, in order.

    A cell is in the mask if the mask is set at its centre, or at the image's edge next to it.
    """
    if mask is None:
        return _layout(descriptors)[0]
    allowed = descriptors.on_image() & read_mask(mask, descriptors.cell_centres(), descriptors.placement.image_size)
    if not bool(allowed.any()):
        raise ValueError("the mask leaves no cell of the image: it is empty, or thinner than the cells")
    return allowed.flatten().nonzero()[:, 0]


def _layout(descriptors: Descriptors) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers (M,) of the cells that lie on the image, the centres (h, w, 2) of all, and the same drawn onto it.

    Worked out on the host, once for all pairs of a size: on a GPU these few numbers would cost more than the products.
    """
    return _layout_of(descriptors.size, descriptors.placement, descriptors.grid, str(descriptors.device))


@lru_cache(maxsize=64)
def _layout_of(size: tuple[int, int], placement: Placement, grid: Grid, device: str) -> tuple[Tensor, Tensor, Tensor]:
    bare = Descriptors((torch.empty(*size, 0),), (1.0,), placement, grid)
    with torch.inference_mode(False):
        cells, centres = bare.on_image().flatten().nonzero()[:, 0], bare.cell_centres()
        return cells.to(device), centres.to(device), _onto_image(centres.flatten(0, 1), placement).to(device)


def _onto_image(points: Tensor, placement: Placement) -> Tensor:
    """Points (N, 2), those beyond the image's edge drawn to it."""
    (height, width), (x, y) = placement.image_size, points.unbind(-1)
    return torch.stack([x.clamp(0, width - 1), y.clamp(0, height - 1)], dim=-1)


def _take(descriptors: Descriptors, cells: Tensor) -> Rows:
    """The rows of some cells; all of them are not copied."""
    rows = descriptors.rows()
    return rows if len(cells) == len(rows) else rows[cells]


def _best_cells(queries: Rows, targets: Rows, config: MatchConfig) -> Nearest:
    backend = "faiss" if config.backend == "auto" and len(targets) >= FAISS_FROM else config.backend
    if backend != "faiss" or config.metric != "cosine":
        return nearest(queries, targets, config.metric, mutual=config.mutual)
    from diffrep.index import FaissIndex, search  # loads FAISS and the stores

    sources, gallery = (F.normalize(rows.joined(), dim=1) for rows in (queries, targets))
    neighbours = search(FaissIndex(gallery), sources)
    indices, mutual = neighbours.indices[:, 0], None
    if config.mutual:
        back = search(FaissIndex(sources), gallery).indices[:, 0]
        mutual = back[indices] == torch.arange(len(indices), device=indices.device)
    return Nearest(indices, neighbours.scores[:, 0], mutual)


def _place(descriptors: Descriptors, cells: Tensor) -> Tensor:
    """(N, 2) image points of cells, by number or as (N, 2); those half on padding are drawn to the image's edge."""
    if cells.ndim == 1:
        return _layout(descriptors)[2][cells]
    return _onto_image(descriptors.points(cells), descriptors.placement)


def _find(
    queries: Rows, target: Descriptors, allowed: Tensor, mask: Tensor | None, config: MatchConfig
) -> tuple[Tensor, Tensor]:
    """(N, 2) target points and (N,) scores of queries, in the mode of the settings."""
    if config.mode == "cell":
        best = nearest(queries, _take(target, allowed), config.metric)
        return _place(target, allowed[best.indices]), best.scores
    memory = config.memory_mb * 2**20
    points, scores = [queries.parts[0].new_empty(0, 2)], [queries.parts[0].new_empty(0)]
    if config.mode == "pixel":
        scorer = PixelScorer(target, config.metric)
        pixels = lattice(scorer.size, target.device).float()
        barred = None if mask is None else ~read_mask(mask, pixels, scorer.size)
        for _, maps in scorer.chunks(queries, memory):
            if barred is not None:
                maps.masked_fill_(barred, -torch.inf)
            values, indices = maps.flatten(1).max(1)
            points.append(pixels.flatten(0, 1)[indices])
            scores.append(values)
        return torch.cat(points), torch.cat(scores)
    closed = torch.ones(len(target.rows()), dtype=torch.bool, device=target.device)
    closed[allowed] = False
    for _, chunk in Scorer(target.rows(), config.metric).chunks(queries, memory):
        maps = chunk.masked_fill_(closed, -torch.inf).unflatten(1, target.size)
        soft = soft_argmax(maps, window=config.window, temperature=config.temperature, outside=config.outside)
        points.append(_place(target, soft))
        scores.append(chunk.amax(1))
    return torch.cat(points), torch.cat(scores)


@torch.no_grad()
def mutual_distance(source: Descriptors, target: Descriptors) -> Tensor:
    """GeoAware's instance distance without masks: mean Euclidean distance over mutually nearest cells, ()."""
    sources, targets = source.rows(), target.rows()
    best = nearest(sources, targets, "euclidean", mutual=True)
    assert best.mutual is not None
    return _distances(sources.joined(), targets.joined()[best.indices])[best.mutual].mean()


ABSENT = -1e5  # GeoAware's value of what is zero


@torch.no_grad()
def masked_distance(
    source: Descriptors, target: Descriptors, source_mask: Tensor, mask: Tensor, *, side: int = 64
) -> Tensor:
    """GeoAware's instance distance with masks: mean distance of the source's foreground to the target, ().

    Both maps are resized bilinearly to `side` x `side`, the masks (H', W') by nearest neighbour. Masks cover
    the whole map, padding included. As in the released code every zero then becomes `ABSENT`: what the masks hide, and
    also single features that are zero, as behind a ReLU.

    Raises:
        ValueError: a mask leaves nothing.
    """
    sides = []
    for descriptors, shape in ((source, source_mask), (target, mask)):
        vectors = descriptors.vectors().movedim(-1, 0)[None].float()
        resized = F.interpolate(vectors, size=(side, side), mode="bilinear")[0].flatten(1).T
        inside = F.interpolate(shape[None, None].float(), size=(side, side), mode="nearest").flatten() > 0
        if not bool(inside.any()):
            raise ValueError(f"a mask of {tuple(shape.shape)} leaves nothing at {side} x {side}")
        sides.append(resized[inside.to(resized.device)])
    if not bool(inside.all()):  # what the mask hides of the target is all one place
        sides[1] = F.pad(sides[1], (0, 0, 0, 1))
    (a, no_a), (b, no_b) = ((values, (values == 0).to(values)) for values in sides)
    # the square of a difference with ABSENT in some places, without what large numbers would leave of small ones
    unlike = no_a.sum(1)[:, None] + no_b.sum(1) - 2 * no_a @ no_b.T
    squares = torch.cdist(a, b).square() - 2 * ABSENT * (a @ no_b.T + no_a @ b.T) + ABSENT**2 * unlike
    sources, targets = (values.masked_fill(values == 0, ABSENT) for values in sides)
    return _distances(sources, targets[squares.argmin(1)]).mean()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b, dim=1)
