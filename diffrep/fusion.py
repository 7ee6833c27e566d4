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
from torch import Tensor

from diffrep.backbones import AggregationNetwork, BackboneError
from diffrep.features import Descriptors, FeatureMaps
from diffrep.settings import SEED, check

ImageFeatures: TypeAlias = "FeatureMaps | Sequence[FeatureMaps]"
"""All features of one image: of one backbone, or of several that may have seen it at different sizes."""


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
        check(self, dims="1..")
        if not self.taps:
            raise ValueError("a part needs at least one tap")
        if self.dims is not None and len(self.dims) != len(self.taps):
            raise ValueError(f"taps {', '.join(self.taps)} need as many PCA dimensions, got {self.dims}")


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
        check(self, seed=SEED)
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
        each = None if dims is None else (dims,)
        pairs = zip(taps, weights or [1.0] * len(taps), strict=True)
        return cls(parts=tuple(Part(taps=(tap,), dims=each, weight=float(w)) for tap, w in pairs))


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


def _find(features: Sequence[FeatureMaps], tap: str) -> Descriptors:
    """One image's map of a tap: descriptors of one part (h, w, C), float32."""
    holders = [maps for maps in features if tap in maps.maps]
    if len(holders) != 1:
        known = ", ".join(sorted({t for maps in features for t in maps.taps}))
        what = "no features hold" if not holders else f"{len(holders)} sets of features hold"
        raise ValueError(f"{what} the tap {tap!r}; there are {known}")
    layer = holders[0].layer(tap)
    return replace(layer, parts=(layer.parts[0].float(),))


def _part(
    features: Sequence[Sequence[FeatureMaps]], part: Part, pca: str, generator: torch.Generator
) -> list[Descriptors]:
    """One part's map of every image, before it is resampled to the reference."""
    taps: list[list[Descriptors]] = []
    for number, tap in enumerate(part.taps):
        maps = [_find(entry, tap) for entry in features]
        channels = {m.parts[0].shape[-1] for m in maps}
        if len(channels) != 1:
            raise ValueError(f"the images' maps of tap {tap!r} have different channels: {sorted(channels)}")
        if part.dims is not None:
            values = [m.parts[0].movedim(-1, 0) for m in maps]
            values = joint_pca(values, part.dims[number], generator=generator if pca == "lowrank" else None)
            maps = [replace(m, parts=(v.movedim(0, -1),)) for m, v in zip(maps, values, strict=True)]
        taps.append(maps)
    return [_weigh(_join_taps(chain, part.upsampling), part) for chain in zip(*taps, strict=True)]


def _join_taps(chain: Sequence[Descriptors], upsampling: Literal["chain", "direct"]) -> Descriptors:
    finest = chain[-1]
    if upsampling == "direct":
        return replace(finest, parts=(torch.cat([_resample(m, finest) for m in reversed(chain)], dim=-1),))
    joined = chain[0]
    for finer in chain[1:]:
        joined = replace(finer, parts=(torch.cat([finer.parts[0], _resample(joined, finer)], dim=-1),))
    return joined


def _weigh(joined: Descriptors, part: Part) -> Descriptors:
    values = joined.parts[0]
    if part.chunk_weights:
        sizes, weights = zip(*part.chunk_weights, strict=True)
        if sum(sizes) != values.shape[-1]:
            raise ValueError(
                f"chunk_weights cover {sum(sizes)} channels, the taps {', '.join(part.taps)} have {values.shape[-1]}"
            )
        values = values * torch.tensor(weights).repeat_interleave(torch.tensor(sizes)).to(values)
    return replace(joined, parts=(F.normalize(values, dim=-1) if part.normalise else values,))


def _join(features: Sequence[FeatureMaps], fusion: Fusion, maps: Sequence[Descriptors]) -> Descriptors:
    """Bring one image's parts to the reference's cells."""
    if fusion.reference is None:
        reference = max(maps, key=lambda m: m.size[0] * m.size[1])
    else:
        reference = _find(features, fusion.reference)
    resampled = []
    for single, part in zip(maps, fusion.parts, strict=True):
        values = _resample(single, reference)
        if values is not single.parts[0] and part.normalise:
            values = F.normalize(values, dim=-1)  # between cells an interpolated vector is shorter than one
        resampled.append(values.contiguous())
    descriptors = replace(reference, parts=tuple(resampled), weights=tuple(part.weight for part in fusion.parts))
    if not fusion.normalise:
        return descriptors
    lengths = descriptors.rows().squared_norms().sqrt().clamp(min=1e-12).view(*descriptors.size, 1)
    return replace(descriptors, parts=tuple(part / lengths for part in descriptors.parts))


def _resample(single: Descriptors, onto: Descriptors) -> Tensor:
    """Read a map at the cell centres of another; the places are compared on the image, not on a canvas."""
    if (single.placement, single.grid, single.size) == (onto.placement, onto.grid, onto.size):
        return single.parts[0]
    return single.at(onto.cell_centres()).parts[0]


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
    # a GPU decomposes large matrices of float64 as fast as of float32, and small ones faster
    wide = cells.double() if min(cells.shape) <= 256 or cells.is_cuda else cells
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


def log_bin(feature_map: Tensor, *, hierarchy: int = 2) -> Tensor:
    """Join each cell with the averages of its neighbours at `hierarchy` scales (Amir et al., ViT descriptors).

    Scale k looks at the eight positions 3^k cells away, each averaged over 3^k by 3^k cells; positions beyond
    the border take the nearest cell inside.

    Args:
        feature_map: (B, C, h, w).

    Returns:
        (B, (1 + 8 * hierarchy) * C, h, w).
    """
    height, width = feature_map.shape[-2:]
    rows, columns = torch.arange(height), torch.arange(width)
    bins = []
    for step in (3**scale for scale in range(hierarchy)):
        pooled = F.avg_pool2d(feature_map, step, stride=1, padding=step // 2, count_include_pad=False)
        for down in (-step, 0, step):
            for right in (-step, 0, step):
                if down or right or step == 1:
                    shifted = pooled[..., (rows + down).clamp(0, height - 1), :]
                    bins.append(shifted[..., (columns + right).clamp(0, width - 1)])
    return torch.cat(bins, dim=1)
