"""Similarities between descriptors: exact products in float32, in chunks, at cells or at every pixel.

Reduced precision breaks nearest neighbours of smooth maps (a bfloat16 product keeps 29 to 83 % of them), so
every product here is float32, with TF32 and autocast off whatever the caller's settings are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffrep.features import Descriptors, Rows, lattice
from diffrep.graphs import Graphs
from diffrep.settings import Metric

OFFICIAL_METRICS: dict[str, Metric] = {"cos": "cosine", "l2": "euclidean", "l1": "manhattan"}  # sd-dino's `dist`
FAISS_FROM = 50_000  # vectors: below, an exact product on the tensor's device is as fast or faster
# of the similarities held at once: on a CPU larger chunks only leave the caches, a GPU wants large products
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 2**23, 2**28
_GRAPHS = Graphs(limit=4)  # on a GPU the launches of a few small kernels take longer than the products
RECORDED_NUMBERS = 2**24  # in both sides; larger ones take longer than their launches, and a recording holds them
SPLIT_FROM = 256  # sources: for fewer, splitting the targets for tensor cores takes longer than it saves


@contextmanager
def full_precision(device: torch.device, *, halves: bool = False) -> Iterator[None]:
    """Products of float32 are float32 in here: no TF32, no bfloat16 kernels, no autocast.

    Args:
        halves: the factors are of `_halves`: rounding them to TF32, 10 bits behind the point, takes nothing off.
    """
    backends: Any = torch.backends
    try:
        before, named = torch.get_float32_matmul_precision(), []
    except RuntimeError:  # somebody chose by the names of PyTorch 2.9, which this one then does not speak for
        before, named = (
            "highest",
            [(each.matmul, each.matmul.fp32_precision) for each in (backends.cuda, backends.mkldnn)],
        )
    torch.set_float32_matmul_precision("high" if halves else "highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for each, precision in named:
            each.fp32_precision = precision


def _has_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the sum of what TF32 rounds it to and the rest, which loses its last bit or two there."""
    leading = (values.view(torch.int32) + 4096 & -8192).view(torch.float32)
    return leading, values - leading


def check_parts(sources: Rows, targets: Rows) -> None:
    """Refuse sources of other parts than the targets.

    Raises:
        ValueError: the message lists both.
    """
    channels, others = ([part.shape[1] for part in rows.parts] for rows in (sources, targets))
    if channels != others:
        raise ValueError(f"source parts have {channels} channels, target parts {others}")


