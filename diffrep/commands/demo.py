"""The page of ``diffrep demo``, section by section; `templates/demo.toml` has its words and says what is shown."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

import diffrep
from diffrep.alignment import align_depth
from diffrep.backbones import load_backbone
from diffrep.draw import draw_components, draw_field, draw_matches
from diffrep.eval.homography import HomographySettings, carry, photographs, see_through, view_homography
from diffrep.eval.manifold import geodesic_scores
from diffrep.eval.probe_data import SceneImages, scene_images
from diffrep.eval.restoration import psnr
from diffrep.eval.scene_maps import SCENE_BOUNDS
from diffrep.eval.segmentation import grey
from diffrep.eval.segmentation_metrics import score_image
from diffrep.eval.toy_manifolds import ToyManifold, swiss_roll
from diffrep.features import ExtractConfig
from diffrep.files import check_writable, read_settings, write_image
from diffrep.fusion import fuse
from diffrep.heads.loading import load_head
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.probes import ProbeData, ReadPlan, draw_heat_map, load_probe, sweep
from diffrep.heads.restoration.photograph import Photograph
from diffrep.heads.restoration.restorer import resized
from diffrep.heads.segmentation import ObjectMask, SegmentConfig, composite, cut_out, grey_image
from diffrep.heads.training.restoration import PairSettings, degraded
from diffrep.images import load_image
from diffrep.index import contact_sheet, index_store, query_image
from diffrep.manifold import HeatGeodesicEmbedding
from diffrep.manifold.files import figure_image
from diffrep.matching import Matches, match_dense, match_points
from diffrep.pictures import GAP, HEIGHT, Page, side_by_side, stacked
from diffrep.recipes import Correspondence, Recipe, alone
from diffrep.scenes import UNSEEN, Scene, held_out_pair, render_scene, scene_pairs, scene_seed, shared_keypoints
from diffrep.store import BulkConfig, Keep, extract_store, open_store
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, load_synthesis, slerp, synthesize
from diffrep.synthesis.grids import ImageEncoder

WORDS = read_settings(Path(diffrep.__file__).parent / "templates" / "demo.toml")
Figure = tuple[Image.Image, str]  # picture, caption
Layout = Literal["", "wide", "three", "small"]  # as `Page.figures` has it
Group = tuple[Sequence[Figure], Layout]


def build_page(correspondence: Correspondence) -> Page:
    """Run everything that the page shows."""
    page = Page(WORDS["page"]["title"], WORDS["page"]["text"])
    with tqdm(total=len(SECTIONS) + 3, desc="demo", unit="part") as bar:
        for matching in (different_objects, dense_matches, photographs_again):
            matching(page, correspondence)
            bar.update()
        for section in SECTIONS:
            section(page)
            bar.update()
    page.section(WORDS["yourself"]["title"])
    page.code(WORDS["yourself"]["code"])
    return page


def _section(page: Page, name: str, *groups: Group, **values: object) -> None:
    """A section with its words, in which the values are filled in, its figures, and what to type for it."""
    words = WORDS[name]
    page.section(words["title"], words["text"].format(**values))
    for figures, layout in groups:
        page.figures(figures, layout=layout)
    if "code" in words:
        page.code(words["code"])


def _shown(file: str) -> str:
    """A photograph's file as a caption has it."""
    return Path(file).stem.replace("_", " ")


def _note(category: str) -> str:
    return ", a category it never saw" if category in UNSEEN else ""


ALPHA = 0.1  # a match is right within this share of the longer side of the object's box


def methods_of(whole: Recipe) -> dict[str, Recipe]:
    """Name for a reader -> recipe: each backbone alone, then all of them."""
    names = ["diffusion", "DINO"] if len(whole.readings) == 2 else [r.backbone for r in whole.readings]
    single = {name: alone(whole, i, name) for i, name in enumerate(names)} if len(names) > 1 else {}
    return single | {"fused" if single else names[0]: whole}


