"""The toy benchmark of geodesic embeddings: swiss rolls and trees, noise levels, dimensions, many methods."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from tqdm import tqdm

from diffrep.eval.manifold import geodesic_scores
from diffrep.eval.report import Report, Section
from diffrep.eval.toy_manifolds import ToyManifold, random_tree, swiss_roll
from diffrep.manifold import PRESETS, HeatGeodesicEmbedding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
Embedder = Callable[[Array, int], tuple[Array | None, Array]]  # points, seed -> own distances if any, embedding

SCORES = ("spearman_mean_rows", "pearson_mean_rows", "P@10", "fro_scaled")


@dataclass(frozen=True, kw_only=True)
class ManifoldSettings:
    """Which data and methods the table has."""

    points: int = 500  # per data set; published: 2,000 of a roll and 5 x 500 of a tree
    seeds: tuple[int, ...] = (47, 48, 49, 50, 51)  # the published test seeds
    roll_noise: tuple[float, ...] = (0.1, 0.5, 1.0)  # standard deviations of the swiss rolls
    roll_dims: tuple[int, ...] = (3, 10, 50)  # their dimensions after rotation
    tree_noise: tuple[float, ...] = (0.05, 0.1, 0.2)  # standard deviations of the trees
    tree_dims: tuple[int, ...] = (10, 30)  # their dimensions
    methods: tuple[str, ...] = ()  # empty: all that are installed

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.methods) - set(methods())):
            raise ValueError(f"there is no method {', '.join(unknown)}, only {', '.join(methods())}")
        if self.points < 50:
            raise ValueError(f"points must be at least 50, got {self.points}")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"--seeds must be one or more whole numbers from 0, got {self.seeds or 'none'}")
        if not (self.roll_noise and self.roll_dims) and not (self.tree_noise and self.tree_dims):
            raise ValueError("--roll-noise with --roll-dims, or --tree-noise with --tree-dims, must name a data set")

    def data_sets(self, seed: int) -> dict[str, ToyManifold]:
        """Every data set of the table, for one seed."""
        rolls = {
            f"roll {dim}-D, noise {noise:g}": swiss_roll(self.points, noise=noise, dim=dim, seed=seed)
            for dim in self.roll_dims
            for noise in self.roll_noise
        }
        trees = {
            f"tree {dim}-D, noise {noise:g}": random_tree(self.points // 5, noise=noise, dim=dim, seed=seed)
            for dim in self.tree_dims
            for noise in self.tree_noise
        }
        return rolls | trees


@dataclass(frozen=True)
class ManifoldReport(Report):
    """Mean and standard deviation over seeds of the scores of every method on every data set.

    Attributes:
        scores: data set -> method -> "distance" or "embedding" -> score -> (mean, standard deviation). Distances
            are those that the method itself works with, where it has any; the diagonal counts as zero.
        seconds: method -> mean processor seconds of one data set.
        shown: the scores that the tables show, one each.
    """

    settings: ManifoldSettings
    scores: Mapping[str, Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]]
    seconds: Mapping[str, float]
    shown: Sequence[str] = ("spearman_mean_rows",)

    def sections(self) -> Iterator[Section]:
        """A table for each score: rows are data sets, columns methods, cells ``distance/embedding``."""
        for score in self.shown:
            rows = [(data, *(_cell(of[name], score) for name in self.seconds)) for data, of in self.scores.items()]
            rows.append(("processor seconds", *(f"{seconds:.1f}" for seconds in self.seconds.values())))
            size = f"{self.settings.points} points, {len(self.settings.seeds)} seeds"
            yield Section(f"{score}, distance/embedding, {size}", list(self.seconds), rows)

    def document(self) -> Mapping[str, object]:
        return {"settings": self.settings, "scores": self.scores, "seconds": self.seconds}

    def plot(self, score: str = "spearman_mean_rows") -> Figure:
        """The embedding's score of every method on every data set, one group of bars per data set."""
        from matplotlib.figure import Figure

        names = list(self.seconds)
        figure = Figure(figsize=(1.2 * len(self.scores) + 3, 4.5), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        width = 0.85 / len(names)
        for k, name in enumerate(names):
            bars = [by_method[name]["embedding"][score] for by_method in self.scores.values()]
            x = np.arange(len(bars)) + (k - (len(names) - 1) / 2) * width
            mean, spread = zip(*bars, strict=True)
            axes.bar(x, mean, width, yerr=spread, label=name, error_kw={"linewidth": 0.8})
        axes.set_xticks(np.arange(len(self.scores)), list(self.scores), rotation=30, ha="right")
        axes.set_ylabel(f"{score} of the embedding")
        axes.legend(ncols=2, fontsize="small", loc="lower left")
        return figure


def methods() -> dict[str, Embedder]:
    """What can be compared here: our presets, scikit-learn's methods, PHATE and UMAP where they are installed."""
    ours = {name: _preset(name) for name in PRESETS}
    others: dict[str, Embedder] = {"isomap": _isomap, "t-sne": _tsne, "pca": _pca}
    if importlib.util.find_spec("phate"):
        others["PHATE"] = _phate
    if importlib.util.find_spec("umap"):
        others["UMAP"] = _umap
    return ours | others


def evaluate_manifolds(settings: ManifoldSettings | None = None, *, progress: bool = False) -> ManifoldReport:
    """Embed every data set with every method and score distances and embeddings against the true geodesics."""
    settings = settings or ManifoldSettings()
    chosen = {name: run for name, run in methods().items() if not settings.methods or name in settings.methods}
    rows: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    count = len(settings.data_sets(settings.seeds[0]))
    with tqdm(total=len(settings.seeds) * count * len(chosen), disable=not progress, desc="embed") as bar:
        for seed in settings.seeds:
            for data, toy in settings.data_sets(seed).items():
                truth = toy.geodesic()
                for name, run in chosen.items():
                    start = time.process_time()
                    with warnings.catch_warnings():  # noisy data do fall apart; the table shows what then comes out
                        warnings.simplefilter("ignore")
                        distances, embedding = run(toy.points, seed)
                    seconds[name].append(time.process_time() - start)
                    parts = rows.setdefault(data, {}).setdefault(name, {})
                    if distances is not None:
                        np.fill_diagonal(distances, 0.0)
                        parts.setdefault("distance", []).append(geodesic_scores(distances, truth, (10,)))
                    apart = squareform(pdist(embedding))
                    parts.setdefault("embedding", []).append(geodesic_scores(apart, truth, (10,)))
                    bar.update()
    scores = {
        data: {name: {part: _summary(rows) for part, rows in parts.items()} for name, parts in by_method.items()}
        for data, by_method in rows.items()
    }
    return ManifoldReport(settings, scores, {name: float(np.mean(s)) for name, s in seconds.items()})


def _cell(parts: Mapping[str, Mapping[str, tuple[float, float]]], score: str) -> str:
    distance = f"{parts['distance'][score][0]:.3f}/" if "distance" in parts else ""
    return f"{distance}{parts['embedding'][score][0]:.3f}"


def _summary(rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    return {s: (float(np.mean([r[s] for r in rows])), float(np.std([r[s] for r in rows]))) for s in SCORES}


def _preset(name: str) -> Embedder:
    def run(points: Array, seed: int) -> tuple[Array | None, Array]:
        fitted = HeatGeodesicEmbedding.preset(name, random_state=seed).fit(points)
        whole = fitted.heat_distances() if fitted.path_ == "exact" else None
        return whole, fitted.embedding_

    return run


def _isomap(points: Array, seed: int) -> tuple[Array | None, Array]:
    from sklearn.manifold import Isomap

    fitted = Isomap(n_neighbors=10).fit(points)
    return fitted.dist_matrix_, fitted.embedding_


def _tsne(points: Array, seed: int) -> tuple[Array | None, Array]:
    from sklearn.manifold import TSNE

    return None, TSNE(random_state=seed).fit_transform(points)


def _pca(points: Array, seed: int) -> tuple[Array | None, Array]:
    from sklearn.decomposition import PCA

    return squareform(pdist(points)), PCA(2).fit_transform(points)


def _phate(points: Array, seed: int) -> tuple[Array | None, Array]:
    import phate

    return None, phate.PHATE(random_state=seed, verbose=0).fit_transform(points)


def _umap(points: Array, seed: int) -> tuple[Array | None, Array]:
    import umap

    return None, umap.UMAP(random_state=seed).fit_transform(points)
