"""Laws of rendered scenes: geometry agrees with itself, labels with pixels, mirrors with left and right."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import diffrep.scenes.sets as sets
from diffrep.scenes import (
    CATEGORIES,
    KEYPOINT_MIRROR,
    KEYPOINTS,
    PART_CLASS_OF,
    PART_CLASSES,
    PART_ID,
    PART_MIRROR,
    PARTS,
    SEEN,
    UNSEEN,
    VOCABULARY,
    Scene,
    SceneSet,
    mirror,
    render_scene,
    render_set,
    scene_pairs,
    scene_seed,
)
from diffrep.scenes.build import Body, Draw
from diffrep.scenes.categories import CATEGORY, mirrored_name
from diffrep.scenes.shapes import Ball, Clip, Hull, Rays, Shape, Tube, block, prism
from diffrep.scenes.stage import set_stage

every_category = pytest.mark.parametrize("category", CATEGORIES)


def assert_same(a: Scene, b: Scene) -> None:
    for field in dataclasses.fields(Scene):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y, err_msg=field.name)
            assert x.dtype == y.dtype, field.name
        else:
            assert x == y, field.name


def unproject(scene: Scene, x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> np.ndarray:
    fx, fy, cx, cy = scene.intrinsics
    return np.stack([(x - cx) / fx * depth, (y - cy) / fy * depth, depth], axis=-1)


# Shapes


def shapes() -> list[tuple[str, Shape]]:
    return [
        ("ball", Ball()),
        ("bowl", Ball((Clip((0.0, 1.0, 0.0), 0.2),))),
        ("cylinder", Tube()),
        ("cone", Tube(1.0, 0.01)),
        ("cup", Tube(0.8, 1.0, 0.85)),
        ("hook", Tube(1.0, 1.0, 0.7, (Clip((1.0, 0.0, 0.0), 0.1),))),
        ("block", block((0.7, 0.8), 0.1)),
        ("profile", prism([(1.0, -1.0), (0.4, 1.0), (-1.0, 1.0), (-1.0, -1.0)], axis="x", taper=(0.8, 1.0))),
    ]


def signed(shape: Shape, p: np.ndarray) -> np.ndarray:
    """Whether points (3, n) lie inside the material: the shapes' definitions, without any ray."""
    x, y, z = p
    if isinstance(shape, Hull):
        return (shape.planes[:, :3] @ p <= shape.planes[:, 3:]).all(0)
    inside = x * x + y * y + z * z <= 1
    if isinstance(shape, Tube):
        radius = (shape.top + shape.bottom) / 2 + (shape.top - shape.bottom) / 2 * y
        r = np.hypot(x, z)
        inside = (np.abs(y) <= 1) & (r <= radius) & (r >= shape.inner * radius)
    return inside


@pytest.mark.parametrize(("name", "shape"), shapes(), ids=[name for name, _ in shapes()])
def test_a_ray_meets_a_shape_where_marching_along_it_does(name: str, shape: Shape) -> None:
    rng = np.random.default_rng(3)
    n, steps = 24, np.linspace(0.5, 6.5, 12001)
    for _ in range(4):
        towards = rng.normal(size=3)
        towards /= np.linalg.norm(towards)
        matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        matrix[:, 2] = towards
        eye = -3.5 * towards
        x = rng.uniform(-0.4, 0.4, (1, 1, n)).astype(np.float32)
        y = rng.uniform(-0.4, 0.4, (1, n, 1)).astype(np.float32)
        rays = Rays(x, y, matrix, eye, 3.5)
        t = shape.hit(rays)[0]
        directions = np.stack(np.broadcast_arrays(*rays.directions()))[:, 0].astype(float)
        compared = 0
        for i in range(0, n, 5):
            for j in range(0, n, 5):
                points = eye[:, None] + directions[:, i, j, None] * steps
                inside = signed(shape, points)
                if isinstance(shape, (Ball, Tube)) and shape.clips:
                    # clipped shapes are shells: their surface is where inside changes, on the kept side
                    (clip,) = shape.clips
                    change = np.flatnonzero(inside[1:] != inside[:-1])
                    kept = np.array(clip.normal) @ points[:, change] <= clip.offset
                    change = change[kept]
                else:
                    change = np.flatnonzero(inside[1:] & ~inside[:-1])
                if len(change) == 0:
                    grazing = inside.any() or not np.isfinite(t[i, j])
                    assert grazing or abs(np.linalg.norm(eye + directions[:, i, j] * t[i, j])) < 2
                    continue
                assert t[i, j] == pytest.approx(steps[change[0]], abs=2e-3)
                compared += 1
        assert compared >= 1


