"""The sections of the demo page after matching: depth, masks, search, probes, large pictures, maps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffrep.backbones import load_backbone
from diffrep.commands.output import write_image
from diffrep.draw import side_by_side
from diffrep.eval.homography import photographs
from diffrep.eval.manifold import geodesic_scores
from diffrep.eval.probe_data import SceneImages, scene_images
from diffrep.eval.segmentation import grey
from diffrep.eval.segmentation_metrics import score_image
from diffrep.eval.toy_manifolds import ToyManifold, swiss_roll
from diffrep.features import ExtractConfig
from diffrep.heads.cutouts import composite, cut_out, grey_image
from diffrep.heads.loading import load_head
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.point_cloud import Intrinsics, unproject
from diffrep.heads.probes import ProbeData, Reading, draw_heat_map, load_probe, sweep
from diffrep.heads.segmentation import ObjectMask, SegmentConfig
from diffrep.images import load_image
from diffrep.index import contact_sheet, index_store, query_image
from diffrep.manifold import HeatGeodesicEmbedding
from diffrep.pictures import Page
from diffrep.scenes import UNSEEN, Scene, render_scene, scene_pairs, scene_seed
from diffrep.store import BulkConfig, Keep, extract_store, open_store
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, load_synthesis, slerp, synthesize
from diffrep.synthesis.grids import ImageEncoder

# category, number in the test split; giraffes were never trained on
MAP_SCENES = (("dog", 0), ("chair", 2), ("giraffe", 5))


def depth_and_normals(page: Page) -> None:
    """Predict depth and normals of held-out scenes and of photographs."""
    depth, normals = load_head("tiny-depth"), load_head("tiny-normals")
    figures = []
    for category, number in MAP_SCENES:
        scene = render_scene(scene_seed("test", number), category=category, size=256)
        image = Image.fromarray(scene.image)
        disparity = depth.predict(image)
        assert isinstance(disparity, DepthMap)
        metric = disparity.align(torch.from_numpy(scene.depth), method="least squares")
        known = np.isfinite(scene.depth)
        error = float(np.mean(np.abs(metric.values.numpy() - scene.depth)[known] / scene.depth[known]))
        turned = normals.predict(image)
        assert isinstance(turned, NormalMap)
        pictures = [
            image,
            disparity.picture(),
            true_disparity(scene).picture(),
            turned.picture(),
            true_normals(scene).picture(),
        ]
        titles = ["image", "disparity", "as rendered", "normals", "as rendered"]
        note = ", a category it never saw" if category in UNSEEN else ""
        caption = f"{category}{note}: depth is off by {100 * error:.0f} % on average once scale and shift are known"
        figures.append((side_by_side(pictures, titles=titles, height=220)[0], caption))
    for name, path in ((Path(file).stem, path) for file, path in photographs().items()):
        image = load_image(path)
        disparity = depth.predict(image)
        assert isinstance(disparity, DepthMap)
        pictures = [image, disparity.picture(), normals.predict(image).picture(), seen_from_the_side(image, disparity)]
        titles = ["photograph", "disparity", "normals", "as points, from the side"]
        caption = (
            f"{name}: the heads have seen nothing but renderings; scale, shift and camera are assumed for the points"
        )
        figures.append((side_by_side(pictures, titles=titles, height=220)[0], caption))
    page.section(
        "Depth and normals in one step",
        "One pass of a diffusion U-Net that became a depth or normal head: red is near, blue is far; normals are"
        " coloured by x right, y up and z towards the camera. These scenes are held out.",
    )
    page.figures(figures, layout="wide")
    page.code("diffrep depth photo.jpg -o maps\ndiffrep normals photo.jpg -o maps")


def true_disparity(scene: Scene) -> DepthMap:
    """A scene's disparity as heads are trained on it: between its 2 % and 98 % quantiles."""
    inverse = 1 / scene.depth.astype(np.float64)  # 0 in the sky
    low, high = np.quantile(inverse, [0.02, 0.98])
    share = ((inverse - low) / max(high - low, 1e-5)).clip(0, 1)
    return DepthMap(torch.from_numpy(share.astype(np.float32)), "disparity")


def true_normals(scene: Scene) -> NormalMap:
    """A scene's normals, towards the camera."""
    return NormalMap(torch.from_numpy(scene.normals).permute(2, 0, 1), "rdf")


