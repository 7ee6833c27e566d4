"""No option that a person types is ignored: it changes what comes out, or is refused; or its help says that it cannot.

Each command has a table of its options. A row is ``OPTION WORDS | CONTEXT``: the command runs in the context, without
and with the option. Options that only mean something beside others are refused alone.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffrep.cli import command_kind, main
from diffrep.commands.parsing import options_of
from diffrep.heads.loading import load_head
from diffrep.store import open_store

OUTCOMES = ("changes", "refused", "same", "runs")
SHARED = {  # of several commands
    "changes": ["--precision bfloat16"],
    "runs": ["--batch-size 1"],  # speed and memory alone, but sums are rounded in another order
    "refused": ["--device nonsense", "--variant fp16", "--variant ''", "--revision main", "--revision ''"],
}
TABLES: dict[str, dict[str, list[str]]] = {
    "match": {
        "changes": [
            "--points 12,40",
            "--dense",
            "--recipe tiny-views",
            "--backbone tiny-dino",
            "--size 64 | --backbone tiny",
            "--mask-a @/mask.png | --dense",
            "--mask-b @/mask.png",
            "--taps up.1 | --backbone tiny",
            "--window 64 | --backbone tiny",
            "--timestep 500",
            "--clean",
            "--prompt 'a cat'",
            "--ensemble 3",
            "--seed 3",
            "--posterior sample",
            "--noise inverted",
            "--inversion-steps 3 | --noise inverted",
            "--matching.mode cell",
            "--matching.metric euclidean",
            "--matching.source cell",
            "--matching.mutual",
            "--matching.window 2 | --matching.mode soft",
            "--matching.temperature 0.5 | --matching.mode soft",
            "--matching.outside zero | --matching.mode soft --matching.window 3 --matching.temperature 0.5",
        ],
        "refused": [
            "--schedule @/steps.json",
            "--skip-existing",
            "--pairs @/pairs.csv",
            "--size 64",
            "--lora x.safetensors",
            "--lora '' | --backbone tiny",
            "--taps up.1",
            "--window 32",
            "--ensemble 3 | --clean",
            "--ensemble 3 | --timestep -1",
            "--inversion-steps 3",
            "--label 3",
            "--discard 1 2",
            "--discard 1 2 | --backbone tiny",
            "--clean | --backbone tiny-dino",
            "--prompt x | --backbone tiny-dino",
            "--recipe ''",
            "--backbone ''",
            "--matching.window 2",
            "--matching.temperature 0.5",
            "--matching.outside zero",
            "--matching.backend faiss",
        ],
        # where results go, in which form; speed and memory
        "same": [
            "-o @/other.png",
            "--json",
            "--matching.memory-mb 1",
            "--matching.backend torch",
            "--mask-a @/mask.png",
        ],
    },
    "extract": {
        "changes": [
            "--backbone tiny-dino",
            "--size 64",
            "--taps up.1",
            "--window 64",
            "--timestep 500",
            "--clean",
            "--prompt 'a cat'",
            "--ensemble 3",
            "--seed 3",
            "--posterior sample",
            "--noise inverted",
            "--inversion-steps 3 | --noise inverted",
            "--keep.kind maps",
            "--keep.dtype float32",
            "--keep.points grid:2 | --keep.kind points",
            "--shard-images 1",
            "--root @/..",
        ],
        "refused": [
            "--schedule @/steps.json",
            "--lora x.safetensors",
            "--inversion-steps 3",
            "--label 3",
            "--discard 1",
            "--keep.points grid:2",
            "--actors 2",
            "--address here",
            "--changed never",
        ],
        "same": ["--json", "--workers 1", "--verify", "--engine local"],
    },
    "depth": {
        "changes": [
            "--formats npy",
            "--known @/known.csv | --formats npy",
            "--no-preview",
            "--fit least-squares | --formats npy --known @/known.csv",
            "--fill | --formats npy --known @/known.csv",
            "--known-per-metre 10 | --formats npy --known @/known.png",
            "--known-per-metre 10 | --formats npy --known @/known.2024",  # a folder
            "--guidance.spread 1 | --formats npy --known @/known.csv --fit guided",
            "--guidance.reach 0 | --formats npy --known @/known.csv --fit guided",
            "--intrinsics 50,50,32,24 | --formats ply --intrinsics 60,60,32,24",
            "--field-of-view 90 | --formats ply --field-of-view 60",
            "--normals-model tiny-normals | --formats ply --field-of-view 60",
            "--nearest 2 | --formats ply --field-of-view 60",
            "--farthest 20 | --formats ply --field-of-view 60",
            "--frame lub | --formats ply --field-of-view 60",
            "--size 32",
            "--resample nearest",
            "--posterior sample",
            "--seed 3 | --posterior sample",
            "--ensemble 3 | --posterior sample",
            "--reduction mean | --posterior sample --ensemble 3",
            "--timestep 500",
            "--official",
        ],
        "refused": [
            "--model tiny-normals",
            "--known @/none.csv",
            "--task depth",
            "--variant x",
            "--family e2e-ft",
            "--base nonsense",
            "--fit guided",
            "--fill",
            "--known-per-metre 10",
            "--known-per-metre 10 | --formats npy --known @/known.csv",
            "--guidance.rounds 5",
            "--guidance.rate 5",
            "--guidance.steps 5",
            "--guidance.steps 5 | --formats npy --known @/known.csv --fit guided",
            "--intrinsics 50,50,32,24",
            "--field-of-view 90",
            "--normals-model tiny-normals",
            "--nearest 2",
            "--farthest 20",
            "--frame lub",
            "--ensemble 3",
            "--reduction mean",
            "--steps 3",
            "--spacing leading",
            "--tile 32",
            "--overlap 0.5",
        ],
        # the rounds are judged by known depths that are held out: the first may be the best
        "runs": [
            "--guidance.rounds 2 | --formats npy --known @/known.csv --fit guided",
            "--guidance.rate 0.5 | --formats npy --known @/known.csv --fit guided",
        ],
        "same": ["--skip-existing", "--json"],
    },
    "sample": {
        "changes": [
            "--sampler ddim",
            "--steps 5",
            "--guidance 5",
            "--negative 'a dog'",
            "--size 64 64",
            "--spacing leading",
            "--seed 3",
            "--options order=1",
            "--inherit 3",
            "--branch 2 | --inherit 3",
            "--depths 1 2 3 -1 | --steps 4",
            "--schedule @/steps.json",
        ],
        "refused": [
            "--model tiny-dino",
            "--model ''",
            "--label 3",
            "--negative 'a dog' | --guidance 1",
            "--negative 'a dog' | --sampler lcm",
            "--steps 4 | --schedule @/steps.json",
            "--branch 2",
            "--depths 1",
            "--threshold 0.5",
            "--options nosuch=1",
            "--lora x.safetensors",
        ],
        "same": [],
    },
    "restore": {
        "changes": [
            "--format jpg",
            "--compare",
            "--scale 2",
            "--keep-size",
            "--colours none",
            "--tile 8",
            "--overlap 2 | --tile 8",
            "--posterior sample",
            "--seed 3 | --posterior sample",
        ],
        "refused": [
            "--model tiny-depth",
            "--base nonsense",
            "--prompt x",
            "--guidance 2",
            "--pixel 0.5",
            "--semantic 0.5",
            "--steps 3",
        ],
        "same": ["--skip-existing", "--json"],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, a mask, known depths, a schedule."""
    folder, noise = tmp_path_factory.mktemp("typed"), np.random.default_rng(1)
    for name in "ab":
        picture = Image.fromarray(noise.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        picture.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[10:40, 20:60] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    depth = load_head("tiny-depth", device="cpu")(str(folder / "a.png"), size=64).relative_depth(1, 5).numpy()
    depth = depth * noise.uniform(0.95, 1.05, depth.shape)
    known = np.zeros((48, 64), np.uint16)
    known[2::6, 2::7] = 1000 * depth[2::6, 2::7]
    (folder / "known.2024").mkdir()
    for file in ("known.png", "known.2024/a.png"):
        Image.fromarray(known).save(folder / file)
    places = [f"{x},{y},{known[y, x] / 1000}\n" for y, x in np.argwhere(known)]
    (folder / "known.csv").write_text("".join(places))
    (folder / "steps.json").write_text(json.dumps({"timesteps": [900, 600, 300, 100]}))
    return folder


RUNS = {
    "match": "match @/a.png @/b.png --points 10,10 30,20 --json",
    "extract": "extract @/a.png @/b.png -o OUT",
    "depth": "depth @/a.png --size 64 -o OUT",
    "sample": "sample 'a cat' -o OUT.png",
    "restore": "restore @/a.png -o OUT",
}


def run(command: str, context: str, words: str, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command gives, as a hash of its values; or how it was refused."""
    words = f"{RUNS[command]} {context} {words}".replace("OUT", str(out)).replace("@", str(folder))
    status, said = main(shlex.split(words)), capsys.readouterr()
    if status:
        assert status == 2, said.err
        return "refused: " + said.err.strip().splitlines()[-1]
    if command == "match":
        values = json.loads(said.out)
        return json.dumps(
            {key: values[key] for key in ("points", "matches", "scores", "mutual", "dense") if key in values}
        )
    made = hashlib.sha256()
    for file in sorted([*out.rglob("*"), *out.parent.glob(f"{out.name}.png")]):
        if file.suffix == ".safetensors":
            for key, value in sorted(load_file(file).items()):
                made.update(f"{key}{value.dtype}".encode() + value.tobytes())
        elif file.is_file() and file.suffix != ".json":
            made.update(file.name.encode() + file.read_bytes())
    if command == "extract":
        shards = len(list(out.glob("shards/*.safetensors")))
        made.update(f"{open_store(out).names} {shards}".encode())
    return made.hexdigest()


def rows(command: str, outcome: str) -> list[str]:
    shared = [] if (command, outcome) == ("sample", "runs") else SHARED.get(outcome, [])
    return TABLES[command].get(outcome, []) + shared


@pytest.mark.parametrize("command", TABLES)
def test_every_option_is_tried(command: str) -> None:
    texts = [RUNS[command], *(row for outcome in OUTCOMES for row in rows(command, outcome))]
    tried = {word for text in texts for word in shlex.split(text)}
    options = [option for option in options_of(command_kind(command)) if option.flags]
    assert [option.flags[-1] for option in options if not set(option.flags) & tried] == []


@pytest.mark.slow  # hundreds of runs
@pytest.mark.parametrize("command", TABLES)
def test_no_typed_option_is_ignored(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, str] = {}
    wrong = []
    for outcome in OUTCOMES:
        for number, row in enumerate(rows(command, outcome)):
            words, _, context = row.partition("|")
            if context not in plain:
                place = tmp_path / f"plain{len(plain)}" / "out"
                place.parent.mkdir()
                plain[context] = run(command, context, "", folder, place, capsys)
                assert not plain[context].startswith("refused"), (context, plain[context])
            place = tmp_path / f"{outcome}{number}" / "out"
            place.parent.mkdir()
            result = run(command, context, words, folder, place, capsys)
            was = "refused" if result.startswith("refused") else "same" if result == plain[context] else "changes"
            if was != outcome and (outcome != "runs" or was == "refused"):
                wrong.append(f"{row}: expected {outcome}, {was} {result[:200]}")
    assert not wrong, "\n".join(wrong)
