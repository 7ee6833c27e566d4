"""Pictures of features and matches, as PIL images that are pleasant to look at."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffrep.features import Descriptors, check_descriptors, lattice, numbers_of, sample
from diffrep.images import ImageLike, load_image
from diffrep.matching import DenseMatches, Matches
from diffrep.pictures import (
    GAP,
    HEIGHT,
    INK,
    PAPER,
    component_colours,
    paste_inside,
    shortened,
    side_by_side,
    sized_font,
    stacked,
)

RIGHT, WRONG, WHITE = (46, 160, 98), (214, 69, 65), (255, 255, 255)


def point_colours(count: int) -> list[tuple[int, int, int]]:
    """`count` colours that are easy to tell apart, always the same ones."""
    golden = 0.61803398875  # steps of the golden ratio never come near an earlier hue
    colours = [colorsys.hsv_to_rgb((0.58 + golden * i) % 1.0, 0.78, 0.95) for i in range(count)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours]


def draw_matches(
    source: ImageLike,
    target: ImageLike,
    points: Tensor | np.ndarray | Sequence[Sequence[float]],
    matches: Matches,
    *,
    truth: Tensor | None = None,
    tolerance: float | None = None,
    titles: Sequence[str] = (),
    height: int = HEIGHT,
    marks: float = 1.0,
) -> Image.Image:
    """The points of the source and where they went, numbered, joined by lines. Of places so near to each other that one
    number would hide another, the numbers stand beside them.

    Args:
        points: (N, 2) in pixels of the source.
        truth: (N, 2) where they should have gone. A match is then ringed green within `tolerance` pixels and
            red beyond, with a thin line to where it belongs.
        marks: factor of the size of dots, numbers and lines; 2 for a picture that is shown at half its size.
    """
    picture, places = side_by_side([load_image(source), load_image(target)], titles=titles, height=height)
    points = numbers_of(points, "(N, 2) as (x, y)")
    if not isinstance(matches, Matches) or matches.points.shape != points.shape:
        count = f"{len(matches.points)} matches" if isinstance(matches, Matches) else type(matches).__name__
        raise ValueError(f"{len(points)} points are drawn with as many Matches, got {count}")
    scale = 2  # drawn twice as large and reduced: PIL's lines have no antialiasing of their own
    large = [(left * scale, top * scale, zoom * scale) for left, top, zoom in places]
    unit = scale * marks  # of everything that is drawn
    line = max(round(2 * unit), 1)
    layer = Image.new("RGBA", (picture.width * scale, picture.height * scale), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    starts = [_at(large[0], point) for point in points.tolist()]
    ends = [_at(large[1], point) for point in matches.points.tolist()]
    colours = point_colours(len(points))
    for start, end, colour in zip(starts, ends, colours, strict=True):
        pen.line([start, end], fill=(*colour, 130), width=line)
    labels = [apart(places, 22 * unit, layer.size) for places in (starts, ends)]
    rings = [WHITE] * len(points)
    for i, (start, end, colour) in enumerate(zip(starts, ends, colours, strict=True)):
        if truth is not None:
            goal = truth[i].tolist()
            good = tolerance is not None and math.dist(matches.points[i].tolist(), goal) <= tolerance
            rings[i] = RIGHT if good else WRONG
            if not good:
                pen.line([end, _at(large[1], goal)], fill=(*WRONG, 230), width=line)
                _dot(pen, _at(large[1], goal), 3 * unit, WRONG, WHITE, unit)
        for place, label in ((start, labels[0][i]), (end, labels[1][i])):
            if math.dist(place, label) > scale:
                pen.line([place, label], fill=(*colour, 255), width=line)
                _dot(pen, place, 3 * unit, colour, WHITE, unit)
    for i, colour in enumerate(colours):  # the numbers last, so that no line or dot hides one
        _dot(pen, labels[0][i], 8 * unit, colour, WHITE, 2 * unit, str(i + 1))
        _dot(pen, labels[1][i], 8 * unit, colour, rings[i], (2 if truth is None else 3) * unit, str(i + 1))
    reduced = layer.resize(picture.size, Image.Resampling.LANCZOS)
    return Image.alpha_composite(picture.convert("RGBA"), reduced).convert("RGB")


def apart(
    places: Sequence[tuple[float, float]], least: float, size: tuple[int, int], *, rounds: int = 100
) -> list[tuple[float, float]]:
    """Places (x, y) of a picture (width, height) pushed away from each other until `least` pixels lie between any two,
    or all rounds are over; who has room stays.
    """
    moved = np.asarray(places, dtype=float).reshape(-1, 2)
    turns = 2.4 * np.arange(len(moved))  # which way places that coincide part
    away = np.stack([np.cos(turns), np.sin(turns)], -1)
    margin = min(least / 2, *(side / 2 for side in size))
    for _ in range(rounds):
        gaps = moved[:, None] - moved[None]
        distances = np.linalg.norm(gaps, axis=-1)
        lacking = (least - distances).clip(0)
        np.fill_diagonal(lacking, 0)
        if lacking.max(initial=0) < 0.5:
            break
        ways = np.where(distances[..., None] > 1e-3, gaps / np.maximum(distances, 1e-3)[..., None], away[:, None])
        pushed = moved + 0.5 * (lacking[..., None] * ways).sum(1)
        held = pushed.clip(margin, np.array(size) - margin)
        moved = np.where(lacking.any(1)[:, None], held, moved)
    return [(float(x), float(y)) for x, y in moved]


def _at(place: tuple[float, float, float], point: Sequence[float]) -> tuple[float, float]:
    """Where a point of an image lies in the picture; (left, top, scale) as `side_by_side` has them."""
    left, top, scale = place
    return left + scale * (point[0] + 0.5), top + scale * (point[1] + 0.5)


def _dot(
    pen: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    radius: float,
    colour: tuple[int, int, int],
    ring: tuple[int, int, int],
    width: float,
    label: str = "",
) -> None:
    x, y = centre
    # a white line keeps the ring's colour apart from the dot's
    for size, fill in ((radius + width, ring), (radius + width / 3, WHITE), (radius, colour)):
        pen.ellipse([x - size, y - size, x + size, y + size], fill=(*fill, 255))
    if label:
        dark = sum(share * value for share, value in zip((0.3, 0.59, 0.11), colour, strict=True)) < 115
        ink = WHITE if dark else (20, 20, 20)
        pen.text((x, y), label, fill=(*ink, 255), font=sized_font(round(radius * 1.25)), anchor="mm")


def colour_wheel(points: Tensor, box: tuple[float, float, float, float]) -> np.ndarray:
    """Colours (..., 3) uint8 of places (..., 2): the hue turns around the middle of a box, paler inside."""
    x0, y0, x1, y1 = box
    x = (points[..., 0].numpy() - (x0 + x1) / 2) / max(x1 - x0, 1e-6) * 2
    y = (points[..., 1].numpy() - (y0 + y1) / 2) / max(y1 - y0, 1e-6) * 2
    hue, radius = np.arctan2(y, x) / (2 * np.pi) % 1.0, np.clip(np.hypot(x, y), 0, 1)
    sector = (hue[..., None] * 6 + np.array([0.0, 4.0, 2.0])) % 6
    full = np.clip(np.abs(sector - 3) - 1, 0, 1)
    saturation = (0.25 + 0.75 * radius)[..., None]
    return np.nan_to_num(255 * (0.97 * (1 - saturation * (1 - full)))).astype(np.uint8)


def draw_field(
    source: ImageLike,
    target: ImageLike,
    dense: DenseMatches,
    *,
    mask: Tensor | None = None,
    titles: Sequence[str] = (),
    height: int = HEIGHT,
) -> Image.Image:
    """A dense field: the target wears a colour wheel, every place of the source the colour of where it went.

    Args:
        mask: (H, W) bool over the target: the wheel is laid over this region only.
    """
    if not isinstance(dense, DenseMatches):
        raise TypeError(f"a field is drawn of DenseMatches, which match_dense gives, got {type(dense).__name__}")
    source, target = load_image(source), load_image(target)
    places = lattice((target.height, target.width)).float()
    inside = np.ones(places.shape[:2], bool) if mask is None else mask.cpu().numpy().astype(bool)
    if not inside.any():
        raise ValueError("the mask of a dense picture is empty")
    (x0, y0), (x1, y1) = places[inside].amin(0).tolist(), places[inside].amax(0).tolist()
    on_target = _tint(target, colour_wheel(places, (x0, y0, x1, y1)), inside)
    field = colour_wheel(dense.points.cpu(), (x0, y0, x1, y1))
    valid = dense.valid.cpu().numpy()
    layers = np.concatenate([np.where(valid[..., None], field, 255), 255 * valid[..., None]], axis=-1)
    spread = spread_over(layers, dense.sources.cpu(), source.size)
    on_source = _tint(source, spread[..., :3], spread[..., 3] > 127)
    picture, _ = side_by_side([on_source, on_target], titles=titles, height=height)
    return picture


def spread_over(values: np.ndarray, places: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Values (h, w, C) of a regular grid of image points (h, w, 2) -> (H, W, C) for every pixel, bilinearly.

    Args:
        size: (width, height) of the image; the grid may reach beyond it (padding) or end inside.
    """
    step = (places[-1, -1] - places[0, 0]) / torch.tensor([places.shape[1] - 1, places.shape[0] - 1]).clamp(min=1)
    cells = (lattice((size[1], size[0])) - places[0, 0]) / step.clamp(min=1e-6)
    return sample(torch.from_numpy(values), cells).numpy()


