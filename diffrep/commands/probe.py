"""``diffrep probe`` and ``diffrep eval probes``: heads on frozen features: trained, compared, used."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image

from diffrep.backbones import Backbone, load_backbone
from diffrep.commands.image_runs import Item, find_inputs, print_files, run_images, write_beside, write_map
from diffrep.commands.options import (
    Command,
    PrecisionOptions,
    ReadingOptions,
    ReportOptions,
    refuse_failed,
    refuse_idle,
)
from diffrep.features import ExtractConfig
from diffrep.files import DRAWING, check_folder, check_writable, number_of, write_image, write_whole
from diffrep.heads.probes import (
    Cell,
    FeedbackSettings,
    HeadShape,
    LabelledImages,
    ProbeData,
    ProbeFit,
    ReadPlan,
    Scores,
    balance,
    block_taps,
    draw_heat_map,
    parse_cells,
    read_labelled,
    readings_of,
    saved_kind,
    split_rows,
    sweep,
    train_feedback,
    train_probe,
)
from diffrep.heads.probes.dense import DenseProbe
from diffrep.heads.probes.grid import SEED
from diffrep.heads.probes.layouts import Kind
from diffrep.heads.probes.pixels import PixelProbe, shares
from diffrep.heads.probes.probe import (
    MapProbe,
    Prediction,
    SavedKind,
    SavedProbe,
    load_named,
    load_probe,
    load_recorded,
    saved_features,
)
from diffrep.heads.probes.sweeps import check_prune
from diffrep.images import ImageError, Sizing, find_images, load_image
from diffrep.results import csv_text
from diffrep.settings import ANY_WORKERS, check
from diffrep.tasks import note_embedded

SWEPT = (10, 50, 100, 200, 350, 500)  # timesteps of a sweep


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """What is split and kept, and how."""

    split_seed: int = 0  # of what is held out
    work: Path = Path("runs/probe")  # folder of features, maps and rendered scenes, so that they are made once
    workers: int = 0  # processes that decode and render ahead

    def __post_init__(self) -> None:
        check(self, split_seed=SEED, workers=ANY_WORKERS)


@dataclass(frozen=True, kw_only=True)
class Images(WorkOptions):
    """Which labelled images, and how they are split."""

    image: str | None = None  # column or key of the image; "path" in a table, "image" in a data set
    label: str = "label"  # column or key of the label
    group: str | None = None  # column or key of a group that is kept together in the split
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)  # of train, val, test, where the source names no split
    dtype: Literal["float16", "float32"] = "float16"  # in which features are kept

    def find(self, source: str) -> LabelledImages:
        """The labelled images of a folder, table, archive or data set; ``scenes[:ATTRIBUTE]``; ``digits``."""
        if source == "digits" or source.partition(":")[0] == "scenes":
            from diffrep.eval.probe_data import named_images  # brings the renderer

            return named_images(source, self.work, workers=max(self.workers, 1))
        return read_labelled(source, image=self.image, label=self.label, group=self.group)

    def read(self, data: LabelledImages, backbones: Mapping[str, Backbone], readings: Sequence[ReadPlan]) -> ProbeData:
        """Read the features that are not kept yet, and say what could not be read."""
        options: dict[str, Any] = {"seed": self.split_seed, "workers": self.workers, "dtype": self.dtype}
        folder = self.work / "features"
        prepared = ProbeData.read(data, backbones, readings, folder, shares=self.shares, **options)
        if lost := prepared.unreadable():
            print(
                f"left out {number_of(len(lost), 'image')} that cannot be read, the first: {lost[0]}", file=sys.stderr
            )
        return prepared


@dataclass(frozen=True, kw_only=True)
class Extraction(ReadingOptions, PrecisionOptions):
    """How the backbone is used; what is left out is as it recommends."""

    size: int | None = None  # side of the square that images are brought to, pixels
    prompt: str = ""  # the text condition
    ensemble: int | None = None  # noise draws that are averaged
    noise_seed: int = 0  # of the noise
    batch_size: int = 16  # images that go through the network together

    def config(self, **others: Any) -> ExtractConfig:
        """The settings of reading, and others such as taps and timestep."""
        same = {name: getattr(self, name) for name in ("prompt", "ensemble", "batch_size")}
        sizing = None if self.size is None else Sizing("squash", self.size)
        return ExtractConfig(sizing=sizing, seed=self.noise_seed, **same, **others)

    def load(self, names: Sequence[str]) -> dict[str, Backbone]:
        """Load backbones by their names; the names that they get have the options of the command line.

        Raises:
            ValueError: there are none, or several and options that only one takes.
        """
        if not names:
            raise ValueError("--cells must name at least one backbone")
        self.config()  # refuses what means nothing before anything is loaded
        models, placed = dict.fromkeys(self.named_alone(names)), self.placed()
        backbones = {name: load_backbone(name, **placed) for name in models}
        note_embedded("probes", *names)
        return backbones

    def load_one(self, name: str) -> Backbone:
        """Load a backbone by its name."""
        (backbone,) = self.load([name]).values()
        return backbone


@dataclass(frozen=True, kw_only=True)
class Classifier(Command):
    """Which head is trained on features, and how."""

    head: Kind = "linear"  # what is trained on the features
    seed: int = 0  # of the order of examples and of initial weights
    balanced: bool = False  # weigh rare classes up in the loss
    images: Annotated[Images, tyro.conf.OmitArgPrefixes] = field(default_factory=Images)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: ProbeFit = field(default_factory=ProbeFit)
    shape: HeadShape = field(default_factory=HeadShape)

    def read(self, data: LabelledImages, texts: Sequence[str]) -> tuple[ProbeData, list[Cell]]:
        """Load the backbones of cells that are written as text, and read what is not kept yet."""
        names = [text.split(",")[0] for text in texts]
        if self.extraction.schedule is not None and list(texts) != names[:1]:
            raise ValueError(f"--schedule says where one backbone is read, got the cells {' '.join(texts)}")
        backbones = self.extraction.load(names)
        if place := self.extraction.place(self.typed, backbones[self.extraction.named(names[0])]):
            texts = [f"{names[0]},{place['taps'][0]},{place['timestep']}"]
        named = [self.extraction.named(n) + text.removeprefix(n) for n, text in zip(names, texts, strict=True)]
        cells = parse_cells(named, backbones)
        return self.images.read(data, backbones, readings_of(cells, self.extraction.config())), cells

    def training(self) -> dict[str, Any]:
        """The head and its training, as arguments of `sweep` and `compare_probes`.

        Raises:
            ValueError: an option was typed that this head does not take.
        """
        refuse_idle(self.typed, self.head)
        grid = replace(self.fit.grid, seed=self.seed, balanced=self.balanced)
        fit = replace(self.fit, grid=grid)
        return {"kind": self.head, "fit": fit, "shape": self.shape, "seed": self.images.split_seed}


@dataclass(frozen=True, kw_only=True)
class NewProbe(Command):
    """Where a new probe goes."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("probe")  # folder of the probe
    overwrite: bool = False  # a probe that is there already
    json: bool = False  # print JSON

    def check_new(self, kind: SavedKind) -> None:
        """Refuse a folder that holds a probe.

        Raises:
            ValueError: it does, and it is not to be overwritten, or is of another kind.
            OSError: it cannot be written to.
        """
        check_writable(self.output / "probe.json", (".json",))
        existing = saved_kind(self.output)
        if existing is not None and existing != kind:
            raise ValueError(f"{self.output}: holds a probe of another kind ({existing}); name another folder")
        if existing is not None and not self.overwrite:
            raise ValueError(f"{self.output}: holds a probe already; name another folder, or say --overwrite")

    def finish(self, probe: SavedProbe, lines: Sequence[str], document: Mapping[str, Any] | None = None) -> None:
        """Save the probe, and print its lines, or as JSON a document, which is what it says about itself if None."""
        probe.save(self.output)
        if self.json:
            print(json_module.dumps(dict(probe.about if document is None else document), indent=2))
            return
        print("\n".join([*lines, f"wrote {self.output}"]))


