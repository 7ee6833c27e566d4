"""Depth and normals on benchmarks: alignment, metrics, released layouts, harness, scenes, ablation."""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from diffrep.alignment import align_depth, fit_scale_shift
from diffrep.eval.borders import halo_metrics
from diffrep.eval.datasets.archives import read_plain
from diffrep.eval.datasets.dense_images import (
    DEPTH_BENCHMARKS,
    open_benchmark,
)
from diffrep.eval.datasets.pairs import DatasetError
from diffrep.eval.maps import (
    DepthProtocol,
    NormalProtocol,
    PooledAngles,
    angular_error,
    depth_metrics,
    evaluate_maps,
    mean_metrics,
    mean_of_images,
    normal_metrics,
    predict_at,
    predict_normals,
)
from diffrep.eval.one_step_ablation import variants
from diffrep.eval.rendering import name_of
from diffrep.eval.report import PUBLISHED_DEPTH, PUBLISHED_NORMALS, published_maps
from diffrep.eval.scene_maps import SceneMapSettings, evaluate_scene_maps, no_look, scene_truth
from diffrep.scenes import Scene


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# -- alignment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["depth", "disparity"])
def test_alignment_finds_scale_and_shift(space: str) -> None:
    depth = 1 + 9 * random(12, 10)
    relative = (depth if space == "depth" else 1 / depth) * 0.3 + 0.1
    valid = random(12, 10, seed=1) > 0.2
    aligned, scale, shift = align_depth(relative, depth, valid, space=space)  # type: ignore[arg-type]
    torch.testing.assert_close(aligned, depth, atol=1e-3, rtol=1e-4)
    assert (scale, shift) == pytest.approx((1 / 0.3, -1 / 3), rel=1e-4)


def test_a_constant_prediction_becomes_the_mean() -> None:
    reference, mask = 1 + random(2, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    scale, shift = fit_scale_shift(torch.full((2, 8, 8), 0.7), reference, mask)
    assert scale.tolist() == [0, 0]
    torch.testing.assert_close(shift, reference.mean((1, 2)))
    scale, shift = fit_scale_shift(torch.full((2, 8, 8), 0.7), reference, mask, undetermined="zero")
    assert shift.tolist() == [0, 0]


def test_alignment_says_what_is_missing() -> None:
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="no valid pixel"):
        align_depth(random(4, 4), random(4, 4), nothing)
    with pytest.raises(ValueError, match="one shape"):
        fit_scale_shift(random(1, 4), random(1, 5), torch.ones(1, 4, dtype=torch.bool))


# -- metrics ----------------------------------------------------------------------------------------------------


def test_depth_metrics_of_the_truth_and_of_twice_the_truth() -> None:
    depth, valid = 1 + random(6, 6), torch.ones(6, 6, dtype=torch.bool)
    right = depth_metrics(depth, depth, valid)
    assert right["abs_rel"] == right["rmse"] == right["silog"] == 0
    assert right["delta1"] == right["delta3"] == 1
    twice = depth_metrics(2 * depth, depth, valid)
    assert twice["abs_rel"] == pytest.approx(1)
    assert twice["silog"] == pytest.approx(0, abs=1e-4)
    assert twice["log10"] == pytest.approx(math.log10(2))
    assert (twice["delta2"], twice["delta3"]) == (0, 0)
    assert math.isnan(depth_metrics(depth, depth, ~valid)["rmse"])
    assert mean_metrics([right, twice])["abs_rel"] == pytest.approx(0.5)


def test_pooled_angles_agree_with_all_at_once() -> None:
    parts = [180 * random(101, seed=s) for s in range(3)]
    assert PooledAngles.over(parts) == pytest.approx(normal_metrics(torch.cat(parts)), abs=1e-3)
    assert math.isnan(PooledAngles().compute()["mean"])
    assert mean_of_images([torch.tensor([0.0, 10.0]), torch.tensor([20.0])])["mean"] == 12.5


def test_angles_do_not_depend_on_length() -> None:
    a, b = torch.randn(1, 3, 4, 4), torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(angular_error(3 * a, b), angular_error(a, b), atol=1e-3, rtol=0)
    assert (angular_error(torch.zeros_like(b), b) == 90).all()
    assert angular_error(-b, b).max() == 180


