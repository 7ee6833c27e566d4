"""Photographs made worse in known ways, to train restoration on: the second-order degradation of Real-ESRGAN.

Blur, resize, noise and JPEG, two times, with a low-pass filter that rings at the end. Source: Real-ESRGAN, arXiv
2107.10833, and its code; the presets are those of ResShift (arXiv 2307.12348) and S3Diff (arXiv 2409.17058).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.settings import check

Shape: TypeAlias = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
Pair: TypeAlias = tuple[float, float]
PUBLISHED_SIDE = 21  # of all kernels, padded
MODES = ("area", "bilinear", "bicubic")  # of resizing
ChoiceT = TypeVar("ChoiceT")


def blur_kernel(size: int, spread_x: float, spread_y: float, angle: float, *, beta: float | None = None,
                plateau: bool = False) -> Tensor:  # fmt: skip
    """A blur (size, size) of sum 1 around the middle: exp(-q / 2), exp(-q^beta / 2), or 1 / (1 + q^beta).

    Args:
        spread_x, spread_y: standard deviations along the axes of the ellipse, pixels.
        angle: by which it is turned, radians.
        beta: shape; None is a plain Gaussian.
    """
    places = torch.arange(size, dtype=torch.float64) - (size - 1) // 2
    y, x = places[:, None], places[None]
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    squares = (along / spread_x) ** 2 + (across / spread_y) ** 2
    shaped = squares if beta is None else squares**beta
    kernel = 1 / (1 + shaped) if plateau else torch.exp(-0.5 * shaped)
    return (kernel / kernel.sum()).float()


def sinc_kernel(cutoff: float, size: int, *, pad_to: int = 0) -> Tensor:
    """The circular low-pass filter (size, size) of sum 1, with zeros around it up to `pad_to`; it rings.

    Args:
        cutoff: angular frequency, radians per pixel.
    """
    from scipy.special import j1

    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    radius = torch.hypot(places[:, None], places[None])
    kernel = torch.from_numpy(j1((cutoff * radius).numpy())) * cutoff / (2 * math.pi * radius)
    kernel[radius == 0] = cutoff**2 / (4 * math.pi)
    around = max(pad_to - size, 0) // 2
    return F.pad((kernel / kernel.sum()).float(), (around,) * 4)


def filter_images(images: Tensor, kernels: Tensor) -> Tensor:
    """(B, C, H, W) filtered with a kernel of their own each, (B or 1, k, k), k odd; edges are mirrored."""
    count, channels, height, _width = images.shape
    side = kernels.shape[-1]
    wide = F.pad(images, (side // 2,) * 4, mode="reflect").view(1, count * channels, height + side - 1, -1)
    weight = kernels.to(images).expand(count, -1, -1).repeat_interleave(channels, 0)[:, None]
    return F.conv2d(wide, weight, groups=count * channels).view(images.shape)


_SMALL_GAUSSIANS = {
    1: (1.0,),
    3: (1.0, 2.0),
    5: (1.0, 4.0, 6.0),
    7: (4.0, 14.0, 28.0, 36.0),
    9: (4.0, 13.0, 30.0, 51.0, 60.0),
}


def sharpen(images: Tensor, *, radius: int = 50, weight: float = 0.5, threshold: float = 10) -> Tensor:
    """Unsharp masking of (B, C, H, W) in [0, 1] where the detail is above a threshold of 255 levels."""
    side = radius + 1 - radius % 2
    spread = 0.3 * ((side - 1) * 0.5 - 1) + 0.8  # as OpenCV derives it from the side, but for small ones
    kernel = blur_kernel(side, spread, spread, 0.0)[None]
    if half := _SMALL_GAUSSIANS.get(side):
        line = torch.tensor([*half, *half[-2::-1]]) / (2 * sum(half) - half[-1])
        kernel = (line[:, None] * line)[None]
    detail = images - filter_images(images, kernel)
    soft = filter_images((detail.abs() * 255 > threshold).to(images), kernel)
    return torch.lerp(images, (images + weight * detail).clamp(0, 1), soft)


class Draws:
    """Where all random numbers of an image come from: one generator; or, in a subclass, another program's record."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def choice(self, options: Sequence[ChoiceT], weights: Sequence[float] | None = None) -> ChoiceT:
        shares = torch.tensor(weights or [1.0] * len(options), dtype=torch.float64)
        return options[int(torch.multinomial(shares, 1, generator=self.generator))]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def random(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def integer(self, most: int) -> int:
        return int(torch.randint(most + 1, (), generator=self.generator))

    def share(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator)

    def quality(self, count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * self.share(count)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def poisson(self, rate: Tensor) -> Tensor:
        return torch.poisson(rate, generator=self.generator)


def add_gaussian(images: Tensor, sigma: Tensor, gray: Tensor, draws: Draws) -> Tensor:
    """Images (B, C, H, W) in [0, 1] with normal noise.

    Args:
        sigma: (B,) standard deviations, of 255 levels.
        gray: (B,) 0 or 1: whether all channels get one map, which all gray images of a batch share.
    """
    sigma, gray = sigma.view(-1, 1, 1, 1), gray.view(-1, 1, 1, 1)
    single = draws.normal(*images.shape[-2:]).to(images) * sigma / 255 if bool(gray.any()) else 0.0
    noise = draws.normal(*images.shape).to(images) * sigma / 255
    return (images + noise * (1 - gray) + single * gray).clamp(0, 1)


def add_poisson(images: Tensor, scale: Tensor, gray: Tensor, draws: Draws) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with shot noise times `scale` (B,); `gray` as of `add_gaussian`, of the luma."""
    scale, gray = scale.view(-1, 1, 1, 1), gray.view(-1, 1, 1, 1)

    def noise_of(values: Tensor) -> Tensor:
        rounded = (values * 255).round().clamp(0, 255) / 255
        distinct = [2.0 ** math.ceil(math.log2(len(torch.unique(image)))) for image in rounded]
        counts = values.new_tensor(distinct).view(-1, 1, 1, 1)  # that a full level stands for: a power of two
        return draws.poisson(rounded * counts) / counts - rounded

    single: Any = 0.0
    if bool(gray.any()):
        single = noise_of((images * images.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True))
    return (images + scale * (noise_of(images) * (1 - gray) + single * gray)).clamp(0, 1)


_LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA_TABLE = (
    (17, 18, 24, 47, *[99] * 4), (18, 21, 26, 66, *[99] * 4), (24, 26, 56, 99, *[99] * 4),
    (47, 66, 99, 99, *[99] * 4), *[(99,) * 8] * 4,
)  # fmt: skip
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
_WAVES = [[math.cos((2 * n + 1) * k * math.pi / 16) for k in range(8)] for n in range(8)]  # [place][frequency]
_SHARES = (math.sqrt(0.5), *[1.0] * 7)  # of each frequency, that their transform be orthonormal


def jpeg(images: Tensor, quality: Tensor, *, differentiable: bool = False) -> Tensor:
    """What JPEG with halved chroma leaves of (B, 3, H, W) in [0, 1]; `quality` (B,), 1 to 100.

    Args:
        differentiable: coefficients are rounded by a cubic that has a gradient.
    """
    height, width = images.shape[-2:]
    wide = F.pad(images * 255, (0, -width % 16, 0, -height % 16))
    factor = (torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100).clamp(min=1e-6)  # 100 is 0
    shift = images.new_tensor([0.0, 128.0, 128.0]).view(3, 1, 1)
    ycc = torch.einsum("dc,bchw->bdhw", images.new_tensor(_TO_YCC), wide) + shift
    y, colour = ycc[:, :1], F.avg_pool2d(ycc[:, 1:], 2)
    y = _compressed(y, images.new_tensor(_LUMA_TABLE).T, factor, differentiable)
    colour = _compressed(colour, images.new_tensor(_CHROMA_TABLE), factor, differentiable)
    ycc = torch.cat([y, colour.repeat_interleave(2, -1).repeat_interleave(2, -2)], 1) - shift
    rgb = torch.einsum("dc,bchw->bdhw", images.new_tensor(_TO_RGB), ycc)
    return rgb.clamp(0, 255)[..., :height, :width] / 255


def _compressed(planes: Tensor, table: Tensor, factor: Tensor, differentiable: bool) -> Tensor:
    """Blocks of 8 x 8 of (B, C, H, W) in 0..255 with their quantised frequencies.

    All 64 frequencies at once, in the order of the published code: what another order rounds otherwise may bring a
    frequency to its other neighbour.
    """
    count, channels, height, width = planes.shape
    line, shares = (torch.tensor(values, dtype=torch.float64) for values in (_WAVES, _SHARES))
    waves, weights = torch.kron(line, line).to(planes), (0.25 * torch.outer(shares, shares)).flatten().to(planes)
    steps = table.flatten() * factor.to(planes).view(-1, 1, 1, 1, 1)
    blocks = planes.view(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4).flatten(-2) - 128
    levels = weights * (blocks @ waves) / steps
    rounded = levels.round()
    if differentiable:
        rounded = rounded + (levels - rounded) ** 3
    restored = (rounded * steps * weights) @ waves.T + 128
    return restored.unflatten(-1, (8, 8)).transpose(3, 4).reshape(planes.shape)


@dataclass(frozen=True, kw_only=True)
class Order:
    """One of the two rounds: blur, resize, noise, JPEG."""

    blur: float  # probability
    largest: int  # kernel side, odd; the smallest is 7
    spread: Pair  # of blurs, pixels
    resize: Pair  # factors
    directions: tuple[float, float, float]  # probabilities of up, down, neither
    noise: Pair  # sigma, of 255 levels
    poisson: Pair  # scale
    quality: Pair  # of JPEG
    gaussian: float = 0.5  # probability of normal noise instead of shot noise
    gray: float = 0.4  # probability of one map for all channels
    beta: Pair = (0.5, 4.0)  # of generalised Gaussians
    plateau: Pair = (1.0, 2.0)
    sinc: float = 0.1  # probability of a low-pass filter as blur

    def __post_init__(self) -> None:
        check(self, blur="[0, 1]", largest="7..21", gaussian="[0, 1]", gray="[0, 1]", sinc="[0, 1]",
              quality="1..100")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """Both rounds and the end of a degradation. Presets are in `DEGRADATIONS`."""

    first: Order
    second: Order
    second_probability: float = 1.0  # of the second round
    final_sinc: float = 0.8  # probability that the last filter rings
    clean: float = 0.0  # probability that an image is not degraded, and not made smaller
    rounds: bool = True  # to 8 bits at the end
    scale: int = 4  # sides of the original over those of the result

    def __post_init__(self) -> None:
        check(self, second_probability="[0, 1]", final_sinc="[0, 1]", clean="[0, 1]", scale="1..16")


_UP_DOWN, _EVENLY = (0.2, 0.7, 0.1), (0.3, 0.4, 0.3)
DEGRADATIONS: Mapping[str, Degradation] = {
    "resshift": Degradation(
        first=Order(blur=1.0, largest=21, spread=(0.2, 3), resize=(0.15, 1.5), directions=_UP_DOWN, noise=(1, 30),
                    poisson=(0.05, 3), quality=(30, 95)),
        second=Order(blur=0.8, largest=15, spread=(0.2, 1.5), resize=(0.3, 1.2), directions=_EVENLY, noise=(1, 25),
                     poisson=(0.05, 2.5), quality=(30, 95)),
        second_probability=0.5,
    ),
    "s3diff": Degradation(
        first=Order(blur=1.0, largest=21, spread=(0.2, 1.5), resize=(0.3, 1.5), directions=_UP_DOWN, noise=(1, 15),
                    poisson=(0.05, 2), quality=(60, 95), beta=(0.5, 2), plateau=(1, 1.5)),
        second=Order(blur=0.5, largest=11, spread=(0.2, 1), resize=(0.6, 1.2), directions=_EVENLY, noise=(1, 12),
                     poisson=(0.05, 1), quality=(60, 100), beta=(0.5, 2), plateau=(1, 1.5)),
        clean=0.01,
        rounds=False,
    ),
}  # fmt: skip
KERNEL_SHARES: Mapping[Shape, float] = {
    "iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}  # fmt: skip


def draw_kernel(order: Order, draws: Draws) -> Tensor:
    """A blur of a round, (21, 21)."""
    size = draws.choice(range(7, order.largest + 1, 2))
    if draws.random() < order.sinc:
        return _draw_sinc(size, draws)
    shape = draws.choice(list(KERNEL_SHARES), list(KERNEL_SHARES.values()))
    spread_x, spread_y, angle = draws.uniform(*order.spread), draws.uniform(*order.spread), 0.0
    if shape.endswith("aniso"):
        angle = draws.uniform(-math.pi, math.pi)
    else:
        spread_y = spread_x
    beta, plateau = None, shape.startswith("plateau")
    if plateau or shape.startswith("generalized"):  # half of them flatter than the Gaussian, half steeper
        low, high = order.plateau if plateau else order.beta
        beta = draws.uniform(low, 1.0) if draws.random() < 0.5 else draws.uniform(1.0, high)
    kernel = blur_kernel(size, spread_x, spread_y, angle, beta=beta, plateau=plateau)
    return F.pad(kernel, ((PUBLISHED_SIDE - size) // 2,) * 4)


def _draw_sinc(size: int, draws: Draws) -> Tensor:
    lowest = math.pi / 3 if size < 13 else math.pi / 5
    return sinc_kernel(draws.uniform(lowest, math.pi), size, pad_to=PUBLISHED_SIDE)


def draw_kernels(settings: Degradation, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """The blurs of both rounds and the filter at the end, (1, 21, 21) each; one that does nothing where none is drawn.

    A round's blur is drawn even where the round then does not blur.
    """
    last = F.pad(torch.ones(1, 1), (PUBLISHED_SIDE // 2,) * 4)
    first, second = draw_kernel(settings.first, draws), draw_kernel(settings.second, draws)
    if draws.random() < settings.final_sinc:
        last = _draw_sinc(draws.choice(range(7, PUBLISHED_SIDE + 1, 2)), draws)
    return first[None], second[None], last[None]


def degrade(images: Tensor, kernels: tuple[Tensor, Tensor, Tensor], settings: Degradation, draws: Draws) -> Tensor:
    """Images as they would look after two rounds of blur, resize, noise and JPEG.

    Args:
        images: (B, 3, H, W) in [0, 1]; structure is drawn once for all of a batch, as published, strengths for each.
        kernels: of `draw_kernels`.

    Returns:
        (B, 3, H // scale, W // scale) in [0, 1].
    """
    height, width = images.shape[-2] // settings.scale, images.shape[-1] // settings.scale
    out = images
    if settings.first.blur == 1 or draws.random() < settings.first.blur:
        out = filter_images(out, kernels[0])
    out = _resized(out, settings.first, draws)
    out = _noised(out, settings.first, draws)
    out = _saved(out, settings.first, draws)
    if settings.second_probability == 1 or draws.random() < settings.second_probability:
        if draws.random() < settings.second.blur:
            out = filter_images(out, kernels[1])
        out = _resized(out, settings.second, draws, tuple(side / settings.scale for side in images.shape[-2:]))  # type: ignore[arg-type]
        out = _noised(out, settings.second, draws)
    ringing_first = draws.random() < 0.5
    if not ringing_first:
        out = _saved(out, settings.second, draws)
    out = F.interpolate(out, mode=draws.choice(MODES), size=(height, width))
    out = filter_images(out, kernels[2])
    if ringing_first:
        out = _saved(out, settings.second, draws)
    out = out.clamp(0, 1)
    return (out * 255).round() / 255 if settings.rounds else out


def _resized(images: Tensor, order: Order, draws: Draws, base: Pair | None = None) -> Tensor:
    """By a drawn factor, of the image's size or of `base` (H, W)."""
    low, high = order.resize
    direction = draws.choice(("up", "down", "keep"), order.directions)
    scale = 1.0 if direction == "keep" else draws.uniform(*((1, high) if direction == "up" else (low, 1)))
    mode = draws.choice(MODES)
    if base is None:
        return F.interpolate(images, mode=mode, scale_factor=scale)
    return F.interpolate(images, mode=mode, size=(int(base[0] * scale), int(base[1] * scale)))


def _noised(images: Tensor, order: Order, draws: Draws) -> Tensor:
    normal = draws.random() < order.gaussian
    low, high = order.noise if normal else order.poisson
    strength = draws.share(len(images)).to(images) * (high - low) + low
    gray = (draws.share(len(images)) < order.gray).to(images)
    return (add_gaussian if normal else add_poisson)(images, strength, gray, draws)


def _saved(images: Tensor, order: Order, draws: Draws) -> Tensor:
    return jpeg(images.clamp(0, 1), draws.quality(len(images), *order.quality).to(images))


def degraded_pair(
    images: Tensor, kernels: tuple[Tensor, Tensor, Tensor], settings: Degradation, draws: Draws, *, size: int
) -> tuple[Tensor, Tensor]:
    """A batch degraded and cropped: originals (B, 3, size, size), and what to restore them from, of the same size.

    Args:
        size: of the crop, pixels of the original, a multiple of the scale.

    Returns:
        Originals, and the degraded images enlarged by a bicubic, both in [0, 1].
    """
    originals, low = paired_crop(images, degrade(images, kernels, settings, draws), size, settings.scale, draws)
    if draws.random() <= settings.clean and settings.clean:
        low = originals
    return originals, F.interpolate(low, originals.shape[-2:], mode="bicubic").clamp(0, 1)


def paired_crop(images: Tensor, low: Tensor, size: int, scale: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """The same random window of originals and degraded images; `size` pixels of the originals."""
    side = size // scale
    if side > min(low.shape[-2:]):
        raise ValueError(f"a crop of {size} pixels does not fit into images of {tuple(images.shape[-2:])}")
    top, left = draws.integer(low.shape[-2] - side), draws.integer(low.shape[-1] - side)
    whole = images[..., top * scale : top * scale + size, left * scale : left * scale + size]
    return whole, low[..., top : top + side, left : left + side]
