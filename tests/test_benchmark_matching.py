from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from diffrep.eval.benchmarks import gpu
from diffrep.eval.benchmarks.matching import MatchingBenchmark


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SMALL = {
    "side": 16,
    "channels": 96,
    "keypoints": 4,
    "image": (48, 64),
    "image_side": 8,
    "pca_maps": ((6, 20), (8, 90)),
    "pca_dims": 12,
}


def test_the_table_of_a_card_has_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "MatchingBenchmark", partial(MatchingBenchmark, **SMALL))
    rows = gpu.GpuBenchmark(device="cpu", size="small", repeats=1, parts=("matching",)).run()
    printed = capsys.readouterr().out
    assert all(row.claim in printed for row in rows)
    for work in ("one product alone", "mutual", "4 keypoints", "features upsampled", "joint PCA of 2 maps"):
        assert sum(work in row.claim for row in rows) >= 1, work


def test_both_sides_of_every_claim_find_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = MatchingBenchmark(**SMALL, repeats=1)  # type: ignore[arg-type]
    rows = benchmark.run()
    printed = capsys.readouterr().out
    assert all(row.claim in printed for row in rows)
    for row in rows:
        for percent in re.findall(r"same \w+ (?:on|for) ([\d.]+) %", row.equality):
            assert float(percent) > 99, row
        assert row.plain.median >= 0
    neighbours, bfloat16 = map(float, re.findall(r"([\d.]+) %", rows[0].equality))
    assert neighbours > 99.5
    assert bfloat16 < 90  # or the descriptors are too easy to show anything
    assert any("0 px apart at most" in row.equality for row in rows)
    variance = float(re.findall(r"variance kept (\S+)", rows[-1].equality)[0])
    assert variance >= -1e-6
    assert "apart, the same numbers when run again" in rows[-1].equality
