"""Checker of cases of kind `soft_argmax_window`: window soft-argmax and GeoAware's instance distances."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.features import Descriptors
from diffrep.matching import masked_distance, mutual_distance
from diffrep.similarity import similarities, soft_argmax

from .cases import assert_within, number_in, tensors_of


def check(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    params = case["params"]
    tolerance = {key: number_in(text.removeprefix("atol")) for key, text in case["tolerance"].items()}
    small, large = ({name: _square(given[f"{name}{suffix}"]) for name in ("desc1", "desc2")} for suffix in ("", "_60"))
    chosen = given["query_index_60"]
    maps = {
        f"flow_n{params['grid']}": _similarity_maps(small),
        f"weak_flow_n{params['grid']}": given["weak_corr"].unflatten(1, small["desc1"].size),
        "flow60": _similarity_maps(large)[chosen],
    }
    judged = set()
    for name in expected:
        if (found := re.fullmatch(r"(.*)_w(-?\d+)", name)) is None:
            continue
        source, window = found[1], int(found[2])
        flow = soft_argmax(maps[source], window=window, temperature=params["beta"], outside="zero")
        assert_within(flow.view_as(expected[name]), expected[name], atol=tolerance["flow"], what=name)
        judged.add(name)
    assert len(judged) == 2 * len(params["windows"]) + len(params["windows_60"])

    side = large["desc1"].size[0]
    cell = params["anno_size"] / side
    peaks = maps["flow60"].flatten(1).argmax(1)
    hard = torch.stack([peaks % side, peaks // side], dim=1) * cell + cell / 2
    window = _keypoint_window(expected, params["windows_60"], side, cell)
    places = soft_argmax(maps["flow60"], window=window, temperature=params["beta"], outside="zero")
    soft = places.clamp(0, side - 1) * cell + cell / 2
    for name, keypoints in (("kps_840_hard", hard), ("kps_840_soft", soft)):
        assert_within(keypoints, expected[name], atol=tolerance["kps"], what=name)

    one, two = large["desc1"], large["desc2"]
    distances = {
        "mutual_nn_distance": mutual_distance(one, two),
        "masked_distance": masked_distance(one, two, given["mask1"], given["mask2"]),
    }
    for name, distance in distances.items():
        assert_within(distance.view(1), expected[name], atol=tolerance["distance"], what=name)


def _square(vectors: Tensor) -> Descriptors:
    side = math.isqrt(len(vectors))
    return Descriptors.from_vectors(vectors.unflatten(0, (side, side)))


def _similarity_maps(pair: dict[str, Descriptors]) -> Tensor:
    """(N, h, w): of each source cell, its similarity to every target cell."""
    return similarities(pair["desc1"].rows(), pair["desc2"].rows()).unflatten(1, pair["desc2"].size)


def _keypoint_window(expected: dict[str, Tensor], windows: list[int], side: int, cell: float) -> int:
    """The case does not name its keypoints' window: it is the one whose stored flow they were made from."""

    def distance(window: int) -> float:
        keypoints = expected[f"flow60_w{window}"].clamp(0, side - 1) * cell + cell / 2
        return float((keypoints - expected["kps_840_soft"]).abs().max())

    return min(windows, key=distance)
