"""The embedded benchmark: what is counted, and that every image is extracted once."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrep.eval.matchers import (
    ColourPatches,
    FeatureMatcher,
    View,
    baselines,
    same_place_in_box,
    same_position,
)
from diffrep.eval.scenes import ScenesReport, ScenesSettings, evaluate_scenes, render_pair
from diffrep.features import FeatureMaps
from diffrep.fusion import Fusion
from diffrep.matching import MatchConfig
from diffrep.scenes import scene_pairs

SETTINGS = ScenesSettings(per_category=3, categories=("car", "dog", "giraffe"), size=64, batch_size=2, workers=0)


def truths(settings: ScenesSettings) -> dict[bytes, Tensor]:
    """Source image -> where its keypoints lie in the target."""
    pairs = scene_pairs(settings.split, settings.per_category, categories=settings.categories, seed=settings.seed)
    rendered = [render_pair((*pair, settings.size)) for pair in pairs]
    return {pair.views[0].image.tobytes(): pair.points[1] for pair in rendered}


def evaluate(settings: ScenesSettings = SETTINGS) -> ScenesReport:
    known = truths(settings)
    return evaluate_scenes(
        {
            "perfect": lambda source, target, points: known[source.image.tobytes()],
            "off": lambda source, target, points: known[source.image.tobytes()] + 1000,
            "same position": same_position,
        },
        {},
        settings,
        progress=False,
    )


def test_a_perfect_matcher_is_perfect_and_chance_lies_between() -> None:
    report = evaluate()
    assert list(report.rows) == ["chance", "perfect", "off", "same position"]
    assert set(report.groups()) == {"seen", "seen, as drawn", "seen, mirrored", "unseen", "unseen, mirrored"}
    for group in report.groups():
        assert report.pck("perfect", group).value() == (1.0, 1.0)
        assert report.pck("off", group).value() == (0.0, 0.0)
        small, large = report.pck("chance", group).value()
        assert 0 < small < large < 0.1
    assert len(report.rows["perfect"].pairs) == 9
    assert len(report.mirrored) == 3  # every third pair
    assert report.difference("perfect", "off")[0] == {"alpha": 0.05, "value": 1.0, "low": 1.0, "high": 1.0}


def test_numbers_do_not_depend_on_batches() -> None:
    whole = ScenesSettings(**{**vars(SETTINGS), "batch_size": 100})
    assert evaluate().rows == evaluate(whole).rows


@pytest.mark.slow
def test_numbers_do_not_depend_on_worker_processes() -> None:
    apart = ScenesSettings(**{**vars(SETTINGS), "workers": 1})
    assert evaluate().rows == evaluate(apart).rows


def test_every_image_is_extracted_once_and_reaches_its_matcher() -> None:
    seen: list[bytes] = []

    def extract(images: Sequence[np.ndarray]) -> list[FeatureMaps]:
        seen.extend(image.tobytes() for image in images)
        return ColourPatches()(images)

    def match(source: View, target: View, points: Tensor) -> Tensor:
        for view in (source, target):
            centre = view.features["colours"].maps["patch"][0, :, 3, 3].view(3, 17, 17)[:, 8, 8]
            pixel = torch.from_numpy(view.image[3 * 4 + 2, 3 * 4 + 2]).float() / 127.5 - 1
            torch.testing.assert_close(centre, pixel)
        return points

    report = evaluate_scenes({"identity": match}, {"colours": extract}, SETTINGS, progress=False)
    assert len(seen) == len(set(seen)) == 2 * len(report.rows["identity"].pairs)
    assert report.extractors == {"colours": {"patch": 17}}
    assert report.rows["identity"] == evaluate().rows["same position"]


def test_the_report_says_everything_as_text_and_as_json() -> None:
    report = evaluate()
    text = report.table()
    for word in ("chance", "PCK@0.05", "PCK@0.1", "seen, mirrored", "giraffe*", "100.0 (100.0..100.0)"):
        assert word in text
    document = json.loads(report.to_json())
    assert document["unseen"] == ["giraffe"]
    assert document["settings"]["per_category"] == 3
    perfect = document["rows"]["perfect"]["groups"]["seen"]
    assert perfect["pairs"] == 6
    assert perfect["pck"][1] == {"alpha": 0.1, "per_point": 1, "per_image": 1, "low": 1, "high": 1}


def test_gains_of_a_fused_matcher_over_its_parts_are_printed() -> None:
    known = truths(SETTINGS)
    matchers = {
        "a": same_position,
        "b": lambda source, target, points: points + 1000,
        "a + b": lambda source, target, points: known[source.image.tobytes()],
    }
    report = evaluate_scenes(matchers, {}, SETTINGS, progress=False)
    text = report.table()
    assert "a + b over b: +100.0 (+100.0..+100.0) points of PCK@0.1" in text
    assert text.count("a + b over a: ") == len(report.groups())


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="no category zebra; there are"):
        ScenesSettings(categories=("zebra",))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ScenesSettings(per_category=0)
    with pytest.raises(ValueError, match="'chance' is taken"):
        evaluate_scenes({"chance": same_position}, {}, SETTINGS)


def test_baselines_by_hand() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    source, target = View(image, (10, 10, 30, 20)), View(image[:20, :40], (0, 0, 40, 20))
    points = torch.tensor([[19.5, 9.5], [10.0, 20.0]])
    assert same_position(source, target, points).tolist() == [[9.5, 4.5], [4.75, 9.75]]
    assert same_place_in_box(source, target, points)[1].tolist() == [0.0, 20.0]


def test_colour_patches_find_a_shifted_image() -> None:
    scene = render_pair((*scene_pairs("test", 1, categories=["car"])[0], 96)).views[0].image
    source, target = scene[:80, :80], scene[8:88, 12:92]  # what is at (x, y) moves to (x - 12, y - 8)
    matchers, extractors = baselines(box=False)
    (a, b) = extractors["colours"]([source, target])
    views = [View(image, (0, 0, 79, 79), {"colours": maps}) for image, maps in ((source, a), (target, b))]
    points = torch.tensor([[30.0, 40.0], [50.0, 30.0], [44.0, 52.0]])
    found = matchers["colour patches"](views[0], views[1], points)
    assert (found - (points - torch.tensor([12.0, 8.0]))).abs().max() <= 1
    matcher = FeatureMatcher(("colours",), Fusion.of("patch"), MatchConfig())
    assert matcher.stride(views[0]) == 4
    with pytest.raises(ValueError, match="side must be odd"):
        ColourPatches(side=4)
