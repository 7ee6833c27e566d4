"""Evaluate a recipe's dense flow on TSS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm

from diffrep.eval.cache import FeatureCache, cache_key, extract_images, prompts_by_category
from diffrep.eval.datasets.pairs import Problem
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
from diffrep.files import claim_folder, write_whole
from diffrep.fusion import fuse
from diffrep.images import load_image
from diffrep.recipes import Correspondence

FlowSearch = Literal["recipe", "sd-dino"]
HEADLINE = 0.05  # the alpha that papers report


@dataclass(frozen=True)
class FlowReport:
    """What a recipe got on TSS."""

    recipe: str
    search: FlowSearch
    counts: tuple[FlowCount, ...]
    problems: tuple[Problem, ...]
    settings: Mapping[str, object]

    def of(self, subset: str) -> tuple[FlowCount, ...]:
        """The items of one subset."""
        return tuple(count for count in self.counts if count.subset == subset)

    def table(self) -> str:
        """The report as text, with the papers' rows."""
        shown = [subset for subset in SUBSETS if self.of(subset)]
        lines = [
            f"{self.recipe} on TSS: {len(self.counts)} flows; PCK@{HEADLINE:g} in % (<=, longer side of the"
            f" source, mean over flows); flow by the {self.search}'s rule",
            f"{'':<32}" + "".join(f"{name:>16}" for name in [*shown, "all"]),
        ]
        groups = [*(self.of(subset) for subset in shown), self.counts]
        ours = [100 * mean_pck(group, HEADLINE) for group in groups]
        lines += [
            f"{'PCK':<32}" + "".join(f"{value:>16.1f}" for value in ours),
            f"{'end-point error, pixels':<32}" + "".join(f"{mean_error(group):>16.2f}" for group in groups),
            f"{'smoothness, pixels':<32}" + "".join(f"{mean_smoothness(group):>16.2f}" for group in groups),
            "published PCK (ours minus theirs)",
        ]
        for row in PUBLISHED_FLOW:
            cells = [
                f"{row.pck[subset]:.1f} ({own - row.pck[subset]:+.1f})"
                for subset, own in zip(shown, ours, strict=False)
            ]
            lines.append(f"{row.method:<32}" + "".join(f"{cell:>16}" for cell in cells) + f"  {row.source}")
        if self.problems:
            lines += [f"{len(self.problems)} problems:", *(f"  {problem}" for problem in self.problems[:20])]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything in the table as numbers, every flow's counts, and the settings."""
        document = {
            "dataset": "TSS",
            "recipe": self.recipe,
            "search": self.search,
            "pck": {
                subset: {f"{HEADLINE:g}": mean_pck(self.of(subset), HEADLINE)} for subset in SUBSETS if self.of(subset)
            },
            "flows": [asdict(count) for count in self.counts],
            "published": [asdict(row) for row in PUBLISHED_FLOW],
            "problems": [asdict(problem) for problem in self.problems],
            "settings": dict(self.settings),
        }
        return json.dumps(document, indent=2, default=str)


def evaluate_flow(
    flows: FlowSet,
    correspondence: Correspondence,
    folder: str | Path,
    *,
    search: FlowSearch = "recipe",
    keep: Literal["float32", "float16"] = "float32",
    batch_size: int = 8,
    progress: bool = True,
) -> FlowReport:
    """Evaluate a recipe on TSS; the same folder again goes on from what is there.

    Args:
        search: ``recipe`` matches as the recipe does and interpolates between cell centres; ``sd-dino`` takes
            the released script's nearest cells of a padded square, with its rounding.

    Raises:
        ValueError: the folder is from other settings, or the cells are no square for ``sd-dino``.
    """
    folder, recipe = Path(folder), correspondence.recipe
    settings = {
        "readings": [asdict(reading) for reading in recipe.readings],
        "weights": [backbone.source for backbone in correspondence.backbones],
        "dataset": "TSS",
        "batch_size": batch_size,
    }
    cache = FeatureCache(folder / "features", settings, dtype=keep)
    sizes = {path: item.padded_size for item in flows.items for path in (item.source, item.target)}
    by_category = prompts_by_category(recipe)
    groups: dict[str, list[str]] = {}
    for item in flows.items:
        images = groups.setdefault(item.category if by_category else "", [])
        images += [path for path in (item.source, item.target) if path not in images]
    unreadable = extract_images(
        groups,
        lambda image: padded_image(flows.root / image, sizes[image]),
        correspondence,
        cache,
        batch_size=batch_size,
        progress=progress,
    )
    problems = [*flows.problems, *(Problem(path, what) for path, what in unreadable.items())]
    kept = folder / "flows" / search
    claim_folder(kept, {"recipe": asdict(recipe), "items": [item.name for item in flows.items]})
    counts = []
    for item in tqdm(flows.items, desc="flow", unit="flow", disable=not progress):
        if {item.source, item.target} & unreadable.keys():
            continue
        file = kept / f"{item.name.replace('/', ' ')}.json"
        if not file.exists():
            try:
                count = _count(item, flows.root, correspondence, cache, search, by_category)
            except (OSError, ValueError) as error:
                problems.append(Problem(item.name, str(error)))
                continue
            write_whole(file, json.dumps(asdict(count)))
        found = json.loads(file.read_text())
        counts.append(FlowCount(**{**found, "correct": tuple(found["correct"])}))
    made = {**settings, "recipe": asdict(recipe), "kept_as": keep}
    return FlowReport(recipe.name, search, tuple(counts), tuple(problems), made)


def _count(
    item: FlowItem,
    root: Path,
    correspondence: Correspondence,
    cache: FeatureCache,
    search: FlowSearch,
    by_category: bool,
) -> FlowCount:
    category = item.category if by_category else ""
    features = [cache.load(cache_key(category, path)) for path in (item.source, item.target)]
    source, target = fuse(features, correspondence.recipe.fusion)
    if search == "sd-dino":
        flow = nearest_flow(source, target, item.padded_size, rounding="official")
    else:
        flow = dense_flow(source, target, correspondence.recipe.matching)
    return count_flow(item, flow, item.flow(root), item.mask(root))


def padded_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image on the top left of a black one of (H, W) pixels."""
    image = load_image(path)
    if (image.height, image.width) == size:
        return image
    canvas = Image.new("RGB", (size[1], size[0]))
    canvas.paste(image, (0, 0))
    return canvas
