from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from diffrep.backbones import Grid
from diffrep.features import Descriptors, FeatureMaps
from diffrep.fusion import GEOAWARE_ZERO_SHOT, SD_DINO, Fusion, Part, fuse, joint_pca
from diffrep.images import Placement, Sizing
from diffrep.similarity import similarities

from .fields import generator, random_maps

CANVAS = (64, 64)


def maps_of(seed: int, **shapes: tuple[int, int, int]) -> FeatureMaps:
    draw = generator(seed)
    maps = {tap: torch.randn(1, *shape, generator=draw) for tap, shape in shapes.items()}
    grids = {tap: Grid.covering(CANVAS, (m.shape[2], m.shape[3])) for tap, m in maps.items()}
    return FeatureMaps(maps, (Placement.identity(CANVAS),), grids)


def pair(**shapes: tuple[int, int, int]) -> list[FeatureMaps]:
    return [maps_of(seed, **shapes) for seed in (1, 2)]


@pytest.mark.parametrize("shape", [(12, 5, 7), (90, 5, 7)], ids=["covariance", "gram"])
def test_joint_pca_is_the_pca_of_all_cells_together(shape: tuple[int, int, int]) -> None:
    maps = [torch.randn(shape, generator=generator(1)), torch.randn(shape[0], 6, 4, generator=generator(2))]
    got = torch.cat([m.flatten(1).T for m in joint_pca(maps, 6)])
    cells = torch.cat([m.flatten(1).T for m in maps]).double().numpy()
    expected = torch.from_numpy(PCA(6, svd_solver="full").fit_transform(cells))
    signs = torch.sign((got * expected).sum(0))
    torch.testing.assert_close(got.double() * signs, expected, atol=1e-5, rtol=0)
    assert (got.gather(0, got.abs().argmax(0, keepdim=True)) > 0).all()


