"""Segmentation in one step: a soft mask of the object, and its edges where they are asked for (DiffDIS).

The network sees a square of the size that it was trained on, as published. What an image has beyond that is drawn in a
second look: windows of the full image along the outline, whose masks replace the coarse one near the outline alone. The
U-Net is `diffrep.heads.diffdis`; VAE, schedule and noise are those of the one-step machine. Sources: "High-Precision
Dichotomous Image Segmentation via Probing Diffusion Capacity" (arXiv 2410.10105) and its authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from torch import Tensor, nn

from diffrep.backbones import draw_noise
from diffrep.backbones.fused import fused_blocks
from diffrep.graphs import Graphs
from diffrep.heads.diffdis import DiffDisUNet
from diffrep.heads.head import Head
from diffrep.heads.one_step import TIMESTEP, LatentCodec, Schedule
from diffrep.heads.tiling import blend_weight, resize, tile_starts
from diffrep.images import load_image, shrink, stack_pixels
from diffrep.results import Result
from diffrep.settings import check

# -- What is made of a mask: the object cut out, or set before another background ----------------------------
# A pixel of an outline shows object and background mixed. Cut out as it is, it carries the old background with it as a
# halo; so the object's own colour is estimated first: "Approximate Fast Foreground Colour Estimation" (Forte, ICIP
# 2021).


_RADII = (90, 6)  # pixels, of the two passes of the estimate


def foreground_colours(pixels: Tensor, mask: Tensor) -> Tensor:
    """The object's colour at every pixel, without what shines through of the background.

    Args:
        pixels: (3, H, W) in [0, 1].
        mask: (H, W) in [0, 1].

    Returns:
        (3, H, W) in [0, 1]; where the mask is 1 the pixels themselves.
    """
    alpha = mask[None].to(pixels)
    front = back = pixels
    for radius in _RADII:
        near_front = _blur(front * alpha, radius) / (_blur(alpha, radius) + 1e-5)
        near_back = _blur(back * (1 - alpha), radius) / (_blur(1 - alpha, radius) + 1e-5)
        mixed = alpha * near_front + (1 - alpha) * near_back
        front, back = (near_front + alpha * (pixels - mixed)).clamp(0, 1), near_back.clamp(0, 1)
    return torch.where(alpha >= 1, pixels, front)


def _blur(values: Tensor, radius: int) -> Tensor:
    """Mean over a square of 2 radius + 1 pixels, of those that lie in the image."""
    for axis in (1, 2):
        side = values.shape[axis]
        total = F.pad(values.double().cumsum(axis), (1, 0) if axis == 2 else (0, 0, 1, 0))
        place = torch.arange(side, device=values.device)
        high, low = (place + radius + 1).clamp(max=side), (place - radius).clamp(min=0)
        sums = total.index_select(axis, high) - total.index_select(axis, low)
        values = sums / (high - low).view(-1, *(1,) * (2 - axis))
    return values.float()


def cut_out(image: Image.Image, mask: Tensor, *, estimate: bool = True) -> Image.Image:
    """The object with transparency around it, RGBA.

    Args:
        mask: (H, W) in [0, 1], of the image's size.
        estimate: give outlines the object's own colour; False keeps the image's pixels.

    Raises:
        ValueError: mask and image differ in size.
    """
    colours = _colours(image, mask, estimate)
    return Image.fromarray(_bytes(torch.cat([colours, mask[None].to(colours)])), "RGBA")


def composite(
    image: Image.Image, mask: Tensor, background: str | Image.Image | tuple[int, int, int], *, estimate: bool = True
) -> Image.Image:
    """The object before another background, RGB.

    Args:
        mask: (H, W) in [0, 1], of the image's size.
        background: a colour ("white", "#20c040", (r, g, b)); or an image or the path of one, which is scaled to cover
            the whole and cropped around its centre.

    Raises:
        ValueError: mask and image differ in size, or the background is neither a colour nor an image file.
    """
    colours, alpha = _colours(image, mask, estimate), mask[None].float()
    behind = _pixels(backdrop(background, image.size))
    return Image.fromarray(_bytes(colours * alpha + behind * (1 - alpha)))


def backdrop(background: str | Image.Image | tuple[int, int, int], size: tuple[int, int]) -> Image.Image:
    """A background of (width, height) pixels; see `composite`."""
    if isinstance(background, tuple):
        return Image.new("RGB", size, background)
    if isinstance(background, str):
        try:
            return Image.new("RGB", size, ImageColor.getrgb(background)[:3])
        except ValueError:
            if "." not in background and "/" not in background:
                raise ValueError(
                    f"no colour {background!r}: give a name such as white, a code such as #20c040, or an image file"
                ) from None
        background = load_image(background)
    return ImageOps.fit(background, size, Image.Resampling.LANCZOS)


def grey_image(values: Tensor) -> Image.Image:
    """(H, W) in [0, 1] as 8-bit grey."""
    return Image.fromarray(_bytes(values[None])[..., 0])


def _colours(image: Image.Image, mask: Tensor, estimate: bool) -> Tensor:
    if tuple(mask.shape) != (image.height, image.width):
        raise ValueError(
            f"the mask is {mask.shape[-1]} x {mask.shape[-2]} pixels, the image {image.width} x {image.height}"
        )
    pixels = _pixels(image)
    return foreground_colours(pixels, mask) if estimate else pixels


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _bytes(values: Tensor) -> np.ndarray:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------------------


SCALES = (0.75, 1.0, 1.25)  # of the published ensemble over test-time augmentations, each without and with mirror
PASSES = 2 * len(SCALES)
_UNSURE = (0.02, 0.98)  # soft values between them count as outline
_CONTRADICTION = 0.35  # largest mean difference of a window's mask from the coarse one, where that is sure


class DiffDis(LatentCodec):
    """A DiffDIS U-Net with its VAE: images in, raw maps of mask and edge out.

    Args:
        unet: the U-Net.
        vae: diffusers `AutoencoderKL`.
        context: (1, tokens, C), the embedding of the empty prompt (start and end token, no padding).
        schedule: of the diffusion model; the U-Net is asked once, at its last timestep.
        working_size: pixels a side of the square that the U-Net was trained on.
        decoder: draws masks and edges in place of the VAE's decoder: (scaled latents, pixels) -> (B, 1, H, W) logits.

    Attributes:
        multiple: the sides of an image are multiples of it.
    """

    context: Tensor
    family_name = "diffdis"

    def __init__(
        self,
        unet: DiffDisUNet,
        vae: Any,
        context: Tensor,
        schedule: Schedule,
        *,
        working_size: int = 1024,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__(vae)
        if unet.config.out_channels != self.channels:
            raise ValueError(
                f"the U-Net predicts {unet.config.out_channels} channels but the VAE has {self.channels}: they do not"
                " belong together"
            )
        self.unet, self.schedule, self.decoder, self.working_size = unet, schedule, decoder, working_size
        self.graphs = Graphs(unet)
        self.register_buffer("context", context, persistent=False)
        self.multiple = self.stride * 2**unet.levels

    @property
    def _reference(self) -> Tensor:
        return self.context

    def encode_scales(self, pixels: Tensor) -> list[Tensor]:
        """Latents (B, c, H / stride / 2^k, W / stride / 2^k) of images (B, 3, H, W) in [0, 1] at 1/2^k of their size.

        Raises:
            ValueError: the sides are no multiples of `multiple`.
        """
        height, width = pixels.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"the sides must be multiples of {self.multiple}, got {height} x {width}")
        return [self.encode(image) for image in shrink(pixels, self.unet.levels)]

    def predict_latents(self, latents: Sequence[Tensor], noise: Tensor, *, edges: bool = False) -> Tensor:
        """Clean latents of the masks, and of the edges behind them, in one pass of the U-Net.

        Args:
            latents: of `encode_scales`.
            noise: (B or 1, c, h, w), the same for masks and edges; or (2B, c, h, w), masks and then edges.
            edges: also predict the edges.

        Returns:
            float32 (B, c, h, w), or (2B, c, h, w) with the edges.
        """
        noise = noise.expand(max(len(noise), len(latents[0])), -1, -1, -1).to(latents[0])

        def run(noise: Tensor, *latents: Tensor) -> Tensor:
            with fused_blocks(self.unet):
                return self.unet(latents, noise, self.context, timestep=TIMESTEP, edges=edges)

        output = self.graphs(edges, run, noise, *latents)
        noise = noise.repeat(-(-len(output) // len(noise)), 1, 1, 1)[: len(output)]
        return self.schedule.clean(output.float(), noise.float(), TIMESTEP)

    def decode_maps(self, latents: Tensor, pixels: Tensor) -> Tensor:
        """Masks or edges (B, 1, H, W), about [-1, 1], of latents (B, c, h, w) and their images (B, 3, H, W).

        On a CPU the VAE draws one after the other, to save memory.
        """
        if self.decoder is None:
            return self.decode(latents, batch_size=4 if latents.is_cuda else 1).mean(1, keepdim=True)
        return self.decoder(latents.to(self.dtype), pixels.to(self.device, self.dtype)).float().sigmoid() * 2 - 1

    def forward(self, pixels: Tensor, noise: Tensor, *, edges: bool = False) -> tuple[Tensor, Tensor | None]:
        """Raw mask and edge (None where it is not asked for), each (B, 1, H, W), about [-1, 1].

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1]; H and W are multiples of `multiple`.
            noise: (B or 1, c, h, w) standard normal, h = H / stride.
        """
        latents = self.predict_latents(self.encode_scales(pixels), noise, edges=edges)
        drawn = self.decode_maps(latents, pixels.repeat(len(latents) // len(pixels), 1, 1, 1))
        mask, *edge = drawn.split(len(pixels))
        return mask, edge[0] if edges else None

    def draw(self, size: tuple[int, int], seed: int, number: int = 0) -> Tensor:
        """Latent noise (1, c, h, w) for images of (H, W) pixels: of the seed and the number of the pass alone."""
        return draw_noise((self.channels, size[0] // self.stride, size[1] // self.stride), seed, number)


def image_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB image resized to (H, W) as published, bilinear by Pillow: (1, 3, H, W) in [0, 1]."""
    resized = image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)
    return stack_pixels([torch.from_numpy(np.array(resized)).permute(2, 0, 1)])


