"""Multidimensional scaling: coordinates whose distances come as close as possible to those of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist, squareform

Array = NDArray[Any]
_TINY = 1e-12


def stress(distances: Array, embedding: Array, *, weights: Array | None = None, rescale: bool = True) -> float:
    """sqrt( sum_i<j w (D - s E)^2 / sum_i<j w D^2 ), E the distances in the embedding.

    Args:
        distances: (n, n); the diagonal does not count.
        embedding: (n, k).
        rescale: take the best s, as for an embedding without units; otherwise s is 1.
    """
    upper = np.triu_indices(len(embedding), 1)
    d, e = np.asarray(distances)[upper], pdist(embedding)
    w = np.ones_like(d) if weights is None else np.asarray(weights)[upper]
    if not (w * d**2).sum() > 0:
        return 0.0
    s = (w * d * e).sum() / max((w * e**2).sum(), _TINY) if rescale else 1.0
    return float(np.sqrt((w * (d - s * e) ** 2).sum() / (w * d**2).sum()))


def fix_signs(vectors: Array) -> Array:
    """Turn each column so that its largest entry is positive: the same picture on every machine."""
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def principal_axes(points: Array, *others: Array) -> tuple[Array, ...]:
    """Centre points and rotate them to their principal axes, with fixed signs; `others` move along."""
    centre = points.mean(axis=0)
    _, _, axes = np.linalg.svd((points - centre).T @ (points - centre))
    turned = (points - centre) @ axes.T
    signs = np.where(turned[np.abs(turned).argmax(axis=0), np.arange(turned.shape[1])] < 0, -1.0, 1.0)
    return turned * signs, *((other - centre) @ axes.T * signs for other in others)


def classical_mds(distances: Array, n_components: int = 2) -> NDArray[np.float64]:
    """Classical (Torgerson) scaling, from the eigenvectors of the double-centred -D^2 / 2."""
    values, vectors = _top_eigenvectors(-0.5 * _double_centred(distances), n_components)
    return _padded(fix_signs(vectors) * np.sqrt(np.maximum(values, 0)), n_components)


def squared_axes_start(distances: Array, n_components: int = 2) -> NDArray[np.float64]:
    """The official start of MDS: principal coordinates U S of the double-centred squared distances.

    Its axes are scaled by the eigenvalues instead of their roots, so it is a start and no solution.
    """
    centred = _double_centred(distances)
    centred -= centred.mean(axis=0)
    values, vectors = _top_eigenvectors(centred @ centred.T, n_components)
    return _padded(fix_signs(vectors) * np.sqrt(np.maximum(values, 0)), n_components)


def _double_centred(distances: Array) -> NDArray[np.float64]:
    squared = np.asarray(distances, dtype=np.float64) ** 2
    squared = (squared + squared.T) / 2
    return squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()


def _top_eigenvectors(matrix: Array, count: int) -> tuple[Array, Array]:
    from scipy.linalg import eigh

    n = len(matrix)
    if n > 400 and count < 10:
        from scipy.sparse.linalg import eigsh

        values, vectors = eigsh(matrix, k=count, which="LA", v0=np.random.default_rng(0).standard_normal(n))
    else:
        values, vectors = eigh(matrix, subset_by_index=(max(0, n - count), n - 1))
    return values[::-1], vectors[:, ::-1]


def _padded(coordinates: Array, n_components: int) -> Array:
    return np.pad(coordinates, ((0, 0), (0, n_components - coordinates.shape[1])))


def best_scale(distances: Array, start: Array, weights: Array | None = None) -> Array:
    """`start` times the factor that brings its distances closest to `distances`, in the sense of `stress`."""
    e = squareform(pdist(start))
    w = 1.0 if weights is None else weights
    fit = float((w * distances * e).sum() / max(float((w * e**2).sum()), _TINY))
    return start * fit if fit > 0 else start


def sgd_mds(
    distances: Array,
    start: Array,
    *,
    weights: Array | None = None,
    epochs: int = 30,
    rng: np.random.Generator,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Stress minimised by stochastic gradient descent over pairs (Zheng, Pawar and Goodman 2019).

    Every epoch visits every pair once, in rounds of disjoint pairs (a random round-robin tournament), so
    that a round is one vectorised step with exactly the effect of taking its pairs one after the other.

    Args:
        distances: (n, n), symmetric.
        start: (n, k).
        weights: (n, n) of positive pair weights.
        progress: called with 1 after each epoch.
    """
    n = len(start)
    x = np.array(start, dtype=np.float64)
    if n < 2:
        return x
    off_diagonal = ~np.eye(n, dtype=bool)
    w_min, w_max = (1.0, 1.0) if weights is None else (weights[off_diagonal].min(), weights[off_diagonal].max())
    steps = np.geomspace(1.0 / w_min, 0.01 / w_max, epochs)
    seats = n + n % 2  # an odd player out sits a round out
    for eta in steps:
        players = rng.permutation(seats)
        rounds = rng.permutation(seats - 1)
        for turn in rounds:
            table = np.r_[players[:1], np.roll(players[1:], turn)]
            i, j = table[: seats // 2], table[: seats // 2 - 1 : -1]
            if seats > n:
                playing = (i < n) & (j < n)
                i, j = i[playing], j[playing]
            difference = x[i] - x[j]
            length = np.sqrt(np.einsum("pk,pk->p", difference, difference))
            mu = min(eta, 1.0) if weights is None else np.minimum(weights[i, j] * eta, 1.0)
            move = (mu * (length - distances[i, j]) / (2 * np.maximum(length, _TINY)))[:, None] * difference
            x[i] -= move
            x[j] += move
        if progress is not None:
            progress(1)
    return x


def smacof(
    distances: Array,
    start: Array,
    *,
    weights: Array | None = None,
    max_iter: int = 300,
    tolerance: float = 1e-6,
) -> NDArray[np.float64]:
    """Stress minimised by majorisation (SMACOF): each step lowers it, the result depends on the start only.

    Args:
        tolerance: stop when a step lowers the stress (a squared sum, relative) by less.
    """
    d = np.asarray(distances, dtype=np.float64).copy()
    np.fill_diagonal(d, 0.0)
    n = len(d)
    x = np.array(start, dtype=np.float64)
    if n < 2 or not d.any():
        return x
    if weights is None:
        w: Any = 1.0
    else:
        w = np.array(weights, dtype=np.float64)
        np.fill_diagonal(w, 0.0)
        v = np.diag(w.sum(axis=1)) - w
        inverse = np.linalg.inv(v + 1.0 / n) - 1.0 / n
    total = float((w * d**2).sum())
    before = np.inf
    for _ in range(max_iter):
        e = squareform(pdist(x))
        now = float((w * (d - e) ** 2).sum()) / total
        if before - now < tolerance:
            break
        before = now
        ratio = w * d / np.maximum(e, _TINY)
        guttman = ratio.sum(axis=1)[:, None] * x - ratio @ x
        x = guttman / n if weights is None else inverse @ guttman
    return x


def metric_mds(
    distances: Array,
    start: Array,
    *,
    weights: Array | None = None,
    rng: np.random.Generator,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Stress minimised by `sgd_mds`, which finds the right valley, then `smacof`, which finds its floor."""
    valley = sgd_mds(distances, start, weights=weights, rng=rng, progress=progress)
    return smacof(distances, valley, weights=weights, max_iter=100)


def placement_stress(distances: Array, points: Array, anchors: Array, *, chunk: int = 1 << 22) -> float:
    """sqrt( sum (D - E)^2 / sum D^2 ) over points (n, k) and anchors (m, k), for distances (n, m)."""
    off = total = 0.0
    rows = max(1, chunk // max(len(anchors), 1))
    for begin in range(0, len(points), rows):
        d = np.asarray(distances[begin : begin + rows], dtype=np.float64)
        off += float(((d - cdist(points[begin : begin + rows], anchors)) ** 2).sum())
        total += float((d**2).sum())
    return float(np.sqrt(off / total)) if total > 0 else 0.0


def place_points(
    distances: Array,
    anchors: NDArray[np.float64],
    *,
    weights: Array | None = None,
    max_iter: int = 100,
    tolerance: float = 1e-4,
    chunk: int = 1 << 21,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Coordinates of points whose distances to fixed anchors are known, each row on its own.

    Minimises sum_l w_l (|x - a_l| - d_l)^2 per point by relaxed majorisation, from the average of the anchors
    weighted by d^-4.

    Args:
        distances: (n, m) to the anchors.
        anchors: (m, k).
        tolerance: a point rests when a step moves it by less, relative to the extent of the anchors.
        progress: called with the number of points placed.

    Returns:
        (n, k).
    """
    n, m = distances.shape
    placed = np.empty((n, anchors.shape[1]))
    shortest_move = tolerance * max(float(np.ptp(anchors, axis=0).max(initial=0.0)), _TINY)
    rows = max(1, chunk // max(m, 1))
    for begin in range(0, n, rows):
        block = slice(begin, min(begin + rows, n))
        d = np.asarray(distances[block], dtype=np.float64)
        w = None if weights is None else np.asarray(weights[block], dtype=np.float64)
        placed[block] = _place_block(d, anchors, w, max_iter, shortest_move)
        if progress is not None:
            progress(len(d))
    return placed


def _place_block(d: Array, anchors: Array, w: Array | None, max_iter: int, shortest_move: float) -> NDArray[np.float64]:
    near = 1.0 / np.maximum(d, 1e-6 * np.maximum(d.max(axis=1, keepdims=True), _TINY)) ** 4
    x = (near @ anchors) / near.sum(axis=1, keepdims=True)
    moving = np.arange(len(d))
    for step in range(max_iter):
        apart = cdist(x[moving], anchors)
        ratio = d[moving] / np.maximum(apart, _TINY)
        if w is None:
            pull, mass = 1.0 - ratio, np.full((len(moving), 1), float(len(anchors)))
        else:
            pull, mass = w[moving] * (1.0 - ratio), w[moving].sum(axis=1, keepdims=True)
        move = (pull @ anchors - pull.sum(axis=1, keepdims=True) * x[moving]) / mass
        # nearly twice the majorisation step converges about twice as fast; a plain step never overshoots
        x[moving] += move * (1.8 if step < max_iter // 2 else 1.0)
        moving = moving[np.sqrt((move**2).sum(axis=1)) > shortest_move]
        if not len(moving):
            break
    return x
