"""What a search for a sampler's steps finds, and its file, which takes the place of timesteps everywhere."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from diffrep.files import read_document
from diffrep.sampling.schedules import NoiseSchedule, SamplingError
from diffrep.settings import check

_log = logging.getLogger(__name__)
_FACTS = {  # of a model, in the order of `model_facts` -> in words
    "network": "architecture",
    "shapes": "sizes of the weights",
    "prediction": "prediction",
    "noise": "noise schedule",
    "latent": "size of the latents",
    "weights": "weights",
}
_MAY_DIFFER = ("latent", "weights")  # between models of one kind
Row = tuple[float, int | None, tuple[int, ...] | None, str | None]  # timestep, order, skipped units, tap


def model_facts(network: nn.Module, schedule: NoiseSchedule, prediction: str, latent: Sequence[int]) -> dict[str, Any]:
    """What tells a diffusion model from others, JSON-ready. Nothing of it depends on the model's place or precision.

    Args:
        latent: the shape (c, h, w) that it was trained on.
    """
    weights = sorted(network.named_parameters())
    shapes = "\n".join(f"{name} {tuple(values.shape)}" for name, values in weights)
    # signs of some values of each: rounding to another type, to zero even, leaves them as they are
    parts = [values.detach().flatten()[:64].signbit() for _, values in weights]
    signs = torch.cat(parts).cpu().numpy() if parts else np.zeros(0, bool)  # a stand-in may have no weights
    noise = schedule.alpha(np.linspace(schedule.last, schedule.first, 5))
    return {
        "network": type(network).__name__,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "prediction": prediction,
        "noise": [schedule.first, *(round(float(alpha), 5) for alpha in noise)],
        "latent": list(latent),
        "weights": hashlib.sha256(np.packbits(signs).tobytes()).hexdigest()[:16],
    }


class Origin(NamedTuple):
    """The file that a candidate was read from, and what it says of the model that it was found for."""

    file: str
    facts: Mapping[str, Any]  # `model_facts`; none where it says nothing


@dataclass(frozen=True)
class Candidate:
    """Steps of a sampler.

    Attributes:
        timesteps: distinct, falling.
        orders: of the solver, for each timestep; none: the sampler's.
        skipped: for each timestep, the numbers of the units of the network that are left out.
        taps: for each timestep, what is read of the network, for searches of features.
        origin: of one that was read from a file.
    """

    timesteps: tuple[float, ...]
    orders: tuple[int, ...] = ()
    skipped: tuple[tuple[int, ...], ...] = ()
    taps: tuple[str, ...] = ()
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Candidate:
        """Of its steps in any order."""
        timesteps, orders, skipped, taps = zip(*sorted(rows, key=lambda row: -row[0]), strict=True)
        left_out = tuple(units or () for units in skipped) if any(skipped) else ()
        return cls(timesteps, orders if all(orders) else (), left_out, taps if all(taps) else ())

    @property
    def rows(self) -> list[Row]:
        """Its steps."""
        return list(zip_longest(self.timesteps, self.orders, self.skipped, self.taps))

    def to_json(self) -> dict[str, Any]:
        """As a document; lists that say nothing are left out."""
        skipped = [list(units) for units in self.skipped]
        lists = {"timesteps": list(self.timesteps), "orders": list(self.orders), "skipped": skipped}
        lists["taps"] = list(self.taps)
        return {name: values for name, values in lists.items() if values}

    def for_model(self, name: str, facts: Callable[[], Mapping[str, Any]]) -> Candidate:
        """These steps for a model: those of a file that was found for one of the same kind, or says nothing of it.

        Other weights, and a file that says nothing, are named in one line of the log.

        Args:
            name: of the model, for messages.
            facts: gives its `model_facts`; called for steps of a file alone, as it reads weights.

        Raises:
            SamplingError: the file was found for a model of another kind; the message says what differs.
        """
        if self.origin is None:
            return self
        file, recorded = self.origin
        other = differing(recorded, facts())
        if {*other} - {*map(_FACTS.get, _MAY_DIFFER)}:
            raise SamplingError(f"{file}: was found for another kind of model than {name}: other {', '.join(other)}")
        if not recorded:
            unknown = ", ".join(_FACTS.values())
            _log.warning("%s: does not say which model it was found for (unknown: %s)", file, unknown)
        elif other:
            _log.warning("%s: was found for a model of the kind of %s with other %s", file, name, " and ".join(other))
        return replace(self, origin=None)


def differing(recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Which facts of two models differ, in words; one that a file does not have is left out."""
    return [words for fact, words in _FACTS.items() if fact in recorded and not _alike(recorded[fact], facts.get(fact))]


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, list) or one == other:
        return bool(one == other)
    numbers = isinstance(other, list) and len(one) == len(other) and all(type(v) in (int, float) for v in one)
    return numbers and bool(np.allclose(one, other, rtol=1e-3, atol=1e-4))


def read_candidate(path: str | Path) -> Candidate:
    """The best candidate of a search's file, or a candidate written by hand.

    Raises:
        SamplingError: the file is damaged, or its lists are not of whole numbers, one entry for each timestep.
    """
    values = read_document(Path(path), error=SamplingError)
    try:
        best = values["best"][0][1] if values.get("best") else values
        facts = dict(values.get("found_for") or {})
        if facts and not facts.keys() & _FACTS.keys():
            raise ValueError
    except (TypeError, ValueError, LookupError):
        raise SamplingError(f"{path}: 'best' must be a list of [fitness, steps], 'found_for' an object") from None
    timesteps, orders, skipped, taps = (
        best.get(n, []) if isinstance(best, dict) else [] for n in ("timesteps", "orders", "skipped", "taps")
    )

    def whole(values: Any, least: int = 0) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= least for v in values)

    if not whole(timesteps) or not timesteps:
        raise SamplingError(f"{path}: expected a list of whole numbers under 'timesteps'")
    if len(set(timesteps)) != len(timesteps):
        raise SamplingError(f"{path}: its timesteps are not distinct")
    if not whole(orders, 1) or not isinstance(skipped, list) or not all(whole(units) for units in skipped):
        raise SamplingError(f"{path}: orders are whole numbers from 1, skipped are lists of them")
    if not isinstance(taps, list) or not all(isinstance(tap, str) for tap in taps):
        raise SamplingError(f"{path}: taps are a list of names")
    if {len(orders), len(skipped), len(taps)} - {0, len(timesteps)}:
        raise SamplingError(f"{path}: orders, skipped and taps have one entry for each of {len(timesteps)} timesteps")
    candidate = Candidate.of(list(zip_longest(timesteps, orders, map(tuple, skipped), taps)))
    return replace(candidate, origin=Origin(str(path), facts))


def as_candidate(timesteps: Candidate | Sequence[float] | str | Path | None) -> Candidate | None:
    """Timesteps to paint at as a candidate: a candidate, its file, or falling timesteps themselves."""
    candidate = read_candidate(timesteps) if isinstance(timesteps, (str, Path)) else timesteps
    if candidate is None:
        return None
    if not isinstance(candidate, Candidate):
        return Candidate(tuple(candidate))
    if candidate.taps:
        where = "these are" if candidate is timesteps else f"{timesteps}: is"
        raise SamplingError(f"{where} of a search for taps of features, not for a sampler's steps")
    return candidate


def read_place(path: str | Path) -> Candidate:
    """The one tap and timestep of the file of a search for features."""
    candidate = read_candidate(path)
    if len(candidate.taps) != 1:
        kind = f"has {len(candidate.taps)} taps" if candidate.taps else "is of a search for a sampler's steps"
        raise SamplingError(f"{path}: {kind}, expected one tap and timestep (search-schedule --fitness pck or probe)")
    return candidate
