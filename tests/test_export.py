"""Backbones and heads as ONNX and torch.export files, checked with ONNX Runtime on the embedded models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffrep.backbones import BackboneError, Conditions, load_backbone
from diffrep.backbones.export import export_backbone
from diffrep.cli import main
from diffrep.heads.export import ExportedHead, export_head
from diffrep.heads.head import HeadError
from diffrep.heads.loading import load_head

from .test_head_files import full_disk

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def test_an_onnx_file_computes_the_taps_of_any_image_and_ends_there(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    backbone, conditions = load_backbone("tiny"), Conditions(timestep=200, seed=3, posterior="sample", ensemble=2)
    sizes = []
    for taps in (("down.0",), ("mid", "up.1")):
        file = tmp_path / f"{taps[0]}.onnx"
        export_backbone(backbone, file, taps=taps, conditions=conditions, size=64, batch_size=2)
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == list(taps)
        expected = backbone.maps(PIXELS, taps, conditions)
        for tap, value in zip(taps, session.run(None, {"pixels": PIXELS.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected[tap], rtol=1e-3, atol=1e-4)
        weights = onnx.load(file).graph.initializer
        sizes.append(sum(len(tensor.raw_data) for tensor in weights))
    assert sizes[0] < sizes[1] / 2  # nothing behind the deepest tap is in the file


def test_a_torch_file_computes_the_same(tmp_path: Path) -> None:
    backbone = load_backbone("tiny-dino")
    assert export_backbone(backbone, tmp_path / "dino.pt2", size=64, batch_size=2) < 1e-5
    program = torch.export.load(tmp_path / "dino.pt2").module()
    torch.testing.assert_close(program(PIXELS)[0], backbone(PIXELS)[backbone.recommended.taps[0]])


def test_the_command_writes_backbones_and_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "tiny-dino", "-o", str(tmp_path / "dino.pt2"), "--size", "64"]) == 0
    assert main(["export", "tiny-normals", "--head", "-o", str(tmp_path / "n.pt2"), "--size", "64"]) == 0
    assert capsys.readouterr().out.count("wrote") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dino.pt2", "n.pt2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "-o", "a.txt"], ".onnx"),
        (["tiny", "-o", "a.pt2", "--taps", "up.9"], "near names"),
        (["tiny", "-o", "a.pt2", "--size", "60"], "multiples of"),
        (["tiny-dino", "-o", "a.pt2", "--timestep", "9"], "--timestep does not go with"),
        (["tiny-depth", "--head", "-o", "a.pt2", "--taps", "up.1"], "--head goes without --taps"),
        (["tiny", "-o", "a.pt2", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_endings_are_checked_by_the_library_too(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"must end in \.onnx or \.pt2"):
        export_backbone(load_backbone("tiny-dino"), tmp_path / "a.bin", size=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-depth", "tiny-segmentation", "tiny-restore"])
def test_an_onnx_file_of_a_head_computes_what_the_head_does(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    file = tmp_path / "head.onnx"
    assert main(["export", name, "--head", "-o", str(file), "--size", "64"]) == 0
    said = capsys.readouterr()
    assert "wrote" in said.out
    assert "translating it to ONNX" in said.err  # it takes a while
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.get_outputs()
    (value,) = session.run(None, {"pixels": PIXELS[:1].numpy()})
    with torch.no_grad():
        (expected,) = ExportedHead(load_head(name), (64, 64))(PIXELS[:1])
    torch.testing.assert_close(torch.from_numpy(value), expected, rtol=1e-3, atol=1e-3)
    assert output.name == {"tiny-segmentation": "mask", "tiny-restore": "restored"}.get(name, "map")


def test_what_an_exported_head_computes_is_what_it_predicts() -> None:
    image = PIXELS[0].mul(255).round() / 255
    for name, config in (("tiny-segmentation", {"size": 64}), ("tiny-restore", {"scale": 1, "colours": "none"})):
        head = load_head(name)
        with torch.no_grad():
            (value,) = ExportedHead(head, (64, 64))(image[None])
        predicted = torch.from_numpy(head(image, **config).numpy().copy()).float()
        if name == "tiny-restore":
            predicted, value = predicted.permute(2, 0, 1) / 255, value[0]
        torch.testing.assert_close(value.squeeze(), predicted, rtol=0, atol=2 / 255)


def test_heads_that_compute_the_clean_latent_can_be_traced(tmp_path: Path) -> None:
    head = load_head("tiny-depth")
    family = replace(head.model.family, result="clean", first_latent="none", predicts="v_prediction")
    head.model.family, head.model.schedule = family, replace(head.model.schedule, predicts="v_prediction")
    assert export_head(head, tmp_path / "head.pt2", size=64) < 1e-4


def test_a_head_that_takes_more_than_pixels_is_refused_in_a_line(tmp_path: Path) -> None:
    head = load_head("tiny-restore")
    head.model.process = object()  # as ResShift, which takes several steps
    with pytest.raises(HeadError, match="is not exported"):
        export_head(head, tmp_path / "a.onnx")
    with pytest.raises(HeadError, match="must be a multiple of 8"):
        export_head(load_head("tiny-depth"), tmp_path / "a.onnx", size=60)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_stops_the_export_and_not_the_process(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(BackboneError, match=r"dino\.pt2: torch cannot export this network .*too large"):
        export_backbone(load_backbone("tiny-dino"), tmp_path / "dino.pt2", size=64)
    assert not list(tmp_path.iterdir())
