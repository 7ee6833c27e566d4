"""Backbones up to a tap as ONNX or `torch.export` files, for programs without diffrep.

The file holds everything that an image goes through at one size: normalisation, the VAE's encoder, the noise of the
seed, the prompt's embedding, the network up to the deepest tap. Nothing behind it is in the file.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.base import Backbone, BackboneError, Conditions
from diffrep.backbones.diffusion import DiffusionBackbone, LatentBackbone
from diffrep.files import one_line

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}


class ExportedBackbone(nn.Module):
    """A backbone as a function of pixels alone: (B, 3, H, W), RGB in [0, 1] -> a map (B, C, h, w) of each tap.

    Args:
        size: (H, W) of the pixels; a canvas of the backbone.
    """

    def __init__(self, backbone: Backbone, taps: Sequence[str], conditions: Conditions, size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.taps, self.conditions = backbone, tuple(taps), conditions
        self.draws: dict[str, Tensor] = {}
        if isinstance(backbone, DiffusionBackbone):
            backbone.check_canvas(size)
            channels = backbone.vae.config.latent_channels if isinstance(backbone, LatentBackbone) else 3
            shape = (int(channels), size[0] // backbone.stride, size[1] // backbone.stride)
            self.draws = backbone.draws(shape, conditions)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        named: Any = self.draws
        maps = self.backbone.maps(pixels, self.taps, self.conditions, batch_size=len(pixels), **named)
        return tuple(maps[tap].clone() for tap in self.taps)  # no tensors of inference mode


def export_backbone(
    backbone: Backbone,
    path: str | os.PathLike[str],
    *,
    taps: Sequence[str] | None = None,
    conditions: Conditions | None = None,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> float:
    """Write a backbone up to some taps as a file that runs without diffrep.

    Args:
        path: ``.onnx``, or ``.pt2`` for `torch.export.load`.
        taps: the recommended ones where None; they are the names of the outputs.
        conditions: timestep, prompt and so on, which become part of the file; the recommended ones where None.
        size: (H, W) of the images, or one number for both; as the backbone recommends where None.
        batch_size: images that go through together.
        progress: say on stderr what is being done.

    Returns:
        The largest difference between what the file computes and the backbone, relative to the largest value.

    Raises:
        BackboneError: the ending is another one, or torch cannot export it.
        TapError: the backbone has no such tap.
        ValueError: the size does not suit the backbone.
    """
    chosen = tuple(taps or backbone.recommended.taps)
    for tap in chosen:
        backbone.tap(tap)
    if size is None:
        recommended = backbone.recommended.sizing.size
        if recommended is None:
            raise BackboneError(f"{backbone.name} takes images of any size: say for which one it is exported")
        size = recommended if isinstance(recommended, int) else (int(recommended[0]), int(recommended[1]))
    height, width = (size, size) if isinstance(size, int) else size
    conditions = conditions or backbone.recommended.conditions
    if isinstance(backbone, LatentBackbone):
        backbone.embed(conditions.prompt)  # before the pass, so that no text encoder becomes a part of it
    module = ExportedBackbone(backbone, chosen, conditions, (height, width))
    pixels = torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))
    return export_module(module, pixels.to(backbone.device, backbone.dtype), path, outputs=chosen, progress=progress)


def export_module(
    module: nn.Module, pixels: Tensor, path: str | os.PathLike[str], *, outputs: Sequence[str], progress: bool = False
) -> float:
    """Write a module as ONNX or `torch.export` file, and run the file on the example.

    Args:
        module: from (B, 3, H, W) pixels to a tuple of tensors.
        pixels: an example; its size is that of the file's input, which is called ``pixels``.
        outputs: their names.
        progress: say on stderr what is being done.

    Returns:
        As `export_backbone`.

    Raises:
        BackboneError: the ending is another one, the module fails on the example, or torch cannot export it.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise BackboneError(f"{path}: must end in {' or '.join(FORMATS)}, for {' or '.join(FORMATS.values())}")

    def say(step: str) -> None:
        if progress:
            print(f"{path}: {step}", file=sys.stderr, flush=True)

    with torch.no_grad():
        expected = module(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    # weights of over 2 GB come to lie in a file of their own beside an ONNX file, which names it: so not write_whole
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partial = Path(folder) / path.name
        try:
            say("tracing the network")
            program = torch.export.export(module.eval(), (pixels,), strict=False)
            if path.suffix == ".pt2":
                whole = io.BytesIO()  # torch's own writer of files ends the process where the disk is full
                torch.export.save(program, whole)
                partial.write_bytes(whole.getbuffer())
                computed = [value.numpy(force=True) for value in torch.export.load(partial).module()(pixels)]
            else:
                say("translating it to ONNX, which takes longest")
                _write_onnx(program, pixels, partial, outputs)
                say("running the file")
                computed = _run_onnx(partial, pixels)
        except ImportError as error:
            raise BackboneError(
                f"{path}: ONNX needs onnx, onnxscript and onnxruntime: pip install {error.name}"
            ) from None
        except Exception as error:  # what torch cannot trace or translate: many kinds
            raise BackboneError(f"{path}: torch cannot export this network ({one_line(error)})") from None
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == partial):
            file.replace(path.parent / file.name)
    return max(
        float(abs(ours - theirs.numpy(force=True)).max() / theirs.abs().max().clamp(min=1e-12))
        for ours, theirs in zip(computed, expected, strict=True)
    )


def _write_onnx(program: Any, pixels: Tensor, path: Path, outputs: Sequence[str]) -> None:
    import onnxruntime  # noqa: F401  # missing: say so before minutes of work

    translated = torch.onnx.export(
        program, (pixels,), dynamo=True, verbose=False, input_names=["pixels"], output_names=list(outputs)
    )
    assert translated is not None
    translated.save(path)


def _run_onnx(path: Path, pixels: Tensor) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"pixels": pixels.numpy(force=True)}))