def finish(raw: Tensor, *, stretch: bool = True) -> Tensor:
    """Raw maps (B, 1, H, W) in about [-1, 1] -> (B, 1, H, W) in [0, 1].

    Args:
        stretch: each map to its full range, as published: an image without an object then still gets a mask that
            reaches 1. A constant map stays as it is.
    """
    maps = raw.clamp(-1, 1) / 2 + 0.5
    if not stretch:
        return maps
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-12), maps)


def ensemble(
    head: DiffDis, pixels: Tensor, noises: Sequence[Tensor], *, edges: bool = False, stretch: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The published test-time ensemble: mean of six passes, without and with mirror at three scales.

    Args:
        pixels: (B, 3, H, W), RGB in [0, 1].
        noises: of the six passes, at the sizes of `ensemble_sizes`; the three without mirror first.

    Returns:
        Mask and edge, each (B, 1, H, W) in [0, 1].
    """
    full = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    sizes = ensemble_sizes(full, head.multiple)

    def at(maps: Tensor, size: tuple[int, int]) -> Tensor:
        same = size == tuple(maps.shape[-2:])
        return maps if same else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    means: list[Tensor] = []
    for number, noise in enumerate(noises):
        mirrored, size = number >= len(SCALES), sizes[number % len(SCALES)]
        view = at(pixels.flip(-1) if mirrored else pixels, size)
        drawn = [at(finish(raw, stretch=stretch), full) for raw in head(view, noise, edges=edges) if raw is not None]
        parts = [(maps.flip(-1) if mirrored else maps) / len(noises) for maps in drawn]
        means = [total + part for total, part in zip(means, parts, strict=True)] if means else parts
    return means[0], means[1] if edges else None


def ensemble_sizes(size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """(H, W) of the ensemble's three scales, rounded to what the network takes."""
    return [_rounded(size[0] * scale, size[1] * scale, multiple) for scale in SCALES]


def _rounded(height: float, width: float, multiple: int) -> tuple[int, int]:
    return max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple


# -- images of any size -------------------------------------------------------------------------------------


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
        check(self, size="1..8192", batch_size="1..", seed="[0, 2^63)", overlap="(0, 0.5]")


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
        for name, value in (("size", config.size), ("tile", config.tile)):
            if value is not None and value < self.model.multiple:
                raise ValueError(f"{name} must be at least {self.model.multiple} pixels for this head, got {value}")
        if config.tile is not None and config.ensemble:
            raise ValueError("tiles and the ensemble do not go together: choose one of them")

    def canvas_size(self, size: tuple[int, int], config: SegmentConfig) -> tuple[int, int]:
        """(H, W) that the network sees of an image of (H, W): multiples of what its U-Net can halve."""
        side = config.size or self.model.working_size
        scale = side / max(size)
        height, width = (side, side) if config.shape == "square" else (size[0] * scale, size[1] * scale)
        return _rounded(height, width, self.model.multiple)

    def group(self, image: Image.Image, config: SegmentConfig) -> Hashable:
        return self.canvas_size((image.height, image.width), config)

    def predict_batch(self, images: list[Image.Image], config: SegmentConfig, **drawn: Any) -> Iterator[ObjectMask]:
        canvas = self.canvas_size((images[0].height, images[0].width), config)
        mask, edge = self.maps(torch.cat([image_pixels(image, canvas) for image in images]), config)
        settings = self.settings(config) | {"network_sees": list(canvas)}
        for number, image in enumerate(images):
            size = (image.height, image.width)
            soft = _at_size(mask[number], size)
            if config.tile is not None:
                soft = self.refine(image, soft, canvas, config)
            yield ObjectMask(soft, None if edge is None else _at_size(edge[number], size), settings)

    @torch.inference_mode()
    def maps(self, pixels: Tensor, config: SegmentConfig) -> tuple[Tensor, Tensor | None]:
        """Mask, and edge where it is asked for, each (B, 1, H, W) in [0, 1]; pixels as of `DiffDis.forward`."""
        model, size = self.model, (int(pixels.shape[-2]), int(pixels.shape[-1]))
        stretch = model.decoder is None if config.stretch is None else config.stretch
        if config.ensemble:
            sizes = ensemble_sizes(size, model.multiple) * 2
            noises = [model.draw(size, config.seed, number) for number, size in enumerate(sizes)]
            return ensemble(model, pixels, noises, edges=config.edges, stretch=stretch)
        mask, edge = model(pixels, model.draw(size, config.seed), edges=config.edges)
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
        tile = config.tile // self.model.multiple * self.model.multiple
        reach = max(1, round(self.model.stride * max(height / canvas[0], width / canvas[1])))
        near = _widened((coarse > _UNSURE[0]) & (coarse < _UNSURE[1]) | _outline(coarse), reach)
        windows = [
            (slice(top, min(top + tile, height)), slice(left, min(left + tile, width)))
            for top in tile_starts(height, tile, int(tile * config.overlap))
            for left in tile_starts(width, tile, int(tile * config.overlap))
            if bool(near[top : top + tile, left : left + tile].any())
        ]
        total, weights = torch.zeros_like(coarse), torch.zeros_like(coarse)
        plain = dataclasses.replace(config, edges=False, tile=None, stretch=False)
        for start in range(0, len(windows), config.batch_size):
            chunk = windows[start : start + config.batch_size]
            crops = [image.crop((x.start, y.start, x.stop, y.stop)) for y, x in chunk]
            masks, _ = self.maps(torch.cat([image_pixels(crop, (tile, tile)) for crop in crops]), plain)
            for (y, x), mask in zip(chunk, masks, strict=True):
                fine, sure = _at_size(mask, (y.stop - y.start, x.stop - x.start)), ~near[y, x]
                if sure.any() and (fine - coarse[y, x]).abs()[sure].mean() > _CONTRADICTION:
                    continue
                weight = blend_weight(y, x, (height, width))
                total[y, x] += weight * fine
                weights[y, x] += weight
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
