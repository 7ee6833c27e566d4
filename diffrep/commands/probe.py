"""``diffrep probe``: train heads on the features of a frozen backbone."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.output import check_writable, write_image
from diffrep.commands.probe_options import Classifier, Extraction, Images, NewProbe, score_lines
from diffrep.heads.probes import (
    FeedbackSettings,
    ReadPlan,
    balance,
    block_taps,
    draw_heat_map,
    parse_cells,
    readings_of,
    split_rows,
    sweep,
    train_feedback,
    train_probe,
)
from diffrep.heads.probes.sweeps import check_prune

SWEPT = (10, 50, 100, 200, 350, 500)  # timesteps of a sweep


@dataclass(frozen=True, kw_only=True)
class Train(NewProbe, Classifier):
    """Train a probe: hyperparameters are chosen on val, the choice is trained again, test is looked at once.

    For example: diffrep probe train photos/ --cells tiny,up.2.resnet.0,50 tiny-dino -o probe
    """

    data: Annotated[
        str, tyro.conf.Positional
    ]  # folder of classes, .csv, .tar, data set; or scenes, scenes:colour, digits
    cells: tuple[str, ...] = ("tiny",)  # where features are read: BACKBONE[,TAP[,TIMESTEP[,POOL]]]; several are fused

    def run(self) -> None:
        self.check_new("classification")
        data = self.images.find(self.data)
        names = [text.split(",")[0] for text in self.cells]
        backbones = self.extraction.load(names)
        named = [self.extraction.named(n) + text.removeprefix(n) for n, text in zip(names, self.cells, strict=True)]
        cells = parse_cells(named, backbones)
        prepared = self.images.read(data, backbones, readings_of(cells, self.extraction.config()))
        layout = prepared.layout(self.head, cells, shape=self.shape)
        result = train_probe(prepared, layout, self.seeded_fit(), seed=self.images.split_seed)
        chosen = ", ".join(f"{name} {value:g}" for name, value in result.choice.items())
        scores = score_lines({"val": result.val, "test": result.test})
        lines = [balance(data, prepared.split), f"chosen on val: {chosen}", *scores]
        self.finish(result.probe, lines, result.document())


@dataclass(frozen=True, kw_only=True)
class TrainFeedback(NewProbe):
    """Train a DifFeed: the U-Net's decoder feeds back into its encoder, an attention head reads the second pass.

    For example: diffrep probe feedback photos/ --backbone tiny -o feedback-probe
    """

    data: Annotated[str, tyro.conf.Positional]  # as for train
    backbone: str = "tiny"  # a diffusion U-Net
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("feedback-probe")  # folder of the probe
    images: Annotated[Images, tyro.conf.OmitArgPrefixes] = field(default_factory=Images)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: FeedbackSettings = field(default_factory=FeedbackSettings)

    def run(self) -> None:
        self.check_new("feedback")
        data = self.images.find(self.data)
        split = split_rows(data, shares=self.images.shares, seed=self.images.split_seed)
        backbone = self.extraction.load_one(self.backbone)
        probe, test = train_feedback(data, split, backbone, self.fit, self.extraction.config())
        self.finish(probe, [balance(data, split), *score_lines({"test": test})])


@dataclass(frozen=True, kw_only=True)
class SweepCells(Classifier):
    """Which block, which timestep: a probe for every cell, a heat map, and the best one trained again.

    For example: diffrep probe sweep scenes --backbones tiny --pool 1 2
    """

    data: Annotated[str, tyro.conf.Positional]  # as for train
    backbones: tuple[str, ...] = ("tiny",)  # whose blocks are compared
    taps: tuple[str, ...] | None = None  # of the one backbone; every block where left out
    timesteps: tuple[int, ...] = SWEPT  # of backbones that have any
    pool: tuple[int, ...] = (1, 2)  # sides of the grids of averaged vectors
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("sweep")  # folder of the results; it can be resumed
    prune: float = 0.0  # share of cells that are dropped after a look with a quarter of the training images
    json: bool = False  # print JSON

    def run(self) -> None:
        check_writable(self.output / "heatmap.png")
        check_prune(self.prune)
        if not self.backbones or not self.timesteps or self.taps == ():
            raise ValueError("--backbones, --taps and --timesteps need at least one value each")
        if self.taps is not None and len(self.backbones) > 1:
            raise ValueError("--taps go with one backbone; several are swept over every block")
        data = self.images.find(self.data)
        backbones = self.extraction.load(self.backbones)
        readings = [
            ReadPlan(
                name,
                self.taps or block_taps(backbone),
                self.timesteps if backbone.denoises else None,
                self.pool,
                self.extraction.config(),
            )
            for name, backbone in backbones.items()
        ]
        prepared = self.images.read(data, backbones, readings)
        done = sweep(
            prepared,
            self.output,
            kind=self.head,
            fit=self.seeded_fit(),
            shape=self.shape,
            prune=self.prune,
            seed=self.images.split_seed,
        )
        picture = draw_heat_map(done.cells, title=f"{self.head} probes on {self.data}")
        write_image(self.output / "heatmap.png", picture)
        if self.json:
            cells = [{"cell": str(s.cell), "val": s.val, "low": s.low, "high": s.high} for s in done.cells]
            result = {**done.result, "seconds": done.seconds}
            print(json_module.dumps({"best": str(done.best), "result": result, "cells": cells}, indent=2))
            return
        print(done.summary())
        print(f"wrote {self.output}: heatmap.png, cells.csv, result.json and the probe")
