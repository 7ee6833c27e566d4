from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffrep.cli import main


def test_the_toy_benchmark_prints_a_table_and_keeps_scores_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--points", "250", "--seeds", "47", "--roll-noise", "0.1", "--roll-dims", "3", "--tree-noise", "0.05"]
    more = ["--tree-dims", "10", "--methods", "heat-geodesic", "pca", "--plot", str(tmp_path / "scores.png")]
    assert main(["eval", "manifold", *small, *more, "-o", str(tmp_path / "scores.json")]) == 0
    table = capsys.readouterr().out
    assert "roll 3-D, noise 0.1" in table
    assert "tree 10-D, noise 0.05" in table
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]["roll 3-D, noise 0.1"]
    spearman = {name: parts["embedding"]["spearman_mean_rows"][0] for name, parts in scores.items()}
    assert spearman["heat-geodesic"] > spearman["pca"]
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_times_are_interpolated_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    times = np.repeat([0, 1, 2], 40)
    course = times + rng.random(120)
    points = np.column_stack([course, np.sin(course), 0.05 * rng.normal(size=120)])
    rows = "\n".join(",".join(f"{v:.5f}" for v in row) + f",{t}" for row, t in zip(points, times, strict=True))
    (tmp_path / "cells.csv").write_text("a,b,c,day\n" + rows + "\n")
    options = ["--config.n-components", "1", "--config.on-disconnected", "connect"]
    assert main(["eval", "interpolation", str(tmp_path / "cells.csv"), "--times", "day", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [float(time) for time in found["per_time"]] == [1.0]
    assert found["settings"]["embedding"]["features"] == 3
    assert 0 < found["mean"]["mmd_linear"] < 0.1  # the mean of the middle time lies between the others


def test_bad_words_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "manifold", "--score", "beauty"]) == 2
    assert "beauty" in capsys.readouterr().err
    (tmp_path / "cells.csv").write_text("a,day\n" + "\n".join(f"{i},{i % 2}" for i in range(60)) + "\n")
    assert main(["eval", "interpolation", str(tmp_path / "cells.csv"), "--times", "month", "--json"]) == 2
    assert "month" in capsys.readouterr().err
