"""``diffrep export``: a backbone up to a tap, or a one-step head, as a file that runs without diffrep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import BackboneOptions
from diffrep.commands.output import check_writable

SUFFIXES = (".onnx", ".pt2")


@dataclass(frozen=True, kw_only=True)
class Export(BackboneOptions):
    """Write a backbone up to a tap, or a one-step head, as an ONNX or torch.export file, and check what it computes.

    For example: diffrep export tiny --taps up.1 -o tiny.onnx
    """

    model: Annotated[str, tyro.conf.Positional]  # a backbone, or with --head a head: a name, a folder or a hub id
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # file to write, .onnx or .pt2 (torch.export)
    head: bool = False  # the model is a one-step head for depth, disparity or normals
    taps: tuple[str, ...] | None = None  # activations to give; the recommended ones without
    size: int | None = None  # pixels of a side of the square images; as the model recommends without
    batch_size: int = 1  # images that go through together
    timestep: int | None = None  # noise level, which becomes part of the file
    prompt: str | None = None  # text, which becomes part of the file
    seed: int | None = None  # of the noise, which becomes part of the file
    tolerance: float = 1e-3  # largest difference to torch, relative to the largest value

    def run(self) -> None:
        from diffrep.backbones import load_backbone
        from diffrep.backbones.export import export_backbone

        check_writable(self.output, SUFFIXES)
        if self.batch_size < 1 or (self.size is not None and not 1 <= self.size <= 8192):
            raise ValueError("--batch-size must be at least 1, --size in 1..8192")
        settings = {"timestep": self.timestep, "prompt": self.prompt, "seed": self.seed}
        chosen = {name: value for name, value in settings.items() if value is not None}
        if self.head:
            from diffrep.heads.dense import export_head
            from diffrep.heads.loading import load_head

            if self.taps is not None or chosen or self.named(""):
                raise ValueError(
                    "--head goes without --taps, --timestep, --prompt, --seed, --lora, --variant and --revision"
                )
            difference = export_head(load_head(self.model), self.output, size=self.size, batch_size=self.batch_size)
        else:
            backbone = load_backbone(self.named(self.model))
            if chosen and backbone.denoises is None:
                raise ValueError(f"--{next(iter(chosen))} does not go with {self.model}, which takes no noise")
            difference = export_backbone(
                backbone,
                self.output,
                taps=self.taps,
                conditions=replace(backbone.recommended.conditions, **chosen),  # type: ignore[arg-type]
                size=self.size,
                batch_size=self.batch_size,
            )
        megabytes = self.output.stat().st_size / 1e6
        print(f"wrote {self.output}: {megabytes:.1f} MB, within {difference:.1e} of torch")
        if not difference <= self.tolerance:
            raise ValueError(f"{self.output}: differs from torch by {difference:.1e}, more than {self.tolerance:g}")
