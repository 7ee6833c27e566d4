"""``diffrep match --pairs``: many pairs of a table, with the models loaded once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffrep.cli import main
from diffrep.commands.match import read_pairs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b", "c")):
        noise = Image.effect_noise((90 - 10 * number, 70), 60 + 20 * number)
        noise.convert("RGB").save(tmp_path / f"{name}.png")
    return tmp_path


def table(folder: Path, text: str) -> str:
    (folder / "pairs.csv").write_text(text)
    return str(folder / "pairs.csv")


def test_rows_give_what_the_single_command_gives(
    photos: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'source,target,points\na.png,b.png,"10,20 40,30"\nb.png,a.png,"5,5;7,9"\na.png,b.png,\n'
    common = ["--backbone", str(sd_folder), "--size", "64", "--json"]
    pairs = ["match", "--pairs", table(photos, text), "--points", "1,2", "-o", str(photos / "out"), *common]
    assert main(pairs) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in report["pairs"]] == [1, 2, 3]
    names = ["a-b-2.png", "a-b.png", "b-a.png"]
    assert sorted(path.name for path in (photos / "out").iterdir()) == names
    asked = (["10,20", "40,30"], ["5,5", "7,9"], ["1,2"])
    for row, points in zip(report["pairs"], asked, strict=True):
        picture = photos / "one.png"
        assert main(["match", row["a"], row["b"], "--points", *points, "-o", str(picture), *common]) == 0
        single = json.loads(capsys.readouterr().out)
        for key in ("a", "b", "points", "matches"):
            assert row[key] == single[key]
        assert row["scores"] == pytest.approx(single["scores"], abs=1e-5)
        assert report["recipe"] == single["recipe"]


def test_each_image_is_read_once_and_existing_pictures_are_left(
    photos: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffrep.backbones import LatentDiffusion

    seen: list[int] = []
    plain = LatentDiffusion.encode

    def counting(self: LatentDiffusion, pixels: object, **options: object) -> object:
        seen.append(len(pixels))  # type: ignore[arg-type]
        return plain(self, pixels, **options)  # type: ignore[arg-type]

    text = "source,target\n" + "".join(f"{a}.png,{b}.png\n" for a, b in ("ab", "bc", "ca", "ba"))
    command = ["match", "--pairs", table(photos, text), "--points", "9,9", "-o", str(photos / "out")]
    command += ["--backbone", str(sd_folder), "--size", "64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentDiffusion, "encode", counting)
        assert main(command) == 0
        assert sum(seen) == 3
        printed = capsys.readouterr().out
        assert printed.count("(9, 9) -> (") == printed.count("wrote ") == 4
        (photos / "out" / "b-c.png").unlink()
        seen.clear()
        assert main([*command, "--skip-existing"]) == 0
        assert sum(seen) == 2
    again = capsys.readouterr()
    assert again.out.count("wrote ") == 1
    assert "skipped 3 pairs" in again.err
    assert main([*command, "--skip-existing"]) == 0
    assert "skipped 4 pairs" in capsys.readouterr().err


def test_what_fails_is_named_by_its_row_and_the_others_are_done(
    photos: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'source,target,points\na.png,gone.png,"1,1"\na.png,b.png,"500,1"\na.png,b.png,"3,4"\n'
    command = ["match", "--pairs", table(photos, text), "-o", str(photos / "out")]
    assert main([*command, "--backbone", str(sd_folder), "--size", "64"]) == 2
    said = capsys.readouterr()
    assert said.out.count("wrote ") == 1
    last = said.err.strip().splitlines()[-1]
    assert "2 of 3 pairs failed" in last
    assert "row 1: " in last
    assert "gone.png" in last
    assert "row 2: " in last
    assert "outside the image" in last


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs the columns source and target"),
        ("left,right\na.png,b.png\n", "has left, right"),
        ("source,target,colour\na.png,b.png,red\n", "a column 'colour'"),
        ("source,target,points\na.png,b.png,1,2\n", "row 1: has more cells than columns"),
        ("source,target,points\na.png,,\n", "row 1: has no target"),
        ('source,target,points\na\0.png,b.png,"1,2"\n', "row 1: has no source|line contains NUL"),
        ("source,target\na.png,b.png\n", "row 1: has no points"),
        ('source,target,point1\na.png,b.png,"1,2"\na.png,b.png,"1,x"\n', "row 2: cannot read the point '1,x'"),
        ("source,target\n\xff\n", "cannot be read as a table"),
    ],
)
def test_a_table_that_is_none_is_refused_before_any_work(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "pairs.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=says):
        read_pairs(tmp_path / "pairs.csv")


def test_options_that_do_not_go_together(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = table(photos, 'source,target,points\na.png,b.png,"1,1"\n')
    for arguments, says in (
        (["a.png", "--pairs", pairs], "without A, B"),
        (["--pairs", pairs, "--json", "--skip-existing"], "say their folder"),
        (["a.png", "b.png", "--points", "1,1", "--skip-existing"], "goes with --pairs"),
        (["a.png", "--points", "1,1"], "B is missing"),
        ([], "A is missing"),
        (["--pairs", str(photos / "gone.csv")], "gone.csv"),
        (["--pairs", pairs, "-o", pairs], "is a file"),
    ):
        assert main(["match", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_every_pair_has_a_picture_of_its_own_that_is_no_input(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("a.png,b.png", "a.png,b.png", "a.png,b-2.png", "A.png,b.png")
    names = [p.name for p in read_pairs(Path(table(photos, "source,target\n" + "\n".join(rows))), ["1,2"])]
    assert names == ["a-b", "a-b-2", "a-b-2-2", "A-b-3"]
    before = (photos / "c.png").rename(photos / "a-b.png").read_bytes()
    both = table(photos, "source,target\na.png,b.png\nb.png,a-b.png")
    assert main(["match", "--pairs", both, "--points", "1,2", "-o", str(photos)]) == 2
    assert "a-b.png: is a file to be read, which would be written over" in capsys.readouterr().err
    assert (photos / "a-b.png").read_bytes() == before
