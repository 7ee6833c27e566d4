"""For comparison and parity: the official program's options under its names, and operators of related methods.

`HeatGeodesicEmbedding` has the methods that are worth using, under names that say what they are; here is everything
that the official code (KrishnaswamyLab/HeatGeo, `HeatGeo`) offers, experimental truncations included, and what it
compares with: PHATE, diffusion maps, random walks. Written from the published formulas.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from diffrep.manifold.graphs import Csr, alpha_decay_graph, laplacian, largest_eigenvalue, scaled_neighbor_graph
from diffrep.manifold.heat import (
    chebyshev_heat,
    heat_geodesic_distances,
    implicit_heat,
    knee,
    multiscale_weights,
    spectral_heat,
    triplet_distances,
)
from diffrep.manifold.mds import mds_weights, metric_mds, smacof, squared_axes_start
from diffrep.manifold.neighbors import NeighborSearch
from diffrep.settings import check

Array = NDArray[Any]

_FLOOR = 1e-16  # added to the heat before the logarithm

_WEIGHTS: dict[str, Literal["heat", "inverse", "gaussian"]] = {
    "heat_kernel": "heat",
    "inv_dist": "inverse",
    "gaussian_dist": "gaussian",
}


@dataclass(frozen=True, kw_only=True)
class HeatGeoOptions:
    """Options of the official `HeatGeo`, with its names (its spelling, too) and defaults.

    Graphs by scanpy and umap-learn are refused: they are those libraries' own. So are options that the official code
    takes and ignores.
    """

    knn: int = 5
    anisotropy: float = 0
    decay: float = 40
    n_pca: int | Literal[False] | None = 40  # False or None: no reduction
    tau: float | Literal["auto"] = 10
    emb_dim: int = 2
    filter_method: Literal["mar", "pygsp", "euler", "exact", "lowrank"] = "mar"
    order: int = 32
    lap_type: Literal["normalized", "combinatorial"] = "normalized"
    tau_min: float = 0.1
    tau_max: float = 200
    n_tau: int = 1
    log_normalize: bool = False
    scale_factor: float = 1.0
    denoising: bool = False
    graph_type: Literal["alpha", "knn"] = "alpha"
    truncation_type: Literal["heat_truncation", "dist_truncation"] | None = None
    truncation_arg: float | None = None
    treshold_type: Literal["min", "max"] | None = None
    harnack_regul: float = 0
    norm_treshold: bool = True
    mds_weights_type: Literal["heat_kernel", "inv_dist", "gaussian_dist"] | None = None
    mds_weights_args: float | None = None
    denoise_regul: float = 0.0

    def __post_init__(self) -> None:
        check(self)
        if self.truncation_type and self.truncation_arg is None:
            raise ValueError(f"truncation_type={self.truncation_type!r} needs truncation_arg")
        if self.truncation_type == "dist_truncation" and self.treshold_type is None:
            raise ValueError("truncation_type='dist_truncation' needs treshold_type 'min' or 'max'")
        if self.n_tau > 1 and self.tau != "auto" and self.filter_method not in ("mar", "pygsp"):
            raise ValueError(f"n_tau > 1 needs filter_method 'mar' or 'pygsp', got {self.filter_method!r}")

    @classmethod
    def of(cls, **options: Any) -> HeatGeoOptions:
        """Options by name.

        Raises:
            ValueError: the official code has no such option, or it cannot be followed here.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"HeatGeo has no option {', '.join(unknown)} here, only {', '.join(known)}")
        return cls(**options)

    def graph(self, points: Array) -> Csr:
        """The affinity (n, n) of points (n, d)."""
        if self.n_pca and self.n_pca < min(points.shape):
            from sklearn.decomposition import PCA

            points = PCA(self.n_pca, svd_solver="randomized", random_state=42).fit(points).transform(points)
        if self.graph_type == "knn":
            return scaled_neighbor_graph(points, self.knn)
        search = NeighborSearch(points, backend="sklearn")
        return alpha_decay_graph(search, self.knn, decay=self.decay, anisotropy=self.anisotropy)

    def laplacian(self, points: Array) -> Csr:
        """The Laplacian (n, n) of the graph of points."""
        return laplacian(self.graph(points), self.lap_type)

    def kernel(self, lap: Csr, t: float, *, lmax: float | None = None) -> Array:
        """H_t (n, n); "pygsp" computes exp(-t L / lmax), with 1.01 times the largest eigenvalue where None."""
        identity = np.identity(lap.shape[0])
        if self.filter_method == "mar":
            return chebyshev_heat(lap, identity, t, order=self.order)
        if self.filter_method == "pygsp":
            lmax = lmax or 1.01 * largest_eigenvalue(lap)
            return chebyshev_heat(lap, identity, t / lmax, order=self.order, lmax=lmax)
        if self.filter_method == "euler":
            return implicit_heat(lap, identity, t, steps=self.order)
        return spectral_heat(lap, t, rank=self.order if self.filter_method == "lowrank" else None)

    def entropies(self, lap: Csr) -> tuple[Array, Array]:
        """The grid of times of ``tau="auto"``, and the entropy of the kernel at each."""
        count, longest = 10 if self.n_tau == 1 else self.n_tau, 50 if self.tau_max == 1 else self.tau_max
        grid = np.linspace(0.05, longest, count)
        kernels = chebyshev_heat(lap, np.identity(lap.shape[0]), grid.tolist(), order=self.order)
        return grid, np.array([-(heat * np.log(heat + 1e-10)).sum() for heat in np.maximum(kernels, 0)])

    def times(self, lap: Csr) -> list[float]:
        """The diffusion times.

        Raises:
            ValueError: ``tau="auto"`` finds no knee.
        """
        if self.tau == "auto":
            grid, entropy = self.entropies(lap)
            best = knee(grid, entropy)
            if best is None:
                raise ValueError("tau='auto' finds no knee of the entropy: name a number")
            return [float(grid[best])]
        if self.n_tau > 1:
            return [float(t) for t in np.geomspace(self.tau_min, self.tau_max, self.n_tau)]
        return [float(self.tau)]

    def distances(self, points: Array) -> tuple[Array, Array]:
        """The dissimilarity matrix (n, n) of points (n, d), and the heat kernel of the last time behind it."""
        lap = self.laplacian(points)
        times = self.times(lap)
        total, heat = np.zeros(lap.shape), sp.identity(lap.shape[0]).toarray()
        for t, share in zip(times, multiscale_weights(times), strict=True):
            heat = np.maximum(self.kernel(lap, t), 0)
            if self.truncation_type == "heat_truncation":
                heat = np.where(heat < float(self.truncation_arg or 0), 0, heat)
            total += share * self._formula(heat, t)
        if self.denoising:
            total = (1 - self.denoise_regul) * total + self.denoise_regul * triplet_distances(total)
        return self._truncated(total) if self.truncation_type == "dist_truncation" else total, heat

    def _truncated(self, distances: Array) -> Array:
        """Far ("max") or near ("min") pairs saturate.

        Beyond `truncation_arg`, a threshold on distances brought to [0, 1] or without `norm_treshold` a quantile,
        they become the largest or smallest one.
        """
        if self.norm_treshold:
            distances, cut = (distances - distances.min()) / np.ptp(distances), float(self.truncation_arg or 0)
        else:
            cut = float(np.quantile(distances, float(self.truncation_arg or 0)))
        if self.treshold_type == "max":
            distances = np.where(distances > cut, distances.max(), distances)
        else:
            distances = np.where(distances < cut, distances.min(), distances)
        return np.maximum(distances, distances.T)

    def _formula(self, heat: Array, t: float) -> Array:
        if self.log_normalize:
            step = t / self.order if self.filter_method == "euler" else t
            return (np.log(heat + _FLOOR) / np.log(step + _FLOOR)) ** self.scale_factor
        return heat_geodesic_distances(
            heat,
            t,
            floor=_FLOOR,
            volume="arithmetic",
            volume_weight=self.harnack_regul,
            scale_power=self.scale_factor,
        )

    def weights(self, distances: Array, heat: Array) -> Array | None:
        """Weights (n, n) of pairs in the stress; None: all alike."""
        if self.mds_weights_type is None:
            return None
        sharpness = 1.0 if self.mds_weights_args is None else self.mds_weights_args
        return mds_weights(_WEIGHTS[self.mds_weights_type], distances, heat, sharpness)

    def embedding(self, distances: Array, weights: Array | None = None, *, seed: int = 2) -> Array:
        """Coordinates (n, emb_dim) from distances (n, n), in their units; the weights count in two dimensions only."""
        start = squared_axes_start(distances, self.emb_dim)
        if self.emb_dim > 2:
            return smacof(distances, start, max_iter=3000)
        return metric_mds(distances, start, weights=weights, rng=np.random.default_rng(seed))


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
    """Where two least-squares lines, one on each side, fit a curve best in absolute error, as PHATE has it.

    Its right line is fitted to one point more than it is judged by, the one before the knee.
    """
    n = len(curve)
    x = np.arange(n, dtype=np.float64)

    def misfit(fitted: slice, judged: slice) -> float:
        slope, offset = np.polyfit(x[fitted], curve[fitted], 1)
        return float(np.abs(slope * x[judged] + offset - curve[judged]).sum())

    def both(k: int) -> float:
        return misfit(slice(0, k + 1), slice(0, k + 1)) + misfit(slice(k - 1, n), slice(k, n))

    return min(range(1, n - 1), key=both)


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
    return np.sqrt(np.maximum(-4.0 * t * np.log(walk + _FLOOR), 0))
