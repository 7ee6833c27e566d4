"""System `heat-geodesic-embedding`: same graphs, kernels, distances and scores as the official code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from diffrep.eval.manifold import cluster_scores, geodesic_scores, interpolation_scores
from diffrep.eval.toy_manifolds import ToyManifold, random_tree, swiss_roll
from diffrep.manifold import baselines, mds
from diffrep.manifold.distances import (
    heat_geodesic_distances,
    log_ratio_distances,
    mds_weights,
    multiscale_weights,
    triplet_distances,
    truncate_distances,
    truncate_heat,
)
from diffrep.manifold.graphs import (
    alpha_decay_graph,
    laplacian,
    largest_eigenvalue,
    out_of_sample_transitions,
    scaled_neighbor_graph,
)
from diffrep.manifold.heat import (
    chebyshev_coefficients,
    chebyshev_heat,
    chebyshev_order,
    heat_entropy,
    implicit_heat,
    knee,
    spectral_heat,
)
from diffrep.manifold.neighbors import NeighborSearch

from .cases import cases_of, check_case

Array = NDArray[Any]
Params = Mapping[str, Any]
OFFICIAL_FLOOR = 1e-16


def tensors(folder: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and expected values, in float64 where they are floating point."""
    files = (folder / "inputs.safetensors", folder / "expected.safetensors")
    given, expected = (load_file(file) if file.exists() else {} for file in files)
    return tuple(
        {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in t.items()} for t in (given, expected)
    )  # type: ignore[return-value]


def symmetric(upper: Array) -> Array:
    """The (n, n) matrix whose upper triangle, diagonal included, is stored row by row."""
    n = int((np.sqrt(8 * len(upper) + 1) - 1) / 2)
    full = np.zeros((n, n))
    full[np.triu_indices(n)] = upper
    return full + full.T - np.diag(full.diagonal())


def tolerance(case: Params, pattern: str) -> float:
    """The number after `pattern` in the case's tolerance text."""
    found = re.search(pattern + r"[^\d]*?(\d+(?:\.\d+)?(?:e-?\d+)?)", case["tolerance"])
    assert found, f"no {pattern!r} in the tolerance {case['tolerance']!r}"
    return float(found.group(1))


def near(got: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, what: str) -> None:
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=what)


def graph_of(points: Array, params: Params) -> sp.csr_matrix:
    """The graph that the official HeatGeo(**params).fit(points) builds."""
    if params.get("n_pca"):
        pca = PCA(params["n_pca"], svd_solver="randomized", random_state=42).fit(points)
        points = pca.transform(points)
    if params.get("graph_type", "alpha") == "knn":
        return scaled_neighbor_graph(points, params["knn"])
    search = NeighborSearch(points, backend="sklearn")
    return alpha_decay_graph(
        search, params.get("knn", 5), decay=params.get("decay", 40), anisotropy=params.get("anisotropy", 0)
    )


def kernel_of(lap: sp.csr_matrix, t: float, params: Params, *, lmax_used: float | None = None) -> Array:
    """H_t by the official method of that name."""
    identity, order = np.identity(lap.shape[0]), params.get("order", 32)
    method = params.get("method", params.get("filter_method", "mar"))
    if method == "mar":
        return chebyshev_heat(lap, identity, t, order=order)
    if method == "pygsp":  # another time scale: t over an estimate of the largest eigenvalue
        lmax = lmax_used or 1.01 * largest_eigenvalue(lap)
        return chebyshev_heat(lap, identity, t / lmax, order=order, lmax=lmax)
    if method == "euler":
        return implicit_heat(lap, identity, t, steps=order)
    if method == "exact":
        return spectral_heat(lap, t)
    if method == "lowrank":
        return spectral_heat(lap, t, rank=order)
    raise AssertionError(f"unknown heat kernel method {method!r}")


def entropy_curve(points: Array, params: Params) -> tuple[Array, Array]:
    """The grid of times of tau='auto' and the entropies there."""
    lap = laplacian(graph_of(points, params), params.get("lap_type", "normalized"))
    count, longest = params.get("n_tau", 1), params.get("tau_max", 200)
    grid = np.linspace(0.05, 50 if longest == 1 else longest, 10 if count == 1 else count)
    kernels = chebyshev_heat(lap, np.identity(len(points)), grid.tolist(), order=params.get("order", 32))
    return grid, np.array([heat_entropy(np.maximum(kernel, 0)) for kernel in kernels])


