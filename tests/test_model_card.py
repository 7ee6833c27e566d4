"""The model card's figures are those that `diffrep eval` measured of the weights in the package."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrep.cli import command_kind
from diffrep.commands import demo
from diffrep.commands.evaluate import compare, head_fingerprint, head_method
from diffrep.commands.parsing import read_command
from diffrep.eval.scene_maps import SceneMapSettings, evaluate_scene_maps
from diffrep.eval.scenes import ScenesSettings, evaluate_scenes
from diffrep.heads.dense import PredictConfig
from diffrep.heads.loading import load_head
from diffrep.recipes import Correspondence
from diffrep.synthesis import SynthesisSettings, load_synthesis

DOCS = Path(__file__).parents[1] / "docs"
MODELS = Path(__file__).parents[1] / "diffrep" / "models"
HEADS = {"tiny-depth": 600, "tiny-normals": 280}  # scenes that the card's figures are of
FIRST = 28  # scenes that are measured again


def report(name: str) -> dict[str, Any]:
    """What ``diffrep eval depth|normals -o docs/figures/NAME.json`` wrote."""
    return dict(json.loads((DOCS / "figures" / f"{name}.json").read_text()))


def row_of(name: str, method: str) -> list[str]:
    """The cells behind the first of a method's row in a head's table of the card."""
    lines = (DOCS / "model-card.md").read_text().splitlines()
    head = next(at for at, line in enumerate(lines) if line.startswith(f"| `{name}` ("))
    starts = {
        "head": f"| `{name}`", "unseen": "| on categories that training never saw", "no look": "| no look",
        "truth through the VAE": "| the true map through the VAE",
    }  # fmt: skip
    row = next(line for line in lines[head + 1 :] if line.startswith(starts[method]))
    return [cell.strip().replace("**", "") for cell in row.strip("|").split("|")[1:]]


@pytest.mark.parametrize("name", HEADS)
def test_the_figures_are_of_the_weights_in_the_package(name: str) -> None:
    for measured in (report(name), report(f"{name}-{FIRST}")):
        assert measured["weights"][name][1] == pytest.approx(head_fingerprint(load_head(name)), rel=1e-6)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", ["head", "unseen", "no look", "truth through the VAE"])
def test_the_card_says_what_was_measured(name: str, method: str) -> None:
    """Every cell of the rows that are of the scenes of the file, and how many scenes there are."""
    measured, group = report(name), "unseen" if method == "unseen" else "all"
    whole = name if method in ("head", "unseen") else method
    mean = measured["mean of images"][whole][group]
    assert measured["mean of images"][name]["all"]["images"] == measured["settings"]["count"] == HEADS[name]
    assert measured["settings"]["split"] == "test"
    if name == "tiny-normals":
        pooled = measured["all pixels together"][whole][group]
        value = [f"{mean['mean'][key]:.1f}" for key in ("value", "low", "high")]
        cells = [f"{pooled['mean']:.1f}", f"{pooled['under 11.25']:.0f} %", f"{mean['thin']['value']:.1f}"]
    else:
        value = [f"{100 * mean['abs_rel'][key]:.1f}" for key in ("value", "low", "high")]
        cells = [
            f"{100 * mean['delta1']['value']:.1f} %", f"{mean['halo']['value']:.1f}",
            f"{mean['wide halos']['value']:.0f} %", f"{mean['thin seen']['value']:.0f} %",
        ]  # fmt: skip
        value[0] += " %"
    assert row_of(name, method) == [f"{value[0]} ({value[1]}..{value[2]})", *cells]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_says_what_was_measured_of_it(name: str) -> None:
    """The numbers in its ``head.json`` are those of the file."""
    stated = json.loads((MODELS / name / "head.json").read_text())["measured"]
    mean = report(name)["mean of images"][name]["all"]
    assert stated.pop("by") == f"diffrep eval {name.removeprefix('tiny-')} --count {HEADS[name]}"
    steps = stated.pop("step")
    assert f"{steps} steps" in " ".join((DOCS / "model-card.md").read_text().split())
    assert stated == {metric: pytest.approx(mean[metric]["value"]) for metric in stated}
    assert len(stated) >= 3


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


def test_the_demo_page_says_what_the_card_says() -> None:
    """With and without labels, in the first paragraph; and the weights weigh what the card says, under 70 MB."""
    card, text = (DOCS / "model-card.md").read_text(), demo.WORDS["page"]["text"]
    with_labels = re.search(r"^\| both fused \| \*\*([\d.]+)\*\*", card, re.M)
    without = re.search(r"^\| the U-Net's four taps at two timesteps beside that one \| \*\*([\d.]+)\*\*", card, re.M)
    assert with_labels is not None
    assert without is not None
    assert f"about {float(with_labels[1]):.0f} %" in text
    assert f"without any label {float(without[1]):.0f} %" in text
    megabytes = sum(file.stat().st_size for file in MODELS.rglob("*.safetensors")) / 1e6
    assert megabytes <= 70
    assert f"about {megabytes:.0f} MB together" in card


MATCHERS = {"tiny": "| `tiny`: diffusion |", "tiny-dino": "| `tiny-dino` |", "tiny + tiny-dino": "| both fused |"}


@pytest.mark.parametrize("matcher", MATCHERS)
def test_the_matches_of_the_card_are_likely_on_two_pairs_of_each_category(matcher: str) -> None:
    """The card's figures of 700 pairs lie within the intervals of the 28 that are measured again below."""
    groups = report(f"tiny-scenes-{FIRST}")["rows"][matcher]
    part = (DOCS / "model-card.md").read_text().split("### Matching")[1]
    row = next(line for line in part.splitlines() if line.startswith(MATCHERS[matcher]) and line.count("(") == 2)
    cells = [float(cell.strip().strip("*").split("*")[0].split(" ")[0]) for cell in row.split("|")[2:5:2]]
    for value, group in zip(cells, ("seen", "unseen"), strict=True):
        measured = groups[group]["pck"][1]
        assert measured["alpha"] == 0.1
        assert 100 * measured["low"] <= value <= 100 * measured["high"]


