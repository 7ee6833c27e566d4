"""The heat kernel H_t = exp(-t L) of a graph, on blocks of columns or as a whole, and the distances that it gives.

Which kernel: `squared_heat` is exact entry by entry and made for whole matrices of some thousand points;
`chebyshev_heat` costs `order` sparse products per column and sees `order` edges far; the implicit steps are
first (Euler) and second order (Crank-Nicolson) in time and reach everywhere; `spectral_heat` has an
absolute error of about 1e-15, so that far pairs, whose heat is smaller, are noise.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import gammaln, ive

from diffrep.manifold.graphs import Csr, largest_eigenvalue

Array = NDArray[Any]
Volume = Literal["geometric", "arithmetic"]

_SHORT, _TERMS = 0.25, 12  # the longest time of the short-time series, and its terms: a squaring costs three of them
WIDTH = 64  # columns of the whole kernel that are worked on at once: they stay in the cache
_TERM_NUMBERS = 2**25  # of Chebyshev terms that are held before they are added


def chebyshev_coefficients(t: float, phi: float, order: int) -> NDArray[np.float64]:
    """Chebyshev coefficients c_0..c_order of exp(-t L) = c_0 / 2 + sum_k c_k T_k(L / phi - 1).

    phi is half the largest eigenvalue; c_k = 2 exp(-t phi) I_k(-t phi), in scaled Bessel functions.
    """
    return 2.0 * ive(np.arange(order + 1), -t * phi)


def chebyshev_tail(t: float, phi: float, order: int) -> float:
    """Bound on any entry's error from cutting the series after `order`: the sum of |c_k| beyond."""
    return float(2.0 * ive(np.arange(order + 1, order + 400), t * phi).sum())


def chebyshev_order(t: float, phi: float, signals: Array, error: float) -> int:
    """The smallest order whose proven relative error on `signals` is at most `error`.

    The error is ||exp(-tL) x - p(L) x||^2 / ||exp(-tL) x||^2, bounded as in Marcotte et al., "Fast Multiscale
    Diffusion on Graphs" (ICASSP 2022), with the bound that knows how much of x is constant.

    Args:
        signals: (n,) or (n, columns); the largest order that any column needs counts.
    """
    columns = np.asarray(signals, dtype=np.float64).reshape(len(signals), -1)
    spread = len(columns) * (columns**2).sum(axis=0) / columns.sum(axis=0) ** 2
    half = t * phi / 2.0
    order = np.arange(max(1, int(half)), 100_000)
    log_remainder = np.log(2.0) + half**2 / (order + 2) - 2 * half
    log_remainder += (order + 1) * np.log(half) - gammaln(order + 1) - np.log(order + 1 - half)
    enough = np.flatnonzero(2 * log_remainder + np.log(spread.max()) <= np.log(error))
    if not len(enough):
        raise ValueError(f"no order below 100,000 reaches a relative error of {error} at t = {t}")
    return int(order[enough[0]])


def series_order(t: float, phi: float, smallest: float) -> int:
    """The Chebyshev order, 2 at least, after which the rest of the series is at most `smallest`."""
    high = 8
    while chebyshev_tail(t, phi, high) > smallest:
        high *= 2
    return bisect_left(range(high + 1), True, lo=2, key=lambda order: chebyshev_tail(t, phi, order) <= smallest)


