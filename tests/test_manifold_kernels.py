"""Graphs, heat kernels, distances and scaling: laws that must hold whatever the official code does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.linalg import expm
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.special import gammaln

from diffrep.manifold import graphs, heat, mds
from diffrep.manifold.geodesics import Stitching, Voronoi, choose_landmarks, landmark_diagonal
from diffrep.manifold.graphs import (
    alpha_decay_graph,
    clean_affinity,
    connect_components,
    hop_diameter,
    laplacian,
    largest_eigenvalue,
    neighbor_pairs,
    out_of_sample_transitions,
)
from diffrep.manifold.heat import (
    chebyshev_heat,
    chebyshev_order,
    chebyshev_tail,
    heat_geodesic_distances,
    implicit_heat,
    knee,
    multiscale_weights,
    series_order,
    spectral_heat,
    squared_heat,
    triplet_distances,
)
from diffrep.manifold.mds import mds_weights
from diffrep.manifold.neighbors import NeighborSearch
from diffrep.manifold.official import HeatGeoOptions, two_line_knee


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    angle = np.linspace(0, 3 * np.pi, 90)
    spiral = np.stack([angle * np.cos(angle), angle * np.sin(angle), 0.1 * angle], axis=1)
    return spiral + 0.05 * np.random.default_rng(0).standard_normal(spiral.shape)


@pytest.fixture(scope="module")
def graph(points: np.ndarray) -> sp.csr_matrix:
    return alpha_decay_graph(NeighborSearch(points), 4)


def chain(n: int) -> sp.csr_matrix:
    return sp.diags([np.ones(n - 1), np.ones(n - 1)], [-1, 1]).tocsr()


def uniformised(lap: sp.csr_matrix, t: float, terms: int) -> np.ndarray:
    """sum_k Poisson(k; t) (I - L)^k, whose terms are all non-negative for the normalised Laplacian."""
    step = (sp.identity(lap.shape[0]) - lap).toarray()
    power, total = np.eye(len(step)), np.zeros_like(step)
    for k in range(terms):
        total += np.exp(k * np.log(t) - t - gammaln(k + 1)) * power
        power = step @ power
    return total


def test_affinity_is_one_at_the_bandwidth_scale(points: np.ndarray, graph: sp.csr_matrix) -> None:
    assert abs(graph - graph.T).max() == 0
    assert graph.diagonal().max() == 0
    distances = squareform(pdist(points))
    fifth = np.sort(distances, axis=1)[:, 4]
    directed = np.exp(-((distances / fifth[:, None]) ** 40))
    directed[directed < 1e-4] = 0
    expected = (directed + directed.T) / 2
    np.fill_diagonal(expected, 0)
    expected[expected < 1e-4] = 0
    np.testing.assert_allclose(graph.toarray(), expected, rtol=1e-9)


def test_wide_kernels_ask_for_more_neighbours(points: np.ndarray) -> None:
    narrow = alpha_decay_graph(NeighborSearch(points), 4, decay=2)
    distances = squareform(pdist(points))
    wide = alpha_decay_graph(distances, 4, decay=2)
    assert narrow.nnz > 4 * 90
    np.testing.assert_allclose(narrow.toarray(), wide.toarray(), rtol=1e-9)
    nearest = np.where(distances <= np.sort(distances, axis=1)[:, [20]], distances, 0)
    sparse = alpha_decay_graph(sp.csr_matrix(nearest), 4, decay=40)
    np.testing.assert_allclose(sparse.toarray(), alpha_decay_graph(NeighborSearch(points), 4).toarray(), rtol=1e-9)


@pytest.mark.parametrize("dims", [3, 24])
def test_faiss_and_sklearn_find_the_same_neighbours(dims: int) -> None:
    cloud = np.random.default_rng(1).standard_normal((300, dims)) * 1e-3 + 1e3  # far from the origin
    exact, fast = (NeighborSearch(cloud, backend=b).query(cloud, 8) for b in ("sklearn", "faiss"))
    np.testing.assert_array_equal(exact[1], fast[1])
    np.testing.assert_array_equal(exact[0], fast[0])
    np.testing.assert_array_equal(exact[1][:, 0], np.arange(300))


def test_sparse_points_have_the_distances_of_dense_ones() -> None:
    dense = np.where(np.random.default_rng(0).random((40, 12)) < 0.3, 1.5, 0.0)
    dense[:, 0] = np.arange(40)
    got = NeighborSearch(sp.csr_matrix(dense)).query(sp.csr_matrix(dense), 5)[0]
    np.testing.assert_allclose(got, np.sort(cdist(dense, dense), axis=1)[:, :5], atol=1e-12)


def test_laplacians(graph: sp.csr_matrix) -> None:
    normalised, combinatorial = laplacian(graph), laplacian(graph, "combinatorial")
    degree = np.asarray(graph.sum(axis=1)).ravel()
    np.testing.assert_allclose(combinatorial @ np.ones(90), 0, atol=1e-12)
    np.testing.assert_allclose(normalised @ np.sqrt(degree), 0, atol=1e-12)
    assert 0 < largest_eigenvalue(normalised) <= 2
    with pytest.raises(ValueError, match="'random'"):
        laplacian(graph, "random")  # type: ignore[arg-type]


def test_heat_stays_on_a_point_without_neighbours() -> None:
    lonely = sp.block_diag([chain(4), sp.csr_matrix((1, 1))]).tocsr()
    heat = squared_heat(laplacian(lonely), 7.0)
    assert heat[4, 4] == pytest.approx(1.0)
    assert heat[4, :4].max() == 0


def test_chebyshev_and_squaring_are_exact_entry_by_entry(graph: sp.csr_matrix) -> None:
    lap = laplacian(graph)
    order = 100
    assert order > hop_diameter(graph)
    expected = uniformised(lap, 10.0, 400)
    assert expected.min() < 1e-16  # beyond the absolute precision of eigenvectors
    np.testing.assert_allclose(chebyshev_heat(lap, np.eye(90), 10.0, order=order), expected, rtol=1e-10)
    np.testing.assert_allclose(squared_heat(lap, 10.0), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["normalized", "combinatorial"])
def test_all_kernels_are_the_matrix_exponential(graph: sp.csr_matrix, kind: str) -> None:
    lap = laplacian(graph, kind)  # type: ignore[arg-type]
    expected = expm(-3.0 * lap.toarray())
    for got, error in [
        (squared_heat(lap, 3.0), 1e-13),
        (spectral_heat(lap, 3.0), 1e-13),
        (chebyshev_heat(lap, np.eye(90), 3.0, order=80), 1e-13),
        (implicit_heat(lap, np.eye(90), 3.0, steps=400, theta=0.5), 1e-4),
        (implicit_heat(lap, np.eye(90), 3.0, steps=400, theta=1.0), 3e-2),
    ]:
        np.testing.assert_allclose(got, expected, atol=error)


def test_crank_nicolson_is_of_second_order(graph: sp.csr_matrix) -> None:
    lap = laplacian(graph)
    exact = expm(-2.0 * lap.toarray())
    errors = {
        theta: [np.abs(implicit_heat(lap, np.eye(90), 2.0, steps=s, theta=theta) - exact).max() for s in (16, 32)]
        for theta in (1.0, 0.5)
    }
    assert 1.7 < errors[1.0][0] / errors[1.0][1] < 2.3
    assert 3.5 < errors[0.5][0] / errors[0.5][1] < 4.5


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("times", [[3.0], [1.0, 3.0, 6.0]])
def test_rows_that_heat_has_not_reached_are_left_out(shuffled: bool, times: list[float]) -> None:
    """A long chain, in order and not, with a point without edges: the same as with all rows, and zero beyond."""
    n, order = 200, 12
    affinity = sp.block_diag([chain(n - 1), sp.csr_matrix((1, 1))]).tocsr()
    places = np.random.default_rng(1).permutation(n) if shuffled else np.arange(n)
    affinity = affinity[places][:, places].tocsr()
    source = np.argsort(places)[[40, 43, n - 1]]
    signals = np.zeros((n, 3))
    signals[source, [0, 1, 2]] = 1
    lap = laplacian(affinity)
    found = chebyshev_heat(lap, signals, times, order=order, lmax=2.0)
    scaled, everything = lap.toarray() - np.eye(n), []
    for t in times:
        weights = heat.chebyshev_coefficients(t, 1.0, order)
        before, now = signals, scaled @ signals
        total = weights[0] / 2 * before + weights[1] * now
        for weight in weights[2:]:
            before, now = now, 2 * scaled @ now - before
            total = total + weight * now
        everything.append(total)
    np.testing.assert_allclose(found, everything, atol=1e-14)
    distance = np.abs(places[:, None] - np.array([40, 43]))
    assert (found[..., :2][:, distance > order] == 0).all()
    assert not chebyshev_heat(lap, np.zeros((n, 2)), times, order=order, lmax=2.0).any()


def test_pairs_do_not_depend_on_how_many_are_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(5).normal(size=(300, 30))  # distances are alike: the kernel reaches most points
    search = NeighborSearch(points)
    plain = neighbor_pairs(search, points, 6, 1.2)
    monkeypatch.setattr(graphs, "_PILOT", 20)
    asked = []
    query = search.query
    monkeypatch.setattr(search, "query", lambda rows, k: asked.append((len(rows), k)) or query(rows, k))
    guessed = neighbor_pairs(search, points, 6, 1.2)
    assert len(np.unique(plain[0] * 300 + plain[1])) == len(plain[0])
    assert set(zip(*plain[:3], strict=True)) == set(zip(*guessed[:3], strict=True))
    np.testing.assert_array_equal(plain[3], guessed[3])
    assert sum(rows for rows, _ in asked if rows > 20) < 1.2 * 300  # all points are searched once


def test_float32_columns_have_the_values_of_float64(graph: sp.csr_matrix) -> None:
    lap = laplacian(graph)
    signals = np.eye(90)[:, ::9]
    wide = chebyshev_heat(lap, signals, [1.0, 20.0], order=60)
    narrow = chebyshev_heat(lap, signals.astype(np.float32), [1.0, 20.0], order=60)
    assert narrow.dtype == np.float32
    assert narrow.shape == wide.shape == (2, 90, 10)
    far = wide > 1e-30
    np.testing.assert_allclose(narrow[far], wide[far], rtol=1e-3)


def test_torch_computes_the_same_series(graph: sp.csr_matrix) -> None:
    import torch

    lap, signals = laplacian(graph), np.eye(90)[:, :7]
    device = str(torch.device("cpu", 0))  # the torch path, on the CPU
    got = chebyshev_heat(lap, signals, [2.0, 9.0], order=40, device=device)
    np.testing.assert_allclose(got, chebyshev_heat(lap, signals, [2.0, 9.0], order=40), atol=1e-13)


def test_error_bounds_hold(graph: sp.csr_matrix) -> None:
    lap = laplacian(graph, "combinatorial")
    phi = largest_eigenvalue(lap) / 2
    signals = np.random.default_rng(0).random((90, 3))
    exact = expm(-2.0 * lap.toarray()) @ signals
    for error in (1e-3, 1e-8):
        order = chebyshev_order(2.0, phi, signals, error)
        got = chebyshev_heat(lap, signals, 2.0, order=order)
        relative = ((got - exact) ** 2).sum(axis=0) / (exact**2).sum(axis=0)
        assert (relative <= error).all()
    order = series_order(2.0, phi, 1e-9)
    assert chebyshev_tail(2.0, phi, order) <= 1e-9 < chebyshev_tail(2.0, phi, order - 1)


def test_geometric_volume_makes_a_premetric(graph: sp.csr_matrix) -> None:
    heat = squared_heat(laplacian(graph), 5.0)
    distances = heat_geodesic_distances(heat, 5.0)
    np.testing.assert_allclose(distances.diagonal(), 0, atol=1e-6)
    np.testing.assert_allclose(distances, distances.T, atol=1e-9)
    assert distances[~np.eye(90, dtype=bool)].min() > 0
    squared = heat_geodesic_distances(heat, 5.0, scale_power=2)
    np.testing.assert_allclose(squared, distances**2, rtol=1e-12)


def test_varadhan_on_a_line() -> None:
    n = 61  # -4t log h grows with the square of the number of steps, apart from the volume term
    heat = squared_heat(laplacian(chain(n)), 40.0)
    distances = heat_geodesic_distances(heat, 40.0)[10, 10:50]
    steps = np.arange(40)
    assert np.corrcoef(steps, distances)[0, 1] > 0.999
    assert distances[39] / 39 == pytest.approx(np.sqrt(2), rel=0.1)  # a step has variance 1 per unit of time


def test_phate_identity(graph: sp.csr_matrix) -> None:
    heat = squared_heat(laplacian(graph), 3.0)
    s = heat_geodesic_distances(heat, 3.0, floor=1e-16, volume=None, scale_power=2)
    s = -4 * 3.0 * np.log(heat + 1e-16) if (s == 0).any() else s
    expected = 4 * 3.0 * squareform(pdist(-np.log(heat + 1e-16)))
    np.testing.assert_allclose(triplet_distances(s), expected, rtol=1e-9, atol=1e-9)


def test_weights() -> None:
    np.testing.assert_allclose(multiscale_weights([1.0, 3.0]), [0.75, 0.25])
    np.testing.assert_allclose(multiscale_weights([7.0]), [1.0])
    distances = np.array([[0.0, 2.0], [2.0, 0.0]])
    heat = np.array([[0.5, 0.1], [0.1, 0.5]])
    assert mds_weights("heat", distances, heat)[0, 1] == pytest.approx(0.10001)
    assert mds_weights("inverse", distances, heat, 2.0)[0, 1] == pytest.approx(0.25)
    assert mds_weights("gaussian", distances, heat, 0.5)[0, 1] == pytest.approx(np.exp(-2))
    with pytest.raises(ValueError, match="'cubic'"):
        mds_weights("cubic", distances, heat)  # type: ignore[arg-type]
    level = HeatGeoOptions(mds_weights_type="inv_dist", mds_weights_args=0).weights(distances, heat)
    np.testing.assert_array_equal(level, np.ones((2, 2)))  # D^-0: an exponent of 0 is not the one that is not given


def test_two_line_knee_is_phates() -> None:
    t = np.arange(20.0)
    knees = [two_line_knee(curve) for curve in (1 / (1 + t), np.exp(-t / 2) + 0.3 * np.exp(-t / 50))]
    assert knees == [3, 5]  # of phate 2.0.0's own function; with both lines fitted to their points, 3 and 4


def test_knee_of_a_saturating_curve() -> None:
    x = np.linspace(0, 10, 101)
    assert x[knee(x, np.minimum(x, 3.0))] == pytest.approx(3.0)
    assert knee(x, np.ones(101)) is None
    assert knee(x, x) is None


@pytest.mark.parametrize("weighted", [False, True])
def test_scaling_recovers_coordinates(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((41, 2))  # an odd number: one sits out in each round
    distances = squareform(pdist(truth))
    weights = 0.1 + squareform(rng.random(41 * 20)) if weighted else None
    start = mds.classical_mds(distances)
    np.testing.assert_allclose(squareform(pdist(start)), distances, atol=1e-9)
    rough = rng.standard_normal((41, 2)) * 0.1 + start
    for found in (
        mds.sgd_mds(distances, rough, weights=weights, rng=np.random.default_rng(1)),
        mds.smacof(distances, rough, weights=weights, max_iter=1000, tolerance=1e-12),
    ):
        assert mds.stress(distances, found, weights=weights, rescale=False) < 0.02


def test_majorisation_never_raises_the_stress() -> None:
    rng = np.random.default_rng(0)
    distances = squareform(rng.random(30 * 29 // 2) + 0.5)
    weights = squareform(rng.random(30 * 29 // 2) + 0.1)
    x, seen = rng.standard_normal((30, 2)), []
    for _ in range(20):
        seen.append(mds.stress(distances, x, weights=weights, rescale=False))
        x = mds.smacof(distances, x, weights=weights, max_iter=1, tolerance=-1.0)
    assert (np.diff(seen) <= 1e-12).all()
    assert seen[-1] < seen[0]


def test_placement_finds_points_each_on_its_own() -> None:
    rng = np.random.default_rng(0)
    anchors, truth = rng.standard_normal((20, 2)), rng.standard_normal((200, 2))
    distances = cdist(truth, anchors)
    placed = mds.place_points(distances, anchors, tolerance=1e-7, max_iter=400)
    np.testing.assert_allclose(placed, truth, atol=1e-4)
    assert mds.placement_stress(distances, placed, anchors) < 1e-4
    np.testing.assert_array_equal(
        mds.place_points(distances, anchors, numbers=60)[5], mds.place_points(distances, anchors)[5]
    )


def test_principal_axes_do_not_depend_on_the_orientation() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 2)) * [3, 1]
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    (a,), (b,) = mds.principal_axes(x), mds.principal_axes(x @ turn * [1, 1] + 5)
    np.testing.assert_allclose(a, b, atol=1e-10)
    assert a[:, 0].std() > a[:, 1].std()


def test_bridges_join_nearest_components_weaker_when_farther() -> None:
    rng = np.random.default_rng(0)
    blobs = [rng.standard_normal((20, 2)) + np.array([shift, 0]) for shift in (0, 9, 40)]
    search = NeighborSearch(np.concatenate(blobs))
    graph = alpha_decay_graph(search, 5)
    assert sp.csgraph.connected_components(graph)[0] == 3
    joined = connect_components(graph, search)
    assert sp.csgraph.connected_components(joined)[0] == 1
    new = sp.triu(joined - graph).tocoo()
    assert len(new.data) == 2
    blob = np.arange(60) // 20
    weight = {(blob[i], blob[j]): w for i, j, w in zip(new.row, new.col, new.data, strict=True)}
    assert set(weight) == {(0, 1), (1, 2)}
    assert 1 > weight[0, 1] > 2 * weight[1, 2] > 0
    by_distances = connect_components(graph, squareform(pdist(search.points)))
    np.testing.assert_allclose(by_distances.toarray(), joined.toarray())


def test_landmarks_cover_components_and_voids() -> None:
    graph = sp.block_diag([chain(200), chain(3)]).tocsr()
    chosen = choose_landmarks(graph, 16, np.random.default_rng(0))
    assert len(np.unique(chosen)) == 16
    assert (chosen >= 200).any()
    hops = Voronoi.of(graph, chosen).hops
    assert np.isfinite(hops).all()
    assert hops.max() <= 20  # random ones alone leave about 40


def test_voronoi_links_touching_cells() -> None:
    cells = Voronoi.of(chain(11), np.array([0, 4, 10]))
    assert cells.hops.tolist() == [0, 1, 2, 1, 0, 1, 2, 3, 2, 1, 0]
    np.testing.assert_array_equal(cells.links(chain(11)).toarray(), [[0, 4, 0], [4, 0, 6], [0, 6, 0]])


def test_landmark_volume_is_better_than_one_for_all(graph: sp.csr_matrix) -> None:
    heat = squared_heat(laplacian(graph), 20.0)
    degree = np.asarray(graph.sum(axis=1)).ravel()
    landmarks = np.arange(0, 90, 3)
    got = landmark_diagonal(heat[:, landmarks], heat[np.ix_(landmarks, landmarks)], degree[landmarks], degree)
    assert np.abs(np.log(got / heat.diagonal())).mean() < 0.05
    median = np.median(heat.diagonal()[landmarks] / degree[landmarks]) * degree
    assert np.abs(np.log(got / heat.diagonal())).mean() < np.abs(np.log(median / heat.diagonal())).mean() / 2


def test_stitching_adds_up_along_a_line() -> None:
    n, landmarks = 101, np.arange(0, 101, 10)
    truth = np.abs(np.arange(n)[:, None] - landmarks).astype(np.float64)
    near = truth <= 12
    near[52] = False  # a point that no heat reached: two steps from its landmark, over which all paths go
    cells = Voronoi.of(chain(n), landmarks)
    stitching = Stitching.of(truth[landmarks], near[landmarks], cells.links(chain(n)))
    np.testing.assert_allclose(stitching.between, truth[landmarks])
    known = np.where(near, truth, 1e9)
    got = stitching.complete(known, near, cells.owner, cells.hops)
    detour = np.where(np.arange(n) == 52, 4, 0)[:, None] * (landmarks > 52)
    np.testing.assert_allclose(got, truth + detour)


def test_new_points_weigh_their_neighbours(points: np.ndarray) -> None:
    search = NeighborSearch(points)
    weights = out_of_sample_transitions(search, points[:5] + 1e-3, 4)
    np.testing.assert_allclose(np.asarray(weights.sum(axis=1)).ravel(), 1)
    assert (weights.toarray().argmax(axis=1) == np.arange(5)).all()
    alone = out_of_sample_transitions(search, points[2:3] + 1e-3, 4)
    np.testing.assert_array_equal(alone.toarray()[0], weights.toarray()[2])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), "square matrix"),
        (np.array([[0.0, -1.0], [-1.0, 0.0]]), "non-negative"),
        (np.array([[0.0, 1.0], [0.5, 0.0]]), "symmetric"),
        (np.array([[0.0, np.nan], [np.nan, 0.0]]), "non-negative"),
    ],
)
def test_what_is_no_affinity(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clean_affinity(matrix)


@pytest.mark.parametrize("n", [2, 3, 6, 7, 130])
def test_every_pair_is_visited_once_in_an_epoch(n: int) -> None:
    """A round has n / 2 pairs and there are n - 1 rounds: that each pair is visited means that it is visited once."""
    start = np.random.default_rng(0).random((n, 2))
    true = squareform(pdist(start))
    pairs = list(itertools.combinations(range(n), 2))
    for i, j in pairs if n < 10 else pairs[:: len(pairs) // 20]:
        distances = true.copy()
        distances[i, j] = distances[j, i] = true[i, j] + 0.1  # the only pair that has a reason to move
        moved = mds.sgd_mds(distances, start, epochs=1, rng=np.random.default_rng(1))
        assert np.abs(moved - start).max() > 1e-6  # the others pull the pair back
    np.testing.assert_allclose(mds.sgd_mds(true, start, rng=np.random.default_rng(1)), start, atol=1e-9)


def test_rounds_of_a_tournament_are_its_pairs_one_after_the_other() -> None:
    """One step of one pair is Zheng's: both ends move by mu (length - distance) / 2 along their difference."""
    start, distances = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 2.0], [2.0, 0.0]])
    weights = np.full((2, 2), 0.5)
    for epochs, shares in ((1, [1.0]), (2, [1.0, 0.01])):  # eta falls from 1 / w to 0.01 / w
        ends = [row.copy() for row in start]
        for mu in shares:
            between = ends[1] - ends[0]
            length = np.linalg.norm(between)
            move = mu * (length - 2.0) / 2 * between / length
            ends = [ends[0] + move, ends[1] - move]
        moved = mds.sgd_mds(distances, start, weights=weights, epochs=epochs, rng=np.random.default_rng(0))
        np.testing.assert_allclose(moved, ends, rtol=1e-12)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_stochastic_scaling_is_the_same_for_a_seed_in_any_dimension(dimensions: int) -> None:
    points = np.random.default_rng(2).random((41, dimensions))
    distances = squareform(pdist(points))
    start = points + 0.1 * np.random.default_rng(3).random(points.shape)
    one, other = (mds.sgd_mds(distances, start, rng=np.random.default_rng(5)) for _ in range(2))
    assert one.shape == points.shape
    assert np.array_equal(one, other)
    assert mds.stress(distances, one, rescale=False) < 0.5 * mds.stress(distances, start, rescale=False)
