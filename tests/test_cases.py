"""Small inputs from reports of faults, run as they were reported."""

from __future__ import annotations

import importlib
import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from diffrep.cli import main
from diffrep.images import load_image


def test_a_newline_in_a_name_goes_through_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, colour in (("plain", (200, 30, 30)), ("two\nlines", (30, 200, 30))):
        Image.new("RGB", (64, 64), colour).save(f"photos/{name}.png")
    assert main(["extract", "photos", "-o", "s", "--backbone", "tiny-dino", "--workers", "0"]) == 0
    assert main(["index", "s", "-o", "i"]) == 0
    capsys.readouterr()
    assert main(["query", "i", "photos/plain.png", "-o", "q.png"]) == 0
    assert r"two\nlines.png" in capsys.readouterr().out
    with Image.open("q.png") as sheet:
        assert sheet.width > 64


@pytest.mark.parametrize("content", [b"[1]", b"null", b"3", b'"text"'])
def test_labels_of_another_type_name_archive_and_member(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    with tarfile.open("a.tar", "w") as archive:
        for name, data in (("0.png", picture.getvalue()), ("0.json", content)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert main(["probe", "train", "a.tar", "--work", "w", "-o", "p"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "a.tar" in line
    assert "label of 0 cannot be read (its .json" in line
    assert not Path("p").exists()


def test_a_table_of_labels_in_another_encoding_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.csv").write_bytes("path,label\na.png,Bär\n".encode("latin-1"))
    assert main(["probe", "train", "latin.csv", "--work", "w", "-o", "p"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "latin.csv" in line


@pytest.mark.parametrize(
    "command",
    ["probe sweep photos --backbones", "eval manifold --seeds", "eval manifold --score", "eval manifold --seeds -1"],
)
def test_options_without_a_value_are_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert next(word for word in command.split() if word.startswith("--")) in line


@pytest.mark.parametrize("module", ["dense", "image_runs"])
def test_names_of_outputs_are_imported_from_their_former_place(module: str) -> None:
    output_names = importlib.import_module(f"diffrep.commands.{module}").output_names
    assert output_names([Path("a/x.png"), Path("a/y.png")]) == {Path("a/x.png"): "x", Path("a/y.png"): "y"}


def test_no_backbone_to_probe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "data" / name / f"{i}.png")
    assert main(["probe", "train", str(tmp_path / "data"), "--cells", "--work", str(tmp_path / "w")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--cells" in line


def test_a_turned_photograph_is_turned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    picture.save("photos/turned.jpg", exif=exif, quality=95)
    Image.radial_gradient("L").resize((64, 64)).save("photos/other.png")
    once = load_image("photos/turned.jpg")
    assert once.size == (64, 96)
    assert load_image(once) == once
    assert load_image(Image.open("photos/turned.jpg")) == once
    assert main(["segment", "photos", "-o", "out"]) == 0
    capsys.readouterr()
    for _ in range(2):  # the sheet lies in the folder the second time, and is no photograph
        question = ["search", "photos", "photos/turned.jpg", "-o", "photos/found.png", "--backbone", "tiny-dino"]
        assert main(question) == 0
        first, *rest = capsys.readouterr().out.splitlines()
        assert first.split() == ["1", "1.000", "turned.jpg"]
        assert len(rest) == 2  # the other image, and where the sheet went
    before = Path("photos/other.png").read_bytes()
    assert main(["search", "photos", "photos/turned.jpg", "-o", "photos/other.png"]) == 2
    assert "photos/other.png: is one of the images in photos" in capsys.readouterr().err
    assert Path("photos/other.png").read_bytes() == before


def test_an_image_thinner_than_a_cell_is_searched_and_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("thin", "both"):
        Path(folder).mkdir()
        Image.new("RGB", (3000, 1), (9, 90, 9)).save(f"{folder}/line.png")
    Image.radial_gradient("L").resize((64, 64)).save("both/round.png")
    place = ["--point", "5,0", "-o", "q.png", "--backbone", "tiny"]
    assert main(["search", "both", "both/line.png", *place]) == 0
    assert "round.png" in capsys.readouterr().out
    assert main(["search", "thin", "both/line.png", *place]) == 2
    assert "no image covers a cell" in capsys.readouterr().err
    assert main(["search", "thin", "both/line.png", "-o", "q.png"]) == 0
    assert "1.000  line.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("eval segmentation --data .", "benchmark scenes takes no --data"),
        ("eval segmentation --benchmark dis --data . --compare tiny-segmentation", "benchmark dis takes no --compare"),
        ("eval depth --root .", "benchmark scenes takes no --root"),
        ("eval depth --benchmark nyuv2 --root . --count 3", "benchmark nyuv2 takes no --count"),
        ("eval normals --average images", "benchmark scenes takes no --average"),
    ],
)
def test_an_option_that_a_benchmark_does_not_take_is_refused(
    command: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line
