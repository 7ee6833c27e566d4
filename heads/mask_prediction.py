"""Soft masks of images of any size: `SegmentationHead.predict`.

The network sees a square of its own working size, as published. What an image has beyond that is drawn in a second
look: windows of the full image along the outline, whose masks replace the coarse one near the outline alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.heads.cutouts import grey_image
from diffrep.heads.head import Head
from diffrep.heads.segmentation import DiffDis, ensemble, ensemble_sizes, finish, image_pixels
from diffrep.heads.sizes import resize
from diffrep.heads.tiling import feather, tile_starts
from diffrep.results import Result

PASSES = 6  # of the published ensemble
_DOUBT = (0.02, 0.98)  # soft values between them count as outline
_CONTRADICTION = 0.35  # largest mean difference of a window's mask from the coarse one, where that is sure


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """How a head looks at an image. Kept beside the mask, so that it can be traced to its settings."""

    size: int | None = None  # pixels a side (aspect: of the long side) that the network sees; None: as it was trained
    shape: Literal["square", "aspect"] = "square"  # of what it sees: squashed to a square as published, or as the image
    ensemble: bool = False  # the published mean over mirror and three scales: six passes
    edges: bool = False  # also predict the edges, which the mask alone does not need
    stretch: bool | None = None  # each map to its full range; None: as published for heads that draw with the VAE
    seed: int = 0  # of the noise: the same for every image of one size
    tile: int | None = None  # side of the windows, in pixels of the image, in which outlines are drawn once more
    overlap: float = 0.25  # share of a window that it has in common with its neighbour
    batch_size: int = 4  # images or windows that go through the network together

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be a number of pixels, got {self.size}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 < self.overlap <= 0.5:
            raise ValueError(f"overlap must be a share above 0 and up to 0.5, got {self.overlap}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63-1, got {self.seed}")


@dataclass(frozen=True, eq=False, repr=False)
class ObjectMask(Result):
    """The object of an image.

    Attributes:
        mask: (H, W) in [0, 1], soft, at the image's size. It is no alpha matte: glass and smoke are not transparent.
        edge: (H, W) in [0, 1], or None where it was not asked for.
        settings: what made it.
    """

    MAIN = "mask"

    mask: Tensor
    edge: Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    def picture(self) -> Image.Image:
        """The soft mask as 8-bit grey."""
        return grey_image(self.mask)

    def binary(self, threshold: float = 0.5) -> Tensor:
        """(H, W) bool: where the mask is at least `threshold`."""
        return self.mask >= threshold

    def metadata(self, threshold: float = 0.5) -> dict[str, object]:
        """JSON-ready: size, the object's share of the pixels, its box x0, y0, x1, y1 in pixel edges, the settings."""
        inside = self.binary(threshold)
        rows, columns = torch.where(inside.any(1))[0].tolist(), torch.where(inside.any(0))[0].tolist()
        return {
            "width": self.mask.shape[1],
            "height": self.mask.shape[0],
            "object": round(float(inside.float().mean()), 5),
            "box": [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else None,
            "threshold": threshold,
            **self.settings,
        }


class SegmentationHead(Head[SegmentConfig, ObjectMask]):
    """A DiffDIS head for images of any size."""

    CONFIG = SegmentConfig
    model: DiffDis

    def __init__(self, model: DiffDis, *, name: str = "diffdis", recognised: str = "", source: str = "") -> None:
        super().__init__(model, "segmentation", name=name, recognised=recognised, source=source)

    def check(self, config: SegmentConfig) -> None:
        multiple = self.model.multiple
        for name in ("size", "tile"):
            value = getattr(config, name)
            if value is not None and value < multiple:
                raise ValueError(f"{name} must be at least {multiple} pixels for this head, got {value}")
        if config.tile is not None and config.ensemble:
            raise ValueError("tiles and the ensemble do not go together: choose one of them")

    def canvas_size(self, size: tuple[int, int], config: SegmentConfig) -> tuple[int, int]:
        """(H, W) that the network sees of an image of (H, W): multiples of what its U-Net can halve."""
        side, multiple = config.size or self.model.working_size, self.model.multiple
        scale = side / max(size)
        wanted = (side, side) if config.shape == "square" else (size[0] * scale, size[1] * scale)
        return max(1, round(wanted[0] / multiple)) * multiple, max(1, round(wanted[1] / multiple)) * multiple

    def group(self, image: Image.Image, config: SegmentConfig) -> Hashable:
        return self.canvas_size((image.height, image.width), config)

    def predict_batch(self, images: list[Image.Image], config: SegmentConfig, **drawn: Any) -> Iterator[ObjectMask]:
        canvas = self.canvas_size((images[0].height, images[0].width), config)
        mask, edge = self.maps(torch.cat([image_pixels(image, canvas) for image in images]), config)
        settings = {
            "head": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "network_sees": list(canvas),
            **dataclasses.asdict(config),
        }
        for number, image in enumerate(images):
            size = (image.height, image.width)
            soft = _at_size(mask[number], size)
            if config.tile is not None:
                soft = self.refine(image, soft, canvas, config)
            yield ObjectMask(soft, None if edge is None else _at_size(edge[number], size), settings)

    @torch.inference_mode()
    def maps(self, pixels: Tensor, config: SegmentConfig) -> tuple[Tensor, Tensor | None]:
        """Masks and edges at the size that the network sees.

        Args:
            pixels: (B, 3, H, W) in [0, 1], sides multiples of `DiffDis.multiple`.

        Returns:
            Mask, and edge where it is asked for, each (B, 1, H, W) in [0, 1].
        """
        model, size = self.model, (int(pixels.shape[-2]), int(pixels.shape[-1]))
        stretch = model.decoder is None if config.stretch is None else config.stretch
        if config.ensemble:
            sizes = ensemble_sizes(size, model.multiple) * 2
            noises = [model.draw(sizes[number], config.seed, number) for number in range(PASSES)]
            return ensemble(model, pixels, noises, edges=config.edges, stretch=stretch)
        mask, edge = model.forward(pixels, model.draw(size, config.seed), edges=config.edges)
        return finish(mask, stretch=stretch), None if edge is None else finish(edge, stretch=stretch)

    @torch.inference_mode()
    def refine(self, image: Image.Image, coarse: Tensor, canvas: tuple[int, int], config: SegmentConfig) -> Tensor:
        """Draw the outline once more, from windows of the image at its own resolution.

        Only windows that the outline crosses are looked at, and only what lies near the outline is replaced, so that a
        window in which the network cannot tell the object does no harm; one whose mask contradicts the coarse mask
        where that is sure is left out.

        Args:
            coarse: (H, W) mask of the whole image.
            canvas: (H, W) at which the network saw it: its cells say how far from the outline it can be wrong.

        Returns:
            (H, W).
        """
        assert config.tile is not None
        height, width = coarse.shape
        multiple = self.model.multiple
        tile = config.tile // multiple * multiple
        reach = max(1, round(self.model.stride * max(height / canvas[0], width / canvas[1])))
        near = _widened((coarse > _DOUBT[0]) & (coarse < _DOUBT[1]) | _outline(coarse), reach)
        corners = [
            (top, left)
            for top in tile_starts(height, tile, int(tile * config.overlap))
            for left in tile_starts(width, tile, int(tile * config.overlap))
            if bool(near[top : top + tile, left : left + tile].any())
        ]
        total, weights = torch.zeros_like(coarse), torch.zeros_like(coarse)
        plain = dataclasses.replace(config, edges=False, tile=None, stretch=False)
        for start in range(0, len(corners), config.batch_size):
            chunk = corners[start : start + config.batch_size]
            crops = [image.crop((left, top, min(left + tile, width), min(top + tile, height))) for top, left in chunk]
            masks, _ = self.maps(torch.cat([image_pixels(crop, (tile, tile)) for crop in crops]), plain)
            for (top, left), crop, found in zip(chunk, crops, masks, strict=True):
                where = (slice(top, top + crop.height), slice(left, left + crop.width))
                fine = _at_size(found, (crop.height, crop.width))
                sure = ~near[where]
                if sure.any() and (fine - coarse[where]).abs()[sure].mean() > _CONTRADICTION:
                    continue
                weight = feather(crop.height, top > 0, top + crop.height < height)[:, None]
                weight = weight * feather(crop.width, left > 0, left + crop.width < width)
                total[where] += weight * fine
                weights[where] += weight
        # full weight on the outline, falling to the coarse mask over the reach
        trust = F.avg_pool2d(near[None, None].float(), 2 * reach + 1, 1, reach, count_include_pad=False)[0, 0]
        trust = torch.where(weights > 1e-3, (trust * 2).clamp(max=1), 0.0)
        return torch.lerp(coarse, total / weights.clamp(min=1e-3), trust)


def _at_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, h, w) -> (H, W) float32 on the CPU, bicubic."""
    return resize(maps[None].float(), size, "bicubic")[0, 0].clamp(0, 1).cpu()


def _outline(mask: Tensor) -> Tensor:
    """(H, W) bool: pixels whose neighbourhood has both object and background."""
    inside = (mask[None, None] >= 0.5).float()
    return (F.max_pool2d(inside, 3, 1, 1) + F.max_pool2d(-inside, 3, 1, 1))[0, 0] > 0


def _widened(places: Tensor, reach: int) -> Tensor:
    rows = F.max_pool2d(places[None, None].float(), (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(rows, (1, 2 * reach + 1), 1, (0, reach))[0, 0] > 0
