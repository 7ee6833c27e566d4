"""What searches find in every command that takes it: steps of samplers, and the tap and timestep of features."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.backbones import BackboneError, load_backbone
from diffrep.backbones.early_exit import EarlyExitUViT, UViTConfig, load_early_exit, save_early_exit
from diffrep.cli import COMMANDS, command_kind, main
from diffrep.commands.parsing import options_of
from diffrep.eval.likelihood import model_likelihood
from diffrep.eval.samplers import distance_to_fine
from diffrep.painting import backbone_facts, diffusion_model, sample
from diffrep.sampling.schedules import SamplingError
from diffrep.searched import Candidate, read_candidate
from diffrep.store import open_store
from diffrep.training.early_exit import EarlyExitTraining, train_early_exit
from diffrep.training.loop import FitSettings
from diffrep.training.patches import ImagePatches

from . import layouts
from .test_sample import exact_model, table
from .test_sampling import MEAN, SPREAD


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in two classes, and the file of each kind of search."""
    folder, draw = tmp_path_factory.mktemp("searched"), np.random.default_rng(0)
    for number in range(12):
        place = folder / "photos" / ("red", "blue")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 100, (64, 64, 3), np.uint8)
        pixels[..., 2 * (number % 2)] += 100
        Image.fromarray(pixels).save(place / f"{number}.png")
    for name, kind in (("labels", np.uint8), ("depths", np.float32)):
        (folder / name).mkdir()
        for number in range(0, 12, 2):
            np.save(folder / name / f"{number}.npy", draw.integers(1, 3, (64, 64)).astype(kind))
    (folder / "cell.json").write_text('{"timesteps": [30], "taps": ["up.1"]}')
    (folder / "steps.json").write_text('{"timesteps": [900, 500, 100]}')
    (folder / "orders.json").write_text('{"timesteps": [900, 500], "orders": [1, 2]}')
    return folder


# -- features -------------------------------------------------------------------------------------------------


