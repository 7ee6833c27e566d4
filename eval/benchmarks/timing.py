"""Timing two sides of a claim in one process: alternated, medians, ratios."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffrep.graphs import without_graphs
from diffrep.settings import check


@dataclass(frozen=True)
class Timing:
    """Seconds of one side over the repeats."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def interleave(
    sides: Mapping[str, Callable[[], object]], *, repeats: int = 5, warmups: int = 2, device: str = "cpu"
) -> dict[str, Timing]:
    """Time functions in turns, so that a busy machine slows all of them alike.

    On CPU the clock is the process's own CPU time, which hardly moves when others compute; run it with one
    thread. On CUDA it is wall time between synchronisations.
    """

    def clock() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(warmups + repeats):
        for name, run in sides.items():
            start = clock()
            run()
            if round_number >= warmups:
                seconds[name].append(clock() - start)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: Sequence[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), low, high)


@dataclass(frozen=True)
class Row:
    """One claim: what is compared, both times, and how equal the results were."""

    claim: str
    plain: Timing
    ours: Timing
    equality: str  # measured in the same run
    flops: str = ""  # counted for both sides, where that says something

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.plain.median / self.ours.median


def table(rows: Sequence[Row]) -> str:
    """The rows as text, ratio first."""
    lines = [f"{'ratio':>9}  {'plain s (quartiles)':>27}  {'ours s (quartiles)':>27}  claim"]
    for row in rows:
        sides = [f"{t.median:.4g} ({t.low:.3g}..{t.high:.3g})" for t in (row.plain, row.ours)]
        lines.append(f"{row.ratio:>8.2f}x  {sides[0]:>27}  {sides[1]:>27}  {row.claim}")
        lines.append(f"{'':>11}{row.equality}{'; ' + row.flops if row.flops else ''}")
    return "\n".join(lines)


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of a function: products, convolutions and attention."""
    with without_graphs(), FlopCounterMode(display=False) as counter:  # a replayed graph shows no operations
        run()
    return int(counter.get_total_flops())


def said_flops(plain: float, ours: float) -> str:
    """GFLOP of both sides in words."""
    return f"GFLOP {plain:.1f} against {ours:.1f} ({plain / ours:.2f}x)"


def peak_memory(device: str = "cpu") -> float:
    """The most memory that this process has had so far, mapped pages included, MiB; on CUDA that of the card."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference as a share of the other's largest value."""
    return float((one - other).abs().max() / other.abs().max())


@dataclass(frozen=True)
class Claim:
    """That ours computes the same as the plain way, and faster.

    Attributes:
        said: says the GFLOP of both sides.
        exact: the same in float32, where both sides round to less: only the distance to it tells which is right.
    """

    what: str
    plain: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    said: Callable[[float, float], str] = said_flops
    exact: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class PairedBenchmark:
    """A benchmark of claims, measured in one thread. A subclass yields `claims`, or measures `rows` of its own."""

    repeats: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        check(self)

    def claims(self) -> Iterable[Claim]:
        """What is compared."""
        raise NotImplementedError

    def rows(self) -> Iterable[Row]:
        """Measure every claim: times, the largest difference of the results, and operations."""
        for claim in self.claims():
            sides = {"plain": claim.plain, "ours": claim.ours}
            warmups = 2 if self.device == "cpu" else 4  # CUDA graphs are recorded in the second call
            times = interleave(sides, repeats=self.repeats, warmups=warmups, device=self.device)
            expected, got = claim.plain().float(), claim.ours().float()
            equality = f"largest difference {apart(got, expected):.1e} of the maximum"
            if claim.exact is not None:
                right = claim.exact().float()
                equality += f"; from float32 plain {apart(expected, right):.1e}, ours {apart(got, right):.1e}"
            counts = [count_flops(side) / 1e9 for side in (claim.plain, claim.ours)]
            yield Row(claim.what, times["plain"], times["ours"], equality, claim.said(*counts))

    def peak(self, side: int, name: str) -> float:
        """MiB that one side takes at its peak, beside the networks, in this process."""
        raise NotImplementedError

    def peak_elsewhere(self, side: int, name: str) -> float:
        """`peak` in a process of its own: what a process has taken once never falls."""
        kind = type(self)
        asked = f"{kind.__name__}(**{vars(self)!r}).peak({side}, {name!r})"
        code = f"from {kind.__module__} import {kind.__name__}; print({asked})"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(result.stdout.splitlines()[-1])

    def run(self) -> list[Row]:
        """Time and count both sides of every claim, print the table and return its rows."""
        torch.set_num_threads(1)
        rows = list(self.rows())
        print(table(rows))
        return rows
