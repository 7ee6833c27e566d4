"""Evaluate a recipe on a published correspondence benchmark.

Features are extracted once per image and kept, matches are kept by the chunk; both are written whole or not
at all, so a run that was killed goes on where it was and ends with the same numbers. What a data set lacks
is named in the report. All averages are printed, with the papers' numbers and the difference beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.cache import (
    FeatureCache,
    cache_key,
    extract_images,
    fingerprint,
    images_by_prompt,
    prompts_by_category,
)
from diffrep.eval.correspondence_report import CorrespondenceReport, PairMatches
from diffrep.eval.datasets.ap10k import read_ap10k
from diffrep.eval.datasets.ap10k_release import Ap10kSet
from diffrep.eval.datasets.keypoint_tables import KeypointTable, read_keypoint_tables, table_of
from diffrep.eval.datasets.pairs import AnnotatedPair, PairSet, Problem
from diffrep.eval.datasets.pf import read_pf_pascal, read_pf_willow
from diffrep.eval.datasets.spair import read_spair, read_spair_u
from diffrep.eval.datasets.tss import read_tss
from diffrep.eval.failures import save_failures
from diffrep.eval.matchers import baselines, matchers_of
from diffrep.eval.pck import Pck
from diffrep.eval.pose import predict_posed
from diffrep.eval.protocols import PROTOCOLS, Protocol
from diffrep.eval.scenes import ScenesReport, evaluate_scenes
from diffrep.eval.tss import FlowReport, evaluate_flow
from diffrep.features import FeatureMaps
from diffrep.files import claim_folder, write_whole
from diffrep.fusion import Descriptors, fuse
from diffrep.images import load_image
from diffrep.matching import match_points
from diffrep.recipes import Correspondence, Recipe

Search = Literal["auto", "protocol", "recipe"]


def evaluate_pairs(
    pairs: PairSet,
    protocol: Protocol,
    correspondence: Correspondence,
    folder: str | Path,
    *,
    search: Search = "auto",
    pose: bool = False,
    tables: Mapping[str, KeypointTable] | None = None,
    keep: Literal["float32", "float16"] = "float32",
    batch_size: int = 8,
    pairs_per_file: int = 50,
    progress: bool = True,
) -> CorrespondenceReport:
    """Evaluate a recipe on a benchmark; the same folder again goes on from what is there.

    Args:
        folder: holds ``features/`` (one file per image) and ``matches/`` (one file per `pairs_per_file`
            pairs).
        search: ``protocol`` matches as the paper's script does, ``recipe`` as the recipe does; ``auto`` takes
            the protocol's way where the recipe's descriptors lie on the cells that it needs.
        pose: also extract the sources' mirror images and match from those where they are nearer (GeoAware's
            adaptive pose alignment, without masks).
        tables: category -> which of its keypoints are alike, instead of what their names say.
        keep: the type in which features are kept.
        batch_size: images that are extracted together; all that is lost when a run is killed.

    Raises:
        ValueError: the folder is from other settings, the protocol's search does not fit the recipe, or pose
            alignment is asked for without it.
    """
    folder = Path(folder)
    recipe = correspondence.recipe
    settings = {
        "readings": [asdict(reading) for reading in recipe.readings],
        "weights": [backbone.source for backbone in correspondence.backbones],
        "dataset": pairs.name,
        "batch_size": batch_size,
    }
    cache = FeatureCache(folder / "features", settings, dtype=keep)
    groups = images_by_prompt(pairs, recipe)
    if pose:
        groups = {c: [*images, *(MIRRORED + image for image in images)] for c, images in groups.items()}
    unreadable = extract_images(
        groups,
        lambda image: _load(pairs.root, image),
        correspondence,
        cache,
        batch_size=batch_size,
        progress=progress,
    )
    usable = tuple(p for p in pairs.pairs if not {p.source.path, p.target.path} & unreadable.keys())
    problems = [
        *pairs.problems,
        *(Problem(image, what) for image, what in unreadable.items() if not image.startswith(MIRRORED)),
    ]
    used = choose_search(usable, protocol, recipe, cache, search)
    if pose and used != "protocol":
        raise ValueError(f"pose alignment goes with a protocol's search; {recipe.name} matches by itself here")
    kept = f"{protocol.name} by {used}{' posed' if pose else ''}"
    matches = list(
        match_pairs(
            usable, protocol, recipe, cache, folder / "matches" / kept,
            by_protocol=used == "protocol", pose=pose, tables=tables, pairs_per_file=pairs_per_file, progress=progress,
        )
    )  # fmt: skip
    counts = tuple(protocol.count(found.pair, found.predicted) for found in matches)
    parts = None
    if protocol.by_part:
        groups_of = {c: table_of(protocol.benchmark, c, tables).groups for c in {m.pair.category for m in matches}}
        shared = (protocol.count_shared(m.pair, m.predicted, groups_of[m.pair.category]) for m in matches)
        parts = Pck(protocol.alphas, tuple(shared))
    return CorrespondenceReport(
        dataset=pairs.name,
        split=pairs.split,
        protocol=protocol,
        recipe=recipe.name,
        search=used,
        pck=Pck(protocol.alphas, counts),
        by_part=parts,
        problems=tuple(problems),
        settings={**settings, "recipe": asdict(recipe), "kept_as": keep},
        matches=tuple(matches),
    )


MIRRORED = "mirrored/"  # before the path of an image whose mirror image is meant


def _load(root: Path, image: str) -> Image.Image:
    picture = load_image(root / image.removeprefix(MIRRORED))
    return ImageOps.mirror(picture) if image.startswith(MIRRORED) else picture


def choose_search(
    pairs: Sequence[AnnotatedPair], protocol: Protocol, recipe: Recipe, cache: FeatureCache, search: Search
) -> Literal["protocol", "recipe"]:
    """Whose way from keypoints to matches is used.

    Raises:
        ValueError: the protocol's is asked for and it has none, or the recipe's cells are others than it
        needs.
    """
    if search == "recipe" or (search == "auto" and (protocol.search is None or not pairs)):
        return "recipe"
    if protocol.search is None:
        raise ValueError(f"the protocol {protocol.name} leaves matching to the recipe: search='recipe'")
    if not pairs:
        return "protocol"
    category = pairs[0].category if prompts_by_category(recipe) else ""
    (descriptors,) = fuse([cache.load(cache_key(category, pairs[0].source.path))], recipe.fusion)
    placement, cells = descriptors.placement, protocol.search.cells
    square = placement.canvas_size[0] == placement.canvas_size[1]
    if square and descriptors.size == (cells, cells) and _centred(descriptors):
        return "protocol"
    if search == "auto":
        return "recipe"
    raise ValueError(
        f"{protocol.name} matches {cells} x {cells} cells of a padded square; {recipe.name} gives"
        f" {descriptors.size[0]} x {descriptors.size[1]} on a canvas of {placement.canvas_size}:"
        " search='recipe'"
    )


def _centred(descriptors: Descriptors) -> bool:
    """Whether the image keeps its aspect in the middle of its canvas."""
    placement = descriptors.placement
    x, y = placement.scale
    x0, y0, x1, y1 = placement.content_box
    height, width = placement.canvas_size
    return abs(x / y - 1) < 0.05 and abs(x0 - (width - x1)) <= 1 and abs(y0 - (height - y1)) <= 1


def match_pairs(
    pairs: Sequence[AnnotatedPair],
    protocol: Protocol,
    recipe: Recipe,
    cache: FeatureCache,
    folder: Path,
    *,
    by_protocol: bool,
    pose: bool = False,
    tables: Mapping[str, KeypointTable] | None = None,
    pairs_per_file: int = 50,
    progress: bool = True,
) -> Iterator[PairMatches]:
    """Match every pair, or read its matches where they are kept.

    Raises:
        ValueError: the folder holds matches of other pairs or settings.
    """
    names = [[p.name, p.source.path, p.target.path, list(p.ids)] for p in pairs]
    categories = {p.category for p in pairs} if pose else set()
    partners = {c: table_of(protocol.benchmark, c, tables).mirror for c in categories}
    claim_folder(
        folder,
        {
            "recipe": asdict(recipe),
            "by_protocol": by_protocol,
            "frame": protocol.frame,
            "search": None if protocol.search is None else asdict(protocol.search),
            "pairs": fingerprint(names),
            "pairs_per_file": pairs_per_file,
            "partners": {c: sorted(partners[c].items()) for c in sorted(partners)},
        },
    )
    by_category = prompts_by_category(recipe)
    load = lru_cache(maxsize=16)(cache.load)  # an image is in many pairs, usually in neighbouring ones
    with tqdm(total=len(pairs), desc="match", unit="pair", disable=not progress) as bar:
        for start in range(0, len(pairs), pairs_per_file):
            chunk = pairs[start : start + pairs_per_file]
            file = folder / f"{start // pairs_per_file:05d}.json"
            if not file.exists():
                found = []
                for pair in chunk:
                    category = pair.category if by_category else ""
                    source, target = (load(cache_key(category, i.path)) for i in (pair.source, pair.target))
                    mirrored = load(cache_key(category, MIRRORED + pair.source.path)) if pose else None
                    points = predict(
                        pair, source, target, protocol, recipe,
                        by_protocol=by_protocol, mirrored=mirrored, partners=partners.get(pair.category),
                    )  # fmt: skip
                    found.append(points.tolist())
                write_whole(file, json.dumps(found))
            # read back also what was just written: a run in two halves sees the same numbers
            for pair, points in zip(chunk, json.loads(file.read_text()), strict=True):
                yield PairMatches(pair, torch.tensor(points, dtype=torch.float32).reshape(-1, 2))
            bar.update(len(chunk))


def predict(
    pair: AnnotatedPair,
    source: Sequence[FeatureMaps],
    target: Sequence[FeatureMaps],
    protocol: Protocol,
    recipe: Recipe,
    *,
    by_protocol: bool,
    mirrored: Sequence[FeatureMaps] | None = None,
    partners: Mapping[int, int] | None = None,
) -> Tensor:
    """Where a pair's keypoints lie in the target, (N, 2) float32 in the protocol's frame.

    Args:
        mirrored: features of the source's mirror image, to match from those where they are nearer.
        partners: with `mirrored`: keypoint -> the one that takes its place in a mirror image.
    """
    if mirrored is not None:
        a, flipped, b = fuse([source, mirrored, target], recipe.fusion)
        return predict_posed(pair, protocol, a, flipped, b, partners or {}).float()
    a, b = fuse([source, target], recipe.fusion)
    points = pair.source.points(pair.ids)
    if by_protocol:
        assert protocol.search is not None
        assert protocol.frame is not None
        return protocol.search(a, b, protocol.to_frame(points, pair.source), protocol.frame).float()
    height, width = pair.source.size
    # annotations that count pixels from 1 reach beyond the last pixel's centre
    points = torch.minimum(points.clamp(min=-0.5), points.new_tensor([width - 0.5, height - 0.5]))
    return protocol.to_frame(match_points(a, b, points, recipe.matching).points.cpu(), pair.target)


Benchmark = Literal["scenes", "spair", "spair-u", "pf-pascal", "pf-willow", "ap-10k", "tss"]
_USUAL = {  # benchmark -> protocol where the recipe has none of its own
    "spair": "spair-dift",
    "spair-u": "spair-u-geoaware",
    "pf-pascal": "pf-pascal-sd-dino",
    "pf-willow": "pf-willow",
    "ap-10k": "ap-10k-geoaware",
}


@dataclass(frozen=True, kw_only=True)
class EvalCorrespondence:
    """Evaluate a recipe on a published correspondence benchmark, or on rendered scenes."""

    benchmark: Benchmark
    data: Path | None = None  # the data set's folder, in the layout in which it is released; scenes need none
    recipe: str = "tiny"
    protocol: str | None = None  # how it is counted; none: that of the recipe's paper, or the usual one
    split: str = "test"  # of spair, pf-pascal (trn, val, test) and ap-10k (also test_cross_species, ..._family)
    categories: tuple[str, ...] = ()  # or, for tss, subsets; none: all
    search: Search = "auto"  # whose way from keypoints to matches: the protocol's, the recipe's, or what fits
    pose: bool = False  # adaptive pose alignment: match from the source's mirror image where that is nearer
    keypoints: Path | None = None  # TOML or JSON with left-right pairs and parts of the keypoints, by category
    keep: Literal["float32", "float16"] = "float32"  # in which features are kept on disk
    batch_size: int = 8  # images extracted together
    failures: int = 12  # pictures of the worst pairs
    device: str = "cpu"
    # features, matches, report.json, report.txt and failures/ go here; the same folder again goes on
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("correspondence")

    def run(self) -> CorrespondenceReport | FlowReport | ScenesReport:
        """Evaluate, print the tables, write the files and return the report.

        Raises:
            DatasetError: the folder is not that data set.
            ValueError: an unknown protocol, recipe, split or category, or a folder with other settings.
        """
        report: CorrespondenceReport | FlowReport | ScenesReport
        if self.benchmark == "scenes":
            plain, ours = baselines(box=True), matchers_of(Correspondence(self.recipe, device=self.device))
            report = evaluate_scenes(plain[0] | ours[0], plain[1] | ours[1])
        elif self.data is None:
            raise ValueError(f"benchmark {self.benchmark} needs --data, the folder of the data set")
        elif self.benchmark == "tss":
            flows = read_tss(self.data, subsets=self.categories or None)
            report = evaluate_flow(
                flows,
                Correspondence(self.recipe, device=self.device),
                self.output,
                search="sd-dino" if self.search == "protocol" else "recipe",
                keep=self.keep,
                batch_size=self.batch_size,
            )
        else:
            protocol = self.chosen_protocol()
            pairs = self.read(self.data, protocol)
            report = evaluate_pairs(
                pairs,
                protocol,
                Correspondence(self.recipe, device=self.device),
                self.output,
                search=self.search,
                pose=self.pose,
                tables=None if self.keypoints is None else read_keypoint_tables(self.keypoints),
                keep=self.keep,
                batch_size=self.batch_size,
            )
            save_failures(report.failures(self.failures, pairs.root), self.output / "failures")
        print(report.table())
        self.output.mkdir(parents=True, exist_ok=True)
        write_whole(self.output / "report.json", report.to_json())
        write_whole(self.output / "report.txt", report.table() + "\n")
        return report

    def chosen_protocol(self) -> Protocol:
        """The protocol that is asked for, or that goes with benchmark and recipe.

        Raises:
            ValueError: there is none of that name for the benchmark.
        """
        fitting = [name for name, protocol in PROTOCOLS.items() if protocol.benchmark == self.benchmark]
        own = f"{self.benchmark}-{self.recipe.partition(':')[0]}"
        name = self.protocol or (own if own in fitting else _USUAL[self.benchmark])
        if name not in fitting:
            raise ValueError(f"{self.benchmark} has no protocol {name!r}; it has {', '.join(fitting)}")
        return PROTOCOLS[name]

    def read(self, data: Path, protocol: Protocol) -> PairSet:
        """The data set's pairs.

        Raises:
            DatasetError: the folder is not that data set.
            ValueError: the benchmark has no such split or category.
        """
        special: dict[str, tuple[str, ...]] = {
            "ap-10k": get_args(Ap10kSet), "pf-willow": ("test",), "spair-u": ("test",)
        }  # fmt: skip
        splits = special.get(self.benchmark, ("trn", "val", "test"))
        if self.split not in splits:
            raise ValueError(f"{self.benchmark} has no split {self.split!r}; it has {', '.join(splits)}")
        categories = self.categories or None
        split: Any = self.split  # checked above
        if self.benchmark == "spair":
            return read_spair(data, split=split, categories=categories, keypoints=protocol.keypoints)
        if self.benchmark == "spair-u":
            return read_spair_u(data, categories=categories, keypoints=protocol.keypoints)
        if self.benchmark == "pf-pascal":
            return read_pf_pascal(data, split=split, categories=categories)
        if self.benchmark == "pf-willow":
            return read_pf_willow(data, categories=categories)
        return read_ap10k(data, split=split, categories=categories)