def chebyshev_heat(
    lap: Csr,
    signals: Array,
    t: float | Sequence[float],
    *,
    order: int = 32,
    lmax: float | None = None,
    device: str = "cpu",
) -> Array:
    """exp(-t L) applied to a block of signals by a Chebyshev series.

    Args:
        signals: (n, columns); its dtype (float32 or float64) is that of the computation.
        t: one diffusion time, or several that share one recursion.
        order: degree of the polynomial. Points more than `order` edges apart get exact zeros.
        lmax: largest eigenvalue of `lap`, or a little more; computed where None.
        device: "cpu" (SciPy) or a torch device such as "cuda".

    Returns:
        (n, columns), or (times, n, columns) for several t. Rounding may leave tiny negative entries.
    """
    lmax = largest_eigenvalue(lap) if lmax is None else lmax
    times = np.atleast_1d(np.asarray(t, dtype=np.float64))
    phi = max(lmax, 1e-6) / 2.0
    coefficients = np.stack([chebyshev_coefficients(float(s), phi, order) for s in times])
    operator = (lap * (2.0 / phi) - 2.0 * sp.identity(lap.shape[0])).tocsr().astype(signals.dtype)
    # heat far away is tiny, and denormal numbers are several times slower: scale it up by a power of two
    largest = float(np.abs(signals).max(initial=0.0))
    scale = 2.0 ** (90 - np.ceil(np.log2(largest))) if signals.dtype == np.float32 and largest > 0 else 1.0
    signals = signals * signals.dtype.type(scale)
    if device == "cpu":
        result = _chebyshev_scipy(operator, signals, coefficients)
    else:
        result = _chebyshev_torch(operator, signals, coefficients, device)
    if scale != 1.0:
        result *= result.dtype.type(1 / scale)
    return result if np.ndim(t) else result[0]


