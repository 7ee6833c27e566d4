"""Every fenced command of the README and of the docs works, in order, as pasted.

Images of the names in it are drawn first. Only three things are changed, all of them here: names of models that would
be fetched become embedded ones, sizes that take minutes become small, and the two commands that make an environment
are left to .ci/run, which runs them. Code of other libraries, in blocks with their name as a title, has to be Python.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffrep.cli import main
from diffrep.images import load_image, write_video
from diffrep.scenes import CATEGORIES, render_scene, scene_seed
from tests.benchmark_folders import write_spair

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EMBEDDED = {  # what needs a download -> what takes its place
    "--backbone sd2.1": "--backbone tiny",
    'load_backbone("sd2.1")': 'load_backbone("tiny")',
    'load_backbone("dinov2-base")': 'load_backbone("tiny-dino")',
    "--recipe sd-dino": "--recipe tiny",
    "--recipe sd2.1-dinov2": "--recipe tiny",
    'Correspondence("sd-dino")': 'Correspondence("tiny")',
    "--recipe dift --backbone diffusion=models/sd/": "--recipe tiny --backbone diffusion=tiny",
    "--model jingheya/lotus-depth-d-v1-1": "--model tiny-depth",
    "--model jingheya/lotus-normal-d-v1-1": "--model tiny-normals",
    "--model qianyu1217/diffdis --base sd-turbo": "--model tiny-segmentation",
    'load_head("prs-eth/marigold-depth-v1-1")': 'load_head("tiny-depth")',
    "ensemble=5, seed=0": "seed=0",  # of the line above: the embedded head starts from no noise
}
SMALL = {
    "--size 4096x4096": "--size 256x256",
    "probe sweep images/": "probe sweep images/ --timesteps 100 --pool 1",
    "probe dense depth photos/ depths/": "probe dense depth photos/ depths/ --size 64 --fit.epochs 1",
    "probe feedback images/": "probe feedback images/ --size 64 --fit.recipe.epochs 1",
    "probe pixels photos/ labels/": "probe pixels photos/ labels/ --size 64",
    "--minutes 30 --work runs/depth": "--scenes 8 --steps 2 --batch-size 2 --validation-scenes 2 --work runs/depth",
    "train tiny --smoke --work runs/smoke": "info tiny",  # a minute of two processes; tests/test_training.py runs it
    "diffrep train tiny\n": "diffrep info tiny\n",
    "--calls 4 6": "--calls 4",
    "search-schedule --steps 3": "search-schedule --steps 3 --reference 6 --population 2 --epochs 1 --count 1",
    "restore photos/ -o restored --keep-size": "restore photos/ -o restored --keep-size --scale 2",
    "--compose and --steps 60": "--compose and --steps 3",
    "--insert-at 32,32": "--insert-at 32,32 --steps 10",
    "--points 25 100": "--points 25 --count 2 --workers 0 --guidance.rounds 2",
    "--fit guided": "--fit guided --guidance.rounds 2",
    "--engine ray --actors 2": "",  # tests/test_store.py compares both engines
    "export tiny --taps up.1": "export tiny --taps up.1 --size 64",
    "early-exit --work": "early-exit --count 8 --held-out 2 --width 16 --heads 2 --blocks 3 --steps 2 --work",
    "likelihood photos/": "likelihood photos/0.jpg --tolerance 0.1",
}
VIDEO = "clip.mp4"  # needs PyAV, an extra


def blocks(page: Path = README) -> list[tuple[str, str, str]]:
    """(language, title, text) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r'^```(\w*)(?: title="(.+?)")?\n(.*?)^```$', text, re.M | re.S)


def lines(page: Path = README) -> list[str]:
    """The command lines, without their comments."""
    commands = [text for language, _, text in blocks(page) if not language]
    return [re.sub(r"\s{2,}#.*", "", line) for text in commands for line in text.splitlines()]


