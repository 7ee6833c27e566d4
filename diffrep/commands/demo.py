"""``diffrep demo``: matching on bundled images, as one page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from diffrep.commands.demo_sections import SECTIONS
from diffrep.commands.output import check_writable
from diffrep.draw import draw_components, draw_field, draw_matches
from diffrep.eval.homography import HomographySettings, carry, photographs, see_through, view_homography
from diffrep.features import Descriptors, FeatureMaps
from diffrep.fusion import fuse
from diffrep.images import load_image
from diffrep.matching import match_dense, match_points
from diffrep.pictures import Page
from diffrep.recipes import Correspondence, Recipe, alone
from diffrep.scenes import UNSEEN, held_out_pair, shared_keypoints

# category, number of its pair in the held-out split: picked to show what works and what does not; giraffes and
# trucks were never trained on
PAIRS = (("dog", 2), ("chair", 3), ("giraffe", 2), ("fish", 3), ("truck", 3), ("plane", 3))
ALPHA = 0.1  # a match is right within this share of the longer side of the object's box


@dataclass(frozen=True)
class Demo:
    """Run everything on bundled images and write one page with pictures.

    Rendered pairs and real photographs are matched with diffusion features alone, with DINO features alone and
    with both fused; then come depth, normals, masks, search, probes, large pictures and maps. All of it is done by
    the models that are part of the package. Nothing is downloaded.
    """

    # folder that the page, index.html, goes into; or the page itself, a name that ends in .html
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")
    recipe: str = "tiny"  # a recipe with one or two backbones

    def run(self) -> None:
        page_file = self.output if self.output.suffix == ".html" else self.output / "index.html"
        check_writable(page_file, (".html",))
        with tqdm(total=len(PAIRS) + len(photographs()) + len(SECTIONS) + 1, desc="demo", unit="part") as bar:
            page = build_page(Correspondence(self.recipe), bar)
        page.save(page_file)
        print(f"wrote {page_file.absolute()}: open it in a browser")


def build_page(correspondence: Correspondence, bar: tqdm) -> Page:
    """Run everything that the page shows."""
    bar.update()  # the models are loaded
    methods = methods_of(correspondence.recipe)
    page = Page(
        "diffrep: the same place in another image",
        "A diffusion model that was trained to make images knows where the parts of objects are. Here its features,"
        " those of a DINO-style vision transformer, and both together look for the marked places of the left image in"
        " the right one. Nothing was trained on these images.",
    )
    page.section(
        "Different objects",
        "Two rendered objects of one category from different sides. Numbers mark the queries; a green ring is a match"
        f" within {ALPHA:g} of the object's size, a red line leads from a miss to where it belongs. The pairs were"
        " picked to show what works and what does not.",
    )
    hits: dict[str, list[int]] = {name: [] for name in methods}
    figures: list[tuple[Image.Image, str]] = []
    for category, number in PAIRS:
        figures += _pair_figures(correspondence, methods, category, number, hits)
        bar.update()
    page.figures(figures)
    shares = {name: sum(found) / max(len(found), 1) for name, found in hits.items()}
    best = max(range(len(methods)), key=lambda i: list(shares.values())[i])
    count = len(next(iter(hits.values())))
    page.text(
        f"Matches that are right on these {len(PAIRS)} pairs ({count} points); `diffrep eval scenes` counts many more:"
    )
    page.table(["features", "right"], [[n, f"{100 * s:.0f} %"] for n, s in shares.items()], best=best)

    whole = correspondence.recipe
    page.section(
        "What the features see",
        "Above, two objects; below, the three strongest joint directions of the fused features as colours: the same"
        " part has the same colour on both. Then a dense match: the right object wears a colour wheel, every place of"
        " the left one has the colour of where it was found.",
    )
    page.figures(_dense_figures(correspondence, whole))

    page.section(
        "Real photographs",
        "The models have seen nothing but renderings. A photograph is looked at again through a known perspective"
        " (recipe tiny-views: an early activation of the U-Net joins in, as it is the same scene); captions say how far"
        " from the truth the matches land, in pixels and in strides (the distance of neighbouring features).",
    )
    photos = []
    views = Correspondence("tiny-views") if correspondence.recipe.name == "tiny" else correspondence
    for name, path in photographs().items():
        photos.append(_photograph_figure(views, name, path))
        bar.update()
    page.figures(photos)

    for section in SECTIONS:
        section(page)
        bar.update()

    page.section("Do it yourself")
    page.code("diffrep match a.jpg b.jpg --points 120,80 200,95 -o match.png\ndiffrep eval scenes\ndiffrep info tiny")
    return page


def methods_of(whole: Recipe) -> dict[str, Recipe]:
    """Name for a reader -> recipe: each backbone alone, then all of them."""
    names = ["diffusion", "DINO"] if len(whole.readings) == 2 else [r.backbone for r in whole.readings]
    single = {name: alone(whole, i, name) for i, name in enumerate(names)} if len(names) > 1 else {}
    return single | {"fused" if single else names[0]: whole}


def _describe(features: Sequence[tuple[FeatureMaps, ...]], recipe: Recipe, whole: Recipe) -> tuple[Descriptors, ...]:
    """Fuse the features that one of the methods uses."""
    wanted = {reading.backbone for reading in recipe.readings}
    kept = [i for i, reading in enumerate(whole.readings) if reading.backbone in wanted]
    return fuse([tuple(entry[i] for i in kept) for entry in features], recipe.fusion)


def _pair_figures(
    correspondence: Correspondence,
    methods: dict[str, Recipe],
    category: str,
    number: int,
    hits: dict[str, list[int]],
) -> list[tuple[Image.Image, str]]:
    a, b = held_out_pair(category, number)
    points, truth = map(torch.from_numpy, shared_keypoints(a, b))
    tolerance = ALPHA * max(b.box[2] - b.box[0], b.box[3] - b.box[1])
    images = [Image.fromarray(a.image), Image.fromarray(b.image)]
    features = list(correspondence.features(images))
    figures = []
    for name, recipe in methods.items():
        source, target = _describe(features, recipe, correspondence.recipe)
        matches = match_points(source, target, points, recipe.matching)
        right = (torch.linalg.vector_norm(matches.points - truth, dim=1) <= tolerance).int().tolist()
        hits[name] += right
        note = ", a category it never saw" if category in UNSEEN else ""
        figures.append(
            (
                draw_matches(images[0], images[1], points, matches, truth=truth, tolerance=tolerance),
                f"{category}{note}, {name}: {sum(right)} of {len(right)} right",
            )
        )
    return figures


def _dense_figures(correspondence: Correspondence, recipe: Recipe) -> list[tuple[Image.Image, str]]:
    figures = []
    for category, number in PAIRS[:3]:
        a, b = held_out_pair(category, number)
        images = [Image.fromarray(a.image), Image.fromarray(b.image)]
        source, target = correspondence.describe(*images)
        masks = torch.from_numpy(a.mask), torch.from_numpy(b.mask)
        dense = match_dense(source, target, recipe.matching, source_mask=masks[0], mask=masks[1])
        figures.append((draw_components(images, [source, target]), f"{category}: joint components"))
        figures.append((draw_field(images[0], images[1], dense, mask=masks[1]), f"{category}: dense match"))
    return figures


def _photograph_figure(correspondence: Correspondence, name: str, path: Path) -> tuple[Image.Image, str]:
    image = load_image(path)
    size = (image.height, image.width)
    matrix = view_homography(size, HomographySettings(rotation=15, zoom=(0.7, 0.85)), seed=1)
    view = Image.fromarray(see_through(np.array(image), matrix))
    x, y = torch.meshgrid(torch.linspace(0.2, 0.8, 4), torch.linspace(0.2, 0.8, 3), indexing="xy")
    seen = torch.stack([x.flatten() * size[1], y.flatten() * size[0]], dim=1)  # asked for where the view shows them
    points = carry(torch.linalg.inv(matrix), seen).float()
    source, target = correspondence.describe(image, view)
    matches = match_points(source, target, points, correspondence.recipe.matching)
    errors = torch.linalg.vector_norm(matches.points - seen, dim=1)
    cells = target.points(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    stride = float((cells[1] - cells[0]).max())
    picture = draw_matches(image, view, points, matches, truth=seen, tolerance=stride)
    median = float(errors.median())
    return picture, f"{name}: median error {median:.0f} pixels, {median / stride:.2f} strides"