# -- depth benchmarks -------------------------------------------------------------------------------------------


def _picture(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix.lower() == ".jpg" else {}))


def _integers(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)


def _write(name: str, root: Path) -> None:
    """One sample of a benchmark in its released layout, 2 m everywhere but for 0 in a corner."""
    if name == "nyuv2":
        _picture(root / "test/bathroom/rgb_0001.png", (480, 640))
        depth = np.full((480, 640), 2000)
        depth[:50, :50] = 0
        _integers(root / "test/bathroom/depth_0001.png", depth)
        (root / "filename_list_test.txt").write_text(
            "test/bathroom/rgb_0001.png test/bathroom/depth_0001.png test/bathroom/filled_0001.png\n"
        )
    elif name == "kitti":
        drive = "2011_09_26/2011_09_26_drive_0002_sync"
        _picture(root / drive / "image_02/data/0000000069.png", (375, 1242))
        depth = np.full((375, 1242), 512)
        _integers(root / drive / "proj_depth/groundtruth/image_02/0000000069.png", depth)
        line = f"{drive}/image_02/data/0000000069.png {drive}/proj_depth/groundtruth/image_02/0000000069.png 721.5"
        (root / "eigen_test_files_with_gt.txt").write_text(f"{line}\n{line.split()[0]} None 721.5\n")
    elif name == "eth3d":
        _picture(root / "rgb/courtyard/DSC_0286.JPG", (20, 30))
        depth = np.full((20, 30), 2, np.float32)
        depth[0, 0] = np.inf
        (root / "depth/courtyard").mkdir(parents=True)
        depth.tofile(root / "depth/courtyard/DSC_0286.JPG")
    elif name == "scannet":
        _picture(root / "scene0000_00/color/000000.jpg", (24, 32))
        _integers(root / "scene0000_00/depth/000000.png", np.full((24, 32), 2000))
    else:
        stem = root / "indoors/scene_00019/scan_00183/00019_00183_indoors_000_010"
        _picture(stem.with_suffix(".png"), (24, 32))
        mask = np.ones((24, 32), np.float32)
        mask[0] = 0
        np.save(f"{stem}_depth.npy", np.full((24, 32, 1), 2, np.float32))
        np.save(f"{stem}_depth_mask.npy", mask)


COUNTED = {
    "nyuv2": (471 - 45) * (601 - 41) - (50 - 45) * (50 - 41),
    "kitti": (321 - 117) * (1172 - 43),
    "eth3d": 20 * 30 - 1,
    "scannet": 24 * 32,
    "diode": 23 * 32,
}


