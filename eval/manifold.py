"""How well an embedding keeps geodesics, clusters and trajectories, as Huguet et al. (NeurIPS 2023) count.

The scores, the single-cell protocol, and the benchmark on toy data: swiss rolls and trees, noise levels, dimensions,
many methods.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.special import logsumexp
from scipy.stats import rankdata
from tqdm import tqdm

from diffrep.eval.report import Report, Section
from diffrep.eval.toy_manifolds import ToyManifold, random_tree, swiss_roll
from diffrep.files import number_of
from diffrep.manifold import PRESETS, HeatGeodesicEmbedding
from diffrep.settings import check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
Embedder = Callable[[Array, int], tuple[Array | None, Array]]  # points, seed -> distances if any, embedding
Scores: TypeAlias = "Mapping[str, tuple[float, float]]"  # score -> mean and standard deviation over seeds

SCORES = ("spearman_mean_rows", "pearson_mean_rows", "P@10", "fro_scaled")


def row_spearman(distances: Array, truth: Array) -> float:
    """Mean over rows of Spearman's correlation with the true distances; the diagonal counts as it stands."""
    return row_pearson(rankdata(distances, axis=1), rankdata(truth, axis=1))


def row_pearson(distances: Array, truth: Array) -> float:
    """Mean over rows of Pearson's correlation with the true distances."""
    a = distances - distances.mean(axis=1, keepdims=True)
    b = truth - truth.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return float(np.mean((a * b).sum(axis=1) / np.maximum(scale, np.finfo(np.float64).tiny)))


def precision_at(distances: Array, truth: Array, k: int) -> float:
    """Share of each point's `k` true nearest points that are also its `k` nearest by `distances`."""
    itself = np.arange(len(truth))[:, None]
    orders = (np.argsort(matrix, axis=1, kind="stable") for matrix in (distances, truth))
    near, true_near = (order[order != itself].reshape(len(truth), -1)[:, :k] for order in orders)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(near, true_near, strict=True)]))


