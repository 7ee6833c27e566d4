"""The scripts of examples/ run as their first line says, and what stands beside them for people is whole."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from diffrep.scenes import render_scene, scene_seed

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "photos").mkdir()
    for number, name in enumerate(("cat.jpg", "dog.jpg", "photos/0.jpg", "photos/1.jpg", "photo.jpg")):
        image = render_scene(scene_seed("test", number), category="dog", size=256).image
        Image.fromarray(image).save(folder / name)
    return folder


def form(file: str) -> tuple[str, int]:
    """(mode, width) of a picture."""
    with Image.open(file) as image:
        return image.mode, image.width


LEAVES: dict[str, Callable[[], bool]] = {  # example -> what it leaves behind is right
    "match_points": lambda: form("matches.png")[1] > 256,
    "metric_depth": lambda: np.load("metric.npy").shape == (256, 256),
    "cut_out_folder": lambda: [form(f"cutouts/{name}.png") for name in "01"] == [("RGBA", 256)] * 2,
    "search_parts": lambda: Path("photos.search").is_dir(),
    "own_recipe": lambda: True,
    "label_free": lambda: Path("scenes/vit/log.jsonl").is_file(),
}


@pytest.mark.slow
@pytest.mark.parametrize("example", [*EXAMPLES, ROOT / "docs/label_free.py"], ids=lambda file: file.stem)
def test_an_example_runs_as_its_first_line_says(
    example: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    command = re.search(r"`python ((?:examples|docs)/.+?)`", example.read_text(encoding="utf-8"))
    assert command
    words = shlex.split(command[1])
    assert ROOT / words[0] == example
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert LEAVES[example.stem]()


def test_there_are_five_short_examples() -> None:
    assert [file.stem for file in EXAMPLES] == sorted(LEAVES.keys() - {"label_free"})
    assert all(len(file.read_text().splitlines()) <= 30 for file in EXAMPLES)


def test_forms_of_issues_ask_for_the_system() -> None:
    forms = [file for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"]
    assert len(forms) == 3
    for file in forms:
        form = yaml.safe_load(file.read_text())
        assert {"name", "description", "body"} <= set(form)
        assert "diffrep info --system" in file.read_text()


def test_the_citation_names_the_version_and_every_paper_of_the_code() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    cited = {entry["value"] for paper in citation["references"] for entry in paper["identifiers"]}
    recipes = set(re.findall(r"arXiv:[\d.]+\d", (ROOT / "diffrep/recipes.toml").read_text()))
    assert recipes <= cited
    written = {(a.get("family-names"), paper["year"]) for paper in citation["references"] for a in paper["authors"]}
    dated = re.compile(r"\b([A-Z][a-z]+) (?:et al\.|(?:and|&) [A-Z][a-z]+),? \(?(?:[A-Z]+ )?(\d{4})")
    named, people = set(), set()  # by the parts that are papers' methods
    for place in ("diffrep/guidance", "diffrep/sampling", "diffrep/training", "heads/restoration", "eval/search.py"):
        for file in (ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place]:
            words = file.read_text(encoding="utf-8").replace("\n", " ")
            named |= {f"arXiv:{number}" for number in re.findall(r"\b\d{4}\.\d{5}\b", words)}
            people |= set(dated.findall(words))
    assert len(named) > 20
    assert named <= cited
    assert len(people) > 8
    for name, year in people:  # a paper is printed up to two years after it is in the archive
        assert any((name, int(year) - later) in written for later in range(3)), f"{name} {year} is not cited"
    for method in (
        "EVODiff",
        "Levenberg-Marquardt",
        "MRS",
        "A-SDM",
        "Hyperparameters are all you need",
        "Boundary Conditions",
    ):
        assert any(method in paper["title"] for paper in citation["references"]), method
    for paper in citation["references"]:
        assert paper["notes"]
        assert paper["authors"]
        assert not any("authors of" in author.get("name", "") for author in paper["authors"])


def test_the_changelog_has_the_version() -> None:
    version = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert version in headings


def test_hosted_workflows_run_what_is_there() -> None:
    workflows = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / ".github/workflows").glob("*.yml")}
    matrix = workflows["tests"]["jobs"]["versions"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert workflows["release"]["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for workflow in workflows.values():
        for job in workflow["jobs"].values():
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            assert set(re.findall(r"^make (\w+)", commands, re.M)) <= targets


FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}  # of GitHub's forms


def test_forms_have_the_fields_that_github_reads() -> None:
    for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text())
        if file.stem == "config":
            assert set(form) <= {"blank_issues_enabled", "contact_links"}
            continue
        assert set(form) <= {"name", "description", "title", "labels", "assignees", "body"}
        ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(ids) == len(set(ids))
        for field in form["body"]:
            assert field["type"] in FIELDS
            assert set(field) <= {"type", "id", "attributes", "validations"}
            assert field["attributes"]["label"]
            assert set(field.get("validations", {})) <= {"required"}


def test_workflows_have_the_keys_that_github_reads() -> None:
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        workflow = yaml.safe_load(file.read_text())
        assert {"name", True, "jobs"} <= set(workflow)  # YAML 1.1 reads the key `on` as true
        for job in workflow["jobs"].values():
            assert set(job) <= {"runs-on", "needs", "environment", "permissions", "strategy", "steps"}
            assert set([job["needs"]] if "needs" in job else []) <= set(workflow["jobs"])
            for step in job["steps"]:
                assert ("run" in step) != ("uses" in step)
                assert set(step) <= {"name", "run", "uses", "with"}
                assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"])
