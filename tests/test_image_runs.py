"""Folders, names and videos of `depth`, `normals` and `segment`: nothing is lost, overwritten or read twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.cli import main
from diffrep.commands.image_runs import Item, OutputPlace, _ahead, find_inputs, output_names, run_images, write_map
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.loading import HeadError, load_head
from diffrep.heads.maps import DepthMap, KnownDepthError, NormalMap, known_files, read_known_depths, unit_length
from diffrep.heads.segmentation import SegmentationHead
from diffrep.images import frame_rate, read_frames, write_video
from diffrep.tasks import _say

from .one_step_heads import random_head


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_head(tmp_path_factory.mktemp("head"), family="lotus-d", task="disparity", working_size=32))


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", ["p", "p/depth", "."])
@pytest.mark.parametrize("command", ["depth", "segment", "restore"])
def test_a_second_run_takes_no_output_for_a_photograph(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "p" / "a.png")
    options = {
        "depth": ["--model", head, "--formats", "png", "tiff"],
        "segment": ["--outputs", "mask", "cutout"],
        "restore": ["--format", "webp"],
    }[command]
    assert main([command, "p", "-o", output, *options]) == 0
    first = files_below(tmp_path)
    for sources in (["p"], ["p", "p/a.png"]):
        assert main([command, *sources, "-o", output, *options]) == 0
        assert files_below(tmp_path) == first
    (tmp_path / "p" / "a.png").unlink()
    with pytest.raises(ValueError, match="no image found"):
        find_inputs([str(tmp_path)], tmp_path)


def test_every_file_lies_below_the_output(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "in1" / "x.png")
    (tmp_path / "w").mkdir()
    picture(tmp_path / "w" / "z.png", 1)
    monkeypatch.chdir(tmp_path / "w")
    (tmp_path / "w" / "link.png").symlink_to(tmp_path / "in1" / "x.png")
    sources = ["../in1/x.png", "z.png", "../in1/../in1/x.png", "link.png"]
    assert main(["depth", *sources, "-o", "out", "--model", head]) == 0
    assert files_below(tmp_path / "in1") == {"x.png"}
    assert {name for name in files_below(tmp_path / "w" / "out") if name.endswith(".json")} == {
        "in1/x_disparity.json", "w/z_disparity.json",
    }  # fmt: skip
    # a folder of the outputs that is a link leads elsewhere: nothing is written there
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "in1").symlink_to(tmp_path / "elsewhere")
    assert main(["depth", *sources[:2], "-o", str(tmp_path / "second"), "--model", head]) == 2
    assert not files_below(tmp_path / "elsewhere")


def test_an_input_is_never_replaced(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    before = picture(tmp_path / "a_disparity.png", 1).read_bytes()
    assert main(["depth", ".", "-o", ".", "--model", head]) == 2
    assert "a_disparity.png is an input and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "a_disparity.png").read_bytes() == before


def test_names_are_distinct_and_take_linear_time() -> None:
    paths = [Path("a.png"), Path("a.jpg"), Path("a.png.png"), Path("A.PNG"), Path("b/a.png"), Path("B/A.png")]
    names = list(output_names(paths).values())
    assert len({name.casefold() for name in names}) == len(paths)
    times = []
    for count in (2_000, 20_000):
        start = time.process_time()
        output_names([Path(f"f/{i % 7}/{i}.png") for i in range(count)])
        times.append(time.process_time() - start)
    assert times[1] < 40 * max(times[0], 0.01)  # ten times the images; quadratic would be a hundred
    with pytest.raises(ValueError, match="is an input"):
        OutputPlace(Path("o"), "a", frozenset({os.path.realpath("o/a_x.png")})).file("x.png")


@pytest.mark.parametrize(("name", "ending"), [("depth", "disparity"), ("normals", "normals"), ("restore", "restored")])
def test_what_exists_is_skipped(
    name: str, ending: str, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        picture(tmp_path / "in" / f"{number}.png", number)
    options = ["--model", head] if name == "depth" else []  # the others: the embedded heads
    command = [name, str(tmp_path / "in"), "-o", str(tmp_path / "out"), *options, "--skip-existing", "--json"]
    assert main(command) == 0
    (tmp_path / "out" / f"1_{ending}.png").unlink()
    old = (tmp_path / "out" / f"0_{ending}.png").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    captured = capsys.readouterr()
    assert [Path(entry["image"]).name for entry in json.loads(captured.out)["images"]] == ["1.png"]
    assert "skipped 1 image whose files exist" in captured.err
    assert (tmp_path / "out" / f"0_{ending}.png").stat().st_mtime_ns == old
    assert (tmp_path / "out" / f"1_{ending}.png").is_file()


def test_skipped_masks_stay_in_the_summary(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    command = ["segment", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--skip-existing"]
    assert main(command) == 0
    picture(tmp_path / "in" / "b.png", 1)
    assert main(command) == 0
    entries = json.loads((tmp_path / "out" / "summary.json").read_text())["images"]
    assert [Path(entry["image"]).name for entry in entries] == ["a.png", "b.png"]


# -- videos -------------------------------------------------------------------------------------------------


def test_a_still_clip_gives_a_constant_video(tmp_path: Path) -> None:
    pytest.importorskip("av")
    generative = str(random_head(tmp_path / "head", family="lotus-g", task="disparity", working_size=32))
    still = Image.open(picture(tmp_path / "still.png", size=(48, 32)))
    clip = tmp_path / "clip.mkv"
    assert write_video(clip, [still] * 4, 10) == 4
    assert frame_rate(clip) == 10
    frames = list(read_frames(clip))
    assert [frame.size for frame in frames] == [(48, 32)] * 4
    held = tmp_path / "held"
    held.mkdir()
    for number in range(3):  # a clip is compressed: a folder of frames holds them exactly
        still.save(held / f"{number}.png")
    options = ["--model", generative, "--formats", "npy", "--batch-size", "2"]
    assert main(["depth", str(held), "-o", str(tmp_path / "maps"), *options]) == 0
    maps = [np.load(tmp_path / "maps" / f"{number}_disparity.npy") for number in range(3)]
    assert maps[0].std() > 0.01
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], atol=1e-5)
    assert main(["depth", str(clip), "-o", str(tmp_path / "frames"), *options]) == 0
    assert len(list((tmp_path / "frames" / "clip").glob("*_disparity.npy"))) == 4
    assert main(["depth", str(held), "-o", str(tmp_path / "out.mp4"), "--model", generative]) == 0
    shown = [np.asarray(frame).astype(int) for frame in read_frames(tmp_path / "out.mp4")]
    assert len(shown) == 3
    assert max(np.abs(frame - shown[0]).mean() for frame in shown) < 1


def test_videos_are_refused_in_one_line(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    a = picture(tmp_path / "a.png")
    for arguments, message in [
        ([str(tmp_path / "broken.mp4"), "-o", str(tmp_path / "o")], "broken.mp4: is not a video that can be read"),
        ([str(a), "-o", str(tmp_path / "o.mp4"), "--formats", "npy"], "go with a folder, not with the video"),
    ]:
        assert main(["depth", *arguments, "--model", head]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "o.mp4").exists()


def test_pictures_of_several_sizes_become_one_video(
    head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("av")
    files = [str(picture(tmp_path / f"{n}.png", size=(64, side))) for n, side in enumerate((48, 32, 32))]
    assert main(["depth", *files, "-o", str(tmp_path / "o.mp4"), "--model", head]) == 0
    first, second, _ = (np.asarray(frame) for frame in read_frames(tmp_path / "o.mp4"))
    assert first.shape == second.shape == (48, 64, 3)
    assert second[:6].max() < 40  # bars above and below
    (record,) = caplog.records
    assert "frames of other sizes than the first's 64 x 48 get bars" in record.getMessage()


# -- known depths -------------------------------------------------------------------------------------------


def test_known_depths_lie_as_the_images_do(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("a", "b")):
        picture(tmp_path / "photos" / name / "x.png", number)
        (tmp_path / "mirrored" / name).mkdir(parents=True)
        lines = [f"{3 * i},{2 * i},{2 + number + 0.3 * i}" for i in range(10)]
        (tmp_path / "mirrored" / name / "x.csv").write_bytes("\n".join(lines).encode("utf-8-sig"))
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "x.csv").write_text("1,1,2\n3,3,4\n")
    inputs = find_inputs([str(tmp_path / "photos")], tmp_path / "out")
    files = known_files(tmp_path / "mirrored", {i.path: (i.below, Path(i.name)) for i in inputs})
    assert [file.parent.name for file in files.values()] == ["a", "b"]
    assert float(read_known_depths(files[inputs[1].path], inputs[1].path, (40, 32))[0, 0]) == 3
    command = ["depth", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--model", head, "--known"]
    assert main([*command, str(tmp_path / "known")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "known depths of two images" in error
    assert "a/x.png and" in error
    assert not (tmp_path / "out").exists()


def test_known_depths_in_other_units_are_recognised_or_refused(tmp_path: Path) -> None:
    (tmp_path / "mm.csv").write_text("x,y,depth_mm\n1,1,2500\n".replace("depth_mm", "mm"))
    assert float(read_known_depths(tmp_path / "mm.csv", Path("a.png"), (4, 4))[1, 1]) == 2.5
    (tmp_path / "far.csv").write_text("1,1,2500\n2,2,3100\n")
    np.save(tmp_path / "counts.npy", np.full((4, 4), 2500, dtype=np.uint16))
    (tmp_path / "utf16.csv").write_bytes("1,1,2".encode("utf-16"))
    (tmp_path / "nan.csv").write_text("nan,1,2\n")
    for name, message in [
        ("far.csv", "are they millimetres"),
        ("counts.npy", "this array is uint16"),
        ("utf16.csv", "utf16.csv: cannot be read as known depths"),
        ("nan.csv", "line 1 lies at nan"),
    ]:
        with pytest.raises(KnownDepthError, match=message):
            read_known_depths(tmp_path / name, Path("a.png"), (4, 4))


# -- results ------------------------------------------------------------------------------------------------


def test_normals_have_unit_length_in_every_form(tmp_path: Path) -> None:
    values = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    values[:, :4] = 0
    normals = NormalMap(unit_length(values, "lub"), "lub")
    assert torch.equal(normals.values[:, 0, 0], torch.tensor([0.0, 0.0, 1.0]))
    for ending, tolerance in ((".npy", 1e-6), (".tiff", 1e-6)):
        file = normals.save(tmp_path / f"n{ending}")
        stored = np.load(file) if ending == ".npy" else pytest.importorskip("tifffile").imread(file)
        np.testing.assert_allclose(np.linalg.norm(stored, axis=-1), 1, atol=tolerance)
    coarse = np.asarray(normals.picture()).astype(float) / 255 * 2 - 1
    np.testing.assert_allclose(np.linalg.norm(coarse, axis=-1), 1, atol=0.01)


def test_maps_describe_and_save_themselves(tmp_path: Path) -> None:
    depth = DepthMap(torch.linspace(0, 1, 12).reshape(3, 4), "disparity")
    assert repr(depth) == "DepthMap(values float32 (3, 4) in 0 .. 1)"
    assert depth.save(tmp_path / "d.png").is_file()
    with Image.open(tmp_path / "d.png") as stored:  # the values, not the picture of them
        np.testing.assert_allclose(np.asarray(stored) / 65535, depth.numpy(), atol=1e-5)
    assert depth._repr_png_()[:4] == b"\x89PNG"


def test_an_embedded_model_says_once_that_it_is_small(
    head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _say.cache_clear()
    command = ["depth", str(picture(tmp_path / "a.png")), "-o", str(tmp_path / "out")]
    assert main([*command, "--model", head]) == 0
    assert "note:" not in capsys.readouterr().err
    for count in (1, 0):
        assert main([*command, "--size", "32"]) == 0
        assert capsys.readouterr().err.count("--model jingheya/lotus-depth-d-v1-1") == count


def test_a_head_is_a_module_that_saves_itself(head: str, tmp_path: Path) -> None:
    loaded = load_head(head)
    image = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    assert isinstance(loaded, torch.nn.Module)
    assert loaded.state_dict()
    one, two = loaded([image, image], seed=1)
    assert torch.equal(one.values, two.values)
    loaded.save_pretrained(tmp_path / "saved")
    again = DenseHead.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(image).values, loaded(image).values)
    assert (again.task, again.family.name) == (loaded.task, loaded.family.name)
    with pytest.raises(HeadError, match="is a DenseHead, not a SegmentationHead"):
        SegmentationHead.from_pretrained(head)
    with pytest.raises(TypeError, match="sizes"):
        loaded(image, sizes=3)


def test_images_of_one_size_share_batches_and_files_do_not_mind(tmp_path: Path) -> None:
    sizes = [(40, 30), (30, 40), (40, 30), (30, 40), (40, 30), (24, 24)]
    for number, size in enumerate(sizes):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{number}.png")
    batches: list[list[tuple[int, int]]] = []
    head = load_head(random_head(tmp_path / "head"))
    plain = head.predict_each

    def watched(images: list[Image.Image], config: PredictConfig) -> Iterator[DepthMap]:
        batches.append([image.size for image in images])
        return plain(images, config)

    head.predict_each = watched
    inputs = find_inputs([str(tmp_path / f"{number}.png") for number in range(6)], tmp_path / "out")
    config, slow = PredictConfig(batch_size=3), {"0": 0.2}

    def write(item: Item, image: Image.Image, result: DepthMap) -> list[Path]:
        time.sleep(slow.get(item.place.name, 0.0))
        return write_map(item.place, result, ["npy"], show=False)

    done = run_images(head, inputs, tmp_path / "out", config, write)
    assert [Path(str(entry["image"])).stem for entry in done] == list("012345")
    assert batches == [[(40, 30)] * 3, [(30, 40)] * 2, [(24, 24)]]
    for number, size in enumerate(sizes):
        expected = plain([Image.open(tmp_path / f"{number}.png").convert("RGB")], config)
        values = np.load(tmp_path / "out" / f"{number}_disparity.npy")
        assert values.shape == size[::-1]
        np.testing.assert_allclose(values, next(iter(expected)).values, atol=1e-4)


def test_reading_goes_ahead_by_so_many_and_stops_when_nobody_asks(tmp_path: Path) -> None:
    seen: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            seen.append(number)
            yield number

    ahead = _ahead(numbers(), 4)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    assert len(seen) <= 3 + 4
    assert list(_ahead(iter("abc"), 2)) == list("abc")
    with pytest.raises(ZeroDivisionError):
        list(_ahead((1 / number for number in (1, 0)), 2))


COLLECTIONS = [  # every command that takes many images, and what it leaves of those that can be read
    ("depth IN -o OUT", "a_disparity.json"),
    ("normals IN -o OUT", "a_normals.json"),
    ("segment IN -o OUT", "a_mask.png"),
    ("restore IN -o OUT", "a_restored.png"),
    ("extract IN -o OUT --backbone tiny-dino --workers 0", "manifest.json"),
    ("search IN ok.png -o OUT/q.png --backbone tiny-dino --work w", "q.png"),
    ("likelihood IN -o OUT/b.csv --tolerance 0.5 --size 64", "b.csv"),
    ("match --pairs IN.csv -o OUT", "a-b.png"),
]


@pytest.mark.parametrize(("command", "file"), COLLECTIONS)
@pytest.mark.filterwarnings("ignore")
def test_one_rule_for_the_exit_code(
    command: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "ok.png")
    for folder, good, bad in (("all", 2, 0), ("some", 2, 1), ("none", 0, 2)):
        lines = ["source,target,points"]
        for number in range(good + bad):
            path = tmp_path / folder / f"{'abcd'[number]}.png"
            picture(path, number)
            if number >= good:
                path.write_bytes(b"no picture")
            lines.append(f'{folder}/a.png,{folder}/{path.name},"3,3"')
        (tmp_path / f"{folder}.csv").write_text("\n".join(lines))
        words = [word.replace("IN", folder).replace("OUT", f"out-{folder}") for word in command.split()]
        words = [folder + "-w" if word == "w" else word for word in words]
        capsys.readouterr()
        assert main(words) == (0 if bad == 0 else 2)
        last = capsys.readouterr().err.splitlines()[-1:]
        assert bad == 0 or last[0].startswith(f"diffrep {words[0]}: ")
        assert (tmp_path / f"out-{folder}" / file).is_file() == (good > 0)
        if bad == 2:
            assert not any((tmp_path / "out-none").glob("*"))
