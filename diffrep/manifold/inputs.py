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


def different_rows(points: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that are no copies of earlier ones (n',), and for each row its position among these (n,).

    Columns split groups of equal rows one after the other; rows that are alone need not be looked at again, so
    that for measured data a column or two suffice.
    """
    n = points.shape[0]
    columns = points.tocsc() if sp.issparse(points) else points
    open_rows, group = np.arange(n), np.zeros(n, dtype=np.int64)
    for k in range(points.shape[1]):
        column = columns[:, [k]].toarray().ravel() if sp.issparse(points) else columns[:, k]
        value = np.unique(column[open_rows], return_inverse=True)[1].ravel()
        pair = group.astype(np.int64) * (value.max(initial=0) + 1) + value
        _, group, count = np.unique(pair, return_inverse=True, return_counts=True)
        shared = count[group.ravel()] > 1
        open_rows, group = open_rows[shared], group.ravel()[shared]
        if not len(open_rows):
            break
    first = np.arange(n)
    if len(open_rows):
        _, leader, member = np.unique(group, return_index=True, return_inverse=True)
        first[open_rows] = open_rows[leader[member.ravel()]]
    original, copy_of = np.unique(first, return_inverse=True)
    return original, copy_of.ravel()
