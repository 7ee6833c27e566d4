"""The estimator: scikit-learn's contract, both paths, transform, and input that is not as one would like."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import kneighbors_graph
from sklearn.utils.estimator_checks import parametrize_with_checks

from diffrep.eval.manifold import row_spearman
from diffrep.eval.toy_manifolds import ToyManifold, random_tree, swiss_roll
from diffrep.manifold import PRESETS, HeatGeodesicEmbedding
from diffrep.manifold.neighbors import different_rows


@pytest.fixture(scope="module")
def roll() -> ToyManifold:
    return swiss_roll(200, noise=0.1, width=2.0, seed=47)


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 5)) * 40
    return np.concatenate([centre + rng.standard_normal((30, 5)) for centre in centres])


def embed(points: Any, **settings: Any) -> HeatGeodesicEmbedding:
    return HeatGeodesicEmbedding(**{"random_state": 0, **settings}).fit(points)


@pytest.mark.filterwarnings("ignore:n_neighbors=10 needs more:UserWarning")
@pytest.mark.filterwarnings("ignore:the neighbourhood graph has:UserWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([HeatGeodesicEmbedding()])
def test_scikit_learn_contract(estimator: Any, check: Any) -> None:
    check(estimator)


def test_embedding_keeps_geodesics(roll: ToyManifold) -> None:
    fitted = embed(roll.points)
    assert fitted.path_ == "exact"
    assert fitted.landmark_indices_ is None
    truth = roll.geodesic()
    assert row_spearman(fitted.distances_, truth) > 0.985
    assert row_spearman(squareform(pdist(fitted.embedding_)), truth) > 0.985
    assert fitted.stress_ < 0.05
    assert 1 <= fitted.t_[0] <= 300
    np.testing.assert_allclose(fitted.embedding_.mean(axis=0), 0, atol=1e-9)


def test_embedding_is_in_the_units_of_the_distances(roll: ToyManifold) -> None:
    fitted = embed(roll.points)
    distances, apart = fitted.distances_, squareform(pdist(fitted.embedding_))
    assert (distances * apart).sum() / (apart**2).sum() == pytest.approx(1, abs=0.01)


def test_reference_preset_has_the_official_numbers(roll: ToyManifold) -> None:
    """Its distances are -4t log(H + 1e-16), capped where a polynomial of degree 32 does not reach."""
    fitted = HeatGeodesicEmbedding.preset("reference", random_state=0).fit(roll.points)
    assert fitted.distances_.max() == pytest.approx(np.sqrt(-40 * np.log(1e-16)), rel=1e-6)
    assert fitted.distances_.diagonal().min() > 0
    ours = row_spearman(embed(roll.points).distances_, roll.geodesic())
    assert row_spearman(fitted.distances_, roll.geodesic()) < ours - 0.01


@pytest.mark.parametrize("count", [80, 199])
def test_both_paths_agree(roll: ToyManifold, count: int) -> None:
    exact, scaled = embed(roll.points, t=50.0), embed(roll.points, t=50.0, n_landmarks=count)
    assert scaled.path_ == "landmarks"
    assert len(scaled.landmark_indices_) == count
    same = exact.distances_[:, scaled.landmark_indices_]
    assert spearmanr(same.ravel(), scaled.distances_.ravel())[0] > 0.999
    assert np.median(np.abs(same - scaled.distances_)) < 0.02 * np.median(same)
    assert spearmanr(pdist(exact.embedding_), pdist(scaled.embedding_))[0] > 0.99


def test_as_many_landmarks_as_points_is_the_exact_path(roll: ToyManifold) -> None:
    exact, all_of_them = embed(roll.points), embed(roll.points, n_landmarks=200)
    assert all_of_them.path_ == "exact"
    np.testing.assert_array_equal(exact.embedding_, all_of_them.embedding_)


def test_size_chooses_the_path() -> None:
    points = np.random.default_rng(0).random((1501, 2))
    settings = {"dissimilarity": "shortest-path", "mds": "classical"}
    assert embed(points[:1000], **settings).path_ == "exact"
    fitted = embed(points, **settings)
    assert fitted.path_ == "landmarks"
    assert len(fitted.landmark_indices_) == 256


def test_stitching_sees_beyond_the_reach_of_the_polynomial(roll: ToyManifold) -> None:
    settings = {"t": 3.0, "n_landmarks": 80, "heat_method": "chebyshev", "order": 12}
    truth = roll.geodesic()
    stitched, capped = embed(roll.points, **settings), embed(roll.points, far_field="floor", **settings)
    at = stitched.landmark_indices_
    assert row_spearman(stitched.distances_, truth[:, at]) > 0.98
    assert row_spearman(capped.distances_, truth[:, at]) < 0.95


def test_transform_places_new_points_where_they_belong() -> None:
    toy = swiss_roll(400, noise=0.1, width=2.0, seed=3)
    fitted = embed(toy.points[:250])
    truth = toy.geodesic()
    own = row_spearman(squareform(pdist(fitted.embedding_)), truth[:250, :250])
    assert own > 0.97
    new = fitted.transform(toy.points[250:])
    assert row_spearman(cdist(new, fitted.embedding_), truth[250:, :250]) > own - 0.005
    assert row_spearman(fitted.heat_distances(toy.points[250:]), truth[250:, :250]) > own - 0.005


@pytest.mark.parametrize("count", [None, 60])
def test_transform_is_row_by_row_and_knows_its_training_rows(roll: ToyManifold, count: int | None) -> None:
    fitted = embed(roll.points, n_landmarks=count)
    new = np.concatenate([roll.points[:7] + 0.05, roll.points[100:103]])
    together = fitted.transform(new)
    for i in (0, 4, 8):
        np.testing.assert_allclose(fitted.transform(new[i : i + 1])[0], together[i], rtol=1e-10)
    np.testing.assert_array_equal(together[7:], fitted.embedding_[100:103])
    np.testing.assert_array_equal(fitted.heat_distances(new)[7:], fitted.heat_distances(indices=[100, 101, 102]))


@pytest.mark.parametrize("count", [None, 60])
def test_transform_does_not_jump(roll: ToyManifold, count: int | None) -> None:
    """Near a training row the error falls with the square of the distance, and small steps stay small."""
    fitted = embed(roll.points, n_landmarks=count)
    aside = np.random.default_rng(0).standard_normal(roll.points.shape)
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    errors = [
        np.linalg.norm(fitted.transform(roll.points + step * aside) - fitted.embedding_, axis=1).max()
        for step in (0.03, 0.003, 0.0003, 1e-9)
    ]
    assert errors[0] < 0.5
    assert all(after < before / 50 for before, after in itertools.pairwise(errors))
    np.testing.assert_allclose(fitted.transform(roll.points.astype(np.float32)), fitted.embedding_, atol=1e-9)
    for i in range(5):
        low, high = roll.points[i], roll.points[i + 1]
        for _ in range(8):  # look closer and closer where the steps are largest
            line = low + (high - low) * np.linspace(0, 1, 33)[:, None]
            steps = np.linalg.norm(np.diff(fitted.transform(line), axis=0), axis=1)
            low, high = line[steps.argmax()], line[steps.argmax() + 1]
        assert steps.max() < 1e-3  # what the cut of the kernel at 1e-4 leaves
    between = fitted.heat_distances(roll.points[:20] + 1e-6 * aside[:20])
    np.testing.assert_allclose(between, fitted.distances_[:20], atol=1e-5)


@pytest.mark.parametrize("method", ["heat-geodesic", "diffusion-map", "shortest-path"])
@pytest.mark.parametrize("scale", [1e-100, 1e-20, 1e20, 1e100])
@pytest.mark.parametrize("count", [None, 50])
def test_the_unit_of_the_features_does_not_matter(
    roll: ToyManifold, method: str, scale: float, count: int | None
) -> None:
    first, scaled = (
        HeatGeodesicEmbedding.preset(method, random_state=0, n_landmarks=count).fit(points)
        for points in (roll.points, roll.points * scale)
    )
    unit = scale if method == "shortest-path" else 1.0
    np.testing.assert_allclose(
        scaled.embedding_ / unit, first.embedding_, rtol=1e-2, atol=1e-2 * np.ptp(first.embedding_)
    )
    np.testing.assert_allclose(scaled.transform(roll.points * scale), scaled.embedding_, rtol=1e-9)
    matrix = squareform(pdist(roll.points)) * scale
    if method == "heat-geodesic" and count is None:
        np.testing.assert_allclose(embed(matrix, metric="precomputed").embedding_, first.embedding_, atol=1e-2)


def test_features_out_of_all_proportion_are_refused(roll: ToyManifold) -> None:
    with pytest.raises(ValueError, match=r"coordinates spread over .*e-19\d, which is out of all proportion"):
        embed(roll.points * 1e-200)


def test_seeds_decide_everything_random(roll: ToyManifold) -> None:
    a, b, c = (embed(roll.points, n_landmarks=50, random_state=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.embedding_, b.embedding_)
    assert (a.landmark_indices_ != c.landmark_indices_).any()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    embed(roll.points, random_state=5)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_the_repr_says_what_was_changed_and_what_was_fitted(roll: ToyManifold) -> None:
    estimator = HeatGeodesicEmbedding(n_neighbors=7, init=np.zeros((len(roll.points), 2)), random_state=0)
    settings = f"HeatGeodesicEmbedding(init=float64 ({len(roll.points)}, 2) in 0 .. 0, n_neighbors=7, random_state=0)"
    assert repr(estimator) == settings
    fitted = repr(HeatGeodesicEmbedding(random_state=0).fit(roll.points))
    assert fitted.startswith(f"HeatGeodesicEmbedding(random_state=0): fitted to {len(roll.points)} points (exact), ")
    assert f"embedding float64 ({len(roll.points)}, 2) in -" in fitted


def test_fitted_estimators_pickle(roll: ToyManifold) -> None:
    fitted = embed(np.hstack([roll.points] * 5), n_landmarks=40, knn_backend="faiss")
    again = pickle.loads(pickle.dumps(fitted))
    new = np.hstack([roll.points[:3]] * 5) + 0.01
    np.testing.assert_array_equal(again.transform(new), fitted.transform(new))
    with pytest.raises(NotFittedError):
        clone(fitted).transform(new)


def test_scale_shift_and_constant_columns_change_nothing(roll: ToyManifold) -> None:
    first = embed(roll.points).embedding_
    padded = np.c_[roll.points * 1e6 + 1e9, np.ones((200, 2))]
    np.testing.assert_allclose(embed(padded).embedding_, first, atol=1e-3)


def test_copies_of_a_row_lie_on_it(roll: ToyManifold) -> None:
    doubled = np.concatenate([roll.points, roll.points[:40], roll.points[:40]])
    fitted = embed(doubled)
    np.testing.assert_array_equal(fitted.embedding_[:40], fitted.embedding_[200:240])
    np.testing.assert_allclose(fitted.embedding_[:200], embed(roll.points).embedding_, atol=2)
    assert fitted.heat_distances().shape == (280, 200)


def test_rows_that_are_all_alike_lie_on_one_point() -> None:
    fitted = embed(np.ones((20, 3)))
    np.testing.assert_array_equal(fitted.embedding_, 0)
    np.testing.assert_array_equal(fitted.transform(np.zeros((2, 3))), 0)


def test_two_points_lie_apart() -> None:
    with pytest.warns(UserWarning, match="n_neighbors=10 needs more than 2 different points: using 1"):
        fitted = embed(np.array([[0.0, 1.0], [2.0, 3.0]]))
    assert np.ptp(fitted.embedding_[:, 0]) > 0.1


def test_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 sample.*minimum of 2"):
        embed(np.ones((1, 3)))


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_numbers_that_are_none_are_refused(roll: ToyManifold, value: float, name: str) -> None:
    points = roll.points.copy()
    points[3, 1] = value
    with pytest.raises(ValueError, match=name):
        embed(points)


def test_components_are_found_and_joined(blobs: np.ndarray) -> None:
    with pytest.warns(UserWarning, match=r"4 components \(the largest of 30, 30, 30, 30 points\): connecting"):
        joined = embed(blobs, n_neighbors=5)
    assert joined.n_connected_components_ == 4
    apart = squareform(pdist(joined.embedding_)).reshape(4, 30, 4, 30).mean(axis=(1, 3))
    assert apart[~np.eye(4, dtype=bool)].min() > 2 * apart.diagonal().max()
    silent = embed(blobs, n_neighbors=5, on_disconnected="connect")
    np.testing.assert_array_equal(silent.embedding_, joined.embedding_)
    with pytest.raises(ValueError, match=r"4 components.*raise n_neighbors"):
        embed(blobs, n_neighbors=5, on_disconnected="raise")


@pytest.mark.parametrize("count", [None, 40, 3])
def test_components_may_be_kept_apart(blobs: np.ndarray, count: int | None) -> None:
    kept = embed(blobs, n_neighbors=5, on_disconnected="keep", n_landmarks=count)
    assert np.isfinite(kept.embedding_).all()
    at = np.arange(120) if count is None else kept.landmark_indices_
    same = np.arange(120)[:, None] // 30 == at // 30
    assert np.unique(kept.distances_[~same]).size == 1
    assert kept.distances_[~same].max() == pytest.approx(2 * kept.distances_[same].max())


def test_precomputed_distances_and_graphs_give_the_embedding_of_the_features(roll: ToyManifold) -> None:
    fitted = embed(roll.points)
    distances = squareform(pdist(roll.points))
    for matrix, metric in [(distances, "precomputed"), (fitted.affinity_, "affinity")]:
        other = embed(matrix, metric=metric)
        np.testing.assert_allclose(other.embedding_, fitted.embedding_, atol=1e-6)
        with pytest.raises(ValueError, match=f"fitted with metric='{metric}'"):
            other.transform(matrix)
    nearest = kneighbors_graph(roll.points, 25, mode="distance")
    assert spearmanr(pdist(embed(nearest, metric="precomputed").embedding_), pdist(fitted.embedding_))[0] > 0.99


def test_sparse_float32_and_reduced_features(roll: ToyManifold) -> None:
    first = embed(roll.points)
    wide = np.c_[roll.points, np.zeros((200, 20))]
    sparse = embed(sp.csr_matrix(wide))
    np.testing.assert_allclose(sparse.embedding_, first.embedding_, atol=1e-6)
    np.testing.assert_allclose(sparse.transform(sp.csr_matrix(wide[:3] + 0.0)), first.embedding_[:3], atol=1e-6)
    narrow = embed(roll.points.astype(np.float32))
    assert spearmanr(pdist(narrow.embedding_), pdist(first.embedding_))[0] > 0.999
    reduced = embed(wide, n_pca=3)
    assert spearmanr(pdist(reduced.embedding_), pdist(first.embedding_))[0] > 0.999
    assert reduced.transform(wide[:2] + 0.01).shape == (2, 2)


def test_cosine_ignores_length(roll: ToyManifold) -> None:
    rng = np.random.default_rng(0)
    cloud = rng.standard_normal((80, 4))
    longer = cloud * rng.uniform(0.5, 2, (80, 1))
    a, b = embed(cloud, metric="cosine"), embed(longer, metric="cosine")
    np.testing.assert_allclose(a.embedding_, b.embedding_, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("count", [None, 60])
def test_presets_embed_and_transform(name: str, count: int | None) -> None:
    toy = random_tree(30, branches=4, noise=0.05, seed=1)
    fitted = HeatGeodesicEmbedding.preset(name, random_state=0, n_landmarks=count).fit(toy.points)
    assert fitted.embedding_.shape == (120, 2)
    assert row_spearman(squareform(pdist(fitted.embedding_)), toy.geodesic()) > 0.4
    assert np.isfinite(fitted.transform(toy.points[:4] + 0.1)).all()
    with pytest.raises(ValueError, match="no preset 'tsne'"):
        HeatGeodesicEmbedding.preset("tsne")


def test_shortest_path_preset_is_isomaps_distance(roll: ToyManifold) -> None:
    from diffrep.manifold.graphs import shortest_path_distances
    from diffrep.manifold.neighbors import NeighborSearch

    fitted = HeatGeodesicEmbedding.preset("shortest-path", random_state=0).fit(roll.points)
    np.testing.assert_allclose(fitted.distances_, shortest_path_distances(NeighborSearch(roll.points), 10))


@pytest.mark.parametrize("method", ["chebyshev", "squaring", "euler", "crank-nicolson", "exact"])
def test_heat_methods_agree(roll: ToyManifold, method: str) -> None:
    expected = embed(roll.points, t=20.0).distances_
    near = expected < np.quantile(expected, 0.1)  # what eigenvectors and first-order steps can tell
    order = 60 if method in ("euler", "crank-nicolson") else "auto"
    got = embed(roll.points, t=20.0, heat_method=method, order=order)
    assert np.abs(got.distances_ - expected)[near].max() < (1.0 if method == "euler" else 0.1)


def test_options_do_what_they_say(roll: ToyManifold) -> None:
    plain = embed(roll.points, t=20.0)
    several = embed(roll.points, t=[5.0, 20.0, 60.0])
    assert several.t_.tolist() == [5.0, 20.0, 60.0]
    assert spearmanr(pdist(several.embedding_), pdist(plain.embedding_))[0] > 0.99
    squared = embed(roll.points, t=20.0, scale_power=2.0)
    np.testing.assert_allclose(squared.distances_, plain.distances_**2, rtol=1e-9)
    third = embed(roll.points, t=20.0, n_components=3)
    assert third.stress_ < plain.stress_
    combinatorial = embed(roll.points, t=2.0, laplacian="combinatorial", n_landmarks=60)
    truth = roll.geodesic()[:, combinatorial.landmark_indices_]
    assert row_spearman(combinatorial.distances_, truth) > 0.98
    for scaling in ("smacof", "classical"):
        other = embed(roll.points, t=20.0, mds=scaling)
        assert spearmanr(pdist(other.embedding_), pdist(plain.embedding_))[0] > 0.98
    started = embed(roll.points, t=20.0, init=plain.embedding_, mds="smacof")
    np.testing.assert_allclose(started.stress_, plain.stress_, rtol=1e-3)


def test_automatic_time_is_shorter_where_heat_mixes_sooner(roll: ToyManifold) -> None:
    mixed = embed(np.random.default_rng(0).standard_normal((150, 10)))
    rolled = embed(roll.points)
    assert mixed.t_[0] < rolled.t_[0]
    assert rolled.t_[0] in rolled.t_grid_
    assert (np.diff(rolled.entropy_) > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "manhattan"}, "metric must be one of 'euclidean', .* got 'manhattan'"),
        ({"t": -1.0}, "t must be 'auto' or positive, got -1.0"),
        ({"t": "long"}, "t must be 'auto' or positive, got 'long'"),
        ({"t": []}, "t must be 'auto' or positive"),
        ({"n_neighbors": 0}, "n_neighbors must be an integer of at least 1, got 0"),
        ({"n_components": 1.5}, "n_components must be an integer of at least 1, got 1.5"),
        ({"n_landmarks": 2}, "n_landmarks must be an integer of at least 3 or 'auto' or None, got 2"),
        ({"n_landmarks": 3, "n_components": 3}, "n_landmarks must be more than n_components=3, got 3"),
        ({"triplet_weight": 1.5}, r"triplet_weight must lie in \[0, 1\], got 1.5"),
        ({"init": "random"}, "init must be 'classical', 'squared' or an array, got 'random'"),
        ({"init": np.ones((3, 2))}, r"init must have shape \(200, 2\), got \(3, 2\)"),
        ({"heat_method": "exact", "n_landmarks": 20}, "'exact' makes the whole kernel"),
        ({"metric": "precomputed"}, "needs a square matrix"),
        ({"decay": 0.0}, "decay must be positive, got 0.0"),
        ({"thresh": 1.0}, "thresh must be below 1"),
    ],
)
def test_wrong_settings_are_named(roll: ToyManifold, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(roll.points, **settings)


def test_progress_goes_to_standard_error(roll: ToyManifold, capsys: pytest.CaptureFixture[str]) -> None:
    embed(roll.points, n_landmarks=40, verbose=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "heat, t = " in shown.err
    assert "placement" in shown.err


@pytest.mark.slow
def test_two_thousand_points_by_default() -> None:
    toy = swiss_roll(2000, noise=0.1, seed=47)
    fitted = embed(toy.points)
    assert fitted.path_ == "landmarks"
    assert row_spearman(squareform(pdist(fitted.embedding_)), toy.geodesic()) > 0.99
    official = HeatGeodesicEmbedding.preset("reference", random_state=0).fit(toy.points)
    assert official.path_ == "exact"
    assert row_spearman(squareform(pdist(official.embedding_)), toy.geodesic()) < 0.85


@pytest.mark.slow
def test_twenty_thousand_points_in_memory_linear_in_their_number() -> None:
    """Peak memory of a process of its own; an (n, n) array of them would take 1.6 GB in float32."""
    program = (
        "import resource, numpy as np\n"
        "from diffrep.eval.toy_manifolds import swiss_roll\n"
        "from diffrep.eval.manifold import row_spearman\n"
        "from diffrep.manifold import HeatGeodesicEmbedding\n"
        "from scipy.spatial.distance import pdist, squareform\n"
        "toy = swiss_roll(20_000, noise=0.1, seed=47)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "fitted = HeatGeodesicEmbedding(random_state=0).fit(toy.points)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "some = np.arange(0, 20_000, 50)\n"
        "apart = squareform(pdist(fitted.embedding_[some]))\n"
        "print((after - before) / 1024, row_spearman(apart, toy.geodesic(some)[:, some]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    megabytes, quality = map(float, done.stdout.split())
    assert megabytes < 500
    assert quality > 0.99


def test_importing_the_package_does_not_import_the_manifold() -> None:
    program = "import sys, diffrep; print('sklearn' in sys.modules, 'diffrep.manifold' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_warning_by_default(roll: ToyManifold) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(roll.points)


def test_copies_are_found_in_dense_and_sparse_rows() -> None:
    rows = np.random.default_rng(0).integers(0, 2, (40, 4)).astype(np.float64)
    expected = np.unique(rows, axis=0)
    for points in (rows, sp.csr_matrix(rows)):
        original, copy_of = different_rows(points)
        assert len(original) == len(expected)
        np.testing.assert_array_equal(rows[original[copy_of]], rows)
        assert (original[copy_of] <= np.arange(40)).all()
    original, copy_of = different_rows(np.random.default_rng(0).random((30, 3)))
    np.testing.assert_array_equal(original, np.arange(30))
    np.testing.assert_array_equal(copy_of, np.arange(30))


def test_bridges_carry_shortest_paths(blobs: np.ndarray) -> None:
    fitted = embed(blobs, n_neighbors=5, dissimilarity="shortest-path", on_disconnected="connect")
    straight = squareform(pdist(blobs))
    assert (fitted.distances_ >= straight - 1e-9).all()
    assert np.unique(fitted.distances_.round(6)).size > 1000  # no common distance between the components