def seen_from_the_side(image: Image.Image, disparity: DepthMap, degrees: float = 28.0, size: int = 300) -> Image.Image:
    """The image's pixels as points in space, from a camera that has moved around their middle."""
    image = image.resize((size, round(size * image.height / image.width)), Image.Resampling.BILINEAR)
    small = torch.nn.functional.interpolate(disparity.values[None, None], (image.height, image.width), mode="bilinear")
    depth = DepthMap(small[0, 0], "disparity").relative_depth(1.0, 4.0)
    camera = Intrinsics.assumed(image.height, image.width)
    points = unproject(depth, camera).flatten(1).numpy()
    middle = np.median(points, axis=1, keepdims=True)
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    x, y, z = turn @ (points - middle) + middle
    column = np.round(camera.fx * x / z + camera.cx).astype(int)
    row = np.round(camera.fy * y / z + camera.cy).astype(int)
    colours = np.array(image).reshape(-1, 3)
    canvas = np.full((image.height + 1, image.width + 1, 3), 250, dtype=np.uint8)
    order = np.argsort(-z)  # the nearest are painted last
    seen = order[((row >= 0) & (row < image.height) & (column >= 0) & (column < image.width) & (z > 0.1))[order]]
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # dots of 2 x 2 pixels close most gaps
        canvas[row[seen] + down, column[seen] + right] = colours[seen]
    return Image.fromarray(canvas[: image.height, : image.width])


MASK_SCENES = (("dog", 0), ("plane", 5), ("motorbike", 7), ("chair", 2), ("giraffe", 5))  # numbers in the test split
_BACKGROUND = "#2f7d5b"


def masks(page: Page) -> None:
    """Cut objects out of held-out scenes and photographs."""
    head, config = load_head("tiny-segmentation"), SegmentConfig(edges=True)
    figures = []
    for category, number in MASK_SCENES:
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


def _pictures(image: Image.Image, found: ObjectMask) -> list[Image.Image]:
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


COLLECTION = ("dog", "car", "plane", "bird", "chair", "person", "fish", "mug")
PER_CATEGORY = 4  # scenes of each in the collection
QUESTIONS = (("dog", "top of the head"), ("car", "front left wheel"), ("plane", "nose"))
_COLLECTION_SIZE = 128  # of the scenes, pixels
_FIRST_QUESTION = PER_CATEGORY // 2  # pairs before it are the collection's


def search(page: Page) -> None:
    """Extract a small collection, index its places, ask for parts; one contact sheet each."""
    backbone = load_backbone("tiny")
    figures = []
    with tempfile.TemporaryDirectory() as work:
        images = Path(work) / "collection"
        for category in COLLECTION:
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
            f"{done.images} rendered scenes, {PER_CATEGORY} of each of {len(COLLECTION)} categories, were extracted"
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
    return Image.fromarray(render_scene(seed, category=category, size=_COLLECTION_SIZE).image)


def _question(category: str, part: str) -> tuple[Image.Image, tuple[float, float]]:
    """A scene that is not in the collection and shows the part, and where it does."""
    for pair in scene_pairs("test", _FIRST_QUESTION + 12, categories=(category,))[_FIRST_QUESTION:]:
        scene = render_scene(pair[0], category=category, size=_COLLECTION_SIZE)
        shown = {n: p for n, p, seen in zip(scene.keypoint_names, scene.keypoints, scene.visible, strict=True) if seen}
        if part in shown:
            x, y = shown[part].tolist()
            return Image.fromarray(scene.image), (x, y)
    raise AssertionError(f"no held-out {category} shows its {part}")


PROBED = SceneImages(train=110, val=55, test=55, size=64)
TIMESTEPS = (10, 100, 400)
SHOWN_ANSWERS = 6  # test images whose answers are shown


def probed_blocks(page: Page) -> None:
    """Render a few scenes, probe every block at three timesteps, and show the heat map and some answers."""
    backbone = load_backbone("tiny")
    with tempfile.TemporaryDirectory() as work:
        data = scene_images(Path(work) / "scenes", settings=PROBED, progress=False)
        reading = Reading("tiny", None, TIMESTEPS, (1,), ExtractConfig(batch_size=32))
        found = ProbeData.read(data, {"tiny": backbone}, [reading], Path(work) / "features", progress=False)
        done = sweep(found, Path(work) / "sweep", progress=False)
        rows = list(found.split.test[:SHOWN_ANSWERS])
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
        f"{PROBED.train} small renderings of {len(data.classes)} categories train a linear classifier on the features"
        " of each block, at three noise levels; the noise level and the block are chosen on val. The best,"
        f" {done.best.tap} at t = {done.best.timestep}, names {100 * test['top1']:.0f} % of {test['n']} unseen test"
        f" images ({100 * test['low']:.0f}..{100 * test['high']:.0f} at 95 %; chance {100 / len(data.classes):.0f} %)."
        " The U-Net was trained on other scenes of these categories, among others to name their parts.",
    )
    heat_map = draw_heat_map(done.cells, title="what is it?")
    page.figures([(heat_map, "accuracy on val of one linear probe per block and timestep, %")], layout="wide")
    page.figures(shown, layout="small")
    page.code("diffrep probe sweep scenes\ndiffrep probe predict sweep/probe photo.jpg")


