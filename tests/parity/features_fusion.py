"""Checker of cases of kind `copca_fusion`: joint PCA of a pair, weights, fusion, similarity."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones import Grid
from diffrep.features import Descriptors, FeatureMaps
from diffrep.fusion import Fusion, Part, fuse
from diffrep.images import Placement
from diffrep.similarity import OFFICIAL_METRICS, nearest, similarities

from .cases import assert_near, assert_within, tensors_of


@dataclass(frozen=True)
class Tolerance:
    """The numbers in the case's sentences, in their order."""

    exact_distance: float  # of the exact PCA, times the maximum
    same_draw: float  # of the randomised PCA from the same seed, times the maximum
    low_rank_distance: float
    low_rank_cosine: float
    agreement: float  # share of equal nearest neighbours

    @classmethod
    def read(cls, texts: dict[str, str]) -> Tolerance:
        exact, draw = (float(n) for n in re.findall(r"\d[\d.]*e-\d+", texts["flat"]))
        distance, cosine = (float(n) for n in re.findall(r"\d[\d.]*e-\d+", texts["low_rank"]))
        (percent,) = re.findall(r"([\d.]+)%", texts["low_rank"])
        return cls(exact, draw, distance, cosine, float(percent) / 100)


def check(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    params, tolerance = case["params"], Tolerance.read(case["tolerance"])
    pair = [_features(given, f"img{number}", params["grid"]) for number in (1, 2)]
    dims = tuple(params["pca_dims_s5_s4_s3"])
    diffusion = Part(taps=("s5", "s4", "s3"), dims=dims, normalise=False)

    plain = Fusion(parts=(diffusion,), pca="lowrank", seed=params["torch_seed_before_co_pca"])
    for name, descriptors in zip(("sd1", "sd2"), fuse(pair, plain), strict=True):
        assert_near(_flat(descriptors), expected[name], relative=tolerance.same_draw, what=name)
    exact = [d.rows().joined() for d in fuse(pair, replace(plain, pca="exact"))]
    assert_near(
        torch.cdist(*exact),
        expected["exact_sd_dist"],
        relative=tolerance.exact_distance,
        what="exact distances",
    )

    # the released code weights chunks of dims[0], dims[1], dims[2] channels, which start at s3
    *layers, first, second = params["weights"]
    normalise = params["dist"] in ("l1", "l2")
    weighted = replace(
        diffusion,
        chunk_weights=tuple(zip(dims, layers, strict=True)),
        normalise=normalise,
        weight=first,
    )
    fusion = replace(plain, parts=(weighted, Part(taps=("dino",), normalise=normalise, weight=second)))
    one, two = fuse(pair, fusion)
    for name, descriptors in (("fused1", one), ("fused2", two)):
        assert_near(_flat(descriptors), expected[name], relative=tolerance.same_draw, what=name)
    strict = replace(tolerance, low_rank_distance=tolerance.same_draw, low_rank_cosine=tolerance.same_draw)
    _check_similarities(one, two, params["dist"], expected, strict)

    # where enough dimensions are kept the official random result is the exact one, and our default has to agree
    official = torch.cdist(expected["sd1"][0, 0], expected["sd2"][0, 0])
    off = (official - expected["exact_sd_dist"]).abs().max() / expected["exact_sd_dist"].max()
    if off <= tolerance.exact_distance:
        one, two = fuse(pair, replace(fusion, pca="exact"))
        _check_similarities(one, two, params["dist"], expected, tolerance)


def _check_similarities(
    one: Descriptors, two: Descriptors, dist: str, expected: dict[str, Tensor], tolerance: Tolerance
) -> None:
    cosines = similarities(one.rows(), two.rows())
    assert_within(cosines, expected["cosine"], atol=tolerance.low_rank_cosine, what="cosine")
    metric = OFFICIAL_METRICS[dist]
    scores = similarities(one.rows(), two.rows(), metric)
    got = -(-scores).clamp(min=0).sqrt() if metric == "euclidean" else scores
    assert_near(got, expected["similarity"], relative=tolerance.low_rank_distance, what=f"similarity ({dist})")
    indices = nearest(one.rows(), two.rows(), metric).indices
    agreement = float((indices == expected["nn_1_to_2"]).float().mean())
    assert agreement >= tolerance.agreement, f"nearest neighbours agree on {agreement:.4f}"


def _flat(descriptors: Descriptors) -> Tensor:
    """(1, 1, h * w, C), the layout of the released code."""
    return descriptors.rows().joined()[None, None]


def _features(given: dict[str, Tensor], image: str, side: int) -> FeatureMaps:
    maps = {tap: given[f"{image}.{tap}"] for tap in ("s3", "s4", "s5")}
    maps["dino"] = given[f"{image}.dino"][0].mT.unflatten(2, (side, side))
    canvas = (side * 16, side * 16)
    grids = {tap: Grid.covering(canvas, (m.shape[2], m.shape[3])) for tap, m in maps.items()}
    return FeatureMaps(maps, (Placement.identity(canvas),), grids)
