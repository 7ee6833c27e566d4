"""``diffrep convert`` of files that are damaged or belong to something else: one line that names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffrep.cli import main

CASES = Path(__file__).parent / "cases" / "breaker-convert-weights"


@pytest.mark.parametrize(
    ("weights", "config", "named"),
    [
        ("empty.safetensors", "config.yaml", "empty.safetensors"),
        ("notjson.safetensors", "config.yaml", "notjson.safetensors"),
        ("offsets.safetensors", "config.yaml", "offsets.safetensors"),
        ("none.safetensors", "config.yaml", "none.safetensors"),
        ("none.safetensors", "bin.yaml", "bin.yaml"),
        ("none.safetensors", "deep.yaml", "deep.yaml"),
        ("none.safetensors", "values.yaml", "values.yaml"),
        ("missing.ckpt", "config.yaml", "missing.ckpt"),
        ("none.safetensors", "missing.yaml", "missing.yaml"),
    ],
)
def test_what_cannot_be_converted_is_named_in_a_line(
    weights: str, config: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep.yaml").write_text("[" * 3000)
    unet = "{params: {channel_mult: 7, model_channels: wide}}"
    (tmp_path / "values.yaml").write_text(f"model: {{params: {{unet_config: {unet}, first_stage_config: {{}}}}}}")
    paths = [CASES / name if (CASES / name).exists() else tmp_path / name for name in (weights, config)]
    output = tmp_path / "out" / "model"
    assert main(["convert", str(paths[0]), "--config", str(paths[1]), "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not output.parent.exists()