CELLS = ("boat", "fish", "car", "chair", "mug", "lamp", "plane", "dog", "bird")  # a reference of 3 x 3 held-out scenes
WHOLE = ("bird", 4)  # category of one more reference, and cells a side into which it is cut
BETWEEN = ("boat", "car")  # the strip leads from the look of one to that of the other
STRIP = (192, 960)  # pixels
PAINTING = SynthesisSettings()


def large_pictures(page: Page) -> None:
    """Paint three large pictures with the embedded model."""
    model = load_synthesis("tiny-synthesis")
    encoder = ImageEncoder.load(model.about.encoder or "tiny-dino", model.about.pooling)
    reference = mosaic(CELLS, columns=3)
    grid = encoder.grid(reference, (3, 3))
    painted = Image.fromarray(synthesize(model, grid, settings=PAINTING))
    category, side = WHOLE
    scene = mosaic([category], columns=1, size=side * model.window * model.factor)
    whole = Image.fromarray(synthesize(model, encoder.grid(scene, (side, side)), settings=PAINTING))
    strip = Image.fromarray(paint_strip(model, encoder, STRIP))
    figures = [
        (reference, "The reference: nine rendered scenes that no model has seen."),
        (painted, "Painted from the nine embeddings, one denoising for the whole picture."),
        (scene, f"Another reference: one scene, cut into {side} x {side} cells."),
        (whole, "Painted from its embeddings: alike neighbours flow into each other."),
        (strip, f"{STRIP[1]} x {STRIP[0]} pixels between the looks of a {BETWEEN[0]} and a {BETWEEN[1]}."),
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
    first, last = (encoder.grid(mosaic([name], columns=1), (1, 1)).embeddings[0, 0] for name in BETWEEN)
    cell = model.window * model.factor
    rows, columns = -(-size[0] // cell), -(-size[1] // cell)
    shares = torch.linspace(0, 1, columns)
    row = slerp(shares, first.expand(columns, -1), last.expand(columns, -1))
    return synthesize(model, EmbeddingGrid(row.expand(rows, -1, -1), encoder.name), size, PAINTING)


POINTS = 800


def map_of_a_sheet(page: Page) -> None:
    """Map a noisy swiss roll, with principal components beside."""
    from sklearn.decomposition import PCA

    roll = swiss_roll(POINTS, noise=0.3, dim=10)
    maps = {
        "principal components": PCA(2).fit_transform(roll.points),
        "heat-geodesic map": HeatGeodesicEmbedding(random_state=0).fit_transform(roll.points),
    }
    scores = {name: spearman(roll, points) for name, points in maps.items()}
    page.section(
        "Maps of high-dimensional data",
        f"{POINTS} noisy points of a rolled-up sheet in ten dimensions. Distances on the sheet are estimated from how"
        " heat spreads on the graph of neighbours, and the map keeps them. Rank correlation with the true distances: "
        + ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        + ".",
    )
    caption = (
        "The roll, colour along the sheet; its principal components, which leave it rolled up; its heat-geodesic map."
    )
    page.figures([(draw_sheet(roll, maps), caption)], layout="wide")
    page.code("diffrep embed table.csv -o map.png --color label\ndiffrep eval manifold")


def spearman(roll: ToyManifold, points: NDArray[Any]) -> float:
    """Rank correlation of the distances of a map with the true ones."""
    from scipy.spatial.distance import pdist, squareform

    return geodesic_scores(squareform(pdist(points)), roll.geodesic(), (10,))["spearman_mean_rows"]


def draw_sheet(roll: ToyManifold, maps: dict[str, NDArray[Any]]) -> Image.Image:
    """The clean sheet in three dimensions and the maps beside it, coloured along the sheet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    along = roll.position
    sheet: Any = figure.add_subplot(1, 1 + len(maps), 1, projection="3d")
    clean = roll.clean @ np.linalg.svd(roll.clean - roll.clean.mean(0), full_matrices=False)[2][:3].T
    sheet.scatter(*clean.T, c=along, s=6)
    sheet.set_title("the sheet")
    for number, (name, points) in enumerate(maps.items(), start=2):
        axes = figure.add_subplot(1, 1 + len(maps), number)
        axes.scatter(points[:, 0], points[:, 1], c=along, s=8, linewidths=0)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


SECTIONS = (depth_and_normals, masks, search, probed_blocks, large_pictures, map_of_a_sheet)  # in the page's order
