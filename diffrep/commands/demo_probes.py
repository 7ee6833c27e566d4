"""The part of the demo about probes: which block of the embedded U-Net knows what an object is?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from diffrep.backbones import load_backbone
from diffrep.eval.probe_data import SceneImages, scene_images
from diffrep.features import ExtractConfig
from diffrep.heads.probes import ProbeData, Reading, draw_heat_map, load_probe, sweep
from diffrep.images import load_image
from diffrep.pages import Page

SCENES = SceneImages(train=110, val=55, test=55, size=64)
TIMESTEPS = (10, 100, 400)
SHOWN = 6  # test images whose answers are shown


def section(page: Page) -> None:
    """Render a few scenes, probe every block at three timesteps, and show the heat map and some answers."""
    backbone = load_backbone("tiny")
    with tempfile.TemporaryDirectory() as work:
        data = scene_images(Path(work) / "scenes", settings=SCENES, progress=False)
        reading = Reading("tiny", None, TIMESTEPS, (1,), ExtractConfig(batch_size=32))
        found = ProbeData.read(data, {"tiny": backbone}, [reading], Path(work) / "features", progress=False)
        done = sweep(found, Path(work) / "sweep", progress=False)
        rows = list(found.split.test[:SHOWN])
        pictures = [load_image(Path(work) / "scenes" / data.images[row].name) for row in rows]
        answers = load_probe(Path(work) / "sweep" / "probe").predict(pictures, backbones={"tiny": backbone}).top(1)
    shown = []
    for row, picture, (top,) in zip(rows, pictures, answers, strict=True):
        truth = data.classes[data.labels[row]]
        verdict = "right" if top[0] == truth else f"it is a {truth}"
        shown.append((picture.resize((256, 256)), f"{top[0]}, {100 * top[1]:.0f} %: {verdict}"))
    test = done.result["test"]
    page.section(
        "Which block knows what it is?",
        f"{SCENES.train} small renderings of {len(data.classes)} categories train a linear classifier on the features"
        " of each block, at three noise levels; the noise level and the block are chosen on val. The best,"
        f" {done.best.tap} at t = {done.best.timestep}, names {100 * test['top1']:.0f} % of {test['n']} unseen test"
        f" images ({100 * test['low']:.0f}..{100 * test['high']:.0f} at 95 %; chance {100 / len(data.classes):.0f} %)."
        " The U-Net was trained on other scenes of these categories, among others to name their parts.",
    )
    heat_map = draw_heat_map(done.cells, title="what is it?")
    page.figures([(heat_map, "accuracy on val of one linear probe per block and timestep, %")], layout="wide")
    page.figures(shown, layout="small")
    page.code("diffrep probe sweep scenes\ndiffrep probe predict sweep/probe photo.jpg")