def distances_of(points: Array, params: Params) -> tuple[Array, Array]:
    """The official dissimilarity matrix, and the (last) heat kernel behind it."""
    times = [params.get("tau", 10)]
    if times == ["auto"]:
        grid, entropy = entropy_curve(points, params)
        best = knee(grid, entropy)
        assert best is not None
        times = [grid[best]]
    elif params.get("n_tau", 1) > 1:
        times = np.geomspace(params.get("tau_min", 0.1), params.get("tau_max", 200), params["n_tau"]).tolist()
    lap = laplacian(graph_of(points, params), params.get("lap_type", "normalized"))
    power = params.get("scale_factor", 1.0)
    total = np.zeros((len(points), len(points)))
    for t, share in zip(times, multiscale_weights(times), strict=True):
        heat = np.maximum(kernel_of(lap, t, params), 0)
        if params.get("truncation_type") == "heat_truncation":
            heat = truncate_heat(heat, params["truncation_arg"])
        if params.get("log_normalize"):
            step = t / params.get("order", 32) if params.get("filter_method") == "euler" else t
            distances = log_ratio_distances(heat, step, floor=OFFICIAL_FLOOR, scale_power=power)
        else:
            distances = heat_geodesic_distances(
                heat,
                t,
                floor=OFFICIAL_FLOOR,
                volume="arithmetic",
                volume_weight=params.get("harnack_regul", 0),
                scale_power=power,
            )
        total += share * distances
    if params.get("denoising"):
        rho = params.get("denoise_regul", 0.0)
        total = (1 - rho) * total + rho * triplet_distances(total)
    if params.get("truncation_type") == "dist_truncation":
        total = truncate_distances(
            total,
            params["truncation_arg"],
            side=params["treshold_type"],
            rescale=params.get("norm_treshold", True),
        )
    return total, heat


def weights_of(distances: Array, heat: Array, params: Params) -> Array | None:
    kinds = {"heat_kernel": "heat", "inv_dist": "inverse", "gaussian_dist": "gaussian"}
    kind = params.get("mds_weights_type")
    return None if kind is None else mds_weights(kinds[kind], distances, heat, params.get("mds_weights_args") or 1.0)  # type: ignore[arg-type]


