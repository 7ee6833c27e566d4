"""``diffrep eval probes``: probes of backbones alone and fused, on rendered scenes, digits or published data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import ReportOptions
from diffrep.commands.probe_options import Classifier
from diffrep.eval.probe_layouts import BENCHMARKS, imagenet_subset
from diffrep.eval.probes import compare_probes, rows_of
from diffrep.heads.probes import LabelledImages, balance, parse_cells, readings_of


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
        self.check_output()
        data = self._data()
        backbones = self.extraction.load([text.split(",")[0] for text in self.cells])
        cells = parse_cells(self.cells, backbones)
        prepared = self.images.read(data, backbones, readings_of(cells, self.extraction.config()))
        report = compare_probes(
            prepared,
            rows_of(cells),
            kind=self.head,
            fit=self.seeded_fit(),
            shape=self.shape,
            seed=self.images.split_seed,
            benchmark=self.benchmark if self.classes is None else "",
        )
        if not self.json:
            print(f"{balance(data, prepared.split)}\n")
        self.show(report)

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
            counts = data.parts.count("train"), data.parts.count("test")
            if counts != benchmark.sizes:
                print(f"note: {counts[0]} training and {counts[1]} test images; published {benchmark.sizes}")
        return data