# One scene


@every_category
def test_types_shapes_and_ranges(category: str) -> None:
    s = render_scene(5, category=category, size=(60, 72))
    assert s.image.shape == (60, 72, 3)
    assert s.image.dtype == np.uint8
    assert s.image.std() > 8  # a picture, not a plain field
    assert s.depth.dtype == s.normals.dtype == s.canonical.dtype == s.keypoints.dtype == np.float32
    assert s.part.dtype == np.uint8
    assert s.mask.dtype == s.edge.dtype == s.visible.dtype == np.bool_
    assert not np.isnan(s.depth).any()
    assert (s.depth > 0).all()
    assert np.isfinite(s.depth[s.mask]).all()
    sky = np.isinf(s.depth)
    lengths = np.linalg.norm(s.normals, axis=-1)
    np.testing.assert_allclose(lengths[~sky], 1, atol=1e-4)
    assert (s.normals[sky] == 0).all()
    assert np.abs(s.canonical).max() <= 1
    assert (s.canonical[~s.mask] == 0).all()
    np.testing.assert_array_equal(s.mask, s.part > 0)
    assert {PARTS[i].category for i in np.unique(s.part[s.mask])} == {category}
    assert s.keypoint_names == KEYPOINTS[category]
    assert 8 <= len(s.keypoint_names) == len(s.keypoints) == len(s.visible)
    rows, columns = np.nonzero(s.mask)
    assert s.box == (columns.min() - 0.5, rows.min() - 0.5, columns.max() + 0.5, rows.max() + 0.5)
    assert set(s.caption.split()) <= set(VOCABULARY)
    assert category in s.caption.split()


@every_category
def test_the_object_fills_the_frame_as_told_and_shows_keypoints(category: str) -> None:
    for seed in range(4):
        s = render_scene(seed, category=category, size=64, supersample=1)
        longer = max(s.box[2] - s.box[0], s.box[3] - s.box[1]) / 64
        assert 0.5 < longer < 0.93
        assert s.visible.sum() >= 2
        assert s.keypoints.min() > -1
        assert s.keypoints.max() < 64


@every_category
def test_surfaces_that_are_seen_face_the_camera(category: str) -> None:
    s = render_scene(11, category=category, size=64, supersample=1)
    y, x = np.mgrid[:64, :64]
    solid = np.isfinite(s.depth)
    rays = unproject(s, x, y, np.ones_like(s.depth))
    assert ((s.normals * rays).sum(-1)[solid] <= 1e-5).all()


@pytest.mark.parametrize("category", ["dog", "car", "mug", "motorbike"])
def test_normals_are_those_of_the_depth(category: str) -> None:
    s = render_scene(21, category=category, size=384, supersample=1)
    y, x = np.mgrid[:384, :384]
    points = unproject(s, x, y, s.depth)
    dx, dy = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    with np.errstate(invalid="ignore"):
        normals = np.cross(dy, dx)  # y down x right: towards the camera
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    # inside one part and away from grazing surfaces the differences are those of one smooth surface, mostly
    part = s.part
    same = np.ones(part.shape, dtype=bool)[1:-1, 1:-1]
    for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        same &= np.roll(part, shift, (0, 1))[1:-1, 1:-1] == part[1:-1, 1:-1]
    here = same & s.mask[1:-1, 1:-1] & (s.normals[1:-1, 1:-1, 2] < -0.3)
    cosine = (normals * s.normals[1:-1, 1:-1]).sum(-1)[here]
    assert here.sum() > 2000
    assert np.median(cosine) > 0.999
    assert np.mean(cosine > 0.97) > 0.9


@every_category
def test_visible_keypoints_lie_on_the_surface_that_their_pixel_shows(category: str) -> None:
    seen = hidden = 0
    for seed in range(2, 5):
        s, stage = render_scene(seed, category=category, size=128, supersample=1), set_stage(seed, category)
        named = {k.name: k for k in stage.body.keypoints}
        y, x = np.mgrid[:128, :128]
        points = unproject(s, x, y, np.where(s.mask, s.depth, 1e3))
        for name, (u, v), visible in zip(s.keypoint_names, s.keypoints, s.visible, strict=True):
            keypoint = named[name]
            at = stage.camera.rotation @ keypoint.primitive.at(keypoint.local) + stage.camera.shift
            around = np.s_[round(v) - 1 : round(v) + 2, round(u) - 1 : round(u) + 2]
            own = s.part[around] == PART_ID[category, keypoint.primitive.part]
            distance = np.linalg.norm(points[around] - at, axis=-1) / at[2]
            if visible:
                assert distance[own].min() < 0.02, name
                seen += 1
            elif own.any():  # its part is there, but another side or piece of it
                faces = keypoint.primitive.faces(keypoint.local) @ stage.camera.rotation.T
                away = (faces @ at > 0).all()
                assert away or distance[own].min() > 0.01, name
                hidden += 1
            else:
                hidden += 1
    assert seen > 8
    assert hidden > 1


@every_category
def test_every_keypoint_is_visible_from_somewhere(category: str) -> None:
    seen = np.zeros(len(KEYPOINTS[category]), dtype=bool)
    for seed in range(60):
        seen |= render_scene(1000 + seed, category=category, size=64, supersample=1).visible
        if seen.all():
            return
    assert [n for n, ok in zip(KEYPOINTS[category], seen, strict=True) if not ok] == []


@every_category
def test_keypoints_lie_on_the_surface_of_their_primitive(category: str) -> None:
    for seed in range(5):
        body = Body(Draw(np.random.default_rng(seed)))
        CATEGORY[category].build(body)
        for keypoint in body.keypoints:
            assert len(keypoint.primitive.faces(keypoint.local)) > 0, keypoint.name
            shape = keypoint.primitive.shape
            if isinstance(shape, Hull):
                assert (shape.planes[:, :3] @ keypoint.local - shape.planes[:, 3]).max() < 1e-3, keypoint.name


@every_category
def test_canonical_coordinates_know_left_from_right(category: str) -> None:
    """What is named left has positive lateral coordinates, whatever the view."""
    sides = {p.id: 1 if "left" in p.name else -1 for p in PARTS if re.search("left|right", p.name)}
    part_of = {k.name: PART_ID[category, k.primitive.part] for k in CATEGORY[category].template.keypoints}
    checked = 0
    for seed in range(3):
        s = render_scene(50 + seed, category=category, size=96, supersample=1)
        for part in np.unique(s.part):
            if part in sides:
                assert (s.canonical[s.part == part, 0] * sides[int(part)] > -0.12).all()
                checked += 1
        for name, (x, y), visible in zip(s.keypoint_names, s.keypoints, s.visible, strict=True):
            shown = visible and s.part[round(y), round(x)] == part_of[name]
            if shown and re.search(r"\b(left|right)\b", name):
                sign = 1 if "left" in name else -1
                assert s.canonical[round(y), round(x), 0] * sign > -0.15, name
                checked += 1
    assert checked > 2


@every_category
def test_a_keypoint_has_one_canonical_place_in_all_objects(category: str) -> None:
    """Far below the distance of different keypoints: that is what makes them correspond."""
    part_of = {k.name: PART_ID[category, k.primitive.part] for k in CATEGORY[category].template.keypoints}
    places: dict[str, list[np.ndarray]] = {name: [] for name in KEYPOINTS[category]}
    for seed in range(7):
        s = render_scene(200 + seed, category=category, size=96, supersample=1)
        for name, (x, y), visible in zip(s.keypoint_names, s.keypoints, s.visible, strict=True):
            if visible and s.part[round(y), round(x)] == part_of[name]:
                places[name].append(s.canonical[round(y), round(x)])
    spread = [np.linalg.norm(p - np.median(p, axis=0), axis=1) for p in places.values() if len(p) > 2]
    middle = np.array([np.median(p, axis=0) for p in places.values() if len(p) > 2])
    apart = np.linalg.norm(middle[:, None] - middle[None], axis=-1)
    assert np.median(np.concatenate(spread)) < 0.15
    assert np.median(np.concatenate(spread)) < 0.3 * np.median(apart[apart > 0])


