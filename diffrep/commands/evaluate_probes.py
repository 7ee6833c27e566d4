"""``diffrep eval probes``: probes of backbones alone and fused, on rendered scenes, digits or published data sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.output import check_writable
from diffrep.commands.probe_options import Extraction, Images, with_seed
from diffrep.eval.probe_layouts import BENCHMARKS, imagenet_subset
from diffrep.eval.probes import compare_probes, rows_of
from diffrep.files import write_whole
from diffrep.heads.probes import LabelledImages, ProbeFit, balance, parse_cells, readings_of
from diffrep.heads.probes.layouts import Kind


@dataclass(frozen=True)
class EvalProbes:
    """Train and test probes of backbones alone and fused, on one split, with intervals.

    For example: diffrep eval probes scenes; diffrep eval probes cub --root CUB_200_2011 --cells sd2.1,up.1,90,4
    """

    benchmark: Annotated[str, tyro.conf.Positional] = "scenes"  # scenes, scenes:colour, digits, or a published data set
    root: Path | None = None  # folder of a published data set, as its archive unpacks
    classes: Path | None = None  # imagenet: a file with the WordNet ids of a subset, as of ImageNet-50
    cells: tuple[str, ...] = ("tiny", "tiny-dino")  # BACKBONE[,TAP[,TIMESTEP[,POOL]]]
    head: Kind = "linear"
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the report as this JSON file
    json: bool = False  # print JSON instead of the table
    seed: int = 0
    balanced: bool = False  # weigh rare classes up in the loss
    images: Annotated[Images, tyro.conf.OmitArgPrefixes] = field(default_factory=Images)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: ProbeFit = field(default_factory=ProbeFit)

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".json",))
        data = self._data()
        backbones = self.extraction.load([text.split(",")[0] for text in self.cells])
        cells = parse_cells(self.cells, backbones)
        found = self.images.read(data, backbones, readings_of(cells, self.extraction.config()))
        report = compare_probes(
            found,
            rows_of(cells),
            kind=self.head,
            fit=with_seed(self.fit, self.seed, self.balanced),
            seed=self.images.split_seed,
            benchmark=self.benchmark if self.classes is None else "",
        )
        if self.output is not None:
            write_whole(self.output, report.to_json() + "\n")
        print(report.to_json() if self.json else f"{balance(data, found.split)}\n\n{report.table()}")

    def _data(self) -> LabelledImages:
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
        if benchmark.sizes is not None and data.parts is not None:
            found = data.parts.count("train"), data.parts.count("test")
            if found != benchmark.sizes:
                print(f"note: {found[0]} training and {found[1]} test images; published {benchmark.sizes}")
        return data
