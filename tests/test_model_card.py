"""The model card's figures are those that `diffrep eval` measured of the weights in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffrep.commands.evaluate import head_fingerprint, head_method
from diffrep.eval.scene_maps import SceneMapSettings, evaluate_scene_maps
from diffrep.heads.dense import PredictConfig
from diffrep.heads.loading import load_head
from diffrep.synthesis import SynthesisSettings, load_synthesis

DOCS = Path(__file__).parents[1] / "docs"
HEADS = {"tiny-depth": 140, "tiny-normals": 280}  # scenes that the card's figures are of
FIRST = 28  # scenes that are measured again


def report(name: str) -> dict[str, Any]:
    """What ``diffrep eval depth|normals -o docs/figures/NAME.json`` wrote."""
    return dict(json.loads((DOCS / "figures" / f"{name}.json").read_text()))


def row_of(name: str) -> str:
    """The head's line in its table of the card."""
    lines = (DOCS / "model-card.md").read_text().splitlines()
    return next(line for line in lines if line.startswith((f"| `{name}` | **", f"| `{name}`, ")))


@pytest.mark.parametrize("name", HEADS)
def test_the_figures_are_of_the_weights_in_the_package(name: str) -> None:
    for measured in (report(name), report(f"{name}-{FIRST}")):
        assert measured["weights"][name][1] == pytest.approx(head_fingerprint(load_head(name)), rel=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_the_card_says_what_was_measured(name: str) -> None:
    measured = report(name)
    mean = measured["mean of images"][name]["all"]
    assert mean["images"] == HEADS[name]
    shown = {"halo": (1, ""), "wide halos": (0, " %"), "thin seen": (0, " %")}
    if name == "tiny-normals":
        shown = {"mean": (1, ""), "thin": (1, "")}
    else:
        value, low, high = (100 * mean["abs_rel"][key] for key in ("value", "low", "high"))
        assert f"**{value:.1f} %** ({low:.1f}..{high:.1f})" in row_of(name)
    for metric, (digits, unit) in shown.items():
        assert f"{mean[metric]['value']:.{digits}f}{unit}" in row_of(name), metric


def test_the_card_says_what_was_measured_of_painted_pictures() -> None:
    """`diffrep eval synthesis --images 8 --no-augment -o docs/figures/tiny-synthesis.json` writes the figures."""
    measured, card = report("tiny-synthesis"), (DOCS / "model-card.md").read_text()
    assert measured["checksum"] == load_synthesis().checksum()
    settings = SynthesisSettings()
    assert (measured["sampling"]["scheduler"], measured["sampling"]["steps"]) == (settings.scheduler, settings.steps)
    for name, start in (("unrelated", "| every cell from another scene"), ("whole", "| the cells of one scene")):
        row, pictures = next(line for line in card.splitlines() if line.startswith(start)), measured[name]
        seams = pictures["seams"]
        shown = (pictures["own"], seams["every 64 px: windows"], seams["every 128 px: cells"], pictures["control"])
        assert all(f"{value:.3f}" in row for value in shown), row
        assert f"{100 * pictures['right']:.1f} %" in row
    fid = measured["fid"]["tiny-dino@class"]
    text = " ".join(card.split())
    assert f"{100 * measured['right_patches']:.1f} % are nearest to their own embedding" in text
    assert (
        f"{fid['patches']:.1f} (other real scenes: {fid['real']:.1f}), of crops of the pictures {fid['crops']:.1f}"
        in text
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_measuring_again_gives_the_same(name: str) -> None:
    head, settings = load_head(name, device="cpu"), SceneMapSettings(count=FIRST, workers=0)
    now = evaluate_scene_maps({name: head_method(head, PredictConfig())}, head.task, settings, progress=False)
    metric = "mean" if name == "tiny-normals" else "abs_rel"
    stored = report(f"{name}-{FIRST}")["mean of images"][name]["all"][metric]["value"]
    assert now.mean(name, metric)[0] == pytest.approx(stored, rel=0.01)
