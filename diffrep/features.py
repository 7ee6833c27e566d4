"""Features as data: what a backbone gives for images, and the way from a pixel to a feature and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffrep.backbones import Backbone, BackboneError, Grid, load_backbone
from diffrep.images import ImageLike, Placement, fit_image, load_image, stack_pixels
from diffrep.pictures import component_colours, side_by_side, stacked
from diffrep.results import Result
from diffrep.settings import ExtractConfig, changed, near_names


def lattice(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(h, w, 2) int64: the (column, row) of every place of an h x w map."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    return torch.stack([columns, rows], dim=-1)


def sample(values: Tensor, cells: Tensor) -> Tensor:
    """Read a (h, w, C) map at fractional cells (..., 2) as (column, row), bilinearly: (..., C), float32.

    Beyond the outermost centres the border is repeated. At the cell centres of a finer grid this is what
    `interpolate(mode="bilinear", align_corners=False)` gives; for a few places it reads only their cells. What is read
    where is worked out where the cells lie: a few places cost less on the host than in launches on a GPU.
    """
    height, width, channels = values.shape
    x, y = cells[..., 0].clamp(0, width - 1), cells[..., 1].clamp(0, height - 1)
    left, top = x.floor().long(), y.floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    corners = torch.stack([top * width + left, bottom * width + left, top * width + right, bottom * width + right])
    across, down = torch.stack([x - left, y - top])[..., None].to(values.device, non_blocking=True)
    four = values.reshape(-1, channels)[corners.to(values.device, non_blocking=True)].float()
    upper, lower = torch.lerp(four[:2], four[2:], across)
    return torch.lerp(upper, lower, down)


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
        cells = self.cells(points)
        return Rows(tuple(sample(part, cells) for part in self.parts), self.weights)


def check_descriptors(**images: object) -> None:
    """Refuse what are no descriptors of an image.

    Raises:
        TypeError: the message names the argument.
    """
    for name, value in images.items():
        if not isinstance(value, Descriptors):
            raise TypeError(
                f"{name} must be the Descriptors of an image, which `Correspondence.describe`, `fuse` and"
                f" `FeatureMaps.layer` give, got {type(value).__name__}"
            )


@dataclass(frozen=True, repr=False)
class FeatureMaps(Result):
    """Feature maps of a batch of B images, one map per tap.

    Attributes:
        maps: tap -> (B, C, h, w), floating point. C, h and w differ between taps; B does not.
        placements: one per image: how it lay on the canvas that the network saw.
        grids: tap -> where the cells of its map lie on that canvas.
        settings: what made the features: backbone, dtype and every extraction setting, JSON-ready.
    """

    maps: Mapping[str, Tensor]
    placements: tuple[Placement, ...]
    grids: Mapping[str, Grid]
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {tap: tuple(m.shape) for tap, m in self.maps.items()}
        if not shapes:
            raise ValueError("FeatureMaps needs at least one map")
        if any(len(s) != 4 or s[0] != len(self.placements) for s in shapes.values()):
            raise ValueError(f"maps must be (B, C, h, w) with B = {len(self.placements)} placements, got {shapes}")
        if set(self.grids) != set(self.maps):
            raise ValueError(f"maps have taps {sorted(self.maps)} but grids {sorted(self.grids)}")
        object.__setattr__(self, "maps", MappingProxyType(dict(self.maps)))
        object.__setattr__(self, "grids", MappingProxyType(dict(self.grids)))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(self.maps)

    def __len__(self) -> int:
        return len(self.placements)

    @overload
    def __getitem__(self, index: int) -> FeatureMaps: ...

    @overload
    def __getitem__(self, index: str) -> Tensor: ...

    def __getitem__(self, index: int | str) -> FeatureMaps | Tensor:
        """Image `index` alone, as a batch of one (views, no copies); or the map (B, C, h, w) of a tap.

        Raises:
            KeyError: there is no such tap; the message lists the near names.
        """
        if isinstance(index, str):
            if index not in self.maps:
                near = near_names(index, self.maps, self.taps, cutoff=0.3)
                raise KeyError(f"no features of the tap {index!r}; {near}")
            return self.maps[index]
        index = range(len(self))[index]
        maps = {tap: m[index : index + 1] for tap, m in self.maps.items()}
        return replace(self, maps=maps, placements=(self.placements[index],))

    def __iter__(self) -> Iterator[FeatureMaps]:
        return (self[index] for index in range(len(self)))

    def picture(self) -> Image.Image:
        """Three joint principal components of each tap as colours: a row per tap, an image per column (up to 4)."""
        shown = [self.maps[tap][:4].movedim(1, -1) for tap in self.taps]
        rows = [component_colours(list(maps)) for maps in shown]
        return stacked(
            [side_by_side(row, titles=[tap], height=240)[0] for tap, row in zip(self.taps, rows, strict=True)]
        )

    def to(self, *args: Any) -> FeatureMaps:
        """Move or cast the maps, as `Tensor.to` does."""
        return replace(self, maps={tap: m.to(*args) for tap, m in self.maps.items()})

    def layer(self, tap: str, image: int = 0) -> Descriptors:
        """One image's map of a tap, as descriptors of one part (a view): the way from pixels to cells and back."""
        vectors = self[tap][image].movedim(0, -1)
        return Descriptors((vectors,), (1.0,), self.placements[image], self.grids[tap])

    def cells(self, tap: str, points: Tensor, image: int = 0) -> Tensor:
        """Image points (..., 2) -> fractional cell coordinates (..., 2) as (column, row) of `tap`'s map."""
        return self.layer(tap, image).cells(points)

    def points(self, tap: str, cells: Tensor, image: int = 0) -> Tensor:
        """Fractional cell coordinates (..., 2) as (column, row) -> image points (..., 2) as (x, y)."""
        return self.layer(tap, image).points(cells)

    def cell_centres(self, tap: str, image: int = 0) -> Tensor:
        """(h, w, 2): the image points (x, y) at the centres of the cells, on the CPU."""
        layer = self.layer(tap, image)
        return layer.points(lattice(layer.size))

    def content_mask(self, tap: str, image: int = 0) -> Tensor:
        """(h, w) bool: the cells whose centre lies on the image and not on padding."""
        height, width = self.placements[image].image_size
        x, y = self.cell_centres(tap, image).unbind(-1)
        return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)

    def at(self, tap: str, points: Tensor | np.ndarray | Sequence[Sequence[Sequence[float]]]) -> Tensor:
        """Features at image points, interpolated bilinearly between cell centres.

        Args:
            tap: which map to read.
            points: (B, N, 2) as (x, y) in pixels of each original image.

        Returns:
            (B, N, C), in the dtype of the map. Beyond the outermost centres the border is repeated.

        Raises:
            KeyError: there is no such tap.
            ValueError: the points have another shape, or are no numbers.
        """
        places = numbers_of(points, f"({len(self)}, N, 2) as (x, y)")
        if places.ndim != 3 or places.shape[::2] != (len(self), 2):
            raise ValueError(f"points must be ({len(self)}, N, 2) as (x, y), got {tuple(places.shape)}")
        sampled = [self.layer(tap, i).at(p).parts[0] for i, p in enumerate(places.float())]
        return torch.stack(sampled).to(self.maps[tap].dtype)


