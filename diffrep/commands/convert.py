"""``diffrep convert``: a published latent diffusion checkpoint becomes a diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffrep.backbones import BackboneError
from diffrep.backbones.weight_files import read_weights
from diffrep.files import one_line, replace_folder
from diffrep.synthesis import About, load_synthesis
from diffrep.synthesis.checkpoints import convert_official, find_official, read_config


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