def geodesic_scores(distances: Array, truth: Array, ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
    """The official scores of an (n, n) distance matrix against the true one.

    Returns:
        spearman_mean_rows, pearson_mean_rows, P@k, fro_rel and inf_rel (norm of the difference over the norm of the
        truth: Frobenius, and largest row sum), the same differences over n^2, and fro_scaled, which is fro_rel after
        the best scaling of `distances`.
    """
    n, difference = len(truth), distances - truth
    best = (distances * truth).sum() / max(float((distances**2).sum()), np.finfo(np.float64).tiny)
    return {
        "spearman_mean_rows": row_spearman(distances, truth),
        "pearson_mean_rows": row_pearson(distances, truth),
        **{f"P@{k}": precision_at(distances, truth, k) for k in ks},
        "fro_rel": float(np.linalg.norm(difference) / np.linalg.norm(truth)),
        "inf_rel": float(np.linalg.norm(difference, np.inf) / np.linalg.norm(truth, np.inf)),
        "fro_over_n2": float(np.linalg.norm(difference) / n**2),
        "inf_over_n2": float(np.linalg.norm(difference, np.inf) / n**2),
        "fro_scaled": float(np.linalg.norm(best * distances - truth) / np.linalg.norm(truth)),
    }


def cluster_scores(embedding: Array, labels: Array, *, seed: int = 42) -> dict[str, float]:
    """k-means on the standardised embedding, with as many clusters as labels, against the labels.

    Returns:
        homogeneity, completeness, v_measure, ari, ami, and the silhouette of the clusters among the
        points before standardisation, which is what the official code measures.
    """
    from sklearn import metrics
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import scale

    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(scale(embedding))
    scores = {
        "homogeneity": metrics.homogeneity_score,
        "completeness": metrics.completeness_score,
        "v_measure": metrics.v_measure_score,
        "ari": metrics.adjusted_rand_score,
        "ami": metrics.adjusted_mutual_info_score,
    }
    against_labels = {name: float(score(labels, clusters)) for name, score in scores.items()}
    return {**against_labels, "silhouette": float(metrics.silhouette_score(embedding, clusters))}


def neighbor_accuracy(embedding: Array, labels: Array, *, k: int = 10, seed: int = 42) -> float:
    """Accuracy of a k-nearest-neighbour classifier on a third of the points, trained on the others."""
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import KNeighborsClassifier

    train, test, train_labels, test_labels = train_test_split(embedding, labels, test_size=1 / 3, random_state=seed)
    return float(KNeighborsClassifier(min(k, len(train))).fit(train, train_labels).score(test, test_labels))


def transport_cost(cost: Array) -> float:
    """Cost of the optimal transport between two clouds of equally weighted points, (n, m) costs, exactly."""
    import scipy.sparse as sp
    from scipy.optimize import linear_sum_assignment, linprog

    n, m = cost.shape
    if n == m:
        return float(cost[linear_sum_assignment(cost)].mean())
    margins = [sp.kron(sp.identity(n), np.ones((1, m))), sp.kron(np.ones((1, n)), sp.identity(m))]
    shares = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    solved = linprog(cost.ravel(), A_eq=sp.vstack(margins).tocsr(), b_eq=shares, method="highs")
    if not solved.success:
        raise RuntimeError(f"the transport problem between {n} and {m} points was not solved: {solved.message}")
    return float(solved.fun)


def entropic_plan(cost: Array, *, regularization: float = 0.1, iterations: int = 1000) -> NDArray[np.float64]:
    """Sinkhorn's transport plan (n, m) between equally weighted points, cost scaled to a maximum of 1."""
    log_kernel = -cost / cost.max() / regularization
    n, m = cost.shape
    u, v = np.zeros(n), np.zeros(m)
    for _ in range(iterations):
        u_before = u
        u = -np.log(n) - logsumexp(log_kernel + v, axis=1)
        v = -np.log(m) - logsumexp(log_kernel + u[:, None], axis=0)
        if np.abs(u - u_before).max() < 1e-9:
            break
    return np.exp(log_kernel + u[:, None] + v)


def interpolation_scores(predicted: Array, truth: Array) -> dict[str, float]:
    """Distances between two clouds of points (n, d) and (m, d).

    Returns:
        w1 (optimal transport), w2_squared_cost (transport of squared distances, no root, as published),
        mmd_rbf (gamma 1/d) and mmd_linear (squared distance of the means).
    """
    cost = cdist(predicted, truth)
    gamma = 1.0 / truth.shape[1]

    def kernel(a: Array, b: Array) -> float:
        return float(np.exp(-gamma * cdist(a, b, "sqeuclidean")).mean())

    rbf = kernel(predicted, predicted) + kernel(truth, truth) - 2 * kernel(predicted, truth)
    return {
        "w1": transport_cost(cost),
        "w2_squared_cost": transport_cost(cost**2),
        "mmd_rbf": rbf,
        "mmd_linear": float(((predicted.mean(axis=0) - truth.mean(axis=0)) ** 2).sum()),
    }


@dataclass(frozen=True)
class TimeInterpolation(Report):
    """Scores of each held-out time point, and the settings that gave them."""

    per_time: Mapping[Any, Mapping[str, float]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def mean(self) -> dict[str, float]:
        """Mean over the held-out time points."""
        names = next(iter(self.per_time.values()))
        return {name: float(np.mean([scores[name] for scores in self.per_time.values()])) for name in names}

    def sections(self) -> Iterator[Section]:
        """One table: rows are times, columns scores."""
        rows = {**{str(time): scores for time, scores in self.per_time.items()}, "mean": self.mean()}
        cells = [(name, *(f"{score:.4f}" for score in scores.values())) for name, scores in rows.items()]
        yield Section("", list(self.mean()), cells)

    def document(self) -> Mapping[str, object]:
        return {"per_time": self.per_time, "mean": self.mean(), "settings": self.settings}


def interpolate_times(
    embedding: Array,
    times: Array,
    *,
    regularization: float = 0.1,
    max_points: int | None = None,
    seed: int = 0,
) -> TimeInterpolation:
    """The single-cell protocol: predict each inner time point from its neighbours by transport.

    The embedding is standardised; between the points of the time before and those of the time after, an
    entropic transport plan is made, (n_before + n_after) / 2 pairs are drawn from it, and their midpoints
    are scored against the held-out points.

    Args:
        embedding: (n, d) of all points, also the held-out ones.
        times: (n,) when each point was taken, sortable.
        max_points: at most so many points of a time enter the scores, drawn at random; None: all.

    Raises:
        ValueError: there are fewer than three different times.
    """
    from sklearn.preprocessing import scale

    order = np.unique(times)
    if len(order) < 3:
        raise ValueError(f"interpolation needs at least three time points, got {len(order)}: {order.tolist()}")
    rng = np.random.default_rng(seed)
    points = scale(np.asarray(embedding, dtype=np.float64))
    per_time = {}
    for before, now, after in zip(order[:-2], order[1:-1], order[2:], strict=True):
        start, held_out, end = (points[times == when] for when in (before, now, after))
        plan = entropic_plan(cdist(start, end, "sqeuclidean"), regularization=regularization)
        pairs = rng.choice(plan.size, (len(start) + len(end)) // 2, p=plan.ravel() / plan.sum())
        i, j = np.unravel_index(pairs, plan.shape)
        predicted = (start[i] + end[j]) / 2
        if max_points is not None:
            predicted, held_out = (
                cloud[rng.choice(len(cloud), min(max_points, len(cloud)), replace=False)]
                for cloud in (predicted, held_out)
            )
        per_time[now.item() if hasattr(now, "item") else now] = interpolation_scores(predicted, held_out)
    return TimeInterpolation(per_time, {"regularization": regularization, "max_points": max_points, "seed": seed})


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
        check(self, points="50..")
        if unknown := sorted(set(self.methods) - set(methods())):
            raise ValueError(f"there is no method {', '.join(unknown)}, only {', '.join(methods())}")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"--seeds must be one or more whole numbers from 0, got {self.seeds or 'none'}")
        if not (self.roll_noise and self.roll_dims) and not (self.tree_noise and self.tree_dims):
            raise ValueError("--roll-noise with --roll-dims, or --tree-noise with --tree-dims, must name a data set")

    def data_sets(self, seed: int) -> dict[str, ToyManifold]:
        """Every data set of the table, for one seed."""
        sets = {}
        for dim in self.roll_dims:
            for noise in self.roll_noise:
                sets[f"roll {dim}-D, noise {noise:g}"] = swiss_roll(self.points, noise=noise, dim=dim, seed=seed)
        for dim in self.tree_dims:
            for noise in self.tree_noise:
                tree = random_tree(self.points // 5, noise=noise, dim=dim, seed=seed)
                sets[f"tree {dim}-D, noise {noise:g}"] = tree
        return sets


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
    scores: Mapping[str, Mapping[str, Mapping[str, Scores]]]
    seconds: Mapping[str, float]
    shown: Sequence[str] = ("spearman_mean_rows",)

    def sections(self) -> Iterator[Section]:
        """A table for each score: rows are data sets, columns methods, cells ``distance/embedding``."""
        for score in self.shown:
            rows = [(data, *(_cell(of[name], score) for name in self.seconds)) for data, of in self.scores.items()]
            rows.append(("processor seconds", *(f"{seconds:.1f}" for seconds in self.seconds.values())))
            size = f"{self.settings.points} points, {number_of(len(self.settings.seeds), 'seed')}"
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
    ours: dict[str, Embedder] = {name: partial(_preset, name) for name in PRESETS}
    others: dict[str, Embedder] = {"isomap": _isomap, "t-sne": _tsne, "pca": _pca}
    installed: dict[str, Embedder] = {"PHATE": _phate, "UMAP": _umap}
    return ours | others | {name: run for name, run in installed.items() if importlib.util.find_spec(name.lower())}


def evaluate_manifolds(settings: ManifoldSettings | None = None, *, progress: bool = False) -> ManifoldReport:
    """Embed every data set with every method and score distances and embeddings against the true geodesics."""
    settings = settings or ManifoldSettings()
    chosen = {name: run for name, run in methods().items() if not settings.methods or name in settings.methods}
    rows: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    tasks = [(seed, data) for seed in settings.seeds for data in settings.data_sets(seed).items()]
    for seed, (data, toy) in tqdm(tasks, disable=not progress, desc="embed"):
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
    scores = {
        data: {name: {part: _summary(rows) for part, rows in parts.items()} for name, parts in by_method.items()}
        for data, by_method in rows.items()
    }
    return ManifoldReport(settings, scores, {name: float(np.mean(s)) for name, s in seconds.items()})


def _cell(parts: Mapping[str, Scores], score: str) -> str:
    return "/".join(f"{parts[part][score][0]:.3f}" for part in ("distance", "embedding") if part in parts)


def _summary(rows: list[dict[str, float]]) -> Scores:
    return {s: (float(np.mean([r[s] for r in rows])), float(np.std([r[s] for r in rows]))) for s in SCORES}


def _preset(name: str, points: Array, seed: int) -> tuple[Array | None, Array]:
    fitted = HeatGeodesicEmbedding.preset(name, random_state=seed).fit(points)
    return fitted.heat_distances() if fitted.path_ == "exact" else None, fitted.embedding_


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