def numbers_of(points: Any, form: str) -> Tensor:
    """Points, however they come, as a tensor.

    Args:
        form: of them, for the message.

    Raises:
        ValueError: they are no numbers, or not as many in every row.
    """
    if isinstance(points, Tensor):
        return points
    try:  # a copy: torch takes no array with negative strides
        return torch.from_numpy(np.array(points, dtype=np.float64, order="C"))
    except (TypeError, ValueError):
        raise ValueError(f"points must be {form}, got {points!r}") from None


def configured(config: ExtractConfig | None, settings: Mapping[str, Any]) -> ExtractConfig:
    """A configuration with some settings changed.

    Raises:
        TypeError: there is no such setting; the message lists the near names.
        ValueError: a setting has a value that no backbone takes.
    """
    return changed(config or ExtractConfig(), settings, "extraction")


def listed(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Images one by one: a single one, however it comes, is a list of one."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4:
        return [images]
    if isinstance(images, bytes) or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        return [load_image(images)]  # type: ignore[arg-type]  # says what an image may be
    return images


@torch.inference_mode()
def extract(
    backbone: Backbone | str | os.PathLike[str],
    images: ImageLike | Iterable[ImageLike],
    config: ExtractConfig | None = None,
    **settings: Any,
) -> FeatureMaps:
    """Read features of images that share one canvas size, in batches.

    A result does not depend on the other images, their order or the batch size beyond float rounding.

        maps = extract("tiny", "cat.jpg", taps="up.1")
        maps["up.1"]  # (1, C, h, w)

    Args:
        backbone: a loaded one, or what `load_backbone` takes.
        images: one or many: paths, PIL images, arrays or tensors; see `diffrep.images.load_image`.
        settings: of `ExtractConfig`, in the place of those of `config`: ``taps="up.1"``, ``timestep=100``.

    Raises:
        BackboneError: the backbone was loaded without its weights, or cannot be loaded.
        ImageError: an image cannot be read.
        TapError: the backbone has no such tap.
        TypeError: there is no such setting; the message lists the near names.
        ValueError: the images do not share one canvas size (use `extract_each`), or none is given.
    """
    maps = list(extract_each(backbone, images, config, **settings))
    if not maps:
        raise ValueError("extract needs at least one image")
    sizes = {m.placements[0].canvas_size for m in maps}
    if len(sizes) > 1:
        raise ValueError(
            f"the images come to canvases of different sizes {sorted(sizes)}: use extract_each, or a Sizing with mode"
            " 'squash' or 'pad'"
        )
    first = maps[0]
    return replace(
        first,
        maps={tap: torch.cat([m.maps[tap] for m in maps]) for tap in first.taps},
        placements=tuple(m.placements[0] for m in maps),
    )


def extract_each(
    backbone: Backbone | str | os.PathLike[str],
    images: ImageLike | Iterable[ImageLike],
    config: ExtractConfig | None = None,
    *,
    progress: bool = False,
    **settings: Any,
) -> Iterator[FeatureMaps]:
    """Read features of images of any sizes; yields one `FeatureMaps` of batch size one per image, in order.

    Neighbouring images that come to the same canvas size go through the network in one batch. Arguments and errors as
    of `extract`; a wrong setting is refused at once, an image when its turn comes.
    """
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone)
    if backbone.device.type == "meta" and backbone.source != "random":  # those made in memory count operations
        raise BackboneError(f"{backbone.name}: was loaded without its weights (weights=False) and has no features")
    resolved = configured(config, settings).resolve(backbone)
    return _extract_each(backbone, listed(images), resolved, progress)