@pytest.mark.parametrize("name", list(DEPTH_BENCHMARKS))
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_depth_benchmarks_are_read_as_released(name: str, packed: bool, tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    _write(name, root)
    if packed:
        for listing in root.glob("*.txt"):
            listing.rename(tmp_path / listing.name)
        archive = tmp_path / "set.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(root, arcname=".")
        root = archive
    data = open_benchmark("depth", name, root)
    (entry,) = data.entries
    sample = data.sample(entry)
    assert int(sample.valid.sum()) == COUNTED[name]
    assert (sample.truth[sample.valid] == 2).all()
    assert sample.image.shape[1:] == sample.truth.shape
    assert sample.image.dtype == torch.uint8
    assert published_maps(name, PUBLISHED_DEPTH)
    if name == "kitti":
        assert sample.image.shape == (3, 352, 1216)


def test_what_a_depth_set_lacks_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    for i in range(3):
        _picture(tmp_path / f"scene0000_00/color/{i:06d}.jpg", (24, 32), i)
        _integers(tmp_path / f"scene0000_00/depth/{i:06d}.png", 1000 + 100 * np.arange(32) + np.zeros((24, 1)))
    names = [f"scene0000_00/color/{i:06d}.jpg scene0000_00/depth/{i:06d}.png" for i in range(4)]
    (tmp_path / "scannet_list.txt").write_text("\n".join([*names, "scene0000_00/color/000009.jpg"]) + "\n")
    (tmp_path / "scene0000_00/depth/000001.png").write_bytes(b"\x89PNG broken")
    seen: list[int] = []

    def predict(image: Tensor) -> Tensor:
        seen.append(1)
        return torch.arange(32.0).expand(24, 32)

    protocol = DepthProtocol(space="depth")
    data = open_benchmark("depth", "scannet", tmp_path)
    report = evaluate_maps(predict, data, protocol, method="ramp", folder=tmp_path / "kept", progress=False)
    assert len(report.images) == 2
    assert report.metrics["abs_rel"] == pytest.approx(0, abs=1e-5)
    text = report.table()
    for wrong in ("line 5: names no depth file", "000001.jpg: ", "000003.jpg: ", "3 problems, not counted"):
        assert wrong in text
    assert "Lotus-D" in text
    assert json.loads(report.to_json())["mean"]["delta1"] == 1

    with (tmp_path / "kept/images.jsonl").open("a") as file:
        file.write('{"image": "cut o')  # a run that was killed while it wrote
    again = evaluate_maps(predict, data, protocol, method="ramp", folder=tmp_path / "kept", progress=False)
    assert len(seen) == 2  # nothing is predicted twice
    assert again.images == report.images
    with pytest.raises(ValueError, match="method"):
        evaluate_maps(predict, data, protocol, method="other", folder=tmp_path / "kept", progress=False)


def test_folders_that_are_no_benchmark_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        open_benchmark("depth", "nyuv2", tmp_path / "none")
    with pytest.raises(DatasetError, match="no sample of KITTI Eigen"):
        open_benchmark("depth", "kitti", tmp_path)
    with pytest.raises(ValueError, match="no depth benchmark 'coco'"):
        open_benchmark("depth", "coco", tmp_path)
    with pytest.raises(DatasetError, match="no such list"):
        open_benchmark("depth", "scannet", tmp_path, tmp_path / "list.txt")
    with pytest.raises(DatasetError, match="no sample of NYUv2"):
        open_benchmark("normals", "nyuv2", tmp_path)


def test_predictions_are_made_at_the_working_size() -> None:
    sizes = []

    def predict(image: Tensor) -> Tensor:
        sizes.append(tuple(image.shape))
        assert image.dtype == torch.uint8
        return image[0].float()

    image = torch.full((3, 30, 40), 7, dtype=torch.uint8)
    found = predict_at(predict, image, 64)
    assert sizes == [(3, 48, 64)]
    torch.testing.assert_close(found, torch.full((30, 40), 7.0))


# -- normal benchmarks ------------------------------------------------------------------------------------------


def test_png_normals_and_the_padding_around_images(tmp_path: Path) -> None:
    _picture(tmp_path / "nyuv2/test/000000_img.png", (40, 50))
    facing = np.full((40, 50, 3), (128, 128, 255), np.uint8)
    facing[0] = 0
    Image.fromarray(facing).save(tmp_path / "nyuv2/test/000000_normal.png")
    data = open_benchmark("normals", "nyuv2", tmp_path)
    given = []

    def predict(image: Tensor) -> Tensor:
        given.append(image)
        return torch.tensor([0.0, 0.0, 2.0]).view(3, 1, 1).expand(3, *image.shape[1:])

    report = evaluate_maps(predict, data, NormalProtocol(), method="wall", folder=tmp_path / "kept", progress=False)
    assert given[0].shape == (3, 64, 64)
    assert given[0][0, 0, 0].item() == pytest.approx(-2.1179, abs=1e-4)
    assert given[0][:, 12:52, 7:57].abs().max() <= 1
    assert len(report.images) == 1
    assert report.metrics["mean"] < 0.5
    assert "DSINE" in report.table()
    again = evaluate_maps(predict, data, NormalProtocol(), method="wall", folder=tmp_path / "kept", progress=False)
    assert len(given) == 1
    assert again.metrics == report.metrics
    stretched = predict_normals(predict, torch.full((3, 8, 8), 9, dtype=torch.uint8), NormalProtocol(pad="none"))
    assert stretched.shape == (3, 8, 8)


def test_exr_normals(tmp_path: Path) -> None:
    openexr = pytest.importorskip("OpenEXR")
    _picture(tmp_path / "ibims/ibims/corridor_01_img.png", (6, 8))
    normals = np.zeros((6, 8, 3), np.float32)
    normals[1:, :, 0], normals[1:, :, 2] = 0.6, 0.8
    channels = {c: np.ascontiguousarray(normals[..., i]) for i, c in enumerate("RGB")}
    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
    with openexr.File(header, channels) as file:
        file.write(str(tmp_path / "ibims/ibims/corridor_01_normal.exr"))
    data = open_benchmark("normals", "ibims", tmp_path)
    sample = data.sample(data.entries[0])
    assert not sample.valid[0].any()
    assert sample.valid[1:].all()
    torch.testing.assert_close(sample.truth[:, 2, 3], torch.tensor([0.6, 0.0, 0.8]))
    (tmp_path / "ibims/ibims/corridor_01_normal.exr").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no OpenEXR picture"):
        data.sample(data.entries[0])


def _pickled(value: object, protocol: int) -> bytes:
    from pickle import dumps

    return dumps(value, protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_oasis_normals_are_read_without_running_the_file(protocol: int, tmp_path: Path) -> None:
    _picture(tmp_path / "oasis/val/1_img.png", (6, 8))
    box = np.zeros((2, 3, 3))
    box[0] = (0.6, 0.0, 0.8)
    content = {"min_y": 1, "max_y": np.int64(2), "min_x": 4, "max_x": 6, "normal": np.asfortranarray(box)}
    (tmp_path / "oasis/val/1_normal.pkl").write_bytes(_pickled(content, protocol))
    data = open_benchmark("normals", "oasis", tmp_path)
    sample = data.sample(data.entries[0])
    assert sample.valid.nonzero().tolist() == [[1, 4], [1, 5], [1, 6]]
    torch.testing.assert_close(sample.truth[:, 1, 5], torch.tensor([-0.6, 0.0, 0.8]))


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "content",
    [
        _pickled({"a": _Harmful()}, 4),
        _pickled({"a": np.array([_Harmful()], dtype=object)}, 4),
        _pickled([1, 2], 2),
        _pickled({"normal": np.zeros(3)}, 4)[:-20],
        b"",
        b"garbage",
    ],
)
def test_other_pickles_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="file:"):
        read_plain(content, "file")


