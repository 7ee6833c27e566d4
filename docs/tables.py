"""Writes docs/models.md from what `diffrep info`, `info models` and `info recipes` list: `python docs/tables.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffrep.backbones.repositories import CLEANDIFT, REPOSITORIES, TIMM, WEIGHTS
from diffrep.commands.info import known_recipes, published_models

FOLDER = Path(__file__).parent
INTRO = """# Models and recipes

The models in the package (`tiny`, `tiny-dino`, `tiny-depth`, ...) come with it, under its licence, and need a few
seconds of a CPU; [what they can and can't do](model-card.md). Everything below is fetched from its authors when you
name it, or read from a folder of yours. `diffrep info NAME` lists the taps of a backbone without reading weights.
"""
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
    (FOLDER / "models.md").write_text(page(), encoding="utf-8")
