"""The benchmark of probes runs, and says what it measured; the published numbers are those of the papers."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffrep.eval.benchmarks.probes import ProbesBenchmark
from diffrep.eval.probes import PUBLISHED, published_rows, published_table


def test_a_grid_on_mapped_features_reports_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffrep.heads.probes.grid.HELD_BYTES", 0)  # as for what does not fit into memory
    settings = ProbesBenchmark(part="memory", rows=40_000, width=32, classes=4, folder=tmp_path, limit_gib=64)
    settings.run()
    out = capsys.readouterr().out
    assert "40,000 x 32 features" in out
    assert "peak resident memory" in out
    accuracy = float(out.split("held-out rows ")[1].split(" %")[0])
    assert accuracy > 30  # chance is 25
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        ProbesBenchmark(part="memory", rows=1000, width=8, classes=4, folder=tmp_path, limit_gib=0.01).run()


@pytest.mark.slow
def test_the_cached_grid_is_compared_with_the_released_loop(capsys: pytest.CaptureFixture[str]) -> None:
    ProbesBenchmark(images=48, epochs=2).run()
    out = capsys.readouterr().out
    ratio = float(out.splitlines()[1].split("x")[0])
    assert ratio > 1
    assert "best accuracy on val" in out


def test_published_rows() -> None:
    assert len({(p.benchmark, p.method, p.block, p.timestep, p.pool, p.source) for p in PUBLISHED}) == len(PUBLISHED)
    assert published_rows("cub")[0].value == 72
    best = max((p for p in published_rows("cub") if p.block is not None), key=lambda p: p.value)
    assert (best.block, best.timestep, best.pool, best.value) == (19, 150, 4, 34.9)
    assert "DifFeed" in published_table("imagenet")
    assert published_table("scenes") == ""
