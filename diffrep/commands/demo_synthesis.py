"""The demo's part on large images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from diffrep.pages import Page
from diffrep.scenes import render_scene, scene_seed
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, load_synthesis, slerp, synthesize
from diffrep.synthesis.conditions import ImageEncoder

CELLS = ("boat", "fish", "car", "chair", "mug", "lamp", "plane", "dog", "bird")  # a reference of 3 x 3 held-out scenes
WHOLE = ("bird", 4)  # category of one more reference, and cells a side into which it is cut
PATH = ("boat", "car")  # the strip leads from the look of one to that of the other
STRIP = (192, 960)  # pixels
SETTINGS = SynthesisSettings()


def section(page: Page) -> None:
    """Paint three large pictures with the embedded model."""
    model = load_synthesis("tiny-synthesis")
    encoder = ImageEncoder.load(model.about.encoder or "tiny-dino", model.about.pooling)
    reference = mosaic(CELLS, columns=3)
    grid = encoder.grid(reference, (3, 3))
    painted = Image.fromarray(synthesize(model, grid, settings=SETTINGS))
    category, side = WHOLE
    scene = mosaic([category], columns=1, size=side * model.window * model.factor)
    whole = Image.fromarray(synthesize(model, encoder.grid(scene, (side, side)), settings=SETTINGS))
    strip = Image.fromarray(paint_strip(model, encoder, STRIP))
    figures = [
        (reference, "The reference: nine rendered scenes that no model has seen."),
        (painted, "Painted from the nine embeddings, one denoising for the whole picture."),
        (scene, f"Another reference: one scene, cut into {side} x {side} cells."),
        (whole, "Painted from its embeddings: alike neighbours flow into each other."),
        (strip, f"{STRIP[1]} x {STRIP[0]} pixels between the looks of a {PATH[0]} and a {PATH[1]}."),
    ]
    page.section(
        "Large pictures from embeddings",
        "A small latent diffusion model that is told nothing but the DINO embedding of a patch paints pictures of any"
        " size: every window is denoised under the embedding at its place, the predictions are averaged, and one step"
        " is taken for the whole canvas. A window is 128 pixels; larger pictures take more time but no more memory."
        " This model was trained for minutes on a CPU: it gets colours and places right, objects roughly.",
    )
    page.figures(figures[:4])
    page.figures(figures[4:], layout="wide")
    page.code("diffrep synthesize --reference photo.jpg --size 4096x4096 -o painted.ome.tiff")


def mosaic(categories: Sequence[str], *, columns: int, size: int = 128) -> Image.Image:
    """Held-out scenes of the given categories side by side."""
    tiles = [
        render_scene(scene_seed("test", number), category=name, size=size).image
        for number, name in enumerate(categories)
    ]
    rows = [np.concatenate(tiles[start : start + columns], axis=1) for start in range(0, len(tiles), columns)]
    return Image.fromarray(np.concatenate(rows))


def paint_strip(model: SynthesisModel, encoder: ImageEncoder, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) whose look changes from left to right."""
    first, last = (encoder.grid(mosaic([name], columns=1), (1, 1)).embeddings[0, 0] for name in PATH)
    cell = model.window * model.factor
    rows, columns = -(-size[0] // cell), -(-size[1] // cell)
    shares = torch.linspace(0, 1, columns)
    row = slerp(shares, first.expand(columns, -1), last.expand(columns, -1))
    return synthesize(model, EmbeddingGrid(row.expand(rows, -1, -1), encoder.name), size, SETTINGS)