def _chebyshev_scipy(operator: Csr, signals: Array, coefficients: NDArray[np.float64]) -> Array:
    """The recursion, in each step on the rows alone that the signals have reached by then."""
    count, terms = coefficients.shape
    reached = _reached_rows(operator, signals, terms)
    factors = coefficients.astype(signals.dtype)
    factors[:, 0] /= 2
    before, now = signals.copy(), np.zeros_like(signals)
    if terms > 1:
        now[reached[1]] = _rows(operator, reached[1]) @ signals * signals.dtype.type(0.5)
    sums = np.zeros((count, *signals.shape), signals.dtype)
    for k, term in enumerate((before, now)[:terms]):
        for c, total in zip(factors[:, k], sums, strict=True):
            total[reached[k]] += c * term[reached[k]]
    # several times share each term; a few terms are added together, so that the sums are not read for every one
    together = int(np.clip(_TERM_NUMBERS // signals.size, 1, 16)) if count > 1 else 1
    waiting = np.zeros((together, *signals.shape), signals.dtype) if together > 1 else None
    for k in range(2, terms):
        rows = reached[k]
        after = before[rows]
        np.subtract(_rows(operator, rows) @ now, after, out=after)
        before, now = now, before
        if waiting is None:
            for c, total in zip(factors[:, k], sums, strict=True):
                total[rows] += c * now[rows]
        else:
            place = (k - 2) % together
            waiting[place, rows] = now[rows]
            if place == together - 1 or k == terms - 1:
                some = factors[:, k - place : k + 1]
                entries = slice(rows.start * signals.shape[1], rows.stop * signals.shape[1])
                sums.reshape(count, -1)[:, entries] += some @ waiting.reshape(together, -1)[: place + 1, entries]
    return sums


def _reached_rows(operator: Csr, signals: Array, terms: int) -> list[slice]:
    """For each of T_0..T_(terms - 1), a slice of rows outside of which its product with the signals is zero.

    Where neighbours are close in memory it grows by one layer of neighbours with each term; on a random order it is
    everything at once.
    """
    n = operator.shape[0]
    rows = np.flatnonzero(signals.any(axis=1))
    if not len(rows):
        return [slice(0, 0)] * terms
    row, filled = np.arange(n), np.flatnonzero(np.diff(operator.indptr))
    lowest, highest = row.copy(), row.copy()
    starts = operator.indptr[filled]
    lowest[filled] = np.minimum(row[filled], np.minimum.reduceat(operator.indices, starts))
    highest[filled] = np.maximum(row[filled], np.maximum.reduceat(operator.indices, starts))
    lowest = np.minimum.accumulate(lowest[::-1])[::-1]  # of this row and all behind it
    highest = np.maximum.accumulate(highest)  # of this row and all before it
    low, high = int(rows[0]), int(rows[-1])
    reached = [slice(low, high + 1)]
    for _ in range(terms - 1):
        low, high = int(lowest[low]), int(highest[high])
        reached.append(slice(low, high + 1))
    return reached


def _rows(matrix: Csr, rows: slice) -> Csr:
    """Some rows of a matrix, without copying their numbers."""
    if rows == slice(0, matrix.shape[0]):
        return matrix
    pointers = matrix.indptr[rows.start : rows.stop + 1]
    part = slice(pointers[0], pointers[-1])
    shape = rows.stop - rows.start, matrix.shape[1]
    return sp.csr_matrix((matrix.data[part], matrix.indices[part], pointers - pointers[0]), shape=shape, copy=False)


def _chebyshev_torch(operator: Csr, signals: Array, coefficients: NDArray[np.float64], device: str) -> Array:
    import torch

    parts = operator.indptr.astype(np.int64), operator.indices.astype(np.int64), operator.data
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks)", UserWarning)
        matrix = torch.sparse_csr_tensor(*map(torch.from_numpy, parts), operator.shape, check_invariants=False)  # type: ignore[call-arg, arg-type]  # its stub knows no shape after three tensors
        matrix = matrix.to(device)
    before = torch.from_numpy(signals).to(device)
    now = matrix @ before * 0.5
    sums = [c[0] / 2 * before + (c[1] * now if len(c) > 1 else 0.0) for c in coefficients.tolist()]
    for k in range(2, coefficients.shape[1]):
        before, now = now, matrix @ now - before
        for c, total in zip(coefficients.tolist(), sums, strict=True):
            total.add_(now, alpha=c[k])
    return torch.stack(sums).cpu().numpy()


def implicit_heat(lap: Csr, signals: Array, t: float, *, steps: int = 32, theta: float = 1.0) -> Array:
    """exp(-t L) applied to signals by implicit time steps, one sparse factorisation for all.

    Args:
        signals: (n, columns).
        theta: 1 is backward Euler (always positive, tails too heavy), 0.5 is Crank-Nicolson.
    """
    from scipy.sparse.linalg import splu

    step = t / steps
    identity = sp.identity(lap.shape[0])
    factors = splu((identity + theta * step * lap).tocsc())
    explicit = (identity - (1 - theta) * step * lap).tocsr()
    heat = np.asarray(signals, dtype=np.float64)
    for _ in range(steps):
        heat = factors.solve(heat if theta == 1 else explicit @ heat)
    return heat


def spectral_heat(lap: Csr, t: float, *, rank: int | None = None) -> NDArray[np.float64]:
    """H_t (n, n) from the eigenvectors of the Laplacian; from the `rank` smoothest ones alone."""
    from scipy.linalg import eigh

    n = lap.shape[0]
    subset = None if rank is None or rank >= n else (0, rank - 1)
    values, vectors = eigh(lap.toarray(), subset_by_index=subset)
    return (vectors * np.exp(-t * values)) @ vectors.T


def squared_heat(lap: Csr, t: float) -> NDArray[np.float64]:
    """H_t (n, n), accurate entry by entry down to the smallest floating point numbers.

    exp(-tL) = e^-tc sum_k (tc)^k/k! (I - L/c)^k has non-negative terms only (uniformisation), so nothing
    cancels; a short time is summed and squared until it has grown to t, which also multiplies how far the
    kernel sees: beyond 12 * 2^squarings edges, 48 at least, the result is zero.
    """
    n = lap.shape[0]
    rate = max(float(lap.diagonal().max(initial=0.0)), float(np.finfo(np.float64).tiny))
    squarings = max(2, int(np.ceil(np.log2(max(t * rate / _SHORT, 1e-9)))))
    short = t * rate / 2**squarings
    step = (sp.identity(n) - lap / rate).tocsr() * short
    steps = [step / k for k in range(1, _TERMS + 1)]
    heat = np.identity(n)
    for block in np.split(heat, range(WIDTH, n, WIDTH)):  # rows, which are columns: the kernel is symmetric
        term = block.T.copy()
        for shorter in steps:
            term = shorter @ term
            block += term.T
    heat *= np.exp(-short)
    for _ in range(squarings):
        heat = heat @ heat.T  # which BLAS knows to be symmetric: half the work
    return (heat + heat.T) / 2


def knee(x: NDArray[np.float64], y: NDArray[np.float64], *, sensitivity: float = 0.5) -> int | None:
    """Index of the knee of a concave increasing curve, by Kneedle (Satopaa et al. 2011).

    With x and y normalised to [0, 1], it is the first local maximum of y - x after which the difference
    falls by `sensitivity` mean spacings before it next turns upward. None where there is no such maximum.
    """
    if np.ptp(y) == 0 or np.ptp(x) == 0:
        return None
    unit_x, unit_y = (x - x.min()) / np.ptp(x), (y - y.min()) / np.ptp(y)
    difference = unit_y - unit_x
    drop = sensitivity * float(np.abs(np.diff(unit_x)).mean())
    rising = np.r_[True, difference[1:] >= difference[:-1]]
    falling = np.r_[difference[:-1] >= difference[1:], True]
    for peak in np.flatnonzero(rising & falling):
        for later in range(peak + 1, len(x)):
            if difference[later] < difference[peak] - drop:
                return int(peak)
            if difference[later] > difference[later - 1]:
                break
    return None


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

    The dissimilarity of Huguet et al. (NeurIPS 2023) and its variants. Varadhan's formula says that -4t log H_ij
    tends to the squared geodesic distance as t goes to 0; V_ij takes out what is due to the volume around the points:
    (H_ii + H_jj) / 2 ("arithmetic", the published choice) or sqrt(H_ii H_jj) ("geometric", never negative and zero
    from a point to itself at weight 1).

    Args:
        columns: (n, m) heat of all or some columns of the kernel; negative entries count as zero.
        rows_diagonal, columns_diagonal: (n,) and (m,), H_ii of the rows' and columns' points; the diagonal of `columns`
            where None.
        floor: added to the heat before the logarithm; it caps the distances of far pairs.
        volume_weight: w, called harnack_regul officially.
        scale_power: p; 2 gives the squared distance.

    Returns:
        (n, m), in the dtype of `columns`.
    """
    heat = np.maximum(columns, 0)
    squared = np.log(heat + heat.dtype.type(max(floor, float(np.finfo(heat.dtype).tiny))))
    squared *= -4.0 * t
    if volume not in ("geometric", "arithmetic", None):
        raise ValueError(f"volume must be 'geometric', 'arithmetic' or None, got {volume!r}")
    if volume is not None and volume_weight:
        if (rows_diagonal is None or columns_diagonal is None) and heat.shape[0] != heat.shape[1]:
            raise ValueError(f"the volume of heat of shape {heat.shape} needs rows_diagonal and columns_diagonal")
        rows, others = (
            np.asarray(heat.diagonal() if diagonal is None else diagonal, dtype=np.float64)
            for diagonal in (rows_diagonal, columns_diagonal)
        )
        if volume == "geometric":
            term = np.add.outer(np.log(np.maximum(rows, 0) + floor) / 2, np.log(np.maximum(others, 0) + floor) / 2)
        else:
            term = np.log(np.add.outer(rows, others) / 2 + floor)
        squared += (volume_weight * 4.0 * t * term).astype(squared.dtype)
    np.maximum(squared, 0, out=squared)
    return squared if scale_power == 2 else squared ** squared.dtype.type(scale_power / 2)


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


def finite_distances(distances: Array) -> Array:
    """Infinite distances, between components that were left apart, become twice the largest finite one."""
    infinite = ~np.isfinite(distances)
    if infinite.any():
        distances[infinite] = 2 * distances[~infinite].max(initial=0.5)
    return distances