def _tint(image: Image.Image, colours: np.ndarray, where: np.ndarray) -> Image.Image:
    """Colours laid over the greys of an image, so that its shapes stay visible."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    shaded = colours * (0.35 + 0.65 * grey)
    faded = 255 * (0.55 + 0.45 * grey)
    return Image.fromarray(np.where(where[..., None], shaded, faded).clip(0, 255).astype(np.uint8))


def draw_components(
    images: Sequence[ImageLike], descriptors: Sequence[Descriptors], *, height: int = HEIGHT
) -> Image.Image:
    """Three joint principal components of the images' descriptors as red, green and blue, below the images.

    Equal colours mean similar features, across images too.
    """
    check_descriptors(**{f"descriptors[{number}]": value for number, value in enumerate(descriptors)})
    pictures = [load_image(image) for image in images]
    colours = component_colours([d.vectors() for d in descriptors])
    maps = [
        colour.resize(image.size, Image.Resampling.BICUBIC) for image, colour in zip(pictures, colours, strict=True)
    ]
    return stacked([side_by_side(row, height=height)[0] for row in (pictures, maps)])


def draw_heat(
    image: ImageLike,
    values: Tensor,
    places: Tensor,
    *,
    limits: tuple[float, float] | None = None,
    points: Tensor | None = None,
    height: int = HEIGHT,
) -> Image.Image:
    """A map of numbers laid over an image, with its scale beside it: similarities to a point, errors, scores.

    Args:
        values: (h, w); where they are not finite the image stays grey.
        places: (h, w, 2), the image points (x, y) at which the values stand, as `cell_centres` gives them.
        limits: what the darkest and the brightest colour stand for; the smallest and largest value where None.
        points: (N, 2), places of the image that get a ring.

    Raises:
        ValueError: no value is finite, or the shapes do not go together.
    """
    image = load_image(image)
    if values.shape != places.shape[:2]:
        raise ValueError(f"values are {tuple(values.shape)}, their places {tuple(places.shape)}")
    finite = values.isfinite()
    if not bool(finite.any()):
        raise ValueError("a heat map needs at least one finite value")
    low, high = limits or (float(values[finite].min()), float(values[finite].max()))
    shares = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num(0.0)
    layers = torch.stack([shares * finite, finite.float()], dim=-1)
    spread = spread_over(layers.cpu().numpy(), places.cpu(), image.size)
    weight = spread[..., 1]
    heat = heat_colours(spread[..., 0] / np.maximum(weight, 1e-6))
    picture, (place,) = side_by_side([_tint(image, heat, weight > 0.5)], height=height)
    pen = ImageDraw.Draw(picture)
    for point in [] if points is None else points.tolist():
        _ring(pen, _at(place, point))
    return _with_scale(picture, low, high)


def heat_colours(shares: np.ndarray) -> np.ndarray:
    """Shares (...) in [0, 1] -> (..., 3) uint8, from near black over violet and orange to pale yellow.

    The lightness rises evenly, so that the order survives in grey and for colour-blind eyes.
    """
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(shares, stops, channel) for channel in np.array(_HEAT).T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


_HEAT = ((12, 8, 38), (66, 10, 104), (128, 31, 108), (188, 55, 84), (237, 105, 37), (251, 165, 27), (252, 245, 164))


def _ring(pen: ImageDraw.ImageDraw, centre: tuple[float, float]) -> None:
    x, y = centre
    for radius, colour, width in ((9, INK, 5), (8, WHITE, 3)):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=colour, width=width)


def _with_scale(picture: Image.Image, low: float, high: float) -> Image.Image:
    """The picture with a bar of the heat colours at its right, labelled with both ends."""
    bar, labels = 16, (f"{high:.3g}", f"{low:.3g}")
    room = GAP + bar + 8 + max(round(sized_font(14).getlength(label)) for label in labels) + 6
    wide = Image.new("RGB", (picture.width + room, picture.height), PAPER)
    wide.paste(picture, (0, 0))
    shares = np.linspace(1, 0, picture.height)[:, None].repeat(bar, axis=1)
    left = picture.width + GAP
    wide.paste(Image.fromarray(heat_colours(shares)), (left, 0))
    pen = ImageDraw.Draw(wide)
    pen.text((left + bar + 8, 4), labels[0], fill=INK, font=sized_font(14))
    pen.text((left + bar + 8, picture.height - 20), labels[1], fill=INK, font=sized_font(14))
    return wide


def draw_contact_sheet(
    image: Image.Image,
    results: Sequence[tuple[Image.Image | None, str, Sequence[float] | None]],
    *,
    point: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    columns: int = 5,
    side: int = 180,
    relevant: Sequence[bool] = (),
) -> Image.Image:
    """An image on the left, and beside it the images that answer it, in rows, best first.

    Args:
        results: (image, caption, place) each; an image that is gone is None, the place is (x, y) or None.
        point: marked in the image, (x, y) in its pixels.
        box: marked in the image, (x0, y0, x1, y1) in its pixels.
        side: of a result's square, pixels; the image itself gets twice as much.
        relevant: of each result whether it is one that was looked for; those get a green frame.
    """
    columns = max(1, min(columns, len(results)))
    rows, line = max(2, -(-len(results) // columns)), 26
    width, height = side + GAP, side + line + GAP  # of a result with its caption
    large = 2 * side + line
    sheet = Image.new("RGB", (large + 2 * GAP + columns * width + GAP, rows * height + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    place = paste_inside(sheet, image, (GAP, GAP), large)
    if point is not None:
        _ring(pen, _at(place, point))
    if box is not None:
        (x0, y0), (x1, y1) = _at(place, box[:2]), _at(place, box[2:])
        for inset, colour in ((-1, INK), (0, PAPER), (1, INK)):
            pen.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=colour)
    font = sized_font(13)
    for number, (picture, caption, marked) in enumerate(results):
        left, top = large + 3 * GAP + number % columns * width, GAP + number // columns * height
        if picture is None:
            pen.rectangle((left, top, left + side - 1, top + side - 1), outline=(200, 200, 196))
            pen.text((left + 8, top + side / 2), "the image is gone", fill=INK, font=font)
        else:
            place = paste_inside(sheet, picture, (left, top), side)
            if marked is not None:
                _ring(pen, _at(place, marked))
        if number < len(relevant) and relevant[number]:
            pen.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=RIGHT, width=3)
        pen.text((left, top + side + 4), shortened(caption, side, font), fill=INK, font=font)
    return sheet
