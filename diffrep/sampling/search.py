"""Searching for the steps of a sampler: timesteps, and parts of the network (AutoDiffusion, Li et al. 2023).

The search is evolutionary and knows nothing of what it improves: a fitness is any function of a `Candidate`, smaller is
better. It is seeded, and goes on from its file when it was interrupted.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffrep.files import read_document, write_document
from diffrep.sampling.schedules import Array, SamplingError


@dataclass(frozen=True)
class Respaced:
    """The chain over a choice of timesteps of a longer one (Nichol & Dhariwal 2021), rising in time.

    Attributes:
        timesteps: what the network is called with.
        betas, alphas_cumprod: of the shorter chain.
    """

    timesteps: tuple[int, ...]
    betas: Array
    alphas_cumprod: Array

    @classmethod
    def of(cls, alphas_cumprod: ArrayLike, timesteps: Sequence[int]) -> Respaced:
        """The chain over timesteps in any order; double ones count once.

        Raises:
            SamplingError: a timestep is not one of the table's.
        """
        table, chosen = np.asarray(alphas_cumprod, np.float64), sorted(set(timesteps))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(table):
            raise SamplingError(f"timesteps must be in 0..{len(table) - 1}, got {', '.join(map(str, timesteps))}")
        kept = table[chosen]
        return cls(tuple(chosen), 1 - kept / np.append(1.0, kept[:-1]), kept)

    @property
    def posterior_variance(self) -> Array:
        """(n,) of the state before, given the state and the clean sample."""
        before = np.append(1.0, self.alphas_cumprod[:-1])
        return self.betas * (1 - before) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> Array:
        """(n,) its logarithm, the first that of the second, which would be 0."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(variance) > 1 else variance, variance[1:]))


def uniform_timesteps(count: int, total: int = 1000) -> list[int]:
    """`range(0, total, i)` with the first stride i that gives `count` entries, as "ddimK" in the official code.

    Raises:
        SamplingError: no stride does.
    """
    for stride in range(1, total):
        if len(timesteps := list(range(0, total, stride))) == count:
            return timesteps
    raise SamplingError(f"no stride divides {total} timesteps into {count}")


@dataclass(frozen=True)
class Candidate:
    """What a search proposes.

    Attributes:
        timesteps: distinct, falling.
        skipped: for each timestep, the numbers of the layers that are left out.
    """

    timesteps: tuple[int, ...]
    skipped: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "timesteps": list(self.timesteps),
            **({"skipped": [list(s) for s in self.skipped]} if self.skipped else {}),
        }


def read_candidate(path: str | Path) -> Candidate:
    """The best candidate of a search's file, or a candidate written by hand.

    Raises:
        SamplingError: the file is damaged, or its timesteps are not distinct whole numbers.
    """
    values = read_document(Path(path), error=SamplingError)
    best = values["best"][0][1] if isinstance(values.get("best"), list) and values["best"] else values
    timesteps = best.get("timesteps") if isinstance(best, dict) else None
    if not isinstance(timesteps, list) or not timesteps or not all(isinstance(t, int) and t >= 0 for t in timesteps):
        raise SamplingError(f"{path}: expected a list of whole numbers under 'timesteps'")
    if len(set(timesteps)) != len(timesteps):
        raise SamplingError(f"{path}: its timesteps are not distinct")
    return Candidate(tuple(sorted(timesteps, reverse=True)), tuple(tuple(s) for s in best.get("skipped", ())))


@dataclass(frozen=True)
class SearchSettings:
    """An evolutionary search.

    Attributes:
        population: candidates of the first generation, and of each generation at most.
        parents: the best that the next generation is made from.
        mutations, crossovers: how many are made of them; the rest is random.
        mutation_rate: share of a parent's timesteps that change.
        epochs: generations.
        layers: of the network, for searches that skip some; 0: none are skipped.
        skip_after: generation after which layers are skipped, at the latest; before, once the best no longer changes.
        skip_share: largest share of the layers that a step skips, reached in five generations.
    """

    population: int = 50
    parents: int = 10
    mutations: int = 25
    crossovers: int = 15
    mutation_rate: float = 0.25
    epochs: int = 10
    layers: int = 0
    skip_after: int = 4
    skip_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.population, self.parents, self.epochs) < 1 or min(self.mutations, self.crossovers, self.layers) < 0:
            raise SamplingError("population, parents and epochs must be at least 1, the other counts at least 0")
        if not (0 < self.mutation_rate <= 1 and 0 <= self.skip_share < 1):
            raise SamplingError("mutation_rate must be in 0..1 and skip_share below 1")