def test_published_tables_have_every_benchmark() -> None:
    for name in ("nyuv2", "scannet", "ibims", "sintel", "oasis"):
        assert published_maps(name, PUBLISHED_NORMALS)
    lotus = next(row for row in published_maps("kitti", PUBLISHED_DEPTH) if row.method == "Lotus-D (disparity)")
    assert lotus.values["kitti"] == (8.1, 93.1)


# -- scenes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["disparity", "depth", "normals"])
def test_the_truth_has_no_error_on_scenes(task: str, tmp_path: Path) -> None:
    settings = SceneMapSettings(count=5, size=32, workers=0, batch_size=2)
    asked: list[int] = []

    def truth(scenes: Sequence[Scene]) -> Tensor:
        asked.append(len(scenes))
        return torch.stack([scene_truth(scene, task) for scene in scenes])  # type: ignore[arg-type]

    methods = {"truth": truth, "no look": no_look(task)}  # type: ignore[arg-type]
    report = evaluate_scene_maps(methods, task, settings, folder=tmp_path, weights={"truth": 1}, progress=False)  # type: ignore[arg-type]
    metric = "mean" if task == "normals" else "abs_rel"
    value, low, high = report.mean("truth", metric)
    assert low <= value <= high
    assert value < (0.1 if task == "normals" else 0.03)  # the quantiles cut off 2 % of the depth at each end
    assert report.mean("no look", metric)[0] > 3 * value
    assert sum(asked) == 5
    again = evaluate_scene_maps(methods, task, settings, folder=tmp_path, weights={"truth": 1}, progress=False)  # type: ignore[arg-type]
    assert sum(asked) == 5
    assert again.table() == report.table()
    assert json.loads(again.to_json())["mean of images"]["truth"]["all"]["images"] == 5
    with pytest.raises(ValueError, match="another folder"):
        evaluate_scene_maps(methods, task, settings, folder=tmp_path, weights={"truth": 2}, progress=False)  # type: ignore[arg-type]


