"""From feature maps to descriptors: joint PCA, resampling to one grid, normalisation, weights.

A `Fusion` says, as data, how the maps of one or several backbones become one descriptor per location. It
covers sd-dino ("A Tale of Two Features", 2023: joint PCA of a pair, the chain s5 -> s4 -> s3, DINO beside
it), GeoAware-SC ("Telling Left from Right", 2024) and any other choice of taps.

`Descriptors` keep their parts apart: the similarity of two fused descriptors is the weighted sum of the
parts' similarities, so nothing has to be concatenated, and weights can be changed at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.backbones import AggregationNetwork, BackboneError, Grid
from diffrep.features import FeatureMaps
from diffrep.images import Placement
from diffrep.pictures import component_colours, side_by_side
from diffrep.results import Result

ImageFeatures: TypeAlias = "FeatureMaps | Sequence[FeatureMaps]"
"""All features of one image: of one backbone, or of several that may have seen it at different sizes."""


@dataclass(frozen=True, repr=False)
class Rows(Result):
    """N descriptors in weighted parts, ready for products.

    Attributes:
        parts: one (N, C_i) matrix per part.
        weights: what each part is multiplied with in the joined descriptor.
    """

    parts: tuple[Tensor, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return self.parts[0].shape[0]

    def __getitem__(self, index: Tensor | slice) -> Rows:
        """Some of the rows, by numbers or a slice."""
        return replace(self, parts=tuple(part[index] for part in self.parts))

    def joined(self) -> Tensor:
        """(N, C): the weighted parts side by side, float32."""
        return torch.cat([part.float() * w for part, w in zip(self.parts, self.weights, strict=True)], dim=1)

    def squared_norms(self) -> Tensor:
        """(N,): squared lengths of the joined descriptors, float32."""
        weighted = zip(self.parts, self.weights, strict=True)
        return torch.stack([part.float().square().sum(1) * w**2 for part, w in weighted]).sum(0)


@dataclass(frozen=True, repr=False)
class Descriptors(Result):
    """One descriptor per location of one image.

    Attributes:
        parts: one (h, w, C_i) map per part, floating point.
        weights: what each part is multiplied with in the joined descriptor.
        placement: how the image lies on the canvas.
        grid: where the h x w locations lie on the canvas.
    """

    parts: tuple[Tensor, ...]
    weights: tuple[float, ...]
    placement: Placement
    grid: Grid

    def __post_init__(self) -> None:
        shapes = [tuple(part.shape) for part in self.parts]
        if not shapes or any(len(s) != 3 for s in shapes) or len({s[:2] for s in shapes}) != 1:
            raise ValueError(f"parts of descriptors must be (h, w, C) with one common h and w, got {shapes}")
        if len(self.weights) != len(self.parts):
            raise ValueError(f"{len(self.parts)} parts need as many weights, got {len(self.weights)}")

    @classmethod
    def from_vectors(cls, vectors: Tensor, image_size: tuple[int, int] | None = None) -> Descriptors:
        """Take (h, w, C) vectors that tile an image of `image_size` (H, W); None: one pixel per vector."""
        if vectors.ndim != 3:
            raise ValueError(f"vectors must be (h, w, C), got {tuple(vectors.shape)}")
        size = image_size or (vectors.shape[0], vectors.shape[1])
        grid = Grid.covering(size, (vectors.shape[0], vectors.shape[1]))
        return cls((vectors,), (1.0,), Placement.identity(size), grid)

    @property
    def size(self) -> tuple[int, int]:
        """(h, w): rows and columns of locations."""
        return self.parts[0].shape[0], self.parts[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def weighted(self, *weights: float) -> Descriptors:
        """The same parts under other weights."""
        return replace(self, weights=tuple(float(w) for w in weights))

    def rows(self) -> Rows:
        """All locations, row by row (views, no copies where the parts are contiguous)."""
        return Rows(tuple(part.flatten(0, 1) for part in self.parts), self.weights)

    def vectors(self) -> Tensor:
        """(h, w, C): the joined descriptors, float32."""
        return self.rows().joined().unflatten(0, self.size)

    def picture(self) -> Image.Image:
        """Three principal components as colours."""
        return side_by_side(component_colours([self.vectors()]))[0]

    def cells(self, points: Tensor) -> Tensor:
        """Image points (..., 2) -> fractional locations (..., 2) as (column, row)."""
        canvas = self.placement.to_canvas(points)
        return (canvas - canvas.new_tensor(self.grid.origin)) / canvas.new_tensor(self.grid.stride)

    def points(self, cells: Tensor) -> Tensor:
        """Fractional locations (..., 2) as (column, row) -> image points (..., 2) as (x, y)."""
        cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
        canvas = cells * cells.new_tensor(self.grid.stride) + cells.new_tensor(self.grid.origin)
        return self.placement.to_image(canvas)

    def cell_centres(self) -> Tensor:
        """(h, w, 2): the image points (x, y) at the centres of the locations."""
        return self.points(lattice(self.size, self.device))

    def nearest_cells(self, points: Tensor) -> Tensor:
        """Image points (N, 2) -> (N,) int64: the location that each lies in, as row * w + column."""
        height, width = self.size
        columns, rows = (self.cells(points) + 0.5).floor().long().unbind(-1)
        return rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)

    def on_image(self) -> Tensor:
        """(h, w) bool: the locations of which at least a part lies on the image and not on padding."""
        height, width = self.placement.image_size
        corners = torch.tensor([[-0.5, -0.5], [width - 0.5, height - 0.5]], device=self.device)
        first, last = self.cells(corners)
        rows, columns = (torch.arange(n, device=self.device) for n in self.size)
        # a hair off one half, so that a location which only touches the image's edge is left out
        inside_y = (rows > first[1] - 0.4999) & (rows < last[1] + 0.4999)
        inside_x = (columns > first[0] - 0.4999) & (columns < last[0] + 0.4999)
        return inside_y[:, None] & inside_x

    def at(self, points: Tensor) -> Rows:
        """Descriptors at image points (N, 2), each part bilinear; beyond the border it is repeated."""
        cells = self.cells(points.to(self.device))
        return Rows(tuple(sample(part, cells) for part in self.parts), self.weights)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One share of a descriptor: the maps of one or more taps of one backbone.

    The taps run from coarse to fine, the channels of the joined map from the finest tap to the coarsest. As a
    ``chain`` (sd-dino) the first map is resampled to the cells of the second and joined behind it, the result to
    the third, and so on; ``direct`` (GeoAware-SC) resamples every map to the cells of the last tap at once.
    """

    taps: tuple[str, ...]
    upsampling: Literal["chain", "direct"] = "chain"
    dims: tuple[int, ...] | None = None  # joint PCA: channels kept of each tap, in the order of the taps
    chunk_weights: tuple[tuple[int, float], ...] = ()  # (channels, weight) of consecutive chunks
    normalise: bool = True  # to unit length, per location
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.taps:
            raise ValueError("a part needs at least one tap")
        if self.dims is not None and (len(self.dims) != len(self.taps) or min(self.dims) < 1):
            raise ValueError(f"taps {', '.join(self.taps)} need as many PCA dimensions, at least 1, got {self.dims}")


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How feature maps become descriptors.

    The descriptors lie on the cells of the finest tap (the first of equals) unless `reference` names another;
    parts with other cells, also from a backbone that saw the image at another size, are resampled to it.
    """

    parts: tuple[Part, ...]
    reference: str | None = None  # the tap whose cells count; None: the finest
    normalise: bool = False  # the joined descriptor once more
    pca: Literal["exact", "lowrank"] = "exact"  # lowrank: sd-dino's randomised one, drawn from `seed`
    seed: int = 0
    aggregation: str | None = None  # file of a trained aggregation network that joins the parts (GeoAware-SC)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a fusion needs at least one part")

    @classmethod
    def of(cls, *taps: str, weights: Sequence[float] | None = None, dims: int | None = None) -> Fusion:
        """Each tap a part of its own, of unit length, all weighted alike unless `weights` says otherwise.

        >>> [part.weight for part in Fusion.of("up.1", "layer.5", weights=(1, 2)).parts]
        [1.0, 2.0]
        """
        if weights is not None and len(weights) != len(taps):
            raise ValueError(f"{len(taps)} taps ({', '.join(taps)}) need as many weights, got {len(weights)}")
        kept = None if dims is None else (dims,)
        pairs = zip(taps, weights or [1.0] * len(taps), strict=True)
        return cls(parts=tuple(Part(taps=(tap,), dims=kept, weight=float(w)) for tap, w in pairs))


SD_TAPS = ("up.0.resnet.1", "up.1.attention.1", "up.2.attention.1")  # s5, s4, s3 of sd-dino
SD_DINO = Fusion(parts=(Part(taps=SD_TAPS, dims=(256, 256, 256)), Part(taps=("layer.11",))))
GEOAWARE_ZERO_SHOT = Fusion(parts=(Part(taps=SD_TAPS, upsampling="direct"), Part(taps=("layer.11",))), normalise=True)


def aggregated(taps: Sequence[str], weights: str) -> Fusion:
    """Maps as they are, in the order in which a trained aggregation network in the file `weights` joins them."""
    return Fusion(parts=tuple(Part(taps=(tap,), normalise=False) for tap in taps), aggregation=weights)


def fuse(images: Sequence[ImageFeatures], fusion: Fusion) -> tuple[Descriptors, ...]:
    """Turn the features of images that belong together, usually a pair, into comparable descriptors.

    Args:
        images: one entry per image; each holds batches of one (index a larger `FeatureMaps` to get them).
        fusion: what is joined and how. A joint PCA sees the cells of all the images.

    Returns:
        One `Descriptors` per image, float32, in the order given.

    Raises:
        ValueError: a tap is missing or found twice, an entry holds several images, the images' channels
            differ, or more PCA dimensions are asked for than there are channels or cells.
        BackboneError: the file of the fusion's aggregation network is none, or the network joins other maps.
    """
    if not images:
        raise ValueError("fuse needs the features of at least one image")
    features = [(entry,) if isinstance(entry, FeatureMaps) else tuple(entry) for entry in images]
    for number, entry in enumerate(features):
        counts = [len(maps) for maps in entry]
        if set(counts) != {1}:
            raise ValueError(f"image {number}: features must be batches of one, got {counts}")
    generator = torch.Generator().manual_seed(fusion.seed)
    parts = [_part(features, part, fusion.pca, generator) for part in fusion.parts]
    joined = tuple(_join(features[i], fusion, [part[i] for part in parts]) for i in range(len(features)))
    if fusion.aggregation is None:
        return joined
    network = _aggregation_network(fusion.aggregation)
    return tuple(aggregate(descriptors, network) for descriptors in joined)


@torch.no_grad()
def aggregate(descriptors: Descriptors, network: AggregationNetwork) -> Descriptors:
    """Let a trained network join the parts, as GeoAware-SC and DIY-SC do, to one part of unit length.

    Raises:
        BackboneError: the network joins other maps than the parts.
    """
    channels = tuple(part.shape[-1] for part in descriptors.parts)
    if network.steps != 1 or channels != network.feature_dims:
        raise BackboneError(
            f"the aggregation network joins {network.steps} steps of {network.feature_dims} channels,"
            f" the parts have {channels}"
        )
    network = network.to(descriptors.device)
    joined = network([part.movedim(-1, 0)[None].float() for part in descriptors.parts])[0]
    return replace(descriptors, parts=(F.normalize(joined, dim=0).movedim(0, -1).contiguous(),), weights=(1.0,))


@lru_cache(maxsize=2)
def _aggregation_network(file: str) -> AggregationNetwork:
    return AggregationNetwork.load(Path(file))


@dataclass(frozen=True)
class _Map:
    """(C, h, w) of one image, on the cells of `tap` in `source`."""

    values: Tensor
    source: FeatureMaps
    tap: str


def _find(features: Sequence[FeatureMaps], tap: str) -> FeatureMaps:
    holders = [maps for maps in features if tap in maps.maps]
    if len(holders) != 1:
        there = sorted({t for maps in features for t in maps.taps})
        what = "no features hold" if not holders else f"{len(holders)} sets of features hold"
        raise ValueError(f"{what} the tap {tap!r}; there are {', '.join(there)}")
    return holders[0]


def _part(features: Sequence[Sequence[FeatureMaps]], part: Part, pca: str, generator: torch.Generator) -> list[_Map]:
    """One part's map of every image, before it is resampled to the reference."""
    chains: list[list[_Map]] = [[] for _ in features]
    for number, tap in enumerate(part.taps):
        sources = [_find(entry, tap) for entry in features]
        values = [maps.maps[tap][0].float() for maps in sources]
        channels = {v.shape[0] for v in values}
        if len(channels) != 1:
            raise ValueError(f"the images' maps of tap {tap!r} have different channels: {sorted(channels)}")
        if part.dims is not None:
            values = joint_pca(values, part.dims[number], generator=generator if pca == "lowrank" else None)
        for chain, maps, value in zip(chains, sources, values, strict=True):
            chain.append(_Map(value, maps, tap))
    return [_weigh(_join_taps(chain, part.upsampling), part) for chain in chains]