def score_lines(classes: Sequence[str], parts: Mapping[str, Scores]) -> list[str]:
    """One line for each part: top-1 with its interval, top-5 where a probe has more classes, mean per class."""
    lines = []
    for part, scores in parts.items():
        top5 = f"  top-5 {100 * scores.top5:.1f} %" if len(classes) > 5 else ""
        interval = f"{100 * scores.low:.1f}..{100 * scores.high:.1f}"
        means = f"{top5}  mean per class {100 * scores.mean_per_class:.1f} %"
        lines.append(f"{part:<4}  top-1 {100 * scores.top1:.1f} % ({interval}){means}  {number_of(scores.n, 'image')}")
    return lines


@dataclass(frozen=True, kw_only=True)
class Train(NewProbe, Classifier):
    """Train a probe: hyperparameters are chosen on val, the choice is trained again, test is looked at once.

    For example: diffrep probe train photos/ --cells tiny,up.2.resnet.0,50 tiny-dino -o probe
    """

    # folder of classes, .csv, .tar, data set; or scenes, scenes:colour, digits
    data: Annotated[str, tyro.conf.Positional]
    cells: tuple[str, ...] = ("tiny",)  # where features are read: BACKBONE[,TAP[,TIMESTEP[,POOL]]]; several are fused

    def run(self) -> None:
        self.check_new("classification")
        fit = self.training()["fit"]
        data = self.images.find(self.data)
        prepared, cells = self.read(data, self.cells)
        layout = prepared.layout(self.head, cells, shape=self.shape)
        result = train_probe(prepared, layout, fit, seed=self.images.split_seed)
        chosen = ", ".join(f"{name} {value:g}" for name, value in result.choice.items())
        scores = score_lines(data.classes, {"val": result.val, "test": result.test})
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
        if self.extraction.schedule is not None:
            raise ValueError("--schedule says one tap and timestep; this probe reads the whole decoder")
        data = self.images.find(self.data)
        split = split_rows(data, shares=self.images.shares, seed=self.images.split_seed)
        backbone = self.extraction.load_one(self.backbone)
        probe, test = train_feedback(data, split, backbone, self.fit, self.extraction.config())
        self.finish(probe, [balance(data, split), *score_lines(data.classes, {"test": test})])


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
        training = self.training()
        if not self.backbones or not self.timesteps or self.taps == ():
            raise ValueError("--backbones, --taps and --timesteps need at least one value each")
        if self.taps is not None and len(self.backbones) > 1:
            raise ValueError("--taps go with one backbone; several are swept over every block")
        data = self.images.find(self.data)
        backbones = self.extraction.load(self.backbones)
        readings = []
        for name, backbone in backbones.items():
            place = self.extraction.place(self.typed, backbone)
            taps, timesteps = self.taps or block_taps(backbone), self.timesteps if backbone.denoises else None
            taps, timesteps = (place["taps"], (place["timestep"],)) if place else (taps, timesteps)
            readings.append(ReadPlan(name, taps, timesteps, self.pool, self.extraction.config()))
        prepared = self.images.read(data, backbones, readings)
        done = sweep(prepared, self.output, prune=self.prune, **training)
        picture = draw_heat_map(done.cells, title=f"{self.head} probes on {self.data}")
        write_image(self.output / "heatmap.png", picture, mark=DRAWING)
        if self.json:
            cells = [{"cell": str(s.cell), "val": s.val, "low": s.low, "high": s.high} for s in done.cells]
            result = {**done.result, "seconds": done.seconds}
            print(json_module.dumps({"best": str(done.best), "result": result, "cells": cells}, indent=2))
            return
        print(done.summary())
        print(f"wrote {self.output}: heatmap.png, cells.csv, result.json and the probe")