@torch.inference_mode()
def _extract_each(
    backbone: Backbone, images: Iterable[ImageLike], config: ExtractConfig, progress: bool
) -> Iterator[FeatureMaps]:
    assert config.sizing is not None
    settings = {
        "backbone": backbone.name,
        "weights": backbone.source,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **asdict(config),
    }
    waiting: list[tuple[Tensor, Placement]] = []

    def batch() -> Iterator[FeatureMaps]:
        canvases, placements = zip(*waiting, strict=True)
        maps = extract_canvases(backbone, torch.stack(canvases), placements, config, settings)
        waiting.clear()
        return (maps[i] for i in range(len(maps)))

    for image in tqdm(images, desc="extract", unit="image", disable=not progress):
        fitted = fit_image(load_image(image), config.sizing)
        if waiting and (waiting[0][0].shape != fitted[0].shape or len(waiting) >= config.batch_size):
            yield from batch()
        waiting.append(fitted)
    if waiting:
        yield from batch()


@torch.inference_mode()
def extract_canvases(
    backbone: Backbone,
    canvases: Tensor,
    placements: Sequence[Placement],
    config: ExtractConfig,
    settings: Mapping[str, object] | None = None,
) -> FeatureMaps:
    """Read features of images that lie on the network's canvas already, as `fit_image` puts them there.

    Args:
        canvases: (B, 3, H, W) uint8, on any device.
        placements: how the images lie on them.
        config: resolved for the backbone.
    """
    pixels, taps = stack_pixels(canvases.unbind()), tuple(config.taps or ())
    if config.window is None:
        maps = backbone.maps(pixels, taps, config.conditions(), batch_size=config.batch_size)
        grids = {tap: backbone.grid(tap, placements[0].canvas_size, maps[tap].shape[-2:]) for tap in taps}
    else:
        maps, grids = _tiled_maps(backbone, pixels, taps, config)
    return FeatureMaps(maps, tuple(placements), grids, settings or {})


def window_origins(side: int, window: int) -> list[int]:
    """Where windows start along a side: steps of one window, the last one shifted back inside.

    >>> window_origins(960, 512)
    [0, 448]
    """
    window = min(window, side)
    return sorted({min(start, side - window) for start in range(0, side, window)})


def _tiled_maps(
    backbone: Backbone, pixels: Tensor, taps: Sequence[str], config: ExtractConfig
) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    """Run every window through the network on its own and average the maps where windows overlap.

    This is how sd-dino and GeoAware run Stable Diffusion over a 960 canvas (four windows of 512). A window that starts
    between two cells is put at the one before, as their extractor does; cells that the canvas cuts are left out.
    """
    assert config.window is not None
    batch, _, height, width = pixels.shape
    window_height, window_width = min(config.window, height), min(config.window, width)
    corners = [(y, x) for y in window_origins(height, config.window) for x in window_origins(width, config.window)]
    windows = torch.cat([pixels[..., y : y + window_height, x : x + window_width] for y, x in corners])
    maps = backbone.maps(windows, taps, config.conditions(), batch_size=config.batch_size)
    merged, grids = {}, {}
    for tap, tiles in maps.items():
        grid = backbone.grid(tap, (window_height, window_width), tiles.shape[-2:])
        down, across = tiles.shape[-2:]
        if not np.allclose((across * grid.stride[0], down * grid.stride[1]), (window_width, window_height)):
            raise ValueError(
                f"windows of {config.window} on a {height} x {width} canvas do not hold whole cells of {tap}"
                f" (stride {grid.stride[0]:g}): choose sides and windows that are multiples of the stride"
            )
        rows, columns = height * down // window_height, width * across // window_width
        total = tiles.new_zeros(batch, tiles.shape[1], rows, columns, dtype=torch.float32)
        count = tiles.new_zeros(rows, columns, dtype=torch.float32)
        for (y, x), tile in zip(corners, tiles.split(batch), strict=True):
            row, column = y * down // window_height, x * across // window_width
            place = np.s_[..., row : row + down, column : column + across]
            total[place] += tile
            count[place] += 1
        merged[tap] = (total / count).to(tiles.dtype)
        grids[tap] = grid
    return merged, grids
