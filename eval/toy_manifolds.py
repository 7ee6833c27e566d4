"""Toy manifolds whose true geodesic distances are known: noisy swiss rolls and random trees.

They repeat the draws of the official generators (Huguet et al., NeurIPS 2023; the tree is PHATE's), which use
NumPy's legacy random stream, so that a seed gives the published points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from diffrep.manifold.graphs import shortest_path_distances
from diffrep.manifold.neighbors import NeighborSearch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ToyManifold:
    """Points, what colours them in a picture, and the distances along the manifold that they were drawn from.

    Attributes:
        points: (n, d), with noise.
        labels: (n,) integers: the quarter of the roll (5 is its last point alone) or the branch of the tree.
        position: (n,) place along the roll, or the distance from the root of the tree.
        clean: (n, d) points without noise.
        chart: (n, 2) coordinates in which Euclidean distance is geodesic; None for the tree.
        n_neighbors: of the graph whose shortest paths are the geodesics, where there is no chart.
    """

    points: Array
    labels: NDArray[np.int64]
    position: Array
    clean: Array
    chart: Array | None
    n_neighbors: int = 10

    def geodesic(self, indices: NDArray[np.int64] | None = None) -> Array:
        """True distances along the manifold: (n, n), or (m, n) from the points `indices` only."""
        if self.chart is None:
            return shortest_path_distances(NeighborSearch(self.clean), self.n_neighbors, indices=indices)
        if indices is None:
            return squareform(pdist(self.chart))
        from scipy.spatial.distance import cdist

        return cdist(self.chart[indices], self.chart)


def swiss_roll(
    n: int = 2000,
    *,
    noise: float = 0.1,
    dim: int = 3,
    width: float = 5.0,
    seed: int = 42,
    clustered: bool = False,
    chart: Literal["arc-length", "angle"] = "arc-length",
) -> ToyManifold:
    """A rolled-up rectangle, rotated into `dim` dimensions, with Gaussian noise in all of them.

    Args:
        noise: standard deviation. Neighbouring turns of the roll lie about 6.3 apart.
        clustered: draw the angle from N(7, 1) and N(12, 1), half each, instead of uniformly.
        chart: the true distance is that of (arc length, height), or of (angle, height) as in the older class.
    """
    if dim < 3:
        raise ValueError(f"a swiss roll needs at least 3 dimensions, got dim={dim}")
    draw = np.random.RandomState(seed)  # the published points come from the legacy stream
    if clustered:
        angle = np.concatenate([draw.normal(7, 1, n // 2), draw.normal(12, 1, n - n // 2)])
    else:
        angle = 1.5 * np.pi * (1 + 2 * draw.rand(n))
    height = width * draw.rand(n)
    clean = np.stack([angle * np.cos(angle), height, angle * np.sin(angle)], axis=1)
    if dim > 3:
        clean = clean @ _rotation(dim, draw)[:3]
    points = clean + noise * draw.randn(n, dim)
    arc = (angle * np.sqrt(angle**2 + 1) + np.arcsinh(angle)) / 2
    labels = np.digitize(angle, np.linspace(angle.min(), angle.max(), 5))
    along = arc if chart == "arc-length" else angle
    return ToyManifold(points, labels, along, clean, np.stack([along, height], axis=1))


def random_tree(
    branch_length: int = 500,
    *,
    branches: int = 5,
    noise: float = 0.1,
    dim: int = 10,
    seed: int = 42,
    n_neighbors: int = 10,
) -> ToyManifold:
    """Random walks with uniform(-1, 1) steps: one from the origin, the others from points of the first.

    Args:
        noise: the Gaussian noise has ten times this standard deviation.
        n_neighbors: the true distance is the shortest path among so many neighbours of the clean points.
    """
    draw = np.random.RandomState(seed)  # the published points come from the legacy stream
    walks = [np.cumsum(-1 + 2 * draw.rand(branch_length, dim), axis=0)]
    starts = [0]
    for _ in range(branches - 1):
        starts.append(draw.randint(branch_length))
        walks.append(np.cumsum(-1 + 2 * draw.rand(branch_length, dim), axis=0) + walks[0][starts[-1]])
    clean = np.concatenate(walks)
    draw.normal(size=clean.shape)  # PHATE's generator draws a noise of its own, which is used at scale zero
    points = clean + draw.normal(0, 10 * noise, clean.shape)
    position = np.concatenate([start + np.arange(branch_length, dtype=np.float64) for start in starts])
    labels = np.repeat(np.arange(branches), branch_length)
    return ToyManifold(points, labels, position, clean, None, n_neighbors)


def _rotation(dim: int, draw: np.random.RandomState) -> Array:
    """A random rotation by Householder reflections, drawn as SciPy 1.11 did (later ones draw otherwise)."""
    rotation, signs = np.eye(dim), np.ones(dim)
    for k in range(dim - 1):
        x = draw.normal(size=dim - k)
        length, first = np.linalg.norm(x), x[0]
        signs[k] = np.sign(first) if first else 1.0
        x[0] += signs[k] * length
        x /= np.sqrt((length**2 - first**2 + x[0] ** 2) / 2)
        rotation[:, k:] -= np.outer(rotation[:, k:] @ x, x)
    signs[-1] = (-1) ** (dim - 1) * signs[:-1].prod()
    return signs[:, None] * rotation