# -- the commands that make the weights again ---------------------------------------------------------------


def training_commands() -> list[list[str]]:
    """The words of each `diffrep train` command of the card's list."""
    block = re.search(r"^```sh\n(.*?)^```$", (DOCS / "model-card.md").read_text(), re.M | re.S)
    assert block is not None
    return [shlex.split(line)[1:] for line in block[1].splitlines()]


class Started(Exception):
    """A training has come to its scenes."""


@pytest.mark.parametrize("words", training_commands(), ids=" ".join)
def test_a_command_of_the_card_starts(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything before the first scene is rendered: options are read and checked, the base is loaded and fits."""

    def start(*args: object, **kwargs: object) -> None:
        raise Started

    for module in ("train_heads.render_set", "train.open_or_render", "train.train_tiny"):
        monkeypatch.setattr(f"diffrep.commands.{module}", start)
    monkeypatch.chdir(tmp_path)
    replaced = [{"cuda": "cpu"}.get(word, word) for word in words]  # it also starts where there is no GPU
    for at, word in enumerate(words):
        if word.startswith("runs/") and words[at - 1] in ("--start", "--base"):  # what an earlier command wrote
            replaced[at] = f"tiny-{words[1]}"
    command = read_command(command_kind(" ".join(words[:2])), replaced[2:], "diffrep")
    with pytest.raises(Started):
        command.run()


def means(stated: Any, weights: Any) -> bool:
    """Whether settings are those of weights, which may name options that are gone since, if they were off."""
    if isinstance(stated, dict) and isinstance(weights, dict):
        return all(means(stated[key], value) if key in stated else not value for key, value in weights.items())
    return bool(stated == weights)


@pytest.mark.parametrize("model", ["tiny-depth", "tiny-normals", "tiny-restore", "tiny-synthesis"])
def test_the_last_command_of_a_model_has_the_settings_of_its_weights(model: str) -> None:
    words = [words for words in training_commands() if words[1] == model.removeprefix("tiny-")][-1]
    command: Any = read_command(command_kind(" ".join(words[:2])), words[2:], "diffrep")
    ours = command.training
    if callable(ours):  # of options that are not the settings themselves
        ours = ours({"tiny-depth": "disparity", "tiny-normals": "normals"}[model])
    if model == "tiny-synthesis":
        weights = json.loads((MODELS / model / "model-card.json").read_text())["settings"]
    else:
        weights = json.loads((MODELS / model / "head.json").read_text())["training"]
    stated = json.loads(json.dumps(asdict(ours)))
    minutes = stated["fit"].pop("minutes"), weights["fit"].pop("minutes")
    assert minutes[0] == pytest.approx(minutes[1], abs=0.05)
    stated["fit"] = {key: stated["fit"][key] for key in weights["fit"]}  # options that are newer are left out
    different = {key for key in weights if not means(stated[key], weights[key])}
    assert different <= {"start", "base"}  # folders of the stage before
    if model != "tiny-synthesis":
        assert stated["decoder" if "decoder" in stated else "detail"]


# -- measured again -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_measuring_again_gives_the_same(name: str) -> None:
    head, settings = load_head(name, device="cpu"), SceneMapSettings(count=FIRST, workers=0)
    now = evaluate_scene_maps({name: head_method(head, PredictConfig())}, head.task, settings, progress=False)
    metric = "mean" if name == "tiny-normals" else "abs_rel"
    stored = report(f"{name}-{FIRST}")["mean of images"][name]["all"][metric]["value"]
    assert now.mean(name, metric)[0] == pytest.approx(stored, rel=0.01)


@pytest.mark.slow
def test_matching_again_gives_the_same() -> None:
    whole = Correspondence("tiny", device="cpu", dtype=torch.float32)
    now: Any = compare(evaluate_scenes, whole, ScenesSettings(per_category=2, workers=0), box=True)
    for matcher, groups in report(f"tiny-scenes-{FIRST}")["rows"].items():
        for group, counts in groups.items():
            measured = now.pck(matcher, group)
            assert measured.points == counts["points"]
            # a hit or two may tip over on another machine
            assert measured.value()[1] == pytest.approx(counts["pck"][1]["per_point"], abs=2.5 / counts["points"])
