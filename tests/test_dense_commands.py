"""``diffrep depth`` and ``diffrep normals``, the files they write, and known depths."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.alignment import fit_robust
from diffrep.cli import main
from diffrep.heads.maps import DepthMap, NormalMap, array_of, read_known_depths, save_map
from diffrep.heads.point_cloud import Intrinsics, normals_from_depth, ply_bytes, unproject

from .one_step_heads import random_head


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("heads")
    wanted = [("lotus-d", "disparity"), ("lotus-g", "normals")]
    return {t: str(random_head(folder / t, family=f, task=t)) for f, t in wanted}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "more/a.png")):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def ramp(space: str = "disparity", *, metric: bool = False) -> DepthMap:
    values = torch.linspace(0.05, 1, 12 * 16).reshape(12, 16)
    return DepthMap(values * (20 if metric else 1), space, metric=metric)  # type: ignore[arg-type]


# -- commands -----------------------------------------------------------------------------------------------


def test_a_folder_skips_names_and_counts_what_fails(
    heads: dict[str, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "empty.jpg").touch()
    output = tmp_path / "maps"
    assert main(["depth", str(photos), "-o", str(output), "--model", heads["disparity"], "--formats", "npy"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("diffrep depth: 2 of 5 images failed")
    assert "broken.png: is not an image" in error
    assert "empty.jpg: the file is empty" in error
    for name in ("a", "b", "more/a"):
        assert np.load(output / f"{name}_disparity.npy").shape == (40, 56)
        with Image.open(output / f"{name}_disparity_preview.png") as drawn:
            assert drawn.size == (56, 40)
        assert json.loads((output / f"{name}_disparity.json").read_text())["large_values_are"] == "near"
    assert not [p for p in output.rglob("*") if "partial" in p.name]


def test_normals_of_a_glob_with_an_ensemble(
    heads: dict[str, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["normals", str(photos / "*.png"), "-o", str(tmp_path / "n"), "--model", heads["normals"], "--json"]
    assert main([*command, "--frame", "rdf", "--formats", "npy", "png", "--ensemble", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["found"].startswith("lotus-g, normals")
    assert [len(entry["files"]) for entry in report["images"]] == [5, 5]
    values = np.load(tmp_path / "n" / "a_normals.npy")
    np.testing.assert_allclose(np.linalg.norm(values, axis=-1), 1, atol=1e-5)
    assert json.loads((tmp_path / "n" / "a_normals.json").read_text())["axes"] == "x right, y down, z forward"


def test_point_cloud_and_known_depths(heads: dict[str, str], photos: Path, tmp_path: Path) -> None:
    # known depths that the map itself gives, so that they fit exactly
    first = tmp_path / "first"
    assert (
        main(["depth", str(photos / "a.png"), "-o", str(first), "--model", heads["disparity"], "--formats", "npy"]) == 0
    )
    disparity = np.load(first / "a_disparity.npy")
    lines = [f"{x},{y},{1 / (0.4 * disparity[y, x] + 0.1)}" for y in range(2, 40, 7) for x in range(3, 56, 9)]
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "a.csv").write_text("x,y,metres\n" + "\n".join(lines))
    options = ["--model", heads["disparity"], "--known", str(tmp_path / "known"), "--formats", "npy", "ply"]
    output = tmp_path / "second"
    assert main(["depth", str(photos / "a.png"), "-o", str(output), *options, "--intrinsics", "50,50,28,20"]) == 0
    metres = np.load(output / "a_depth.npy")
    np.testing.assert_allclose(metres, 1 / (0.4 * disparity + 0.1), rtol=1e-3)
    assert json.loads((output / "a_depth.json").read_text())["unit"] == "metres"
    header = (output / "a_points.ply").read_bytes().split(b"end_header\n")[0].decode()
    assert f"element vertex {40 * 56}" in header
    assert "unit: metres; axes: x right, y up, z towards the camera" in header


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "ply"], "needs the camera: --intrinsics"),
        (["--formats", "ply", "--intrinsics", "1,2,3"], "cannot read the intrinsics '1,2,3'"),
        (["--formats", "ply", "--intrinsics", "0,2,3,4"], "positive focal lengths"),
        (["--formats", "ply", "--intrinsics", "9,9,3,4", "--field-of-view", "60"], "do not go together"),
        (["--formats", "ply", "--field-of-view", "180"], "between 0 and 180"),
        (["--field-of-view", "60"], "belong to --formats ply"),
        (["--field-of-view", "0", "--formats", "ply"], "between 0 and 180 degrees, got 0"),
        (["--nearest", "2"], "point clouds alone take --nearest"),
        (["--fit", "robust"], "--fit says how --known works"),
        (["--overlap", "0.3"], "--overlap says how --tile works"),
        (["--seed", "99999999999999999999999"], "seed must be in [0, 2^63)"),
        (["--seed", "-1"], "seed must be in [0, 2^63)"),
        (["--resample", "lanczos"], "--resample must be one of bilinear"),
        (["--formats", "--no-preview"], "nothing would be written"),
        (["--known", "nowhere.npy"], "no such file or folder of known depths"),
        (["--ensemble", "4"], "needs noise, and a lotus-d head has none"),
        (["--task", "depth"], "predicts disparity"),
        (["--family", "dpt"], "there is no family 'dpt'"),
        (["--model", "tiny"], "is a backbone and no head"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    heads: dict[str, str],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    if "--device" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    model = [] if "--model" in options else ["--model", heads["disparity"]]
    assert main(["depth", str(photos), "-o", str(tmp_path / "maps"), *model, *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "maps").glob("**/*.npy"))


def test_heads_of_the_other_command_are_refused(
    heads: dict[str, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["depth", str(photos), "-o", str(tmp_path), "--model", heads["normals"]]) == 2
    assert "use diffrep normals" in capsys.readouterr().err
    assert main(["normals", str(photos), "-o", str(tmp_path), "--model", heads["disparity"]]) == 2
    assert "use diffrep depth" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["depth", str(photos), "-o", str(tmp_path / "file"), "--model", heads["disparity"]]) == 2
    assert "is a file; a folder goes there" in capsys.readouterr().err
    assert main(["depth", str(photos), "-o", str(tmp_path / "d.png"), "--model", heads["disparity"]]) == 2
    assert "d.png: is called as a file; a folder goes there, for example" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()


# -- files --------------------------------------------------------------------------------------------------


def test_a_depth_png_holds_16_bits_and_its_meaning(tmp_path: Path) -> None:
    save_map(tmp_path / "d.png", ramp())
    with Image.open(tmp_path / "d.png") as stored:
        np.testing.assert_allclose(np.asarray(stored) / 65535, ramp().values.numpy(), atol=1e-5)
        note = json.loads(stored.text["diffrep"])
    assert (note["kind"], note["large_values_are"], note["png"]) == ("disparity", "near", "value = count / 65535")
    save_map(tmp_path / "m.png", ramp("depth", metric=True))
    with Image.open(tmp_path / "m.png") as stored:
        np.testing.assert_allclose(np.asarray(stored) / 1000, ramp("depth", metric=True).values.numpy(), atol=1e-3)
    far = DepthMap(torch.full((2, 2), 70.0), "depth", metric=True)
    with pytest.raises(ValueError, match=r"holds up to 65.535 m, the map reaches 70.0 m"):
        save_map(tmp_path / "far.png", far)
    with pytest.raises(ValueError, match=r"a map is written as .png, .npy, .tiff"):
        save_map(tmp_path / "d.jpg", ramp())


def test_a_normal_png_holds_16_bits_in_three_channels(tmp_path: Path) -> None:
    values = torch.nn.functional.normalize(torch.randn(3, 9, 7, generator=torch.Generator().manual_seed(0)), dim=0)
    save_map(tmp_path / "n.png", NormalMap(values, "lub"))
    content = (tmp_path / "n.png").read_bytes()
    with Image.open(tmp_path / "n.png") as stored:  # Pillow reads the upper 8 bits
        stored.load()
        coarse = np.asarray(stored).astype(float) / 255 * 2 - 1
        assert json.loads(stored.text["diffrep"])["frame"] == "lub"
    np.testing.assert_allclose(coarse, values.permute(1, 2, 0).numpy(), atol=0.01)
    start = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    lines = np.frombuffer(zlib.decompress(content[start + 4 : start + 4 + length]), np.uint8).reshape(9, -1)
    assert (lines[:, 0] == 1).all()
    bytes_of = np.cumsum(lines[:, 1:].reshape(9, 7, 6), axis=1, dtype=np.uint8)  # undoes the difference filter
    counts = bytes_of.reshape(9, 7, 3, 2).astype(int) @ [256, 1]
    np.testing.assert_allclose(counts / 65535 * 2 - 1, values.permute(1, 2, 0).numpy(), atol=3e-5)


def test_npy_and_tiff_hold_the_floats(tmp_path: Path) -> None:
    normals = NormalMap(torch.nn.functional.normalize(torch.ones(3, 4, 5), dim=0), "rub")
    for name, values in (("d", ramp()), ("n", normals)):
        save_map(tmp_path / f"{name}.npy", values)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), array_of(values))
        tifffile = pytest.importorskip("tifffile")
        save_map(tmp_path / f"{name}.tiff", values)
        with tifffile.TiffFile(tmp_path / f"{name}.tiff") as stored:
            np.testing.assert_array_equal(stored.asarray(), array_of(values))
            assert json.loads(stored.pages[0].description)["kind"] == values.metadata()["kind"]


def test_previews_are_red_where_near() -> None:
    for values, near in ((ramp("disparity"), -1), (ramp("depth"), 0), (ramp("depth", metric=True), 0)):
        colours = np.asarray(values.picture()).reshape(-1, 3).astype(int)
        far = -1 - near
        assert colours[near][0] > colours[near][2]
        assert colours[far][2] > colours[far][0]


# -- space --------------------------------------------------------------------------------------------------


def test_a_plane_becomes_its_points_and_normals() -> None:
    camera = Intrinsics(100, 110, 19.5, 14.5)
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    rays = torch.stack([(x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy, torch.ones_like(x)])
    normal = torch.nn.functional.normalize(torch.tensor([0.2, -0.3, -1.0]), dim=0)
    depth = -2.0 / (normal[:, None, None] * rays).sum(0)  # the plane n . p = -2
    points = unproject(depth, camera)
    torch.testing.assert_close((normal[:, None, None] * points).sum(0), torch.full((30, 40), -2.0))
    found = normals_from_depth(depth, camera)[:, 1:-1, 1:-1]
    torch.testing.assert_close(found, normal[:, None, None].expand_as(found), atol=1e-3, rtol=0)


def test_a_ply_file_reads_back() -> None:
    points = torch.arange(12.0).reshape(3, 2, 2)
    colours = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    keep = torch.tensor([[True, False], [True, True]])
    content = ply_bytes(points, colours, points, frame="rub", keep=keep, comment="two\nlines")
    header, body = content.split(b"end_header\n")
    assert b"comment two lines\nelement vertex 3\n" in header
    kinds = [(n, "<f4") for n in ("x", "y", "z", "nx", "ny", "nz")] + [(n, "u1") for n in "rgb"]
    rows = np.frombuffer(body, dtype=kinds)
    assert rows["x"].tolist() == [0, 2, 3]
    assert rows["y"].tolist() == [-4, -6, -7]  # y up
    assert rows["nz"].tolist() == [-8, -10, -11]
    assert rows["g"].tolist() == [4, 6, 7]


def test_an_assumed_camera_sees_its_angle() -> None:
    camera = Intrinsics.assumed(300, 400, 90)
    assert camera.fx == pytest.approx(200)
    assert (camera.cx, camera.cy) == (199.5, 149.5)


# -- known depths -------------------------------------------------------------------------------------------


def test_the_robust_fit_ignores_what_least_squares_believes() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 400, generator=generator)
    r = p * torch.tensor([[3.0], [0.5]]) + torch.tensor([[1.0], [-2.0]])
    r[:, ::3] += 50 * torch.rand(2, 134, generator=generator)
    scale, shift = fit_robust(p, r, torch.ones(2, 400, dtype=torch.bool))
    torch.testing.assert_close(scale, torch.tensor([3.0, 0.5]), atol=1e-3, rtol=0)
    torch.testing.assert_close(shift, torch.tensor([1.0, -2.0]), atol=1e-3, rtol=0)
    flat = fit_robust(torch.ones(1, 5), torch.arange(5.0)[None], torch.ones(1, 5, dtype=torch.bool))
    assert [x.item() for x in flat] == [0, 2]
    nothing = fit_robust(torch.ones(1, 5), torch.ones(1, 5), torch.zeros(1, 5, dtype=torch.bool))
    assert [x.item() for x in nothing] == [0, 0]


@pytest.mark.parametrize("space", ["depth", "disparity"])
@pytest.mark.parametrize("method", ["robust", "least squares"])
def test_known_depths_make_a_map_metric(space: str, method: str) -> None:
    values = ramp(space)
    fitted = 4 * values.values + 0.5
    true = 1 / fitted if space == "disparity" else fitted
    known = torch.zeros_like(true)
    known[::3, ::4] = true[::3, ::4]
    metric = values.align(known, method=method)  # type: ignore[arg-type]
    assert (metric.metric, metric.space) == (True, "depth")
    torch.testing.assert_close(metric.values, true, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="metric already"):
        metric.align(known)
    with pytest.raises(ValueError, match="the known depths contradict the map"):
        values.align(1 / true.clamp(min=0.1))
    with pytest.raises(ValueError, match="at least two known depths, got 0"):
        values.align(torch.zeros_like(true))
    with pytest.raises(ValueError, match=r"must be \(12, 16\)"):
        values.align(torch.ones(3, 3))


def test_known_depths_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    depths = np.array([[0, 1.5, 2.25], [np.nan, 4, 0]], dtype=np.float32)
    expected = torch.tensor([[0, 1.5, 2.25], [0, 4, 0]])
    np.save(tmp_path / "k.npy", depths)
    Image.fromarray(np.nan_to_num(depths * 1000).astype(np.uint16)).save(tmp_path / "k.png")
    (tmp_path / "k.csv").write_text("1,0,1.5\n2,0,2.25\n\n1,1,4\n")
    for ending in ("npy", "png", "csv"):
        assert torch.equal(read_known_depths(tmp_path / f"k.{ending}", Path("x.jpg"), (3, 2)), expected)
    assert torch.equal(read_known_depths(tmp_path, Path("k.jpg"), (3, 2)), expected)
    (tmp_path / "bad.csv").write_text("1,2\n")
    (tmp_path / "out.csv").write_text("9,0,1\n")
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    Image.new("RGB", (3, 2)).save(tmp_path / "colour.png")
    for name, message in [
        ("bad.csv", "line 1 is '1,2', not x,y,metres"),
        ("out.csv", "outside the image of 3 x 2"),
        ("bad.npy", "cannot be read as known depths"),
        ("colour.png", "one channel of 16 bits"),
        ("none.npy", "known depths are a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_known_depths(tmp_path / name, Path("x.jpg"), (3, 2))
    with pytest.raises(ValueError, match="its image"):
        read_known_depths(tmp_path / "k.npy", Path("x.jpg"), (4, 4))
    with pytest.raises(ValueError, match=r"has no known depths for z.jpg"):
        read_known_depths(tmp_path, Path("z.jpg"), (3, 2))


@pytest.mark.slow
def test_the_demo_part_shows_its_pictures() -> None:
    from diffrep.commands.demo import depth_and_normals
    from diffrep.pictures import Page

    page = Page("demo", "depth")
    depth_and_normals(page)
    text = page.html()
    assert text.count('src="data:image/') > 3
    assert "<h2>Depth and normals in one step</h2>" in text


def test_the_demo_cuts_pictures_to_an_object_and_all_its_points() -> None:
    from diffrep.commands.demo import close_up
    from diffrep.scenes import held_out_pair

    scene = held_out_pair("dog", 2)[0]
    x0, y0, x1, y1 = scene.box
    left, top, right, bottom = close_up(scene, torch.tensor([[(x0 + x1) / 2, (y0 + y1) / 2]]))
    assert right - left == bottom - top < len(scene.mask)
    assert left <= x0 < x1 <= right
    assert top <= y0 < y1 <= bottom
    assert close_up(scene, torch.tensor([[0.0, 0.0], [255.0, 255.0]])) == (0, 0, 256, 256)
    corner = close_up(scene, torch.tensor([[0.0, 200.0]]))  # near the edge: the square stays inside the picture
    assert corner[0] == 0
    assert corner[3] <= 256
