"""Checkers for the kinds of system `features` that are whole evaluation protocols."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffrep.backbones import AggregationNetwork, Grid
from diffrep.eval.correspondence import predict_posed
from diffrep.eval.datasets.pair_sets import read_pf_pascal, read_spair
from diffrep.eval.datasets.pairs import SUBSETS, AnnotatedPair, KeypointTable, read_tss, table_of
from diffrep.eval.flow import count_flow, mean, mean_pck, nearest_flow
from diffrep.eval.protocols import PROTOCOLS, SQUARE, CellSearch, PairCount, Pck, Protocol
from diffrep.features import Descriptors, FeatureMaps
from diffrep.fusion import GEOAWARE_ZERO_SHOT, Fusion, Part, aggregate, fuse, joint_pca
from diffrep.images import Placement
from diffrep.matching import MatchConfig, match_points
from diffrep.settings import Metric

from .cases import assert_within, number_in, tensors_of

GEOAWARE_TAPS = ("s3", "s4", "s5", "dino")  # the order in which GeoAware's network joins them
SD_PARTS = ("s5", "s4", "s3")  # coarse to fine, the order in which sd-dino reduces them
EPSILON = 1e-5  # of percentages: official ones may be float32, and lie on the edge between two printed values
TIE = 1e-6  # two cosines that differ by less: either pixel is right
DISTANCES: dict[str, Metric] = {"cos": "cosine", "l2": "euclidean", "l1": "manhattan"}  # sd-dino's names


def _dataset(folder: Path, case: Mapping[str, Any]) -> Path:
    return folder / str(case["dataset"]).split("/")[0]


def _key(path: str) -> str:
    """'JPEGImages/cat/1.jpg' -> 'cat/1', as the cases name their maps."""
    return path.removeprefix("JPEGImages/").rpartition(".")[0]


def assert_same_or_tied(
    source: Descriptors, target: Descriptors, points: Tensor, found: Tensor, official: Tensor, *, what: str
) -> None:
    """That two answers for each point are one pixel, or two whose cosines with the query are equal to rounding."""
    for point, ours, theirs in zip(points, found, official, strict=True):
        if torch.equal(ours, theirs):
            continue
        query, *answers = (
            torch.nn.functional.normalize(upsampled(descriptors)[:, int(y), int(x)], dim=0)
            for descriptors, (x, y) in ((source, point), (target, ours), (target, theirs))
        )
        gap = abs(float(query @ answers[0] - query @ answers[1]))
        assert gap < TIE, f"{what}: {ours.tolist()} instead of {theirs.tolist()}, cosines {gap:.1e} apart"


def upsampled(descriptors: Descriptors) -> Tensor:
    """(C, H, W) float64: a map at the size of its image, as the official code compares them."""
    vectors = descriptors.vectors().movedim(-1, 0)[None].double()
    return torch.nn.functional.interpolate(vectors, descriptors.placement.image_size, mode="bilinear")[0]


def check_pck_dift_spair(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    printed = case["results_percent_printed_with_2_decimals"]
    pairs = read_spair(_dataset(folder, case))
    protocol = PROTOCOLS["spair-dift"]
    counts = []
    for pair in pairs.pairs:
        source, target = (
            Descriptors.from_vectors(given[_key(image.path)].movedim(0, -1), image.size)
            for image in (pair.source, pair.target)
        )
        found = match_points(source, target, pair.source.points(pair.ids), MatchConfig(mode="pixel")).points
        official = expected[f"{pair.name}.pred_xy"].float()
        assert_same_or_tied(source, target, pair.source.points(pair.ids), found, official, what=pair.name)
        counts.append(protocol.count(pair, official))
    assert len(counts) == len(expected)
    pck = Pck(protocol.alphas, tuple(counts))
    tolerance = float(case["tolerance"]["percent"])
    checked = 0
    for name, percent in printed.items():
        group, _, aggregate = name.partition(" per ")
        part = pck if group == "All" else pck.of(group)
        value = part.value("per image" if aggregate == "image" else "per point")[0]
        assert 100 * value == pytest.approx(percent, abs=tolerance + EPSILON), name
        checked += 1
    assert checked == 2 * (len(pck.categories) + 1)


def official_of_equals(
    source: Descriptors, target: Descriptors, points: Tensor, found: Tensor, official: Tensor
) -> Tensor:
    """The pixels found, with the official one where both fit equally well: where the two cosines differ by less than
    1e-6, either is right."""
    queries = normalize(source.at(points).joined(), dim=-1)
    ours, theirs = ((queries * normalize(target.at(p.float()).joined(), dim=-1)).sum(-1) for p in (found, official))
    return torch.where(((ours - theirs).abs() < 1e-6)[:, None], official.to(found), found)


def _square_maps(given: Mapping[str, Tensor], key: str, side: int) -> FeatureMaps:
    """The case's maps of one image; each covers the whole padded square."""
    maps = {part: given[f"{key}.{part}"][None] for part in (*SD_PARTS, "dino")}
    grids = {part: Grid.covering((side, side), (m.shape[-2], m.shape[-1])) for part, m in maps.items()}
    return FeatureMaps(maps, (Placement.identity((side, side)),), grids)