def different_objects(page: Page, correspondence: Correspondence) -> None:
    """Match keypoints of held-out pairs with each backbone alone and with all, and count what is right."""
    words, whole = WORDS["pairs"], correspondence.recipe
    methods = methods_of(whole)
    layout: Layout = "three" if len(methods) == 3 else ""
    hits: dict[str, list[int]] = {name: [] for name in methods}
    figures = []
    for category, number in words["shown"]:
        a, b = held_out_pair(category, number)
        points, truth = map(torch.from_numpy, shared_keypoints(a, b))
        tolerance = ALPHA * max(b.box[2] - b.box[0], b.box[3] - b.box[1])
        features, answers = list(correspondence.features([a.image, b.image])), {}
        for name, recipe in methods.items():
            wanted = {reading.backbone for reading in recipe.readings}
            used = [i for i, reading in enumerate(whole.readings) if reading.backbone in wanted]
            source, target = fuse([tuple(entry[i] for i in used) for entry in features], recipe.fusion)
            answers[name] = match_points(source, target, points, recipe.matching)
        views = close_up(a, points), close_up(b, truth, *(matches.points for matches in answers.values()))
        images = [Image.fromarray(scene.image).crop(view) for scene, view in zip((a, b), views, strict=True)]
        start, end = (torch.tensor(view[:2]) for view in views)
        for name, matches in answers.items():
            right = (torch.linalg.vector_norm(matches.points - truth, dim=1) <= tolerance).int().tolist()
            hits[name] += right
            values = {"category": category, "note": _note(category), "right": sum(right), "count": len(right)}
            moved = replace(matches, points=matches.points - end)
            picture = _matched(images, points - start, moved, truth - end, tolerance, layout)
            figures.append((picture, words["caption"].format(name=name, **values)))
    _section(page, "pairs", (figures, layout), alpha=ALPHA)
    shares = {name: sum(right) / max(len(right), 1) for name, right in hits.items()}
    page.text(words["counted"].format(pairs=len(words["shown"]), count=len(next(iter(hits.values())))))
    best = list(shares).index(max(shares, key=lambda name: shares[name]))
    page.table(["features", "right"], [[n, f"{100 * s:.0f} %"] for n, s in shares.items()], best=best)


def close_up(scene: Scene, *points: torch.Tensor) -> tuple[int, int, int, int]:
    """The square of a scene (left, top, right, bottom) that holds its object and points (N, 2), with a margin."""
    places = torch.cat([torch.tensor(scene.box, dtype=torch.float32).view(2, 2), *points])
    low, high = places.amin(0), places.amax(0)
    side = min(round(1.2 * float((high - low).max())), *scene.mask.shape)
    left, top = (
        min(max(round(middle - side / 2), 0), length - side)
        for middle, length in zip(((low + high) / 2).tolist(), reversed(scene.mask.shape), strict=True)
    )
    return left, top, left + side, top + side


def _matched(
    images: Sequence[Image.Image],
    points: torch.Tensor,
    matches: Matches,
    truth: torch.Tensor,
    tolerance: float,
    layout: Layout,
) -> Image.Image:
    """`draw_matches`, with numbers that have one size on the page, however wide the images are."""
    wide = sum(HEIGHT * image.width / image.height for image in images)
    marks = wide / (350 if layout == "three" else 600)  # about as wide as the page shows them
    source, target = images
    return draw_matches(source, target, points, matches, truth=truth, tolerance=tolerance, marks=marks)


def dense_matches(page: Page, correspondence: Correspondence) -> None:
    """Joint components and dense matches of a few of the pairs."""
    figures = []
    for category, number in WORDS["pairs"]["shown"][:3]:
        a, b = held_out_pair(category, number)
        images = [Image.fromarray(a.image), Image.fromarray(b.image)]
        source, target = correspondence.describe(*images)
        masks = torch.from_numpy(a.mask), torch.from_numpy(b.mask)
        dense = match_dense(source, target, correspondence.recipe.matching, source_mask=masks[0], mask=masks[1])
        rows = draw_components(images, [source, target]), draw_field(images[0], images[1], dense, mask=masks[1])
        figures.append((stacked(rows), category))
    _section(page, "dense", (figures, "three"))


