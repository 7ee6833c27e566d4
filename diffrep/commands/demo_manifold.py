"""The part of the demo about maps of high-dimensional data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffrep.eval.manifold import geodesic_scores
from diffrep.eval.toy_manifolds import ToyManifold, swiss_roll
from diffrep.manifold import HeatGeodesicEmbedding
from diffrep.pages import Page

POINTS = 800


def section(page: Page) -> None:
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
    page.figures([(draw(roll, maps), caption)], layout="wide")
    page.code("diffrep embed table.csv -o map.png --color label\ndiffrep eval manifold")


def spearman(roll: ToyManifold, points: NDArray[Any]) -> float:
    """Rank correlation of the distances of a map with the true ones."""
    from scipy.spatial.distance import pdist, squareform

    return geodesic_scores(squareform(pdist(points)), roll.geodesic(), (10,))["spearman_mean_rows"]


def draw(roll: ToyManifold, maps: dict[str, NDArray[Any]]) -> Image.Image:
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
