"""Settings refuse what is wrong, in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from diffrep.cli import main
from diffrep.settings import POSITIVE, SEED, check, check_options


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
