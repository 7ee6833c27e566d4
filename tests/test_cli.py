from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.cli import COMMANDS, main


@pytest.fixture
def photos(tmp_path: Path) -> tuple[str, str]:
    random = np.random.default_rng(0)
    paths = []
    for name, size in (("a.png", (70, 90)), ("b.jpg", (64, 50))):
        coarse = random.integers(0, 255, (7, 9, 3), np.uint8)
        Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths[0], paths[1]


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that must exit with 2."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"diffrep {name}" in capsys.readouterr().out


def test_unknown_commands_name_their_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    assert "near names: match" in fails(capsys, "matsch")


def test_waiting_threads_give_their_core_away_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main(["info", "no-such-backbone"]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["info", "no-such-backbone"]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_info(sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(sd_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"name": "up.1", "channels": 32, "stride": 16, "module": "up_blocks.1"} in facts["taps"]
    assert facts["weights"] == str(sd_folder)
    assert main(["info", str(sd_folder)]) == 0
    text = capsys.readouterr().out
    assert "up.1.attention.0 " in text
    assert ".block." not in text
    assert main(["info"]) == 0
    assert "tiny-dino" in capsys.readouterr().out
    assert "near names" in fails(capsys, "info", "nothing")


def test_match_gives_a_picture_and_numbers(
    sd_folder: Path, photos: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "match.png"
    common = ["--backbone", str(sd_folder), "--taps", "up.1", "up.2", "--size", "64", "--timestep", "50"]
    arguments = ["match", *photos, "--points", "10,20", "60,55.5", *common]
    assert main([*arguments, "-o", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["points"] == [[10, 20], [60, 55.5]]
    assert len(result["scores"]) == 2
    for x, y in result["matches"]:
        assert 0 <= x <= 49
        assert 0 <= y <= 63
    assert result["recipe"]["readings"][0]["extract"]["timestep"] == 50
    with Image.open(output) as picture:
        assert picture.width > 140
    assert [p.name for p in output.parent.iterdir()] == ["match.png"]
    # an image is its own best match
    itself = ["match", photos[0], photos[0], "--points", "10,20", *common, "--json"]
    assert main(itself) == 0
    (point,) = json.loads(capsys.readouterr().out)["matches"]
    assert torch.dist(torch.tensor(point), torch.tensor([10.0, 20.0])) < 16


def test_dense_match_with_masks(
    sd_folder: Path, photos: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((64, 50), np.uint8)
    mask[:, 25:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["match", *photos, "--dense", "--backbone", str(sd_folder), "--taps", "up.2", "--size", "64"]
    assert main([*arguments, "--mask-b", str(tmp_path / "mask.png"), "--json", "-o", str(tmp_path / "field.png")]) == 0
    dense = json.loads(capsys.readouterr().out)["dense"]
    assert len(dense["sources"]) == len(dense["matches"]) > 10
    assert min(x for x, _ in dense["matches"]) >= 25 - 8
    assert (tmp_path / "field.png").is_file()


def test_bad_input_is_one_line(
    sd_folder: Path, photos: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = photos
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(Path(b).read_bytes()[:300])
    empty = tmp_path / "empty.png"
    empty.touch()
    output = tmp_path / "out.png"
    one = ("--points", "1,1", "--backbone", sd_folder, "-o", output)
    assert "--points x,y" in fails(capsys, "match", a, b)
    assert "cannot read the point '7'" in fails(capsys, "match", a, b, "--points", "7")
    assert "(95, 10) lies outside the image of 90 x 70" in fails(capsys, "match", a, b, "--points", "95,10", *one[2:])
    assert "outside" in fails(capsys, "match", a, b, "--points", "nan,1", *one[2:])
    assert "cut.jpg" in fails(capsys, "match", a, cut, *one)
    assert "empty.png: the file is empty" in fails(capsys, "match", empty, b, *one)
    assert "gone.png: no such image" in fails(capsys, "match", tmp_path / "gone.png", b, *one)
    assert "no tap 'up.7'" in fails(capsys, "match", a, b, *one, "--taps", "up.7")
    assert "no such folder" in fails(capsys, "match", a, b, "--points", "1,1", "--backbone", "sd9", "-o", output)
    assert "is no backbone folder" in fails(
        capsys, "match", a, b, "--points", "1,1", "--backbone", tmp_path, "-o", output
    )
    assert "no recipe 'tinny'" in fails(capsys, "match", a, b, "--points", "1,1", "--recipe", "tinny", "-o", output)
    assert "must end in .png" in fails(capsys, "match", a, b, "--points", "1,1", "-o", tmp_path / "x.txt")
    (tmp_path / "dir.png").mkdir()
    assert "is a folder" in fails(capsys, "match", a, b, "--points", "1,1", "-o", tmp_path / "dir.png")
    assert "go with --backbone" in fails(capsys, "match", a, b, "--points", "1,1", "--timestep", "3", "-o", output)
    assert not output.exists()


def test_a_process_that_fails_exits_with_two(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffrep", "info", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr
