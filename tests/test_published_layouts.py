"""Every command on small copies of published models: those that take them, end to end, and those that refuse them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from diffrep.backbones.loading import load_backbone, load_cleandift
from diffrep.cli import main
from diffrep.features import extract
from diffrep.heads.loading import KNOWN
from diffrep.heads.recognition import PIPELINE_TASKS
from diffrep.store import open_store

from . import layouts
from .layouts import published
from .test_repositories import Hub
from .test_synthesis_model import OFFICIAL, official_weights, write_lightning

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command that must succeed; gives what it prints."""

    def command(*words: object) -> str:
        status, output = main([str(word) for word in words]), capsys.readouterr()
        assert status == 0, output.err
        assert "Traceback" not in output.err
        return output.out

    return command


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command that must be refused in one line; gives that line."""

    def command(*words: object) -> str:
        capsys.readouterr()  # what building the model printed
        assert main([str(word) for word in words]) == 2, words
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert message.strip().count("\n") == 0, message
        return message

    return command


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of images."""
    noise = np.random.default_rng(0)
    for kind, high in (("dark", 90), ("light", 256)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(5):
            pixels = noise.integers(high - 90, high, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{number}.png")
    return tmp_path / "photos"


def use_as_backbone(name: object, photos: Path, out: Path, run: Run) -> None:
    """Every command that takes a backbone."""
    a, b = photos / "dark" / "0.png", photos / "light" / "0.png"
    facts = json.loads(run("info", name, "--json"))
    tap = facts["recommended"]["taps"][0]
    run("match", a, b, "--backbone", name, "--points", "10,10", "-o", out / "match.png")
    assert (out / "match.png").is_file()
    if any(tap["name"] == "up.2.resnet.0" for tap in facts["taps"]):  # a U-Net, as the recipe wants
        run("swap", a, b, "--whole", "--backbone", name, "-o", out / "swap.png")
        assert (out / "swap.png").is_file()
    run("extract", photos, "-o", out / "store", "--backbone", name, "--keep.kind", "maps")
    run("index", out / "store", "-o", out / "index", "--level", "patch")
    hits = json.loads(run("query", out / "index", a, "--point", "20,20", "--json"))["hits"]
    scores = {hit["image"]: hit["score"] for hit in hits}
    assert scores["dark/0.png"] == pytest.approx(1, abs=0.2)  # the point lies between cells
    work = ["--work", out / "work", "-o", out / "probe", "--fit.grid.epochs", 2]
    run("probe", "train", photos, "--cells", f"{name},{tap}", *work)
    assert "dark/0.png" in run("probe", "predict", out / "probe", a)


def refuse_as_backbone(name: object, photos: Path, out: Path, refused: Run) -> list[str]:
    """Every command that takes a backbone; gives what they say."""
    a, b = photos / "dark" / "0.png", photos / "light" / "0.png"
    return [
        refused("match", a, b, "--backbone", name, "--points", "10,10", "-o", out / "match.png"),
        refused("swap", a, b, "--whole", "--backbone", name, "-o", out / "swap.png"),
        refused("extract", photos, "-o", out / "store", "--backbone", name),
        refused("probe", "train", photos, "--cells", name, "--work", out / "work", "-o", out / "probe"),
    ]


def test_every_published_head_has_a_layout() -> None:
    names = {name.split("/")[1] for name in KNOWN}
    assert names - set(published.HEADS) == {"diffdis", "marigold-lcm-v1-0", "Marigold"}  # its own test; former names


@pytest.mark.parametrize("name", published.HEADS)
def test_one_step_heads(name: str, photos: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    head = published.HEADS[name]
    folder = published.build_head(name, tmp_path)
    image = photos / "dark" / "0.png"
    command = "normals" if head.task == "normals" else "depth"
    output = ["-o", tmp_path / "maps", "--size", 64]
    run(command, image, "--model", folder, *output)
    about = json.loads(next((tmp_path / "maps").glob("*.json")).read_text())
    assert head.task in json.dumps(about)
    other = "depth" if command == "normals" else "normals"
    assert str(folder) in refused(other, image, "--model", folder, *output)
    assert str(folder) in refused("segment", image, "--model", folder, "-o", tmp_path / "masks")
    for message in refuse_as_backbone(folder, photos, tmp_path, refused):
        assert str(folder) in message
        assert "`diffrep depth --model`" in message
    about = json.loads(run("info", folder, "--json"))["head"]
    assert (about["task"], about["use"]) == (head.task, f"diffrep {command} --model {folder}")
    leading = head.scheduler.get("timestep_spacing") == "leading"  # the first Marigolds' single step: at noise alone
    assert ("takes a single step at 1; trailing ones are taken, a single step at 999" in about["timesteps"]) == leading
    assert ("its scheduler says leading" in run("info", folder)) == leading
    renamed = folder.rename(tmp_path / "mine")  # under another name only Marigold's newer index or class says the task
    says_task = "prediction_type" in head.index or head.pipeline in PIPELINE_TASKS
    assert ("that its files do not say" in run("info", renamed)) != says_task
    if says_task:
        run(command, image, "--model", renamed, *output)
    else:
        assert "name the task" in refused(command, image, "--model", renamed, *output)
        run(command, image, "--model", renamed, "--task", head.task, *output)


def test_a_head_is_known_in_a_cache_of_the_hub_and_by_its_unet(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    folder = published.build_head("marigold-depth-v1-0", tmp_path)
    image, output = photos / "dark" / "0.png", ["-o", tmp_path / "maps", "--size", 64, "--steps", 1]
    assert "depth" in run("depth", image, "--model", folder / "unet", *output)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    snapshot = tmp_path / "models--prs-eth--marigold-depth-v1-0" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    for name in (snapshot.parent.parent, snapshot):
        assert "depth" in run("depth", image, "--model", name, *output)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "depth" in run("depth", image, "--model", "~/models--prs-eth--marigold-depth-v1-0", *output)


def test_a_head_on_the_hub_is_described_by_its_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, refused: Run
) -> None:
    depth, diffdis = "jingheya/lotus-depth-d-v1-1", "qianyu1217/diffdis"
    plain, vit = layouts.build("sd2.1", tmp_path / "plain"), tmp_path / "vit"
    vit.mkdir()
    (vit / "README.md").touch()
    folders = {depth: published.build_head("lotus-depth-d-v1-1", tmp_path), diffdis: published.build_diffdis(tmp_path)}
    hub = Hub(folders | {"me/plain": plain, "me/none": vit})
    hub.use(monkeypatch, tmp_path)
    for name, command in ((depth, "depth"), (diffdis, "segment")):
        assert json.loads(run("info", name, "--json"))["head"]["use"] == f"diffrep {command} --model {name}"
        assert not [file for file in hub.fetched if file.endswith(".safetensors")]
    assert "head" not in json.loads(run("info", "me/plain", "--json"))
    assert not [file for file in hub.fetched if file.endswith(".safetensors")]
    assert "me/none" in refused("info", "me/none")
    asked = len(hub.asked)
    assert "has no such repository" in refused("info", "me/gone")
    assert hub.asked[asked:] == ["me/gone"]  # once
    assert "there is no such file" in refused("info", "me/gone.safetensors")


def test_a_head_for_something_else_is_refused_before_its_note(refused: Run, photos: Path, tmp_path: Path) -> None:
    stand = {"depth": "tiny-segmentation", "normals": "tiny-depth", "segment": "tiny-depth"}
    for command, model in stand.items():
        message = refused(command, photos / "dark" / "0.png", "--model", model, "-o", tmp_path / "out")
        assert model in message
        assert "note:" not in message


@pytest.mark.parametrize("command", [["restore"], ["depth"], ["match", "--points", "3,3"]])
def test_half_precision_is_refused_on_the_cpu(command: list[str], refused: Run, photos: Path, tmp_path: Path) -> None:
    images = [photos / "dark" / f"{i}.png" for i in range(2 if command[0] == "match" else 1)]
    where = ["-o", tmp_path / "out.png" if command[0] == "match" else tmp_path / "out", "--device", "cpu"]
    assert "take bfloat16" in refused(*command, *where, "--precision", "float16", "--", *images)


@pytest.mark.parametrize("command", ["depth", "segment"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora.safetensors", "is a LoRA"),
        ("unet.safetensors", "is a U-Net alone"),
        ("other.safetensors", r"is no head, it holds 1 tensor \(foo, ...\)"),
        ("empty.safetensors", "a weight file is damaged|cannot be read"),
        ("picture.png", "is no checkpoint that can be read safely"),
        ("sd2.1", "is a backbone and no head"),
        ("timm:resnet18", "is a backbone and no head"),
    ],
)
def test_what_is_no_head_is_named(command: str, name: str, says: str, tmp_path: Path, refused: Run) -> None:
    image = tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(image)
    tensors = {"lora": ["lora_unet_a.lora_up.weight"], "unet": ["conv_in.weight", "down_blocks.0.a"], "other": ["foo"]}
    for stem, keys in tensors.items():
        save_file({key: torch.zeros(1) for key in keys}, tmp_path / f"{stem}.safetensors")
    (tmp_path / "empty.safetensors").touch()
    given = tmp_path / name if "." in name and name != "sd2.1" else name
    message = refused(command, image, "--model", given, "-o", tmp_path / "out")
    assert name in message
    assert re.search(says, message), message


def test_diffdis(photos: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    folder = published.build_diffdis(tmp_path)
    image = photos / "dark" / "0.png"
    run("segment", image, "--model", folder, "-o", tmp_path / "masks", "--size", 64)
    assert (tmp_path / "masks" / "summary.json").is_file()
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert "base, for example" in refused("segment", image, "--model", unet, "-o", tmp_path / "alone")
    run("segment", image, "--model", unet, "--base", folder, "-o", tmp_path / "alone", "--size", 64)
    for command in ("depth", "normals"):
        assert "segment" in refused(command, image, "--model", folder, "-o", tmp_path / command)
    for message in [*refuse_as_backbone(folder, photos, tmp_path, refused), refused("info", unet)]:
        assert "is a segmentation head (DiffDIS); `diffrep segment --model` uses it" in message
    assert json.loads(run("info", folder, "--json"))["head"]["family"] == "diffdis"
    assert f"diffrep segment --model {folder}" in run("info", folder)


def test_cleandift(photos: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    base, file = published.build_cleandift(tmp_path)
    backbone = load_cleandift(base, file)
    assert backbone.recommended.conditions.clean
    assert "VAE" in refused("info", file)
    backbone.save_pretrained(tmp_path / "whole")
    use_as_backbone(tmp_path / "whole", photos, tmp_path, run)


def test_adm(photos: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    folder = published.build_adm(tmp_path)
    use_as_backbone(folder, photos, tmp_path, run)
    run("info", folder / "256x256_diffusion_uncond.pt")  # with the configuration beside it
    for command in ("depth", "segment"):
        refused(command, photos / "dark" / "0.png", "--model", folder, "-o", tmp_path / command)


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_transformers_of_one_class(kind: str, photos: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    folder = published.build_transformer(kind, tmp_path)
    use_as_backbone(folder, photos, tmp_path, run)
    for command in ("depth", "segment"):
        refused(command, photos / "dark" / "0.png", "--model", folder, "-o", tmp_path / command)


def test_a_plain_model_is_no_head(photos: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    folder = layouts.build("sd2.1", tmp_path / "sd2.1")
    use_as_backbone(folder, photos, tmp_path, run)
    for command in ("depth", "normals", "segment"):
        assert str(folder) in refused(command, photos / "dark" / "0.png", "--model", folder, "-o", tmp_path / command)


def test_large_image_diffusion(photos: Path, vit_folder: Path, tmp_path: Path, run: Run, refused: Run) -> None:
    source = tmp_path / "brca"
    (source / "checkpoints").mkdir(parents=True)
    (source / "configs").mkdir()
    checkpoint = source / "checkpoints" / "last.ckpt"
    write_lightning(checkpoint, official_weights(ema=True))
    (source / "configs" / "2023-project.yaml").write_text(yaml.safe_dump({"model": {"params": OFFICIAL}}))
    run("convert", source, "-o", tmp_path / "model", "--groups", 4)
    grid = np.random.default_rng(0).normal(size=(2, 2, 5)).astype(np.float32)
    np.save(tmp_path / "grid.npy", grid)
    model = ["synthesize", "--model", tmp_path / "model", "--steps", 2, "-o", tmp_path / "painted.png"]
    run(*model, "--grid", tmp_path / "grid.npy")
    with Image.open(tmp_path / "painted.png") as image:
        assert image.size > (0, 0)
    for name in (checkpoint, source, tmp_path / "model"):
        refused("info", name)
        refuse_as_backbone(name, photos, tmp_path, refused)
    image_file = photos / "dark" / "0.png"
    for command in ("depth", "segment"):
        refused(command, image_file, "--model", tmp_path / "model", "-o", tmp_path / command)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have them: a model, one whose transformer has its class's name of old, caches, a ViT."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("models")
    layouts.build("sd1.5", folder / "sd")
    published.build_transformer("dit", folder)
    published.build_adm(folder)
    for name in ("lost", "several"):
        (folder / "hub" / f"models--org--{name}" / "blobs").mkdir(parents=True)
    for commit in ("1", "2"):
        (folder / "hub" / "models--org--several" / "snapshots" / commit).mkdir(parents=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=14))
    vit.save_pretrained(folder / "clip")
    shutil.copy(folder / "clip" / "model.safetensors", folder / "clip.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hub", "is a cache of the hub; give a model in it, such as models--org--lost"),
        ("hub/models--org--lost", "it holds none, fetch the model again"),
        ("hub/models--org--several", "give the folder snapshots/COMMIT in it"),
        ("sd/vae", r"is a part of a diffusers folder; give the whole, \S+/sd$"),
        ("sd/scheduler", r"is a part of a diffusers folder; give the whole, \S+/sd$"),
        ("sd/unet/diffusion_pytorch_model.safetensors", "is a U-Net alone"),
        ("clip.safetensors", "give the folder that it lies in, with its config.json"),
        ("no/such/model", "there is no such folder or file$"),
    ],
)
def test_what_a_path_is_instead_is_said(name: str, says: str, models: Path, photos: Path, refused: Run) -> None:
    message = refused("info", models / name).strip()
    assert re.search(says, message), message
    head = refused("depth", photos, "--model", models / name, "-o", models / "depth")
    assert str(models / name) in head


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "the name of a model is empty"),
        ("./nowhere", "there is no such folder or file"),
        ("a/b/c", "there is no such folder or file"),
        ("models/mine", "is no folder here, the hub cannot be reached"),
        ("zzz", "`diffrep info` lists the names"),
        ("timm:zzz", "timm has no model zzz"),
        ("open_clip:ViT-B-32/openai", "cannot be fetched"),
    ],
)
def test_names_that_lead_nowhere(name: str, says: str, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("info", name)
    assert says in message
    assert "near names" not in message


@pytest.mark.parametrize("file", ["clip/model.safetensors", "adm/256x256_diffusion_uncond.pt", "dit/transformer"])
def test_a_file_beside_its_configuration_is_the_folder(file: str, models: Path, photos: Path) -> None:
    alone, whole = load_backbone(models / file), load_backbone((models / file).parent)
    assert [tap.name for tap in alone.taps()] == [tap.name for tap in whole.taps()]
    images = [photos / "dark" / "0.png"]
    tap = alone.recommended.taps[0]
    maps = [extract(backbone, images, taps=tap, label=1 if "dit" in file else None) for backbone in (alone, whole)]
    torch.testing.assert_close(maps[0][tap], maps[1][tap])


def test_libraries_say_nothing(models: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for kind in ("sd3", "pixart"):
        build = (
            layouts.build if kind == "sd3" else lambda kind, folder: published.build_transformer(kind, folder.parent)
        )
        recwarn.clear()
        backbone = load_backbone(build(kind, tmp_path / kind))
        recwarn.clear()
        backbone.embed("a cat")
        assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


@pytest.mark.parametrize(
    ("model", "words", "says"),
    [
        ("adm", ["a cat"], "takes no prompts"),
        ("adm", ["--negative", "a dog"], "takes no prompts"),
        ("adm", ["--label", 3], "has no classes"),
        ("adm", ["--guidance", 3], "no classifier-free guidance"),
        ("dit", ["a cat"], r"takes no prompts, a class instead \(label\)"),
        ("dit", ["--label", 3, "--negative", "a dog"], "takes no prompts"),
        ("dit", [], r"needs a class \(label\), 0..999, got none"),
        ("sd", ["a cat", "--label", 3], "two kinds of models"),
    ],
)
def test_conditions_that_a_painter_does_not_take(
    model: str, words: list[object], says: str, models: Path, refused: Run
) -> None:
    assert re.search(says, refused("sample", *words, "--model", models / model, "-o", models / "x.png"))
    assert not (models / "x.png").exists()


def test_a_home_that_the_shell_left(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run("match", "~/photos/dark/0.png", "~/photos/light/0.png", "--points", "9,9", "--output=~/made/m.png")
    run("extract", "~/photos/dark/*.png", "~/photos/light", "-o", "~/made/store")
    run("depth", "~/photos/dark", "-o", "~/made/depth", "--size", 32)
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert made == {"m.png", "store", "depth"}
    assert len(open_store(tmp_path / "made" / "store")) == 10
