"""System `heat-geodesic-embedding`: same graphs, kernels, distances and scores as the official code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import expm_multiply
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import spearmanr

from diffrep.eval.manifold import cluster_scores, geodesic_scores, interpolation_scores
from diffrep.eval.toy_manifolds import ToyManifold, random_tree, swiss_roll
from diffrep.manifold import mds, official
from diffrep.manifold.graphs import (
    LaplacianKind,
    alpha_decay_graph,
    laplacian,
    largest_eigenvalue,
    out_of_sample_transitions,
    shortest_path_distances,
)
from diffrep.manifold.heat import chebyshev_coefficients, chebyshev_heat, chebyshev_order, knee, spectral_heat
from diffrep.manifold.neighbors import NeighborSearch
from diffrep.manifold.official import HeatGeoOptions

from .cases import cases_of, check_case, watched

Array = NDArray[Any]
Params = Mapping[str, Any]


def tensors(folder: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and expected values, in float64 where they are floating point."""
    files = (folder / "inputs.safetensors", folder / "expected.safetensors")
    given, expected = (
        {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in load_file(file).items()}
        if file.exists()
        else {}
        for file in files
    )
    return given, watched(expected)


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


def options_of(params: Params) -> HeatGeoOptions:
    """Official options; `HeatFilter` calls its kernel's option `method`. What it does not know, it refuses."""
    names = {"method": "filter_method"}
    return HeatGeoOptions.of(**{names.get(name, name): value for name, value in params.items()})


def consumed(setting: Params, *names: str) -> None:
    """Every field of a setting is read by its check."""
    assert not set(setting) - set(names), f"fields that no check reads: {sorted(set(setting) - set(names))}"


def of_condensed(official: Array, distances: Array, weights: Array | None) -> float:
    """`mds.stress` of an embedding of which the distances are known, (n (n - 1) / 2,)."""
    upper = np.triu_indices(len(distances), 1)
    d, w = distances[upper], np.ones(len(official)) if weights is None else weights[upper]
    scale = (w * d * official).sum() / (w * official**2).sum()
    return float(np.sqrt((w * (d - scale * official) ** 2).sum() / (w * d**2).sum()))


def check_graph(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    for name, setting in case["settings"].items():
        consumed(setting, "call", "params", "lmax", "connected_components", "nnz")
        graph = options_of(setting["params"]).graph(given["X"])
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
        assert abs(graph.nnz - setting["nnz"]) <= 2 * int(at_the_cut.sum())


def check_chebyshev(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    settings, phi, atol = case["settings"], case["phi"], tolerance(case, "atol")
    consumed(settings, "taus", "orders", "lap_type", "order_from_bound", "bound_signal", "exact_maxabs_error")
    assert (settings["bound_signal"], settings["lap_type"] in get_args(LaplacianKind)) == ("abs(B)+0.1", True)
    if settings["lap_type"] == "normalized":  # L is an input; its kind shows on a normalised one
        assert phi <= 1 + 1e-6
    lap, block = sp.csr_matrix(given["L"]), given["B"]
    near(largest_eigenvalue(lap) / 2, phi, rtol=1e-6, what="phi")
    for t in settings["taus"]:
        for order in settings["orders"]:
            name = f"Y.tau{t}.K{order}"
            got = chebyshev_heat(lap, block, t, order=order)
            near(got, expected[name], atol=atol, what=name)
            error = np.abs(got - expm_multiply(-t * lap, block)).max()
            near(error, settings["exact_maxabs_error"][f"tau={t},K={order}"], rtol=0.01, atol=1e-5, what=name)
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
        consumed(setting, "params", "negative_entries", "max_abs_error_vs_exact", "min", "lmax_used", "note")
        options = options_of(setting["params"])
        lap, t = options.laplacian(given["X"]), float(options.tau)
        got = options.kernel(lap, t, lmax=setting.get("lmax_used"))
        rtol = tolerance(case, "pygsp: rtol" if options.filter_method == "pygsp" else r"\|H - expected\| <=")
        near(got, symmetric(expected[f"{name}.triu"]), rtol=rtol, atol=1e-12, what=name)
        error = float(np.abs(got - spectral_heat(lap, t)).max())
        near(error, setting["max_abs_error_vs_exact"], rtol=0.05, atol=1e-6, what=f"{name}: distance from exp(-tL)")
        near(got.min(), setting["min"], rtol=0.05, atol=1e-10, what=f"{name}: smallest entry")
        surely, perhaps = (int((got < cut).sum()) for cut in (-1e-12, 1e-12))  # between them lies rounding
        assert surely <= setting["negative_entries"] <= perhaps, f"{name}: negative heat"


def check_distance(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    atol, rtol, share = tolerance(case, "atol"), tolerance(case, "rtol"), tolerance(case, "at least") / 100
    for name, setting in case["settings"].items():
        params, options = setting["params"], options_of(setting["params"])
        if f"{name}.triu" in expected:  # a kernel that the settings above it share
            consumed(setting, "params", "below_1e_13")
            heat = np.maximum(options.kernel(options.laplacian(given["X"]), float(options.tau)), 0)
            near((heat < 1e-13).mean(), setting["below_1e_13"], atol=0.01, what=f"{name}: share of far pairs")
            near(heat, symmetric(expected[f"{name}.triu"]), rtol=1e-6, atol=1e-12, what=name)
            continue
        consumed(setting, "params", "asymmetry", "diag_mean", "max", "selected_tau")
        got, heat = options.distances(given["X"])
        near(got.max(), setting["max"], rtol=2e-2, what=f"{name}: largest distance")
        near(got.diagonal().mean(), setting["diag_mean"], rtol=1e-2, atol=1e-2, what=f"{name}: diagonal")
        assert np.abs(got - got.T).max() <= setting["asymmetry"] + 1e-6 * np.abs(got).max()
        if setting.get("selected_tau") is not None:
            near(options.times(options.laplacian(given["X"])), [setting["selected_tau"]], rtol=1e-9, what=name)
        want = symmetric(expected[f"{name}.D.triu"])
        off = np.abs(got - want) > atol + rtol * np.abs(want)
        assert 1 - off.mean() >= share, f"{name}: {100 * off.mean():.2f} % of the pairs differ"
        flips = 2 if "truncation_type" in params else 0
        assert (off & (heat > 1e-12)).sum() <= flips, f"{name}: a pair with heat above 1e-12 differs"
        weights = options.weights(got, heat)
        assert (weights is None) == (f"{name}.w.pdist" not in expected)
        if weights is not None:
            upper = np.triu_indices(len(weights), 1)
            near(weights[upper], expected[f"{name}.w.pdist"], rtol=rtol, atol=1e-7, what=f"{name}: weights")


def check_auto_tau(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    for name, setting in case["settings"].items():
        consumed(setting, "params", "tau_max", "n_tau", "selected_tau")
        options = options_of(setting["params"])
        grid, entropy = options.entropies(options.laplacian(given["X." + name.split(".")[0]]))
        assert (len(grid), grid[-1]) == (setting["n_tau"], setting["tau_max"])
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


EMBEDDING_FIELDS = (
    "params", "stress", "frobenius_norm_of_centred_embedding", "stress_over_5_mds_seeds", "stress_unweighted",
    "stress_classic_init", "stress_smacof_unweighted", "selected_tau",
)  # fmt: skip


def check_embedding(folder: Path, case: Params) -> None:
    """Stress of our scaling and its agreement with the official embedding.

    The stress may have many minima of one height, and then the official embedding is one draw among them: with
    distances changed by 1e-14 the official code agrees with itself to 0.95 only, and ours finds another one for each
    number of BLAS threads. Where no run comes to the official one, that one must therefore be a minimum for our code
    too, and no lower than ours.
    """
    given, expected = tensors(folder)
    factor, agreement = tolerance(case, "official stress x"), tolerance(case, "emb.pdist >=")
    for name, setting in case["settings"].items():
        consumed(setting, *EMBEDDING_FIELDS)
        options = options_of(setting["params"])
        distances, heat = options.distances(given["X"])
        near(distances, symmetric(expected[f"{name}.D.triu"]), rtol=1e-4, atol=1e-3, what=f"{name}: distances")
        if setting["selected_tau"] is not None:
            near(options.times(options.laplacian(given["X"])), [setting["selected_tau"]], rtol=1e-9, what=name)
        start = mds.squared_axes_start(distances, options.emb_dim)
        rtol = tolerance(case, "classic.pdist rtol")
        near(pdist(start), expected[f"{name}.classic.pdist"], rtol=rtol, what="start")
        weights = options.weights(distances, heat)
        if weights is not None:
            official_weights = squareform(expected[f"{name}.w.pdist"])
            np.fill_diagonal(official_weights, weights.diagonal())
            near(weights, official_weights, rtol=1e-4, atol=1e-6, what=f"{name}: weights")
        near(mds.stress(distances, start, weights=weights), setting["stress_classic_init"], rtol=1e-2, what="start")
        official = expected[f"{name}.emb.pdist"]
        size = np.sqrt((official**2).sum() / len(distances))
        near(size, setting["frobenius_norm_of_centred_embedding"], rtol=1e-4, what=f"{name}: size")
        near(of_condensed(official, distances, weights), setting["stress"], rtol=1e-3, what=f"{name}: stress")
        plain = of_condensed(official, distances, None)
        near(plain, setting["stress_unweighted"], rtol=1e-3, what=f"{name}: stress")
        runs = [options.embedding(distances, weights, seed=seed) for seed in range(3)]
        stresses = sorted(mds.stress(distances, run, weights=weights) for run in runs)
        assert stresses[0] <= factor * setting["stress"], f"{name}: stress {stresses}, official {setting['stress']:.4f}"
        assert stresses[1] <= factor * max(setting["stress"], *setting["stress_over_5_mds_seeds"])
        majorised = mds.smacof(distances, start, max_iter=3000)
        got = mds.stress(distances, majorised)
        assert got <= factor * setting["stress_smacof_unweighted"], f"{name}: SMACOF's stress {got:.4f}"
        if weights is not None:
            continue
        alike = max(spearmanr(pdist(run), official)[0] for run in [*runs, majorised])
        if alike < agreement:
            theirs = mds.best_scale(distances, mds.classical_mds(squareform(official), options.emb_dim))
            stayed = mds.smacof(distances, theirs, max_iter=3000)
            alike = spearmanr(pdist(stayed), official)[0]
            ours = min(mds.stress(distances, run) for run in [*runs, majorised])
            assert ours <= factor * mds.stress(distances, stayed), f"{name}: the official minimum is lower"
        assert alike >= agreement, f"{name}: Spearman {alike:.3f} with the official embedding"


def check_phate(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    points, new = given["X"], given["X_new"]
    search = NeighborSearch(points, backend="sklearn")
    operator_atol, entropy_rtol = tolerance(case, "atol"), tolerance(case, "vne rtol")
    for name, setting in case["settings"].items():
        consumed(setting, "params", "optimal_t", "stress", "diff_op_is")
        params = setting["params"]
        # the seed drives the clustering, of which the result is an input here
        consumed(params, "knn", "decay", "t", "gamma", "n_landmark", "random_state")
        assert (params.get("n_landmark") or len(points)) >= len(points) or f"{name}.clusters" in expected
        knn, decay = params.get("knn", 5), params.get("decay", 40)
        to_new = out_of_sample_transitions(search, new, knn, decay=decay).toarray()
        graph = alpha_decay_graph(search, knn, decay=decay, threshold_average=False)
        member = np.arange(len(points))
        if f"{name}.clusters" in expected:
            clusters = expected[f"{name}.clusters"]
            operator, spread = official.cluster_transitions(graph, clusters)
            near(spread, expected[f"{name}.transitions"], atol=operator_atol, what=f"{name}: transitions")
            member = np.unique(clusters, return_inverse=True)[1]
            to_new = to_new @ np.eye(len(operator))[member]
        else:
            operator, spread = official.diffusion_operator(graph), np.identity(len(points))
        stored = setting.get("diff_op_is", f"{name}.diff_op")
        near(operator, expected[stored], atol=operator_atol, what=f"{name}: operator")
        near(to_new, expected[f"{name}.new_transitions"], atol=operator_atol, what=f"{name}: new transitions")
        entropy = official.von_neumann_entropy(operator)
        near(entropy, expected[f"{name}.vne"], rtol=entropy_rtol, what=f"{name}: entropy")
        t, chosen = params.get("t", "auto"), setting["optimal_t"]
        assert (chosen is None) == (t != "auto"), f"{name}: the official code chose {chosen} where t is {t}"
        if t == "auto":
            t = official.two_line_knee(entropy)
            assert t == chosen
        potential = official.phate_potential(operator, t, gamma=params.get("gamma", 1))
        near(
            pdist(potential),
            expected[f"{name}.potential.pdist"],
            rtol=tolerance(case, "potential.pdist rtol"),
            what=f"{name}: potential",
        )
        distances = squareform(pdist(potential))
        # minima of other heights lie beside the best one: as for the embeddings above, one of three draws
        start = mds.squared_axes_start(distances)
        runs = [mds.metric_mds(distances, start, rng=np.random.default_rng(seed)) for seed in range(3)]
        anchors = min(runs, key=lambda run: mds.stress(distances, run))
        got = mds.stress(distances, anchors)
        limit = tolerance(case, "official x") * setting["stress"]
        assert got <= limit, f"{name}: stress {got:.4f}, official {setting['stress']:.4f}"
        # our minimum need not be theirs: what is made of one is compared for their anchors
        stored = expected[f"{name}.landmark_emb.pdist" if f"{name}.clusters" in expected else f"{name}.emb.pdist"]
        near(of_condensed(stored, distances, None), setting["stress"], rtol=1e-2, what=f"{name}: stress")
        theirs = mds.classical_mds(squareform(stored))
        for kind, got in (
            ("emb.pdist", pdist(spread @ theirs)),
            ("new_to_train", cdist(to_new @ theirs, spread @ theirs)),
        ):
            near(got, expected[f"{name}.{kind}"], rtol=1e-3, atol=1e-3 * got.max(), what=f"{name}: {kind}")


def check_baselines(folder: Path, case: Params) -> None:
    given, expected = tensors(folder)
    rtol, atol = tolerance(case, "rtol"), tolerance(case, "atol")
    walks = {"symmetric": "symmetric", "exact": "walk", "affinity": "affinity"}
    for name, setting in case["settings"].items():
        consumed(setting, "params", "kind", "asymmetry", "inf_entries", "nan_entries")
        params, kind = setting["params"], setting["kind"]
        if kind == "sp":
            consumed(params, "knn")
            search = NeighborSearch(given["X"], backend="sklearn")
            got = shortest_path_distances(search, params["knn"])
        elif kind == "dm":
            graph = options_of(params).graph(given["X"])
            got = squareform(pdist(official.diffusion_map(graph, params["tau"])))
        else:
            assert kind == "rw", f"unknown baseline {kind!r}"
            walk = walks[params["filter_method"]]
            graph = options_of({k: v for k, v in params.items() if k != "filter_method"}).graph(given["X"])
            got = official.random_walk_distances(graph, params["tau"], kind=walk)  # type: ignore[arg-type]
        full = expected.get(f"{name}.D")
        want = symmetric(expected[f"{name}.D.triu"]) if full is None else full
        near(got, want, rtol=rtol, atol=atol, what=name)
        assert (np.isinf(got).sum(), np.isnan(got).sum()) == (setting["inf_entries"], setting["nan_entries"])
        asymmetry = np.abs(np.where(np.isinf(got), 0, got) - np.where(np.isinf(got), 0, got).T).max()
        near(asymmetry, setting["asymmetry"], rtol=1e-2, atol=1e-6, what=f"{name}: asymmetry")


def toy_of(kind: str, params: Params) -> ToyManifold:
    common = ("n_points", "manifold_noise", "random_state")
    if kind == "TreePhate":
        consumed(params, *common, "n_dim", "n_branch", "knn_geodesic")
        return random_tree(
            params["n_points"],
            branches=params["n_branch"],
            noise=params["manifold_noise"],
            dim=params["n_dim"],
            seed=params["random_state"],
            n_neighbors=params["knn_geodesic"],
        )
    consumed(params, *common, "width", "rotate", "rotate_dim", "clustered")
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
        consumed(setting, "cls", "params")
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


# How the stored tensors were drawn: no parameters of the method.
DESCRIBING = frozenset(
    ("branches", "centers", "data", "dim", "n", "noise", "phi_is", "random_state", "seed", "std", "stress_definition")
)


@pytest.mark.parametrize(("folder", "case"), cases_of("heat-geodesic-embedding", CHECKS))
def test_case(folder: Path, case: dict[str, Any]) -> None:
    check_case(CHECKS, folder, case, describing=DESCRIBING)
