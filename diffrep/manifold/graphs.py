"""Neighbourhood graphs, the edges that join their components, and their Laplacians.

A graph is its affinity matrix W: (n, n), CSR, float64, symmetric, non-negative, zero diagonal.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, dijkstra, shortest_path

from diffrep.manifold.neighbors import NeighborSearch, lengths_between

_SMALL = 256  # points; a component of at most so many is searched exhaustively for its nearest point outside
_STARTS = 16  # starting points of the alternating search in a larger one
_PILOT = 1_000  # queries from which it is guessed how many neighbours all need

Array = NDArray[Any]
LaplacianKind = Literal["normalized", "combinatorial"]
Csr: TypeAlias = Any  # scipy.sparse.csr_matrix, which scipy does not type


def alpha_decay_graph(
    space: NeighborSearch | NDArray[np.float64] | Csr,
    n_neighbors: int = 10,
    *,
    decay: float = 40.0,
    thresh: float = 1e-4,
    anisotropy: float = 0.0,
    threshold_average: bool = True,
) -> Csr:
    """The alpha-decay affinity of PHATE (Moon et al. 2019) between points.

    K_ij = exp(-(|x_i - x_j| / eps_i)^decay) with eps_i the distance to the `n_neighbors`-th neighbour,
    averaged with its transpose. With a decay of 40 this is nearly a plain nearest-neighbour graph.

    Args:
        space: the search over the points, or their (n, n) distances; pairs that a sparse matrix leaves out are far.
        thresh: smaller affinities are dropped.
        anisotropy: a in K_ij / (d_i d_j)^a, which takes out the density of the sample (1: completely).
        threshold_average: drop affinities below `thresh` once more after averaging and anisotropy, as HeatGeo
            does by handing the kernel on as a precomputed affinity; PHATE itself does not.
    """
    reach = reach_of(decay, thresh)
    if isinstance(space, NeighborSearch):
        rows, columns, lengths, bandwidth = neighbor_pairs(space, space.points, n_neighbors + 1, reach)
    else:
        rows, columns, lengths, bandwidth = _matrix_pairs(space, n_neighbors, reach)
    n = len(bandwidth)
    weights = np.exp(-((lengths / bandwidth[rows]) ** decay))
    keep = (weights >= thresh) & (rows != columns)
    directed = sp.csr_matrix((weights[keep], (rows[keep], columns[keep])), shape=(n, n))
    kernel = ((directed + directed.T) * 0.5 + sp.identity(n)).tocsr()
    if anisotropy:
        scale = sp.diags(np.asarray(kernel.sum(axis=1)).ravel() ** -anisotropy)
        kernel = (scale @ kernel @ scale).tocsr()
    if threshold_average:
        kernel.data[kernel.data < thresh] = 0
    return clean_affinity(kernel)


def _matrix_pairs(distances: Any, n_neighbors: int, reach: float) -> tuple[Array, Array, Array, Array]:
    """As `neighbor_pairs`, of a matrix of distances (n, n)."""
    n = distances.shape[0]
    shortest = max(float(distances.max()) * np.finfo(np.float64).eps, np.finfo(np.float64).tiny)  # copies have none
    if sp.issparse(distances):
        pairs = sp.coo_matrix(distances)
        order = np.lexsort((pairs.data, pairs.row))
        order = order[pairs.row[order] != pairs.col[order]]
        rows, columns, lengths = pairs.row[order], pairs.col[order], pairs.data[order].astype(np.float64)
        last = np.searchsorted(rows, np.arange(n), side="right") - 1
        at = np.minimum(np.searchsorted(rows, np.arange(n)) + n_neighbors - 1, last)
        bandwidth = np.append(lengths, 1.0)[np.where(np.bincount(rows, minlength=n) > 0, at, -1)]
    else:
        dense = np.array(distances, dtype=np.float64)
        np.fill_diagonal(dense, 0.0)
        bandwidth = np.partition(dense, n_neighbors, axis=1)[:, n_neighbors]
        rows, columns = np.nonzero(dense <= np.maximum(bandwidth, shortest)[:, None] * reach)
        lengths = dense[rows, columns]
    return rows, columns, lengths, np.maximum(bandwidth, shortest)


def reach_of(decay: float, thresh: float) -> float:
    """How many bandwidths away the alpha-decay kernel falls to `thresh`."""
    return float((-np.log(thresh)) ** (1.0 / decay))


def neighbor_pairs(search: NeighborSearch, queries: Any, rank: int, reach: float) -> tuple[Array, Array, Array, Array]:
    """Every pair (query i, point j) with j within `reach` bandwidths of i.

    Args:
        queries: (q, d).
        rank: the bandwidth of a query is the distance to its nearest point of this rank, counted from 1; one
            of the points counts itself.

    Returns:
        rows, columns and distances of the pairs, and the bandwidths (q,).
    """
    n, open_rows = search.points.shape[0], np.arange(queries.shape[0])
    k = min(n, 2 * rank)
    if len(open_rows) > _PILOT:
        k = _common_count(search, queries[:: len(open_rows) // _PILOT], k, rank, reach)
    bandwidth = np.zeros(len(open_rows))
    pairs: list[Any] = []
    while len(open_rows):
        distances, indices = search.query(queries[open_rows], k)
        if not pairs:
            bandwidth = np.maximum(distances[:, min(rank, n) - 1], np.finfo(np.float64).tiny)
        # where the kernel reaches beyond the neighbours found, ask again for more
        done = (distances[:, -1] > reach * bandwidth[open_rows]) | (k == n)
        near = distances[done] <= reach * bandwidth[open_rows[done], None]
        pairs.append((np.repeat(open_rows[done], near.sum(axis=1)), indices[done][near], distances[done][near]))
        open_rows, k = open_rows[~done], min(n, 4 * k)
    return *(np.concatenate(parts) for parts in zip(*pairs, strict=True)), bandwidth


def _common_count(search: NeighborSearch, some: Any, k: int, rank: int, reach: float) -> int:
    """As many neighbours as nearly all of these queries need, with a little to spare; `k` are tried first.

    In many dimensions distances are alike and the kernel reaches several times `rank` neighbours: to find that out
    with all points costs a whole search.
    """
    n = search.points.shape[0]
    while True:
        distances, _ = search.query(some, k)
        within = (distances <= reach * distances[:, min(rank, n) - 1, None]).sum(axis=1)
        most = int(np.quantile(within, 0.98))
        if most < k:
            return min(n, max(most * 5 // 4 + 1, 2 * rank))
        if k == n:
            return n
        k = min(n, 4 * k)


def out_of_sample_transitions(
    search: NeighborSearch, new: Any, n_neighbors: int, *, decay: float = 40.0, thresh: float = 1e-4
) -> Csr:
    """Row-stochastic weights (new, n) of new points on the points of `search`.

    They are the alpha-decay kernel with a bandwidth for each new point: the distance to the `n_neighbors`-th point,
    so that at least one weight is positive. A row depends on no other new point.
    """
    shape = (new.shape[0], search.points.shape[0])
    rows, columns, distances, bandwidth = neighbor_pairs(search, new, n_neighbors, reach_of(decay, thresh))
    weights = np.exp(-((distances / bandwidth[rows]) ** decay))
    kernel = sp.csr_matrix((weights, (rows, columns)), shape=shape)
    return (sp.diags(1.0 / np.asarray(kernel.sum(axis=1)).ravel()) @ kernel).tocsr()


def clean_affinity(affinity: Any) -> Csr:
    """CSR, float64, zero diagonal, no stored zeros, sorted indices; raises for what is no affinity."""
    graph = sp.csr_matrix(affinity, dtype=np.float64, copy=True)
    if graph.shape[0] != graph.shape[1]:
        raise ValueError(f"an affinity must be a square matrix, got shape {graph.shape}")
    if graph.nnz and not graph.data.min() >= 0:  # written so that NaN fails too
        raise ValueError(f"affinities must be non-negative numbers, got {graph.data.min():.4g}")
    asymmetry = abs(graph - graph.T)
    if asymmetry.nnz and asymmetry.max() > 1e-6 * graph.max():
        raise ValueError(f"an affinity must be symmetric, but W and its transpose differ by {asymmetry.max():.4g}")
    graph.setdiag(0)
    graph.eliminate_zeros()
    graph.sort_indices()
    return graph


def scaled_neighbor_graph(points: NDArray[np.float64], n_neighbors: int = 5) -> Csr:
    """PyGSP's graph: weights exp(-dist^2 / 0.1) on k neighbours of centred, rescaled points."""
    n, dims = points.shape
    centred = points - points.mean(axis=0)
    half_diagonal = 0.5 * np.linalg.norm(centred.max(axis=0) - centred.min(axis=0))
    centred = centred * (n ** (1.0 / min(dims, 3)) / 10.0 / max(half_diagonal, np.finfo(np.float64).tiny))
    distances, indices = NeighborSearch(centred, backend="sklearn").query(centred, n_neighbors + 1)
    rows = np.repeat(np.arange(n), distances.shape[1])
    weights = np.exp(-(distances.ravel() ** 2) / 0.1)
    directed = sp.csr_matrix((weights, (rows, indices.ravel())), shape=(n, n))
    return clean_affinity((directed + directed.T) * 0.5)


