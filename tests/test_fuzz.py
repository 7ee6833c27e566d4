"""Every command with inputs that are damaged, oddly named or of another kind, and with values that cannot be.

Each run must end with 0, or with 2 and one line that begins with the command; no traceback, nothing written beside the
output, and nothing left of a run that was refused. The commands run in this process, so that networks load once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffrep.cli import main
from diffrep.index import IndexConfig, index_store
from diffrep.store import BulkConfig, Keep, extract_store, open_store

SECONDS = 60  # after which a run is taken to hang

IMAGE, IMAGES, TABLE, STORE, INDEX, MODEL, DATA, FOLDER, POINTS, OUT = (
    f"<{kind}>" for kind in ("image", "images", "table", "store", "index", "model", "data", "folder", "points", "out")
)
COMMANDS = {  # each as it works; every <...> but <out> is replaced by what does not
    "match": f"match {IMAGE} {IMAGE} --points 3,3 -o {OUT}/m.png",
    "swap": f"swap {IMAGE} {IMAGE} --mask-a {IMAGE} --whole -o {OUT}/s.png",
    "extract": f"extract {IMAGES} -o {OUT}/s --backbone tiny-dino --workers 0",
    "extract-points": f"extract ok.png -o {OUT}/s --backbone tiny-dino --workers 0 --keep.kind points"
    f" --keep.points {POINTS}",
    "extract-backbone": f"extract ok.png -o {OUT}/s --workers 0 --backbone {MODEL}",
    "index": f"index {STORE} -o {OUT}/i",
    "query": f"query {INDEX} {IMAGE} --point 3,3 -o {OUT}/q.png",
    "search": f"search {IMAGES} {IMAGE} --point 3,3 --backbone tiny-dino --work {OUT}/w -o {OUT}/q.png",
    "depth": f"depth {IMAGES} -o {OUT}/d",
    "normals": f"normals {IMAGES} -o {OUT}/n",
    "segment": f"segment {IMAGES} -o {OUT}/g",
    "depth-model": f"depth ok.png -o {OUT}/d --model {MODEL}",
    "segment-model": f"segment ok.png -o {OUT}/g --model {MODEL}",
    "embed": f"embed {TABLE} -o {OUT}/e.png",
    "synthesize": f"synthesize --reference {IMAGE} --size 64x64 -o {OUT}/y.png",
    "convert": f"convert {MODEL} -o {OUT}/c",
    "probe-train": f"probe train {DATA} --cells tiny-dino -o {OUT}/p --work {OUT}/w",
    "probe-predict": f"probe predict {MODEL} {IMAGES} -o {OUT}/p.csv",
    "info": f"info {MODEL}",
    "eval-correspondence": f"eval correspondence --benchmark spair --recipe tiny --data {FOLDER} --work {OUT}/w",
    "eval-segmentation": f"eval segmentation --benchmark dis --data {FOLDER}",
    "eval-depth": f"eval depth --benchmark nyuv2 --root {FOLDER}",
    "train-synthesis": f"train synthesis --images {IMAGES} --work {OUT}/w -o {OUT}/t --base nobody/nothing",
}
WORKS = {  # what a command gets where it is another argument's turn
    IMAGE: "ok.png",
    IMAGES: "ok.png",
    TABLE: "ok.csv",
    STORE: "ok.store",
    INDEX: "ok.index",
    MODEL: "tiny-dino",
    DATA: "ok.data",
    FOLDER: "gone",
    POINTS: "grid:2",
}
ANYWHERE = ("gone", "", "x" * 300, "nul\0byte", "empty-folder", "fifo", "empty", "ok.png/below")
BAD = {
    IMAGE: (*ANYWHERE, "cut.png", "text.png", "deep.json", "huge.png", "nan.tif", "two\nlines.png", "caf\udce9.png"),
    IMAGES: (*ANYWHERE, "cut.png", "text.png", "huge.png", "mixed", "[", "*.nothing", "bad.tar", "bad.parquet"),
    TABLE: (*ANYWHERE, "ok.png", "deep.json", "objects.npy", "cut.npy", "cut.npz", "words.csv", "one.csv", "nan.csv",
            "binary.csv", "bad.parquet", "bad.h5ad", "deep.store", "linked.store"),
    STORE: (*ANYWHERE, "ok.png", "deep.store", "null.store", "cut.store", "named.store", "ok.index"),
    INDEX: (*ANYWHERE, "ok.png", "deep.index", "null.index", "cut.index", "hub.index", "ok.store"),
    MODEL: (*ANYWHERE, "ok.png", "deep.model", "null.model", "cut.safetensors", "lying.safetensors", "pickle.pt",
            "words.csv", "tiny-dyno", "nobody/nothing"),
    DATA: (*ANYWHERE, "ok.png", "words.csv", "binary.csv", "bad.tar", "bad.parquet", "one.data"),
    FOLDER: (*ANYWHERE, "ok.png", "ok.data"),
    POINTS: ("gone.json", "deep.json", "null.json", "here.json", "grid:0", "random:x", "empty"),
}  # fmt: skip
VALUES = [  # (command, option, value)
    *((name, "--device", value) for name in ("match", "extract", "query", "depth", "segment", "search")
      for value in ("nonsense", "meta", "cuda:99", "")),
    *(("extract", option, value) for option, value in (
        ("--size", "0"), ("--size", "-5"), ("--size", "100000000"), ("--size", "x"), ("--batch-size", "0"),
        ("--taps", "up.99"), ("--window", "3"), ("--seed", "1" + "0" * 30), ("--workers", "-1"), ("--actors", "0"),
        ("--shard-images", "0"), ("--timestep", "1001"), ("--ensemble", "0"), ("--precision", "float7"),
        ("--keep.dtype", "int8"), ("--changed", "maybe"), ("--nonsense", "1"))),
    *(("query", option, value) for option, value in (
        ("-k", "0"), ("-k", "x"), ("-k", "1" + "0" * 30), ("--point", "nan,nan"), ("--point", "3"),
        ("--point", "9e9,3"), ("--box", "1,1,2,2"), ("--backbone", "tiny"), ("-o", "q.nothing"),
        ("-o", "empty-folder"))),
    *(("index", option, value) for option, value in (
        ("--kind", "ivf"), ("--kind", "tree"), ("--tap", "up.99"), ("--level", "image"), ("--sample", "0"),
        ("--seed", "1" + "0" * 30), ("--device", "cuda"), ("-o", "ok.store"))),
    *(("search", option, value) for option, value in (("-k", "-1"), ("--point", ","), ("--work", "ok.png"))),
    ("match", "--points", "9999,3"), ("match", "--points", "x"), ("match", "--recipe", "nothing"),
    ("embed", "--color", "nothing"), ("embed", "--n-components", "0"), ("embed", "--method", "nothing"),
]  # fmt: skip


def cases() -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of every run."""
    for name, template in COMMANDS.items():
        parts = template.split(" ")
        for at, part in enumerate(parts):
            for number, bad in enumerate(BAD.get(part, ())):
                filled = [WORKS.get(other, other) for other in parts]
                filled[at] = bad
                yield f"{name}-{at}-{number}-{ascii(bad)[1:-1][:20]}", filled
    for name, option, value in VALUES:
        parts = [WORKS.get(part, part) for part in COMMANDS[name].split(" ")]
        yield f"{name}{option}={value[:12]}", [*parts, option, value]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound and of damaged inputs."""
    folder = tmp_path_factory.mktemp("world")
    picture = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((64, 48), Image.Resampling.BICUBIC))
    for name in ("ok.png", "two\nlines.png", "caf\udce9.png", "mixed/a.png", "one.data/a/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name)
    for label in ("left", "right"):
        for number in range(4):
            (folder / "ok.data" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(picture, number * 7, 1)).save(folder / "ok.data" / label / f"{number}.png")
    (folder / "empty-folder").mkdir()
    os.mkfifo(folder / "fifo")
    sound = (folder / "ok.png").read_bytes()
    (folder / "mixed/b.png").write_bytes(sound[: len(sound) // 2])
    (folder / "mixed/c.jpg").write_bytes(b"no picture")
    table = "a,b,c\n" + "\n".join(f"{i},{i * i % 7},{-i}" for i in range(30)) + "\n"
    np.save(folder / "whole.npy", np.arange(30.0).reshape(10, 3))
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(folder / "whole.npz", a=np.arange(30.0).reshape(10, 3))
    header = struct.pack("<Q", 10**15)
    Image.fromarray(np.array([[np.nan, 1]], np.float32)).save(folder / "nan.tif")
    torch.save({"f": print}, folder / "pickle.pt")
    save_file({"w": torch.zeros(2, 2)}, folder / "lying.safetensors")
    contents: dict[str, bytes | str] = {
        "empty": b"",
        "cut.png": sound[: len(sound) // 2],
        "text.png": "no picture",
        "huge.png": sound[:16] + struct.pack(">II", 60000, 60000) + sound[24:],
        "deep.json": "[" * 100_000,
        "null.json": "null",
        "here.json": '{"ok.png": "here"}',
        "ok.csv": table,
        "words.csv": "a,b\nx,y\n\n",
        "one.csv": "a,b,c\n1,2,3\n",
        "nan.csv": "a,b\n" + "nan,nan\n" * 5,
        "binary.csv": bytes(range(256)) * 4,
        "cut.npy": (folder / "whole.npy").read_bytes()[:100],
        "cut.npz": (folder / "whole.npz").read_bytes()[:100],
        "bad.parquet": b"PAR1 nothing at all PAR1",
        "bad.h5ad": b"\x89HDF\r\n\x1a\n nothing at all",
        "bad.tar": b"nothing at all" * 100,
        "cut.safetensors": header + b"{}",
        "deep.model/config.json": "[" * 100_000,
        "deep.model/model_index.json": "[" * 100_000,
        "null.model/model_index.json": "null",
        "null.model/config.json": "null",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    extract_store(
        [folder / "ok.data"], folder / "ok.store", "tiny-dino", None, Keep(kind="maps"), BulkConfig(workers=0)
    )
    index_store([open_store(folder / "ok.store")], folder / "ok.index", IndexConfig())
    for form, file in (("store", "manifest.json"), ("index", "index.json")):
        for damage, text in (("deep", "[" * 100_000), ("null", "null")):
            shutil.copytree(folder / f"ok.{form}", folder / f"{damage}.{form}")
            (folder / f"{damage}.{form}" / file).write_text(text)
        shutil.copytree(folder / f"ok.{form}", folder / f"cut.{form}")
        for tensors in (folder / f"cut.{form}").rglob("*.safetensors"):
            os.truncate(tensors, 50)
    for damage in ("named", "linked"):
        shutil.copytree(folder / "ok.store", folder / f"{damage}.store")
    manifest = json.loads((folder / "ok.store/manifest.json").read_text())
    manifest["shards"][0]["name"] = "../../victim"
    (folder / "named.store/manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "linked.store/shards")
    (folder / "linked.store/shards").symlink_to(folder / "nowhere")
    shutil.copytree(folder / "ok.index", folder / "hub.index")
    description = json.loads((folder / "ok.index/index.json").read_text())
    description["features"]["backbone"] = "nobody/nothing"
    (folder / "hub.index/index.json").write_text(json.dumps(description))
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """path -> size and time of change, of everything in a folder."""
    paths = [Path(parent, name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


@pytest.mark.filterwarnings("ignore")  # of libraries that read what is damaged
@pytest.mark.parametrize(("name", "arguments"), [pytest.param(*case, id=case[0]) for case in cases()])
def test_whatever_is_put_in(
    name: str,
    arguments: list[str],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def hangs(number: int, frame: object) -> None:
        raise AssertionError(f"{arguments} hangs")

    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.chdir(world)
    before = state(world)
    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        code = main([argument.replace(OUT, str(output)) for argument in arguments])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    error = capsys.readouterr().err
    assert code in (0, 2), error
    assert "Traceback" not in error
    assert state(world) == before
    assert not [path for path in output.rglob("*") if ".partial" in path.name]
    if code == 2:
        command = name.partition("-")[0]
        lines = [line for line in re.split(r"[\r\n]+", error) if line.startswith(f"diffrep {command}")]
        lines = [line for line in lines if ": left out " not in line]  # what was said before the refusal
        assert len(lines) == 1, error
        assert error.rstrip("\n").endswith(lines[0])
        assert len(lines[0]) < 1000
        if not {"mixed", ""} & set(arguments):  # folders, some of whose images are sound
            assert not {path.name for path in output.iterdir()} - {"w"}  # w: what a later run goes on from