# Seeds and sizes


def test_the_same_seed_gives_the_same_scene() -> None:
    assert_same(render_scene(9, category="chair", size=48), render_scene(9, category="chair", size=48))
    other = render_scene(10, category="chair", size=48)
    assert (other.image != render_scene(9, category="chair", size=48).image).any()


def test_rendering_draws_nothing_from_the_global_generator() -> None:
    before = str(np.random.get_state())  # noqa: NPY002
    render_scene(1, size=32)
    assert str(np.random.get_state()) == before  # noqa: NPY002


@pytest.mark.parametrize("category", ["person", "plane", "mug"])
def test_two_sizes_show_the_same_scene(category: str) -> None:
    small, large = (render_scene(31, category=category, size=n) for n in (64, 192))
    reduced = large.image.reshape(64, 3, 64, 3, 3).mean((1, 3))
    assert np.abs(reduced - small.image).mean() < 6
    centre = np.s_[1::3, 1::3]
    assert np.mean(large.part[centre] == small.part) > 0.995
    near = (large.part[centre] == small.part) & small.mask
    np.testing.assert_allclose(large.depth[centre][near], small.depth[near], rtol=0.05)
    np.testing.assert_allclose((large.keypoints + 0.5) / 3 - 0.5, small.keypoints, atol=1e-3)
    assert small.caption == large.caption


def test_labels_do_not_depend_on_supersampling_or_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = render_scene(8, category="lamp", size=64, supersample=1)
    fine = render_scene(8, category="lamp", size=64, supersample=3)
    for name in ("depth", "normals", "part", "canonical", "keypoints", "visible"):
        np.testing.assert_allclose(getattr(plain, name), getattr(fine, name), atol=1e-5)
    monkeypatch.setattr("diffrep.scenes.render._BAND", 700)
    assert_same(render_scene(8, category="lamp", size=64, supersample=1), plain)


def test_seeds_of_splits_never_meet() -> None:
    last = 2**40 - 1
    ranges = [(scene_seed(split, 0), scene_seed(split, last)) for split in ("train", "val", "test")]
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))
    with pytest.raises(ValueError, match=r"\[0, 2\*\*40\), got 1099511627776"):
        scene_seed("train", last + 1)
    with pytest.raises(ValueError, match="no split 'dev'; there are train, val, test"):
        scene_seed("dev", 0)  # type: ignore[arg-type]


def test_scenes_without_a_category_are_of_seen_ones() -> None:
    found = {render_scene(seed, size=8, supersample=1).category for seed in range(30)}
    assert found <= set(SEEN)
    assert len(found) > 6


def test_bad_values_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no category 'cat'; there are dog"):
        render_scene(0, category="cat")
    with pytest.raises(ValueError, match="at least 8 pixels wide and high, got 4 x 64"):
        render_scene(0, size=(4, 64))
    with pytest.raises(ValueError, match="supersample is 1 to 8, got 0"):
        render_scene(0, supersample=0)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        render_scene(-1)


# Tables