class Scorer:
    """Scores sources against a fixed set of targets.

    ``cosine``: cosine of the joined descriptors. ``euclidean``: minus the squared distance, which orders as
    the distance does. Both come from one product per part, without joining the parts. ``manhattan``: minus the sum
    of the absolute differences.

    Raises:
        ValueError: there is no such metric.
    """

    def __init__(self, targets: Rows, metric: Metric) -> None:
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        self.metric, self.targets = metric, targets
        self.count = len(targets)
        self.parts = [part.float() for part in targets.parts]
        self.weights = targets.weights
        self.squares = targets.squared_norms()
        self.device = self.squares.device

    @cached_property
    def _split(self) -> list[Tensor]:
        """The targets' parts for a product of three on tensor cores: a b = a1 b1 + a1 b2 + a2 b1.

        It takes half the time of one float32 product beside them.
        """
        halves = (_halves(part.contiguous()) for part in self.parts)
        return [torch.cat([one, two, one], dim=1).T for one, two in halves]

    def products(self, sources: Rows, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(n, M) products with the targets, and (n,) squared lengths of the sources; `scores` makes scores of them.

        Weights and lengths are folded into the sources' side, which is the small one.
        """
        squares = sources.squared_norms()
        scale = 1 / squares.sqrt().clamp(min=1e-12) if self.metric == "cosine" else torch.full_like(squares, 2.0)
        rows = [
            part.float() * (a * b * scale[:, None])
            for part, a, b in zip(sources.parts, sources.weights, self.weights, strict=True)
        ]
        split = len(squares) >= SPLIT_FROM and _has_tensor_cores(self.device)
        columns = self._split if split else [part.T for part in self.parts]
        if split:
            rows = [torch.cat([one, one, two], dim=1) for one, two in map(_halves, rows)]
        with full_precision(self.device, halves=split):
            total = torch.mm(rows[0], columns[0], out=out)
            for part, others in zip(rows[1:], columns[1:], strict=True):
                total.addmm_(part, others)
        return total, squares

    def scores(self, products: Tensor, squares: Tensor, target_squares: Tensor) -> Tensor:
        """Products (n, ...) -> scores, in place, given the squared lengths (n,) of sources and (...) of targets."""
        if self.metric == "cosine":
            return products.mul_(1 / target_squares.clamp(min=1e-24).sqrt())
        return products.sub_(target_squares).sub_(squares.view(-1, *[1] * target_squares.ndim))

    def chunks(self, sources: Rows, memory: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, scores (n, M)); the scores' memory is used again for the next chunk."""
        check_parts(sources, self.targets)
        if memory is None:
            memory = CPU_CHUNK_BYTES if self.device.type == "cpu" else GPU_CHUNK_BYTES
        step = max(1, min(len(sources), memory // (4 * self.count)))
        buffer = torch.empty(step, self.count, device=self.device)
        for rows in _slices(len(sources), step):
            chunk, out = sources[rows], buffer[: rows.stop - rows.start]
            if self.metric != "manhattan":
                yield rows, self.scores(*self.products(chunk, out), self.squares)
                continue
            out.zero_()
            for part, targets, a, b in zip(chunk.parts, self.parts, chunk.weights, self.weights, strict=True):
                out -= torch.cdist(part.float() * a, targets * b, p=1)
            yield rows, out


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def similarities(sources: Rows, targets: Rows, metric: Metric = "cosine") -> Tensor:
    """(N, M) scores of all sources against all targets, float32; see `Scorer` for the metrics."""
    ((_, scores),) = Scorer(targets, metric).chunks(sources, memory=4 * max(len(sources), 1) * len(targets))
    return scores


@dataclass(frozen=True)
class Nearest:
    """For each of N sources its best target, the first of equals.

    Attributes:
        indices: (N,) int64.
        scores: (N,) float32.
        mutual: (N,) bool: the source is the target's best as well, the first of equals; None where not asked
            for.
    """

    indices: Tensor
    scores: Tensor
    mutual: Tensor | None = None


@torch.no_grad()
def nearest(
    sources: Rows,
    targets: Rows,
    metric: Metric = "cosine",
    *,
    mutual: bool = False,
    memory: int | None = None,
) -> Nearest:
    """Best target of every source, in one pass that never holds all similarities.

    Args:
        mutual: also say which matches are best in both directions, from a running maximum of the columns.
        memory: bytes of similarities held at once; None: what is fast on the device.

    Raises:
        ValueError: there is no target, or the two sides have other parts.
    """
    if len(targets) == 0:
        raise ValueError("there is no target location to match: the mask leaves none on the image")
    check_parts(sources, targets)

    def run(*parts: Tensor) -> tuple[Tensor, ...]:
        half = len(parts) // 2
        scorer, queries = Scorer(replace(targets, parts=parts[half:]), metric), replace(sources, parts=parts[:half])
        best = torch.empty(len(queries), device=scorer.device)
        indices = torch.empty(len(queries), dtype=torch.int64, device=scorer.device)
        columns: Tensor | None = None
        for rows, scores in scorer.chunks(queries, memory):
            torch.max(scores, 1, out=(best[rows], indices[rows]))
            if mutual:
                highest = scores.amax(0)
                columns = highest if columns is None else torch.maximum(columns, highest)
        return (indices, best) if columns is None else (indices, best, _mutual(indices, best, columns))

    parts = (*sources.parts, *targets.parts)
    if sum(part.numel() for part in parts) > RECORDED_NUMBERS:
        return Nearest(*run(*parts))
    return Nearest(*_GRAPHS((metric, mutual, memory, sources.weights, targets.weights), run, *parts))


def _mutual(indices: Tensor, best: Tensor, columns: Tensor) -> Tensor:
    """A match is mutual if its score is also its column's maximum; of equal sources the first counts."""
    candidate = best == columns[indices]
    order = torch.arange(len(indices), device=indices.device)
    first = torch.full_like(columns, len(indices), dtype=torch.int64)
    first.scatter_reduce_(0, indices, order.masked_fill(~candidate, len(indices)), "amin")
    return candidate & (first[indices] == order)


@torch.no_grad()
def soft_argmax(
    scores: Tensor,
    *,
    window: int = 7,
    temperature: float = 0.02,
    outside: Literal["exclude", "zero"] = "exclude",
) -> Tensor:
    """Expected place of the maximum, to a fraction of a cell (GeoAware-SC, section 3.3).

    Args:
        scores: (..., h, w) similarities; -inf where no match may lie.
        window: half-size in cells of the square around the maximum that counts. 0: all cells. Negative: all
            cells, after multiplication with a Gaussian of sigma -window around the maximum.
        temperature: scores are divided by it before the softmax.
        outside: what becomes of the scores outside the window. ``exclude`` leaves them out; ``zero`` sets
            them to 0 as the released code does, so that they leak in where the peak is weak.

    Returns:
        (..., 2) as fractional (column, row).
    """
    height, width = scores.shape[-2:]
    flat = scores.flatten(-2)
    peak = flat.argmax(-1, keepdim=True)
    rows, columns = (torch.arange(n, device=scores.device) for n in (height, width))
    from_row = rows[:, None].expand(height, width).flatten() - peak // width
    from_column = columns.expand(height, width).flatten() - peak % width
    if window > 0:
        far = torch.maximum(from_row.abs(), from_column.abs()) > window
        filled = flat.masked_fill(far, -torch.inf if outside == "exclude" else 0.0)
        flat = torch.where(flat == -torch.inf, flat, filled)  # what was barred before stays so
    elif window < 0:
        bell = torch.exp(-(from_row**2 + from_column**2) / (2 * window**2))
        flat = torch.where(flat == -torch.inf, flat, flat * bell)
    weights = torch.softmax(flat / temperature, dim=-1)
    weights = weights.unflatten(-1, (height, width))
    return torch.stack([(weights.sum(-2) * columns).sum(-1), (weights.sum(-1) * rows).sum(-1)], dim=-1)


class PixelScorer:
    """Scores at every pixel of the target image, as if its descriptors had been upsampled to it. They are not.

    Bilinear interpolation is linear: the product with an interpolated descriptor is the interpolated product,
    and the squared length of an interpolated descriptor is a quadratic form in products of neighbouring
    cells. So maps of h x w products are resampled, never h x w x C descriptors. A sum of absolute differences has
    no such form: for ``manhattan`` the descriptors of some rows of pixels at a time are interpolated.
    """

    def __init__(self, target: Descriptors, metric: Metric = "cosine") -> None:
        self.target = target
        self.scorer = Scorer(target.rows(), metric)
        self.cells = target.size
        self.size = target.placement.image_size
        x, y = (torch.arange(n, device=target.device)[:, None].expand(-1, 2) for n in reversed(self.size))
        self.columns = _Interpolation.at(target.cells(x)[:, 0], self.cells[1])
        self.rows = _Interpolation.at(target.cells(y)[:, 1], self.cells[0])
        self.squares = self._squared_lengths(target)

    def _squared_lengths(self, target: Descriptors) -> Tensor:
        """(H, W): squared lengths of the interpolated descriptors."""
        centres, right, down, diagonals = (torch.zeros(self.cells, device=target.device) for _ in range(4))
        for part, weight in zip(target.parts, target.weights, strict=True):
            cells = part.float() * weight
            centres += cells.square().sum(-1)
            right[:, :-1] += (cells[:, :-1] * cells[:, 1:]).sum(-1)
            down[:-1] += (cells[:-1] * cells[1:]).sum(-1)
            diagonals[:-1, :-1] += (cells[:-1, :-1] * cells[1:, 1:]).sum(-1)
            diagonals[:-1, :-1] += (cells[:-1, 1:] * cells[1:, :-1]).sum(-1)
        with full_precision(target.device):
            lines = centres @ self.columns.squares.T + 2 * right @ self.columns.cross.T
            between = down @ self.columns.squares.T + diagonals @ self.columns.cross.T
            return self.rows.squares @ lines + 2 * self.rows.cross @ between

    def chunks(self, sources: Rows, memory: int = 2**26) -> Iterator[tuple[slice, Tensor]]:
        """Yield (sources, scores (n, H, W)), float32."""
        check_parts(sources, self.scorer.targets)
        for rows in _slices(len(sources), max(1, memory // (4 * self.size[0] * self.size[1]))):
            if self.scorer.metric == "manhattan":
                yield rows, self._minus_absolute_differences(sources[rows], memory)
                continue
            products, squares = self.scorer.products(sources[rows])
            with full_precision(self.scorer.device):
                resampled = (self.rows.weights @ products.unflatten(1, self.cells)) @ self.columns.weights.T
            yield rows, self.scorer.scores(resampled, squares, self.squares)

    def _minus_absolute_differences(self, sources: Rows, memory: int) -> Tensor:
        channels = sum(part.shape[-1] for part in self.target.parts)
        pixels = lattice(self.size, self.target.device).flatten(0, 1).float()
        bands = pixels.split(self.size[1] * max(1, memory // (4 * self.size[1] * channels)))
        scores = [similarities(sources, self.target.at(band), "manhattan") for band in bands]
        return torch.cat(scores, dim=1).unflatten(1, self.size)


@dataclass(frozen=True)
class _Interpolation:
    """Linear interpolation along one axis at n places between m cells, as (n, m) matrices.

    A place lies between a cell and its next, with weights 1 - f and f. `weights` has these, `squares` their
    squares, `cross` their product at the first of the two cells.
    """

    weights: Tensor
    squares: Tensor
    cross: Tensor

    @classmethod
    def at(cls, places: Tensor, count: int) -> _Interpolation:
        first = places.floor().clamp(0, max(count - 2, 0))
        fraction = (places - first).clamp(0, 1) if count > 1 else torch.zeros_like(places)
        left = torch.nn.functional.one_hot(first.long(), count).to(places.dtype)
        right = left.roll(1, dims=1)  # never wraps where the fraction counts: `first` ends at count - 2
        one, two = (1 - fraction)[:, None], fraction[:, None]
        return cls(left * one + right * two, left * one**2 + right * two**2, left * one * two)
