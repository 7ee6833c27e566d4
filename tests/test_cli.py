from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from diffrep import tasks
from diffrep.backbones.repositories import MODELS
from diffrep.cli import COMMANDS, command_kind, error_line, main
from diffrep.commands.match import Match
from diffrep.commands.options import DeviceOptions
from diffrep.commands.parsing import UsageError, options_of, read_command
from diffrep.commands.predict import Depth
from diffrep.images import load_image


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
    assert all(f"  {name} " in text for name in COMMANDS if " " not in name)
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    short = capsys.readouterr().out
    assert f"usage: diffrep {name} " in short
    everything = _everything(name, capsys)
    shown, all_options = (re.findall(r"^  (?:-\w, )?(--[\w.\[\]-]+)", text, re.M) for text in (short, everything))
    assert len(shown) == min(10, len(all_options))
    assert set(shown) <= set(all_options)
    if len(shown) < len(all_options):
        assert re.search(rf"^{len(all_options) - 10} more options?: diffrep {name} --help-all$", short, re.M)
    for text in (short, everything):
        assert "{None}" not in text
        assert "None)" not in text
        assert "(default: )" not in text


def _everything(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*name.split(), "--help-all"]) == 0
    return capsys.readouterr().out


def test_help_shows_ten_options_and_the_rest_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "--help"]) == 0
    short = capsys.readouterr().out
    everything = _everything("match", capsys)
    assert len(re.findall(r"^  -", short, re.M)) == 10
    hidden = len(re.findall(r"^  -", everything, re.M)) - 10
    assert f"{hidden} more options: diffrep match --help-all" in short
    assert "--matching.temperature" in everything
    assert "--matching.temperature" not in short
    assert "--taps" in short  # named in `FIRST`, though it is one of the shared settings of extraction


