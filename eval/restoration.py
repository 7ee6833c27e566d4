"""How near restored images come to the originals: PSNR and SSIM as the papers count them, and the papers' test sets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.eval.report import Report, Section, read_tables
from diffrep.files import number_of, write_whole
from diffrep.heads.restoration.photograph import Photograph
from diffrep.heads.restoration.restorer import RestorationHead, RestoreConfig, resized
from diffrep.images import images_below
from diffrep.pictures import image_grid


def luma(images: Tensor) -> Tensor:
    """Y of YCbCr (BT.601, 16 to 235) of RGB: (..., 3, H, W) uint8 -> (..., 1, H, W) float32 in 0..255.

    Rounded where BasicSR rounds: it shows in an SSIM near 0.
    """
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(3, 1, 1)
    levels = ((images.float() / 255).double() * weights).sum(-3, keepdim=True) + 16
    return (levels / 255).float() * 255


def _compared(restored: Tensor, reference: Tensor, crop: int, y: bool, least: int = 1) -> tuple[Tensor, Tensor]:
    if restored.shape != reference.shape:
        raise ValueError(
            f"images of one size can be compared, not {tuple(restored.shape)} and {tuple(reference.shape)}"
        )
    if min(reference.shape[-2:]) - 2 * crop < least:
        size = tuple(reference.shape[-2:])
        raise ValueError(f"a border of {crop} pixels leaves less than {least} of an image of {size} pixels")
    inside = slice(crop, -crop or None)
    pair = (image[..., inside, inside] for image in (restored, reference))
    first, second = (luma(image).double() if y else image.double() for image in pair)
    return first, second


def psnr(restored: Tensor, reference: Tensor, *, crop: int = 0, y: bool = True) -> float:
    """Peak signal to noise ratio in dB of (3, H, W) uint8; infinite where they are equal.

    Args:
        crop: pixels of the border that do not count; the papers of diffusion models take 0, classical ones the scale.
        y: of the luma alone, as published.

    Raises:
        ValueError: the sizes differ, or nothing is left inside of the border.
    """
    first, second = _compared(restored, reference, crop, y)
    error = float((first - second).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(restored: Tensor, reference: Tensor, *, crop: int = 0, y: bool = True) -> float:
    """Structural similarity (Wang et al. 2004) of (3, H, W) uint8: 11 x 11 Gaussian of sigma 1.5, where it fits.

    Arguments and errors are those of `psnr`, of sides below 11 too; of RGB it is the channels' mean.
    """
    first, second = (image[:, None] for image in _compared(restored, reference, crop, y, least=11))
    line = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel)

    a, b = mean(first), mean(second)
    spread_a, spread_b = mean(first**2) - a**2, mean(second**2) - b**2
    both = mean(first * second) - a * b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * a * b + c1) * (2 * both + c2) / ((a**2 + b**2 + c1) * (spread_a + spread_b + c2))).mean())


class FeatureDistance:
    """An LPIPS-like distance that needs no download: between features of the embedded DINO, each of unit length.

    Its numbers are this package's own and compare with no published LPIPS.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        from diffrep.backbones import load_backbone

        self.backbone = load_backbone("tiny-dino", device=device, dtype=torch.float32)  # a measure
        self.taps = [tap.name for tap in self.backbone.taps()]

    @torch.no_grad()
    def __call__(self, restored: Tensor, reference: Tensor) -> Tensor:
        """(B,) of images (B, 3, H, W) in [0, 1]: squared distances, averaged over places and blocks."""
        from diffrep.features import extract

        pair = (extract(self.backbone, list(images.float().cpu()), taps=self.taps) for images in (restored, reference))
        first, second = pair
        distances = [
            (F.normalize(first[tap], dim=1) - F.normalize(second[tap], dim=1)).square().sum(1).flatten(1).mean(1)
            for tap in self.taps
        ]
        return torch.stack(distances).mean(0).cpu()


