"""Settings refuse what is wrong, in one line."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

import diffrep
import diffrep.eval
import diffrep.heads
from diffrep.cli import main
from diffrep.eval.benchmarks.peer import PeerBenchmark
from diffrep.fusion import Fusion, Part
from diffrep.heads.families import Family
from diffrep.heads.point_cloud import Intrinsics
from diffrep.heads.probes.cells import Cell, ReadPlan
from diffrep.heads.probes.layouts import Layout
from diffrep.heads.restoration.degrade import DEGRADATIONS, Degradation, Order
from diffrep.index.stored import Design, choose_kind
from diffrep.recipes import RECIPES, Reading, Recipe
from diffrep.scenes.sets import SetSettings
from diffrep.searched import Candidate
from diffrep.settings import POSITIVE, SEED, check, check_options
from diffrep.synthesis.canvas import WindowPlan
from diffrep.synthesis.prior import PriorConfig
from diffrep.training.loop import FitSettings


@dataclass(frozen=True)
class Painting:
    steps: int = 3
    quality: int | None = None
    rate: float = 1e-3
    overlap: float = 0.5
    seed: int = 0
    kind: Literal["oil", "ink"] | None = None
    layers: tuple[Literal["ground", "glaze"], ...] = ("ground",)
    timestep: Literal["all"] | int = "all"
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, steps="1..", quality="1..100", rate=POSITIVE, overlap="(0, 0.5]", seed=SEED, skipped="0..")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"quality": 101}, "quality must be in 1..100, got 101"),
        ({"rate": 0}, "rate must be finite and above 0, got 0"),
        ({"rate": math.inf}, "rate must be finite and above 0, got inf"),
        ({"rate": math.nan}, "rate must be finite and above 0, got nan"),
        ({"overlap": 0.51}, "overlap must be in (0, 0.5], got 0.51"),
        ({"seed": 2**63}, f"seed must be in (-2^63, 2^63), got {2**63}"),
        ({"kind": "chalk"}, "kind must be one of oil, ink, got 'chalk'"),
        ({"layers": ("glaze", "dirt")}, "layers must be one of ground, glaze, got ('glaze', 'dirt')"),
        ({"skipped": (1, -1)}, "skipped must be at least 0, got -1"),
    ],
)
def test_a_wrong_value_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        Painting(**wrong)
    assert str(error.value) == message


def test_what_is_right_passes() -> None:
    Painting(seed=2**63 - 1, quality=100, overlap=0.5, rate=1, layers=("ground", "glaze"), timestep=3, skipped=(0,))


def test_an_empty_tuple_is_refused_unless_it_is_the_default() -> None:
    with pytest.raises(ValueError, match="--layers needs at least one value"):
        check_options(Painting(layers=()), skipped="0..", layers="0..")


def test_an_option_is_named_as_it_is_typed() -> None:
    @dataclass
    class Command:
        batch_size: int = 0

    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        check_options(Command(), batch_size="1..")


@pytest.mark.parametrize("workers", [10**9, 10**30])
def test_no_number_of_processes_takes_the_machine_down(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["extract", "x", "-o", "y"], ["probe", "train", "x"], ["train", "tiny"], ["train", "depth"]):
        assert main([*command, "--workers", str(workers)]) == 2
        error = capsys.readouterr().err
        assert "workers must be in" in error or "--workers takes whole numbers below 2^63" in error


ORDER = DEGRADATIONS["resshift"].first
NEEDED: dict[type, dict[str, Any]] = {  # settings with fields that must be given -> such fields
    Candidate: {"timesteps": (3.0,)},
    Cell: {"backbone": "tiny", "timestep": 3, "tap": "up.1", "pool": 1},
    Degradation: {"first": ORDER, "second": ORDER},
    Design: dataclasses.asdict(choose_kind(1000, 8)),
    Family: {"name": "mine"},
    FitSettings: {"steps": 3},
    Fusion: {"parts": (Part(taps=("up.1",)),)},
    Intrinsics: {"fx": 1.0, "fy": 1.0, "cx": 1.0, "cy": 1.0},
    Layout: {"kind": "linear", "cells": (Cell("tiny", 3, "up.1", 1),), "channels": (8,), "classes": 2},
    Order: vars(ORDER),
    Part: {"taps": ("up.1",)},
    PeerBenchmark: {"peer": Path()},
    PriorConfig: {"dim": 8, "condition_dim": 1, "labels": ("cat",)},
    Reading: {"backbone": "tiny"},
    ReadPlan: {"backbone": "tiny"},
    Recipe: vars(RECIPES["tiny"]),
    SetSettings: {"split": "val", "count": 1, "size": 8, "categories": ("cat",), "renderer": ""},
    WindowPlan: {"size": (8, 8), "window": 4, "stride": 2},
}


def checks_itself(kind: type) -> bool:
    """Whether its own `__post_init__` calls `check`."""
    made: Any = vars(kind).get("__post_init__")
    return made is not None and bool(re.search(r"\bcheck\(\s*self\b", inspect.getsource(made)))


def all_settings() -> Iterator[type]:
    """Every frozen dataclass of the project, but of the command line, that can be made without arguments or checks
    itself."""
    for top in (diffrep, diffrep.heads, diffrep.eval):
        for module in pkgutil.walk_packages(top.__path__, f"{top.__name__}."):
            if module.name.startswith("diffrep.commands") or module.name.endswith("__main__"):
                continue  # tyro reads a command's values from text
            for kind in vars(importlib.import_module(module.name)).values():
                if not inspect.isclass(kind) or kind.__module__ != module.name or inspect.isabstract(kind):
                    continue
                if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                    continue
                fields = [field for field in dataclasses.fields(kind) if field.init]
                free = fields and all(f.default is not MISSING or f.default_factory is not MISSING for f in fields)
                if free or kind in NEEDED or (checks_itself(kind) and not kind.__name__.startswith("_")):
                    yield kind


def test_all_settings_refuse_what_is_of_another_kind() -> None:
    """A class is seen as soon as it is written: one that lacks `check` fails here."""
    seen, taken = set(), []
    for kind in all_settings():
        seen.add(kind.__name__)
        hints = get_type_hints(kind)
        for name in (field.name for field in dataclasses.fields(kind) if field.init):  # type: ignore[arg-type]
            wrong = [object()] if hints[name] is not Any else []
            for value in [*wrong, *([math.nan] if "float" in str(hints[name]) else [])]:
                try:
                    kind(**{**NEEDED.get(kind, {}), name: value})
                except ValueError as error:
                    line = str(error)
                    if name not in line or "\n" in line:
                        taken.append(f"{kind.__module__}.{kind.__name__}({name}={value!r}) says {line!r}")
                except Exception as error:
                    taken.append(f"{kind.__module__}.{kind.__name__}({name}={value!r}) raises {error!r}")
                else:
                    taken.append(f"{kind.__module__}.{kind.__name__} takes {name}={value!r}")
    assert seen > {kind.__name__ for kind in NEEDED}
    assert seen > {"ExtractConfig", "DepthEnsemble", "SamplersEvaluation", "ScoreSDE", "DinoSettings", "GpuBenchmark"}
    assert not taken, "\n".join(taken)
