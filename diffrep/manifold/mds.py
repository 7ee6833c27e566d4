"""Multidimensional scaling: coordinates whose distances come as close as possible to those of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist, squareform

Array = NDArray[Any]
Progress: TypeAlias = Callable[[Sequence[Any], str], Iterable[Any]]  # (steps, what they do) -> the steps, shown or not
_TINY = 1e-12
_ROUNDS = 64  # of a tournament, whose distances are looked up at once
_PARTNERS = 128  # of a point, in an epoch of the descent that another method finishes


def quiet(steps: Sequence[Any], what: str) -> Iterable[Any]:
    """A `Progress` that shows nothing."""
    return steps


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


def _signs(columns: Array) -> Array:
    """What turns each column so that its largest entry is positive: the same picture on every machine."""
    return np.where(columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])] < 0, -1.0, 1.0)


def principal_axes(points: Array, *others: Array) -> tuple[Array, ...]:
    """Centre points and rotate them to their principal axes, with fixed signs; `others` move along."""
    centre = points.mean(axis=0)
    _, _, axes = np.linalg.svd((points - centre).T @ (points - centre))
    turned = (points - centre) @ axes.T
    signs = _signs(turned)
    return turned * signs, *((other - centre) @ axes.T * signs for other in others)


def classical_mds(distances: Array, n_components: int = 2) -> NDArray[np.float64]:
    """Classical (Torgerson) scaling, from the eigenvectors of the double-centred -D^2 / 2."""
    return _principal_coordinates(-0.5 * _double_centred(distances), n_components)


def squared_axes_start(distances: Array, n_components: int = 2) -> NDArray[np.float64]:
    """The official start of MDS: principal coordinates U S of the double-centred squared distances.

    Its axes are scaled by the eigenvalues instead of their roots, so it is a start and no solution.
    """
    centred = _double_centred(distances)
    centred -= centred.mean(axis=0)
    return _principal_coordinates(centred @ centred.T, n_components)


def _double_centred(distances: Array) -> NDArray[np.float64]:
    squared = np.asarray(distances, dtype=np.float64) ** 2
    squared = (squared + squared.T) / 2
    return squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()


def _principal_coordinates(matrix: Array, count: int) -> NDArray[np.float64]:
    """(n, count): the largest eigenvectors, each times the root of its eigenvalue; zeros where there are no more."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    n = len(matrix)
    if n > 400 and count < 10:
        values, vectors = eigsh(matrix, k=count, which="LA", v0=np.random.default_rng(0).standard_normal(n))
    else:
        values, vectors = eigh(matrix, subset_by_index=(max(0, n - count), n - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    coordinates = vectors * _signs(vectors) * np.sqrt(np.maximum(values, 0))
    return np.pad(coordinates, ((0, 0), (0, count - coordinates.shape[1])))


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
    most_rounds: int | None = None,
    rng: np.random.Generator,
    progress: Progress = quiet,
) -> NDArray[np.float64]:
    """Stress minimised by stochastic gradient descent over pairs (Zheng, Pawar and Goodman 2019).

    Every epoch visits every pair once, in rounds of disjoint pairs (a round-robin tournament of shuffled players), so
    that a round is one vectorised step with exactly the effect of taking its pairs one after the other. Who plays whom
    is a slice, not a list of indices: all but the first player move on by one seat between rounds, those on one side of
    the table up and those on the other down, each side in a row that is longer, along which its seats move the other
    way.

    Args:
        distances: (n, n), symmetric.
        start: (n, k).
        weights: (n, n) of positive pair weights.
        most_rounds: of an epoch, which then visits as many partners of each point, drawn anew, and not all.
    """
    n = len(start)
    if n < 2:
        return np.array(start, dtype=np.float64)
    # columns in pairs, as complex numbers: half as many operations, of which there are many small ones
    x = np.ascontiguousarray(np.pad(start, ((0, 0), (0, start.shape[1] % 2))), dtype=np.float64).view(np.complex128)
    off_diagonal = ~np.eye(n, dtype=bool)
    w_min, w_max = (1.0, 1.0) if weights is None else (weights[off_diagonal].min(), weights[off_diagonal].max())
    ring, out = n + n % 2 - 1, n % 2  # an odd player's opponent, at the first seat, is nobody
    half = (ring + 1) // 2
    flat = np.ascontiguousarray(distances, dtype=np.float64).ravel()
    flat_weights = None if weights is None else np.ascontiguousarray(weights, dtype=np.float64).ravel()
    ups, downs = np.zeros((2, x.shape[1], _ROUNDS - 1 + half), dtype=np.complex128)
    up_places, down_places = ups.T, downs.T
    # both sides in each round, opponents at the same place: views that are made once
    seats = [(ups[:, _ROUNDS - 1 - k :][:, out:half], downs[:, k + out : k + half]) for k in range(_ROUNDS)]
    smallest, factors = np.full(half - out, _TINY), np.zeros(half - out, dtype=np.complex128)
    for eta in progress(np.geomspace(1.0 / w_min, 0.01 / w_max, epochs).tolist(), "scaling"):
        players = np.concatenate([np.full(out, n - 1), rng.permutation(n)])
        played = min(ring, most_rounds or ring)
        for turn in range(0, played, _ROUNDS):
            rounds = min(_ROUNDS, played - turn)
            around = np.roll(players[1:], turn)
            # before each round the last of the ring comes to its front: windows that move towards the front
            windows = sliding_window_view(np.concatenate([around[ring - rounds + 1 :], around]), ring)[::-1]
            firsts = np.broadcast_to(players[0], (rounds, 1))
            tables = np.concatenate([firsts, windows], axis=1)
            up_players, down_players = tables[:, :half], tables[:, : half - 1 : -1]
            pairs = up_players[:, out:] * n + down_players[:, out:]
            if flat_weights is None:
                shares = np.full(pairs.shape, min(eta, 1.0) / 2)
            else:
                shares = np.minimum(flat_weights.take(pairs) * eta, 1.0) / 2
            targets = flat.take(pairs) * shares
            up_places[_ROUNDS - 1 :], down_places[:half] = x[up_players[0]], x[down_players[0]]
            for k, (target, share) in enumerate(zip(targets, shares, strict=True)):
                if k:
                    first, last = _ROUNDS - k, k + half - 1
                    up_places[first - 1], up_places[first] = up_places[first], down_places[k - 1]
                    down_places[last] = up_places[first + half - 1]
                one, other = seats[k]
                difference = one - other
                lengths = np.abs(difference[0]) if len(ups) == 1 else np.sqrt((np.abs(difference) ** 2).sum(axis=0))
                np.maximum(lengths, smallest, out=lengths)
                np.divide(target, lengths, out=lengths)
                np.subtract(share, lengths, out=factors.real)
                np.multiply(difference, factors, out=difference)
                np.subtract(one, difference, out=one)
                np.add(other, difference, out=other)
            x[up_players[-1, out:]], x[down_players[-1]] = one.T, down_places[k : k + half]
    return x.view(np.float64)[:, : start.shape[1]].copy()


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
    w = inverse = None
    if weights is not None:
        w = np.array(weights, dtype=np.float64)
        np.fill_diagonal(w, 0.0)
        inverse = np.linalg.inv(np.diag(w.sum(axis=1)) - w + 1.0 / n) - 1.0 / n
    total = float(((1.0 if w is None else w) * d**2).sum())
    before, blocks = np.inf, row_blocks(n, n, 1 << 17)  # which stay in the cache
    for _ in range(max_iter):
        off, guttman = 0.0, np.empty_like(x)
        for block in blocks:
            e = cdist(x[block], x)
            missed = d[block] - e
            off += float(np.vdot(missed, missed if w is None else w[block] * missed))
            ratio = np.divide(d[block], np.maximum(e, _TINY, out=e), out=e)
            if w is not None:
                ratio *= w[block]
            guttman[block] = ratio.sum(axis=1)[:, None] * x[block] - ratio @ x
        if before - off / total < tolerance:
            break
        before = off / total
        x = guttman / n if inverse is None else inverse @ guttman
    return x


def metric_mds(
    distances: Array,
    start: Array,
    *,
    weights: Array | None = None,
    rng: np.random.Generator,
    progress: Progress = quiet,
) -> NDArray[np.float64]:
    """Stress minimised by `sgd_mds`, which finds the right valley, then `smacof`, which finds its floor.

    To find it, a point needs some hundred partners in each epoch, not all.
    """
    valley = sgd_mds(distances, start, weights=weights, most_rounds=_PARTNERS, rng=rng, progress=progress)
    return smacof(distances, valley, weights=weights, max_iter=100)


def row_blocks(n: int, m: int, numbers: int = 1 << 22) -> list[slice]:
    """Slices of rows of an (n, m) array with about `numbers` entries each."""
    rows = max(1, numbers // max(m, 1))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def placement_stress(distances: Array, points: Array, anchors: Array) -> float:
    """sqrt( sum (D - E)^2 / sum D^2 ) over points (n, k) and anchors (m, k), for distances (n, m)."""
    off = total = 0.0
    for block in row_blocks(*distances.shape):
        d = np.asarray(distances[block], dtype=np.float64)
        off += float(((d - cdist(points[block], anchors)) ** 2).sum())
        total += float((d**2).sum())
    return float(np.sqrt(off / total)) if total > 0 else 0.0


def place_points(
    distances: Array,
    anchors: NDArray[np.float64],
    *,
    max_iter: int = 100,
    tolerance: float = 1e-4,
    numbers: int = 1 << 21,
    progress: Progress = quiet,
) -> NDArray[np.float64]:
    """Coordinates (n, k) of points whose distances to fixed anchors are known, each row on its own.

    Minimises sum_l (|x - a_l| - d_l)^2 per point by relaxed majorisation, from the average of the anchors
    weighted by d^-4.

    Args:
        distances: (n, m) to the anchors.
        anchors: (m, k).
        tolerance: a point rests when a step moves it by less, relative to the extent of the anchors.
        numbers: distances that are worked on at once.
    """
    n, m = distances.shape
    placed = np.empty((n, anchors.shape[1]))
    shortest_move = tolerance * max(float(np.ptp(anchors, axis=0).max(initial=0.0)), _TINY)
    for block in progress(row_blocks(n, m, numbers), "placement"):
        d = np.asarray(distances[block], dtype=np.float64)
        near = 1.0 / np.maximum(d, 1e-6 * np.maximum(d.max(axis=1, keepdims=True), _TINY)) ** 4
        x = (near @ anchors) / near.sum(axis=1, keepdims=True)
        moving = np.arange(len(d))
        for step in range(max_iter):
            pull = 1.0 - d[moving] / np.maximum(cdist(x[moving], anchors), _TINY)
            move = (pull @ anchors - pull.sum(axis=1, keepdims=True) * x[moving]) / float(m)
            # nearly twice the majorisation step converges about twice as fast; a plain step never overshoots
            x[moving] += move * (1.8 if step < max_iter // 2 else 1.0)
            moving = moving[np.sqrt((move**2).sum(axis=1)) > shortest_move]
            if not len(moving):
                break
        placed[block] = x
    return placed


def mds_weights(
    kind: Literal["heat", "inverse", "gaussian"], distances: Array, heat: Array, argument: float = 1.0
) -> NDArray[np.float64]:
    """Weights of pairs in the stress, same shape as `distances`.

    "heat": H_ij + 1e-5. "inverse": D^-argument. "gaussian": exp(-E^2 / argument), E being D brought
    to [0, 1].
    """
    if kind == "heat":
        return np.maximum(heat, 0) + 1e-5
    if kind == "inverse":
        positive = np.asarray(distances, dtype=np.float64)
        smallest = positive[positive > 0].min(initial=1.0)
        return np.maximum(positive, smallest) ** -argument
    if kind == "gaussian":
        return np.exp(-(((distances - distances.min()) / np.ptp(distances)) ** 2) / argument)
    raise ValueError(f"mds_weights must be 'heat', 'inverse', 'gaussian' or None, got {kind!r}")