def test_settings_of_scenes_are_checked() -> None:
    with pytest.raises(ValueError, match="no category unicorn"):
        SceneMapSettings(categories=("unicorn",))
    with pytest.raises(ValueError, match="at least 1"):
        SceneMapSettings(count=0)


def test_the_ablation_has_each_of_the_papers_steps() -> None:
    rows = {variant.published for variant in variants()}
    assert {11.55, 8.33, 5.59, 5.56} <= rows
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names)


def test_an_archive_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(b"not a tar")
    with pytest.raises(DatasetError, match="no uncompressed tar"):
        open_benchmark("depth", "scannet", tmp_path / "set.tar")


# -- outlines ---------------------------------------------------------------------------------------------------


def test_a_halo_is_as_wide_as_what_is_blurred() -> None:
    mask = np.zeros((60, 60), dtype=bool)
    mask[20:40, 20:40] = True
    depth = np.where(mask, 2.0, 6.0)
    perfect = halo_metrics(depth, depth, mask)
    assert (perfect["halo"], perfect["wide halos"]) == (0, 0)
    assert np.isnan(perfect["thin seen"])  # nothing is thin
    grown = np.zeros_like(mask)
    grown[17:43, 17:43] = True  # the object drawn three pixels too large on every side
    metrics = halo_metrics(np.where(grown, 2.0, 6.0), depth, mask)
    assert metrics["halo"] == pytest.approx((26**2 - 20**2) / 78, rel=0.05)  # 78 pixels of outline, 3.5 wide at corners
    assert metrics["wide halos"] > 0
    near = np.zeros_like(mask)
    near[19:41, 19:41] = True  # one pixel
    assert halo_metrics(np.where(near, 2.0, 6.0), depth, mask)["wide halos"] == 0


def test_thin_parts_that_are_not_drawn_are_not_seen() -> None:
    mask = np.zeros((60, 60), dtype=bool)
    mask[10:30, 10:30] = True
    mask[30:56, 20:22] = True  # a leg of two pixels
    depth = np.where(mask, 2.0, 5.0)
    trunk = mask.copy()
    trunk[30:] = False
    assert halo_metrics(depth, depth, mask)["thin seen"] == 100
    assert halo_metrics(np.where(trunk, 2.0, 5.0), depth, mask)["thin seen"] < 10


def test_no_outline_no_halo() -> None:
    flat = np.full((8, 8), 3.0)
    for mask in (np.zeros((8, 8), dtype=bool), np.ones((8, 8), dtype=bool)):
        assert all(np.isnan(value) for value in halo_metrics(flat, flat, mask).values())
    step = np.arange(64).reshape(8, 8) > 31  # an object that stands against its wall
    assert np.isnan(halo_metrics(flat, flat, step)["halo"])


# -- objects on photographs -------------------------------------------------------------------------------------


def test_objects_are_pasted_on_photographs_as_they_were_rendered() -> None:
    settings = SceneMapSettings(count=2, size=48, workers=0, background="photographs", categories=("mug", "car"))
    jobs = settings.jobs()
    pasted, again = (next(settings.scenes(jobs)) for _ in range(2))
    rendered = next(SceneMapSettings(count=2, size=48, workers=0, categories=("mug", "car")).scenes(jobs))
    for one, same, plain in zip(pasted, again, rendered, strict=True):
        assert np.array_equal(one.image, same.image)
        assert np.array_equal(one.mask, plain.mask)
        inner = ndimage.binary_erosion(one.mask, iterations=2)
        assert np.abs(one.image[inner].astype(int) - plain.image[inner]).mean() < 6  # sampled finer
        outer = ~ndimage.binary_dilation(one.mask, iterations=2)
        assert np.abs(one.image[outer].astype(int) - plain.image[outer]).mean() > 15
        assert np.array_equal(one.depth[one.mask], plain.depth[one.mask])
        assert np.isinf(one.depth[~one.mask]).all()
        assert not one.normals[~one.mask].any()
    report = evaluate_scene_maps({"no look": no_look("disparity")}, "disparity", settings, progress=False)
    assert "pasted on photographs" in report.table()
    assert "halo" not in report.rows["no look"][name_of(jobs[0])]  # nobody knows the depth behind