def check_graph(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    for name, setting in case["settings"].items():
        graph = graph_of(given["X"], setting["params"])
        rows, columns, values = (expected[f"{name}.{part}"] for part in ("row", "col", "val"))
        want = sp.csr_matrix((values, (rows, columns)), shape=graph.shape).toarray()
        got = sp.triu(graph, 1).toarray()
        only_one = (got > 0) != (want > 0)
        at_the_cut = np.abs(np.maximum(got, want) - 1e-4) <= tolerance(case, "within")
        assert not (only_one & ~at_the_cut).any(), f"{name}: {only_one.sum()} entries in one graph only"
        both = (got > 0) & (want > 0)
        near(got[both], want[both], rtol=tolerance(case, "values rtol"), what=f"{name}: weights")
        for kind, lmax in setting["lmax"].items():
            found = largest_eigenvalue(laplacian(graph, kind))
            near(found, lmax, rtol=tolerance(case, "lmax rtol"), what=f"{name}: lmax, {kind}")
        assert connected_components(graph, directed=False)[0] == setting["connected_components"]


def check_chebyshev(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    settings, phi, atol = case["settings"], case["phi"], tolerance(case, "atol")
    lap, block = sp.csr_matrix(given["L"]), given["B"]
    near(largest_eigenvalue(lap) / 2, phi, rtol=1e-6, what="phi")
    for t in settings["taus"]:
        for order in settings["orders"]:
            name = f"Y.tau{t}.K{order}"
            near(chebyshev_heat(lap, block, t, order=order), expected[name], atol=atol, what=name)
    several = chebyshev_heat(lap, block, settings["taus"], order=settings["orders"][-1])
    near(several, expected["Y.list"], atol=atol, what="several times")
    coefficients = chebyshev_coefficients(settings["taus"][0], phi, settings["orders"][0])
    near(coefficients, expected["coeff"], atol=atol, what="coefficients")
    for text, order in settings["order_from_bound"].items():
        t, error = (float(part.split("=")[1]) for part in text.split(","))
        assert chebyshev_order(t, phi, np.abs(block) + 0.1, error) == order, text


def check_heat_kernel(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    for name, setting in case["settings"].items():
        params = setting["params"]
        lap = laplacian(graph_of(given["X"], params), params["lap_type"])
        got = kernel_of(lap, params["tau"], params, lmax_used=setting.get("lmax_used"))
        rtol = tolerance(case, "pygsp: rtol" if params["method"] == "pygsp" else r"\|H - expected\| <=")
        near(got, symmetric(expected[f"{name}.triu"]), rtol=rtol, atol=1e-12, what=name)


def check_distance(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    atol, rtol, share = tolerance(case, "atol"), tolerance(case, "rtol"), tolerance(case, "at least") / 100
    for name, setting in case["settings"].items():
        params = setting["params"]
        if f"{name}.triu" in expected:  # a kernel that the settings above it share
            lap = laplacian(graph_of(given["X"], params), params["lap_type"])
            heat = np.maximum(kernel_of(lap, params["tau"], params), 0)
            near(heat, symmetric(expected[f"{name}.triu"]), rtol=1e-6, atol=1e-12, what=name)
            continue
        got, heat = distances_of(given["X"], params)
        want = symmetric(expected[f"{name}.D.triu"])
        off = np.abs(got - want) > atol + rtol * np.abs(want)
        assert 1 - off.mean() >= share, f"{name}: {100 * off.mean():.2f} % of the pairs differ"
        flips = 2 if "truncation_type" in params else 0
        assert (off & (heat > 1e-12)).sum() <= flips, f"{name}: a pair with heat above 1e-12 differs"
        weights = weights_of(got, heat, params)
        assert (weights is None) == (f"{name}.w.pdist" not in expected)
        if weights is not None:
            upper = np.triu_indices(len(weights), 1)
            near(weights[upper], expected[f"{name}.w.pdist"], rtol=rtol, atol=1e-7, what=f"{name}: weights")


def check_auto_tau(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    for name, setting in case["settings"].items():
        grid, entropy = entropy_curve(given["X." + name.split(".")[0]], setting["params"])
        near(
            entropy,
            expected[f"{name}.entropy"],
            rtol=tolerance(case, "entropy rtol"),
            what=f"{name}: entropy",
        )
        best = knee(grid, entropy)
        assert best is not None, name
        near(
            grid[best],
            setting["selected_tau"],
            atol=tolerance(case, "exact to"),
            what=f"{name}: selected time",
        )


def check_embedding(folder: Path, case: Params) -> None:
    """Stress of our MDS and its agreement with the official embedding.

    Where the stress has many minima of one height, the official embedding is one draw: the official code with
    distances changed by 1e-14 agrees with itself to 0.95 only. A setting whose two runs with different
    seeds do not agree among themselves to the wanted degree is therefore run once more from the official
    embedding, which has to be a minimum for our code too.
    """
    given, expected = tensors(folder)
    factor, agreement = tolerance(case, "official stress x"), tolerance(case, "emb.pdist >=")
    for name, setting in case["settings"].items():
        params = setting["params"]
        components = params.get("emb_dim", 2)
        distances, heat = distances_of(given["X"], params)
        near(distances, symmetric(expected[f"{name}.D.triu"]), rtol=1e-4, atol=1e-3, what=f"{name}: distances")
        start = mds.squared_axes_start(distances, components)
        near(
            pdist(start),
            expected[f"{name}.classic.pdist"],
            rtol=tolerance(case, "classic.pdist rtol"),
            what="start",
        )
        weights = weights_of(distances, heat, params)
        official = expected[f"{name}.emb.pdist"]

        def run(seed: int, start: Array) -> Array:
            if components > 2:  # noqa: B023  # called within the loop only
                return mds.smacof(distances, start, max_iter=3000)  # noqa: B023
            rng = np.random.default_rng(seed)
            return mds.metric_mds(distances, start, weights=weights, rng=rng)  # noqa: B023

        runs = [run(seed, start) for seed in (0, 1)]
        for embedding in runs:
            got = mds.stress(distances, embedding, weights=weights if components == 2 else None)
            assert got <= factor * setting["stress"], f"{name}: stress {got:.4f}, official {setting['stress']:.4f}"
        if weights is not None:
            continue
        got = spearmanr(pdist(runs[0]), official)[0]
        if got < agreement and spearmanr(pdist(runs[0]), pdist(runs[1]))[0] < agreement:
            theirs = mds.best_scale(distances, mds.classical_mds(squareform(official), components))
            got = spearmanr(pdist(mds.smacof(distances, theirs, max_iter=3000)), official)[0]
        assert got >= agreement, f"{name}: Spearman {got:.3f} with the official embedding"


def check_phate(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    points, new = given["X"], given["X_new"]
    search = NeighborSearch(points, backend="sklearn")
    operator_atol, entropy_rtol = tolerance(case, "atol"), tolerance(case, "vne rtol")
    for name, setting in case["settings"].items():
        params = setting["params"]
        knn, decay = params.get("knn", 5), params.get("decay", 40)
        to_new = out_of_sample_transitions(search, new, knn, decay=decay).toarray()
        graph = alpha_decay_graph(search, knn, decay=decay, threshold_average=False)
        member = np.arange(len(points))
        if f"{name}.clusters" in expected:
            clusters = expected[f"{name}.clusters"]
            operator, spread = baselines.cluster_transitions(graph, clusters)
            near(spread, expected[f"{name}.transitions"], atol=operator_atol, what=f"{name}: transitions")
            member = np.unique(clusters, return_inverse=True)[1]
            to_new = to_new @ np.eye(len(operator))[member]
        else:
            operator, spread = baselines.diffusion_operator(graph), np.identity(len(points))
        stored = setting.get("diff_op_is", f"{name}.diff_op")
        near(operator, expected[stored], atol=operator_atol, what=f"{name}: operator")
        near(to_new, expected[f"{name}.new_transitions"], atol=operator_atol, what=f"{name}: new transitions")
        entropy = baselines.von_neumann_entropy(operator)
        near(entropy, expected[f"{name}.vne"], rtol=entropy_rtol, what=f"{name}: entropy")
        t = params.get("t", "auto")
        if t == "auto":
            t = baselines.two_line_knee(entropy)
            assert t == setting["optimal_t"]
        potential = baselines.phate_potential(operator, t, gamma=params.get("gamma", 1))
        near(
            pdist(potential),
            expected[f"{name}.potential.pdist"],
            rtol=tolerance(case, "potential.pdist rtol"),
            what=f"{name}: potential",
        )
        distances = squareform(pdist(potential))
        anchors = mds.metric_mds(distances, mds.squared_axes_start(distances), rng=np.random.default_rng(0))
        got = mds.stress(distances, anchors)
        limit = tolerance(case, "official x") * setting["stress"]
        assert got <= limit, f"{name}: stress {got:.4f}, official {setting['stress']:.4f}"
        # where our minimum is theirs, new points lie alike as well
        ours, theirs = pdist(spread @ anchors), expected[f"{name}.emb.pdist"]
        agreement = spearmanr(ours, theirs)[0]
        placed = spearmanr(cdist(to_new @ anchors, spread @ anchors).ravel(), expected[f"{name}.new_to_train"].ravel())[
            0
        ]
        assert placed >= agreement - 0.05, f"{name}: new points agree to {placed:.3f}, the others to {agreement:.3f}"


def check_baselines(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    rtol, atol = tolerance(case, "rtol"), tolerance(case, "atol")
    walks = {"symmetric": "symmetric", "exact": "walk", "affinity": "affinity"}
    for name, setting in case["settings"].items():
        params, kind = setting["params"], setting["kind"]
        if kind == "sp":
            search = NeighborSearch(given["X"], backend="sklearn")
            got = baselines.shortest_path_distances(search, params["knn"])
        elif kind == "dm":
            graph = graph_of(given["X"], params)
            got = baselines.row_distances(baselines.diffusion_map(graph, params["tau"]))
        else:
            assert kind == "rw", f"unknown baseline {kind!r}"
            walk = walks[params["filter_method"]]
            graph = graph_of(given["X"], params)
            got = baselines.random_walk_distances(graph, params["tau"], kind=walk)  # type: ignore[arg-type]
        full = expected.get(f"{name}.D")
        want = symmetric(expected[f"{name}.D.triu"]) if full is None else full
        near(got, want, rtol=rtol, atol=atol, what=name)


def toy_of(kind: str, params: Params) -> ToyManifold:
    if kind == "TreePhate":
        return random_tree(
            params["n_points"],
            branches=params["n_branch"],
            noise=params["manifold_noise"],
            dim=params["n_dim"],
            seed=params["random_state"],
            n_neighbors=params["knn_geodesic"],
        )
    return swiss_roll(
        params["n_points"],
        noise=params["manifold_noise"],
        dim=params["rotate_dim"] if params.get("rotate") else 3,
        width=params["width"],
        seed=params["random_state"],
        clustered=params.get("clustered", False),
        chart={"SwissRoll": "angle", "SwissRollStretch": "arc-length"}[kind],  # type: ignore[arg-type]
    )


def check_toy_data(folder: Path, case: Params) -> None:
    _, expected = tensors(folder)
    for name, setting in case["settings"].items():
        toy = toy_of(setting["cls"], setting["params"])
        rtol = tolerance(case, "X: rtol")
        scale = float(np.abs(toy.points).max())  # single coordinates close to zero are differences of large ones
        near(toy.points, expected[f"{name}.X"], rtol=rtol, atol=rtol * scale, what=f"{name}: points")
        near(toy.labels, expected[f"{name}.labels"], what=f"{name}: labels")
        if f"{name}.clean" in expected:
            near(
                toy.clean,
                expected[f"{name}.clean"],
                rtol=rtol,
                atol=rtol * scale,
                what=f"{name}: clean points",
            )
        truth = symmetric(expected[f"{name}.geodesic.triu"])
        near(toy.geodesic(), truth, rtol=tolerance(case, "geodesic rtol"), atol=1e-5, what=f"{name}: geodesics")


def check_metrics(folder: Path, case: Params) -> None:
    given, _ = tensors(folder)
    wanted = case["settings"]
    ks = [int(name[2:]) for name in wanted["evaluate"] if name.startswith("P@")]
    found = {
        "evaluate": geodesic_scores(symmetric(given["pred.triu"]), symmetric(given["true.triu"]), ks),
        "eval_interpolation": interpolation_scores(given["cloud_pred"], given["cloud_true"]),
        "eval_k_means": cluster_scores(given["km_points"], given["km_labels"]),
    }
    limits = {"evaluate": "evaluate", "eval_interpolation": "interpolation", "eval_k_means": "k-means"}
    for group, scores in wanted.items():
        for name, value in scores.items():
            if name != "note":
                near(found[group][name], value, atol=tolerance(case, limits[group]), what=f"{group}: {name}")


CHECKS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "graph": check_graph,
    "chebyshev": check_chebyshev,
    "heat_kernel": check_heat_kernel,
    "distance": check_distance,
    "auto_tau": check_auto_tau,
    "embedding": check_embedding,
    "phate": check_phate,
    "baselines": check_baselines,
    "toy_data": check_toy_data,
    "metrics": check_metrics,
}


# How the stored tensors were drawn, and figures of what came out: no parameters of the method.
DESCRIBING = frozenset(
    (
        "asymmetry",
        "below_1e_13",
        "bound_signal",
        "branches",
        "centers",
        "data",
        "diag_mean",
        "dim",
        "exact_maxabs_error",
        "frobenius_norm_of_centred_embedding",
        "inf_entries",
        "lap_type",
        "max",
        "max_abs_error_vs_exact",
        "min",
        "n",
        "n_landmark",
        "n_tau",
        "nan_entries",
        "negative_entries",
        "nnz",
        "noise",
        "optimal_t",
        "phi_is",
        "random_state",
        "seed",
        "selected_tau",
        "std",
        "stress_classic_init",
        "stress_definition",
        "stress_over_5_mds_seeds",
        "stress_smacof_unweighted",
        "stress_unweighted",
        "tau",
        "tau_max",
    )
)


@pytest.mark.parametrize(("folder", "case"), cases_of("heat-geodesic-embedding", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
