"""Heat-geodesic distances from every point to a few landmarks, in memory linear in the number of points.

Only the landmarks' columns of the heat kernel are computed. Heat that has not arrived, because a polynomial
of degree K sees K edges far and numbers have a smallest value, says only that a pair is far; such a pair
gets the length of the shortest path through other landmarks ("stitching").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, dijkstra, shortest_path

from diffrep.manifold.graphs import Csr
from diffrep.manifold.heat import chebyshev_tail

Array = NDArray[Any]

_STITCH = 12  # near landmarks over which a path to a far one may go
_SHEPARD = 8  # near landmarks from which the volume at a point is interpolated


@dataclass(frozen=True)
class Voronoi:
    """Which landmark each point is nearest to, in edges of the graph.

    Attributes:
        landmarks: (m,) indices of the points that are landmarks.
        owner: (n,) position in `landmarks` of the nearest one; -1 where none is connected.
        hops: (n,) edges to it; infinite where none is connected.
    """

    landmarks: NDArray[np.int64]
    owner: NDArray[np.int64]
    hops: NDArray[np.float64]

    @classmethod
    def of(cls, affinity: Csr, landmarks: NDArray[np.int64]) -> Voronoi:
        hops, _, sources = dijkstra(
            affinity,
            directed=False,
            unweighted=True,
            indices=landmarks,
            min_only=True,
            return_predecessors=True,
        )
        position = np.full(affinity.shape[0], -1)
        position[landmarks] = np.arange(len(landmarks))
        owner = np.where(sources >= 0, position[np.maximum(sources, 0)], -1)
        return cls(landmarks, owner, hops)

    def links(self, affinity: Csr) -> Csr:
        """(m, m) edges between landmarks whose cells touch; the length is the shortest such path in edges."""
        m = len(self.landmarks)
        pairs = sp.triu(affinity, 1).tocoo()
        a, b = self.owner[pairs.row], self.owner[pairs.col]
        touching = (a != b) & (a >= 0) & (b >= 0)
        a, b = a[touching], b[touching]
        length = self.hops[pairs.row[touching]] + self.hops[pairs.col[touching]] + 1
        order = np.lexsort((length, np.maximum(a, b), np.minimum(a, b)))
        low, high, length = np.minimum(a, b)[order], np.maximum(a, b)[order], length[order]
        first = np.r_[True, (low[1:] != low[:-1]) | (high[1:] != high[:-1])] if len(low) else []
        graph = sp.csr_matrix((length[first], (low[first], high[first])), shape=(m, m))
        return (graph + graph.T).tocsr()


def choose_landmarks(affinity: Csr, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Landmarks: three quarters at random, with every component having one, the rest where they are missing.

    Missing is where the next landmark is most edges away.

    Returns:
        (count,) sorted indices.
    """
    n = affinity.shape[0]
    _, labels = connected_components(affinity, directed=False)
    order = rng.permutation(n)
    first = np.sort(np.unique(labels[order], return_index=True)[1])
    chosen = np.concatenate([order[first], np.delete(order, first)])[: max(3 * count // 4, 1)]
    while len(chosen) < count:
        cells = Voronoi.of(affinity, chosen)
        hops = np.where(np.isfinite(cells.hops), cells.hops, n)
        far = np.argsort(-hops, kind="stable")
        _, first = np.unique(cells.owner[far], return_index=True)  # the farthest point of each cell
        batch = 1 if n <= 5_000 else max(4, count // 16)
        chosen = np.concatenate([chosen, far[np.sort(first)][: min(batch, count - len(chosen))]])
    return np.sort(chosen[:count])


def series_order(t: float, phi: float, smallest: float) -> int:
    """The Chebyshev order after which the rest of the series is below `smallest`."""
    low, high = 1, 8
    while chebyshev_tail(t, phi, high) > smallest:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chebyshev_tail(t, phi, middle) > smallest else (low, middle)
    return high


def landmark_diagonal(
    columns: Array, landmark_rows: Array, landmark_degree: Array, degree: Array
) -> NDArray[np.float64]:
    """H_ii of points from that of landmarks, interpolated where heat says that they are near.

    H_ii / degree_i (H_ii itself for the combinatorial Laplacian, pass ones) varies smoothly along the
    manifold; the eight nearest landmarks are averaged with weights 1 / s^2, s the squared distance up to a
    constant.

    Args:
        columns: (r, m) rows of heat columns; landmark_rows: (m, m) those of the landmarks.
        landmark_degree: (m,); degree: (r,).
    """
    diagonal = landmark_rows.diagonal().astype(np.float64) / landmark_degree
    scale = np.sqrt(np.outer(degree, landmark_degree)) * diagonal
    ratio = np.maximum(columns, 0) / scale
    k = min(_SHEPARD, columns.shape[1])
    near = np.argpartition(-ratio, k - 1, axis=1)[:, :k]
    gap = -np.log(np.maximum(np.take_along_axis(ratio, near, axis=1), np.finfo(np.float32).tiny))
    weights = 1.0 / np.maximum(gap, 1e-2) ** 2
    logs = (weights * np.log(diagonal[near])).sum(axis=1) / weights.sum(axis=1)
    return np.exp(logs) * degree


@dataclass(frozen=True)
class Stitching:
    """Distances between all landmarks, and how far points get theirs to landmarks out of reach.

    Attributes:
        between: (m, m) stitched distances; infinite between components.
        per_hop: the distance that one edge stands for, where heat reaches no landmark at all.
    """

    between: NDArray[np.float64]
    per_hop: float

    @classmethod
    def of(cls, distances: Array, near: NDArray[np.bool_], links: Csr) -> Stitching:
        """From the distances (m, m) that heat gives, which of them it reached, and `Voronoi.links`."""
        direct = np.where(near, distances, np.inf).astype(np.float64)
        direct = np.minimum(direct, direct.T)
        np.fill_diagonal(direct, 0.0)
        edges = links.tocoo()
        known = np.isfinite(direct[edges.row, edges.col]) & (direct[edges.row, edges.col] > 0)
        lengths = direct[edges.row[known], edges.col[known]]
        per_hop = float(np.median(lengths / edges.data[known])) if known.any() else 1.0
        missing = ~np.isfinite(direct[edges.row, edges.col])
        direct[edges.row[missing], edges.col[missing]] = per_hop * edges.data[missing]
        if np.isfinite(direct).all():
            return cls(direct, per_hop)
        graph = np.where(np.isfinite(direct), np.maximum(direct, 1e-12), 0.0)  # zero: no edge
        np.fill_diagonal(graph, 0.0)
        return cls(shortest_path(graph, method="D", directed=False), per_hop)

    def complete(
        self, distances: Array, near: NDArray[np.bool_], owner: NDArray[np.int64], hops: NDArray[np.float64]
    ) -> Array:
        """Fill the pairs of points (r, m) that heat did not reach, over the nearest landmarks that it did.

        Args:
            distances: (r, m), changed in place.
            near: (r, m), which of them are known.
            owner, hops: (r,) of `Voronoi`, for points that no landmark's heat reached.
        """
        lost = np.flatnonzero(~near.any(axis=1) & (owner >= 0))
        near[lost, owner[lost]] = True
        distances[lost, owner[lost]] = self.per_hop * hops[lost]
        open_rows = np.flatnonzero(~near.all(axis=1))
        if not len(open_rows):
            return distances
        masked = np.where(near[open_rows], distances[open_rows], np.inf)
        k = min(_STITCH, masked.shape[1])
        over = np.argpartition(masked, k - 1, axis=1)[:, :k]
        first = np.take_along_axis(masked, over, axis=1).astype(np.float64)
        path = np.full(masked.shape, np.inf)
        for column in range(k):
            np.minimum(path, first[:, column, None] + self.between[over[:, column]], out=path)
        distances[open_rows] = np.where(near[open_rows], distances[open_rows], path)
        return distances


def row_blocks(n: int, m: int, numbers: int = 1 << 22) -> list[slice]:
    """Slices of rows of an (n, m) array with about `numbers` entries each."""
    rows = max(1, numbers // max(m, 1))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def column_blocks(
    place: NDArray[np.int64],
    landmarks: NDArray[np.int64],
    apply: Callable[[Array], Array],
    *,
    dtype: Any,
    width: int,
) -> Array:
    """`apply` to unit signals at the landmarks, `width` of them at a time: (n, m).

    Args:
        place: (n,) where `apply` keeps each point.
    """
    n = len(place)
    columns = np.empty((n, len(landmarks)), dtype=dtype)
    order = np.argsort(place[landmarks], kind="stable")  # a block's landmarks lie together, so heat has few rows to go
    for start in range(0, len(landmarks), width):
        block = order[start : start + width]
        signals = np.zeros((n, len(block)), dtype=dtype)
        signals[place[landmarks[block]], np.arange(len(block))] = 1
        columns[:, block] = apply(signals)[place]
    return columns
