"""Operators and distances of related methods: PHATE, diffusion maps, random walks, shortest paths."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import shortest_path
from scipy.spatial.distance import pdist, squareform

from diffrep.manifold.distances import REFERENCE_FLOOR
from diffrep.manifold.graphs import Csr, neighbor_lengths
from diffrep.manifold.neighbors import NeighborSearch

Array = NDArray[Any]


def diffusion_operator(affinity: Csr) -> NDArray[np.float64]:
    """P = D^-1 K with K = W + I: the random walk that may stay where it is."""
    kernel = affinity.toarray() + np.identity(affinity.shape[0])
    return kernel / kernel.sum(axis=1, keepdims=True)


def von_neumann_entropy(operator: Array, t_max: int = 100) -> NDArray[np.float64]:
    """Entropy of the singular values of P^(t+1), normalised to sum one, for t = 0..t_max - 1."""
    singular = np.linalg.svd(operator, compute_uv=False)
    entropies = []
    for t in range(t_max):
        share = singular ** (t + 1)
        share = share / share.sum() + np.finfo(np.float64).eps
        entropies.append(-(share * np.log(share)).sum())
    return np.array(entropies)


def two_line_knee(curve: Array) -> int:
    """Where two least-squares lines, one on each side, fit a curve best in absolute error."""
    n = len(curve)
    x = np.arange(n, dtype=np.float64)

    def misfit(part: slice) -> float:
        slope, offset = np.polyfit(x[part], curve[part], 1)
        return float(np.abs(slope * x[part] + offset - curve[part]).sum())

    splits = range(1, n - 1)
    return min(splits, key=lambda k: misfit(slice(0, k + 1)) + misfit(slice(k, n)))


def phate_potential(operator: Array, t: int, *, gamma: float = 1.0) -> NDArray[np.float64]:
    """PHATE's potential of P^t, (n, m).

    -log P^t for gamma 1, P^t itself for gamma -1, (P^t)^c / c with c = (1 - gamma) / 2 otherwise.
    """
    power = np.linalg.matrix_power(operator, t)
    if gamma == 1:
        return -np.log(power + 1e-7)
    if gamma == -1:
        return power
    exponent = (1 - gamma) / 2
    return power**exponent / exponent


def cluster_transitions(affinity: Csr, clusters: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """PHATE's landmark operator for a clustering of the points.

    Returns:
        P_mn P_nm (m, m) on the clusters, and the transitions P_nm (n, m) from points to clusters; rows sum
        to one.
    """
    n = affinity.shape[0]
    names, member = np.unique(clusters, return_inverse=True)
    indicator = sp.csr_matrix((np.ones(n), (np.arange(n), member)), shape=(n, len(names)))
    pooled = (indicator.T @ (affinity + sp.identity(n))).toarray()
    to_points = pooled / pooled.sum(axis=1, keepdims=True)
    to_clusters = pooled.T / pooled.T.sum(axis=1, keepdims=True)
    return to_points @ to_clusters, to_clusters


def diffusion_map(affinity: Csr, t: float, n_components: int | None = None) -> NDArray[np.float64]:
    """Diffusion map coordinates lambda^t phi (n, components), the trivial constant one first; all where None.

    phi are the right eigenvectors of P, of unit length, as the official code takes them.
    """
    kernel = affinity.toarray() + np.identity(affinity.shape[0])
    degree = kernel.sum(axis=1)
    values, vectors = np.linalg.eigh(kernel / np.sqrt(np.outer(degree, degree)))
    order = np.argsort(-np.abs(values))[:n_components]
    right = vectors[:, order] / np.sqrt(degree)[:, None]
    right /= np.linalg.norm(right, axis=0)
    return right * np.sign(values[order]) ** round(t) * np.abs(values[order]) ** t


def random_walk_distances(
    affinity: Csr, t: int, *, kind: Literal["walk", "symmetric", "affinity"] = "symmetric"
) -> NDArray[np.float64]:
    """sqrt(-4t log A), A being P^t ("walk"), D^1/2 P^t D^-1/2 or the power of the normalised affinity."""
    kernel = affinity.toarray() + np.identity(affinity.shape[0])
    degree = kernel.sum(axis=1)
    symmetric = np.linalg.matrix_power(kernel / np.sqrt(np.outer(degree, degree)), t)
    walk = symmetric if kind != "walk" else symmetric * np.sqrt(degree)[None] / np.sqrt(degree)[:, None]
    return np.sqrt(np.maximum(-4.0 * t * np.log(walk + REFERENCE_FLOOR), 0))


def shortest_path_distances(
    search: NeighborSearch, n_neighbors: int = 10, *, indices: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Geodesics of a nearest-neighbour graph, as in Isomap; infinite between components.

    Args:
        indices: only from these points: (m, n) instead of (n, n).
    """
    return shortest_path(neighbor_lengths(search, n_neighbors), method="D", directed=False, indices=indices)


def row_distances(coordinates: Array) -> NDArray[np.float64]:
    """Euclidean distances between all rows, (n, n)."""
    return squareform(pdist(coordinates))