def _join_taps(chain: Sequence[_Map], upsampling: Literal["chain", "direct"]) -> _Map:
    if upsampling == "direct":
        finest = chain[-1]
        return replace(finest, values=torch.cat([_resample(own, finest) for own in reversed(chain)]))
    joined = chain[0]
    for finer in chain[1:]:
        joined = replace(finer, values=torch.cat([finer.values, _resample(joined, finer)]))
    return joined


def _weigh(joined: _Map, part: Part) -> _Map:
    values = joined.values
    if part.chunk_weights:
        sizes = [size for size, _ in part.chunk_weights]
        if sum(sizes) != values.shape[0]:
            raise ValueError(
                f"chunk_weights cover {sum(sizes)} channels, the taps {', '.join(part.taps)} have {values.shape[0]}"
            )
        weights = [weight for _, weight in part.chunk_weights]
        values = torch.cat([chunk * w for chunk, w in zip(values.split(sizes), weights, strict=True)])
    return replace(joined, values=F.normalize(values, dim=0) if part.normalise else values)


def _join(features: Sequence[FeatureMaps], fusion: Fusion, maps: Sequence[_Map]) -> Descriptors:
    """Bring one image's parts to the reference's cells."""
    if fusion.reference is None:
        reference = max(maps, key=lambda m: m.values.shape[1] * m.values.shape[2])
    else:
        holder = _find(features, fusion.reference)
        reference = _Map(holder.maps[fusion.reference][0], holder, fusion.reference)
    resampled = []
    for own, part in zip(maps, fusion.parts, strict=True):
        values = _resample(own, reference)
        if values is not own.values and part.normalise:
            values = F.normalize(values, dim=0)  # between cells an interpolated vector is shorter than one
        resampled.append(values.movedim(0, -1).contiguous())
    weights = tuple(part.weight for part in fusion.parts)
    grid = reference.source.grids[reference.tap]
    descriptors = Descriptors(tuple(resampled), weights, reference.source.placements[0], grid)
    if not fusion.normalise:
        return descriptors
    lengths = descriptors.rows().squared_norms().sqrt().clamp(min=1e-12).view(*descriptors.size, 1)
    return replace(descriptors, parts=tuple(part / lengths for part in descriptors.parts))


