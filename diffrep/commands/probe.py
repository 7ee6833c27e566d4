"""``diffrep probe``: classify images with the features of a frozen backbone."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from diffrep.backbones import Backbone, load_backbone
from diffrep.commands.output import check_writable, write_image, write_text
from diffrep.eval.probe_data import named_images
from diffrep.features import ExtractConfig
from diffrep.heads.probes import (
    LabelledImages,
    Probe,
    ProbeData,
    ProbeFit,
    Reading,
    balance,
    block_taps,
    draw_heat_map,
    load_probe,
    parse_cells,
    readings_of,
    sweep,
    train_probe,
)
from diffrep.heads.probes.layouts import Kind
from diffrep.images import Sizing, find_images

SWEPT = (10, 50, 100, 200, 350, 500)  # timesteps of a sweep


@dataclass(frozen=True, kw_only=True)
class Images:
    """Which labelled images, and how they are split."""

    image: str | None = None  # column or key of the image; "path" in a table, "image" in a data set
    label: str = "label"  # column or key of the label
    group: str | None = None  # column or key of a group that is kept together in the split
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)  # of train, val, test, where the source names no split
    split_seed: int = 0
    work: Path = Path("runs/probe")  # features are kept here, so that they are read once
    workers: int = 0  # processes that decode images ahead
    dtype: Literal["float16", "float32"] = "float16"  # in which features are kept

    def find(self, source: str) -> LabelledImages:
        """Find the images."""
        return named_images(
            source, self.work, workers=max(self.workers, 1), image=self.image, label=self.label, group=self.group
        )

    def read(self, data: LabelledImages, backbones: Mapping[str, Backbone], readings: Sequence[Reading]) -> ProbeData:
        """Read the features that are not kept yet, and say what could not be read."""
        found = ProbeData.read(
            data,
            backbones,
            readings,
            self.work / "features",
            shares=self.shares,
            seed=self.split_seed,
            workers=self.workers,
            dtype=self.dtype,
        )
        if lost := found.unreadable():
            print(f"left out {len(lost)} images that cannot be read, the first: {lost[0]}", file=sys.stderr)
        return found


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How the backbone is used; what is left out is as it recommends."""

    size: int | None = None  # side of the square that images are brought to, pixels
    prompt: str = ""  # the text condition
    ensemble: int | None = None  # noise draws that are averaged
    noise_seed: int = 0
    batch_size: int = 16
    device: str = "cpu"  # cpu or cuda

    def config(self) -> ExtractConfig:
        """The settings without taps and timesteps."""
        sizing = None if self.size is None else Sizing("squash", self.size)
        return ExtractConfig(
            sizing=sizing,
            prompt=self.prompt,
            ensemble=self.ensemble,
            seed=self.noise_seed,
            batch_size=self.batch_size,
        )

    def load(self, names: Sequence[str]) -> dict[str, Backbone]:
        """Load backbones by their names."""
        return {name: load_backbone(name, device=self.device) for name in dict.fromkeys(names)}


@dataclass(frozen=True)
class Train:
    """Train a probe: hyperparameters are chosen on val, the choice is trained again, test is looked at once.

    For example: diffrep probe train photos/ --cells tiny,up.2.resnet.0,50 tiny-dino -o probe
    """

    data: Annotated[
        str, tyro.conf.Positional
    ]  # folder of classes, .csv, .tar, data set; or scenes, scenes:colour, digits
    cells: tuple[str, ...] = ("tiny",)  # where features are read: BACKBONE[,TAP[,TIMESTEP[,POOL]]]; several are fused
    head: Kind = "linear"
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("probe")  # folder of the probe
    overwrite: bool = False  # a probe that is there already
    json: bool = False  # print JSON
    seed: int = 0  # of the order of examples and of initial weights
    balanced: bool = False  # weigh rare classes up in the loss
    images: Annotated[Images, tyro.conf.OmitArgPrefixes] = field(default_factory=Images)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: ProbeFit = field(default_factory=ProbeFit)

    def run(self) -> None:
        check_new(self.output, overwrite=self.overwrite)
        data = self.images.find(self.data)
        names = [text.split(",")[0] for text in self.cells]
        backbones = self.extraction.load(names)
        cells = parse_cells(self.cells, backbones)
        found = self.images.read(data, backbones, readings_of(cells, self.extraction.config()))
        fit = with_seed(self.fit, self.seed, self.balanced)
        result = train_probe(found, found.layout(self.head, cells), fit, seed=self.images.split_seed)
        result.probe.save(self.output)
        if self.json:
            print(json_module.dumps(result.probe.about, indent=2))
            return
        print(balance(data, found.split))
        print(f"chosen on val: {', '.join(f'{k} {v:g}' for k, v in result.choice.items())}")
        for part, scores in (("val", result.val), ("test", result.test)):
            print(
                f"{part:<4}  top-1 {100 * scores.top1:.1f} % ({100 * scores.low:.1f}..{100 * scores.high:.1f})"
                f"  top-5 {100 * scores.top5:.1f} %  mean per class {100 * scores.mean_per_class:.1f} %"
                f"  {scores.n} images"
            )
        print(f"wrote {self.output}")


