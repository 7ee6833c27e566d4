"""The part of the demo page about masks and cut-outs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffrep.draw import side_by_side
from diffrep.eval.homography import photographs
from diffrep.eval.segmentation import grey, score_image
from diffrep.heads.cutouts import composite, cut_out, grey_image
from diffrep.heads.mask_prediction import Segmentation, SegmentConfig
from diffrep.heads.segmentation_loading import load_segmentation
from diffrep.images import load_image
from diffrep.pages import Page
from diffrep.scenes import UNSEEN, render_scene, scene_seed

SCENES = (("dog", 0), ("plane", 5), ("motorbike", 7), ("chair", 2), ("giraffe", 5))  # numbers in the test split
_BACKGROUND = "#2f7d5b"


def section(page: Page) -> None:
    """Cut objects out of held-out scenes and photographs."""
    head, config = load_segmentation("tiny-segmentation"), SegmentConfig(edges=True)
    figures = []
    for category, number in SCENES:
        scene = render_scene(scene_seed("test", number), category=category, size=256)
        image = Image.fromarray(scene.image)
        found = head.predict(image, config)
        truth = scene.mask.astype(np.uint8) * 255
        scores = score_image(grey(found.mask), truth).values
        pictures = [*_pictures(image, found), Image.fromarray(truth)]
        titles = ["image", "soft mask", "edge", "cut out", "on a colour", "true mask"]
        note = ", a category it never saw" if category in UNSEEN else ""
        caption = f"{category}{note}: max F {scores['maxf']:.2f}, mean absolute error {scores['mae']:.3f}"
        figures.append((side_by_side(pictures, titles=titles, height=190)[0], caption))
    for file, path in photographs().items():
        name = Path(file).stem
        image = load_image(path)
        pictures = _pictures(image, head.predict(image, config))
        titles = ["photograph", "soft mask", "edge", "cut out", "on a colour"]
        caption = f"{name}: the head has seen nothing but renderings of single objects"
        figures.append((side_by_side(pictures, titles=titles, height=190)[0], caption))
    page.section(
        "Masks in one step",
        "One pass of a diffusion U-Net that predicts an object's mask and its edges side by side (DiffDIS). The mask"
        " alone costs a third less and is the same. These scenes are held out; they were picked to show thin parts and"
        " a category that was never trained on.",
    )
    page.figures(figures, layout="wide")
    page.code("diffrep segment photo.jpg -o out --outputs mask edge cutout")


def _pictures(image: Image.Image, found: Segmentation) -> list[Image.Image]:
    assert found.edge is not None
    cut = cut_out(image, found.mask)
    return [
        image,
        grey_image(found.mask),
        grey_image(found.edge),
        Image.alpha_composite(checkerboard(image.size), cut),
        composite(image, found.mask, _BACKGROUND),
    ]


def checkerboard(size: tuple[int, int], side: int = 12) -> Image.Image:
    """What stands for transparency in pictures: (width, height) pixels, RGBA."""
    y, x = np.mgrid[: size[1], : size[0]] // side
    shade = np.where((x + y) % 2, 205, 240).astype(np.uint8)
    return Image.fromarray(np.dstack([shade, shade, shade, np.full_like(shade, 255)]), "RGBA")
