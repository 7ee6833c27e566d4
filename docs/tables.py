"""Writes docs/models.md from what `diffrep info`, `info models` and `info recipes` list: `python docs/tables.py`.

With `--measure` the models in the package are timed first, in one thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffrep.backbones.repositories import CLEANDIFT, MODELS, REPOSITORIES, TIMM, WEIGHTS
from diffrep.commands.info import known_recipes, published_models

FOLDER = Path(__file__).parent
INTRO = """# Models and recipes

The models in the package (`tiny`, `tiny-dino`, `tiny-depth`, ...) come with it, under its licence, and need a few
seconds of a CPU; [what they can and can't do](model-card.md). Everything below is fetched from its authors when you
name it, or read from a folder of yours. `diffrep info NAME` lists the taps of a backbone without reading weights.
"""
PACKAGE = """## In the package

Times are milliseconds of one thread of a shared CPU, models loaded, for a photograph of 256 x 192 pixels (matching: a
pair and three places), by `python docs/tables.py --measure`. The weights are under the package's licence, Apache-2.0.
"""
EMBEDDED = (  # command, task of `pipeline`, its model, what it is, folders
    ("match", "correspondence", "tiny", "diffusion and DINO features, fused", ("tiny", "tiny-dino")),
    ("match --recipe tiny-views", "correspondence", "tiny-views", "for other views of a scene", ("tiny", "tiny-dino")),
    ("extract", "features", "tiny", "the diffusion model's features", ("tiny",)),
    ("extract --backbone tiny-dino", "features", "tiny-dino", "the vision transformer's features", ("tiny-dino",)),
    ("depth", "depth", None, "one pass on the image, one on its mirror image", ("tiny", "tiny-depth")),
    ("normals", "normals", None, "one pass", ("tiny", "tiny-normals")),
    ("segment", "segmentation", None, "mask and edge", ("tiny", "tiny-segmentation")),
    ("restore", "restore", None, "four times as large, in tiles", ("tiny", "tiny-restore")),
)
TASKS = """## For each task

The first of a task is the one to begin with. Memory is that of the weights in 16 bits; licences are those of the
weights, from copies of the authors' pages and repositories of 2023 to 2026; theirs count.
"""
RECIPES = """## Recipes of matching

Published systems from two images to matches, with the settings of their papers: `diffrep match A B --recipe NAME`.
`--backbone ROLE=MODEL` puts a model of yours into one. Memory is that of the weights of all its backbones.
"""
NAMES = """## Short names

The first repository that answers is taken. Licences are from copies of the authors' pages; of `sd3.5-medium`,
`flux.1-dev` and those sizes of DINO, DINOv2 and DINOv3 that had none, from the pages of copies and of their sisters.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def measure() -> dict[str, str]:
    """Command -> milliseconds, for `EMBEDDED`: medians of the process's own time."""
    import torch
    from PIL import Image

    from diffrep import pipeline
    from diffrep.eval.benchmarks.timing import interleave
    from diffrep.scenes import render_scene, scene_seed

    torch.set_num_threads(1)
    scenes = [render_scene(scene_seed("test", i), category="dog", size=256).image[32:224] for i in range(2)]
    a, b = (Image.fromarray(scene) for scene in scenes)
    points = [(100, 75), (128, 96), (150, 120)]
    sides = {}
    for command, task, model, *_ in EMBEDDED:
        run, inputs = pipeline(task, model), (a, b, points) if task == "correspondence" else (a,)
        sides[command] = lambda run=run, inputs=inputs: run(*inputs)
    return {
        command: f"{float(f'{1000 * timing.median:.2g}'):g}"
        for command, timing in interleave(sides, repeats=3, warmups=1).items()
    }


def megabytes(folders: Sequence[str]) -> str:
    size = sum(file.stat().st_size for folder in folders for file in (MODELS / folder).rglob("*.safetensors"))
    return f"{size / 1e6:.0f} MB"


def page() -> str:
    """The page of models and recipes."""
    measured = json.loads((FOLDER / "measured.json").read_text())
    times = measured["milliseconds"]
    tasks = [
        (
            model["job"],
            f"`{model['option']}`",
            model["about"],
            model["licence"] or "see its page",
            f"{model['gigabytes']:g} GB",
            times.get(model["option"], ""),
        )
        for model in published_models()
    ]
    package = [
        (f"`diffrep {command}`", about, megabytes(folders), measured["embedded"][command])
        for command, _, _, about, folders in EMBEDDED
    ]
    recipes = [
        (
            f"`{recipe['name']}`",
            ", ".join(f"`{name}`" for name in recipe["backbones"]),
            recipe["source"],
            recipe["licence"],
            f"{recipe['gigabytes']:g} GB",
            times.get(f"--recipe {recipe['name']}", ""),
        )
        for recipe in known_recipes()
    ]
    origins = {name: (", ".join(ids), "diffusers") for name, ids in REPOSITORIES.items()}
    origins |= {name: (f"`{base}` with CompVis/cleandift", "a U-Net for it") for name, (base, _) in CLEANDIFT.items()}
    origins |= {name: (architecture, "timm") for name, architecture in TIMM.items()}
    names = [(f"`{name}`", *origin, WEIGHTS[name][0], f"{WEIGHTS[name][1]:g} GB") for name, origin in origins.items()]
    return "\n".join(
        [
            INTRO,
            PACKAGE,
            table(("command", "what it is", "weights", "time, ms"), package),
            TASKS,
            table(("task", "option", "what it is", "licence", "memory", "time, ms"), tasks),
            measured["about"] + "\n",
            RECIPES,
            table(("recipe", "backbones", "source", "licence", "memory", "time, ms"), recipes),
            NAMES,
            table(("name", "weights come from", "form", "licence", "memory"), names),
        ]
    )


if __name__ == "__main__":
    if "--measure" in sys.argv:
        file = FOLDER / "measured.json"
        facts = json.loads(file.read_text()) | {"embedded": measure()}
        file.write_text(json.dumps(facts, indent=2) + "\n")
    (FOLDER / "models.md").write_text(page(), encoding="utf-8")