def laplacian(affinity: Csr, kind: LaplacianKind = "normalized") -> Csr:
    """Laplacian of a graph: I - D^-1/2 W D^-1/2 ("normalized") or D - W ("combinatorial").

    A point without any neighbour gets a zero row: heat stays on it.
    """
    degree = np.asarray(affinity.sum(axis=1)).ravel()
    if kind == "combinatorial":
        return (sp.diags(degree) - affinity).tocsr()
    if kind != "normalized":
        raise ValueError(f"laplacian must be 'normalized' or 'combinatorial', got {kind!r}")
    scale = sp.diags(np.where(degree > 0, 1.0 / np.sqrt(np.maximum(degree, np.finfo(np.float64).tiny)), 0.0))
    return (sp.diags((degree > 0).astype(np.float64)) - scale @ affinity @ scale).tocsr()


def largest_eigenvalue(matrix: Csr, *, tolerance: float = 0.0) -> float:
    """Largest eigenvalue of a Laplacian; `tolerance` is relative, 0 means to machine precision."""
    n = matrix.shape[0]
    if n <= 300:
        return float(max(np.linalg.eigvalsh(matrix.toarray())[-1], 0.0))
    start = np.random.default_rng(0).standard_normal(n)
    from scipy.sparse.linalg import eigsh

    (largest,) = eigsh(matrix, k=1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return float(max(largest, 0.0))


def hop_diameter(affinity: Csr, sweeps: int = 4) -> int:
    """Longest shortest path of the largest component, in edges; by repeated sweeps, so a lower bound."""
    _, labels = connected_components(affinity, directed=False)
    sizes = np.bincount(labels)
    start = int(np.flatnonzero(labels == sizes.argmax())[0])
    longest = 0
    for _ in range(sweeps):
        hops = dijkstra(affinity, directed=False, unweighted=True, indices=start)
        hops[~np.isfinite(hops)] = -1
        farthest = int(hops.argmax())
        if hops[farthest] <= longest:
            break
        longest, start = int(hops[farthest]), farthest
    return longest


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
    space: NeighborSearch | NDArray[np.float64], labels: Array, inside: Array, rng: np.random.Generator
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
            away = edge_lengths(space, i, outside)
            j = int(outside[away.argmin()])
            back = edge_lengths(space, j, inside)
            i, length = int(inside[back.argmin()]), float(back.min())
            if length < best[2]:
                best = (i, j, length)
            if not length < previous:
                break
            previous = length
    return best


def _longest_edge(space: NeighborSearch | NDArray[np.float64], graph: Csr, i: int) -> float:
    ends = graph.indices[graph.indptr[i] : graph.indptr[i + 1]]
    return float(edge_lengths(space, i, ends).max()) if len(ends) else 0.0


def edge_lengths(space: NeighborSearch | NDArray[np.float64], one: int, many: NDArray[np.int64]) -> Array:
    """Distances from the point `one` to the points `many`, (k,)."""
    if isinstance(space, NeighborSearch):
        return lengths_between(space.points, space.points[[one]], many)
    return space[one, many]


def neighbor_lengths(search: NeighborSearch, n_neighbors: int) -> Csr:
    """The nearest-neighbour graph (n, n) with Euclidean lengths."""
    n = search.points.shape[0]
    distances, neighbors = search.query(search.points, n_neighbors + 1)
    rows = np.repeat(np.arange(n), distances.shape[1])
    lengths = np.maximum(distances.ravel(), np.finfo(np.float64).tiny)  # a stored zero would be no edge
    graph = sp.csr_matrix((lengths, (rows, neighbors.ravel())), shape=(n, n))
    graph.setdiag(0)
    graph.eliminate_zeros()
    return graph


def graph_lengths(affinity: Csr, search: NeighborSearch | None, n_neighbors: int) -> Csr:
    """Lengths of edges for shortest paths: those of the nearest-neighbour graph, bridges of `affinity` included.

    Args:
        search: over the points of the graph; None: there are none, and the lengths are -log of the affinity.
    """
    if search is None:
        lengths = affinity.copy()
        lengths.data = -np.log(np.minimum(lengths.data / lengths.data.max(), 1 - 1e-9))
        return lengths
    lengths = neighbor_lengths(search, min(n_neighbors, search.points.shape[0] - 1))
    _, labels = connected_components(lengths, directed=False)
    edges = sp.triu(affinity).tocoo()
    bridge = labels[edges.row] != labels[edges.col]
    rows, columns = edges.row[bridge], edges.col[bridge]
    spans = [edge_lengths(search, i, np.array([j]))[0] for i, j in zip(rows, columns, strict=True)]
    return (lengths + sp.csr_matrix((spans, (rows, columns)), shape=lengths.shape)).tocsr()


def shortest_path_distances(
    search: NeighborSearch, n_neighbors: int = 10, *, indices: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Geodesics of a nearest-neighbour graph, as in Isomap; infinite between components.

    Args:
        indices: only from these points: (m, n) instead of (n, n).
    """
    return shortest_path(neighbor_lengths(search, n_neighbors), method="D", directed=False, indices=indices)
