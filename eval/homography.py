"""Real photographs seen through known homographies: how far matches land from the truth.

The photographs are samples that this package's dependencies carry. Each is seen again through seeded
perspective views that lie wholly inside it, so that nothing has to be invented at the borders and the place
of every point is known exactly. Errors are told in pixels and in strides, the distance between neighbouring
cells of the descriptors: half a stride is what a map of that size can hardly avoid.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.matchers import Extractor, FeatureMatcher, Matcher, View, describe
from diffrep.eval.report import Report, Section
from diffrep.files import number_of
from diffrep.images import load_image
from diffrep.settings import NOT_NEGATIVE, check, check_ranges

_PHOTOGRAPHS = {  # file name -> (package, path inside it)
    "china.jpg": ("sklearn", "datasets/images/china.jpg"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg"),
    "grace_hopper.jpg": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}


def photographs() -> dict[str, Path]:
    """File name -> path of the photographs that dependencies of this package carry.

    Raises:
        FileNotFoundError: an installation left one out.
    """
    by_name = {name: Path(str(files(package) / path)) for name, (package, path) in _PHOTOGRAPHS.items()}
    if missing := [str(path) for path in by_name.values() if not path.is_file()]:
        raise FileNotFoundError(f"sample photographs are not installed: {', '.join(missing)}")
    return by_name


@dataclass(frozen=True, kw_only=True)
class HomographySettings:
    """Which views are taken of the photographs and which points are asked for."""

    views: int = 8  # of each photograph
    zoom: tuple[float, float] = (0.6, 0.85)  # side of the view as a share of the photograph's
    rotation: float = 25.0  # degrees, at most, to either side
    perspective: float = 0.12  # how far each corner moves, at most, as a share of the view's sides
    points: int = 14  # per side: queries lie on a grid over the photograph; those outside the view do not count
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, views="1..", points="2..", zoom="(0, 1]", rotation=NOT_NEGATIVE, seed="[0, 2^31)")
        check_ranges(self, perspective="[0, 0.25)")  # beyond that, views fold over
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom must be a range, got {self.zoom}")


def view_homography(size: tuple[int, int], settings: HomographySettings, seed: int) -> Tensor:
    """Draw a view that lies inside a photograph of (H, W) pixels and has the same size.

    Returns:
        (3, 3) float64, from homogeneous photograph pixels to view pixels.
    """
    random = np.random.default_rng([settings.seed, seed])
    sides = np.array([size[1], size[0]], dtype=np.float64)  # (x, y)
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    corners = corners + random.uniform(-settings.perspective, settings.perspective, (4, 2))
    angle = math.radians(random.uniform(-settings.rotation, settings.rotation))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    quad = corners * sides * random.uniform(*settings.zoom) @ turn.T
    quad *= min(1.0, *((sides - 1) / np.ptp(quad, axis=0)))  # a turned view may be too wide to fit
    slack = np.maximum(sides - 1 - np.ptp(quad, axis=0), 0)
    quad += random.uniform(0, 1, 2) * slack - quad.min(0)
    return homography_between(torch.from_numpy(quad), corners_of(size))


def corners_of(size: tuple[int, int]) -> Tensor:
    """(4, 2) float64: the centres of the corner pixels of an (H, W) image, clockwise from the top left."""
    right, bottom = size[1] - 1.0, size[0] - 1.0
    return torch.tensor([[0.0, 0.0], [right, 0.0], [right, bottom], [0.0, bottom]], dtype=torch.float64)


def homography_between(source: Tensor, target: Tensor) -> Tensor:
    """The homography (3, 3) float64 that carries four points (4, 2) to four others, no three on a line."""
    x, y = source.double().unbind(-1)
    u, v = target.double().unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = torch.cat(
        [
            torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=-1),
            torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=-1),
        ]
    )
    solution = torch.linalg.solve(rows, torch.cat([u, v]))
    return torch.cat([solution, solution.new_ones(1)]).view(3, 3)


def carry(matrix: Tensor, points: Tensor) -> Tensor:
    """Carry points (..., 2) through a homography (3, 3); float64."""
    lifted = F.pad(points.double(), (0, 1), value=1.0) @ matrix.double().mT
    return lifted[..., :2] / lifted[..., 2:]


def see_through(image: np.ndarray, matrix: Tensor) -> np.ndarray:
    """The view (H, W, 3) uint8 of an image of that size, sampled bilinearly."""
    height, width = image.shape[:2]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = carry(torch.linalg.inv(matrix), torch.stack([columns, rows], dim=-1))
    grid = places / places.new_tensor([width - 1, height - 1]) * 2 - 1
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    seen = F.grid_sample(pixels, grid[None], padding_mode="border", align_corners=True)
    return seen[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


@dataclass(frozen=True)
class Errors:
    """Distances between matches and truth, in pixels of the view."""

    pixels: dict[str, list[float]]  # photograph -> distance of each point
    strides: dict[str, float]  # photograph -> pixels between cells of its descriptors; empty for what has none

    def numbers(self, photograph: str | None = None) -> dict[str, float]:
        """Quantiles over the points of one photograph, or of all."""
        names = [photograph] if photograph else list(self.pixels)
        pixels = np.concatenate([self.pixels[name] for name in names])
        median, upper, tail = (float(q) for q in np.quantile(pixels, [0.5, 0.75, 0.9]))
        numbers = {"points": len(pixels), "median": median, "q75": upper, "q90": tail}
        if self.strides:
            strides = np.concatenate([np.asarray(self.pixels[name]) / self.strides[name] for name in names])
            numbers["stride"] = max(self.strides[name] for name in names)
            numbers["median_in_strides"] = float(np.median(strides))
            numbers["within_one_stride"] = float((strides < 1).mean())
        return numbers


@dataclass(frozen=True)
class HomographyReport(Report):
    """Errors of every matcher over the same views and points."""

    settings: HomographySettings
    rows: Mapping[str, Errors]
    extractors: Mapping[str, Mapping[str, object]]  # extractor -> settings that made its features

    def document(self) -> Mapping[str, object]:
        rows = {
            matcher: {"all": errors.numbers(), "photographs": {name: errors.numbers(name) for name in errors.pixels}}
            for matcher, errors in self.rows.items()
        }
        return {"benchmark": "homography", "settings": self.settings, "extractors": self.extractors, "rows": rows}

    def sections(self) -> Iterator[Section]:
        numbers = {matcher: errors.numbers() for matcher, errors in self.rows.items()}
        names = list(next(iter(self.rows.values())).pixels)
        rows = []
        for matcher, n in numbers.items():
            cells = [f"{n[key]:.1f}" for key in ("median", "q75", "q90", "stride") if key in n]
            if "stride" in n:
                cells += [f"{n['median_in_strides']:.2f} strides", f"{100 * n['within_one_stride']:.1f} %"]
            rows.append((matcher, *cells))
        points = next(iter(numbers.values()))["points"]
        views = f"{number_of(self.settings.views, 'view')} of each of {len(names)} photographs, {points} points"
        columns = ("median", "75 %", "90 %", "stride", "median", "within one")
        yield Section(f"Distance of matches from the truth, pixels ({views})", columns, rows)
        medians = [(m, *(f"{e.numbers(name)['median']:.1f}" for name in names)) for m, e in self.rows.items()]
        yield Section("Median by photograph, pixels", names, medians)


def evaluate_homographies(
    matchers: Mapping[str, Matcher],
    extractors: Mapping[str, Extractor],
    settings: HomographySettings | None = None,
    *,
    images: Mapping[str, Path] | None = None,
    progress: bool = True,
) -> HomographyReport:
    """Measure how far named matchers land from the truth on views of photographs.

    Args:
        matchers, extractors: as for `diffrep.eval.scenes.evaluate_scenes`.
        images: name -> file; `photographs()` where None.

    Raises:
        ImageError: a photograph cannot be read.
    """
    settings = settings or HomographySettings()
    rows = {name: Errors(defaultdict(list), {}) for name in matchers}
    described: dict[str, Mapping[str, object]] = {}
    for name, path in tqdm((images or photographs()).items(), desc="photographs", disable=not progress):
        image = np.array(load_image(path))
        matrices = [view_homography(image.shape[:2], settings, view) for view in range(settings.views)]
        box = (0, 0, image.shape[1] - 1, image.shape[0] - 1)
        pictures = [image, *(see_through(image, matrix) for matrix in matrices)]
        photograph, *views = describe([View.of(picture, box) for picture in pictures], extractors, described)
        for view, matrix in zip(views, matrices, strict=True):
            points, truth = queries(view.size, matrix, settings.points)
            for matcher, match in matchers.items():
                matched = match(photograph, view, points)
                rows[matcher].pixels[name].extend(torch.linalg.vector_norm(matched.double() - truth, dim=-1).tolist())
                if isinstance(match, FeatureMatcher):
                    rows[matcher].strides[name] = match.stride(view)
    return HomographyReport(settings, rows, described)


def queries(size: tuple[int, int], matrix: Tensor, per_side: int) -> tuple[Tensor, Tensor]:
    """Points (N, 2) on a grid over the photograph that the view shows, and where it shows them."""
    height, width = size
    x = (torch.arange(per_side) + 0.5) * width / per_side - 0.5
    y = (torch.arange(per_side) + 0.5) * height / per_side - 0.5
    points = torch.cartesian_prod(x, y)
    truth = carry(matrix, points)
    inside = (truth >= 0).all(-1) & (truth[:, 0] <= width - 1) & (truth[:, 1] <= height - 1)
    return points[inside], truth[inside]
