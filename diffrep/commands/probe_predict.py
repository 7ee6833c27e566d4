"""``diffrep probe predict``: use a saved probe of any kind; its folder says all that is needed."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from diffrep.backbones import Backbone, load_backbone
from diffrep.commands.dense import Map, check_folder, run_images, write_beside, write_map
from diffrep.commands.output import check_writable
from diffrep.draw import point_colours
from diffrep.files import write_whole
from diffrep.heads.probes import (
    PixelProbe,
    Prediction,
    Probe,
    load_feedback_probe,
    load_pixel_probe,
    load_probe,
)
from diffrep.heads.probes.dense_probe import DenseProbe, load_dense_probe
from diffrep.heads.probes.pixel_probe import Segmentation
from diffrep.heads.probes.saved import saved_features, saved_kind
from diffrep.images import find_images


@dataclass(frozen=True)
class Batches:
    """How many images go through the network together."""

    batch_size: int


@dataclass(frozen=True)
class Predict:
    """Use a trained probe of any kind: classes of images, labels of their pixels, depth or normals.

    For example: diffrep probe predict probe/ photos/ --top 3, or maps into files: diffrep probe predict depth-probe/
    photos/ -o maps
    """

    model: Annotated[Path, tyro.conf.Positional]  # folder of a probe
    paths: Annotated[tuple[str, ...], tyro.conf.Positional]  # images, folders, glob patterns
    top: int = 1  # classifiers: classes shown of each image
    backbone: str | None = None  # instead of the probe's own: where its backbone lies now
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # classes: .csv or .json; maps: folder, "maps"
    formats: tuple[Literal["png", "npy", "tiff"], ...] = ("png",)  # depth, normals; png: 16 bits; others: float32
    preview: bool = True  # depth, normals: also write a coloured picture
    json: bool = False  # print JSON
    device: str = "cpu"  # cpu or cuda
    batch_size: int = 16

    def run(self) -> None:
        kind = saved_kind(self.model)
        if self.top < 1 or self.batch_size < 1:
            raise ValueError(f"top and batch_size must be at least 1, got {self.top} and {self.batch_size}")
        if not self.paths:
            raise ValueError("say which images: diffrep probe predict MODEL IMAGES")
        if kind in ("pixels", "dense"):
            self._maps(load_pixel_probe(self.model) if kind == "pixels" else load_dense_probe(self.model))
            return
        if self.output is not None:
            check_writable(self.output, (".csv", ".json"))
        files = find_images(self.paths)
        self._show(files, self._classes(files) if kind == "feedback" else self._classes_of_cells(files))

    # -- classes --------------------------------------------------------------------------------------------

    def _classes_of_cells(self, files: Sequence[Path]) -> Prediction:
        probe = load_probe(self.model)
        return probe.predict(files, backbones=self._named(probe), device=self.device, batch_size=self.batch_size)

    def _named(self, probe: Probe) -> Mapping[str, Backbone] | None:
        if self.backbone is None:
            return None
        if len(probe.features) > 1:
            raise ValueError(f"--backbone stands for one, this probe reads {', '.join(probe.features)}")
        (name,) = probe.features
        return {name: self._load(probe.features[name])}

    def _classes(self, files: Sequence[Path]) -> Prediction:
        backbone = self._load(saved_features(self.model))
        probe = load_feedback_probe(self.model, backbone)
        return probe.predict(files, backbone=backbone, batch_size=self.batch_size)

    def _show(self, files: Sequence[Path], prediction: Prediction) -> None:
        rows = list(zip(files, prediction.top(self.top), strict=True))
        document = json_module.dumps(
            [
                {"image": str(file), "classes": [{"class": c, "probability": round(p, 6)} for c, p in found]}
                for file, found in rows
            ],
            indent=2,
        )
        if self.output is not None:
            lines = ["image,class,probability", *(f'"{f}","{c}",{p:.6f}' for f, found in rows for c, p in found)]
            write_whole(self.output, document + "\n" if self.output.suffix == ".json" else "\n".join(lines) + "\n")
        if self.json:
            print(document)
            return
        for file, found in rows:
            print(f"{file}  " + "  ".join(f"{c} {100 * p:.1f} %" for c, p in found))

    # -- maps -----------------------------------------------------------------------------------------------

    def _maps(self, probe: PixelProbe | DenseProbe) -> None:
        folder = self.output or Path("maps")
        check_folder(folder)
        if isinstance(probe, DenseProbe) and not self.formats and not self.preview:
            raise ValueError("nothing would be written: name --formats, or leave the preview on")
        files = find_images(self.paths)
        backbone = self._load(probe.features)

        if isinstance(probe, PixelProbe):
            segmenter = _Segmenter(probe, backbone)

            def write_labels(path: Path, name: str, image: Image.Image, result: Segmentation) -> list[Path]:
                picture = {"labels": label_picture(result, len(probe.classes))}
                return write_beside(folder / name, picture, "labels", shares(result, probe.classes))

            done = run_images(segmenter, files, Batches(self.batch_size), write_labels)
        else:

            def write(path: Path, name: str, image: Image.Image, result: Map) -> list[Path]:
                return write_map(folder / name, result, self.formats, show=self.preview)

            done = run_images(_Mapper(probe, backbone), files, Batches(self.batch_size), write)
        if self.json:
            print(json_module.dumps({"model": str(self.model), "images": done}, indent=2))
            return
        print(f"wrote {sum(len(entry['files']) for entry in done)} files for {len(done)} images into {folder}")  # type: ignore[arg-type, misc]  # lists, by run_images

    def _load(self, features: Mapping[str, Any]) -> Backbone:
        name = self.backbone or features["backbone"]
        return load_backbone(name, device=self.device, dtype=getattr(torch, features["dtype"]))


@dataclass(frozen=True)
class _Segmenter:
    """A pixel probe as `run_images` takes it."""

    probe: PixelProbe
    backbone: Backbone
    task: str = "labels"

    def check(self, config: object) -> None:
        self.probe.check(self.backbone)

    def predict_each(self, images: list[Image.Image], config: object) -> Iterator[Segmentation]:
        return self.probe.segment_each(images, backbone=self.backbone, checked=True)


@dataclass(frozen=True)
class _Mapper:
    """A dense probe as `run_images` takes it."""

    probe: DenseProbe
    backbone: Backbone

    @property
    def task(self) -> str:
        return self.probe.task

    def check(self, config: object) -> None:
        self.probe.check(self.backbone)

    def predict_each(self, images: list[Image.Image], config: Batches) -> Iterator[Map]:
        size = config.batch_size
        return self.probe.predict_each(images, backbone=self.backbone, checked=True, batch_size=size)


def label_picture(result: Segmentation, classes: int) -> Image.Image:
    """Labels as a palette picture: the value of a pixel is its class; class 0 is black."""
    picture = Image.fromarray(result.labels.numpy().astype(np.uint8))
    picture.putpalette([0, 0, 0, *(level for colour in point_colours(classes - 1) for level in colour)])
    return picture


def shares(result: Segmentation, classes: Sequence[str]) -> dict[str, object]:
    """The share of the pixels that each class covers, the largest first, and the uncertainty of the whole."""
    counts = torch.bincount(result.labels.flatten(), minlength=len(classes))
    ordered = sorted(zip(classes, (counts / counts.sum()).tolist(), strict=True), key=lambda pair: -pair[1])
    return {
        "classes": list(classes),
        "shares": {name: round(share, 6) for name, share in ordered if share > 0},
        "uncertainty": round(result.uncertainty, 6),
    }
