"""Finding parity cases: folders with a ``case.json``, made with the papers' official code.

`$DIFFREP_PARITY` names a folder of systems, of one system's cases, or one case; without it the committed
choice under ``tests/parity/data`` is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
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


# What a case says about itself; everything else in it is a parameter, which its check reads or refuses.
ABOUT = frozenset(
    (
        "autocast", "call", "case", "commit", "dtype", "dtypes", "environment", "expected", "expected_doc",
        "expected_std", "file", "files", "float32_vs_float64_relative", "function", "functions", "inputs",
        "inputs_doc", "kind", "layout", "library", "max_res_note", "model", "note", "notes", "official",
        "official_config", "official_repo", "official_state_dict", "precision", "procedure", "ran", "rule", "shapes",
        "shim", "shims", "source", "split", "system", "tensors", "title", "tolerance", "torch", "versions", "what",
    )
)  # fmt: skip


class Fields(dict[str, Any]):
    """A JSON object that remembers which of its fields were read. Objects within are `Fields` as well."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({name: _watched(value) for name, value in values.items()})
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:  # its being overridden makes `**fields` go through __getitem__
        return super().__iter__()

    def items(self) -> Any:
        self.read.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self.read.update(super().keys())
        return super().values()

    def __eq__(self, other: object) -> bool:
        self.read.update(super().keys())
        return super().__eq__(other)

    def read_all(self) -> None:
        """Take every field for read, with all that lies inside."""
        for value in self.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Fields):
                    item.read_all()

    __hash__ = None  # type: ignore[assignment]

    def unread(self, describing: Collection[str] = ()) -> Iterator[str]:
        """The paths of the fields that nobody has read, without those that only describe."""
        for name in super().__iter__():
            if name in ABOUT or name in describing:
                continue
            if name not in self.read:
                yield name
            for path in _unread(super().__getitem__(name), describing):
                yield f"{name}{path}"


def _watched(value: Any) -> Any:
    if isinstance(value, dict):
        return Fields(value)
    return [_watched(item) for item in value] if isinstance(value, list) else value


def _unread(value: Any, describing: Collection[str]) -> Iterator[str]:
    if isinstance(value, Fields):
        yield from (f".{path}" for path in value.unread(describing))
    elif isinstance(value, list):
        yield from (f"[{index}]{path}" for index, item in enumerate(value) for path in _unread(item, describing))


_stored: list[Fields] = []  # what the running check has to read


def watched(stored: Mapping[str, Any]) -> Fields:
    """What came out of a case, of which its check reads every tensor."""
    _stored.append(Fields(stored))
    return _stored[-1]


def tensors_of(folder: Path) -> tuple[dict[str, Tensor], Fields]:
    """A case's inputs, where it has any, and what came out of them, `watched`."""
    inputs = folder / "inputs.safetensors"
    given = load_file(inputs) if inputs.exists() else {}
    return given, watched(load_file(folder / "expected.safetensors"))


def each(runs: Iterable[Mapping[str, Any]], *, describing: Collection[str] = ()) -> Iterator[Fields]:
    """The runs of a case one after the other; a parameter that a check never reads fails it.

    Args:
        describing: names that say how the stored tensors were drawn or what their statistics are, and change nothing.
    """
    for run in runs:
        fields = run if isinstance(run, Fields) else Fields(run)
        yield fields
        unread = sorted(fields.unread(describing))
        assert not unread, f"the case names {', '.join(unread)}, which this check does not read"
        fields.read_all()


def check_case(
    checks: Mapping[str, Callable[[Path, dict[str, Any]], None]],
    folder: Path,
    case: dict[str, Any],
    *,
    describing: Collection[str] = (),
) -> None:
    """Run the check of a case, and see that it has read every field of the case that is a parameter.

    Args:
        describing: names of fields that say how the stored tensors were drawn or what came out, and change nothing.
    """
    assert case["kind"] in checks, f"{folder}: no check for cases of kind {case['kind']!r}"
    fields = Fields(case)
    _stored.clear()
    checks[case["kind"]](folder, fields)
    ignored = sorted({name for part in (fields, *_stored) for name in part.unread(describing)})
    assert not ignored, f"{folder}: the check ignores {', '.join(ignored)}"


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
            return float(word.strip(",;:()"))
        except ValueError:
            continue
    raise ValueError(f"no number in {text!r}")
