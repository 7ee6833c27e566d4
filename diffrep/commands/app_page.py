"""The page of ``diffrep app``: what stands where, and what a click calls. Everything it calls is public.

A function that answers a click takes and gives what the page shows: paths of uploaded images, pictures, words. Gradio
reads its last arguments, the click (`gr.SelectData`) and the progress bar (`gr.Progress`), from the annotations.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from diffrep.cli import error_line
from diffrep.draw import draw_heat, draw_matches
from diffrep.features import Descriptors
from diffrep.heads.restoration.photograph import Photograph
from diffrep.images import load_image
from diffrep.index import contact_sheet, open_index, query_image
from diffrep.manifold.files import EmbedConfig, embed_file
from diffrep.matching import match_points, open_cells
from diffrep.recipes import RECIPES, Correspondence
from diffrep.scenes import held_out_pair, render_scene, scene_seed
from diffrep.similarity import similarities
from diffrep.store import Keep, extract_store
from diffrep.tasks import MODELS, TASKS, Pipeline, pipeline

# pixels that an upload may have: what a browser shows well, and a small machine bears
MAX_PIXELS = 40_000_000
LOOK = {  # no font and no script is fetched from elsewhere
    "theme": gr.themes.Soft(
        primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    "css": ".gradio-container {max-width: min(1200px, 100vw) !important; margin: 0 auto !important}"
    " .gradio-container main, .gradio-container .tabs {width: 100%; min-width: 0}"
    " .gradio-container .fillable {padding: 12px !important}"
    " #similarity .top-panel {top: 44px}"  # what the scale's upper end is stands above the buttons
    " #map iframe {width: 100%; height: 720px; border: 0}",
}
HEADS = [name for name in TASKS if name not in ("features", "correspondence")]  # image -> picture
EXAMPLE_PAIRS = (("dog", 2), ("chair", 3), ("car", 6))
EXAMPLE_SIDE = 448  # of them, pixels: what half the page shows
KINDS = ("dog", "chair", "car", "bird", "person", "boat")
COLLECTION = 48  # rendered images that are searched and mapped where no collection was named
Points = list[tuple[int, int]]
SHOWN = ("kind", "unit", "large_values_are", "frame", "axes", "object", "box")  # of what a result says of itself
_BAR, _BARS = gr.Progress(), gr.Progress(track_tqdm=True)  # the page's bar, and one that shows those of the work


@dataclass(frozen=True)
class Rooms:
    """What the page works with: a folder for everything it writes, the device, the collections to search and to map."""

    folder: Path
    device: str
    index: Path | None = None
    store: Path | None = None

    def examples(self) -> list[list[str]]:
        """Rendered pairs of objects as files."""
        pairs = []
        for category, number in EXAMPLE_PAIRS:
            pair = []
            for letter, scene in zip("ab", held_out_pair(category, number, EXAMPLE_SIDE), strict=True):
                file = self._files("examples") / f"{category}-{letter}.png"
                Image.fromarray(scene.image).save(file)
                pair.append(str(file))
            pairs.append(pair)
        return pairs

    def searched(self) -> Path:
        """The index that is searched: of the examples where none was named."""
        from diffrep.index import index_store
        from diffrep.store import open_store

        if self.index is not None:
            return self.index
        place = self.folder / "examples.index"
        if not place.exists():
            index_store([open_store(self._extracted("maps"))], place)
        return place

    def mapped(self) -> Path:
        """The store that is drawn as a map."""
        return self.store or self._extracted("pooled")

    def _extracted(self, kind: Any) -> Path:
        """A store of rendered images of several categories."""
        place = self.folder / f"examples.{kind}"
        if not place.exists():
            for number in range(COLLECTION):
                category = KINDS[number % len(KINDS)]
                scene = render_scene(scene_seed("val", 900 + number), category=category, size=128)
                Image.fromarray(scene.image).save(self._files(f"collection/{category}") / f"{number}.png")
            extract_store(
                [self.folder / "collection"], place, "tiny", keep=Keep(kind=kind), device=self.device, progress=True
            )
        return place

    def _files(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        return place


def build(rooms: Rooms, recipe: str) -> Any:
    """The page, not yet served."""
    examples = rooms.examples()
    with gr.Blocks(title="diffrep", analytics_enabled=False) as page:
        gr.Markdown(
            "## diffrep\nThe small models in the package answer; they have seen rendered scenes alone. Name a published"
            " model for photographs: it is fetched when you name it."
        )
        with gr.Tab("Match"):
            _matching(rooms, recipe, examples)
        with gr.Tab("Depth, normals, masks, restoration"):
            _heads(rooms, examples)
        with gr.Tab("Search"):
            _search(rooms, examples)
        with gr.Tab("Map"):
            _map(rooms)
    return page


def _matching(rooms: Rooms, recipe: str, examples: Sequence[Sequence[str]]) -> None:
    name = gr.Dropdown(list(RECIPES), value=recipe, label="recipe", allow_custom_value=True, elem_id="recipe")
    with gr.Row():
        a = _upload("click places here", "match-a", examples[0][0])
        b = _upload("matched here", "match-b", examples[0][1])
    clicked: Any = gr.State([])
    words = gr.Textbox(label="places", elem_id="match-words", interactive=False)
    with gr.Row():
        with gr.Column(scale=8):
            drawn = _answer("matches", "matches")
        with gr.Column(scale=5):
            heat = _answer("similarity to the last place", "similarity")

    def click(
        a: str | None, b: str | None, name: str, points: Points, event: gr.SelectData, progress: Any = _BAR
    ) -> Any:
        return matched(a, b, name, rooms.device, [*points, tuple(event.index)], progress)

    a.select(_in_one_line(click, rooms), [a, b, name, clicked], [drawn, heat, words, clicked], concurrency_id="model")
    for changed in (a.change, b.change, name.change):
        changed(lambda: (None, None, "", []), None, [drawn, heat, words, clicked], queue=False)
    gr.Examples([list(pair) for pair in examples], [a, b], label="rendered pairs", cache_examples=False)


def _heads(rooms: Rooms, examples: Sequence[Sequence[str]]) -> None:
    with gr.Row():
        task = gr.Radio(HEADS, value=HEADS[0], label="task", elem_id="task")
        model = gr.Dropdown(
            _models(HEADS[0]), value="", label="model (empty: in the package)", allow_custom_value=True, elem_id="model"
        )
    go = gr.Button("Run", variant="primary", elem_id="head-run")
    with gr.Row():
        image = _upload("image", "head-image", examples[0][0])
        answer = gr.ImageSlider(label="before | after", elem_id="head-answer", interactive=False, buttons=_BUTTONS)
    words = gr.Textbox(label="what it is", elem_id="head-words", interactive=False)

    def run(image: str | None, task: str, model: str, progress: Any = _BAR) -> Any:
        return head_answer(image, task, model, rooms.device, progress)

    go.click(_in_one_line(run, rooms), [image, task, model], [answer, words], concurrency_id="model")
    task.change(lambda task: gr.Dropdown(choices=_models(task), value=""), task, model, queue=False)
    gr.Examples([pair[:1] for pair in examples], [image], label="rendered scenes", cache_examples=False)


def _search(rooms: Rooms, examples: Sequence[Sequence[str]]) -> None:
    gr.Markdown(f"Searched: `{rooms.index}`" if rooms.index else "Searched: rendered examples; `--index` names others.")
    with gr.Row():
        with gr.Column(scale=1):
            image = _upload("click the part to look for", "search-image", examples[0][0])
        with gr.Column(scale=2):
            sheet = _answer("where it is", "search-answer")
    words = gr.Textbox(label="best", elem_id="search-words", interactive=False)

    def click(image: str | None, event: gr.SelectData, progress: Any = _BARS) -> Any:
        index, picture = open_index(rooms.searched()), _picture(image, "the image")
        progress(0.8, desc="search")
        hits = query_image(index, picture, point=event.index, k=8, device=rooms.device)
        return contact_sheet(picture, hits, point=event.index), ", ".join(hit.place.image for hit in hits[:3])

    image.select(_in_one_line(click, rooms), image, [sheet, words], concurrency_id="model")
    gr.Examples([pair[:1] for pair in examples], [image], label="rendered scenes", cache_examples=False)


def _map(rooms: Rooms) -> None:
    gr.Markdown(f"Drawn: `{rooms.store}`" if rooms.store else "Drawn: rendered examples; `--store` names others.")
    go = gr.Button("Draw the map", variant="primary", elem_id="map-run")
    shown = gr.HTML(elem_id="map")

    def draw(progress: Any = _BARS) -> str:
        text = embed_file(rooms.mapped(), config=EmbedConfig(color="folder"), progress=True).page()
        return f'<iframe sandbox="allow-scripts" title="map" srcdoc="{html.escape(text)}"></iframe>'

    go.click(_in_one_line(draw, rooms), None, shown, concurrency_id="model")


_BUTTONS: list[Any] = ["download", "fullscreen"]  # and none that sends a picture elsewhere


def _upload(label: str, name: str, value: str) -> Any:
    """A place for an image, read by `load_image` alone, whose messages name what is wrong."""
    image: Any = gr.Image(
        value, type="filepath", image_mode=None, label=label, elem_id=name, sources=["upload"], buttons=_BUTTONS
    )
    image.preprocess = lambda payload: payload and payload.path
    return image


def _answer(label: str, name: str) -> Any:
    return gr.Image(label=label, elem_id=name, interactive=False, format="png", buttons=_BUTTONS)


def _models(task: str) -> list[str]:
    """What may be written as the model of a task; a file of adapters needs a base beside it, and the command line."""
    names = [model.option.removeprefix("--model ") for model in MODELS if model.job == task]
    return ["", *(name for name in names if " " not in name)]


def _in_one_line(run: Callable[..., Any], rooms: Rooms) -> Callable[..., Any]:
    """The function, whose errors the page shows as one line, without the folders of uploads."""

    @functools.wraps(run)
    def guarded(*arguments: Any) -> Any:
        try:
            return run(*arguments)
        except Exception as error:  # the page's last handler, as `main` is the command line's
            line = re.sub(rf"{re.escape(str(rooms.folder))}\S*/", "", error_line(error))
            raise gr.Error(html.escape(line), duration=None, print_exception=False) from None

    return guarded


def matched(a: str | None, b: str | None, name: str, device: str, points: Points, progress: Any) -> Any:
    """The pictures of matches and similarities, words, and the points, of which the last is new."""
    images = _picture(a, "the first image"), _picture(b, "the second image")
    progress(0.1, desc="models")
    recipe = correspondence(name, device).recipe
    progress(0.4, desc="features")
    one, other = described(str(a), str(b), name, device)
    progress(0.8, desc="matches")
    matches = match_points(one, other, points, recipe.matching)
    similar = torch.full((other.size[0] * other.size[1],), torch.nan)
    inside = open_cells(other, None).cpu()  # padding is no place
    last = torch.tensor(points[-1:], dtype=torch.float32, device=one.device)
    similar[inside] = similarities(one.at(last), other.rows())[0].cpu()[inside]
    places = other.cell_centres().cpu()
    heat = draw_heat(images[1], similar.unflatten(0, other.size), places, points=matches.points[-1:])
    words = [
        f"{x},{y} -> {u:.0f},{v:.0f} (similarity {score:.2f})"
        for (x, y), (u, v), score in zip(points, matches.points.tolist(), matches.scores.tolist(), strict=True)
    ]
    return draw_matches(*images, torch.tensor(points, dtype=torch.float32), matches), heat, "; ".join(words), points


def head_answer(image: str | None, task: str, model: str, device: str, progress: Any) -> Any:
    """The image and its answer, for the slider, and words."""
    picture = _picture(image, "the image")
    progress(0.1, desc="model")
    loaded = head(task, model, device)
    progress(0.5, desc=task)
    result = loaded(picture)
    if isinstance(result, Photograph):
        facts = {"width": result.size[0], "height": result.size[1]}
    else:
        facts = {key: value for key, value in result.metadata().items() if key in SHOWN}
    answer = result.picture().convert("RGB")
    return (picture.resize(answer.size), answer), ", ".join(f"{key}: {value}" for key, value in facts.items())


@lru_cache(maxsize=2)
def correspondence(name: str, device: str) -> Correspondence:
    """A recipe with its backbones, which stay loaded."""
    return Correspondence(name.strip(), device=device)


@lru_cache(maxsize=4)
def described(a: str, b: str, name: str, device: str) -> tuple[Descriptors, ...]:
    """The descriptors of two uploads, for every click on them; an upload's path has a hash of its content."""
    return correspondence(name, device).describe(load_image(a), load_image(b))


@cache
def head(task: str, model: str, device: str) -> Pipeline:
    """A head, which stays loaded; the one in the package where no model is named."""
    return pipeline(task, model.strip() or None, device=device)


def _picture(path: str | None, which: str) -> Image.Image:
    if path is None:
        raise ValueError(f"{which} is missing: drop a file on its place, or take an example")
    return load_image(path, max_pixels=MAX_PIXELS)
