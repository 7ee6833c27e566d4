"""Paints the gallery with the models in the package: `python docs/gallery.py [NAME...]`.

Every function of `PICTURES` is one picture in docs/pictures/gallery and, with its docstring as the caption, one entry
of docs/gallery.md, which is written too. `matches` is the picture of the README, in docs/pictures.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffrep import Correspondence, HeatGeodesicEmbedding, load_head, load_synthesis
from diffrep.draw import draw_components, draw_field, draw_matches
from diffrep.eval.toy_manifolds import swiss_roll
from diffrep.heads.restoration.photograph import Photograph
from diffrep.heads.segmentation import composite
from diffrep.heads.training.restoration import PairSettings, degraded
from diffrep.index import contact_sheet, search_folder
from diffrep.manifold.files import draw_embedding, figure_image
from diffrep.matching import match_dense
from diffrep.pictures import side_by_side, stacked
from diffrep.scenes import SEEN, Scene, held_out_pair, render_scene, scene_seed, shared_keypoints
from diffrep.swap import swap_appearance
from diffrep.synthesis import SynthesisSettings, synthesize
from diffrep.synthesis.grids import ImageEncoder

DOCS = Path(__file__).parent
FOLDER = DOCS / "pictures" / "gallery"
WIDEST = 1100  # pixels
HEAD = """# Gallery

