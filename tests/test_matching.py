from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffrep.features import Descriptors
from diffrep.fusion import Fusion, fuse
from diffrep.images import Sizing
from diffrep.masks import read_mask
from diffrep.matching import (
    MatchConfig,
    check_points,
    masked_distance,
    match_dense,
    match_points,
    mutual_distance,
    mutual_matches,
)
from diffrep.similarity import PixelScorer, Rows, full_precision, nearest, similarities, soft_argmax

from .fields import generator, random_maps, smooth_field


def describe(image_size: tuple[int, int], cells: tuple[int, int], sizing: Sizing, seed: int = 0) -> Descriptors:
    return fuse([random_maps(image_size, cells, sizing, seed=seed)], Fusion.of("a"))[0]


def distinct(image_size: tuple[int, int], cells: tuple[int, int], sizing: Sizing) -> Descriptors:
    """Every cell is orthogonal to every other: between cells the one with the largest share is the most similar.

    Random vectors are a little similar by chance, and near the middle between two cells that decides.
    """
    (frame,) = fuse([random_maps(image_size, cells, sizing)], Fusion.of("a"))
    vectors = torch.eye(cells[0] * cells[1]).unflatten(0, cells)
    return Descriptors((vectors,), (1.0,), frame.placement, frame.grid)


def smooth(
    image_size: tuple[int, int],
    cells: tuple[int, int],
    shift: tuple[float, float] = (0, 0),
    sizing: Sizing | None = None,
    length: float = 30.0,
) -> Descriptors:
    """A smooth field read at the cells of an image; `shift` moves the image over the field, in pixels."""
    maps = random_maps(image_size, cells, sizing or Sizing("native", None, multiple=1))
    vectors = smooth_field(maps.cell_centres("a") + torch.tensor(shift), length=length)
    (frame,) = fuse([maps], Fusion.of("a"))
    return Descriptors((F.normalize(vectors, dim=-1),), (1.0,), frame.placement, frame.grid)


def image_stride(descriptors: Descriptors) -> Tensor:
    return torch.tensor(descriptors.grid.stride) / torch.tensor(descriptors.placement.scale)


SIZINGS = st.sampled_from(
    [
        Sizing("squash", 96),
        Sizing("squash", (90, 61)),
        Sizing("pad", 120),
        Sizing("pad", 77),
        Sizing("fit", 100, multiple=8),
        Sizing("native", None, multiple=16),
    ]
)


@settings(max_examples=60)
@given(
    st.integers(17, 210),
    st.integers(17, 210),
    st.sampled_from([(12, 12), (7, 11), (15, 17)]),
    SIZINGS,
    st.sampled_from(
        [
            ("cell", "bilinear"),
            ("cell", "cell"),
            ("soft", "bilinear"),
            ("soft", "cell"),
            ("pixel", "bilinear"),
        ]
    ),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4),
)
def test_an_image_matches_itself_to_half_a_stride(
    height: int,
    width: int,
    cells: tuple[int, int],
    sizing: Sizing,
    way: tuple[str, str],
    shares: list[tuple[float, float]],
) -> None:
    mode, source = way
    descriptors = distinct((height, width), cells, sizing)
    points = torch.tensor([(x * (width - 1), y * (height - 1)) for x, y in shares])
    config = MatchConfig(mode=mode, source=source)  # type: ignore[arg-type]  # sampled from the literals
    got = match_points(descriptors, descriptors, points, config).points
    slack = 1e-3 + (1 if mode == "pixel" else 0)  # one of the pixels around a fractional point is found
    # the soft maximum is pulled a little further by the cells around
    allowed = image_stride(descriptors) * (0.5 if mode != "soft" else 0.75) + slack
    assert ((got - points).abs() <= allowed).all(), (got, points, allowed)
    assert (got >= 0).all()
    assert (got <= torch.tensor([width - 1.0, height - 1.0])).all()


