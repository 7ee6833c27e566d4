"""From feature rows to points, and the nearest neighbours among them: exact by scikit-learn, or FAISS for many."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from diffrep.files import optional_import

Backend = Literal["auto", "faiss", "sklearn"]

_TREE_DIMENSIONS = 10  # up to here a k-d tree beats a scan, at any number of points
_EXACT_POINTS = 5_000  # below, an exact float64 scan takes no time
_FLAT_POINTS = 20_000  # above, FAISS searches cells of an inverted file instead of all points
_EXTENTS = (1e-140, 1e140)  # squares of coordinates beyond are no numbers
_PCA_SEED = 42  # the published one
_CHUNK = 1 << 22  # numbers per block when distances are recomputed


class NeighborSearch:
    """Euclidean nearest neighbours among `points`.

    FAISS works in float32, and its inverted file may miss a neighbour; the distances that come back are
    always recomputed from the differences of coordinates, in float64.

    Args:
        points: array or CSR matrix of shape (n, d).
        backend: "sklearn" is exact; "faiss" scans up to 20,000 points and searches an inverted file above;
            "auto" takes scikit-learn for few points, few dimensions or sparse input, and FAISS otherwise.
        n_jobs: threads; None leaves each library's own default, -1 takes all cores.
    """

    def __init__(self, points: Any, *, backend: Backend = "auto", n_jobs: int | None = None) -> None:
        if backend == "faiss" and sp.issparse(points):
            raise ValueError("knn_backend='faiss' needs a dense array: use 'sklearn', or set n_pca")
        few = points.shape[0] <= _EXACT_POINTS or points.shape[1] <= _TREE_DIMENSIONS or sp.issparse(points)
        self.backend = backend if backend != "auto" else ("sklearn" if few else "faiss")
        self.points = points
        self.n_jobs = n_jobs
        self._index: Any = None
        # centred, because |x|^2 - 2xy + |y|^2 loses digits far from the origin, and scaled, because squares of very
        # small or large numbers leave the number format
        self._centre = None if sp.issparse(points) else points.mean(axis=0, dtype=np.float64)
        extent = abs(points if self._centre is None else points - self._centre).max()
        if not (extent == 0 or _EXTENTS[0] < extent < _EXTENTS[1]):
            raise ValueError(f"coordinates spread over {extent:.3g}, which is out of all proportion: scale them")
        self._scale = 1.0 if 1e-6 < extent < 1e6 or extent == 0 else 2.0 ** -np.floor(np.log2(extent))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # a FAISS index does not pickle; it is built again when asked

    def query(self, queries: Any, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The `k` nearest points of each query, nearest first; one of the points finds itself.

        Returns:
            distances (q, k) and indices (q, k).
        """
        n = self.points.shape[0]
        k = min(k, n)
        more = min(k + 4, n)  # rounding may have swapped neighbours at equal distances
        indices = self._sklearn(queries, more) if self.backend == "sklearn" else self._faiss(queries, more)
        distances = _distances(queries, self.points, indices)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)

    def _shifted(self, points: Any, dtype: Any = np.float64) -> Any:
        """Points centred and of ordinary size."""
        if self._centre is not None:
            points = points - self._centre
        if self._scale != 1:
            points = points * self._scale
        return points if self._centre is None else np.ascontiguousarray(points, dtype=dtype)

    def _sklearn(self, queries: Any, k: int) -> NDArray[np.int64]:
        if self._index is None:
            tree = not sp.issparse(self.points) and self.points.shape[1] <= _TREE_DIMENSIONS
            self._index = self._exact_search("kd_tree" if tree else "brute")
        return self._index.kneighbors(self._shifted(queries), k, return_distance=False)

    def _exact_search(self, algorithm: str) -> Any:
        from sklearn.neighbors import NearestNeighbors

        search = NearestNeighbors(algorithm=algorithm, n_jobs=self.n_jobs)
        return search.fit(self._shifted(self.points))

    def _faiss(self, queries: NDArray[Any], k: int) -> NDArray[np.int64]:
        with optional_import("knn_backend='faiss' needs faiss: pip install faiss-cpu"):
            import faiss
        threads = faiss.omp_get_max_threads()
        if self.n_jobs is not None:
            faiss.omp_set_num_threads(self.n_jobs if self.n_jobs > 0 else threads)
        try:
            if self._index is None:
                self._index = _faiss_index(self._shifted(self.points, np.float32))
            indices = self._index.search(self._shifted(queries, np.float32), k)[1]
        finally:
            faiss.omp_set_num_threads(threads)
        short = np.flatnonzero(indices.min(axis=1) < 0)  # an inverted file can run out of points
        if len(short):
            exact = self._exact_search("brute")
            indices[short] = exact.kneighbors(self._shifted(queries[short]), k, return_distance=False)
        return indices