def photographs_again(page: Page, correspondence: Correspondence) -> None:
    """Match real photographs with views of them through a known perspective."""
    views = Correspondence("tiny-views") if correspondence.recipe.name == "tiny" else correspondence
    figures = []
    for file, path in photographs().items():
        image = load_image(path)
        size = (image.height, image.width)
        matrix = view_homography(size, HomographySettings(rotation=15, zoom=(0.7, 0.85)), seed=1)
        view = Image.fromarray(see_through(np.array(image), matrix))
        x, y = torch.meshgrid(torch.linspace(0.2, 0.8, 3), torch.linspace(0.2, 0.8, 3), indexing="xy")
        truth = torch.stack([x.flatten() * size[1], y.flatten() * size[0]], dim=1)
        points = carry(torch.linalg.inv(matrix), truth).float()
        source, target = views.describe(image, view)
        matches = match_points(source, target, points, views.recipe.matching)
        cells = target.points(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        stride = float((cells[1] - cells[0]).max())
        median = float(torch.linalg.vector_norm(matches.points - truth, dim=1).median())
        picture = _matched([image, view], points, matches, truth, stride, "three")
        values = {"name": _shown(file), "median": median, "strides": median / stride, "width": image.width}
        figures.append((picture, WORDS["photographs"]["caption"].format(**values)))
    _section(page, "photographs", (figures, "three"))


ROW = 1150  # pixels, of a row of pictures: about as wide as the page shows it


def _row(words: dict[str, Any], pictures: Sequence[Image.Image], kind: str, width: int, **values: object) -> Figure:
    """Pictures side by side under their titles; kind: "" of a scene, "_photograph" of a photograph."""
    room = width - GAP * (len(pictures) - 1)
    height = round(room / sum(picture.width / picture.height for picture in pictures))
    picture = side_by_side(pictures, titles=words[f"titles{kind}"], height=height)[0]
    return picture, words[f"caption{kind}"].format(**values)


def depth_and_normals(page: Page) -> None:
    """Predict depth and normals of held-out scenes and of photographs."""
    words, depth, normals = WORDS["maps"], load_head("tiny-depth"), load_head("tiny-normals")
    figures = []
    for category, number in words["shown"]:
        scene = render_scene(scene_seed("test", number), category=category, size=256)
        image = Image.fromarray(scene.image)
        predicted, truth = depth.predict(image), torch.from_numpy(scene.depth)
        assert isinstance(predicted, DepthMap)
        known = truth < SCENE_BOUNDS[1]
        metric = align_depth(predicted.values, truth, known, space="disparity", bounds=SCENE_BOUNDS)[0]
        error = 100 * float(((metric - truth).abs() / truth)[known].mean())
        true_normals = NormalMap(torch.from_numpy(scene.normals).permute(2, 0, 1), "rdf")
        maps = (*disparities(metric, truth), normals.predict(image), true_normals)
        pictures = [image, *(one.picture() for one in maps)]
        figures.append(_row(words, pictures, "", ROW, category=category, note=_note(category), error=error))
    for file, path in photographs().items():
        image = load_image(path)
        pictures = [image, *(head.predict(image).picture() for head in (depth, normals))]
        figures.append(_row(words, pictures, "_photograph", ROW // 3, name=_shown(file)))
    count = len(words["shown"])
    _section(page, "maps", (figures[:count], "wide"), (figures[count:], "three"))


def disparities(*depths: torch.Tensor) -> list[DepthMap]:
    """Depths (H, W) of a scene, the true one last, as disparity between the true one's 2 % and 98 % quantiles."""
    inverse = [1 / depth for depth in depths]  # 0 in the sky
    low, high = torch.quantile(inverse[-1], torch.tensor([0.02, 0.98])).tolist()
    return [DepthMap(((values - low) / max(high - low, 1e-5)).clamp(0, 1), "disparity") for values in inverse]


def masks(page: Page) -> None:
    """Cut objects out of held-out scenes and photographs."""
    words, head, config = WORDS["masks"], load_head("tiny-segmentation"), SegmentConfig(edges=True)
    figures = []
    for category, number in words["shown"]:
        scene = render_scene(scene_seed("test", number), category=category, size=256)
        image = Image.fromarray(scene.image)
        predicted = head.predict(image, config)
        truth = scene.mask.astype(np.uint8) * 255
        scores = score_image(grey(predicted.mask), truth).values
        values = {"note": _note(category), "maxf": scores["maxf"], "mae": scores["mae"]}
        pictures = [*_mask_pictures(image, predicted), Image.fromarray(truth)]
        figures.append(_row(words, pictures, "", ROW, category=category, **values))
    for file, path in photographs().items():
        image = load_image(path)
        pictures = _mask_pictures(image, head.predict(image, config))
        figures.append(_row(words, pictures, "_photograph", ROW, name=_shown(file)))
    _section(page, "masks", (figures, "wide"))


def _mask_pictures(image: Image.Image, predicted: ObjectMask) -> list[Image.Image]:
    assert predicted.edge is not None
    y, x = np.mgrid[: image.height, : image.width] // 12  # a checkerboard stands for transparency
    shade = np.where((x + y) % 2, 205, 240).astype(np.uint8)
    board = Image.fromarray(np.dstack([shade, shade, shade, np.full_like(shade, 255)]), "RGBA")
    return [
        image,
        grey_image(predicted.mask),
        grey_image(predicted.edge),
        Image.alpha_composite(board, cut_out(image, predicted.mask)),
        composite(image, predicted.mask, WORDS["masks"]["background"]),
    ]


def restored(page: Page) -> None:
    """Make degraded held-out scenes clean and large again."""
    words, head, settings = WORDS["restored"], load_head("tiny-restore"), PairSettings(clean=0.0)
    figures = []
    for category, number in words["shown"]:
        scene = render_scene(scene_seed("test", number), category=category, size=128)
        original = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)
        low = degraded(original, settings, number).permute(1, 2, 0).numpy()
        images = [
            resized(low, (original.shape[1], original.shape[2]), "bicubic"),
            head.predict(Photograph(low)).pixels,
            scene.image,
        ]
        bicubic, better = (psnr(torch.from_numpy(image).permute(2, 0, 1), original) for image in images[:2])
        values = {"note": _note(category), "bicubic": bicubic, "restored": better}
        figures.append(_row(words, [*map(Image.fromarray, images)], "", ROW // 2, category=category, **values))
    _section(page, "restored", (figures, ""))


PER_CATEGORY = 4  # scenes of each in the collection
_COLLECTION_SIZE = 128  # of the scenes, pixels
_FIRST_QUESTION = PER_CATEGORY // 2  # pairs before it are the collection's


def search(page: Page) -> None:
    """Extract a small collection, index its places, ask for parts; one contact sheet each."""
    words, backbone = WORDS["search"], load_backbone("tiny")
    figures = []
    with tempfile.TemporaryDirectory() as work:
        images, store = Path(work) / "collection", Path(work) / "store"
        for category in words["collection"]:
            pairs = scene_pairs("test", _FIRST_QUESTION, categories=(category,))
            for number, seed in enumerate(seed for pair in pairs for seed in pair[:2]):
                scene = render_scene(seed, category=category, size=_COLLECTION_SIZE)
                write_image(images / category / f"{number}.png", Image.fromarray(scene.image))
        bulk = BulkConfig(workers=0, shard_images=64)
        done = extract_store([images], store, backbone, keep=Keep(kind="maps"), bulk=bulk)
        places = index_store([open_store(store)], Path(work) / "index")
        for category, part in words["questions"]:
            picture, point = _question(category, part)
            hits = query_image(places, picture, point=point, k=10, backbone=backbone)
            wanted = [hit.place.image.startswith(f"{category}/") for hit in hits]
            same = sum(wanted[:PER_CATEGORY])
            caption = words["caption"].format(part=part, category=category, same=same, each=PER_CATEGORY)
            figures.append((contact_sheet(picture, hits, point=point, relevant=wanted), caption))
        values = {"places": len(places)}
    counts = {"images": done.images, "each": PER_CATEGORY, "categories": len(words["collection"])}
    _section(page, "search", (figures, "wide"), **values, **counts)


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
SHOWN_ANSWERS = 6  # test images whose answers are shown


def probed_blocks(page: Page) -> None:
    """Render a few scenes, probe every block at three timesteps, and show the heat map and some answers."""
    backbone = load_backbone("tiny")
    with tempfile.TemporaryDirectory() as work:
        data = scene_images(Path(work) / "scenes", settings=PROBED, progress=False)
        plan = ReadPlan("tiny", None, (10, 100, 400), (1,), ExtractConfig(batch_size=32))
        read = ProbeData.read(data, {"tiny": backbone}, [plan], Path(work) / "features", progress=False)
        done = sweep(read, Path(work) / "sweep", progress=False)
        rows = list(read.split.test[:SHOWN_ANSWERS])
        pictures = [load_image(Path(work) / "scenes" / data.images[row].name) for row in rows]
        answers = load_probe(Path(work) / "sweep" / "probe").predict(pictures, backbones={"tiny": backbone}).top(1)
    shown = []
    for row, picture, (top,) in zip(rows, pictures, answers, strict=True):
        truth = data.classes[data.labels[row]]
        verdict = "right" if top[0] == truth else f"it is a {truth}"
        shown.append((picture.resize((256, 256)), f"{top[0]}, {100 * top[1]:.0f} %: {verdict}"))
    heat_map, classes = draw_heat_map(done.cells, title="what is it?"), len(data.classes)
    shares = {name: 100 * done.result["test"][name] for name in ("top1", "low", "high")}
    values = {"tap": done.best.tap, "timestep": done.best.timestep, "n": done.result["test"]["n"]}
    values |= {"train": PROBED.train, "classes": classes, "chance": 100 / classes}
    groups: list[Group] = [([(heat_map, WORDS["blocks"]["caption"])], "wide"), (shown, "small")]
    _section(page, "blocks", *groups, **values, **shares)


WHOLE = ("bird", 4)  # category of one more reference, and cells a side into which it is cut
BETWEEN = ("boat", "car")  # the strip leads from the look of one to that of the other
STRIP = (192, 960)  # pixels
PAINTING = SynthesisSettings()


def large_pictures(page: Page) -> None:
    """Paint three large pictures with the embedded model."""
    words, model = WORDS["pictures"], load_synthesis("tiny-synthesis")
    encoder = ImageEncoder.load(model.about.encoder or "tiny-dino", model.about.pooling)
    reference = mosaic(words["cells"], columns=3)
    painted = synthesize(model, encoder.grid(reference, (3, 3)), settings=PAINTING)
    category, side = WHOLE
    scene = mosaic([category], columns=1, size=side * model.window * model.factor)
    whole = synthesize(model, encoder.grid(scene, (side, side)), settings=PAINTING)
    strip = paint_strip(model, encoder, STRIP)
    pictures = [reference, Image.fromarray(painted), scene, Image.fromarray(whole), Image.fromarray(strip)]
    figures = list(zip(pictures, words["captions"], strict=True))
    _section(page, "pictures", (figures[:4], ""), (figures[4:], "wide"))


def mosaic(categories: Sequence[str], *, columns: int, size: int = 128) -> Image.Image:
    """Held-out scenes of the given categories side by side."""
    seeds = [scene_seed("test", number) for number in range(len(categories))]
    tiles = [render_scene(seed, category=name, size=size).image for seed, name in zip(seeds, categories, strict=True)]
    rows = [np.concatenate(tiles[start : start + columns], axis=1) for start in range(0, len(tiles), columns)]
    return Image.fromarray(np.concatenate(rows))


def paint_strip(model: SynthesisModel, encoder: ImageEncoder, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) whose look changes from left to right."""
    first, last = (encoder.grid(mosaic([name], columns=1), (1, 1)).embeddings[0, 0] for name in BETWEEN)
    cell = model.window * model.factor
    rows, columns = -(-size[0] // cell), -(-size[1] // cell)
    row = slerp(torch.linspace(0, 1, columns), first.expand(columns, -1), last.expand(columns, -1))
    return synthesize(model, EmbeddingGrid(row.expand(rows, -1, -1), encoder.name), size, PAINTING)


POINTS = 800


def map_of_a_sheet(page: Page) -> None:
    """Map a noisy swiss roll, with principal components beside."""
    from scipy.spatial.distance import pdist, squareform
    from sklearn.decomposition import PCA

    roll = swiss_roll(POINTS, noise=0.3, dim=10)
    maps = {
        "principal components": PCA(2).fit_transform(roll.points),
        "heat-geodesic map": HeatGeodesicEmbedding(random_state=0).fit_transform(roll.points),
    }
    truth, distances = roll.geodesic(), {name: squareform(pdist(points)) for name, points in maps.items()}
    scores = {name: geodesic_scores(d, truth, (10,))["spearman_mean_rows"] for name, d in distances.items()}
    shown = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
    figures = [(draw_sheet(roll, maps), WORDS["sheet"]["caption"])]
    _section(page, "sheet", (figures, "wide"), points=POINTS, scores=shown)


def draw_sheet(roll: ToyManifold, maps: dict[str, NDArray[Any]]) -> Image.Image:
    """The clean sheet in three dimensions and the maps beside it, coloured along the sheet."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(12, 4), dpi=110, layout="constrained")
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
    return figure_image(figure)


SECTIONS = (
    depth_and_normals,
    masks,
    restored,
    search,
    probed_blocks,
    map_of_a_sheet,
    large_pictures,
)  # in the page's order


# -- `diffrep demo`: everything on bundled images, as one page with pictures ---------------------------------


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
        from diffrep.recipes import Correspondence

        build_page(Correspondence(self.recipe)).save(page_file)
        print(f"wrote {page_file.absolute()}: open it in a browser")
