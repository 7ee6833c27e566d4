"""``diffrep segment``: cut the object out of an image."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from diffrep.commands.dense import check_folder, run_images
from diffrep.commands.output import write_image
from diffrep.files import write_whole
from diffrep.heads.cutouts import backdrop, composite, cut_out, grey_image
from diffrep.heads.mask_prediction import Segmentation, SegmentConfig
from diffrep.heads.segmentation_loading import load_segmentation
from diffrep.images import find_images

Kind = Literal["mask", "binary", "edge", "cutout", "composite"]
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Segment:
    """Find the object in images, in one pass of a diffusion U-Net, and cut it out.

    For example: diffrep segment photo.jpg -o out, or a folder before white: diffrep segment photos/ -o out --outputs
    composite --background white

    The mask is soft along outlines, but no alpha matte: glass and smoke do not become transparent. Every run writes
    summary.json into the output folder.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional]  # files, folders or glob patterns
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("segments")  # folder that the files go into
    model: str = "tiny-segmentation"  # embedded head, folder, hub id or weight file of a DiffDIS
    base: str | None = None  # where VAE and text encoder are, for a U-Net alone, for example sd-turbo
    outputs: tuple[Kind, ...] = ("mask", "cutout")  # soft mask; mask at the threshold; edges; RGBA; on the background
    threshold: float = 0.5  # of the binary mask
    background: str = "white"  # of the composite: a colour such as white or #20c040, or an image file
    foreground: bool = True  # estimate the object's own colour along outlines, against halos
    device: str = "cpu"  # cpu or cuda
    precision: Literal["float32", "bfloat16", "float16"] | None = None  # float32 on cpu, bfloat16 on cuda
    json: bool = False  # print the summary as JSON
    predict: Annotated[SegmentConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SegmentConfig)

    def run(self) -> None:
        self._check()
        paths = find_images(self.images)
        dtype = None if self.precision is None else getattr(torch, self.precision)
        head = load_segmentation(self.model, base=self.base, device=self.device, dtype=dtype)
        about: dict[str, dict[str, object]] = {}

        def write(path: Path, name: str, image: Image.Image, result: Segmentation) -> list[Path]:
            about[str(path)] = result.metadata(self.threshold)
            return self._write(self.output / name, image, result)

        summary: dict[str, Any] = {"model": self.model, "found": head.found, "images": []}
        try:
            done = run_images(head, paths, self._config(), write)
        finally:  # also where images failed, for those that did not
            summary["images"] = [{"image": path, **values} for path, values in about.items()]
            if about:
                write_whole(self.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
        if self.json:
            print(json.dumps(summary, indent=2))
        else:
            print(f"{self.model}: {head.found}")
            for entry in done:
                share = about[str(entry["image"])]["object"]
                print(f"{entry['image']}: the object covers {share:.1%}")
            print(f"wrote {len(done) * len(self.outputs)} files and {SUMMARY} into {self.output}")

    def _config(self) -> SegmentConfig:
        """Edges are predicted only where they are written."""
        return SegmentConfig(**{**vars(self.predict), "edges": self.predict.edges or "edge" in self.outputs})

    def _check(self) -> None:
        """Refuse options that do not go together before any work.

        Raises:
            ValueError: naming them.
        """
        if not self.images:
            raise ValueError("say which images: diffrep segment IMAGES -o FOLDER")
        if not self.outputs:
            raise ValueError("nothing would be written: name --outputs")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.predict.edges and "edge" not in self.outputs:
            raise ValueError("--edges predicts what nothing writes: name edge among --outputs")
        if "composite" in self.outputs:
            backdrop(self.background, (8, 8))
        check_folder(self.output)

    def _write(self, base: Path, image: Image.Image, result: Segmentation) -> list[Path]:
        written = []
        for kind in dict.fromkeys(self.outputs):
            if kind == "mask":
                picture = grey_image(result.mask)
            elif kind == "binary":
                picture = grey_image(result.binary(self.threshold).float())
            elif kind == "edge":
                assert result.edge is not None
                picture = grey_image(result.edge)
            elif kind == "cutout":
                picture = cut_out(image, result.mask, estimate=self.foreground)
            else:
                picture = composite(image, result.mask, self.background, estimate=self.foreground)
            written.append(base.with_name(f"{base.name}_{kind}.png"))
            write_image(written[-1], picture)
        return written
