"""Distances on a graph by heat: between all points, or to a few landmarks in memory linear in the number of points.

Heat that has not arrived, because a polynomial of degree K sees K edges far and numbers have a smallest value, says
only that a pair is far; such a pair gets the length of the shortest path through other landmarks ("stitching").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, dijkstra, reverse_cuthill_mckee, shortest_path
from scipy.spatial.distance import pdist, squareform

from diffrep.manifold import heat as kernels
from diffrep.manifold.graphs import Csr, LaplacianKind, hop_diameter, laplacian, largest_eigenvalue
from diffrep.manifold.heat import (
    Volume,
    finite_distances,
    heat_geodesic_distances,
    multiscale_weights,
    series_order,
    triplet_distances,
)
from diffrep.manifold.mds import Progress, quiet, row_blocks

Array = NDArray[Any]
HeatMethod = Literal["auto", "chebyshev", "squaring", "euler", "crank-nicolson", "exact"]

# up to here all pairs are computed, where nobody says otherwise: 0.5 s against the 0.2 of landmarks, and a rank
# correlation that is 0.01 higher on trees; at 1,500 points it is 1.2 s against 0.35, for 0.005
FEW_POINTS = 1000
GPU_FROM = 10_000  # points: below, the import of torch alone takes longer than the heat
_HUBS = 256  # points over which far pairs are stitched where all pairs are computed
_STITCH = 12  # near landmarks over which a path to a far one may go
_SHEPARD = 8  # near landmarks from which the volume at a point is interpolated
_BLOCK_NUMBERS = 1 << 24  # numbers in a block of heat columns
_THETA = {"euler": 1.0, "crank-nicolson": 0.5}  # of the implicit steps


@dataclass(kw_only=True, eq=False, repr=False)
class GeodesicSettings:
    """How heat becomes distance; `HeatGeodesicEmbedding`, which inherits them, says what each setting means."""

    laplacian: LaplacianKind = "normalized"
    heat_method: HeatMethod = "auto"
    order: int | Literal["auto"] = "auto"
    floor: float = 1e-300
    dissimilarity: Literal["heat", "diffusion", "shortest-path"] = "heat"
    volume: Volume | None = "geometric"
    volume_weight: float = 1.0
    triplet_weight: float = 0.0
    scale_power: float = 1.0
    far_field: Literal["stitch", "floor"] = "stitch"
    device: str = "auto"


class HeatGraph:
    """A graph with its Laplacian, and the heat on it.

    Args:
        dtype: of the columns of heat from landmarks.
    """

    def __init__(self, affinity: Csr, settings: GeodesicSettings, dtype: Any = np.float64) -> None:
        self.affinity, self.settings, self.dtype = affinity, settings, np.dtype(dtype)
        self.n = affinity.shape[0]
        self.order = None if settings.order == "auto" else int(settings.order)
        self.device = heat_device(settings.device, self.n)
        self.laplacian = laplacian(affinity, settings.laplacian)
        self.degree = np.ones(self.n)
        if settings.laplacian == "normalized":
            degree = np.asarray(affinity.sum(axis=1)).ravel()
            self.degree = np.where(degree > 0, degree, 1.0)
        # an overestimate by a percent costs a percent; an underestimate would let the series diverge
        exact = self.n <= 2000
        self.lmax = largest_eigenvalue(self.laplacian, tolerance=0.0 if exact else 1e-3) * (1.0 if exact else 1.01)
        self.phi = max(self.lmax, 1e-6) / 2  # a graph without edges has no largest eigenvalue

    @cached_property
    def local_laplacian(self) -> tuple[Csr, NDArray[np.int64]]:
        """The Laplacian with points that are neighbours close in memory, and the place of each point in it.

        Products with it are several times faster when there are many points.
        """
        order = reverse_cuthill_mckee(self.laplacian, symmetric_mode=True)
        place = np.empty(self.n, dtype=np.int64)
        place[order] = np.arange(self.n)
        local = self.laplacian[order][:, order].tocsr()
        local.sort_indices()
        return local, place

    def smallest_heat(self) -> float:
        """Heat below this has not arrived: the number format ends, or what is cut from the series begins."""
        if self.settings.heat_method == "exact":
            return max(self.settings.floor, 1e-13)  # what eigenvectors give below is noise
        return max(self.settings.floor, 1e-34 if self.dtype == np.float32 else 1e-290)

    def times(self, count: int = 20) -> NDArray[np.float64]:
        """A geometric grid of diffusion times, 1 to 300 for the normalised Laplacian."""
        grid = np.geomspace(1.0, 300.0, count)
        if self.settings.laplacian == "combinatorial":  # diffuses faster by about the mean degree
            grid /= max(float(self.affinity.sum() / self.n), 1e-12)
        return grid

    def entropies(self, times: Sequence[float], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean entropy of the heat that starts from single points, one for each time."""
        order = series_order(max(times), self.phi, 1e-9)
        lap, place = self.local_laplacian
        totals = np.zeros(len(times))
        width = int(np.clip(_BLOCK_NUMBERS // (self.n * len(times)), 4, 32))
        for block in np.array_split(np.sort(place[columns]), -(-len(columns) // width)):
            signals = self._sparks(block)
            heats = kernels.chebyshev_heat(lap, signals, times, order=order, lmax=self.lmax, device=self.device)
            for k, heat in enumerate(np.maximum(heats, 0)):
                share = heat / heat.sum(axis=0)
                totals[k] -= (share * np.log(np.maximum(share, np.finfo(heat.dtype).tiny))).sum()
        return totals / len(columns)

    def kernel(self, t: float) -> NDArray[np.float64]:
        """The whole heat kernel H_t, (n, n)."""
        method, order = self.settings.heat_method, self.order
        if method in ("auto", "squaring"):
            return kernels.squared_heat(self.laplacian, t)
        if method == "exact":
            return kernels.spectral_heat(self.laplacian, t)
        if method == "chebyshev" and order is None:
            order = max(64, int(1.5 * hop_diameter(self.affinity)), series_order(t, self.phi, 1e-16))
        (lap, place), heat = self.local_laplacian, np.empty((self.n, self.n))
        near = np.argsort(place)
        for block in np.split(near, range(kernels.WIDTH, self.n, kernels.WIDTH)):
            heat[block] = self._spread(lap, self._sparks(place[block]), t, order)[place].T  # the kernel is symmetric
        return heat

    def columns(self, landmarks: NDArray[np.int64], t: float, progress: Progress = quiet) -> tuple[Array, float]:
        """Heat from the landmarks, (n, m), and the value below which it says nothing."""
        method, order, floor = self.settings.heat_method, self.order, self.smallest_heat()
        if method in ("squaring", "exact"):
            raise ValueError(f"heat_method={method!r} makes the whole kernel: use 'chebyshev' with landmarks")
        if method not in _THETA:
            order = order or series_order(t, self.phi, max(floor, 1e-40))
            floor = max(floor, 100 * kernels.chebyshev_tail(t, self.phi, order))
        lap, place = self.local_laplacian
        columns = np.empty((self.n, len(landmarks)), dtype=self.dtype)
        near = np.argsort(place[landmarks], kind="stable")  # a block lies together, so that heat has few rows to go
        width = int(np.clip(_BLOCK_NUMBERS // self.n, 16, 64))
        blocks = [near[start : start + width] for start in range(0, len(near), width)]
        for block in progress(blocks, f"heat, t = {t:.4g}"):
            columns[:, block] = self._spread(lap, self._sparks(place[landmarks[block]]), t, order)[place]
        return columns, floor

    def _sparks(self, rows: NDArray[np.int64]) -> Array:
        """Signals (n, len(rows)) that are 1 at one point each."""
        signals = np.zeros((self.n, len(rows)), dtype=self.dtype)
        signals[rows, np.arange(len(rows))] = 1
        return signals

    def _spread(self, lap: Csr, signals: Array, t: float, order: int | None) -> Array:
        if theta := _THETA.get(self.settings.heat_method):
            return kernels.implicit_heat(lap, signals, t, steps=order or 32, theta=theta)
        return kernels.chebyshev_heat(lap, signals, t, order=order or 32, lmax=self.lmax, device=self.device)


def whole_distances(
    graph: HeatGraph, times: Sequence[float], *, rng: np.random.Generator, progress: Progress = quiet
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances between all points (n, n), and the heat kernel (of the last time) that they came from."""
    settings, total = graph.settings, np.zeros((graph.n, graph.n))
    steps = list(zip(times, multiscale_weights(times), strict=True))
    for t, share in progress(steps, "heat kernel"):
        kernel = np.maximum(graph.kernel(t), 0)
        if settings.dissimilarity == "diffusion":
            distances = squareform(pdist(kernel))
        else:
            distances = _formula(kernel, t, settings, kernel.diagonal(), kernel.diagonal())
            if settings.far_field == "stitch":
                distances = _stitch_whole(graph, distances, kernel > graph.smallest_heat(), rng)
            distances **= settings.scale_power
        total += share * distances
    total = finite_distances((total + total.T) / 2)
    if settings.triplet_weight:
        total = (1 - settings.triplet_weight) * total + settings.triplet_weight * triplet_distances(total)
    return total, kernel


def landmark_distances(
    graph: HeatGraph, landmarks: NDArray[np.int64], times: Sequence[float], *, progress: Progress = quiet
) -> tuple[Array, Array]:
    """Distances (n, m) from all points to the landmarks, and the heat (m, m) between these at the last time.

    Nothing of size n x m is held but two arrays of the graph's `dtype`, and for one time only one.
    """
    settings, n, m = graph.settings, graph.n, len(landmarks)
    voronoi = Voronoi.of(graph.affinity, landmarks)
    links = voronoi.links(graph.affinity)
    total: Array | None = None
    for t, share in zip(times, multiscale_weights(times), strict=True):
        columns, floor = graph.columns(landmarks, t, progress)
        heat = np.maximum(columns[landmarks], 0).astype(np.float64)
        at_landmarks = heat.diagonal()
        if settings.dissimilarity != "diffusion":
            between = _formula(heat, t, settings, at_landmarks, at_landmarks)
            stitching = Stitching.of(between, heat > floor, links)
        for block in progress(row_blocks(n, m), "distances"):
            rows = np.asarray(columns[block], dtype=np.float64)
            if settings.dissimilarity == "diffusion":
                columns[block] = triplet_distances(rows, heat, scale=np.sqrt(n / m))
                continue
            diagonal = landmark_diagonal(rows, heat, graph.degree[landmarks], graph.degree[block])
            owner, hops = voronoi.owner[block], voronoi.hops[block]
            diagonal[hops == 0] = at_landmarks[owner[hops == 0]]
            distances = _formula(rows, t, settings, diagonal, at_landmarks)
            if settings.far_field == "stitch":
                distances = stitching.complete(distances, rows > floor, owner, hops)
            columns[block] = distances**settings.scale_power
        if len(times) == 1:
            total = columns
        else:
            total = share * columns if total is None else total + share * columns
    assert total is not None
    total = finite_distances(total)
    if settings.triplet_weight:
        rho, anchors = settings.triplet_weight, total[landmarks]
        for block in row_blocks(n, m):
            rows = total[block]
            total[block] = (1 - rho) * rows + rho * triplet_distances(rows, anchors, scale=np.sqrt(n / m))
    return total, heat


def _formula(heat: Array, t: float, settings: GeodesicSettings, rows: Array, columns: Array) -> Array:
    return heat_geodesic_distances(
        heat,
        t,
        rows_diagonal=rows,
        columns_diagonal=columns,
        floor=settings.floor,
        volume=settings.volume,
        volume_weight=settings.volume_weight,
    )


def _stitch_whole(graph: HeatGraph, distances: Array, near: NDArray[np.bool_], rng: np.random.Generator) -> Array:
    """Stitch the pairs of one component that heat did not reach, over some hundred points as hubs."""
    _, labels = connected_components(graph.affinity, directed=False)
    apart = labels[:, None] != labels
    distances[apart] = np.inf
    if (near | apart).all():
        return distances
    n = len(distances)
    hubs = np.sort(rng.choice(n, min(_HUBS, n), replace=False))
    voronoi = Voronoi.of(graph.affinity, hubs)
    stitching = Stitching.of(distances[np.ix_(hubs, hubs)], near[np.ix_(hubs, hubs)], voronoi.links(graph.affinity))
    to_hubs = stitching.complete(distances[:, hubs], near[:, hubs], voronoi.owner, voronoi.hops)
    nearest = np.maximum(voronoi.owner, 0)
    path = to_hubs[np.arange(n), nearest][:, None] + to_hubs[:, nearest].T  # i to its hub, and from there to j
    return np.where(near | apart, distances, np.minimum(path, path.T))


def heat_device(name: str, n: int) -> str:
    """The device of the Chebyshev series on n points; small graphs are faster on the CPU."""
    if name == "cpu" or (name == "auto" and n < GPU_FROM):
        return "cpu"
    from diffrep.devices import DeviceError, resolve_device

    device = resolve_device(name)
    if device.type != "mps":
        return str(device)
    if name == "auto":
        return "cpu"
    raise DeviceError("--device mps: PyTorch has no sparse products on MPS; use cpu")


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