@pytest.mark.parametrize("mode", ["cell", "pixel", "soft"])
def test_a_known_shift_is_found(mode: str) -> None:
    # 37 px of 8 px cells: between cells, in both axes
    source, target = (
        smooth((120, 160), (15, 20), length=20),
        smooth((120, 160), (15, 20), (37, -21), length=20),
    )
    points = torch.tensor([[80.0, 50.0], [61.0, 40.0], [100.0, 77.0]])
    config = MatchConfig(mode=mode, window=2, temperature=0.05)  # type: ignore[arg-type]
    error = (match_points(source, target, points, config).points - (points - torch.tensor([37.0, -21.0]))).abs()
    assert error.max() <= {"cell": 4.01, "pixel": 2.0, "soft": 2.5}[mode]


def upsampled(descriptors: Descriptors) -> Tensor:
    """(H, W, C): every descriptor interpolated at every pixel, the plain way."""
    height, width = descriptors.placement.image_size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack([columns, rows], dim=-1).flatten(0, 1).float()
    return descriptors.at(points).joined().unflatten(0, (height, width))


@pytest.mark.parametrize("sizing", [Sizing("native", None, multiple=1), Sizing("pad", 64), Sizing("squash", (40, 90))])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
def test_pixel_scores_are_those_of_upsampled_features(sizing: Sizing, metric: str) -> None:
    target = smooth((45, 61), (6, 8), sizing=sizing)
    target = Descriptors(
        (target.parts[0], torch.randn(6, 8, 5, generator=generator(3))),
        (1.0, 0.4),
        target.placement,
        target.grid,
    )
    queries = Rows((torch.randn(3, 96, generator=generator(4)), torch.randn(3, 5, generator=generator(5))), (1.0, 0.4))
    dense, joined = upsampled(target), queries.joined()
    if metric == "cosine":
        expected = torch.einsum("nc,hwc->nhw", F.normalize(joined, dim=1), F.normalize(dense, dim=-1))
    elif metric == "euclidean":
        expected = -(joined[:, None, None] - dense).square().sum(-1)
    else:
        expected = -(joined[:, None, None] - dense).abs().sum(-1)
    scorer = PixelScorer(target, metric)  # type: ignore[arg-type]
    got = torch.cat([maps for _, maps in scorer.chunks(queries)])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    small = torch.cat([maps.clone() for _, maps in scorer.chunks(queries, memory=1)])
    torch.testing.assert_close(small, got, atol=1e-5, rtol=0)


def test_the_best_pixel_is_that_of_upsampled_features_on_smooth_fields() -> None:
    source, target = smooth((75, 100), (12, 12)), smooth((75, 100), (12, 12), (3.3, 1.7))
    points = torch.rand(30, 2, generator=generator()) * torch.tensor([99.0, 74.0])
    matches = match_points(source, target, points, MatchConfig(mode="pixel"))
    scores = F.normalize(source.at(points).joined(), dim=1) @ F.normalize(upsampled(target), dim=-1).flatten(0, 1).T
    best = scores.argmax(1)
    got = (matches.points[:, 1] * 100 + matches.points[:, 0]).long()
    assert (got == best).float().mean() > 0.8  # the others are as good to float rounding, at a repeated border
    torch.testing.assert_close(scores.gather(1, got[:, None]), scores.amax(1, keepdim=True), atol=1e-6, rtol=0)


