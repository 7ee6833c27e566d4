"""Evaluate a recipe's dense flow on TSS."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm

from diffrep.eval.cache import ImageFeatures, Kept, digest
from diffrep.eval.datasets.tss import SUBSETS, FlowItem, FlowSet
from diffrep.eval.flow import (
    FlowCount,
    count_flow,
    dense_flow,
    mean_error,
    mean_pck,
    mean_smoothness,
    nearest_flow,
)
from diffrep.eval.published import PUBLISHED_FLOW
from diffrep.eval.report import Problem, Report, Section
from diffrep.files import claim_folder, read_document, sweep_partials, write_whole
from diffrep.fusion import fuse
from diffrep.images import load_image
from diffrep.recipes import Correspondence

FlowSearch = Literal["recipe", "sd-dino"]
HEADLINE = 0.05  # the alpha that papers report


@dataclass(frozen=True)
class FlowReport(Report):
    """What a recipe got on TSS."""

    recipe: str
    search: FlowSearch
    counts: tuple[FlowCount, ...]
    settings: Mapping[str, object]

    def of(self, subset: str) -> tuple[FlowCount, ...]:
        """The items of one subset."""
        return tuple(count for count in self.counts if count.subset == subset)

    def document(self) -> Mapping[str, object]:
        subsets = [subset for subset in SUBSETS if self.of(subset)]
        return {
            "dataset": "TSS",
            "recipe": self.recipe,
            "search": self.search,
            "pck": {subset: {f"{HEADLINE:g}": mean_pck(self.of(subset), HEADLINE)} for subset in subsets},
            "flows": self.counts,
            "published": PUBLISHED_FLOW,
            "problems": self.problems,
            "settings": self.settings,
        }

    def sections(self) -> Iterator[Section]:
        shown = [subset for subset in SUBSETS if self.of(subset)]
        groups = [*(self.of(subset) for subset in shown), self.counts]
        ours = [100 * mean_pck(group, HEADLINE) for group in groups]
        yield Section(
            f"{self.recipe} on TSS: {len(self.counts)} flows; PCK@{HEADLINE:g} in % (<=, longer side of the"
            f" source, mean over flows); flow by the {self.search}'s rule",
            [*shown, "all"],
            [
                ("PCK", *(f"{value:.1f}" for value in ours)),
                ("end-point error, pixels", *(f"{mean_error(group):.2f}" for group in groups)),
                ("smoothness, pixels", *(f"{mean_smoothness(group):.2f}" for group in groups)),
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
    keep: Kept = "float32",
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
    counts = []
    for item in tqdm(flows.items, desc="flow", unit="flow", disable=not progress):
        if {item.source, item.target} & unreadable.keys():
            continue
        try:
            counts.append(_counted(item, flows.root, features, search, matched))
        except (OSError, ValueError) as error:
            problems.append(Problem(item.name, str(error)))
    settings = {**features.settings, "recipe": asdict(recipe), "kept_as": keep}
    return FlowReport(recipe.name, search, tuple(counts), settings, problems=tuple(problems))


def _counted(item: FlowItem, root: Path, features: ImageFeatures, search: FlowSearch, folder: Path) -> FlowCount:
    """Count one item, or read its counts where they are kept and its files are still the same."""
    file = folder / f"{item.name.replace('/', ' ')}.json"
    files = (item.source, item.target, item.flow_file, item.mask_file)
    content = digest(*((root / name).read_bytes() for name in files))
    note = read_document(file) if file.is_file() else {}
    if note.pop("content", None) != content:
        source, target = fuse(
            [features.get(item.category, path) for path in (item.source, item.target)],
            features.correspondence.recipe.fusion,
        )
        if search == "sd-dino":
            flow = nearest_flow(source, target, item.padded_size, rounding="official")
        else:
            flow = dense_flow(source, target, features.correspondence.recipe.matching)
        count = count_flow(item, flow, item.flow(root), item.mask(root))
        write_whole(file, json.dumps({"content": content, **asdict(count)}))
        note = asdict(count)
    return FlowCount(**{**note, "correct": tuple(note["correct"])})


def padded_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image on the top left of a black one of (H, W) pixels."""
    image = load_image(path)
    if (image.height, image.width) == size:
        return image
    canvas = Image.new("RGB", (size[1], size[0]))
    canvas.paste(image, (0, 0))
    return canvas