@dataclass
class _Search:
    """The state between two generations; all of it is in the file."""

    settings: SearchSettings
    count: int
    total: int
    epoch: int = 0
    skip: float = 0.0
    seen: dict[str, float] = field(default_factory=dict)
    best: list[tuple[float, Candidate]] = field(default_factory=list)

    def random_for(self, generation: int) -> random.Random:
        return random.Random(f"{self.settings.seed}-{generation}")

    def drawn(self, draw: random.Random) -> Candidate:
        return self.with_skips(tuple(draw.sample(range(self.total), self.count)), draw)

    def with_skips(self, timesteps: Sequence[int], draw: random.Random) -> Candidate:
        chosen = tuple(sorted(timesteps, reverse=True))
        most = math.ceil(self.skip * self.settings.layers)
        if not most:
            return Candidate(chosen)
        skipped = [tuple(sorted(draw.sample(range(self.settings.layers), draw.randint(0, most)))) for _ in chosen]
        return Candidate(chosen, tuple(skipped))

    def mutated(self, parent: Candidate, draw: random.Random, rate: float) -> Candidate:
        timesteps = list(parent.timesteps)
        for i in range(len(timesteps)):
            if draw.random() < rate:
                timesteps[i] = draw.choice([t for t in range(self.total) if t not in timesteps])
        child = self.with_skips(timesteps, draw)
        if parent.skipped and child.skipped:
            kept = [
                new if draw.random() < rate else old for old, new in zip(parent.skipped, child.skipped, strict=True)
            ]
            return Candidate(child.timesteps, tuple(kept))
        return child

    def crossed(self, one: Candidate, other: Candidate, draw: random.Random) -> Candidate:
        pairs = [draw.choice(pair) for pair in zip(one.timesteps, other.timesteps, strict=True)]
        chosen = list(dict.fromkeys(pairs))  # doubled ones would make a shorter sampler
        free = [t for t in (*one.timesteps, *other.timesteps) if t not in chosen]
        chosen += list(dict.fromkeys(free))[: self.count - len(chosen)]
        child = self.with_skips(chosen, draw)
        if one.skipped and other.skipped and child.skipped:
            return Candidate(
                child.timesteps, tuple(draw.choice(p) for p in zip(one.skipped, other.skipped, strict=True))
            )
        return child

    def generation(self) -> list[Candidate]:
        """Candidates of the next generation that were not evaluated yet."""
        s, draw, made = self.settings, self.random_for(self.epoch), list[Candidate]()

        def add(make: Callable[[], Candidate], wanted: int) -> None:
            have = len(made)
            for _ in range(10 * wanted):
                if len(made) - have >= wanted or len(made) >= s.population:
                    return
                candidate = make()
                if _key(candidate) not in self.seen and candidate not in made:
                    made.append(candidate)

        parents = [candidate for _, candidate in self.best[: s.parents]]
        if not parents:
            try:
                uniform = Candidate(tuple(sorted(uniform_timesteps(self.count, self.total), reverse=True)))
            except SamplingError:
                uniform = Candidate(
                    tuple(sorted({round(t) for t in np.linspace(0, self.total - 1, self.count)}, reverse=True))
                )
            made.append(uniform)
            add(lambda: self.drawn(draw), s.population // 2)
            add(lambda: self.mutated(uniform, draw, 0.1), s.population)
        else:
            add(lambda: self.mutated(draw.choice(parents), draw, s.mutation_rate), s.mutations)
            add(lambda: self.crossed(draw.choice(parents), draw.choice(parents), draw), s.crossovers)
        add(lambda: self.drawn(draw), s.population)
        return made


def _key(candidate: Candidate) -> str:
    return json.dumps(candidate.to_json())


def search_steps(
    fitness: Callable[[Candidate], float],
    count: int,
    *,
    total: int = 1000,
    settings: SearchSettings | None = None,
    file: str | Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[tuple[float, Candidate]]:
    """Search for the best steps.

    Args:
        fitness: of a candidate; smaller is better. A candidate is evaluated once.
        count: timesteps of a candidate.
        total: timesteps of the model.
        file: keeps every fitness; a search with the same settings goes on from it.
        progress: told each generation's number and best fitness.

    Returns:
        The best candidates and their fitness, best first.

    Raises:
        SamplingError: count is not in 1..total, or the file is of another search.
    """
    settings = settings or SearchSettings()
    if not 1 <= count <= total:
        raise SamplingError(f"count must be in 1..{total}, got {count}")
    state, about = _Search(settings, count, total), {"count": count, "total": total, **vars(settings)}
    path = None if file is None else Path(file)
    known: dict[str, float] = {}
    if path is not None and path.exists():
        document = read_document(path, error=SamplingError)
        if document.get("search") != about:
            raise SamplingError(f"{path}: is of another search; its settings are {document.get('search')}")
        known = {str(k): float(v) for k, v in document.get("evaluated", {}).items()}
    while state.epoch < settings.epochs:
        before = state.best[:1]
        for candidate in state.generation():
            key = _key(candidate)
            state.seen[key] = known[key] if key in known else float(fitness(candidate))
            state.best.append((state.seen[key], candidate))
            known[key] = state.seen[key]
            if path is not None:
                _write(path, about, known, state.best)
        state.best.sort(key=lambda pair: (pair[0], _key(pair[1])))
        del state.best[max(settings.parents, 10) :]
        if settings.layers and (state.best[:1] == before or state.epoch >= settings.skip_after):
            state.skip = min(settings.skip_share, state.skip + settings.skip_share / 5)
        if progress is not None:
            progress(state.epoch, state.best[0][0])
        state.epoch += 1
    return state.best


def _write(path: Path, about: dict[str, Any], known: dict[str, float], best: list[tuple[float, Candidate]]) -> None:
    ranked = sorted(best, key=lambda pair: (pair[0], _key(pair[1])))[:10]
    write_document(path, {"search": about, "best": [[f, c.to_json()] for f, c in ranked], "evaluated": known})