def test_one_row_or_column_of_cells_is_enough_for_pixels() -> None:
    target = smooth((20, 30), (1, 5))
    expected = torch.einsum("nc,hwc->nhw", target.rows().joined(), F.normalize(upsampled(target), dim=-1))
    ((_, got),) = PixelScorer(target).chunks(target.rows())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_smooth_fields_need_float32() -> None:
    source, target = (
        smooth((480, 480), (40, 40), length=200),
        smooth((480, 480), (40, 40), (6, 6), length=200),
    )
    exact = (source.vectors().double().flatten(0, 1) @ target.vectors().double().flatten(0, 1).T).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = (source.rows().joined() @ target.rows().joined().T).argmax(1)
        got = nearest(source.rows(), target.rows()).indices
    assert (reduced == exact).float().mean() < 0.8
    assert (got == exact).float().mean() > 0.995
    faiss = match_dense(source, target, MatchConfig(backend="faiss", mutual=True))
    product = match_dense(source, target, MatchConfig(backend="torch", mutual=True))
    assert (faiss.points == product.points).all(-1).float().mean() > 0.995
    torch.testing.assert_close(faiss.scores, product.scores, atol=1e-6, rtol=0)
    assert faiss.mutual is not None
    assert product.mutual is not None
    assert (faiss.mutual == product.mutual).float().mean() > 0.99
    assert 0.05 < faiss.mutual.float().mean() < 1


def test_precision_settings_of_the_caller_come_back() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
def test_nearest_is_the_plain_answer_whatever_the_memory(metric: str) -> None:
    draw = generator(1)
    sources, targets = (
        Rows((torch.randn(n, 6, generator=draw), torch.randn(n, 3, generator=draw)), (1, 2)) for n in (70, 50)
    )
    a, b = sources.joined(), targets.joined()
    if metric == "cosine":
        scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    elif metric == "euclidean":
        scores = -torch.cdist(a, b).square()
    else:
        scores = -(a[:, None] - b).abs().sum(-1)
    torch.testing.assert_close(similarities(sources, targets, metric), scores, atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]
    forward, backward = scores.argmax(1), scores.argmax(0)
    for memory in (1, 50 * 4 * 16, 2**24):
        got = nearest(sources, targets, metric, mutual=True, memory=memory)  # type: ignore[arg-type]
        assert torch.equal(got.indices, forward)
        assert got.mutual is not None
        assert torch.equal(got.mutual, backward[forward] == torch.arange(70))
        assert 5 < got.mutual.sum() < 50


def test_of_equals_the_first_counts() -> None:
    vector = torch.ones(1, 4)
    got = nearest(Rows((vector.repeat(3, 1),), (1.0,)), Rows((vector.repeat(5, 1),), (1.0,)), mutual=True)
    assert got.indices.tolist() == [0, 0, 0]
    assert got.mutual is not None
    assert got.mutual.tolist() == [True, False, False]


def test_masks_bar_targets_in_every_mode() -> None:
    descriptors = describe((80, 96), (10, 12), Sizing("native", None, multiple=1))
    points = torch.tensor([[10.0, 10.0], [70.0, 60.0]])
    mask = torch.zeros(40, 48)  # half the image's resolution
    mask[:, 24:] = 1  # the right half
    for mode in ("cell", "pixel", "soft"):
        config = MatchConfig(mode=mode, mutual=True)  # type: ignore[arg-type]
        got = match_points(descriptors, descriptors, points, config, mask=mask)
        assert (got.points[:, 0] >= 47).all(), mode
        assert got.mutual is not None
        assert got.mutual.tolist() == [False, True], mode
        torch.testing.assert_close(got.points[1], points[1], atol=4.1, rtol=0)
    with pytest.raises(ValueError, match="mask leaves no cell of the image"):
        match_points(descriptors, descriptors, points, mask=torch.zeros(80, 96))
    with pytest.raises(ValueError, match="over the whole image"):
        match_points(descriptors, descriptors, points, mask=torch.ones(1, 80, 96))


def test_a_mask_is_read_at_its_own_resolution() -> None:
    mask = torch.tensor([[1, 0], [0, 1]])
    points = torch.tensor([[0.0, 0.0], [49.0, 0.0], [50.0, 0.0], [99.0, 39.0], [0.0, 20.0]])
    assert read_mask(mask, points, (40, 100)).tolist() == [True, True, False, True, False]