def test_tables_of_categories_and_parts() -> None:
    assert set(SEEN).isdisjoint(UNSEEN)
    assert set(SEEN) | set(UNSEEN) == set(CATEGORIES)
    assert len(SEEN) >= 10
    assert len(UNSEEN) >= 2
    assert [p.id for p in PARTS] == list(range(len(PARTS)))
    assert len(PARTS) < 256
    assert PARTS[0].part_class == PART_CLASSES[0] == "background"
    for part in PARTS:
        twin = PARTS[PART_MIRROR[part.id]]
        assert twin.name == mirrored_name(part.name)
        assert twin.category == part.category
        assert twin.part_class == part.part_class == PART_CLASSES[PART_CLASS_OF[part.id]]
        assert PART_MIRROR[twin.id] == part.id
    # what unseen categories consist of was mostly seen on others
    seen = {p.part_class for p in PARTS if p.category in SEEN}
    for category in UNSEEN:
        own = [p.part_class in seen for p in PARTS if p.category == category]
        assert np.mean(own) > 0.7


@every_category
def test_builders_use_parts_of_the_table_and_give_one_keypoint_list(category: str) -> None:
    for seed in range(20):
        body = Body(Draw(np.random.default_rng(seed)))
        CATEGORY[category].build(body)
        template = Body(body.draw.template())
        CATEGORY[category].build(template)
        assert [(p.part, p.paint, type(p.shape)) for p in body.primitives] == [
            (p.part, p.paint, type(p.shape)) for p in template.primitives
        ]
        assert {(category, p.part) for p in body.primitives} <= set(PART_ID)
        names = [k.name for k in body.keypoints]
        assert sorted(names) == list(KEYPOINTS[category])


@every_category
def test_a_template_is_its_own_mirror_image(category: str) -> None:
    """The canonical frame is lateral-symmetric: every keypoint's twin lies at the mirrored place."""
    template = CATEGORY[category].template
    place = {k.name: k.primitive.at(k.local) for k in template.keypoints}
    for name, at in place.items():
        np.testing.assert_allclose(at * [-1, 1, 1], place[mirrored_name(name)], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(CATEGORY[category].frame[0, 0], 0, atol=1e-6)


# Mirrors


@every_category
def test_a_mirror_swaps_sides_and_two_mirrors_give_the_scene_back(category: str) -> None:
    s = render_scene(17, category=category, size=(40, 56))
    m = mirror(s)
    assert_same(mirror(m), s)
    assert m.keypoint_names == s.keypoint_names
    for name, twin in zip(s.keypoint_names, KEYPOINT_MIRROR[category], strict=True):
        i, j = s.keypoint_names.index(name), s.keypoint_names.index(mirrored_name(name))
        assert twin == j
        assert m.keypoints[j, 0] == pytest.approx(55 - s.keypoints[i, 0])
        assert m.visible[j] == s.visible[i]
    np.testing.assert_array_equal(m.image[:, ::-1], s.image)
    np.testing.assert_array_equal(m.canonical[:, ::-1, 0], -s.canonical[..., 0])
    np.testing.assert_array_equal(m.normals[:, ::-1, 0], -s.normals[..., 0])
    columns = np.flatnonzero(m.mask.any(0))
    assert (m.box[0], m.box[2]) == (columns[0] - 0.5, columns[-1] + 0.5)


def test_a_mirrored_scene_names_its_left_wheels_left() -> None:
    """In a mirrored car, the canonical lateral coordinate still agrees with the part's name."""
    m = mirror(render_scene(50, category="car", size=96))
    ids = [p.id for p in PARTS if p.category == "car" and "left" in p.name]
    here = np.isin(m.part, ids)
    other = np.isin(m.part, [PART_MIRROR[i] for i in ids])
    assert here.any() or other.any()
    assert (m.canonical[here, 0] > 0).all()
    assert (m.canonical[other, 0] < 0).all()


# Sets and pairs


def test_pairs_are_different_objects_and_a_third_is_mirrored() -> None:
    pairs = scene_pairs("test", 9, categories=("car", "truck"), seed=4)
    assert len(pairs) == 18
    seeds = [s for a, b, _, _ in pairs for s in (a, b)]
    assert len(set(seeds)) == len(seeds)
    assert all(scene_seed("test", 0) <= s <= scene_seed("test", 2**40 - 1) for s in seeds)
    assert sum(mirrored for *_, mirrored in pairs) == 6
    assert pairs == scene_pairs("test", 9, categories=("car", "truck"), seed=4)
    assert pairs[:9] == scene_pairs("test", 12, categories=("car",), seed=4)[:9]
    assert pairs != scene_pairs("test", 9, categories=("car", "truck"), seed=5)
    assert {c for _, _, c, _ in scene_pairs("train", 1)} == set(SEEN)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "_CHUNK", 3)


