"""Distances on a graph by heat, from all points to all points or to landmarks, and the choice of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, reverse_cuthill_mckee

from diffrep.manifold import heat as kernels
from diffrep.manifold.baselines import row_distances
from diffrep.manifold.distances import (
    Volume,
    finite_distances,
    heat_geodesic_distances,
    multiscale_weights,
    triplet_distances,
)
from diffrep.manifold.graphs import Csr, LaplacianKind, hop_diameter, laplacian, largest_eigenvalue
from diffrep.manifold.landmarks import (
    Stitching,
    Voronoi,
    column_blocks,
    landmark_diagonal,
    row_blocks,
    series_order,
)

Array = NDArray[Any]
HeatMethod = Literal["auto", "chebyshev", "squaring", "euler", "crank-nicolson", "exact"]
HEAT_METHODS = ("auto", "chebyshev", "squaring", "euler", "crank-nicolson", "exact")
Progress = Callable[[str, int], Callable[[int], object]]  # (what, total) -> called with what was done

FEW_POINTS = 1500  # up to here all pairs are computed, where nobody says otherwise, and on the CPU
_HUBS = 256  # points over which far pairs are stitched where all pairs are computed
_BLOCK_NUMBERS = 1 << 24  # numbers in a block of heat columns


@dataclass(frozen=True, kw_only=True)
class GeodesicSettings:
    """How heat becomes distance; `HeatGeodesicEmbedding` says what each setting means."""

    laplacian: LaplacianKind = "normalized"
    heat_method: HeatMethod = "auto"
    order: int | None = None  # None: as far as it matters
    floor: float = 1e-300
    volume: Volume | None = "geometric"
    volume_weight: float = 1.0
    triplet_weight: float = 0.0
    scale_power: float = 1.0
    far_field: Literal["stitch", "floor"] = "stitch"
    diffusion: bool = False  # distances between rows of the kernel instead
    dtype: Any = np.float64
    device: str = "cpu"


def quiet(what: str, total: int) -> Callable[[int], object]:
    """A `Progress` that shows nothing."""
    return lambda done: None


class HeatGraph:
    """A graph with its Laplacian, and the heat on it."""

    def __init__(self, affinity: Csr, settings: GeodesicSettings) -> None:
        self.affinity, self.settings = affinity, settings
        self.laplacian = laplacian(affinity, settings.laplacian)
        self.degree = np.ones(affinity.shape[0])
        if settings.laplacian == "normalized":
            degree = np.asarray(affinity.sum(axis=1)).ravel()
            self.degree = np.where(degree > 0, degree, 1.0)
        # an overestimate by a percent costs a percent; an underestimate would let the series diverge
        exact = affinity.shape[0] <= 2000
        self._local: tuple[Csr, NDArray[np.int64]] | None = None
        self.lmax = largest_eigenvalue(self.laplacian, tolerance=0.0 if exact else 1e-3) * (1.0 if exact else 1.01)

    @property
    def phi(self) -> float:
        return max(self.lmax, 1e-6) / 2  # a graph without edges has no largest eigenvalue

    def local_laplacian(self) -> tuple[Csr, NDArray[np.int64]]:
        """The Laplacian with points that are neighbours close in memory, and the place of each point in it.

        Products with it are several times faster when there are many points.
        """
        if self._local is None:
            order = reverse_cuthill_mckee(self.laplacian, symmetric_mode=True)
            place = np.empty(len(order), dtype=np.int64)
            place[order] = np.arange(len(order))
            self._local = self.laplacian[order][:, order].tocsr(), place
            self._local[0].sort_indices()
        return self._local

    def smallest_heat(self) -> float:
        """Heat below this has not arrived: the number format ends, or what is cut from the series begins."""
        if self.settings.heat_method == "exact":
            return max(self.settings.floor, 1e-13)  # what eigenvectors give below is noise
        return max(self.settings.floor, 1e-34 if self.settings.dtype == np.float32 else 1e-290)

    def times(self, count: int = 20) -> NDArray[np.float64]:
        """A geometric grid of diffusion times, 1 to 300 for the normalised Laplacian."""
        grid = np.geomspace(1.0, 300.0, count)
        if self.settings.laplacian == "combinatorial":  # diffuses faster by about the mean degree
            grid /= max(float(self.affinity.sum() / self.affinity.shape[0]), 1e-12)
        return grid

    def entropies(self, times: Sequence[float], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean entropy of the heat that starts from single points, one for each time."""
        order = series_order(max(times), self.phi, 1e-9)
        lap, place = self.local_laplacian()
        totals = np.zeros(len(times))
        width = int(np.clip(_BLOCK_NUMBERS // (self.affinity.shape[0] * len(times)), 4, 32))
        for block in np.array_split(np.sort(place[columns]), -(-len(columns) // width)):
            signals = np.zeros((self.affinity.shape[0], len(block)), dtype=self.settings.dtype)
            signals[block, np.arange(len(block))] = 1
            heats = kernels.chebyshev_heat(
                lap, signals, list(times), order=order, lmax=self.lmax, device=self.settings.device
            )
            for k, heat in enumerate(np.maximum(heats, 0)):
                share = heat / heat.sum(axis=0)
                totals[k] -= (share * np.log(np.maximum(share, np.finfo(heat.dtype).tiny))).sum()
        return totals / len(columns)

    def kernel(self, t: float) -> NDArray[np.float64]:
        """The whole heat kernel H_t, (n, n)."""
        n, method, order = self.affinity.shape[0], self.settings.heat_method, self.settings.order
        if method in ("auto", "squaring"):
            return kernels.squared_heat(self.laplacian, t)
        if method == "exact":
            return kernels.spectral_heat(self.laplacian, t)
        if method == "chebyshev":
            order = order or max(64, int(1.5 * hop_diameter(self.affinity)), series_order(t, self.phi, 1e-16))
            return kernels.chebyshev_heat(
                self.laplacian, np.identity(n), t, order=order, lmax=self.lmax, device=self.settings.device
            )
        theta = {"euler": 1.0, "crank-nicolson": 0.5}[method]
        return kernels.implicit_heat(self.laplacian, np.identity(n), t, steps=order or 32, theta=theta)

    def columns(self, landmarks: NDArray[np.int64], t: float, progress: Progress) -> tuple[Array, float]:
        """Heat from the landmarks, (n, m), and the value below which it says nothing."""
        method, order, dtype = self.settings.heat_method, self.settings.order, self.settings.dtype
        n, m = self.affinity.shape[0], len(landmarks)
        if method in ("squaring", "exact"):
            raise ValueError(f"heat_method={method!r} makes the whole kernel: use 'chebyshev' with landmarks")
        width = int(np.clip(_BLOCK_NUMBERS // n, 16, 64))
        floor = self.smallest_heat()
        lap, place = self.local_laplacian()
        if method in ("auto", "chebyshev"):
            order = order or series_order(t, self.phi, max(floor, 1e-40))
            step = progress(f"heat, t = {t:.4g}, order {order}", (order - 1) * -(-m // width))
            floor = max(floor, 100 * kernels.chebyshev_tail(t, self.phi, order))

            def apply(signals: Array) -> Array:
                return kernels.chebyshev_heat(
                    lap,
                    signals,
                    t,
                    order=order,
                    lmax=self.lmax,
                    device=self.settings.device,
                    progress=step,
                )
        else:
            step = progress(f"heat, t = {t:.4g}, {method}", -(-m // width))
            theta = {"euler": 1.0, "crank-nicolson": 0.5}[method]

            def apply(signals: Array) -> Array:
                step(1)
                return kernels.implicit_heat(lap, signals, t, steps=order or 32, theta=theta)

        return column_blocks(place, landmarks, apply, dtype=dtype, width=width), floor


def whole_distances(
    graph: HeatGraph, times: Sequence[float], *, rng: np.random.Generator, progress: Progress = quiet
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances between all points (n, n), and the heat kernel (of the last time) that they came from."""
    settings, n = graph.settings, graph.affinity.shape[0]
    total = np.zeros((n, n))
    step = progress("heat kernel", len(times))
    for t, share in zip(times, multiscale_weights(times), strict=True):
        kernel = np.maximum(graph.kernel(t), 0)
        if settings.diffusion:
            distances = row_distances(kernel)
        else:
            distances = _formula(kernel, t, settings, kernel.diagonal(), kernel.diagonal())
            if settings.far_field == "stitch":
                distances = _stitch_whole(graph, distances, kernel > graph.smallest_heat(), rng)
            distances **= settings.scale_power
        total += share * distances
        step(1)
    total = finite_distances((total + total.T) / 2)
    if settings.triplet_weight:
        total = (1 - settings.triplet_weight) * total + settings.triplet_weight * triplet_distances(total)
    return total, kernel


def landmark_distances(
    graph: HeatGraph,
    landmarks: NDArray[np.int64],
    times: Sequence[float],
    *,
    progress: Progress = quiet,
) -> tuple[Array, Array]:
    """Distances (n, m) from all points to the landmarks, and the heat (m, m) between these at the last time.

    Nothing of size n x m is held but two arrays of `settings.dtype`, and for one time only one.
    """
    settings, n, m = graph.settings, graph.affinity.shape[0], len(landmarks)
    voronoi = Voronoi.of(graph.affinity, landmarks)
    links = voronoi.links(graph.affinity)
    total: Array | None = None
    for t, share in zip(times, multiscale_weights(times), strict=True):
        columns, floor = graph.columns(landmarks, t, progress)
        between_heat = np.maximum(columns[landmarks], 0).astype(np.float64)
        step = progress("distances", n)
        if settings.diffusion:
            for block in row_blocks(n, m):
                rows = np.asarray(columns[block], dtype=np.float64)
                columns[block] = triplet_distances(rows, between_heat, scale=np.sqrt(n / m))
                step(len(rows))
        else:
            at_landmarks = between_heat.diagonal()
            near = between_heat > floor
            between = _formula(between_heat, t, settings, at_landmarks, at_landmarks)
            stitching = Stitching.of(between, near, links)
            for block in row_blocks(n, m):
                rows = np.asarray(columns[block], dtype=np.float64)
                diagonal = landmark_diagonal(rows, between_heat, graph.degree[landmarks], graph.degree[block])
                owner, hops = voronoi.owner[block], voronoi.hops[block]
                diagonal[hops == 0] = at_landmarks[owner[hops == 0]]
                distances = _formula(rows, t, settings, diagonal, at_landmarks)
                if settings.far_field == "stitch":
                    distances = stitching.complete(distances, rows > floor, owner, hops)
                columns[block] = distances**settings.scale_power
                step(len(rows))
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
    return total, between_heat


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
    to_own_hub = to_hubs[np.arange(n), np.maximum(voronoi.owner, 0)]
    path = to_own_hub[:, None] + to_hubs[:, np.maximum(voronoi.owner, 0)].T  # i to its hub, and from there to j
    return np.where(near | apart, distances, np.minimum(path, path.T))


def heat_device(name: str, n: int) -> str:
    """The device of the Chebyshev series on n points; small graphs are faster on the CPU."""
    if name == "cpu" or (name == "auto" and n <= FEW_POINTS):
        return "cpu"
    from diffrep.devices import DeviceError, resolve_device

    device = resolve_device(name)
    if device.type == "mps":
        if name == "auto":
            return "cpu"
        raise DeviceError("--device mps: PyTorch has no sparse products on MPS; use cpu")
    return str(device)
