"""From feature rows to the points of a graph: unit length, reduction, each different row once."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from diffrep.manifold.neighbors import Backend, NeighborSearch

_PCA_SEED = 42  # the published one


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
        self.search = NeighborSearch(points, backend=backend, n_jobs=n_jobs)
        self.original, self.copy_of = different_rows(self.search)
        if len(self.original) < len(self.copy_of):
            self.search = NeighborSearch(points[self.original], backend=backend, n_jobs=n_jobs)

    def points_of(self, features: Any) -> Any:
        """Feature rows as points of this space."""
        unit = self._unit(features)
        return unit if self._reduction is None else self._reduction.transform(unit)

    def _unit(self, features: Any) -> Any:
        if self.metric != "cosine":
            return features
        from sklearn.preprocessing import normalize

        return normalize(features)


def different_rows(search: NeighborSearch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Points that are no copies of earlier ones (n',), and for each point its position among these (n,)."""
    n = search.points.shape[0]
    distances, _ = search.query(search.points, 2)
    twins = np.flatnonzero((distances == 0).all(axis=1)) if n > 1 else np.array([], dtype=np.int64)
    first = np.arange(n)
    if len(twins):
        rows = search.points[twins]
        dense = rows.toarray() if sp.issparse(rows) else np.asarray(rows)
        _, leader, member = np.unique(dense, axis=0, return_index=True, return_inverse=True)
        first[twins] = twins[leader[member.ravel()]]
    original, copy_of = np.unique(first, return_inverse=True)
    return original, copy_of.ravel()