def _resample(own: _Map, onto: _Map) -> Tensor:
    """Read a map at the cell centres of another; the places are compared on the image, not on a canvas."""
    same_canvas = own.source.placements == onto.source.placements
    same_grid = own.source.grids[own.tap] == onto.source.grids[onto.tap]
    if same_canvas and same_grid and own.values.shape[1:] == onto.values.shape[1:]:
        return own.values
    cells = own.source.cells(own.tap, onto.source.cell_centres(onto.tap))
    return sample(own.values.movedim(0, -1), cells.to(own.values.device)).movedim(-1, 0)


def lattice(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(h, w, 2) int64: the (column, row) of every place of an h x w map."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    return torch.stack([columns, rows], dim=-1)


def sample(values: Tensor, cells: Tensor) -> Tensor:
    """Read a (h, w, C) map at fractional cells (..., 2) as (column, row), bilinearly: (..., C), float32.

    Beyond the outermost centres the border is repeated. At the cell centres of a finer grid this is what
    `interpolate(mode="bilinear", align_corners=False)` gives; for a few places it reads only their cells.
    """
    height, width, channels = values.shape
    rows = values.reshape(-1, channels)
    x, y = cells[..., 0].clamp(0, width - 1), cells[..., 1].clamp(0, height - 1)
    left, top = x.floor().long(), y.floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    upper = torch.lerp(rows[top * width + left].float(), rows[top * width + right].float(), across)
    lower = torch.lerp(rows[bottom * width + left].float(), rows[bottom * width + right].float(), across)
    return torch.lerp(upper, lower, down)


def joint_pca(maps: Sequence[Tensor], dims: int, *, generator: torch.Generator | None = None) -> list[Tensor]:
    """Project the maps of several images on the leading principal directions of all their cells together.

    The default is exact: an eigen-decomposition of the smaller of covariance and Gram matrix, in float64
    where that is small. Signs are fixed (the largest coordinate of each direction is positive), so two
    machines agree.

    Args:
        maps: each (C, h, w), one C; sizes may differ.
        dims: directions kept.
        generator: use sd-dino's randomised PCA (two power iterations, Halko et al. 2009) with the draw of
            this generator. On a flat spectrum it is up to a fifth of the maximum away from the exact
            distances.

    Returns:
        (dims, h, w) each, centred on the common mean, not whitened, float32.

    Raises:
        ValueError: `dims` is more than the channels or the cells.
    """
    cells = torch.cat([m.flatten(1).T.float() for m in maps])
    if not 1 <= dims <= min(cells.shape):
        raise ValueError(
            f"a PCA of {cells.shape[0]} cells with {cells.shape[1]} channels cannot keep {dims} dimensions"
        )
    cells = cells - cells.mean(0, keepdim=True)
    scores = _exact_scores(cells, dims) if generator is None else _lowrank_scores(cells, dims, generator)
    sizes = [m.shape[1] * m.shape[2] for m in maps]
    return [s.T.unflatten(1, m.shape[1:]) for s, m in zip(scores.split(sizes), maps, strict=True)]


def _exact_scores(cells: Tensor, dims: int) -> Tensor:
    count, channels = cells.shape
    wide = cells.double() if min(cells.shape) <= 256 else cells
    if channels <= count:
        _, vectors = torch.linalg.eigh(wide.T @ wide)
        scores = wide @ vectors.flip(1)[:, :dims]
    else:  # the coordinates are the Gram matrix's eigenvectors, scaled: the directions are never needed
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        scores = vectors.flip(1)[:, :dims] * values.flip(0)[:dims].clamp(min=0).sqrt()
    flipped = -scores.amin(0) > scores.amax(0)
    return (scores * torch.where(flipped, -1, 1)).float()


def _lowrank_scores(cells: Tensor, dims: int, generator: torch.Generator) -> Tensor:
    """`torch.pca_lowrank(cells, q=dims)` step by step, which has no way to be given a generator."""
    tall = cells if cells.shape[0] >= cells.shape[1] else cells.T
    draw = torch.randn(tall.shape[1], dims, generator=generator).to(tall.device)
    basis = torch.linalg.qr(tall @ draw).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    left, _, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    directions = right.T if tall is cells else basis @ left
    return cells @ directions
