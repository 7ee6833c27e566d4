"""Evaluate a recipe on a published correspondence benchmark.

Features are extracted once per image and kept, matches are kept by the chunk; both are written whole or not
at all, so a run that was killed goes on where it was and ends with the same numbers. What a data set lacks
is named in the report. All averages are printed, with the papers' numbers and the difference beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.cache import MIRRORED, ImageFeatures, Kept, fingerprint, images_of
from diffrep.eval.correspondence_report import CorrespondenceReport, PairMatches
from diffrep.eval.datasets.keypoint_tables import KeypointTable, table_of
from diffrep.eval.datasets.pairs import AnnotatedPair, PairSet
from diffrep.eval.pck import Pck
from diffrep.eval.pose import predict_posed
from diffrep.eval.protocols import Protocol
from diffrep.eval.report import Problem
from diffrep.features import FeatureMaps
from diffrep.files import claim_folder, read_document, sweep_partials, write_whole
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
    keep: Kept = "float32",
    batch_size: int = 8,
    pairs_per_file: int = 50,
    progress: bool = True,
) -> CorrespondenceReport:
    """Evaluate a recipe on a benchmark; the same folder again goes on from what is in it.

    Args:
        folder: holds ``features/`` (one file per image) and ``matches/`` (one file per `pairs_per_file`
            pairs).
        search: ``protocol`` matches as the paper's script does, ``recipe`` as the recipe does; ``auto`` takes
            the protocol's way where the recipe's descriptors lie on the cells that it needs.
        pose: also extract the sources' mirror images and match from those where they are nearer (GeoAware's
            adaptive pose alignment, without masks).
        tables: category -> which of its keypoints are alike, instead of the published tables.
        keep: the type in which features are kept.
        batch_size: images that are extracted together; all that is lost when a run is killed.

    Raises:
        ValueError: the folder is from other settings, the protocol's search does not fit the recipe, or pose
            alignment is asked for without it.
    """
    recipe = correspondence.recipe
    features = ImageFeatures(
        pairs.root,
        lambda image: _load(pairs.root, image),
        correspondence,
        Path(folder) / "features",
        pairs.name,
        kept_as=keep,
        batch_size=batch_size,
    )
    images = list(images_of(pairs))
    if pose:
        images += [(category, MIRRORED + image) for category, image in images]
    unreadable = features.extract(images, progress=progress)
    usable = tuple(p for p in pairs.pairs if not {p.source.path, p.target.path} & unreadable.keys())
    problems = [Problem(image, what) for image, what in unreadable.items() if not image.startswith(MIRRORED)]
    used = choose_search(usable, protocol, features, search)
    if pose and used != "protocol":
        raise ValueError(f"pose alignment goes with a protocol's search; {recipe.name} matches by itself here")
    matches = tuple(
        match_pairs(
            usable,
            protocol,
            features,
            Path(folder) / "matches" / f"{protocol.name} by {used}{' posed' if pose else ''}",
            by_protocol=used == "protocol",
            pose=pose,
            tables=tables,
            pairs_per_file=pairs_per_file,
            progress=progress,
        )
    )
    parts = None
    if protocol.by_part:
        groups = {c: table_of(protocol.benchmark, c, tables).groups for c in {m.pair.category for m in matches}}
        shared = (protocol.count_shared(m.pair, m.predicted, groups[m.pair.category]) for m in matches)
        parts = Pck(protocol.alphas, tuple(shared))
    return CorrespondenceReport(
        dataset=pairs.name,
        root=pairs.root,
        split=pairs.split,
        protocol=protocol,
        recipe=recipe.name,
        search=used,
        pck=Pck(protocol.alphas, tuple(protocol.count(m.pair, m.predicted) for m in matches)),
        by_part=parts,
        problems=(*pairs.problems, *problems),
        settings={**features.settings, "recipe": asdict(recipe), "kept_as": keep},
        matches=matches,
    )


def _load(root: Path, image: str) -> Image.Image:
    picture = load_image(root / image.removeprefix(MIRRORED))
    return ImageOps.mirror(picture) if image.startswith(MIRRORED) else picture


def choose_search(
    pairs: Sequence[AnnotatedPair], protocol: Protocol, features: ImageFeatures, search: Search
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
    recipe = features.correspondence.recipe
    (descriptors,) = fuse([features.get(pairs[0].category, pairs[0].source.path)], recipe.fusion)
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
    features: ImageFeatures,
    folder: Path,
    *,
    by_protocol: bool,
    pose: bool = False,
    tables: Mapping[str, KeypointTable] | None = None,
    pairs_per_file: int = 50,
    progress: bool = True,
) -> Iterator[PairMatches]:
    """Match every pair, or read its matches where they are kept and images and keypoints are still the same.

    Raises:
        ValueError: the folder holds matches of other pairs or settings.
    """
    recipe = features.correspondence.recipe
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
    sweep_partials(folder)
    load = lru_cache(maxsize=16)(features.get)  # an image is in many pairs, usually in neighbouring ones

    def match(pair: AnnotatedPair) -> list[list[float]]:
        source, target = (load(pair.category, image.path) for image in (pair.source, pair.target))
        mirrored = load(pair.category, MIRRORED + pair.source.path) if pose else None
        points = predict(
            pair, source, target, protocol, recipe,
            by_protocol=by_protocol, mirrored=mirrored, partners=partners.get(pair.category),
        )  # fmt: skip
        return points.tolist()

    with tqdm(total=len(pairs), desc="match", unit="pair", disable=not progress) as bar:
        for start in range(0, len(pairs), pairs_per_file):
            chunk = pairs[start : start + pairs_per_file]
            file = folder / f"{start // pairs_per_file:05d}.json"
            images = [(i, features.content(i.path)) for pair in chunk for i in (pair.source, pair.target)]
            content = fingerprint([(asdict(image), content) for image, content in images])
            if _content_of(file) != content:
                points = [match(pair) for pair in chunk]
                write_whole(file, json.dumps({"content": content, "points": points}))
            # read back also what was just written: a run in two halves sees the same numbers
            for pair, values in zip(chunk, read_document(file)["points"], strict=True):
                yield PairMatches(pair, torch.tensor(values, dtype=torch.float32).reshape(-1, 2))
            bar.update(len(chunk))


def _content_of(file: Path) -> object:
    """The fingerprint of the images and keypoints that a file of matches was made from; None where it is none."""
    try:
        return read_document(file).get("content")
    except ValueError:
        return None


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
