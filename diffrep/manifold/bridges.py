"""Edges between the components of a disconnected graph.

Heat never crosses between components, so that distances between them would be undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from diffrep.manifold.graphs import Csr, clean_affinity
from diffrep.manifold.neighbors import NeighborSearch

_SMALL = 256  # points; a component of at most so many is searched exhaustively
_STARTS = 16  # starting points of the alternating search in a larger one


def connect_components(
    affinity: Csr, space: NeighborSearch | NDArray[np.float64], *, thresh: float = 1e-4, seed: int = 0
) -> Csr:
    """Join the components of a graph by edges between closest points, as a minimum spanning tree would.

    In rounds, each component but the largest is joined to the point nearest to it outside. The weight of
    the new edge is 1 / (1 + r^2), r being its length over the longest edge that its ends already have, and
    at least `thresh`: it falls slowly, so that a wider gap is farther, but not out of all proportion. In
    components of more than 256 points the nearest pair is found by alternating nearest-point steps from 16
    random points, which may miss the very nearest.

    Args:
        space: the search over the points of the graph, or their (n, n) distances.
    """
    rng = np.random.default_rng(seed)
    graph = affinity
    while True:
        count, labels = connected_components(graph, directed=False)
        if count == 1:
            return graph
        sizes = np.bincount(labels)
        bridges = sp.lil_matrix(graph.shape)
        for label in np.delete(np.arange(count), sizes.argmax()):
            i, j, length = _nearest_outside(space, labels, np.flatnonzero(labels == label), rng)
            scale = max(_longest_edge(space, graph, i), _longest_edge(space, graph, j))
            weight = 1.0 / (1.0 + (length / scale) ** 2) if scale > 0 else thresh
            bridges[i, j] = bridges[j, i] = max(weight, thresh)
        graph = clean_affinity(graph + bridges.tocsr())


def _nearest_outside(
    space: NeighborSearch | NDArray[np.float64],
    labels: NDArray[np.int32],
    inside: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[int, int, float]:
    """The closest pair of a point inside a component and one outside, and their distance."""
    outside = np.flatnonzero(labels != labels[inside[0]])
    if not isinstance(space, NeighborSearch):
        between = space[np.ix_(inside, outside)]
        row, column = np.unravel_index(between.argmin(), between.shape)
        return int(inside[row]), int(outside[column]), float(between[row, column])
    if len(inside) <= _SMALL:  # of its len(inside) + 1 nearest points, at least one lies outside
        distances, indices = space.query(space.points[inside], len(inside) + 1)
        distances = np.where(labels[indices] != labels[inside[0]], distances, np.inf)
        row, k = np.unravel_index(distances.argmin(), distances.shape)
        if np.isfinite(distances[row, k]):  # an approximate search may have found none
            return int(inside[row]), int(indices[row, k]), float(distances[row, k])
    best: tuple[int, int, float] = (int(inside[0]), int(outside[0]), np.inf)
    for start in rng.choice(inside, min(_STARTS, len(inside)), replace=False):
        i, previous = int(start), np.inf
        while True:
            away = edge_lengths(space.points, i, outside)
            j = int(outside[away.argmin()])
            back = edge_lengths(space.points, j, inside)
            i, length = int(inside[back.argmin()]), float(back.min())
            if length < best[2]:
                best = (i, j, length)
            if not length < previous:
                break
            previous = length
    return best


def _longest_edge(space: NeighborSearch | NDArray[np.float64], graph: Csr, i: int) -> float:
    ends = graph.indices[graph.indptr[i] : graph.indptr[i + 1]]
    if not len(ends):
        return 0.0
    return float((edge_lengths(space.points, i, ends) if isinstance(space, NeighborSearch) else space[i, ends]).max())


def edge_lengths(points: Any, one: int, many: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distances from the point `one` to the points `many`, (k,)."""
    if not sp.issparse(points):
        return np.linalg.norm(points[many].astype(np.float64) - points[one], axis=1)
    difference = points[many] - sp.csr_matrix(np.ones((len(many), 1))) @ points[[one]]
    return np.sqrt(np.asarray(difference.multiply(difference).sum(axis=1)).ravel())
