"""Evaluate a recipe's dense flow on TSS, counted as sd-dino's pck_tss.py counts it.

For each pixel of the target the flow says where it lies in the source. PCK of an item is the share of the
object's pixels whose flow is at most ``alpha * max(H, W)`` of the source image away from the truth; items
are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.cache import ImageFeatures, StoredType, digest, resumed
from diffrep.eval.datasets.pairs import SUBSETS, FlowItem, FlowSet
from diffrep.eval.report import PUBLISHED_FLOW, Problem, Report, Section
from diffrep.features import Descriptors, lattice, sample
from diffrep.files import claim_folder, sweep_partials
from diffrep.fusion import fuse
from diffrep.images import load_image
from diffrep.matching import MatchConfig, match_dense
from diffrep.recipes import Correspondence
from diffrep.similarity import nearest

ALPHAS = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
HEADLINE = 0.05  # the alpha that papers report
FlowSearch = Literal["recipe", "sd-dino"]


def nearest_flow(source: Descriptors, target: Descriptors, size: tuple[int, int]) -> Tensor:
    """Flow from each pixel of the target to its nearest place in the source, as sd-dino's released code has it.

    It keeps a slip of that code, which divides the flat index without rounding down and so adds column / cells to every
    vertical displacement: published TSS numbers have it.

    Args:
        source, target: descriptors on the cells of a square on which the padded images lie centred.
        size: (H, W) of both images after padding to a common size.

    Returns:
        (2, H, W) float32, (x, y) in pixels.

    Raises:
        ValueError: the two sides have other cells, or the cells are no square.
    """
    rows, columns = target.size
    if source.size != target.size or rows != columns:
        raise ValueError(f"the cells must be one square for both images, got {source.size} and {target.size}")
    best = nearest(target.rows(), source.rows(), "euclidean").indices.view(rows, columns)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    flow = torch.stack([(best % columns).float() - column, best / columns - row])
    long = max(size)
    dense = F.interpolate(flow[None], size=(long, long), mode="bilinear", align_corners=False)[0] * (long / columns)
    top, left = ((long - side) // 2 for side in size)
    return dense[:, top : top + size[0], left : left + size[1]]


def dense_flow(source: Descriptors, target: Descriptors, matching: MatchConfig) -> Tensor:
    """Flow from each pixel of the target to the source, interpolated between centres of the target's cells.

    Returns:
        (2, H, W) float32, (x, y) in pixels, over the target's image.
    """
    matches = match_dense(target, source, matching)
    rows, columns = matches.valid.any(1).nonzero()[:, 0], matches.valid.any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])  # cells on padding match nothing, and are left out
    flow = (matches.points - matches.sources)[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].cpu()
    pixels = target.cells(lattice(target.placement.image_size).float())
    return sample(flow, pixels - pixels.new_tensor([left, top])).movedim(-1, 0)


@dataclass(frozen=True)
class FlowCount:
    """What one item adds to every figure of the report."""

    name: str
    subset: str
    category: str
    pixels: int  # of the object
    correct: tuple[int, ...]  # per alpha of ALPHAS: pixels right by the item's own threshold
    error: float  # mean end-point error over the object, pixels
    smoothness: float  # mean absolute first difference over the object, pixels


def count_flow(item: FlowItem, flow: Tensor, truth: Tensor, mask: Tensor) -> FlowCount:
    """Compare flow with truth, both (2, H, W), on the pixels of a mask (H, W).

    Raises:
        ValueError: the mask is empty.
    """
    if not bool(mask.any()):
        raise ValueError(f"{item.name}: the mask {item.mask_file} marks no pixel")
    distance = torch.linalg.vector_norm(flow - truth, dim=0)[mask]
    limit = max(item.source_size)
    correct = tuple(int((distance <= alpha * limit).sum()) for alpha in ALPHAS)
    x = flow.diff(dim=2).abs().sum(0)[mask[:, 1:] & mask[:, :-1]]
    y = flow.diff(dim=1).abs().sum(0)[mask[1:] & mask[:-1]]
    steps = torch.cat([x, y])
    smoothness = float(steps.mean()) if len(steps) else 0.0
    return FlowCount(item.name, item.subset, item.category, len(distance), correct, float(distance.mean()), smoothness)


def mean_pck(counts: Sequence[FlowCount], alpha: float) -> float:
    """Mean over items of the share of pixels that are right; NaN where there is no item.

    Raises:
        ValueError: alpha was not counted.
    """
    if alpha not in ALPHAS:
        raise ValueError(f"alpha {alpha} was not counted; counted were {', '.join(map(str, ALPHAS))}")
    i = ALPHAS.index(alpha)
    return mean([count.correct[i] / count.pixels for count in counts])


def mean(values: Iterable[float]) -> float:
    """Mean over items; NaN where there is none."""
    known = list(values)
    return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class FlowReport(Report):
    """What a recipe got on TSS."""

    recipe: str
    search: FlowSearch
    counts: tuple[FlowCount, ...]
    settings: Mapping[str, object]

    def subsets(self) -> dict[str, list[FlowCount]]:
        """Subset -> its items; only subsets that have any."""
        groups = {subset: [count for count in self.counts if count.subset == subset] for subset in SUBSETS}
        return {subset: counts for subset, counts in groups.items() if counts}

    def document(self) -> Mapping[str, object]:
        return {
            "dataset": "TSS",
            "recipe": self.recipe,
            "search": self.search,
            "pck": {subset: {f"{HEADLINE:g}": mean_pck(some, HEADLINE)} for subset, some in self.subsets().items()},
            "flows": self.counts,
            "published": PUBLISHED_FLOW,
            "problems": self.problems,
            "settings": self.settings,
        }

    def sections(self) -> Iterator[Section]:
        shown = [*self.subsets()]
        groups = [*self.subsets().values(), self.counts]
        ours = [100 * mean_pck(group, HEADLINE) for group in groups]
        yield Section(
            f"{self.recipe} on TSS: {len(self.counts)} flows; PCK@{HEADLINE:g} in % (<=, longer side of the"
            f" source, mean over flows); flow by the {self.search}'s rule",
            [*shown, "all"],
            [
                ("PCK", *(f"{value:.1f}" for value in ours)),
                ("end-point error, pixels", *(f"{mean(one.error for one in group):.2f}" for group in groups)),
                ("smoothness, pixels", *(f"{mean(one.smoothness for one in group):.2f}" for group in groups)),
            ],
        )
        rows = []
        for row in PUBLISHED_FLOW:
            pairs = zip(shown, ours, strict=False)
            cells = (f"{row.pck[subset]:.1f} ({value - row.pck[subset]:+.1f})" for subset, value in pairs)
            rows.append((row.method, *cells, row.source))
        yield Section("Published PCK (ours minus theirs)", shown, rows)


def evaluate_flow(
    flows: FlowSet,
    correspondence: Correspondence,
    folder: str | Path,
    *,
    search: FlowSearch = "recipe",
    keep: StoredType = "float32",
    batch_size: int = 8,
    progress: bool = True,
) -> FlowReport:
    """Evaluate a recipe on TSS; the same folder again goes on from what is in it.

    Args:
        search: ``recipe`` matches as the recipe does and interpolates between cell centres; ``sd-dino`` takes
            the released script's nearest cells of a padded square, with its rounding.

    Raises:
        ValueError: the folder is from other settings, or the cells are no square for ``sd-dino``.
    """
    folder, recipe = Path(folder), correspondence.recipe
    sizes = {path: item.padded_size for item in flows.items for path in (item.source, item.target)}
    features = ImageFeatures(
        flows.root,
        lambda image: padded_image(flows.root / image, sizes[image]),
        correspondence,
        folder / "features",
        "TSS",
        kept_as=keep,
        batch_size=batch_size,
    )
    images = [(item.category, path) for item in flows.items for path in (item.source, item.target)]
    unreadable = features.extract(images, progress=progress)
    problems = [*flows.problems, *(Problem(path, what) for path, what in unreadable.items())]
    matched = folder / "flows" / search
    claim_folder(matched, {"recipe": asdict(recipe), "items": [item.name for item in flows.items]})
    sweep_partials(matched)

    def measure(item: FlowItem) -> dict[str, object]:
        source, target = fuse([features.get(item.category, path) for path in (item.source, item.target)], recipe.fusion)
        if search == "sd-dino":
            flow = nearest_flow(source, target, item.padded_size)
        else:
            flow = dense_flow(source, target, recipe.matching)
        return asdict(count_flow(item, flow, item.flow(flows.root), item.mask(flows.root)))

    counts = []
    for item in tqdm(flows.items, desc="flow", unit="flow", disable=not progress):
        if {item.source, item.target} & unreadable.keys():
            continue
        try:
            files = (item.source, item.target, item.flow_file, item.mask_file)
            content = digest(*((flows.root / name).read_bytes() for name in files))
            file = matched / f"{item.name.replace('/', ' ')}.json"
            count = resumed(file, content, lambda item=item: measure(item))  # type: ignore[misc]
        except (OSError, ValueError) as error:
            problems.append(Problem(item.name, str(error)))
        else:
            del count["content"]
            counts.append(FlowCount(**{**count, "correct": tuple(count["correct"])}))
    return FlowReport(recipe.name, search, tuple(counts), features.settings, problems=tuple(problems))


def padded_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image on the top left of a black one of (H, W) pixels."""
    image = load_image(path)
    if (image.height, image.width) == size:
        return image
    canvas = Image.new("RGB", (size[1], size[0]))
    canvas.paste(image, (0, 0))
    return canvas