@dataclass(frozen=True)
class Predict:
    """Classify images with a trained probe.

    For example: diffrep probe predict probe/ photos/ --top 3
    """

    model: Annotated[Path, tyro.conf.Positional]  # folder of a probe
    paths: Annotated[tuple[str, ...], tyro.conf.Positional]  # images, folders, glob patterns
    top: int = 1  # classes shown of each image
    backbone: str | None = None  # instead of the probe's own: where its backbone lies now
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # write the predictions to this .csv or .json
    json: bool = False  # print JSON
    device: str = "cpu"  # cpu or cuda
    batch_size: int = 16

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".csv", ".json"))
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        probe = load_probe(self.model)
        files = find_images(self.paths)
        prediction = probe.predict(
            files, backbones=self._backbones(probe), device=self.device, batch_size=self.batch_size
        )
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
            write_text(self.output, document + "\n" if self.output.suffix == ".json" else "\n".join(lines) + "\n")
        if self.json:
            print(document)
            return
        for file, found in rows:
            print(f"{file}  " + "  ".join(f"{c} {100 * p:.1f} %" for c, p in found))

    def _backbones(self, probe: Probe) -> Mapping[str, Backbone] | None:
        if self.backbone is None:
            return None
        if len(probe.features) > 1:
            raise ValueError(f"--backbone stands for one, this probe reads {', '.join(probe.features)}")
        (name,) = probe.features
        dtype = getattr(torch, probe.features[name]["dtype"])
        return {name: load_backbone(self.backbone, device=self.device, dtype=dtype)}


@dataclass(frozen=True)
class SweepCells:
    """Which block, which timestep: a probe for every cell, a heat map, and the best one trained again.

    For example: diffrep probe sweep scenes --backbones tiny --pool 1 2
    """

    data: Annotated[str, tyro.conf.Positional]  # as for train
    backbones: tuple[str, ...] = ("tiny",)
    taps: tuple[str, ...] | None = None  # of the one backbone; every block where left out
    timesteps: tuple[int, ...] = SWEPT  # of backbones that have any
    pool: tuple[int, ...] = (1, 2)
    head: Kind = "linear"
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("sweep")  # folder of the results; it can be resumed
    prune: float = 0.0  # share of cells that are dropped after a look with a quarter of the training images
    json: bool = False  # print JSON
    seed: int = 0
    balanced: bool = False  # weigh rare classes up in the loss
    images: Annotated[Images, tyro.conf.OmitArgPrefixes] = field(default_factory=Images)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: ProbeFit = field(default_factory=ProbeFit)

    def run(self) -> None:
        check_writable(self.output / "heatmap.png")
        if self.taps is not None and len(self.backbones) > 1:
            raise ValueError("--taps go with one backbone; several are swept over every block")
        data = self.images.find(self.data)
        backbones = self.extraction.load(self.backbones)
        readings = [
            Reading(
                name,
                self.taps or block_taps(backbone),
                self.timesteps if hasattr(backbone, "alphas_cumprod") else None,
                self.pool,
                self.extraction.config(),
            )
            for name, backbone in backbones.items()
        ]
        found = self.images.read(data, backbones, readings)
        done = sweep(
            found,
            self.output,
            kind=self.head,
            fit=with_seed(self.fit, self.seed, self.balanced),
            prune=self.prune,
            seed=self.images.split_seed,
        )
        picture = draw_heat_map(done.cells, title=f"{self.head} probes on {self.data}")
        write_image(self.output / "heatmap.png", picture)
        if self.json:
            cells = [{"cell": str(s.cell), "val": s.val, "low": s.low, "high": s.high} for s in done.cells]
            print(json_module.dumps({"best": str(done.best), "result": done.result, "cells": cells}, indent=2))
            return
        print(done.summary())
        print(f"wrote {self.output}: heatmap.png, cells.csv, result.json and the probe")


def with_seed(fit: ProbeFit, seed: int, balanced: bool) -> ProbeFit:
    """The seed and the class weights of the command line."""
    return replace(fit, grid=replace(fit.grid, seed=seed, balanced=balanced or fit.grid.balanced))


def check_new(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a probe.

    Raises:
        ValueError: it does, and it is not to be overwritten.
    """
    check_writable(folder / "probe.json", (".json",))
    if (folder / "probe.json").exists() and not overwrite:
        raise ValueError(f"{folder}: holds a probe already; name another folder, or say --overwrite")


ProbeCommand = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[SweepCells, tyro.conf.subcommand("sweep")]
)
