"""Probes of pixels, depth and normals: learning, saving, the command line, and what is refused."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.backbones import Backbone, load_backbone
from diffrep.cli import main
from diffrep.eval.probes import PixelScores, confusion, score_dense_probe
from diffrep.eval.rendering import SceneFiles, annotated_scenes
from diffrep.features import ExtractConfig
from diffrep.heads.maps import DepthMap, NormalMap, save_map
from diffrep.heads.probes import load_dense_probe, load_probe, saved_kind
from diffrep.heads.probes.annotated import IGNORED, find_classes, hold_out, pair_annotations, read_labels, read_normals
from diffrep.heads.probes.dense import (
    DenseSettings,
    depth_loss,
    gradient_loss,
    on_canvas,
    scale_invariant_loss,
    train_dense_probe,
)
from diffrep.heads.probes.labelled import DataError
from diffrep.images import Sizing, fit_image

from .probe_images import damage_of_every_kind, image_folder

SMALL = ExtractConfig(sizing=Sizing("pad", 64), taps=("conv_in", "in"), timestep=10)
QUICK = DenseSettings(epochs=16, learning_rate=3e-2, batch_size=4, warmup=2)


@pytest.fixture(scope="module")
def unet(sd_folder: Path) -> Backbone:
    return load_backbone(str(sd_folder))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight wide pictures of a bright near part and a dark far part, with depth, normals and labels beside them."""
    folder = tmp_path_factory.mktemp("steps")
    for what in ("images", "depth", "normals", "labels"):
        (folder / what).mkdir()
    for number in range(8):
        random = np.random.default_rng(number)
        near = np.arange(64) < random.integers(16, 48)
        pixels = np.where(near, 220, 30)[None, :, None] + random.normal(0, 4, (32, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:02d}.png")
        wide = np.broadcast_to(near, (32, 64))
        depth = torch.from_numpy(np.where(wide, 2.0, 8.0).astype(np.float32))
        save_map(folder / "depth" / f"{number:02d}.png", DepthMap(depth, "depth", metric=True))
        normals = torch.tensor([0.0, 0.6, 0.8])[:, None, None] * torch.from_numpy(np.where(wide, 1, 0))
        normals = normals + torch.tensor([1.0, 0.0, 0.0])[:, None, None] * torch.from_numpy(np.where(wide, 0, 1))
        save_map(folder / "normals" / f"{number:02d}.npy", NormalMap(normals.float(), "lub"))
        labels = np.where(wide, 7, 3).astype(np.uint8)
        labels[0] = 255
        Image.fromarray(labels).save(folder / "labels" / f"{number:02d}.png")
    (folder / "names.json").write_text('{"3": "far", "7": "near"}')
    return folder


# -- training and saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "reader"), [("depth", "linear"), ("normals", "linear"), ("depth", "multiscale")])
def test_a_dense_probe_learns_saves_and_predicts_alone(
    task: str, reader: str, steps: Path, unet: Backbone, tmp_path: Path
) -> None:
    train, test = hold_out(pair_annotations(steps / "images", steps / task), 0.25)
    predicts = "bins" if reader == "linear" else "sigmoid"
    settings = replace(QUICK, reader=reader, hidden=8, predicts=predicts)  # type: ignore[arg-type]
    probe = train_dense_probe(
        train, task, unet, tmp_path / "work", settings=settings, extract=SMALL, progress=False  # type: ignore[arg-type]
    )  # fmt: skip
    start = replace(settings, epochs=1, learning_rate=1e-9)
    first = train_dense_probe(
        train, task, unet, tmp_path / "work", settings=start, extract=SMALL, progress=False  # type: ignore[arg-type]
    )  # fmt: skip
    assert probe.about["last_loss"] < 0.6 * first.about["last_loss"]
    scores = score_dense_probe(probe, test, unet)
    if task == "depth":
        assert scores["metric"]["delta1"] > 0.6 or reader == "multiscale"
        assert scores["aligned"]["abs_rel"] < score_dense_probe(first, test, unet)["aligned"]["abs_rel"]
    else:
        assert scores["mean"] < 32  # the best constant has 45
    probe.save(tmp_path / "probe")
    assert {file.name for file in (tmp_path / "probe").iterdir()} == {"probe.json", "probe.safetensors"}
    loaded = load_dense_probe(tmp_path / "probe")
    (expected,) = probe.predict_each(test.images[:1], backbone=unet)
    (found,) = loaded.predict_each(test.images[:1])  # its backbone is found by the name that it keeps
    assert found.values.shape[-2:] == (32, 64)
    assert torch.equal(found.values, expected.values)
    (other,) = loaded.predict_each([Image.new("RGB", (50, 90))], backbone=unet)
    assert other.values.shape[-2:] == (90, 50)
    if task == "normals":
        assert torch.allclose(found.values.norm(dim=0), torch.ones(32, 64), atol=1e-5)


def test_maps_are_read_once_and_corrupt_images_left_out(
    steps: Path, unet: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted((steps / "images").iterdir())[:6]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "03.png").write_bytes(b"no image")
    data = pair_annotations(folder, steps / "depth")
    once = replace(QUICK, epochs=1)
    probe = train_dense_probe(data, "depth", unet, tmp_path, settings=once, extract=SMALL, progress=False)
    assert (probe.about["images"], probe.about["unreadable"]) == (5, 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(unet), "maps", lambda *a, **k: pytest.fail("maps were read again"))
        train_dense_probe(data, "depth", unet, tmp_path, settings=once, extract=SMALL, progress=False)
    first, other = data.images[0], Image.new("RGB", (64, 32), "red")
    before = first.stat()
    content = io.BytesIO()
    other.save(content, "png")
    first.write_bytes(content.getvalue().ljust(before.st_size, b"\0"))  # another picture of this size and time
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert first.stat().st_size == before.st_size
    again = train_dense_probe(data, "depth", unet, tmp_path, settings=once, extract=SMALL, progress=False)
    fresh = train_dense_probe(data, "depth", unet, tmp_path / "fresh", settings=once, extract=SMALL, progress=False)
    assert again.about["last_loss"] == fresh.about["last_loss"] != probe.about["last_loss"]


def test_losses_see_shape_and_not_scale() -> None:
    truth = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    valid = torch.ones_like(truth, dtype=torch.bool)
    valid[..., :4] = False
    assert float(scale_invariant_loss(3 * truth, truth, valid)) == pytest.approx(0.15**0.5 * np.log(3), rel=1e-4)
    assert float(gradient_loss(3 * truth, truth, valid)) == pytest.approx(0, abs=1e-4)
    spoiled = torch.where(valid, truth, 5.0)
    assert float(depth_loss(spoiled, truth, valid)) == pytest.approx(0, abs=1e-3)
    assert float(depth_loss(torch.where(valid, truth.flip(-1), 5.0), truth, valid)) > 1
    nothing = depth_loss(truth.clone().requires_grad_(), truth, torch.zeros_like(valid))
    nothing.backward()
    assert nothing.item() == 0


def test_annotations_lie_where_the_image_lies() -> None:
    image = Image.new("RGB", (64, 32))
    _, placement = fit_image(image, Sizing("pad", 32))
    canvas = on_canvas(torch.ones(1, 32, 64), placement)
    assert canvas.shape == (1, 32, 32)
    assert canvas[0, 8:24].min() == 1
    assert canvas.sum() == 16 * 32


def test_scenes_come_as_files(tmp_path: Path) -> None:
    settings = SceneFiles(scenes=2, test_scenes=1, scene_size=48)
    train, test = annotated_scenes(tmp_path, "parts", settings, progress=False)
    assert (len(train), len(test)) == (2, 1)
    labels = read_labels(train.annotations[0], (48, 48))
    normals, _ = annotated_scenes(tmp_path, "normals", settings, progress=False)
    values = read_normals(normals.annotations[0], (48, 48))
    assert values[2, labels > 0].min() > 0.8 * values[2, labels > 0].min().sign()
    assert len(labels.unique()) > 2
    with pytest.raises(ValueError, match="holds scenes of other settings"):
        annotated_scenes(tmp_path, "parts", replace(settings, scenes=3), progress=False)


def test_intersection_over_union() -> None:
    truth = torch.tensor([[0, 0, 1], [1, 1, IGNORED]])
    counts = confusion(torch.tensor([[0, 1, 1], [1, 1, 0]]), truth, 3)
    scores = PixelScores(counts, ("a", "b", "c"))
    assert scores.iou() == {"a": pytest.approx(1 / 2), "b": pytest.approx(3 / 4)}
    assert scores.document()["mean_iou"] == pytest.approx(5 / 8)
    assert scores.document()["pixel_accuracy"] == pytest.approx(4 / 5)


# -- the command line -------------------------------------------------------------------------------------------


def test_every_kind_is_trained_and_recognised(
    steps: Path, sd_folder: Path, vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, work = str(steps / "images"), ["--work", str(tmp_path / "work"), "--size", "64"]
    taps = ["--backbone", str(sd_folder), "--taps", "conv_in"]
    dense = ["probe", "dense", "depth", images, str(steps / "depth"), *taps, "--fit.epochs", "2", *work]
    assert main([*dense, "-o", str(tmp_path / "dense")]) == 0
    assert "test, aligned  AbsRel" in capsys.readouterr().out
    maps, some = tmp_path / "maps", str(steps / "images" / "0[01].png")
    assert main(["probe", "predict", str(tmp_path / "dense"), some, "-o", str(maps), "--formats", "npy"]) == 0
    assert np.load(maps / "00_depth.npy").shape == (32, 64)
    assert json.loads((maps / "00_depth.json").read_text())["unit"] == "metres"
    assert len(list(maps.glob("*_depth_preview.png"))) == 2
    quick = ["--fit.members", "2", "--fit.epochs", "2", "--timesteps", "10", "--pixels-per-image", "500"]
    pixels = ["probe", "pixels", images, str(steps / "labels"), "--classes", str(steps / "names.json"), *taps, *quick]
    assert main([*pixels, *work, "-o", str(tmp_path / "pixels")]) == 0
    assert "test  mIoU" in capsys.readouterr().out
    assert main(["probe", "predict", str(tmp_path / "pixels"), some, "-o", str(maps)]) == 0
    with Image.open(maps / "00_labels.png") as picture:
        assert picture.mode == "P"
        labels = np.array(picture)
    about = json.loads((maps / "00_labels.json").read_text())
    assert about["classes"] == ["far", "near"]
    assert about["shares"]["near"] == pytest.approx((labels == 1).mean(), abs=1e-6)
    colours = image_folder(tmp_path / "colours", 4)
    small = ["--fit.width", "16", "--fit.heads", "2", "--fit.depth", "1", "--fit.recipe.epochs", "1"]
    feedback = ["probe", "feedback", str(colours), "--backbone", str(sd_folder), *small]
    assert main([*feedback, *work, "-o", str(tmp_path / "feedback")]) == 0
    assert "test  top-1" in capsys.readouterr().out
    red = str(colours / "red")
    assert main(["probe", "predict", str(tmp_path / "feedback"), red, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert_older_forms_open(tmp_path, sd_folder, steps / "images" / "00.png")
    for kind in ("dense", "pixels", "feedback"):
        folder = str(tmp_path / kind)
        assert main(["probe", "predict", folder, red, "--backbone", str(vit_folder), "-o", str(tmp_path / "x")]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "has other weights" in told or "must end in .csv" in told
    assert not (tmp_path / "x").exists()
    assert main([*dense, "-o", str(tmp_path / "pixels"), "--overwrite"]) == 2
    assert "holds a probe of another kind (pixels)" in capsys.readouterr().err
    assert main(["probe", "predict", str(tmp_path / "colours"), red]) == 2
    assert "holds no probe" in capsys.readouterr().err


def assert_older_forms_open(folder: Path, backbone: Path, image: Path) -> None:
    """The four files of version 0.1 give the same predictions; damaged ones are refused in a line."""
    forms = {"dense": "dense-probe", "pixels": "pixel-probe", "feedback": "diffeed"}
    for kind, form in forms.items():
        stem, old = form.replace("-", "_"), folder / f"old-{kind}"
        old.mkdir()
        document = json.loads((folder / kind / "probe.json").read_text())
        (features,) = document["features"].values()
        del document["kind"]
        document = {**document, "format": f"diffrep-{form}", "version": 1, "features": features}
        document.pop("resizing", None)
        (old / f"{stem}.json").write_text(json.dumps(document))
        (old / f"{stem}.safetensors").write_bytes((folder / kind / "probe.safetensors").read_bytes())
        assert saved_kind(old) == kind
        loaded, new = load_probe(old), load_probe(folder / kind)
        assert repr(loaded) == repr(new)
        answers = [probe.predict([image]) for probe in (loaded, new)]
        get = {"feedback": "probabilities", "dense": "values", "pixels": "labels"}[kind]
        first, second = (getattr(a if kind == "feedback" else a[0], get) for a in answers)
        assert torch.equal(first, second)
        damage_of_every_kind(old / f"{stem}.json", document, load_probe)


def test_what_does_not_fit_is_told_in_one_line(
    steps: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = str(steps / "images"), tmp_path / "probe"

    def told(*arguments: str) -> str:
        common = ["--backbone", str(sd_folder), "--work", str(tmp_path / "work"), "-o", str(out)]
        assert main(["probe", *arguments, *common]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert not out.exists()
        return lines[-1]

    def beside(name: str, values: np.ndarray) -> str:
        """A folder of annotations that are all the same."""
        folder = tmp_path / name
        folder.mkdir()
        for number in range(8):
            np.save(folder / f"{number:02d}.npy", values)
        return str(folder)

    assert "say which folder holds the depth" in told("dense", "depth", images)
    assert "no annotation for 8 of 8 images" in told("dense", "depth", images, str(tmp_path))
    assert "no such folder of annotations" in told("dense", "normals", images, str(tmp_path / "none"))
    assert "has the shape (4, 4), its image (32, 64)" in told("dense", "depth", images, beside("a", np.ones((4, 4))))
    nothing = beside("b", np.zeros((32, 64)))
    assert "no pixel of the 6 images has known depth" in told("dense", "depth", images, nothing)
    assert "a DPT reader takes four maps" in told(
        "dense", "depth", images, str(steps / "depth"), "--fit.reader", "dpt", "--taps", "conv_in"
    )
    assert "a depth picture has one channel of 16 bits" in told("dense", "depth", images, str(steps / "labels"))
    assert "the test split is empty" in told("dense", "depth", images, str(steps / "depth"), "--held-out", "0.01")
    assert "labels are integers" in told("pixels", images, beside("c", np.ones((32, 64))))
    assert "found 1" in told("pixels", images, beside("d", np.ones((32, 64), np.uint8)))
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "has the label 3, which is none of the 2 classes (0..1) nor the ignored 255" in told(
        "pixels", images, str(steps / "labels"), "--classes", str(tmp_path / "names.txt")
    )
    assert "labels of parts and categories" in told("pixels", "scenes:colours")


def test_class_names_and_numbers(steps: Path, tmp_path: Path) -> None:
    data = pair_annotations(steps / "images", steps / "labels")
    assert find_classes([data]).names == ("3", "7")
    named = find_classes([data], steps / "names.json")
    assert named.names == ("far", "near")
    read = named.read(data.annotations[0], (32, 64))
    assert set(read.unique().tolist()) == {IGNORED, 0, 1}
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="names of classes cannot be read"):
        find_classes([data], tmp_path / "broken.json")