@dataclass(frozen=True)
class EvalProbes(ReportOptions, Classifier):
    """Train and test probes of backbones alone and fused, on one split, with intervals.

    For example: diffrep eval probes scenes; diffrep eval probes cub --root CUB_200_2011 --cells sd2.1,up.1,90,4
    """

    benchmark: Annotated[str, tyro.conf.Positional] = "scenes"  # scenes, scenes:colour, digits, or a published data set
    root: Path | None = None  # folder of a published data set, as its archive unpacks
    classes: Path | None = None  # imagenet: a file with the WordNet ids of a subset, as of ImageNet-50
    cells: tuple[str, ...] = ("tiny", "tiny-dino")  # what is compared: BACKBONE[,TAP[,TIMESTEP[,POOL]]]

    def run(self) -> None:
        from diffrep.eval.probes import compare_probes, rows_of

        self.check_output()
        training = self.training()
        data = self._data()
        prepared, cells = self.read(data, self.cells)
        benchmark = self.benchmark if self.classes is None else ""
        report = compare_probes(prepared, rows_of(cells), benchmark=benchmark, **training)
        if not self.json:
            print(f"{balance(data, prepared.split)}\n")
        self.show(report)

    def _data(self) -> LabelledImages:
        from diffrep.eval.probe_data import BENCHMARKS, imagenet_subset  # brings the renderer

        if self.classes is not None and self.benchmark != "imagenet":
            raise ValueError(f"--classes goes with imagenet, not with {self.benchmark}")
        if self.benchmark not in BENCHMARKS:
            if self.root is not None:
                raise ValueError(f"--root goes with {', '.join(BENCHMARKS)}, got {self.benchmark!r}")
            return self.images.find(self.benchmark)
        if self.root is None:
            raise ValueError(f"{self.benchmark} needs its folder: --root")
        if self.classes is not None:
            return imagenet_subset(self.root, self.classes)
        benchmark = BENCHMARKS[self.benchmark]
        data = benchmark.read(self.root)
        counts = tuple((data.parts or ()).count(part) for part in ("train", "test"))
        if counts != benchmark.sizes:
            print(f"note: {counts[0]} training and {counts[1]} test images; published {benchmark.sizes}")
        return data