def _reduce(pair: Sequence[FeatureMaps], dims: Sequence[int], generator: torch.Generator) -> list[FeatureMaps]:
    """sd-dino's joint PCA; its draws go on from pair to pair, so the generator comes from outside."""
    reduced = [dict(features.maps) for features in pair]
    for part, kept in zip(SD_PARTS, dims, strict=True):
        values = joint_pca([features.maps[part][0] for features in pair], kept, generator=generator)
        for maps, value in zip(reduced, values, strict=True):
            maps[part] = value[None]
    return [replace(features, maps=maps) for features, maps in zip(pair, reduced, strict=True)]


def _sddino_fusion(config: Mapping[str, Any]) -> Fusion:
    w1, w2, w3, w_sd, w_dino = config["weights"]
    unit = config["dist"] != "cos"
    chunks = tuple(zip(config["pca_dims"], (w1, w2, w3), strict=True))
    sd = Part(taps=SD_PARTS, chunk_weights=chunks, normalise=unit, weight=w_sd)
    dino = Part(taps=("dino",), normalise=unit, weight=w_dino)
    fused, only_dino = config["fuse"], config["only_dino"]
    return Fusion(parts=(dino,) if only_dino else (sd, dino) if fused else (sd,), reference="s3")


def _sddino_search(config: Mapping[str, Any]) -> CellSearch:
    return CellSearch(metric=DISTANCES[config["dist"]])


def _check_sddino_category(
    pairs: Sequence[AnnotatedPair],
    given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: Mapping[str, Any],
    protocol: Protocol,
    prefix: str,
    *,
    key_of: Any,
) -> list[PairCount]:
    """Match one category's pairs; at most one point may lie elsewhere than the official code puts it."""
    generator = torch.Generator().manual_seed(config["seed"])
    fusion, search, side = _sddino_fusion(config), _sddino_search(config), protocol.frame
    assert side is not None
    counts, elsewhere = [], 0
    for number, pair in enumerate(pairs):
        pair = replace(pair, ids=tuple(sorted(pair.ids)))
        features = [_square_maps(given, key_of(image.path), side) for image in (pair.source, pair.target)]
        if not config["only_dino"]:
            features = _reduce(features, config["pca_dims"], generator)
        source, target = fuse(features, fusion)
        queries, truth = (protocol.to_frame(image.points(pair.ids), image) for image in (pair.source, pair.target))
        name = f"{prefix}.pair{number}"
        assert_within(queries.flip(-1), expected[f"{name}.src_yx"], atol=1e-3, what=f"{name} source points")
        assert_within(truth.flip(-1), expected[f"{name}.gt_yx"], atol=1e-3, what=f"{name} true points")
        found = search(source, target, queries, side)
        elsewhere += int((found.flip(-1) != expected[f"{name}.pred_yx"]).any(-1).sum())
        counts.append(protocol.count(pair, found))
    assert elsewhere <= 1, f"{prefix}: {elsewhere} points differ"
    return counts


