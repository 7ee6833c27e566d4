"""How well an embedding keeps geodesics, clusters and trajectories, as Huguet et al. (NeurIPS 2023) count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from diffrep.eval.report import Report, Section

Array = NDArray[Any]


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
    overlap = []
    for i, (row, true_row) in enumerate(zip(distances, truth, strict=True)):
        order, true_order = np.argsort(row, kind="stable"), np.argsort(true_row, kind="stable")
        near, true_near = order[order != i][:k], true_order[true_order != i][:k]
        overlap.append(len(np.intersect1d(near, true_near)) / k)
    return float(np.mean(overlap))


def geodesic_scores(distances: Array, truth: Array, ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
    """The official scores of an (n, n) distance matrix against the true one.

    Returns:
        spearman_mean_rows, pearson_mean_rows, P@k, fro_rel and inf_rel (norm of the difference over the
        norm of the
        truth: Frobenius, and largest row sum), the same differences over n^2, and fro_scaled, which is
        fro_rel after the best scaling of `distances`.
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

    standard = standardized(embedding)
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(standard)
    return {
        "homogeneity": float(metrics.homogeneity_score(labels, clusters)),
        "completeness": float(metrics.completeness_score(labels, clusters)),
        "v_measure": float(metrics.v_measure_score(labels, clusters)),
        "ari": float(metrics.adjusted_rand_score(labels, clusters)),
        "ami": float(metrics.adjusted_mutual_info_score(labels, clusters)),
        "silhouette": float(metrics.silhouette_score(embedding, clusters)),
    }


def neighbor_accuracy(embedding: Array, labels: Array, *, k: int = 10, seed: int = 42) -> float:
    """Accuracy of a k-nearest-neighbour classifier on a third of the points, trained on the others."""
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import KNeighborsClassifier

    train, test, train_labels, test_labels = train_test_split(embedding, labels, test_size=1 / 3, random_state=seed)
    return float(KNeighborsClassifier(min(k, len(train))).fit(train, train_labels).score(test, test_labels))


def standardized(points: Array) -> Array:
    """Zero mean and unit variance per column; constant columns become zero."""
    spread = points.std(axis=0)
    return (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def transport_cost(cost: Array) -> float:
    """Cost of the optimal transport between two clouds of equally weighted points, (n, m) costs, exactly."""
    n, m = cost.shape
    if n == m:
        from scipy.optimize import linear_sum_assignment

        return float(cost[linear_sum_assignment(cost)].mean())
    import scipy.sparse as sp
    from scipy.optimize import linprog

    rows = sp.kron(sp.identity(n), np.ones((1, m)))
    columns = sp.kron(np.ones((1, n)), sp.identity(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    solved = linprog(cost.ravel(), A_eq=sp.vstack([rows, columns]).tocsr(), b_eq=marginals, method="highs")
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
        u = -np.log(n) - _logsumexp(log_kernel + v)
        v = -np.log(m) - _logsumexp((log_kernel + u[:, None]).T)
        if np.abs(u - u_before).max() < 1e-9:
            break
    return np.exp(log_kernel + u[:, None] + v)


def _logsumexp(values: Array) -> Array:
    top = values.max(axis=1)
    return top + np.log(np.exp(values - top[:, None]).sum(axis=1))


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
    order = np.unique(times)
    if len(order) < 3:
        raise ValueError(f"interpolation needs at least three time points, got {len(order)}: {order.tolist()}")
    rng = np.random.default_rng(seed)
    points = standardized(np.asarray(embedding, dtype=np.float64))
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