def test_padding_is_never_matched() -> None:
    source = describe((60, 30), (12, 12), Sizing("pad", 120), seed=1)
    target = describe((30, 60), (12, 12), Sizing("pad", 120), seed=2)
    for mode in ("cell", "pixel", "soft"):
        dense = match_dense(source, target, MatchConfig(mode=mode, mutual=True))  # type: ignore[arg-type]
        assert dense.valid.sum() == 12 * 6
        found = dense.points[dense.valid]
        assert (found >= 0).all()
        assert (found <= torch.tensor([59.0, 29.0])).all()
        assert dense.points[~dense.valid].isnan().all()
        assert dense.mutual is not None
        assert not dense.mutual[~dense.valid].any()


@pytest.mark.parametrize("mode", ["cell", "pixel", "soft"])
def test_a_dense_field_is_what_single_points_give(mode: str) -> None:
    source, target = (
        describe((50, 70), (8, 9), Sizing("pad", 72), 1),
        describe((64, 64), (8, 8), Sizing("squash", 64), 2),
    )
    config = MatchConfig(mode=mode, source="cell", mutual=True)  # type: ignore[arg-type]
    dense = match_dense(source, target, config)
    centres = dense.sources[dense.valid]
    height, width = source.placement.image_size
    inside = ((centres >= -0.5) & (centres <= torch.tensor([width - 0.5, height - 0.5]))).all(1)
    points = match_points(source, target, centres[inside], config)
    torch.testing.assert_close(dense.points[dense.valid][inside], points.points)
    torch.testing.assert_close(dense.scores[dense.valid][inside], points.scores)
    if mode == "cell":
        assert dense.mutual is not None
        assert points.mutual is not None
        strict = dense.mutual[dense.valid][inside]
        assert 3 < strict.sum() <= points.mutual.sum() < len(strict)
        assert not (strict & ~points.mutual).any()


def test_mutual_matches_lead_both_ways_and_come_best_first() -> None:
    source, target = (
        describe((64, 64), (8, 8), Sizing("squash", 64), 1),
        describe((64, 64), (8, 8), Sizing("squash", 64), 2),
    )
    points, matches = mutual_matches(source, target)
    back, forth = mutual_matches(target, source)
    pairs = {(*a, *b) for a, b in zip(points.tolist(), matches.points.tolist(), strict=True)}
    assert pairs == {(*b, *a) for a, b in zip(back.tolist(), forth.points.tolist(), strict=True)}
    assert len(pairs) > 8
    assert (matches.scores.diff() <= 0).all()


def test_points_outside_the_image_are_named() -> None:
    for point in ((64.0, 3.0), (3.0, -0.6), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"outside the image of 64 x 48 pixels"):
            check_points(torch.tensor([[1.0, 1.0], point]), (48, 64))
    with pytest.raises(ValueError, match=r"must be \(N, 2\)"):
        check_points(torch.zeros(3), (48, 64))
    assert check_points(torch.zeros(0, 2), (48, 64)).shape == (0, 2)


def test_points_come_as_people_have_them() -> None:
    descriptors = describe((40, 40), (5, 5), Sizing("squash", 40))
    points = [[3.0, 4.0], [20.0, 30.0]]
    expected = match_points(descriptors, descriptors, torch.tensor(points)).points
    backwards = np.array(points)[::-1][::-1, ::-1][:, ::-1]
    turned = np.array(points[::-1])[::-1]  # negative strides, which torch cannot take
    assert turned.strides[0] < 0
    for form in (points, backwards, turned, torch.tensor(points, dtype=torch.bfloat16), np.array(points, np.int16)):
        assert torch.equal(match_points(descriptors, descriptors, form).points, expected)
    for wrong in ("ab", [["a", "b"]], [None], {"x": 1}):
        with pytest.raises(ValueError, match="points must be"):
            check_points(wrong, (40, 40))  # type: ignore[arg-type]  # wrong on purpose


def test_no_points_give_no_matches() -> None:
    descriptors = describe((40, 40), (5, 5), Sizing("squash", 40))
    for mode in ("cell", "pixel", "soft"):
        config = MatchConfig(mode=mode, mutual=True)  # type: ignore[arg-type]
        got = match_points(descriptors, descriptors, torch.zeros(0, 2), config)
        assert got.points.shape == (0, 2)
        assert got.scores.shape == (0,)