def check_pck_sddino_spair(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    protocols = {box: replace(PROTOCOLS["spair-sd-dino"], threshold="box" if box else "image") for box in (True, False)}
    counted: dict[int, list[PairCount]] = {}
    for result in case["results"]:
        config, category = case["configs"][result["cfg"]], result["category"]
        assert not config["pascal"], "a case of SPair-71k"
        protocol = protocols[config["bbox"]]
        pairs = read_spair(_dataset(folder, case), categories=[category]).pairs
        for pair, noted in zip(pairs, result["pairs"], strict=True):
            assert (pair.source.path, pair.target.path) == (noted["src"], noted["trg"])
            assert protocol.scale(pair) == pytest.approx(noted["threshold_px_at_840"])
        prefix = f"cfg{result['cfg']}.{category}"
        counts = _check_sddino_category(pairs, given, expected, config, protocol, prefix, key_of=_key)
        counted.setdefault(result["cfg"], []).extend(counts)
        pck = Pck(protocol.alphas, tuple(counts))
        assert pck.points == result["n_points"]
        official = [result["pck"][f"{alpha:.2f}"] for alpha in protocol.alphas]
        assert pck.value() == pytest.approx(official, abs=1 / pck.points + 1e-6), prefix
    for number, counts in counted.items():
        config = case["configs"][number]
        pck = Pck(PROTOCOLS["spair-sd-dino"].alphas, tuple(counts))
        slack = max(1 / pck.of(category).points for category in pck.categories) + 1e-6
        assert pck.value("category mean") == pytest.approx(config["average_over_categories"], abs=slack)
        assert pck.value("pair-weighted category") == pytest.approx(config["average_weighted_by_pairs"], abs=slack)
    assert counted.keys() == set(range(len(case["configs"])))


def check_pck_sddino_pascal(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    protocol, config = PROTOCOLS["pf-pascal-sd-dino"], case["config"]
    assert config["pascal"], "a case of PF-PASCAL"
    assert not config["bbox"], "PF-PASCAL has no boxes"
    for result in case["results"]:
        category = result["category"]
        pairs = read_pf_pascal(_dataset(folder, case), categories=[category]).pairs
        assert [[Path(p.source.path).name, Path(p.target.path).name] for p in pairs] == result["pairs"]
        counts = _check_sddino_category(pairs, given, expected, config, protocol, category, key_of=_key)
        pck = Pck(protocol.alphas, tuple(counts))
        official = [result["pck"][f"{alpha:.2f}"] for alpha in protocol.alphas]
        assert pck.value() == pytest.approx(official, abs=1 / pck.points + 1e-6), category
    assert case["results"]


def check_pck_hyperfeatures(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    params = case["params"]
    sizes = {side: params[f"{side}_size_wh"][::-1] for side in ("load", "output", "source", "target")}
    source, target = (
        Descriptors.from_vectors(given[name][0].movedim(0, -1), tuple(sizes["load"])) for name in ("feat1", "feat2")
    )
    cosine = source.rows().joined()
    cosine = torch.nn.functional.normalize(cosine) @ torch.nn.functional.normalize(target.rows().joined()).T
    assert_within(cosine[None], expected["cosine"], atol=1e-4, what="cosine")
    best = cosine.argmax(1)
    columns = sizes["output"][1]
    assert_within(
        torch.stack([best // columns, best % columns], dim=-1)[None],
        expected["nn_points2_yx"],
        atol=0,
        what="nn",
    )

    queries = rounded_points(given["source_points_xy"], sizes["source"], sizes["load"])
    cells = rounded_points(given["source_points_xy"], sizes["source"], sizes["output"])
    index = cells[:, 1] * columns + cells[:, 0]
    assert_within(index, expected["source_index_output"], atol=0, what="source index")
    found = match_points(source, target, queries, MatchConfig(mode="pixel")).points
    official = expected["predicted_yx_load"].flip(-1).float()
    assert_same_or_tied(source, target, queries, found, official, what="predicted")
    found = official
    scale = torch.tensor([sizes["target"][1] / sizes["load"][1], sizes["target"][0] / sizes["load"][0]])
    predicted = found * scale
    within = number_in(case["tolerance"]["points"].partition("rescaled")[2])
    assert_within(predicted.flip(-1), expected["predicted_yx_target"], atol=within, what="rescaled")
    truth = given["target_points_xy"].float()
    distances = torch.linalg.vector_norm(predicted - truth, dim=-1)
    assert_within(distances, expected["distances"], atol=10 * within, what="distances")
    left, top, right, bottom = params["target_bounding_box_ltrb"]
    for name, scale_length in (
        ("image", max(sizes["target"])),
        ("bbox", max(right - left, bottom - top)),
    ):
        hits = distances <= params["pck_threshold"] * scale_length
        assert torch.equal(hits, expected[f"correct_{name}"].bool()), name
        assert float(hits.double().mean()) == pytest.approx(case["pck"][name], abs=1e-9)


def rounded_points(points: Tensor, size: Sequence[int], onto: Sequence[int]) -> Tensor:
    """Hyperfeatures' way to a smaller grid: scale, round half to even, clip; (x, y), sizes (H, W)."""
    scale = np.array([onto[1] / size[1], onto[0] / size[0]])
    rounded = np.round(points.numpy() * scale)
    return torch.from_numpy(np.clip(rounded, 0, np.array([onto[1] - 1, onto[0] - 1]))).float()


def check_flow_sddino_tss(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    root = _dataset(folder, case)
    tss = read_tss(root, subsets=[subset for subset in SUBSETS if (root / subset).is_dir()])
    assert not tss.problems
    tolerance = {key: number_in(text) for key, text in case["tolerance"].items()}
    counts, pooled, pair_of = [], [], {}
    for item, noted in zip(tss.items, case["items"], strict=True):
        assert Path(item.source).parent.name == noted["folder"]
        assert (Path(item.source).name, Path(item.target).name) == (noted["source"], noted["target"])
        assert (Path(item.flow_file).name, item.category) == (noted["flow"], noted["category"])
        assert list(item.padded_size) == noted["padded_hw"]
        assert max(item.source_size) == noted["pck_threshold_base"]
        name = f"item{noted['item']}"
        truth, mask = item.flow(tss.root), item.mask(tss.root)
        assert_within(truth, expected[f"{name}.flow_gt_padded"], atol=0, what=f"{name} true flow")
        assert torch.equal(mask, expected[f"{name}.mask"].bool()), f"{name} mask"

        # the descriptors are numbered, and the case does not say which number is which folder
        official = expected[f"{name}.flow"][0]
        agreeing = {}
        for pair in sorted({key.split(".")[0] for key in given}):
            source, target = (
                Descriptors.from_vectors(given[f"{pair}.{Path(path).stem}.desc"].movedim(0, -1))
                for path in (item.source, item.target)
            )
            flow = nearest_flow(source, target, item.padded_size)
            assert flow.shape == official.shape
            if float(((flow - official).abs() <= tolerance["flow"]).all(0).float().mean()) >= 0.999:
                agreeing[pair] = flow
        assert len(agreeing) == 1, f"{name}: flow agrees with that of {len(agreeing)} pairs"
        ((pair, flow),) = agreeing.items()
        assert pair_of.setdefault(noted["folder"], pair) == pair
        counts.append(count_flow(item, flow, truth, mask))
        pooled.append(torch.linalg.vector_norm(flow - truth, dim=0)[mask])
    assert len(set(pair_of.values())) == len(pair_of)

    results = case["results"]
    for alpha, value in results["pck_curve_per_image"].items():
        assert mean_pck(counts, float(alpha)) == pytest.approx(value, abs=tolerance["pck"]), alpha
    assert mean(one.error for one in counts) == pytest.approx(results["AEPE"], abs=tolerance["AEPE"])
    # the script's "per_dataset" figures pool all pixels and judge them by the last item's threshold
    base = max(tss.items[-1].source_size)
    for key, value in results.items():
        if key.startswith("PCK_"):
            alpha = float(key.removeprefix("PCK_").rpartition("_per_")[0].replace("_", "."))
            official_way = float((torch.cat(pooled) <= alpha * base).double().mean())
            got = official_way if key.endswith("_per_dataset") else mean_pck(counts, alpha)
            assert got == pytest.approx(value, abs=tolerance["pck"]), key


def as_released(table: KeypointTable, used: Iterable[int]) -> KeypointTable:
    """The table as GeoAware-SC's released code has it for the ids that occur in a category's pairs.

    The code keeps the entries of its tables that occur and numbers them one after the other, so that where the
    order of a table is not that of the ids, or skips ids, other keypoints than meant change places or make a group.
    Its published numbers have this slip.
    """
    used = sorted(used)
    order = table.order or tuple(table.names)
    place = {i: number for number, i in enumerate(order)}
    compact = {i: number for number, i in enumerate(table.names)}  # its mirror tables skip ids that have no name
    pairs = {tuple(sorted((i, table.mirror.get(i, i)), key=place.__getitem__)) for i in order}
    entries = [dict.fromkeys(pair) for pair in sorted(pairs, key=lambda pair: place[pair[0]])]
    mirror: dict[int, int] = {}
    for ids in _renumbered([[compact[i] for i in entry] for entry in entries], used):
        mirror |= dict(zip(ids, reversed(ids), strict=True))
    grouped = {i for group in table.groups for i in group}
    alone = [[i] for i in table.names if i not in grouped]
    groups = _renumbered(sorted([*map(sorted, table.groups), *alone]), used)
    return KeypointTable(mirror, tuple(frozenset(ids) for ids in groups if len(ids) > 1), table.names)


def _renumbered(entries: Sequence[Sequence[int]], used: Sequence[int]) -> list[tuple[int, ...]]:
    """The entries whose ids occur, their ids replaced one after the other by those that do."""
    occurring = [[i for i in entry if i in used] for entry in entries]
    numbers = iter(used)
    return [tuple(number for _, number in zip(ids, numbers, strict=False)) for ids in occurring if ids]


def check_pck_geoaware_spair(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    groups = json.loads((folder / "model/config.json").read_text())["num_norm_groups"]
    network = AggregationNetwork.load(folder / "model/aggregation_network.safetensors", groups=groups)
    pixels = float(case["tolerance"]["pred"].removeprefix("soft ").partition(" ")[0])
    for name in (key for key in expected if key.startswith("aggregated.")):
        whole = network(_geoaware_maps(given, name.removeprefix("aggregated.")))
        assert_within(whole[..., ::6, ::6], expected[name], atol=1e-4, what=name)
    for result in case["results"]:
        config, category = case["configs"][result["cfg"]], result["category"]
        name = f"cfg{result['cfg']}.{category}"
        base = PROTOCOLS["spair-geoaware"]
        assert base.search is not None
        window, mutual = config["window"], config["mutual_nn"]
        search = replace(base.search, window=window if config["soft"] else None)
        protocol = replace(base, search=search)
        pairs = read_spair(_dataset(folder, case), categories=[category], keypoints="image").pairs
        used = sorted({i for p in pairs for image in (p.source, p.target) for i in image.keypoints})
        assert used == result["used_points"]
        table = as_released(table_of("spair", category), used)
        counts, shared, elsewhere = [], [], 0
        for number, (pair, paths) in enumerate(zip(pairs, result["pairs"], strict=True)):
            assert [Path(image.path).name for image in (pair.source, pair.target)] == paths
            assert protocol.scale(pair) == pytest.approx(result["thresholds"][number])
            source, target = _key(pair.source.path), _key(pair.target.path)
            described = {
                key: _geoaware_descriptors(given, key, None if config["identity"] else network)
                for key in (source, target, *([f"{source}_flip"] if config["adapt_flip"] else []))
            }
            if config["adapt_flip"]:
                masks = None if mutual else tuple(given[f"{k}.mask"] > 127 for k in (source, target))
                views = (described[key] for key in (source, f"{source}_flip", target))
                found = predict_posed(pair, protocol, *views, table.mirror, masks=masks)
            else:
                queries = protocol.to_frame(pair.source.points(pair.ids), pair.source)
                found = search(described[source], described[target], queries, SQUARE)
            official = expected[f"{name}.pair{number}.pred_xy30"][list(pair.ids)]
            elsewhere += int(((found - official).abs() > (pixels if config["soft"] else 0)).any(-1).sum())
            counts.append(protocol.count(pair, found))
            shared.append(protocol.count_shared(pair, found, table.groups))
        assert elsewhere <= 1, f"{name}: {elsewhere} points differ"
        pck, parts = Pck(protocol.alphas, tuple(counts)), Pck(protocol.alphas, tuple(shared))
        slack = 1 / pck.points + 1e-6
        # the script always prints the average per point, and the one per image unless it is told otherwise
        assert (result["per_image"] is None) == config["per_point"]
        assert config["per_point"] or result["per_image"]["n_pairs"] == len(pck.counted)
        for average, key in (("per point", "per_point"), ("per image", "per_image")):
            if result[key] is not None:
                official = [result[key][f"{alpha:.2f}"] for alpha in protocol.alphas]
                assert pck.value(average) == pytest.approx(official, abs=slack), f"{name} {average}"
        assert result["per_point"]["n_points"] == pck.points
        geo = result["geo"]
        assert parts.points == geo["n"], f"{name}: keypoints that share a part"
        assert parts.points / pck.points == pytest.approx(geo["point_ratio"])
        assert len(parts.counted) / len(pck.counted) == pytest.approx(geo["image_ratio"])
        official = [geo[f"pck_{alpha:.2f}".replace("0.", "0")] for alpha in protocol.alphas]
        assert parts.value() == pytest.approx(official, abs=1 / parts.points + 1e-6), f"{name} shared parts"


def _geoaware_maps(given: Mapping[str, Tensor], key: str) -> list[Tensor]:
    """s3, s4, s5 and DINO, each (1, C, 60, 60), as the aggregation network joins them."""
    return [part.movedim(-1, 0)[None] for part in _geoaware_parts(given, key).parts]


def _geoaware_parts(given: Mapping[str, Tensor], key: str) -> Descriptors:
    fusion = Fusion(parts=tuple(Part(taps=(tap,), normalise=False) for tap in GEOAWARE_TAPS), reference="s3")
    return fuse([_square_maps(given, key, SQUARE)], fusion)[0]


def _geoaware_descriptors(given: Mapping[str, Tensor], key: str, network: AggregationNetwork | None) -> Descriptors:
    if network is None:
        sd = replace(GEOAWARE_ZERO_SHOT.parts[0], taps=SD_PARTS)
        dino = replace(GEOAWARE_ZERO_SHOT.parts[1], taps=("dino",))
        fusion = replace(GEOAWARE_ZERO_SHOT, parts=(sd, dino), reference="s3")
        return fuse([_square_maps(given, key, SQUARE)], fusion)[0]
    return aggregate(_geoaware_parts(given, key), network)