def test_joint_pca_does_not_depend_on_the_order_of_the_images() -> None:
    maps = [torch.randn(20, 6, 6, generator=generator(seed)) for seed in (1, 2)]
    forward, backward = joint_pca(maps, 5), joint_pca(maps[::-1], 5)
    torch.testing.assert_close(forward[0], backward[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(forward[1], backward[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(12, 8, 8), (150, 4, 4)], ids=["tall", "wide"])
def test_the_randomised_pca_is_torchs_with_the_same_draw(shape: tuple[int, int, int]) -> None:
    maps = [torch.randn(shape, generator=generator(seed)) for seed in (1, 2)]
    cells = torch.cat([m.flatten(1).T for m in maps])
    with torch.random.fork_rng():
        torch.manual_seed(7)
        _, _, directions = torch.pca_lowrank(cells, q=5)
    expected = (cells - cells.mean(0)) @ directions
    got = torch.cat([m.flatten(1).T for m in joint_pca(maps, 5, generator=generator(7))])
    # a sign is arbitrary where another library version transposes first
    torch.testing.assert_close(got.abs(), expected.abs(), atol=1e-3, rtol=0)
    exact = torch.cat([m.flatten(1).T for m in joint_pca(maps, 5)])
    assert exact.square().sum() >= got.square().sum()


def test_fusing_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    fuse(pair(a=(9, 8, 8)), Fusion(parts=(Part(taps=("a",), dims=(3,)),), pca="lowrank"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_more_dimensions_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="32 cells with 9 channels cannot keep 10 dimensions"):
        fuse(pair(a=(9, 4, 4)), Fusion.of("a", dims=10))


def test_a_chain_is_upsampled_step_by_step_behind_the_finer_maps() -> None:
    images = pair(s5=(6, 3, 4), s4=(5, 6, 8), s3=(4, 12, 16))
    chain = Fusion(parts=(Part(taps=("s5", "s4", "s3"), normalise=False),))
    for image, descriptors in zip(images, fuse(images, chain), strict=True):
        joined = image.maps["s5"]
        for tap in ("s4", "s3"):
            finer = image.maps[tap]
            up = F.interpolate(joined, finer.shape[-2:], mode="bilinear", align_corners=False)
            joined = torch.cat([finer, up], dim=1)
        torch.testing.assert_close(descriptors.vectors(), joined[0].movedim(0, -1), atol=1e-5, rtol=0)
        assert descriptors.grid == image.grids["s3"]


def test_fused_similarity_is_the_weighted_sum_of_the_parts() -> None:
    one, two = fuse(pair(a=(9, 8, 8), b=(5, 8, 8)), Fusion.of("a", "b", weights=(0.7, 1.3)))
    cosines = [p.flatten(0, 1) @ q.flatten(0, 1).T for p, q in zip(one.parts, two.parts, strict=True)]
    dots = one.rows().joined() @ two.rows().joined().T
    torch.testing.assert_close(dots, 0.49 * cosines[0] + 1.69 * cosines[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(similarities(one.rows(), two.rows()), dots / (0.49 + 1.69), atol=1e-5, rtol=0)
    other = similarities(one.weighted(1, 0).rows(), two.weighted(1, 0).rows())
    torch.testing.assert_close(other, cosines[0], atol=1e-5, rtol=0)


def test_normalising_the_joined_descriptor_gives_unit_length() -> None:
    fusion = Fusion(parts=(Part(taps=("a",), normalise=False), Part(taps=("b",), weight=2.0)), normalise=True)
    (one,) = fuse([maps_of(1, a=(9, 8, 8), b=(5, 4, 4))], fusion)
    torch.testing.assert_close(one.vectors().norm(dim=-1), torch.ones(8, 8))
    loose = fuse([maps_of(1, a=(9, 8, 8), b=(5, 4, 4))], replace(fusion, normalise=False))[0].vectors()
    torch.testing.assert_close(one.vectors(), F.normalize(loose, dim=-1))


def test_chunk_weights_scale_consecutive_channels() -> None:
    part = Part(taps=("s4", "s3"), chunk_weights=((3, 2.0), (6, 0.5)), normalise=False)
    (got,) = fuse([maps_of(1, s4=(5, 4, 4), s3=(4, 8, 8))], Fusion(parts=(part,)))
    (plain,) = fuse([maps_of(1, s4=(5, 4, 4), s3=(4, 8, 8))], Fusion(parts=(replace(part, chunk_weights=()),)))
    factors = torch.tensor([2.0] * 3 + [0.5] * 6)
    torch.testing.assert_close(got.vectors(), plain.vectors() * factors)
    with pytest.raises(ValueError, match="chunk_weights cover 8 channels, the taps s4, s3 have 9"):
        fuse(
            [maps_of(1, s4=(5, 4, 4), s3=(4, 8, 8))],
            Fusion(parts=(replace(part, chunk_weights=((8, 1.0),)),)),
        )


def coordinates(size: tuple[int, int], cells: tuple[int, int], sizing: Sizing, tap: str) -> FeatureMaps:
    """Two channels that are the image coordinates of the cells."""
    maps = random_maps(size, cells, sizing)
    centres = maps.cell_centres("a").movedim(-1, 0)[None]
    return FeatureMaps({tap: centres}, maps.placements, {tap: maps.grids["a"]})


def test_backbones_that_saw_the_image_at_other_sizes_meet_on_the_image() -> None:
    diffusion = coordinates((70, 100), (12, 12), Sizing("squash", 96), "up")
    tokens = coordinates((70, 100), (20, 20), Sizing("pad", 140), "tokens")
    parts = tuple(Part(taps=(tap,), normalise=False) for tap in ("up", "tokens"))
    (got,) = fuse([(diffusion, tokens)], Fusion(parts=parts))
    assert got.size == (20, 20)  # the finest counts
    assert got.placement == tokens.placements[0]
    x, y = got.parts[1].unbind(-1)  # beyond the outermost centres of the coarse map its border is repeated
    inside = (x > 5) & (x < 94) & (y > 3) & (y < 66)
    assert inside.sum() > 100
    torch.testing.assert_close(got.parts[0][inside], got.parts[1][inside], atol=1e-2, rtol=0)
    (coarse,) = fuse([(diffusion, tokens)], Fusion(parts=parts, reference="up"))
    assert coarse.size == (12, 12)
    torch.testing.assert_close(coarse.parts[1][1:-1, 1:-1], coarse.parts[0][1:-1, 1:-1], atol=1e-2, rtol=0)


def test_descriptors_are_read_where_feature_maps_are() -> None:
    maps = random_maps((50, 83), (9, 11), Sizing("pad", 88))
    (got,) = fuse([maps], Fusion(parts=(Part(taps=("a",), normalise=False),)))
    points = torch.tensor([[0.0, 0.0], [41.3, 20.7], [82.0, 49.0]])
    torch.testing.assert_close(got.at(points).joined(), maps.at("a", points[None])[0])
    torch.testing.assert_close(got.points(got.cells(points)), points, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.cell_centres(), maps.cell_centres("a"))
    centres = got.cell_centres()
    assert got.nearest_cells(centres.flatten(0, 1)).tolist() == list(range(99))
    strictly = maps.content_mask("a")
    assert (got.on_image() | ~strictly).all()
    assert not got.on_image()[0].any()  # 2 of 9 rows are padding, above and below


def test_presets_are_the_papers() -> None:
    small = Fusion(parts=tuple(replace(p, dims=p.dims and (4, 4, 4)) for p in SD_DINO.parts))
    images = []
    for seed in (1, 2):
        maps = maps_of(seed, s5=(8, 4, 4), s4=(8, 8, 8), s3=(6, 16, 16), dino=(10, 16, 16))
        names = dict(zip(maps.taps, (*SD_DINO.parts[0].taps, "layer.11"), strict=True))
        images.append(
            FeatureMaps(
                {names[t]: m for t, m in maps.maps.items()},
                maps.placements,
                {names[t]: g for t, g in maps.grids.items()},
            )
        )
    one, _ = fuse(images, small)
    assert [part.shape[-1] for part in one.parts] == [12, 10]
    torch.testing.assert_close(one.rows().squared_norms(), torch.full((256,), 2.0))
    geo, _ = fuse(images, GEOAWARE_ZERO_SHOT)
    assert geo.vectors().shape == (16, 16, 32)
    torch.testing.assert_close(geo.rows().squared_norms(), torch.ones(256))


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no features hold the tap 'c'; there are a, b"):
        fuse([maps_of(1, a=(3, 4, 4), b=(3, 4, 4))], Fusion.of("c"))
    with pytest.raises(ValueError, match="2 sets of features hold the tap 'a'"):
        fuse([(maps_of(1, a=(3, 4, 4)), maps_of(2, a=(3, 4, 4)))], Fusion.of("a"))
    with pytest.raises(ValueError, match=r"tap 'a' have different channels: \[3, 4\]"):
        fuse([maps_of(1, a=(3, 4, 4)), maps_of(2, a=(4, 4, 4))], Fusion.of("a"))
    placements, grids = (Placement.identity(CANVAS),) * 2, {"a": Grid.covering(CANVAS, (4, 4))}
    two = FeatureMaps({"a": torch.zeros(2, 3, 4, 4)}, placements, grids)
    with pytest.raises(ValueError, match=r"image 0: features must be batches of one, got \[2\]"):
        fuse([two], Fusion.of("a"))
    with pytest.raises(ValueError, match="at least one image"):
        fuse([], Fusion.of("a"))
    with pytest.raises(ValueError, match="need as many PCA dimensions"):
        Part(taps=("a", "b"), dims=(3,))
    with pytest.raises(ValueError, match=r"2 taps \(a, b\) need as many weights, got 1"):
        Fusion.of("a", "b", weights=(1,))
    with pytest.raises(ValueError, match="one common h and w"):
        Descriptors(
            (torch.zeros(2, 2, 3), torch.zeros(3, 2, 3)),
            (1.0, 1.0),
            Placement.identity(CANVAS),
            Grid.covering(CANVAS, (2, 2)),
        )


def test_reduced_precision_maps_become_float32_descriptors() -> None:
    maps = maps_of(1, a=(16, 8, 8)).to(torch.bfloat16)
    (got,) = fuse([maps], Fusion.of("a"))
    assert got.parts[0].dtype == torch.float32
    np.testing.assert_allclose(got.parts[0].norm(dim=-1).numpy(), 1, atol=1e-6)