def to_levels(images: Tensor) -> Tensor:
    """[0, 1] -> uint8, rounded."""
    return (images.float().clamp(0, 1) * 255).round().byte().cpu()


def score_images(
    restored: Tensor, originals: Tensor, distance: FeatureDistance | None = None, *, crop: int = 0
) -> dict[str, float]:
    """Means over images (N, 3, H, W) uint8: PSNR of RGB and of Y in dB, SSIM of Y, and the distance of features."""
    pairs = list(zip(restored, originals, strict=True))
    scores = {
        "psnr": sum(psnr(a, b, crop=crop, y=False) for a, b in pairs),
        "psnr_y": sum(psnr(a, b, crop=crop) for a, b in pairs),
        "ssim": sum(ssim(a, b, crop=crop) for a, b in pairs),
    }
    if distance is not None:
        scores["distance"] = float(distance(restored / 255, originals / 255).sum())
    return {name: value / len(pairs) for name, value in scores.items()}


class RestorationValidation:
    """Given to `fit` as `validate`: scores of held-out images, degraded and only made smaller, beside a bicubic's.

    Args:
        pairs: of `diffrep.heads.training.restoration.enlargements`.
        pictures: folder of the pictures: rows of enlarged, restored and original images.
    """

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]], pictures: Path | None = None) -> None:
        self.pairs, self.pictures, self.distance = pairs, pictures, FeatureDistance()

    @torch.no_grad()
    def __call__(self, model: Any, step: int) -> dict[str, float]:
        device, scores, rows = model.context.device, {}, []
        for kind, (originals, images) in self.pairs.items():
            parts = [model(part.to(device))[1].float().cpu() for part in images.split(32)]
            restored = to_levels(torch.cat(parts))
            for who, values in (("restored", restored), ("bicubic", to_levels(images))):
                for name, value in score_images(values, originals, self.distance).items():
                    scores[f"{kind} {who} {name}"] = value
            rows += [values[:8] / 255 for values in (to_levels(images), restored, originals)]
        if self.pictures is not None:
            write_whole(self.pictures / f"{step:06d}.png", image_grid(rows).save)
        return scores


Benchmark: TypeAlias = Literal["realsr", "drealsr", "div2k", "imagenet"]
LOW, HIGH = (
    ("test_LR", "lq", "LR", "LQ"),
    ("test_HR", "gt", "HR", "GT", "HQ"),
)  # as StableSR's and ResShift's sets are laid out


@dataclass(frozen=True, kw_only=True)
class PublishedRestoration:
    """One row of a paper's table, x4."""

    method: str
    benchmark: Benchmark
    source: str
    values: Mapping[str, float]


PUBLISHED_RESTORATION = read_tables("restoration", PublishedRestoration)


def paired_files(folder: Path) -> list[tuple[Path, Path]]:
    """Degraded images and their originals in a released test set, matched by their names but for _LR4, _HR or _x4.

    Raises:
        ValueError: no such folders, an image without its pair, or two of one name.
    """
    places = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in (LOW, HIGH)]
    if None in places:
        raise ValueError(f"{folder}: a test set has a folder {' or '.join(LOW)} and a folder {' or '.join(HIGH)}")
    low, high = (_by_name(place) for place in places if place is not None)
    if not low or set(low) != set(high):
        alone = ", ".join(sorted(set(low) ^ set(high))[:3])
        raise ValueError(f"{folder}: {len(low)} degraded images, {len(high)} originals, without a pair: {alone}")
    return [(low[name], high[name]) for name in sorted(low)]