Held-out rendered scenes, answered by the small models in the package; `python docs/gallery.py` paints this page again.
They are picked to show what each thing is, [the model card](model-card.md) has the averages.
"""


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(scene.image)


def scene(category: str, number: int, size: int = 256) -> Image.Image:
    """A scene of the test split."""
    return picture(render_scene(scene_seed("test", number), category=category, size=size))


def matched(pairs: Sequence[tuple[str, int]], marks: float = 1.0) -> list[Image.Image]:
    """The shared places of held-out pairs, looked for; pairs are category and number."""
    correspondence, shown = Correspondence("tiny"), []
    for category, number in pairs:
        a, b = held_out_pair(category, number)
        source, truth = map(torch.from_numpy, shared_keypoints(a, b))
        judged = {"truth": truth, "tolerance": 0.1 * max(b.box[2] - b.box[0], b.box[3] - b.box[1]), "marks": marks}
        shown.append(
            draw_matches(picture(a), picture(b), source, correspondence.match(a.image, b.image, source), **judged)
        )
    return shown


def points() -> Image.Image:
    """**Points.** Named places of one object, looked for in another. A green ring is a match within a tenth of the
    object's size, a red one is not. [Guide](guides/match.md)
    """
    return stacked(matched([("dog", 2), ("chair", 3)]))


def matches() -> Image.Image:
    """The picture of the README: two of the better pairs."""
    return side_by_side(matched([("giraffe", 2), ("chair", 3)], marks=1.5))[0]


def field() -> Image.Image:
    """**Every place.** The right object wears a colour wheel; each place of the left one has the colour of where it
    was matched. [Guide](guides/match.md)
    """
    a, b = held_out_pair("dog", 2)
    one, other = Correspondence("tiny").describe(a.image, b.image)
    masks = torch.from_numpy(a.mask), torch.from_numpy(b.mask)
    dense = match_dense(one, other, source_mask=masks[0], mask=masks[1])
    return draw_field(picture(a), picture(b), dense, mask=masks[1])


def components() -> Image.Image:
    """**What features see.** Three joint principal components as colours: the same part has the same colour on every
    object. [Concepts](concepts.md)
    """
    images = [picture(held_out_pair("motorbike", number)[0]) for number in range(4)]
    return draw_components(images, Correspondence("tiny").describe(*images))


def heads() -> Image.Image:
    """**Depth, normals, masks.** The image, its disparity (1 is near), its normals and its mask, from three heads in
    one step each; for depth the mirror image is looked at too. [Depth and normals](guides/depth-and-normals.md),
    [segmentation](guides/segment.md)
    """
    names, rows = ("tiny-depth", "tiny-normals", "tiny-segmentation"), []
    loaded = [load_head(name) for name in names]
    for category, number in (("plane", 0), ("dog", 11)):
        image = scene(category, number)
        answers = [head(image).picture().convert("RGB") for head in loaded]
        rows.append(side_by_side([image, *answers], titles=["image", "disparity", "normals", "mask"], height=260)[0])
    return stacked(rows)


def cutouts() -> Image.Image:
    """**Cut out.** The same objects on another background, with their own colours along the outline.
    [Guide](guides/segment.md)
    """
    head, shown = load_head("tiny-segmentation"), []
    for category, number in (("bird", 5), ("motorbike", 7)):
        image = scene(category, number)
        shown += [image, composite(image, head(image).mask, "#e8e4d8")]
    return side_by_side(shown, height=256)[0]


def restored() -> Image.Image:
    """**Restored.** A scene that was made small, blurred, noisy and JPEG, enlarged four times; one pass of the
    restorer; the scene as it was. [Guide](guides/restore.md)
    """
    head, settings, rows = load_head("tiny-restore"), PairSettings(clean=0.0), []
    for category, number in (("boat", 2), ("motorbike", 7)):
        original = scene(category, number)
        pixels = torch.from_numpy(np.array(original)).permute(2, 0, 1)
        low = degraded(pixels, settings, number).permute(1, 2, 0).numpy()
        enlarged = Image.fromarray(low).resize(original.size, Image.Resampling.BICUBIC)
        shown = [enlarged, head(Photograph(low)).picture().convert("RGB"), original]
        rows.append(side_by_side(shown, titles=["degraded", "restored", "as it was"], height=300)[0])
    return stacked(rows)


def swap() -> Image.Image:
    """**Swapped looks.** The first object with the looks of the second: its pose and surroundings stay.
    [Guide](guides/swap.md)
    """
    rows = []
    for category, number in (("chair", 3), ("dog", 2)):
        a, b = held_out_pair(category, number)
        one, other = Correspondence("tiny").describe(a.image, b.image)
        masks = {"pose_mask": torch.from_numpy(a.mask), "mask": torch.from_numpy(b.mask)}
        swapped = swap_appearance(a.image, b.image, one, other, **masks)
        titles = ["keeps its pose", "lends its looks", "result"]
        rows.append(side_by_side([picture(a), picture(b), swapped], titles=titles, height=260)[0])
    return stacked(rows)


def search() -> Image.Image:
    """**Search.** A place of one image, and where a collection has such a place. [Guide](guides/search.md)"""
    with tempfile.TemporaryDirectory() as work:
        for number in range(40):
            category = SEEN[number % 5]
            file = Path(work) / "photos" / category / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            scene(category, 300 + number, 128).save(file)
        asked = held_out_pair("dog", 2)[0]
        place = [float(v) for v in asked.keypoints[np.flatnonzero(asked.visible)[0]]]
        hits = search_folder(Path(work) / "photos", asked.image, point=place, k=10).hits
        return contact_sheet(picture(asked), hits, point=place)


def painted() -> Image.Image:
    """**Large images.** A reference of four scenes (left) becomes embeddings; a picture is painted under them.
    The small painter knows colours and layout, no shapes. [Guide](guides/large-images.md)
    """
    tiles = [np.asarray(scene(category, 3, 128)) for category in ("boat", "car", "fish", "chair")]
    reference = Image.fromarray(np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)]))
    model = load_synthesis("tiny-synthesis")
    grid = ImageEncoder.load(model.about.encoder, model.about.pooling).grid(reference, (2, 2))
    images = [Image.fromarray(synthesize(model, grid, (256, 256), SynthesisSettings(seed=seed))) for seed in (0, 1)]
    return side_by_side([reference, *images], titles=["reference", "one draw", "another"], height=300)[0]


def roll() -> Image.Image:
    """**Maps.** A noisy roll in 50 dimensions, unrolled; colours are the place along the sheet.
    [Guide](guides/embed.md)
    """
    data = swiss_roll(1000, noise=0.5, dim=50, seed=47)
    fitted = HeatGeodesicEmbedding(random_state=0).fit(data.points)
    return figure_image(draw_embedding(fitted.embedding_, data.position, name="place along the sheet"))


PICTURES: tuple[Callable[[], Image.Image], ...] = (
    *(points, field, components, heads, cutouts, restored, swap, search, painted, roll),
)


def page() -> str:
    """The page with all pictures and captions."""
    entries = []
    for paint in PICTURES:
        caption = " ".join(inspect.cleandoc(paint.__doc__ or "").split())
        entries.append(f"![{paint.__name__}](pictures/gallery/{paint.__name__}.webp)\n\n{caption}\n")
    return "\n".join([HEAD, *entries])


def main(names: list[str], folder: Path = FOLDER) -> None:
    """Paint the pictures of these names, all where there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    for paint in (*PICTURES, matches):
        if not names or paint.__name__ in names:
            file = (folder.parent if paint is matches else folder) / f"{paint.__name__}.webp"
            image = paint().convert("RGB")
            image.thumbnail((WIDEST if paint in PICTURES else image.width, 4 * WIDEST))
            image.save(file, quality=88, method=6)
            print(file, image.size)


if __name__ == "__main__":
    main(sys.argv[1:])
    (DOCS / "gallery.md").write_text(page(), encoding="utf-8")