# -- `diffrep probe predict`: use a saved probe of any kind; its folder says all that is needed --------------


@dataclass(frozen=True)
class Predict(Command):
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
        note_embedded("probes", *(backbone.name for backbone in backbones.values()))
        unused = set[str]() if isinstance(probe, DenseProbe) else {"formats", "preview"}
        unused |= {"top"} if isinstance(probe, MapProbe) else set()
        if typed := sorted(unused & self.typed):
            raise ValueError(f"{self.model}: a probe of this kind takes no --{typed[0]}")
        if isinstance(probe, MapProbe):
            self._maps(probe, *backbones.values())
            return
        if self.output is not None:
            check_writable(self.output, (".csv", ".json"))
        files, failed = find_images(self.paths), dict[Path, str]()

        def readable() -> Iterator[Image.Image]:
            for file in files:
                try:
                    yield load_image(file)
                except ImageError as error:
                    failed[file] = str(error)
                    print(f"skipped {error}", file=sys.stderr)

        images = readable()
        if first := next(images, None):
            prediction = probe.predict(chain([first], images), backbones=backbones, batch_size=self.batch_size)
            self._show([file for file in files if file not in failed], prediction)
        refuse_failed(list(failed.values()), len(files))

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
            lines = [(str(file), name, f"{share:.6f}") for file, likeliest in rows for name, share in likeliest]
            table = csv_text([("image", "class", "probability"), *lines])
            write_whole(self.output, document + "\n" if self.output.suffix == ".json" else table)
        if self.json:
            print(document)
            return
        for file, likeliest in rows:
            print(f"{file}  " + "  ".join(f"{c} {100 * p:.1f} %" for c, p in likeliest))
        if self.output is not None:
            print(f"wrote {self.output}")

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

        mapper = _Mapper(probe, backbone)
        done = run_images(mapper, inputs, folder, self, write)
        print_files(str(self.model), f"a probe of {mapper.task}", done, folder, as_json=self.json)


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
