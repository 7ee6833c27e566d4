"""``diffrep convert`` and ``diffrep export``: models in other forms.

A published checkpoint becomes a diffusers folder; a backbone up to a tap, or a head, a file that runs without diffrep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffrep.commands.options import ReadingOptions
from diffrep.files import check_writable, one_line, replace_folder
from diffrep.settings import check_options


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of Large-Image-Diffusion into a folder that `diffrep synthesize --model` reads.

    Lightning and the authors' code are not needed, and none of the code that the file names is run. For example:
    diffrep convert brca_20x/ --encoder FOLDER -o models/brca
    """

    source: Annotated[Path, tyro.conf.Positional]  # folder with checkpoints/ and configs/, or a .ckpt or .safetensors
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # folder to write
    config: Path | None = None  # the *-project.yaml, where `source` is a file
    ema: bool = True  # take the moving average of the U-Net, if the file has it
    groups: int = 32  # of the group norms
    encoder: str | None = None  # backbone that made the embeddings, to be remembered
    pooling: Literal["class", "mean"] = "class"  # how its tokens become one embedding
    guidance: float = 4.0  # scale to be remembered; the published sampler's 3 is 4
    unrelated: float = 0.6  # cosine up to which the encoder's embeddings are unrelated, to be remembered
    pixel_size: float | None = None  # micrometres a pixel, to be remembered

    def run(self) -> None:
        from diffrep.backbones import BackboneError
        from diffrep.backbones.weight_files import read_weights
        from diffrep.synthesis import About, load_synthesis
        from diffrep.synthesis.checkpoints import convert_official, find_official, read_config

        if self.output.exists():
            raise ValueError(f"{self.output}: is already there; give another folder")
        if self.source.is_dir():
            checkpoint, config = find_official(self.source)
        elif self.config is None:
            raise ValueError(f"{self.source}: is a file; name its configuration with --config")
        else:
            checkpoint, config = self.source, self.config
        config = self.config or config
        about = About(
            encoder=self.encoder, pooling=self.pooling, guidance=self.guidance, unrelated=self.unrelated,
            pixel_size=self.pixel_size,
        )  # fmt: skip
        values, weights = read_config(config), read_weights(checkpoint)
        try:
            model = convert_official(weights, values, groups=self.groups, ema=self.ema, about=about)
        except Exception as error:  # a configuration of somebody else can be wrong in any of its values
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise BackboneError(f"{checkpoint} with {config}: cannot be converted ({kind}{one_line(error)})") from None

        def write(folder: Path) -> None:
            model.save(folder)
            if load_synthesis(folder).checksum() != model.checksum():
                raise OSError(f"{self.output}: what was written does not read back as it was")

        replace_folder(self.output, write)
        million = sum(p.numel() for p in model.unet.parameters()) / 1e6
        print(f"wrote {self.output}: U-Net of {million:.1f} M parameters, embeddings of {model.embedder.dims}")


@dataclass(frozen=True, kw_only=True)
class Export(ReadingOptions):
    """Write a backbone up to a tap, or a one-step head, as an ONNX or torch.export file, and check what it computes.

    Of a head it is the network alone, in one pass: no mirror image, edges, ensemble or tiles, which the commands add.

    For example: diffrep export tiny --taps up.1 -o tiny.onnx
    """

    model: Annotated[str, tyro.conf.Positional]  # a backbone, or with --head a head: a name, a folder or a hub id
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # file to write, .onnx or .pt2 (torch.export)
    head: bool = False  # the model is a one-step head: depth, normals, masks, restoration
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

        check_writable(self.output, (".onnx", ".pt2"))
        check_options(self, batch_size="1..", size="1..8192")
        settings = {"timestep": self.timestep, "prompt": self.prompt, "seed": self.seed}
        chosen = {name: value for name, value in settings.items() if value is not None}
        if self.head:
            from diffrep.heads.export import export_head
            from diffrep.heads.loading import load_head

            if self.taps is not None or chosen or self.lora or self.schedule:
                raise ValueError("--head goes without --taps, --timestep, --schedule, --prompt, --seed and --lora")
            head = load_head(self.model, variant=self.variant, revision=self.revision)
            difference = export_head(head, self.output, size=self.size, batch_size=self.batch_size, progress=True)
        else:
            backbone = load_backbone(self.named(self.model))
            if chosen and backbone.denoises is None:
                raise ValueError(f"--{next(iter(chosen))} does not go with {self.model}, which takes no noise")
            place = self.place(self.typed, backbone)
            taps = place.pop("taps", self.taps)
            chosen |= place
            difference = export_backbone(
                backbone,
                self.output,
                taps=taps,
                conditions=replace(backbone.recommended.conditions, **chosen),  # type: ignore[arg-type]
                size=self.size,
                batch_size=self.batch_size,
                progress=True,
            )
        megabytes = self.output.stat().st_size / 1e6
        print(f"wrote {self.output}: {megabytes:.1f} MB, within {difference:.1e} of torch")
        if not difference <= self.tolerance:
            raise ValueError(f"{self.output}: differs from torch by {difference:.1e}, more than {self.tolerance:g}")