def replaced(text: str) -> str:
    for old, new in (EMBEDDED | SMALL).items():
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("inputs")
    for number, name in enumerate(("cat", "dog", "a", "b", "photo", "img")):
        scene = render_scene(scene_seed("test", number), category="dog", size=256)
        Image.fromarray(scene.image).save(folder / (f"{name}.png" if name == "img" else f"{name}.jpg"))
        if name == "photo":
            near = np.nan_to_num(scene.depth, posinf=0).astype(np.float32)
            near[96:140, 60:150] = 0
            np.save(folder / "holes.npy", near)  # what a depth camera misses is 0
        if name in ("cat", "dog"):
            Image.fromarray(scene.mask).save(folder / f"{name}-mask.png")
    for name in ("photos", "depths", "labels"):
        (folder / name).mkdir()
    for number in range(6):
        scene = render_scene(scene_seed("test", 10 + number), category="car", size=128)
        Image.fromarray(scene.image).save(folder / f"photos/{number}.jpg")
        Image.fromarray(scene.mask.astype(np.uint8)).save(folder / f"labels/{number}.png")
        np.save(folder / f"depths/{number}.npy", np.nan_to_num(scene.depth, posinf=0).astype(np.float32))
    for kind, category in enumerate(CATEGORIES[:2]):
        (folder / "images" / category).mkdir(parents=True)
        for number in range(8):
            scene = render_scene(scene_seed("test", 100 * kind + number), category=category, size=64)
            Image.fromarray(scene.image).save(folder / f"images/{category}/{number}.png")
    table = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    np.save(folder / "features.npy", table)
    (folder / "pairs.csv").write_text('source,target,points\ncat.jpg,dog.jpg,"120,130"\n')
    (folder / "known.csv").write_text("x,y,metres\n60,40,5.1\n220,120,5.8\n120,220,4.5\n128,240,4.2\n")
    write_spair(folder)
    if importlib.util.find_spec("av"):
        write_video(folder / VIDEO, [load_image(folder / "a.jpg").resize((64, 64))] * 3, 10)
    if importlib.util.find_spec("anndata"):
        import anndata
        import pandas

        kinds = pandas.DataFrame({"kind": ["a", "b"] * 60}, index=[f"cell{i}" for i in range(120)])
        anndata.AnnData(table, obs=kinds, obsm={"X_pca": table[:, :4]}).write_h5ad(folder / "cells.h5ad")
    return folder


def test_all_replacements_are_of_lines_that_are_there() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [old for old in (EMBEDDED | SMALL) if old not in text] == []
    assert any(VIDEO in line for line in lines())


def test_the_two_commands_of_a_newcomer_stay_two() -> None:
    made = [line for line in lines() if "-m venv" in line]
    assert made == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/diffrep demo",
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test]"'
        " && .venv/bin/python -m pytest -n 2 --dist loadfile",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:anndata", "ignore::FutureWarning:anndata")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)
def test_every_line_works_in_order_as_pasted(
    page: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    shutil.copytree(inputs, work)
    monkeypatch.chdir(work)
    for language, title, text in blocks(page):
        if language == "python":
            code = compile(replaced(text), f"{page}: {title}", "exec")
            if title in ("", "diffrep"):
                exec(code, {})
            continue
        if language:
            continue
        for line in replaced(text).splitlines():
            words = shlex.split(re.sub(r"\s{2,}#.*", "", line))
            if words[:2] == ["python3", "-m"]:  # a new environment: .ci/run
                continue
            if words[:2] == ["python", "-m"]:  # benchmarks take minutes: tests/test_benchmarks.py
                assert words[2] == "diffrep.eval.benchmarks"
                continue
            if words[:2] == ["diffrep", "app"]:  # stays until Ctrl-C: tests/test_app.py
                continue
            if VIDEO in words and not Path(VIDEO).exists():
                continue
            assert words[0] == "diffrep"
            assert main(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
    if page == README:
        for output in ("match.png", "field.png", "swapped.png", "depth", "sweep/heatmap.png", "out.tiff", "map.png"):
            assert Path(output).exists(), output
