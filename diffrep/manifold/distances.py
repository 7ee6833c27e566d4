"""From heat to distances: the heat-geodesic dissimilarity of Huguet et al. (NeurIPS 2023) and its variants.

A `columns` argument below is H restricted to some columns (n, m), the landmarks; `rows_diagonal` (n,) and
`columns_diagonal` (m,) are H_ii of the rows' and of the columns' points. For a whole kernel both are its
diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Array = NDArray[Any]
Volume = Literal["geometric", "arithmetic"]

REFERENCE_FLOOR = 1e-16  # added to the heat before the logarithm in the official code


def heat_geodesic_distances(
    columns: Array,
    t: float,
    *,
    rows_diagonal: Array | None = None,
    columns_diagonal: Array | None = None,
    floor: float = 1e-300,
    volume: Volume | None = "geometric",
    volume_weight: float = 1.0,
    scale_power: float = 1.0,
) -> Array:
    """d_ij = s_ij^(p/2) with s_ij = -4t log H_ij + w 4t log V_ij, negative s_ij set to zero.

    Varadhan's formula says that -4t log H_ij tends to the squared geodesic distance as t goes to 0; V_ij
    takes out
    what is due to the volume around the points: (H_ii + H_jj) / 2 ("arithmetic", the published choice) or
    sqrt(H_ii H_jj) ("geometric", never negative and zero from a point to itself at weight 1).

    Args:
        columns: (n, m) heat; negative entries count as zero.
        rows_diagonal, columns_diagonal: H_ii where `columns` is no whole kernel.
        floor: added to the heat before the logarithm; it caps the distances of far pairs.
        volume_weight: w, called harnack_regul officially.
        scale_power: p; 2 gives the squared distance.

    Returns:
        (n, m), in the dtype of `columns`.
    """
    heat = np.maximum(columns, 0)
    squared = np.log(heat + _representable(floor, heat.dtype))
    squared *= -4.0 * t
    if volume is not None and volume_weight:
        rows, others = _diagonals(columns, rows_diagonal, columns_diagonal)
        if volume == "geometric":
            logs = (np.log(np.maximum(d, 0) + floor) / 2 for d in (rows, others))
            term = np.add.outer(*logs)
        elif volume == "arithmetic":
            term = np.log(np.add.outer(rows, others) / 2 + floor)
        else:
            raise ValueError(f"volume must be 'geometric', 'arithmetic' or None, got {volume!r}")
        squared += (volume_weight * 4.0 * t * term).astype(squared.dtype)
    np.maximum(squared, 0, out=squared)
    return squared if scale_power == 2 else squared ** squared.dtype.type(scale_power / 2)


def _diagonals(columns: Array, rows: Array | None, others: Array | None) -> tuple[Array, Array]:
    if rows is not None and others is not None:
        return rows.astype(np.float64), others.astype(np.float64)
    if columns.shape[0] != columns.shape[1]:
        raise ValueError(
            "the volume term needs rows_diagonal and columns_diagonal where the heat is not square,"
            f" got {columns.shape}"
        )
    diagonal = np.maximum(columns.diagonal(), 0).astype(np.float64)
    return diagonal, diagonal


def _representable(floor: float, dtype: np.dtype[Any]) -> Any:
    return dtype.type(max(floor, float(np.finfo(dtype).tiny)))


def log_ratio_distances(
    heat: Array, t: float, *, floor: float = REFERENCE_FLOOR, scale_power: float = 1.0
) -> NDArray[np.float64]:
    """(log H_ij / log t)^p, the official option log_normalize; negative where t > 1, so no distance.

    With implicit steps the official code puts the length of one step in the place of t.
    """
    return (np.log(np.maximum(heat, 0) + floor) / np.log(t + floor)) ** scale_power


def multiscale_weights(times: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of several diffusion times: proportional to 1 - t / sum(t), summing to one."""
    times = np.asarray(times, dtype=np.float64)
    if len(times) == 1:
        return np.ones(1)
    weights = 1.0 - times / times.sum()
    return weights / weights.sum()


def triplet_distances(distances: Array, others: Array | None = None, *, scale: float = 1.0) -> Array:
    """T_ij = || D[i, :] - D[j, :] ||, how differently two points see all columns.

    Args:
        distances: (n, m).
        others: (k, m), the rows of the points j; the same as `distances` where None.
        scale: factor on the result: sqrt(n / m) where m columns stand for n.

    Returns:
        (n, k), in the dtype of `distances`.
    """
    others = distances if others is None else others
    a, b = distances.astype(np.float64), others.astype(np.float64)
    return (cdist(a, b) * scale).astype(distances.dtype)


def truncate_heat(heat: Array, threshold: float) -> Array:
    """Heat below `threshold` (an absolute value) becomes zero; experimental in the official code."""
    return np.where(heat < threshold, 0, heat)


def truncate_distances(
    distances: NDArray[np.float64], argument: float, *, side: Literal["min", "max"], rescale: bool = True
) -> NDArray[np.float64]:
    """Saturate far ("max") or near ("min") pairs; experimental in the official code.

    Args:
        argument: with `rescale`, a threshold on distances brought to [0, 1], beyond which they become 1
            ("max") or 0 ("min"). Without, a quantile of the distances, beyond which they become the largest
            or smallest one.
    """
    if side not in ("min", "max"):
        raise ValueError(f"side must be 'min' or 'max', got {side!r}")
    if rescale:
        result = (distances - distances.min()) / np.ptp(distances)
        cut, low, high = argument, 0.0, 1.0
    else:
        result = distances.copy()
        cut, low, high = (
            float(np.quantile(distances, argument)),
            float(distances.min()),
            float(distances.max()),
        )
    result[result > cut if side == "max" else result < cut] = high if side == "max" else low
    return np.maximum(result, result.T)


def finite_distances(distances: Array) -> Array:
    """Infinite distances, between components that were left apart, become twice the largest finite one."""
    infinite = ~np.isfinite(distances)
    if infinite.any():
        distances[infinite] = 2 * distances[~infinite].max(initial=0.5)
    return distances


def mds_weights(
    kind: Literal["heat", "inverse", "gaussian"], distances: Array, heat: Array, argument: float = 1.0
) -> NDArray[np.float64]:
    """Weights of pairs in the stress, same shape as `distances`.

    "heat": H_ij + 1e-5. "inverse": D^-argument. "gaussian": exp(-E^2 / argument), E being D brought to [0,
    1].
    """
    if kind == "heat":
        return np.maximum(heat, 0) + 1e-5
    if kind == "inverse":
        positive = np.asarray(distances, dtype=np.float64)
        smallest = positive[positive > 0].min(initial=1.0)
        return np.maximum(positive, smallest) ** -argument
    if kind == "gaussian":
        return np.exp(-(((distances - distances.min()) / np.ptp(distances)) ** 2) / argument)
    raise ValueError(f"mds_weights must be 'heat', 'inverse', 'gaussian' or None, got {kind!r}")
