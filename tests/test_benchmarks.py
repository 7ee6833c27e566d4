"""The benchmarks run and compare equal things; what they time is for people to look at."""

from __future__ import annotations

import builtins
import re
import time
from collections.abc import Iterator

import pytest
import torch

from diffrep.eval.benchmarks.__main__ import BENCHMARKS, main
from diffrep.eval.benchmarks.heads import HeadsBenchmark
from diffrep.eval.benchmarks.networks import FeaturesBenchmark
from diffrep.eval.benchmarks.restoration import RestorationBenchmark
from diffrep.eval.benchmarks.start import StartBenchmark, counted_imports
from diffrep.eval.benchmarks.timing import Row, Timing, interleave, table


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_extraction_computes_less_and_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    rows = FeaturesBenchmark(side=64, images=3, repeats=1).run()
    claims = ["one image", "one image", "a pair", "one image", "3 images in all 3 pairs"]
    assert [row.claim.split(",")[0] for row in rows] == claims
    for row in rows:
        difference = float(re.findall(r"difference (\S+)", row.equality)[0])
        assert difference < 1e-4
        plain, ours = map(float, re.findall(r"GFLOP (\S+) against (\S+)", row.flops)[0])
        assert ours < 0.9 * plain
    assert float(re.findall(r"\((\S+)x\)", rows[1].flops)[0]) > 2.4  # the ensemble encodes its image once
    printed = capsys.readouterr().out
    assert all(row.claim in printed for row in rows)


def test_a_folder_reaches_a_share_of_the_bare_network(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = HeadsBenchmark(images=3, side=64, image_size=(48, 64), batch_size=2, repeats=1).run()
    share = float(re.findall(r"reaches (\S+)% of the bare network", row.equality)[0])
    assert share == pytest.approx(100 * row.ratio, abs=0.1)
    assert 0 < share < 150
    assert row.claim in capsys.readouterr().out


@pytest.mark.slow
def test_restoration_by_tiles_is_the_same_and_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    rows = RestorationBenchmark(side=96, tile=8, overlap=2, sides=(192,), repeats=1).run()
    assert [re.findall(r"VAE, (one tile|tiles of 8 cells)", row.claim)[0] for row in rows] == [
        "one tile",
        "tiles of 8 cells",
    ]
    for row in rows:
        assert float(re.findall(r"difference (\S+)", row.equality)[0]) < 1e-4
        assert float(re.findall(r"\(([\d.]+)x\)", row.flops)[0]) > 1  # plain / ours; in GFLOP both round to 1.0
    released, ours = map(float, re.findall(r"192 x 192 +(\d+) +(\d+)", capsys.readouterr().out)[0])
    assert ours <= released  # MiB: both are about 1


@pytest.mark.slow
def test_starting_is_measured_in_stages_and_gives_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = StartBenchmark(repeats=1, commands=("depth",)).run()
    assert float(re.findall(r"output (\S+)", row.equality)[0]) < 1e-5
    printed = capsys.readouterr().out
    stages = re.findall(r"depth, (\w+): import (\S+) s, load (\S+) s, compute (\S+) s", printed)
    assert [stage[0] for stage in stages] == ["plain", "ours"]
    assert all(float(number) > 0 for stage in stages for number in stage[1:])


def test_imports_are_counted_once_however_deep() -> None:
    with counted_imports() as seconds:
        before = builtins.__import__
        import wsgiref.simple_server  # noqa: F401  # which imports others

        assert builtins.__import__ is before
    assert 0 < seconds[0] <= time.process_time()
    assert builtins.__import__ is not before


def test_sides_take_turns() -> None:
    order: list[str] = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmups=1)
    assert order == ["a", "b"] * 4
    assert set(times) == {"a", "b"}
    assert all(t.low <= t.median <= t.high for t in times.values())


def test_the_table_puts_the_ratio_first() -> None:
    row = Row("a claim", Timing(3.0, 2.9, 3.1), Timing(1.5, 1.4, 1.6), "equal", "GFLOP 2 against 1")
    assert row.ratio == 2.0
    assert "2.00x" in table([row]).splitlines()[1]


def test_an_unknown_benchmark_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    text = capsys.readouterr().err
    assert all(name in text for name in BENCHMARKS)