def _by_name(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in images_below(folder):
        name = re.sub(r"_(LR\d*|HR\d*|x\d+)$", "", file.stem, flags=re.IGNORECASE)
        if name in files:
            raise ValueError(f"{folder}: {files[name].name} and {file.name} are versions of one image, {name}")
        files[name] = file
    return files


def perceptual(name: str) -> Callable[[Tensor, Tensor], float]:
    """A published measure of (1, 3, H, W) in [0, 1], restored and original: lpips and dists by torchmetrics, others by
    pyiqa, whose licence (PolyForm Noncommercial) is the user's to accept. Both fetch weights when they are first used.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        if name in ("lpips", "dists"):
            from torchmetrics.functional import image as functional

            dists: Any = functional.deep_image_structure_and_texture_similarity
            lpips: Any = functional.learned_perceptual_image_patch_similarity
            measure: Any = dists if name == "dists" else partial(lpips, net_type="alex", normalize=True)
        else:
            import pyiqa

            metric: Any = pyiqa.create_metric(name)
            measure = metric if metric.metric_mode == "FR" else lambda restored, _: metric(restored)
    except ImportError:
        package = "torchmetrics" if name in ("lpips", "dists") else "pyiqa (for non-commercial use)"
        raise ImportError(f"{name} needs {package}, which is not installed") from None

    def measured(restored: Tensor, original: Tensor) -> float:
        try:
            return float(measure(restored, original))
        except URLError as error:
            raise OSError(f"{name} fetches its weights when it is first used, which failed: {error.reason}") from None

    return measured


@dataclass(frozen=True)
class RestorationReport(Report):
    """Means over the images of a test set, of the restorer and of a bicubic, beside published rows."""

    benchmark: str
    images: int
    rows: Mapping[str, Mapping[str, float]]
    published: Sequence[PublishedRestoration] = ()

    def document(self) -> Mapping[str, object]:
        rows = [vars(row) for row in self.published]
        return {"benchmark": self.benchmark, "images": self.images, "rows": self.rows, "published": rows}

    def sections(self) -> Iterator[Section]:
        names = list(next(iter(self.rows.values())))
        cells = {**self.rows, **{f"{row.method} ({row.source})": row.values for row in self.published}}
        lines = [(name, *(f"{v[key]:.4g}" if key in v else "-" for key in names)) for name, v in cells.items()]
        notes = ["a bicubic beats most restorers in PSNR and loses in every measure of looks: PSNR alone misleads"]
        yield Section(
            f"{self.benchmark}, {number_of(self.images, 'image')}", names, lines, notes if self.published else []
        )


def evaluate_restoration(
    head: RestorationHead,
    pairs: Sequence[tuple[Path, Path]],
    config: RestoreConfig,
    *,
    benchmark: Benchmark,
    crop: int = 0,
    measures: Sequence[str] = (),
) -> RestorationReport:
    """Restore a released test set and measure it.

    Args:
        pairs: of `paired_files`.
        crop: pixels of the border that do not count; 0 in the papers of diffusion models, 4 in classical ones.
        measures: more of `perceptual`.

    Raises:
        ValueError: an original has another size than its restored image.
    """
    more, distance = {name: perceptual(name) for name in measures}, FeatureDistance()
    sums: dict[str, dict[str, float]] = {head.name: {}, "bicubic": {}}
    for low, high in pairs:
        degraded, original = Photograph.open(low), Photograph.open(high)
        restored = head.predict(degraded, config)  # type: ignore[arg-type]  # its head takes photographs as they are
        if restored.size != original.size:
            raise ValueError(f"{high}: has {original.size}, the restored image {restored.size} (--scale?)")
        enlarged = resized(degraded.pixels, restored.pixels.shape[:2], "bicubic")
        truth = torch.from_numpy(original.pixels).permute(2, 0, 1)[None]
        for who, values in ((head.name, restored.pixels), ("bicubic", enlarged)):
            image, total = torch.from_numpy(values).permute(2, 0, 1)[None], sums[who]
            one = score_images(image, truth, distance, crop=crop)
            one |= {name: measure(image / 255, truth / 255) for name, measure in more.items()}
            for name, value in one.items():
                total[name] = total.get(name, 0.0) + value / len(pairs)
    rows = [row for row in PUBLISHED_RESTORATION if row.benchmark == benchmark]
    return RestorationReport(benchmark=benchmark, images=len(pairs), rows=sums, published=rows)
