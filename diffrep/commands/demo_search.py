"""The part of the demo that searches a collection: where in it is this part?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from diffrep.backbones import load_backbone
from diffrep.commands.output import write_image
from diffrep.commands.query import contact_sheet
from diffrep.index import index_store, query_image
from diffrep.pages import Page
from diffrep.scenes import render_scene, scene_pairs
from diffrep.store import BulkConfig, Keep, extract_store, open_store

CATEGORIES = ("dog", "car", "plane", "bird", "chair", "person", "fish", "mug")
PER_CATEGORY = 4  # scenes of each in the collection
QUESTIONS = (("dog", "top of the head"), ("car", "front left wheel"), ("plane", "nose"))
_SIZE = 128  # of the scenes, pixels
_FIRST_QUESTION = PER_CATEGORY // 2  # pairs before it are the collection's


def section(page: Page) -> None:
    """Extract a small collection, index its places, ask for parts; one contact sheet each."""
    backbone = load_backbone("tiny")
    figures = []
    with tempfile.TemporaryDirectory() as work:
        images = Path(work) / "collection"
        for category in CATEGORIES:
            (images / category).mkdir(parents=True)
            pairs = scene_pairs("test", _FIRST_QUESTION, categories=(category,))
            for number, seed in enumerate(seed for pair in pairs for seed in pair[:2]):
                write_image(images / category / f"{number}.png", _scene(category, seed))
        store, index = Path(work) / "store", Path(work) / "index"
        done = extract_store(
            [images], store, backbone, keep=Keep(kind="maps"), bulk=BulkConfig(workers=0, shard_images=64)
        )
        places = index_store([open_store(store)], index)
        for category, part in QUESTIONS:
            picture, point = _question(category, part)
            hits = query_image(places, picture, point=point, k=10, backbone=backbone)
            same = sum(hit.place.image.startswith(f"{category}/") for hit in hits[:PER_CATEGORY])
            caption = f"{part} of a {category}: {same} of the first {PER_CATEGORY} are a {category}"
            figures.append((contact_sheet(picture, hits, point=point), caption))
        text = (
            f"{done.images} rendered scenes, {PER_CATEGORY} of each of {len(CATEGORIES)} categories, were extracted"
            f" into a store, and the {len(places):,} places in them indexed ({places.design.kind}:"
            f" {places.design.reason}). The large image is not among them; its ring marks the part that is looked for,"
            " small rings where it was found, best first, one per image."
        )
    page.section("Where in the collection is this part?", text)
    page.figures(figures, layout="wide")
    page.code(
        "diffrep extract photos/ -o photos.store --keep.kind maps\ndiffrep index photos.store -o photos.index\n"
        "diffrep query photos.index cat.jpg --point 120,80"
    )


def _scene(category: str, seed: int) -> Image.Image:
    return Image.fromarray(render_scene(seed, category=category, size=_SIZE).image)


def _question(category: str, part: str) -> tuple[Image.Image, tuple[float, float]]:
    """A scene that is not in the collection and shows the part, and where it does."""
    for pair in scene_pairs("test", _FIRST_QUESTION + 12, categories=(category,))[_FIRST_QUESTION:]:
        scene = render_scene(pair[0], category=category, size=_SIZE)
        shown = {n: p for n, p, seen in zip(scene.keypoint_names, scene.keypoints, scene.visible, strict=True) if seen}
        if part in shown:
            x, y = shown[part].tolist()
            return Image.fromarray(scene.image), (x, y)
    raise AssertionError(f"no held-out {category} shows its {part}")
