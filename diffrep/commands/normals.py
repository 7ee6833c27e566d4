"""``diffrep normals``: how the surfaces in an image are turned."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from diffrep.commands.dense import Map, check_folder, run_images, write_map
from diffrep.heads.dense import PredictConfig
from diffrep.heads.families import Frame
from diffrep.heads.loading import load_head
from diffrep.heads.maps import NormalMap
from diffrep.images import find_images


@dataclass(frozen=True)
class Normals:
    """Predict the surface normals of images in one pass of a diffusion U-Net.

    For example: diffrep normals photo.jpg -o maps

    Every image gets the files that --formats names, a coloured preview and a JSON file that says what the camera axes
    are. Normals have unit length. Frames of a video, given in order, all see the same noise.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional]  # files, folders or glob patterns
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("normals")  # folder that the files go into
    model: str = "tiny-normals"  # embedded head, folder or hub id: Lotus, Marigold, E2E-FT
    family: str | None = None  # what the model is, where its files do not say it, for example e2e-ft
    task: Literal["normals"] | None = None  # say it where the model's files do not
    frame: Frame | None = None  # camera axes of the files: lub (Lotus), rub (Marigold), rdf (OpenCV); else the model's
    formats: tuple[Literal["png", "npy", "tiff"], ...] = ("png",)  # png: 16 bits; npy, tiff: float32
    preview: bool = True  # also write a coloured picture, always with x right and y up
    device: str = "cpu"  # cpu or cuda
    precision: Literal["float32", "bfloat16", "float16"] | None = None  # float32 on cpu, bfloat16 on cuda
    json: bool = False  # print what was written as JSON
    predict: Annotated[PredictConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=PredictConfig)

    def run(self) -> None:
        if not self.images:
            raise ValueError("say which images: diffrep normals IMAGES -o FOLDER")
        if not self.formats and not self.preview:
            raise ValueError("nothing would be written: name --formats, or leave the preview on")
        check_folder(self.output)
        paths = find_images(self.images)
        dtype = None if self.precision is None else getattr(torch, self.precision)
        head = load_head(self.model, task=self.task, family=self.family, device=self.device, dtype=dtype)
        if head.task != "normals":
            raise ValueError(f"{self.model}: predicts {head.task}; use diffrep depth")

        def write(path: Path, name: str, image: Image.Image, result: Map) -> list[Path]:
            assert isinstance(result, NormalMap)
            result = result if self.frame is None else result.to_frame(self.frame)
            return write_map(self.output / name, result, self.formats, show=self.preview)

        done = run_images(head, paths, self.predict, write)
        if self.json:
            print(json.dumps({"model": self.model, "found": head.found, "images": done}, indent=2))
        else:
            print(f"{self.model}: {head.found}")
            print(f"wrote {sum(len(entry['files']) for entry in done)} files for {len(done)} images into {self.output}")  # type: ignore[arg-type, misc]  # lists, by run_images
