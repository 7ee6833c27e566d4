"""Searching for the steps of a sampler: timesteps, orders, and parts of the network that a step leaves out.

Evolutionary, as AutoDiffusion (Li et al. 2023) and USF (Liu et al. 2024) search. It does not know what it improves: a
fitness is any function of a `Candidate`, smaller is better. It is seeded, and goes on from its file.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffrep.backbones.diffusion import DiffusionBackbone, draw_noise
from diffrep.eval.protocols import within
from diffrep.eval.scenes import render_pair
from diffrep.eval.synthesis import accuracy, labelled_scenes
from diffrep.features import FeatureMaps, extract_each
from diffrep.files import read_document, write_document
from diffrep.fusion import Fusion, fuse
from diffrep.matching import match_points
from diffrep.sampling.schedules import SamplingError
from diffrep.scenes import SEEN
from diffrep.scenes.sets import scene_pairs
from diffrep.searched import Candidate, Row, differing
from diffrep.settings import check

Way = tuple[Callable[[], Candidate], int]  # how candidates are made, and how many


@dataclass(frozen=True)
class SearchSettings:
    """An evolutionary search.

    Attributes:
        population: candidates of the first generation, and of each generation at most.
        parents: the best that the next generation is made from.
        mutations, crossovers: how many are made of them; the rest is random.
        mutation_rate: share of a parent's timesteps, orders and skipped units that change.
        epochs: generations.
        orders: highest order that a step may have; 0: the sampler's are not searched for.
        layers: units of the network, for searches that skip some; 0: none are skipped.
        skip_after: generation after which layers are skipped, at the latest; before, once the best no longer changes.
        skip_share: largest share of the layers that a step skips, reached in five generations.
        taps: of which one is read at each timestep, for searches of features.
    """

    population: int = 50
    parents: int = 10
    mutations: int = 25
    crossovers: int = 15
    mutation_rate: float = 0.25
    epochs: int = 10
    orders: int = 0
    layers: int = 0
    skip_after: int = 4
    skip_share: float = 0.2
    taps: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            self, population="1..", parents="1..", epochs="1..", mutations="0..", crossovers="0..", orders="0..3",
            layers="0..", mutation_rate="(0, 1]", skip_share="[0, 1)",
        )  # fmt: skip


def uniform_timesteps(count: int, total: int = 1000) -> list[int]:
    """`range(0, total, i)` with the first stride i that gives `count` entries, "ddimK" of the official code.

    Where no stride does, as evenly as whole numbers can lie.
    """
    strides = (list(range(0, total, stride)) for stride in range(1, total))
    return next((t for t in strides if len(t) == count), np.linspace(0, total - 1, count).round().astype(int).tolist())


@dataclass(frozen=True)
class _Generation:
    """How the candidates of a generation are made."""

    settings: SearchSettings
    count: int
    total: int
    draw: random.Random
    skip: float  # largest share of the layers that a step skips now
    first: Sequence[Candidate] = ()  # of the first generation, beside the uniform one

    def ways(self, parents: list[Candidate]) -> list[Way]:
        s, choice = self.settings, self.draw.choice
        ways: list[Way] = [
            (lambda: self.mutated(choice(parents), s.mutation_rate), s.mutations),
            (lambda: self.crossed(choice(parents), choice(parents)), s.crossovers),
        ]
        if not parents:
            uniform = Candidate.of([self.row(t) for t in uniform_timesteps(self.count, self.total)])
            known = iter([*self.first, uniform])
            ways = [(lambda: next(known, uniform), len(self.first) + 1), (self.drawn, s.population // 2)]
            ways += [(lambda: self.mutated(uniform, 0.1), s.population)]
        return [*ways, (self.drawn, s.population)]

    def row(self, timestep: float) -> Row:
        s, most = self.settings, math.ceil(self.skip * self.settings.layers)
        skipped = tuple(sorted(self.draw.sample(range(s.layers), self.draw.randint(0, most)))) if most else None
        order = self.draw.randint(1, s.orders) if s.orders else None
        return timestep, order, skipped, self.draw.choice(s.taps) if s.taps else None

    def drawn(self) -> Candidate:
        return Candidate.of([self.row(t) for t in self.draw.sample(range(self.total), self.count)])

    def mutated(self, parent: Candidate, rate: float) -> Candidate:
        rows, taken = list[Row](), list(parent.timesteps)
        for i, (timestep, order, skipped, tap) in enumerate(parent.rows):
            if self.draw.random() < rate and len(taken) < self.total:
                timestep = taken[i] = self.draw.choice([t for t in range(self.total) if t not in taken])
            _, other_order, other_skipped, other_tap = self.row(timestep)
            order = other_order if self.draw.random() < rate else order
            skipped = other_skipped if skipped is None or self.draw.random() < rate else skipped
            rows.append((timestep, order, skipped, other_tap if tap and self.draw.random() < rate else tap))
        return Candidate.of(rows)

    def crossed(self, one: Candidate, other: Candidate) -> Candidate:
        pairs = list(zip(one.rows, other.rows, strict=True))
        chosen = {row[0]: row for row in (self.draw.choice(pair) for pair in pairs)}
        for row in (*one.rows, *other.rows):  # doubled ones would make fewer steps
            if len(chosen) < len(pairs):
                chosen.setdefault(row[0], row)
        return Candidate.of(list(chosen.values()))


def search_steps(
    fitness: Callable[[Candidate], float],
    count: int,
    *,
    total: int = 1000,
    settings: SearchSettings | None = None,
    first: Sequence[Candidate] = (),
    of: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[tuple[float, Candidate]]:
    """Search for the best steps.

    Args:
        fitness: of a candidate; smaller is better. A candidate is evaluated once.
        count: timesteps of a candidate.
        total: timesteps of the model.
        first: candidates that the first generation has, the sampler's usual steps for example.
        of: what the fitness is of, the model and the sampler for example; the file keeps it.
        facts: of the model, `diffrep.searched.model_facts`; the file keeps them for those that use what was found.
        file: keeps every fitness; a search of the same, with the same settings, goes on from it.
        progress: gets each generation's number and best fitness.

    Returns:
        The best candidates and their fitness, best first.

    Raises:
        SamplingError: count is not in 1..total, or the file is of another search.
    """
    s = settings or SearchSettings()
    if not 1 <= count <= total:
        raise SamplingError(f"count must be in 1..{total}, got {count}")
    about, path = {"count": count, "total": total, **vars(s), "of": of}, None if file is None else Path(file)
    about = {name: value for name, value in about.items() if name not in ("taps", "of") or value}
    about = json.loads(json.dumps(about))  # as it is read back
    known, seen, best, skip = dict[str, float](), set[str](), list[tuple[float, str, Candidate]](), 0.0
    if path is not None and path.exists():
        document = read_document(path, error=SamplingError)
        if document.get("search") != about:
            raise SamplingError(f"{path}: is of another search: {_difference(document.get('search'), about)}")
        try:
            known = {str(k): float(v) for k, v in document.get("evaluated", {}).items()}
            before_it = dict(document.get("found_for") or {})  # of an older file the model stays unknown
        except (AttributeError, TypeError, ValueError):
            raise SamplingError(
                f"{path}: 'evaluated' must hold numbers by steps, 'found_for' facts of a model"
            ) from None
        if before_it and (other := differing(before_it, facts or {})):
            raise SamplingError(f"{path}: is of another model under the same name: other {', '.join(other)}")
        facts = before_it
    for epoch in range(s.epochs):
        generation = _Generation(s, count, total, random.Random(f"{s.seed}-{epoch}"), skip, first)
        before, born = best[:1], 0
        for make, wanted in generation.ways([candidate for _, _, candidate in best[: s.parents]]):
            end = min(born + wanted, s.population)
            for candidate in (make() for _ in range(10 * wanted) if born < end):
                key = json.dumps(candidate.to_json())
                if key in seen:
                    continue
                seen.add(key)
                known[key] = known[key] if key in known else float(fitness(candidate))
                best.append((known[key], key, candidate))
                born += 1
                if path is not None:
                    ranked = [[value, c.to_json()] for value, _, c in sorted(best, key=lambda b: b[:2])[:10]]
                    found_for = {"found_for": facts} if facts else {}
                    write_document(path, {"search": about, **found_for, "best": ranked, "evaluated": known})
        best.sort(key=lambda b: b[:2])
        del best[max(s.parents, 10) :]
        if s.layers and (best[:1] == before or epoch >= s.skip_after):
            skip = min(s.skip_share, skip + s.skip_share / 5)
        if progress is not None:
            progress(epoch, best[0][0])
    return [(value, candidate) for value, _, candidate in best]


def _difference(found: Any, about: Mapping[str, Any]) -> str:
    """What the search of a file has otherwise, in words."""

    def flat(search: Any) -> dict[str, Any]:
        known = search if isinstance(search, dict) else {}
        of: Any = known.get("of")
        named = {"timesteps" if name == "count" else name: value for name, value in known.items() if name != "of"}
        return {**named, **(of if isinstance(of, dict) else {})}

    theirs, ours = flat(found), flat(about)
    names = [name for name in {**ours, **theirs} if theirs.get(name, ...) != ours.get(name, ...)]
    said = [f"{n} {json.dumps(theirs[n]) if n in theirs else 'unknown'}, not {json.dumps(ours.get(n))}" for n in names]
    return "; ".join(said)


def extraction_fitness(
    backbone: DiffusionBackbone,
    measure: Literal["pck", "probe"],
    *,
    count: int = 2,
    cost: float = 0.25,
    size: int = 128,
    seed: int = 0,
) -> Callable[[Candidate], float]:
    """A fitness of a tap and a timestep: the share of wrong answers times that of the operations to the power `cost`.

    Args:
        measure: "pck": keypoints of rendered pairs that are not met within a tenth of the object; "probe": wrong
            classes of a linear probe on averaged features. Both on objects of the validation split.
        count: pairs, or scenes to train and as many to test on, of each category.
        size: of the rendered images, in pixels.
    """
    pairs = [render_pair((*pair, size)) for pair in scene_pairs("val", count, seed=seed)] if measure == "pck" else []
    drawn = [
        labelled_scenes("val", count, SEEN, first=n * 2**12, size=size) for n in range(2 if measure == "probe" else 0)
    ]
    kinds = torch.arange(len(SEEN)).repeat_interleave(count)
    operations: dict[str, int] = {}

    def read(images: Sequence[Any], tap: str, timestep: int) -> list[FeatureMaps]:
        return list(extract_each(backbone, images, taps=tap, timestep=timestep))

    def counted(tap: str) -> int:
        if tap not in operations:
            with FlopCounterMode(display=False) as counter:
                read([np.zeros((size, size, 3), np.uint8)], tap, 100)
            operations[tap] = counter.get_total_flops()
        return operations[tap]

    def wrong(tap: str, timestep: int) -> float:
        if measure == "probe":
            train, test = (torch.cat([m[tap].mean((2, 3)) for m in read(list(x), tap, timestep)]).cpu() for x in drawn)
            return 1 - accuracy(train, kinds, test, kinds)
        missed = []
        for pair in pairs:
            source, target = pair.views
            a, b = fuse([[maps] for maps in read([source.image, target.image], tap, timestep)], Fusion.of(tap))
            points, truth = pair.points
            scale = max(target.box[2] - target.box[0], target.box[3] - target.box[1])
            missed.append(~within(match_points(a, b, points).points.cpu(), truth, scale, (0.1,)).flatten())
        return float(torch.cat(missed).float().mean())

    whole = counted(backbone.taps()[-1].name)

    def fitness(candidate: Candidate) -> float:
        (tap,), (timestep,) = candidate.taps, candidate.timesteps
        return wrong(tap, int(timestep)) * (counted(tap) / whole) ** cost

    return fitness


def best_start(
    cost: Callable[[Tensor], float], shape: Sequence[int], *, candidates: int = 1000, seed: int = 0
) -> tuple[Tensor, list[float]]:
    """The noise that a deterministic sampler, or a head that begins in noise, does best from (Ma et al., ICLR 2024).

    The best start is nearly independent of the image: chosen once on a small reference set, it is shared by all others.

    >>> best_start(lambda z: float(z.square().mean()), (4, 8, 8), candidates=3)  # doctest: +SKIP

    Args:
        cost: of a start (1, *shape), for example the mean LPIPS of `sample(model, start=...)` to reference images.
        candidates: random starts that are tried.

    Returns:
        The best start, (1, *shape), and the costs of all.
    """
    if candidates < 1:
        raise SamplingError(f"candidates must be at least 1, got {candidates}")
    costs = [cost(draw_noise(shape, seed, number)) for number in range(candidates)]
    return draw_noise(shape, seed, int(np.argmin(costs))), costs
