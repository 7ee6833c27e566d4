"""``diffrep probe predict``: use a saved probe of any kind; its folder says all that is needed."""

from __future__ import annotations

import csv
import io
import json as json_module
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from diffrep.backbones import Backbone
from diffrep.commands.image_runs import Item, check_folder, find_inputs, run_images, write_beside, write_map
from diffrep.files import check_writable, write_whole
from diffrep.heads.probes.dense import DenseProbe
from diffrep.heads.probes.pixels import PixelLabelling, PixelProbe
from diffrep.heads.probes.probe import MapProbe, Prediction, load_named, load_probe, load_recorded, saved_features
from diffrep.images import find_images


@dataclass(frozen=True)
class Predict:
    """Use a trained probe of any kind: classes of images, labels of their pixels, depth or normals.

    For example: diffrep probe predict probe/ photos/ --top 3, or maps into files: diffrep probe predict depth-probe/
    photos/ -o maps
    """

    model: Annotated[Path, tyro.conf.Positional]  # folder of a probe
    paths: Annotated[tuple[str, ...], tyro.conf.Positional]  # images, folders, glob patterns
    top: int = 1  # classifiers: classes shown of each image
    # [NAME=]MODEL: where the probe's backbone lies now, or what may be fetched; NAME of its own, where it reads several
    backbone: tuple[str, ...] = ()
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # classes: .csv or .json; maps: folder, "maps"
    formats: tuple[Literal["png", "npy", "tiff"], ...] = ("png",)  # depth, normals; png: 16 bits; others: float32
    preview: bool = True  # depth, normals: also write a coloured picture
    json: bool = False  # print JSON
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    batch_size: int = 16  # images that go through the network together

    def run(self) -> None:
        if self.top < 1 or self.batch_size < 1:
            raise ValueError(f"top and batch_size must be at least 1, got {self.top} and {self.batch_size}")
        if not self.paths:
            raise ValueError("say which images: diffrep probe predict MODEL IMAGES")
        backbones = self._backbones()
        probe = load_probe(self.model, backbone=next(iter(backbones.values()), None))
        if isinstance(probe, MapProbe):
            self._maps(probe, *backbones.values())
            return
        if self.output is not None:
            check_writable(self.output, (".csv", ".json"))
        files = find_images(self.paths)
        self._show(files, probe.predict(files, backbones=backbones, batch_size=self.batch_size))

    def _backbones(self) -> dict[str, Backbone]:
        """The probe's backbones by their recorded names, or those that are named in their place."""
        recorded, places = saved_features(self.model), dict[str, str]()
        for text in self.backbone:
            name = next((name for name in recorded if text == name or text.startswith(f"{name}=")), "")
            if not name and len(recorded) > 1:
                raise ValueError(f"--backbone {text}: write NAME=MODEL, this probe reads {', '.join(recorded)}")
            place, name = text.removeprefix(f"{name}="), name or next(iter(recorded), "")
            if name in places:
                raise ValueError(f"--backbone names {name} twice")
            places[name] = place
        loaders = {name: load_named if name in places else load_recorded for name in recorded}
        return {name: load(places.get(name, name), recorded[name], self.device) for name, load in loaders.items()}

    def _show(self, files: Sequence[Path], prediction: Prediction) -> None:
        rows = list(zip(files, prediction.top(self.top), strict=True))
        document = json_module.dumps(
            [
                {"image": str(file), "classes": [{"class": c, "probability": round(p, 6)} for c, p in likeliest]}
                for file, likeliest in rows
            ],
            indent=2,
        )
        if self.output is not None:
            table = io.StringIO()
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(["image", "class", "probability"])
            writer.writerows([str(file), name, f"{share:.6f}"] for file, likeliest in rows for name, share in likeliest)
            write_whole(self.output, document + "\n" if self.output.suffix == ".json" else table.getvalue())
        if self.json:
            print(document)
            return
        for file, likeliest in rows:
            print(f"{file}  " + "  ".join(f"{c} {100 * p:.1f} %" for c, p in likeliest))

    def _maps(self, probe: MapProbe, backbone: Backbone) -> None:
        folder = self.output or Path("maps")
        check_folder(folder)
        if not isinstance(probe, PixelProbe) and not self.formats and not self.preview:
            raise ValueError("nothing would be written: name --formats, or leave the preview on")
        inputs = find_inputs(self.paths, folder)

        def write(item: Item, image: Image.Image, result: Any) -> list[Path]:
            if isinstance(probe, PixelProbe):
                return write_beside(item.place, {"labels": result.picture()}, "labels", shares(result, probe.classes))
            return write_map(item.place, result, self.formats, show=self.preview)

        done = run_images(_Mapper(probe, backbone), inputs, folder, self, write)
        if self.json:
            print(json_module.dumps({"model": str(self.model), "images": done}, indent=2))
            return
        count = sum(len(entry["files"]) for entry in done)  # type: ignore[arg-type, misc]  # lists, by run_images
        print(f"wrote {count} files for {len(done)} images into {folder}")


@dataclass(frozen=True)
class _Mapper:
    """A probe of pixels, depth or normals as `run_images` takes it."""

    probe: MapProbe
    backbone: Backbone

    @property
    def task(self) -> str:
        return self.probe.task if isinstance(self.probe, DenseProbe) else "labels"

    def check(self, config: Predict) -> None:
        self.probe.check(self.backbone)

    def predict_each(self, images: list[Image.Image], config: Predict) -> Iterator[Any]:
        return self.probe.predict_each(images, backbone=self.backbone, checked=True, batch_size=config.batch_size)


def shares(result: PixelLabelling, classes: Sequence[str]) -> dict[str, object]:
    """The share of the pixels that each class covers, the largest first, and the uncertainty of the whole."""
    counts = torch.bincount(result.labels.flatten(), minlength=len(classes))
    ordered = sorted(zip(classes, (counts / counts.sum()).tolist(), strict=True), key=lambda pair: -pair[1])
    return {
        "classes": list(classes),
        "shares": {name: round(share, 6) for name, share in ordered if share > 0},
        "uncertainty": round(result.uncertainty, 6),
    }
