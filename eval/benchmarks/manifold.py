"""Time and memory of embeddings against the number of points: ours, PHATE, UMAP, Isomap, side by side.

Every measurement is a process of its own, because the peak memory of a process never falls. The methods take
turns at each size, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffrep.settings import check

LIMITS = {"ours, all pairs": 4_000, "Isomap": 8_000}  # the most points that they can take
_MODULES = {"ours": "sklearn", "ours, all pairs": "sklearn", "PHATE": "phate", "UMAP": "umap", "Isomap": "sklearn"}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Measured:
    """One method on one data set.

    Attributes:
        seconds, processor: wall and processor time of the fit, imports left out.
        megabytes: how much the peak memory of the process grew over that with the data loaded.
        spearman: mean rank correlation of distances in the embedding with the true ones, rows of 500 points.
    """

    method: str
    points: int
    seconds: float
    processor: float
    megabytes: float
    spearman: float


def available() -> list[str]:
    """The methods whose libraries are installed."""
    return [name for name, module in _MODULES.items() if importlib.util.find_spec(module)]


@dataclass(frozen=True)
class ManifoldBenchmark:
    """Embed noisy swiss rolls of growing size, every method at every size that it can take."""

    sizes: tuple[int, ...] = (500, 1_000, 2_000, 4_000, 8_000, 20_000)  # numbers of points
    dim: int = 50
    noise: float = 0.5
    methods: tuple[str, ...] = ()  # empty: all that are installed
    repeats: int = 1  # the median by processor time counts
    threads: int = 1  # of BLAS, OpenMP and Numba
    timeout: float = 3600.0  # seconds after which a method is given up, also at larger sizes
    json: bool = False  # print JSON instead of the table

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> list[Measured]:
        """Measure, print the table and the growth exponents, and return the rows."""
        rows = self.measure()
        print(json.dumps([vars(row) for row in rows], indent=2) if self.json else table(rows))
        return rows

    def measure(self) -> list[Measured]:
        """The rows, each measured in a process of its own.

        Raises:
            ValueError: a method is unknown or not installed.
            RuntimeError: a method failed.
        """
        chosen = list(self.methods) or available()
        if missing := sorted(set(chosen) - set(available())):
            raise ValueError(f"{', '.join(missing)}: not installed or unknown, there is {', '.join(available())}")
        rows: list[Measured] = []
        too_slow: set[str] = set()
        for n in self.sizes:
            for method in chosen:
                if n > LIMITS.get(method, n) or method in too_slow:
                    continue
                try:
                    tries = [self._measured(method, n) for _ in range(self.repeats)]
                except subprocess.TimeoutExpired:
                    too_slow.add(method)
                else:
                    rows.append(sorted(tries, key=lambda row: row.processor)[len(tries) // 2])
        return rows

    def _measured(self, method: str, n: int) -> Measured:
        task = {"method": method, "points": n, "dim": self.dim, "noise": self.noise, "threads": self.threads}
        command = [sys.executable, "-W", "ignore", "-m", "diffrep.eval.benchmarks.manifold", json.dumps(task)]
        environment = {**os.environ, **dict.fromkeys(_THREADS, str(self.threads))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=self.timeout)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{method} at {n} points failed: {last}")
        return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def growth(rows: Sequence[Measured], of: str = "processor", above: int = 2_000) -> dict[str, float]:
    """Exponent p of the power law n^p that fits best from `above` points on, for every method with two sizes."""
    exponents = {}
    for method in dict.fromkeys(row.method for row in rows):
        curve = [(row.points, max(getattr(row, of), 1e-3)) for row in rows if row.method == method]
        if len(curve := [point for point in curve if point[0] >= above]) >= 2:
            n, value = np.log(np.array(curve, dtype=np.float64)).T
            exponents[method] = float(np.polyfit(n, value, 1)[0])
    return exponents


def table(rows: Sequence[Measured]) -> str:
    """Processor seconds, memory and quality, one line per method and size, and the growth exponents."""
    lines = [f"{'method':16} {'points':>9} {'seconds':>8} {'cpu s':>8} {'MB':>7} {'spearman':>9}"]
    for row in rows:
        cost = f"{row.seconds:8.1f} {row.processor:8.1f} {row.megabytes:7.0f}"
        lines.append(f"{row.method:16} {row.points:9,} {cost} {row.spearman:9.3f}")
    times, memory = growth(rows), growth(rows, "megabytes")
    lines += [f"{name:16} grows as n^{times[name]:.2f} in time, n^{memory[name]:.2f} in memory" for name in times]
    return "\n".join(lines)


def _embedder(method: str, n: int, threads: int) -> Callable[[Any], Any]:
    if method.startswith("ours"):
        from diffrep.manifold import HeatGeodesicEmbedding

        count: Literal["auto"] | None = "auto" if method == "ours" else None
        return HeatGeodesicEmbedding(random_state=0, n_landmarks=count, n_jobs=threads).fit_transform
    if method == "PHATE":
        import phate

        return phate.PHATE(random_state=0, verbose=0, n_jobs=threads).fit_transform
    if method == "UMAP":
        import umap

        return umap.UMAP(random_state=0, n_jobs=1).fit_transform
    from sklearn.manifold import Isomap

    return Isomap(n_neighbors=10, n_jobs=threads).fit_transform


def _measure(task: Mapping[str, Any]) -> Measured:
    """What the child process does."""
    import resource
    import time

    from scipy.spatial.distance import pdist, squareform

    from diffrep.eval.manifold import row_spearman
    from diffrep.eval.toy_manifolds import swiss_roll

    n = task["points"]
    embed = _embedder(task["method"], n, task["threads"])
    warm = swiss_roll(200, noise=task["noise"], dim=task["dim"], seed=1)
    embed(warm.points)  # imports, and what Numba compiles
    toy = swiss_roll(n, noise=task["noise"], dim=task["dim"], seed=47)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    embedding = embed(toy.points)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    some = np.sort(np.random.default_rng(0).choice(n, min(n, 500), replace=False))
    quality = row_spearman(squareform(pdist(np.asarray(embedding)[some])), toy.geodesic(some)[:, some])
    return Measured(task["method"], n, wall, processor, grown, quality)


if __name__ == "__main__":
    print(json.dumps(vars(_measure(json.loads(sys.argv[1])))))