@pytest.mark.usefixtures("small_chunks")
def test_a_set_holds_what_render_scene_gives(tmp_path: Path) -> None:
    found = render_set(tmp_path / "set", "val", 8, size=24, workers=1, progress=False)
    assert len(found) == 8
    for i in (0, 7):
        scene = render_scene(found.seed(i), category=SEEN[i], size=24)
        row = found[i]
        assert row["category"] == scene.category
        assert row["caption"] == scene.caption
        assert row["attributes"] == scene.attributes
        np.testing.assert_array_equal(row["image"], scene.image)
        np.testing.assert_array_equal(row["part"], scene.part)
        np.testing.assert_array_equal(row["mask"], scene.mask)
        np.testing.assert_allclose(row["canonical"] / 127, scene.canonical, atol=0.5 / 127 + 1e-6)
        np.testing.assert_allclose(row["normals"] / 127, scene.normals, atol=0.5 / 127 + 1e-6)
        np.testing.assert_allclose(row["depth"], scene.depth, rtol=1e-3)
        n = len(scene.keypoints)
        np.testing.assert_array_equal(row["keypoints"][:n], scene.keypoints)
        assert np.isnan(row["keypoints"][n:]).all()
        np.testing.assert_array_equal(row["visible"][:n], scene.visible)
        assert not row["visible"][n:].any()
    assert {found[i]["category"] for i in range(8)}.isdisjoint(UNSEEN)
    assert found.image.shape == (8, 24, 24, 3)
    assert len(found.captions) == 8
    with pytest.raises(IndexError, match="scene 8 of a set of 8"):
        found[8]
    with pytest.raises(AttributeError, match="no attribute 'images'"):
        found.images  # noqa: B018


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_render_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = render_set(tmp_path / "whole", "train", 8, size=16, workers=1, progress=False)
    drawn: list[int] = []

    def dies_after_five(seed: int, **options: object) -> Scene:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(seed)
        return render_scene(seed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sets, "render_scene", dies_after_five)
    with pytest.raises(KeyboardInterrupt):
        render_set(tmp_path / "set", "train", 8, size=16, workers=1, progress=False)
    with pytest.raises(ValueError, match="only 1 of 3 chunks are rendered"):
        SceneSet(tmp_path / "set")

    def draws(seed: int, **options: object) -> Scene:
        drawn.append(seed)
        return render_scene(seed, **options)  # type: ignore[arg-type]

    drawn.clear()
    monkeypatch.setattr(sets, "render_scene", draws)
    rest = render_set(tmp_path / "set", "train", 8, size=16, workers=1, progress=False)
    assert drawn == [scene_seed("train", i) for i in range(3, 8)]  # the finished chunk is not drawn again
    np.testing.assert_array_equal(rest.image, whole.image)
    np.testing.assert_array_equal(rest.canonical, whole.canonical)
    assert rest.captions == whole.captions


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render_set(tmp_path, "val", 1, size=16, workers=1, progress=False)
    with pytest.raises(ValueError, match="holds a set with count 1, not 2; size 16, not 24; choose another"):
        render_set(tmp_path, "val", 2, size=24, workers=1, progress=False)
    monkeypatch.setattr(sets, "renderer_version", lambda: "another")
    with pytest.raises(ValueError, match=r"renderer '[0-9a-f]{16}', not 'another'"):
        render_set(tmp_path, "val", 1, size=16, workers=1, progress=False)
    with pytest.raises(ValueError, match="no set of scenes"):
        SceneSet(tmp_path / "empty")


@pytest.mark.slow
def test_worker_processes_render_the_same(tmp_path: Path) -> None:
    one = render_set(tmp_path / "one", "val", 6, size=16, workers=1, progress=False)
    two = render_set(tmp_path / "two", "val", 6, size=16, workers=2, progress=False)
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.depth, two.depth)
    assert one.captions == two.captions
