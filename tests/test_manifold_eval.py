"""Toy manifolds, their metrics, the table and the benchmark."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import pearsonr, spearmanr

from diffrep.eval.benchmarks.manifold import ManifoldBenchmark, Measured, growth, table
from diffrep.eval.manifold import (
    ManifoldSettings,
    cluster_scores,
    entropic_plan,
    evaluate_manifolds,
    geodesic_scores,
    interpolate_times,
    interpolation_scores,
    neighbor_accuracy,
    row_pearson,
    row_spearman,
    transport_cost,
)
from diffrep.eval.toy_manifolds import random_tree, swiss_roll


def test_row_correlations_are_those_of_scipy() -> None:
    a, b = np.random.default_rng(0).random((2, 12, 12)).round(1)  # rounded, so that there are ties
    assert row_spearman(a, b) == pytest.approx(np.mean([spearmanr(x, y)[0] for x, y in zip(a, b, strict=True)]))
    assert row_pearson(a, b) == pytest.approx(np.mean([pearsonr(x, y)[0] for x, y in zip(a, b, strict=True)]))


def test_scores_of_the_truth_and_of_its_multiples() -> None:
    truth = squareform(pdist(np.random.default_rng(0).random((40, 2))))
    same, double = geodesic_scores(truth, truth), geodesic_scores(2 * truth, truth)
    assert same["fro_rel"] == same["inf_rel"] == 0
    assert same["P@10"] == same["spearman_mean_rows"] == pytest.approx(1)
    assert double["fro_rel"] == pytest.approx(1)
    assert double["fro_scaled"] == pytest.approx(0)
    assert double["inf_over_n2"] == pytest.approx(truth.sum(axis=1).max() / 1600)
    shuffled = truth[np.random.default_rng(1).permutation(40)]
    assert geodesic_scores(shuffled, truth)["P@10"] < 0.5


def test_transport_is_exact_for_equal_and_unequal_clouds() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((6, 2)), rng.random((9, 2))
    expected = cdist(np.repeat(a, 3, axis=0), np.repeat(b, 2, axis=0))  # 18 equal parts each
    best = expected[linear_sum_assignment(expected)].mean()
    assert transport_cost(cdist(a, b)) == pytest.approx(best)
    assert transport_cost(cdist(a, a + [3.0, 0.0])) == pytest.approx(3.0)


def test_entropic_plan_has_the_right_margins() -> None:
    cost = np.random.default_rng(0).random((5, 8))
    plan = entropic_plan(cost)
    np.testing.assert_allclose(plan.sum(axis=1), 1 / 5, atol=1e-7)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / 8, atol=1e-7)
    sharp = entropic_plan(cost, regularization=0.001, iterations=5000)
    assert (sharp * cost).sum() < (plan * cost).sum()


def test_interpolation_finds_the_middle_of_a_straight_course() -> None:
    rng = np.random.default_rng(0)
    times = np.repeat([0, 1, 2, 3], 60)
    points = np.stack([times + 0.05 * rng.standard_normal(240), rng.random(240)], axis=1)
    found = interpolate_times(points, times)
    assert list(found.per_time) == [1, 2]
    standard = (points - points.mean(axis=0)) / points.std(axis=0)
    gap = interpolation_scores(standard[times == 0], standard[times == 1])
    assert found.mean()["mmd_linear"] < gap["mmd_linear"] / 4
    assert found.mean()["w1"] < gap["w1"] / 1.5
    with pytest.raises(ValueError, match=r"at least three time points, got 2: \[0, 1\]"):
        interpolate_times(points[:120], times[:120])


def test_clusters_and_neighbours() -> None:
    labels = np.repeat(np.arange(3), 30)
    apart = np.random.default_rng(0).standard_normal((90, 2)) + 20 * np.eye(3)[labels][:, :2]
    assert cluster_scores(apart, labels)["ari"] > 0.95
    assert neighbor_accuracy(apart, labels) > 0.95
    assert neighbor_accuracy(apart, np.random.default_rng(1).permutation(labels)) < 0.6


def test_swiss_roll_is_a_rolled_rectangle() -> None:
    toy = swiss_roll(200, noise=0.0, dim=7, seed=5)
    assert toy.points.shape == (200, 7)
    np.testing.assert_array_equal(toy.points, toy.clean)
    truth, straight = toy.geodesic(), squareform(pdist(toy.points))
    assert (truth >= straight - 1e-9).all()  # no way along the roll is shorter than the straight line
    near = (straight < 1.0) & (truth < 3.0) & (straight > 0)
    np.testing.assert_allclose(straight[near], truth[near], rtol=0.03)
    some = np.array([3, 77])
    np.testing.assert_allclose(toy.geodesic(some), truth[some])
    with pytest.raises(ValueError, match="at least 3 dimensions, got dim=2"):
        swiss_roll(10, dim=2)


def test_tree_branches_start_on_the_first() -> None:
    toy = random_tree(40, branches=4, noise=0.1, seed=3)
    assert np.bincount(toy.labels).tolist() == [40] * 4
    first = toy.clean[:40]
    for branch in (1, 2, 3):
        start = toy.clean[40 * branch]
        step = cdist(start[None], first).min()
        assert step <= np.sqrt(10)  # one step of uniform(-1, 1) in ten dimensions
    assert 8 < (toy.points - toy.clean).std() / 0.1 < 12
    other = random_tree(40, branches=4, noise=0.1, seed=4)
    assert not np.allclose(toy.points, other.points)


def test_table_ranks_geodesic_methods_above_pca() -> None:
    settings = ManifoldSettings(
        points=150,
        seeds=(47,),
        roll_noise=(0.1,),
        roll_dims=(3,),
        tree_noise=(),
        methods=("heat-geodesic", "isomap", "pca"),
    )
    report = evaluate_manifolds(settings)
    by_method = report.scores["roll 3-D, noise 0.1"]
    assert by_method["heat-geodesic"]["embedding"]["spearman_mean_rows"][0] > 0.8
    assert by_method["pca"]["embedding"]["spearman_mean_rows"][0] < 0.6
    assert json.loads(report.to_json())["settings"]["points"] == 150
    lines = report.table().splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["heat-geodesic", "isomap", "pca"]
    assert len(report.plot().axes[0].containers) == 6  # three sets of bars, three of error bars
    with pytest.raises(ValueError, match="there is no method magic"):
        ManifoldSettings(methods=("magic",))


def test_growth_is_the_exponent_of_a_power_law() -> None:
    rows = [Measured("ours", n, 0.0, 3e-6 * n**1.5, 2.0 * n, 1.0) for n in (500, 2_000, 8_000, 32_000)]
    assert growth(rows)["ours"] == pytest.approx(1.5)
    assert growth(rows, "megabytes")["ours"] == pytest.approx(1.0)
    assert "n^1.50 in time, n^1.00 in memory" in table(rows)
    with pytest.raises(ValueError, match="magic: not installed or unknown"):
        ManifoldBenchmark(sizes=(100,), methods=("magic",)).measure()


@pytest.mark.slow
def test_benchmark_measures_in_processes_of_their_own() -> None:
    rows = ManifoldBenchmark(sizes=(300, 600), methods=("ours", "Isomap"), dim=3, noise=0.1).measure()
    assert [(row.method, row.points) for row in rows] == [
        ("ours", 300), ("Isomap", 300), ("ours", 600), ("Isomap", 600),
    ]  # fmt: skip
    assert all(row.processor > 0 and row.spearman > 0.9 for row in rows)
