"""Every fenced line of the README works, in order, as pasted.

Images of the names in it are drawn first. Only three things are changed, all of them here: names of models that would
be fetched become embedded ones, sizes that take minutes become small, and the two commands that make an environment
are left to .ci/run, which runs them.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffrep.cli import main
from diffrep.images import load_image, write_video
from diffrep.scenes import CATEGORIES, render_scene, scene_seed
from tests.benchmark_folders import write_spair

README = Path(__file__).resolve().parents[1] / "README.md"
EMBEDDED = {  # what needs a download -> what takes its place
    "--backbone sd2.1": "--backbone tiny",
    'load_backbone("sd2.1")': 'load_backbone("tiny")',
    "--recipe sd-dino": "--recipe tiny",
    "--recipe dift --backbone diffusion=models/sd/": "--recipe tiny --backbone diffusion=tiny",
    "--model jingheya/lotus-depth-d-v1-1": "--model tiny-depth",
}
SMALL = {
    "--size 4096x4096": "--size 256x256",
    "probe sweep images/": "probe sweep images/ --timesteps 100 --pool 1",
    "probe dense depth photos/ depths/": "probe dense depth photos/ depths/ --size 64 --fit.epochs 1",
}
VIDEO = "diffrep depth clip.mp4 -o depth.mp4"  # needs PyAV, an extra


def blocks() -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(found) > 5
    return found


def lines() -> list[str]:
    """The command lines, without their comments."""
    return [re.sub(r"\s{2,}#.*", "", line) for language, text in blocks() if not language for line in text.splitlines()]


def replaced(text: str) -> str:
    for old, new in (EMBEDDED | SMALL).items():
        text = text.replace(old, new)
    return text


def draw_inputs() -> None:
    """The files that the README names, in the working folder."""
    for number, name in enumerate(("cat", "dog", "a", "b", "photo", "img")):
        scene = render_scene(scene_seed("test", number), category="dog", size=256)
        Image.fromarray(scene.image).save(f"{name}.png" if name == "img" else f"{name}.jpg")
    for folder in ("photos", "depths"):
        Path(folder).mkdir()
    for number in range(6):
        scene = render_scene(scene_seed("test", 10 + number), category="car", size=128)
        Image.fromarray(scene.image).save(f"photos/{number}.jpg")
        np.save(f"depths/{number}.npy", np.nan_to_num(scene.depth, posinf=0).astype(np.float32))
    for kind, category in enumerate(CATEGORIES[:2]):
        (Path("images") / category).mkdir(parents=True)
        for number in range(8):
            scene = render_scene(scene_seed("test", 100 * kind + number), category=category, size=64)
            Image.fromarray(scene.image).save(f"images/{category}/{number}.png")
    np.save("features.npy", np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32))
    write_spair(Path())


def test_all_replacements_are_of_lines_that_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(old in text for old in (EMBEDDED | SMALL))
    assert VIDEO in lines()


def test_the_two_commands_of_a_newcomer_stay_two() -> None:
    made = [line for line in lines() if "-m venv" in line]
    assert made == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/diffrep demo",
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test]"'
        " && .venv/bin/python -m pytest -n 2 --dist loadfile",
    ]


@pytest.mark.slow
def test_every_line_works_in_order_as_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_inputs()
    ran = 0
    for language, text in blocks():
        if language == "python":
            exec(compile(replaced(text), "README.md", "exec"), {})
            ran += 1
            continue
        for line in text.splitlines():
            words = shlex.split(replaced(re.sub(r"\s{2,}#.*", "", line)))
            if words[:2] == ["python3", "-m"]:  # a new environment: .ci/run
                continue
            if words[:2] == ["python", "-m"]:  # benchmarks take minutes: tests/test_benchmarks.py
                assert words[2] == "diffrep.eval.benchmarks"
                continue
            if " ".join(words) == VIDEO:
                if importlib.util.find_spec("av") is None:
                    continue
                write_video(Path("clip.mp4"), [load_image("a.jpg").resize((64, 64))] * 3, 10)
            assert words[0] == "diffrep"
            assert main(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
            ran += 1
    assert ran > 15
    for output in ("match.png", "field.png", "swapped.png", "depth", "sweep/heatmap.png", "out.tiff", "map.png"):
        assert Path(output).exists(), output