def _faiss_index(points: NDArray[np.float32]) -> Any:
    import faiss

    n, dims = points.shape
    if n <= _FLAT_POINTS:
        index: Any = faiss.IndexFlatL2(dims)
    else:
        cells = int(4 * np.sqrt(n))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dims), dims, cells, faiss.METRIC_L2)
        index.nprobe = max(16, cells // 64)
        index.cp.seed, index.cp.niter, index.cp.max_points_per_centroid = 0, 8, 64
        index.cp.min_points_per_centroid = 1
        index.train(points)
    index.add(points)
    return index


def _distances(queries: Any, points: Any, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distances between each query (q, d) and the points that its row of `indices` (q, k) names."""
    if sp.issparse(points):
        return np.stack([lengths_between(points, queries[[i]], near) for i, near in enumerate(indices)])
    distances = np.empty(indices.shape)
    rows = max(1, _CHUNK // (indices.shape[1] * max(1, queries.shape[1])))
    for start in range(0, len(indices), rows):
        block = slice(start, start + rows)
        difference = points[indices[block]].astype(np.float64) - np.asarray(queries[block])[:, None]
        distances[block] = np.sqrt(np.einsum("qkd,qkd->qk", difference, difference))
    return distances


def lengths_between(points: Any, one: Any, many: NDArray[np.int64]) -> NDArray[np.float64]:
    """Distances (k,) from a row `one` (1, d) to the points `many`."""
    if not sp.issparse(points):
        return np.linalg.norm(points[many].astype(np.float64) - one, axis=1)
    difference = points[many] - sp.csr_matrix(np.ones((len(many), 1))) @ one
    return np.sqrt(np.asarray(difference.multiply(difference).sum(axis=1)).ravel())


class FeatureSpace:
    """The space in which neighbours are searched.

    Args:
        features: (n, d) array or CSR matrix.
        metric: "cosine" brings every row to unit length, after which distances are Euclidean.
        n_pca: principal components (truncated singular vectors of a sparse matrix) that replace the features;
            None, or as many as there are features or rows: no reduction.

    Attributes:
        original: (n',) rows that are no copies of earlier ones.
        copy_of: (n,) position of each row, or of the row that it is a copy of, in `original`.
        search: over the n' different points.
    """

    def __init__(
        self,
        features: Any,
        *,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        n_pca: int | None = None,
        backend: Backend = "auto",
        n_jobs: int | None = None,
    ) -> None:
        self.metric = metric
        self._reduction: Any = None
        if n_pca is not None and n_pca < min(features.shape):
            from sklearn.decomposition import PCA, TruncatedSVD

            unit = self._unit(features)
            if sp.issparse(unit):
                self._reduction = TruncatedSVD(n_pca, random_state=_PCA_SEED).fit(unit)
            else:
                self._reduction = PCA(n_pca, svd_solver="randomized", random_state=_PCA_SEED).fit(unit)
        points = self.points_of(features)
        self.original, self.copy_of = different_rows(points)
        if len(self.original) < len(self.copy_of):
            points = points[self.original]
        self.search = NeighborSearch(points, backend=backend, n_jobs=n_jobs)

    def points_of(self, features: Any) -> Any:
        """Feature rows as points of this space."""
        unit = self._unit(features)
        return unit if self._reduction is None else self._reduction.transform(unit)

    def _unit(self, features: Any) -> Any:
        if self.metric != "cosine":
            return features
        from sklearn.preprocessing import normalize

        return normalize(features)

    def shares(self, points: Any, n_neighbors: int) -> tuple[Any, NDArray[np.float64]]:
        """How much each new point is one of the training points, and how much it is none of them.

        With d_j the distance to training point j and h that to the last neighbour, the shares are u_j / (1 + sum u)
        with u_j = (h / d_j - 1)^2 within h (Shepard's interpolation, as Franke and Little bound it): smooth in the
        point, 1 at a training point, and what is left there falls with the square of the distance.

        Returns:
            shares (q, n'), CSR, and the rest (q,), which makes each row sum to one.
        """
        distances, indices = self.search.query(points, max(2, n_neighbors))
        reach = np.maximum(distances[:, -1:], np.finfo(np.float64).tiny)
        nearest = distances[:, :1]
        # both sides times (d_0 / h)^2, so that a distance of 0 is an ordinary case
        closeness = np.divide(nearest, distances, out=np.ones_like(distances), where=distances > nearest)
        weights = ((1 - distances / reach) * closeness) ** 2
        open_part = (nearest[:, 0] / reach[:, 0]) ** 2
        total = open_part + weights.sum(axis=1)
        rows = np.arange(len(distances)).repeat(distances.shape[1])
        entries = (weights / total[:, None]).ravel(), (rows, indices.ravel())
        return sp.csr_matrix(entries, shape=(len(distances), len(self.original))), open_part / total


def different_rows(points: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that are no copies of earlier ones (n',), and for each row its position among these (n,)."""
    first: dict[bytes, int] = {}
    if sp.issparse(points):
        points = points.tocsr().sorted_indices()
        points.eliminate_zeros()
        ends = zip(points.indptr[:-1], points.indptr[1:], strict=True)
        rows = (points.indices[a:b].tobytes() + points.data[a:b].tobytes() for a, b in ends)
    else:
        rows = (np.ascontiguousarray(row + 0.0).tobytes() for row in points)  # + 0.0: -0.0 is 0.0
    leaders = [first.setdefault(hashlib.blake2b(row, digest_size=16).digest(), k) for k, row in enumerate(rows)]
    original, copy_of = np.unique(leaders, return_inverse=True)
    return original, copy_of.ravel()