def test_descriptors_of_other_fusions_are_refused() -> None:
    one, two = (Descriptors.from_vectors(torch.ones(4, 4, n)) for n in (3, 5))
    with pytest.raises(ValueError, match=r"source parts have \[3\] channels, target parts \[5\]"):
        match_points(one, two, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="backend 'faiss' finds cells by cosine"):
        MatchConfig(backend="faiss", mode="pixel")
    with pytest.raises(ValueError, match="metric must be one of cosine, euclidean, manhattan, got 'l1'"):
        similarities(one.rows(), one.rows(), "l1")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        MatchConfig(mode="soft", temperature=0)


def test_soft_argmax_follows_its_window() -> None:
    scores = torch.zeros(9, 9)
    scores[4, 2], scores[4, 3], scores[8, 8] = 1.0, 1.0, 1.0
    window = soft_argmax(scores, window=2, temperature=0.01)
    torch.testing.assert_close(window, torch.tensor([2.5, 4.0]), atol=1e-4, rtol=0)
    everything = soft_argmax(scores, window=0, temperature=0.01)
    torch.testing.assert_close(everything, torch.tensor([13 / 3, 16 / 3]), atol=1e-4, rtol=0)
    bell = soft_argmax(scores, window=-2, temperature=0.01)
    assert abs(bell[0] - 2.5) < 0.5
    weak = torch.full((9, 9), -0.2)
    weak[1, 1] = -0.05
    leaking = soft_argmax(weak, window=1, temperature=0.02, outside="zero")
    assert leaking.max() > 4  # the zeros outside are larger than the peak: what the released code does
    torch.testing.assert_close(soft_argmax(weak, window=1, temperature=0.02), torch.ones(2), atol=0.01, rtol=0)
    barred = scores.masked_fill(scores == 0, -torch.inf)
    for kind in ("exclude", "zero"):
        got = soft_argmax(barred, window=1, temperature=0.02, outside=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(got, torch.tensor([2.5, 4.0]), atol=1e-4, rtol=0)


def test_instance_distances() -> None:
    vectors = F.normalize(torch.randn(10, 10, 7, generator=generator(1)), dim=-1)
    others = F.normalize(torch.randn(10, 10, 7, generator=generator(2)), dim=-1)
    one, two = Descriptors.from_vectors(vectors), Descriptors.from_vectors(others)
    assert mutual_distance(one, one) < 1e-6
    distances = torch.cdist(vectors.flatten(0, 1), others.flatten(0, 1))
    there, back = distances.argmin(1), distances.argmin(0)
    both = back[there] == torch.arange(100)
    torch.testing.assert_close(mutual_distance(one, two), distances.amin(1)[both].mean())
    left, right = torch.zeros(10, 10), torch.zeros(10, 10)
    left[:, :5], right[:, 5:] = 1, 1
    assert masked_distance(one, one, left, torch.ones(10, 10)) < 1e-6
    expected = torch.cdist(vectors[:, :5].flatten(0, 1), others[:, 5:].flatten(0, 1)).amin(1).mean()
    torch.testing.assert_close(masked_distance(one, two, left, right, side=10), expected)
    cut = [F.normalize(x.relu(), dim=-1) for x in (vectors, others)]  # every zero counts as far away, as released
    hidden = (x.mul(m[..., None]) for x, m in zip(cut, (left, right), strict=True))
    a, b = (x.masked_fill(x == 0, -1e5).flatten(0, 1).double() for x in hidden)
    expected = torch.linalg.vector_norm(a[left.flatten() > 0, None] - b, dim=2).amin(1).mean().float()
    got = masked_distance(*map(Descriptors.from_vectors, cut), left, right, side=10)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="leaves nothing"):
        masked_distance(one, two, torch.zeros(10, 10), right)
