"""Finding parity cases: folders with a ``case.json``, made with the papers' official code.

`$DIFFREP_PARITY` names a folder of systems, of one system's cases, or one case; without it the committed
choice under ``tests/parity/data`` is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(os.environ.get("DIFFREP_PARITY") or Path(__file__).parent / "data")


def cases_of(system: str, kinds: Collection[str]) -> list[Any]:
    """pytest parameters (folder, case), one for each case of a system.

    Cases of kinds that are not among `kinds` are there too, to fail; `$DIFFREP_PARITY_KINDS` = "built" leaves
    them out. Where no case is found, a parameter of the kind "none" stands for it, to fail as well.
    """
    found = []
    for file in sorted(ROOT.rglob("case.json")):
        case = json.loads(file.read_text())
        if case.get("system") != system:
            continue
        if os.environ.get("DIFFREP_PARITY_KINDS") != "built" or case["kind"] in kinds:
            found.append(pytest.param(file.parent, case, id=file.parent.name))
    return found or [pytest.param(ROOT, {"kind": "none", "system": system}, id="no-case-found")]


class Fields(dict[str, Any]):
    """The parameters of a case or of one of its runs, which knows what has been read of them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.unread = set(values)

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.unread.discard(name)
        return super().get(name, default)


def each(runs: Iterable[Mapping[str, Any]], *, describing: Collection[str] = ()) -> Iterator[Fields]:
    """The runs of a case one after the other; a parameter that a check never reads fails it.

    Args:
        describing: names that say how the stored tensors were drawn or what their statistics are, and change nothing.
    """
    for run in runs:
        fields = Fields(run)
        yield fields
        unread = sorted(fields.unread - {"note", *describing})
        assert not unread, f"the case names {', '.join(unread)}, which this check does not read"


def assert_near(got: Tensor, expected: Tensor, *, relative: float, what: str) -> None:
    """Largest difference within `relative` times the largest magnitude of `expected`."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    scale = float(expected.abs().max())
    difference = float((got.float() - expected.float()).abs().max())
    assert difference <= relative * scale, f"{what}: differs by {difference / max(scale, 1e-30):.2e} of the maximum"


def assert_within(got: Tensor, expected: Tensor, *, atol: float, what: str) -> None:
    """Largest difference within `atol`."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    difference = float(torch.as_tensor((got.double() - expected.double()).abs().max()))
    assert difference <= atol, f"{what}: differs by {difference:.2e}, allowed {atol:.0e}"


def number_in(text: str) -> float:
    """The first number in a tolerance text such as ``max abs diff <= 2e-4 x max abs``."""
    for word in text.replace("<=", " ").split():
        try:
            return float(word)
        except ValueError:
            continue
    raise ValueError(f"no number in {text!r}")