def test_features_are_read_at_the_place_of_a_search(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (str(work / "photos" / name) for name in ("red/0.png", "blue/1.png"))
    line = ["match", a, b, "--points", "20,20", "--backbone", "tiny", "--json"]
    told = []
    for place in (["--schedule", str(work / "cell.json")], ["--taps", "up.1", "--timestep", "30"], []):
        assert main([*line, *place]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] != told[2]
    store = work / "photos.store"
    with monkeypatch.context() as once:
        once.setattr("diffrep.store.extraction.load_backbone", lambda *a, **k: pytest.fail("weights are read again"))
        assert main(["extract", str(work / "photos"), "-o", str(store), "--schedule", str(work / "cell.json")]) == 0
    assert [*open_store(store).taps] == ["up.1"]
    cells = ["probe", "train", str(work / "photos"), "--work", str(work / "w"), "--json"]
    assert main([*cells, "-o", str(work / "trained"), "--schedule", str(work / "cell.json")]) == 0
    assert "up.1" in (work / "trained" / "probe.json").read_text()


@pytest.mark.parametrize(
    ("line", "file", "message"),
    [
        ("match A B --points 1,1 --backbone tiny", "steps", "is of a search for a sampler's steps, expected one tap"),
        ("match A B --points 1,1", "cell", "the fusion of the recipe tiny is made for its taps"),
        ("match A B --points 1,1 --backbone tiny-dino", "cell", "is for diffusion models, tiny-dino is none"),
        ("match A B --points 1,1 --backbone tiny --taps up.1", "cell", "leave --taps out"),
        ("extract A -o OUT --timestep 3", "cell", "leave --timestep out"),
        ("extract A -o OUT", "orders", "is of a search for a sampler's steps"),
        ("export tiny -o OUT.onnx", "steps", "is of a search for a sampler's steps"),
        ("export tiny-depth --head -o OUT.onnx", "cell", "--head goes without --taps, --timestep, --schedule"),
        ("probe train PHOTOS --cells tiny tiny-dino", "cell", "says where one backbone is read, got the cells tiny ti"),
        ("probe sweep PHOTOS --timesteps 3", "cell", "leave --timesteps out"),
        ("probe feedback PHOTOS", "cell", "this probe reads the whole decoder"),
        ("sample", "cell", "is of a search for taps of features"),
        ("likelihood A", "cell", "is of a search for taps of features"),
        ("likelihood A", "orders", "has orders or skipped units"),
        ("likelihood A --tolerance 0.1", "steps", "leave --tolerance out"),
        ("synthesize --reference A", "cell", "is of a search for taps of features"),
        ("eval samplers", "cell", "is of a search for taps of features"),
    ],
)
def test_a_file_of_the_wrong_kind_is_named(
    line: str, file: str, message: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    words = {"A": "photos/red/0.png", "B": "photos/blue/1.png", "PHOTOS": "photos"}
    arguments = [words.get(word, word) for word in line.split()]
    before = {*work.iterdir()}
    assert main([*arguments, "--schedule", f"{file}.json"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert {path.name for path in {*work.iterdir()} - before} <= {"runs"}  # probes keep what they read there


# -- samplers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_are_searched_by_fid(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["search-schedule", "--steps", "2", "--reference", "5", "--population", "3", "--epochs", "1", "--fitness"]
    file = str(work / "fid.json")
    assert main([*line, "fid", "--count", "3", "--real", str(work / "photos"), "-o", file]) == 0
    assert len(read_candidate(file).timesteps) == 2
    assert json.loads(Path(file).read_text())["search"]["of"]["features"] == "tiny-dino@class"
    capsys.readouterr()
    for other, message in (
        (["fid", "--count", "1"], "FID needs at least 2 images, got the conditions of 1"),
        (["fid", "--count", "3", "--features", "inception"], "name the file of Inception's weights"),
        (["fid", "--count", "4", "--real", str(work / "photos"), "-o", file], "is of another search: count 3, not 4"),
        (["distance", "--real", str(work)], "--real goes with --fitness fid"),
    ):
        assert main([*line, *other]) == 2
        assert message in capsys.readouterr().err


def test_steps_of_a_flow_are_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = layouts.build("sd3", tmp_path / "sd3"), str(tmp_path / "steps.json")
    line = ["search-schedule", "--model", str(folder), "--steps", "3", "--reference", "6", "--guidance", "1"]
    line += ["--population", "4", "--epochs", "1", "-o", file]
    assert main(line) == 0
    best, even = (
        float(v) for v in re.findall(r"of unipc: (\S+) at .*; (\S+) at even steps", capsys.readouterr().out)[0]
    )
    assert best <= even < float("inf")  # even steps are among the candidates
    timesteps = read_candidate(file).timesteps  # 1000 sigma
    assert len(timesteps) == 3
    assert all(1 <= t <= 1000 for t in timesteps)
    assert main(["sample", "x", "--model", str(folder), "--schedule", file, "-o", str(tmp_path / "x.png")]) == 0
    assert main([*line, "--sampler", "evodiff", "-o", str(tmp_path / "other.json")]) == 2
    assert "evodiff does not work on rectified flows" in capsys.readouterr().err


def test_a_search_refuses_a_sampler_that_can_take_no_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "steps.json"
    line = ["search-schedule", "--model", "tiny", "--steps", "2", "--reference", "4", "-o", str(file)]
    for other, message in (
        (["--sampler", "sit-sde"], "sit-sde does not work on noise schedules"),
        (["--sampler", "evodiff"], "EVODiff takes two steps or more"),
        (["--sampler", "ddim", "--orders", "2"], "the sampler ddim has no option order"),
        (["--sampler", "ghvb", "--orders", "2"], "ghvb: order must be a number"),
        (["--sampler", "dpm++-sde", "--orders", "3"], "orders are 1 to 3 (2 with noise)"),
    ):
        assert main([*line, *other]) == 2
        assert message in capsys.readouterr().err
        assert not file.exists()
    line[2:3] = ["tiny-synthesis", "--count", "1", "--population", "1", "--epochs", "1"]  # starts almost without signal
    assert main([*line, "--sampler", "heun"]) == 2
    assert "heun works at none of the steps that were tried" in capsys.readouterr().err


def test_fid_is_nothing_at_the_fine_solution_itself() -> None:
    model = diffusion_model("tiny", ["a cat", "a car", "a dog"], guidance=1.0)
    fitness = distance_to_fine(model, "unipc", 2, 6, features="tiny-dino@class")
    fine = sample(model, sampler="unipc", steps=6)
    times = tuple(range(999, 0, -166))[:6]
    assert len(fine.images) == 3
    assert fitness(Candidate(tuple(float(t) for t in np.arange(1000, 0, -1000 / 6).round() - 1))) < 1e-3
    assert fitness(Candidate((900, 400))) > 10 * fitness(Candidate(times))


def test_a_likelihood_at_given_steps_is_that_of_adaptive_ones() -> None:
    model = exact_model(table())
    x = MEAN + SPREAD * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = torch.ones_like(x)
    adaptive = model_likelihood(model, x, probe, tolerance=1e-6)
    exact = -torch.distributions.Normal(MEAN, SPREAD).log_prob(x).flatten(1).mean(1) / np.log(2)
    errors = []
    for count in (20, 80):
        at = [*np.geomspace(1, 998, count)]
        errors.append((model_likelihood(model, x, probe, timesteps=at) - adaptive).abs().max())
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.06
    torch.testing.assert_close(adaptive, exact, atol=0.02, rtol=0)


# -- early exits ----------------------------------------------------------------------------------------------


def test_an_early_exit_is_trained_resumed_and_painted(work: Path, tmp_path: Path) -> None:
    training = EarlyExitTraining(
        width=32, blocks=3, heads=2, patch=4, held_out=4, batch_size=8,
        fit=FitSettings(steps=150, learning_rate=5e-3, warmup=2, bf16=False, ema_decay=0.9, seed=1),
    )  # fmt: skip
    patches = ImagePatches(tuple(sorted((work / "photos").rglob("*.png"))), (0.5, 1.0))
    network, rows = train_early_exit(training, patches, tmp_path / "run", progress=False)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    again, same = train_early_exit(training, patches, tmp_path / "run", progress=False)
    assert rows == same
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert {"simple", "probes", "layers"} <= set(log[-1])
    by_name = {name: values for name, *values in rows}
    assert by_name["whole"][0] == 3
    assert by_name["whole"][1] == by_name["whole"][2] < 0.95  # of noise of variance 1
    assert all(0 <= blocks <= 3 for blocks, _, _ in by_name.values())
    assert [blocks for blocks, _, _ in by_name.values()] == sorted((b for b, _, _ in by_name.values()), reverse=True)
    (tmp_path / "model").mkdir()
    save_early_exit(network, tmp_path / "model")
    loaded = load_early_exit(tmp_path / "model")
    assert loaded.autoencoder == "tiny-synthesis"
    whole, early = (sample(tmp_path / "model", steps=3, threshold=t, count_flops=True) for t in (0.0, 0.99))
    assert whole.images.shape == (1, 3, 128, 128)
    assert early.flops < 0.6 * whole.flops  # type: ignore[operator]
    with pytest.raises(SamplingError, match="paints 128 x 128, got 256 x 128"):
        sample(tmp_path / "model", steps=1, size=(256, 128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": "3"}, r"config\.json: depth must be a whole number, got '3'"),
        ({"num_heads": 0}, r"config\.json: num_heads must be at least 1, got 0"),
        ({"img_size": 9}, r"config\.json: a U-ViT has whole patches"),
        ({"embed_dim": 64}, r"model\.safetensors: does not fit its config\.json"),
    ],
)
def test_a_damaged_early_exit_names_its_file(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_early_exit(EarlyExitUViT(UViTConfig(img_size=8, embed_dim=32, depth=3, num_heads=2)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BackboneError, match=message):
        load_early_exit(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample fox --model EXIT -o x.png", "takes no prompts, no condition"),
        ("sample --label 3 --model EXIT -o x.png", "has no classes, got 3"),
        ("likelihood A --backbone EXIT --prompt fox", "takes no prompts, no condition"),
        ("likelihood A --backbone tiny --prompt fox --label 2", "conditions of two kinds of models: give one"),
        ("likelihood A --backbone tiny --label 2", "takes prompts and no class (label)"),
        ("eval samplers --model EXIT --prompt fox", "takes no prompts, no condition"),
        ("eval samplers --model EXIT --guidance 3", "EXIT: has no use for guidance here"),
        ("eval samplers --model tiny --count 3", "tiny: has no use for count here"),
        ("eval samplers --model tiny --label 3", "takes prompts and no class (label)"),
        ("search-schedule --prompt fox", "tiny-synthesis: has no use for prompts here"),
        ("search-schedule --label 3", "tiny-synthesis: has no use for label here"),
        ("search-schedule --count 0", "count must be at least 1, got 0"),
    ],
)
def test_a_condition_that_a_model_has_no_use_for_is_refused(
    line: str, message: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "exit").mkdir()
    save_early_exit(EarlyExitUViT(UViTConfig(img_size=8, embed_dim=16, depth=3, num_heads=2)), tmp_path / "exit")
    monkeypatch.chdir(tmp_path)
    words = {"A": str(work / "photos/red/0.png"), "EXIT": "exit"}
    assert main([words.get(word, word) for word in line.split()]) == 2
    assert message.replace("EXIT", "exit") in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["exit"]


# -- the model that a file was found for ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def searches(work: Path) -> dict[str, Path]:
    """Files of searches on the embedded models, and the same as if found for other models, by name."""
    quick = ["--population", "1", "--epochs", "1"]
    cell, steps = work / "cell-of-tiny.json", work / "steps-of-tiny.json"
    line = ["search-schedule", "--model", "tiny-synthesis", "--steps", "2", "--count", "1", "--reference", "3"]
    assert main([*line, *quick, "-o", str(steps)]) == 0
    line = ["search-schedule", "--fitness", "pck", "--per-category", "1"]
    assert main([*line, *quick, "-o", str(cell)]) == 0
    files = {"steps": steps, "cell": cell}
    for kind, path in list(files.items()):
        document = json.loads(path.read_text())
        for name, change in (
            ("other-kind", {"prediction": "sample", "noise": [999.0, 1.0, 0.9, 0.7, 0.4, 0.1]}),
            ("other-weights", {"weights": "0" * 16}),
            ("old", None),
        ):
            facts = {} if change is None else {"found_for": document["found_for"] | change}
            text = json.dumps({k: v for k, v in document.items() if k != "found_for"} | facts)
            files[f"{kind}-{name}"] = work / f"{kind}-{name}.json"
            files[f"{kind}-{name}"].write_text(text)
    return files


PAINTERS = {  # commands that take steps -> a line that is quick
    "sample": "sample",
    "synthesize": "synthesize --reference A --size 128",
    "eval samplers": "eval samplers --count 1 --calls 2 --reference 3 --samplers ddim",
    "likelihood": "likelihood A",
}
READERS = {  # commands that take a tap and a timestep
    "match": "match A B --points 1,1 --backbone tiny",
    "extract": "extract A -o OUT",
    "export": "export tiny -o OUT.onnx",
    "probe train": "probe train PHOTOS",
    "probe sweep": "probe sweep PHOTOS",
    "probe pixels": "probe pixels photos/red labels",
    "probe dense": "probe dense depth photos/red depths",
    "probe feedback": "probe feedback PHOTOS",
    "eval probes": "eval probes PHOTOS --cells tiny",
}


def test_every_command_that_takes_what_was_found_is_tried_here() -> None:
    takes = {
        name
        for name, (place, _) in COMMANDS.items()
        if place and any("--schedule" in o.flags and o.kind is Path for o in options_of(command_kind(name)))
    }
    assert takes == {*PAINTERS, *READERS}


def run_with(schedule: Path, line: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(work)
    words = {"A": "photos/red/0.png", "B": "photos/blue/1.png", "PHOTOS": "photos"}
    return main([*(words.get(word, word) for word in line.split()), "--schedule", str(schedule)])


@pytest.mark.parametrize("command", [*PAINTERS, *READERS])
def test_what_was_found_for_another_kind_of_model_is_refused(
    command: str, searches: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kind, line = ("steps", PAINTERS[command]) if command in PAINTERS else ("cell", READERS[command])
    before = {*work.iterdir()}
    assert run_with(searches[f"{kind}-other-kind"], line, work, monkeypatch) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    if command == "probe feedback":  # which takes none
        assert "this probe reads the whole decoder" in said
    else:
        assert f"{kind}-other-kind.json: was found for another kind of model than tiny" in said
        assert re.search(r"other prediction, noise schedule(, weights)?$", said)
    assert {path.name for path in {*work.iterdir()} - before} <= {"runs"}


@pytest.mark.parametrize("line", ["likelihood A", "match A B --points 1,1 --backbone tiny"])
def test_other_weights_and_old_files_are_named_in_one_line(
    line: str, searches: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = "steps" if line.startswith("likelihood") else "cell"
    for name, message in (
        ("other-weights", "was found for a model of the kind of tiny with other weights"),
        ("old", "does not say which model it was found for (unknown: architecture, sizes of the weights, prediction,"),
    ):
        caplog.clear()
        assert run_with(searches[f"{kind}-{name}"], line, work, monkeypatch) == 0
        assert [message in said for said in caplog.messages if "found for" in said] == [True]
    caplog.clear()
    assert run_with(searches[kind], f"{line} --precision bfloat16", work, monkeypatch) == 0
    far_off = [said for said in caplog.messages if "too few to trust" in said]
    assert len(far_off) == (kind == "steps")  # two steps
    # tiny has the architecture of tiny-synthesis, and other weights
    assert ["with other weights" in said for said in caplog.messages if "found for" in said] == [True] * (
        kind == "steps"
    )


def test_a_search_goes_on_for_the_same_model_alone(
    searches: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search-schedule", "--fitness", "pck", "--per-category", "1", "--population", "1", "--epochs", "1", "-o"]
    assert main([*line, str(searches["cell-other-weights"])]) == 2
    assert "is of another model under the same name: other weights" in capsys.readouterr().err
    assert main([*line, str(searches["cell-old"])]) == 0
    assert "found_for" not in json.loads(searches["cell-old"].read_text())  # who knows which model half of it is of


@pytest.mark.parametrize(
    "text", ['{"best": [3]}', '{"best": [[1]]}', '{"best": 3}', '{"timesteps": [3], "found_for": {"a": 1}}',
             '{"timesteps": [true]}', '{"timesteps": [3], "found_for": [1]}', "[" * 10**5]
)  # fmt: skip
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(SamplingError, match=r"^[^\n]*steps\.json: [^\n]+$"):
        read_candidate(tmp_path / "steps.json")


def test_facts_of_a_model_depend_on_neither_precision_nor_place(tmp_path: Path) -> None:
    backbone = load_backbone("tiny", decoder=True)
    facts = backbone_facts(backbone)
    assert diffusion_model(backbone, "", guidance=1.0).facts() == facts
    backbone.save_pretrained(tmp_path / "elsewhere")
    assert backbone_facts(load_backbone(str(tmp_path / "elsewhere"), dtype=torch.float16)) == facts
    flow = diffusion_model(str(layouts.build("sd3", tmp_path / "sd3")), "", guidance=1.0).facts()
    assert {name for name in facts if facts[name] != flow[name]} == set(facts)