@pytest.mark.slow
def test_no_help_loads_a_library_and_all_say_the_same_as_with_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    pages = [name for name, (home, _) in COMMANDS.items() if home]
    code = (
        "import contextlib, io, json, sys; from diffrep.cli import main\n"
        "pages = {}\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "        assert main([*name.split(), '--help-all']) == 0, name\n"
        "    pages[name] = said.getvalue()\n"
        "heavy = {'torch', 'numpy', 'scipy', 'PIL', 'diffusers', 'transformers', 'sklearn'} & set(sys.modules)\n"
        "print(json.dumps([pages, sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *pages], capture_output=True, text=True, check=True)
    light, heavy = json.loads(done.stdout)
    assert heavy == []
    for name in pages:
        assert light[name] == _everything(name, capsys), name


@pytest.mark.parametrize("name", ["match", "depth"])
def test_help_loads_nothing_heavy(name: str) -> None:
    code = (
        "import sys, time; from diffrep.cli import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'scipy', 'diffusers', 'transformers', 'faiss', 'sklearn'} & set(sys.modules)\n"
        "print('heavy:', *heavy, file=sys.stderr)\n"
        "print('seconds:', time.process_time(), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *name.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "heavy:\n" in done.stderr
    assert float(done.stderr.split()[-1]) < 1


@dataclass(frozen=True, kw_only=True)
class _Inner:
    speed: float = 1.0  # beside
    # above, in
    # two lines
    turn: int = 0
    bare: str = "a # b"
    late: tuple[int, ...] = ()  # on its last line


@dataclass(frozen=True, kw_only=True)
class _Sample(DeviceOptions):
    """A command."""

    place: Annotated[Path, tyro.conf.Positional]  # where
    name: str = "plain"  # which settings
    # for nothing
    pair: tuple[float, float] | None = None
    preview: bool = True  # a picture
    inner: _Inner = field(default_factory=_Inner)

    def defaults(self) -> _Sample:
        return replace(self, inner=replace(self.inner, speed=7.0, turn=7)) if self.name == "fast" else self


def test_a_comment_belongs_to_one_option() -> None:
    texts = {option.field: option.help for option in options_of(_Sample)}
    assert texts == {
        "place": "where",
        "name": "which settings",
        "pair": "for nothing",
        "preview": "a picture",
        "device": "where the networks run: auto, cpu, cuda, cuda:N or mps",
        "inner.speed": "beside",
        "inner.turn": "above, in two lines",
        "inner.bare": "",
        "inner.late": "on its last line",
    }


@pytest.mark.parametrize("name", [name for name, (home, _) in COMMANDS.items() if home])
def test_every_option_has_a_help_text(name: str) -> None:
    kind = command_kind(name)
    options = options_of(kind)
    assert not [option.field for option in options if not option.help]
    assert set(getattr(kind, "FIRST", "").split()) <= {option.field for option in options}


def test_a_repeated_option_gives_all_its_values_once() -> None:
    words = "a.png b.png --recipe tiny --backbone diffusion=X --points 1,2 --lora L"
    words += " --backbone=vit=Y --points 3,4 --lora M:2"
    command = read_command(Match, words.split(), "diffrep match")
    assert command.backbone == ("diffusion=X", "vit=Y")
    assert command.points == ("1,2", "3,4")
    assert command.lora == ("L", "M:2")  # a recipe's defaults are read after a first pass: not each one twice
    command = read_command(Match, ["a.png", "b.png", "--backbone", "X", "--points=1,2", "--lora", "L"], "diffrep match")
    assert (command.backbone, command.points, command.lora) == (("X",), ("1,2",), ("L",))


@pytest.mark.parametrize(
    ("words", "value"), [([], None), (["--decoder"], True), (["--no-decoder"], False), (["--decoder=False"], False)]
)
def test_a_flag_whose_default_depends_on_others_takes_no_value(words: list[str], value: bool | None) -> None:
    kind = command_kind("train depth")
    command = read_command(kind, [*words, "--steps", "3"], "diffrep train depth")
    assert (command.decoder, command.steps, "decoder" in command.typed) == (value, 3, value is not None)
    assert "--[no-]decoder" in [option.usage() for option in options_of(kind)]


@pytest.mark.parametrize("option", [("--timestep", "5"), ("--prompt", "a cat"), ("--ensemble", "2")])
def test_a_transformer_takes_no_noise(
    option: tuple[str, str],
    vit_folder: Path,
    photos: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = str(tmp_path / "store")
    for words in (["match", *photos, "--points", "3,3"], ["extract", photos[0], "-o", store]):
        assert f"{option[0]} is for " in fails(capsys, *words, "--backbone", str(vit_folder), *option)
    assert not Path(store).exists()


def test_what_was_typed_wins_over_defaults_that_depend_on_it() -> None:
    def read(*words: str) -> _Sample:
        return read_command(_Sample, ["here", *words], "sample")

    assert read().inner == _Inner()
    assert read("--name", "fast").inner == _Inner(speed=7.0, turn=7)
    typed = read("--name", "fast", "--inner.speed", "1.0")  # the value that is its default anyway
    assert typed.inner == _Inner(speed=1.0, turn=7)
    assert typed.typed == {"name", "inner.speed"}
    assert read("--no-preview", "--inner.late", "-1", "2", "--device=cpu").typed == {"preview", "inner.late", "device"}


@pytest.mark.parametrize("words", [["--fit", "least squares"], ["--fit=least_squares"], ["--fit", "least-squares"]])
def test_a_choice_is_known_however_its_words_are_joined(words: list[str]) -> None:
    assert read_command(Depth, ["least squares", *words], "depth") == Depth(
        images=("least squares",), fit="least-squares"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "PLACE is missing: where"),
        (["here", "--nam", "x"], "no option --nam; near names: --name"),
        (["here", "--inner.speed", "fast"], "--inner.speed must be a number, got 'fast'"),
        (["here", "--inner.turn", "1.5"], "--inner.turn must be a whole number, got '1.5'"),
        (["here", "--inner.late", "1", "x"], "--inner.late must be a whole number, got 'x'"),
        (["here", "--pair", "1"], "--pair needs X X"),
        (["here", "--name"], "--name needs TEXT"),
        (["here", "there"], "cannot place 'there'"),
        (["here", "--pair", "1", "2", "3"], "cannot place '3'"),
    ],
)
def test_usage_errors_name_the_culprit_in_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        read_command(_Sample, words, "sample")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["eval probes", "probe sweep none", "train depth", "embed none.npy"])
def test_a_device_is_refused_before_anything_is_made(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever in a command the option lies."""
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--device", "nonsense"]) == 2
    assert "device must be auto, cpu, cuda, cuda:N or mps, got 'nonsense'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_errors_of_any_kind_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, says in (
        (ValueError("two\nlines"), 2, "diffrep info: two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 2, "diffrep info: a.png: No such file"),
        (KeyError("up.1"), 1, "diffrep info: KeyError: 'up.1'; --traceback shows where"),
        (RecursionError(), 1, "diffrep info: RecursionError: no message"),
        (MemoryError(), 1, "diffrep info: out of memory"),
    ):

        def run(self: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("diffrep.commands.info.Info.run", run)
        assert main(["info"]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(says)
        assert main(["info", "--traceback"]) == code
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_output_that_nobody_reads_ends_quietly() -> None:
    program = f"{sys.executable} -m diffrep info tiny --all"
    done = subprocess.run(
        ["bash", "-c", f"{program} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0: all was written before the reader left


def test_streams_that_are_closed_are_no_fault() -> None:
    for closed in (">&-", ">&- 2>&-", "<&- 2>&-"):
        command = f"{sys.executable} -m diffrep info tiny {closed}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_terminated_command_cleans_up(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from diffrep.cli import main\n"
        "from diffrep.commands.info import Info\n"
        "from diffrep.files import write_whole\n"
        "def write(path):\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"Info.run = lambda self: write_whole(Path({str(tmp_path)!r}) / 'a.txt', write)\n"
        "sys.exit(main(['info']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_terminated_while_it_is_read_says_nothing_of_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminate(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tyro, "cli", terminate)
    with pytest.raises(SystemExit) as stop:
        main(["info"])
    assert stop.value.code == 143
    assert capsys.readouterr().err == ""


def test_unknown_commands_name_their_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    assert "near names: match" in fails(capsys, "matsch")
    assert "no command 'zzz'; commands: demo," in fails(capsys, "zzz")


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
    assert "`diffrep info` lists the names" in fails(capsys, "info", "nothing")


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
    assert "made for its taps" in fails(capsys, "match", a, b, "--points", "1,1", "--taps", "mid", "-o", output)
    assert not output.exists()


def test_a_process_that_fails_exits_with_two(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffrep", "info", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["depth", "a.png", "--size", "9" * 20],
        ["probe", "sweep", "x", "--pool", "1", "9" * 20],
        ["probe", "feedback", "x", "--fit.width", "-" + "9" * 20],
    ],
)
def test_whole_numbers_that_no_library_takes_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "9999" in error


def test_frames_of_c_are_no_message() -> None:
    error = RuntimeError("value cannot be converted\nException raised from fn at x.cpp:1\nframe #1: std::f (0x7f)\n")
    assert error_line(error) == "RuntimeError: value cannot be converted; --traceback shows where"


def test_a_quoted_tilde_is_the_home_folder_in_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: tuple[str, str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["~/a.png", "~/b.jpg", "-o", "~/m.png"], ["~/a.png", "~/b.jpg", "--output=~/m.png"]):
        command = read_command(Match, [*words, "--backbone=diffusion=~/sd", "vit=~/dino"], "diffrep match")
        assert (command.a, command.output) == (tmp_path / "a.png", tmp_path / "m.png")
        assert command.backbone == (f"diffusion={tmp_path}/sd", f"vit={tmp_path}/dino")
    assert main(["depth", "~/a.png", "-o", "~/maps"]) == 0
    assert (tmp_path / "maps" / "a_disparity.png").is_file()
    (embedded,) = read_command(command_kind("sample"), ["~ the sea = ~/", "-o", "~/x.png"], "diffrep sample").prompt
    assert embedded == "~ the sea = ~/"
    assert load_image("~/a.png").size == (90, 70)


def test_the_note_about_an_embedded_model_comes_once_and_not_where_it_was_replaced(
    photos: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tiny", "tiny-dino"):
        shutil.copytree(MODELS / name, tmp_path / f"own-{name}")
    tasks._say.cache_clear()
    words = ["match", *photos, "--points", "3,3", "-o", str(tmp_path / "m.png"), "--recipe", "tiny"]
    own = [f"diffusion={tmp_path}/own-tiny", f"vit={tmp_path}/own-tiny-dino"]
    assert main([*words, "--backbone", *own]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main(words) == 0
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert note.startswith("note: tiny is a small model")
    assert "--recipe sd2.1-dinov2" in note
    assert main(words) == 0
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "match match.png b.png --points 1,2",
        "match b.png match.png --dense -o ./match.png",
        "swap b.png a.png --mask-a match.png -o match.png",
        "swap b.png a.png -o m.png --sheet b.png",
        "query i query.png",
        "search b match.png -o match.png",
        "synthesize --reference match.png -o match.png",
        "depth clip.mp4 -o clip.mp4",
    ],
)
def test_no_command_writes_over_what_it_reads(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("a.png", "b.png", "match.png", "query.png", "clip.mp4")
    for name in names:
        Path(name).write_text("kept")
    assert main(command.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "is a file to be read, which would be written over" in line
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "kept")


def test_two_pictures_of_one_name_are_refused(photos: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "would be one file" in fails(capsys, "swap", *photos, "-o", "m.png", "--sheet", "./m.png")
