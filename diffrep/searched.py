"""What a search for a sampler's steps finds, and its file, which takes the place of timesteps everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diffrep.files import read_document
from diffrep.sampling.schedules import SamplingError

Row = tuple[float, int | None, tuple[int, ...] | None, str | None]  # timestep, order, skipped units, tap


@dataclass(frozen=True)
class Candidate:
    """Steps of a sampler.

    Attributes:
        timesteps: distinct, falling.
        orders: of the solver, for each timestep; none: the sampler's.
        skipped: for each timestep, the numbers of the units of the network that are left out.
        taps: for each timestep, what is read of the network, for searches of features.
    """

    timesteps: tuple[float, ...]
    orders: tuple[int, ...] = ()
    skipped: tuple[tuple[int, ...], ...] = ()
    taps: tuple[str, ...] = ()

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


def read_candidate(path: str | Path) -> Candidate:
    """The best candidate of a search's file, or a candidate written by hand.

    Raises:
        SamplingError: the file is damaged, or its lists are not of whole numbers, one entry for each timestep.
    """
    values = read_document(Path(path), error=SamplingError)
    best = values["best"][0][1] if isinstance(values.get("best"), list) and values["best"] else values
    timesteps, orders, skipped, taps = (
        best.get(n, []) if isinstance(best, dict) else [] for n in ("timesteps", "orders", "skipped", "taps")
    )

    def whole(values: Any, least: int = 0) -> bool:
        return isinstance(values, list) and all(isinstance(v, int) and v >= least for v in values)

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
    return Candidate.of(list(zip_longest(timesteps, orders, map(tuple, skipped), taps)))


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


def read_place(path: str | Path) -> tuple[str, int]:
    """The tap and the timestep of the file of a search for features."""
    candidate = read_candidate(path)
    if len(candidate.taps) != 1:
        kind = f"has {len(candidate.taps)} taps" if candidate.taps else "is of a search for a sampler's steps"
        raise SamplingError(f"{path}: {kind}, expected one tap and timestep (search-schedule --fitness pck or probe)")
    return candidate.taps[0], int(candidate.timesteps[0])
