"""The table of a GPU: every system at full Stable Diffusion size with random weights, and the tests that need a card.

Both sides run in one process in turns, in bfloat16, wall time between synchronisations. The distance of both to float32
is printed where they round: two ways of bfloat16 differ by some hundredths of the largest value, and neither is right.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from diffrep.eval.benchmarks.heads import HeadsBenchmark
from diffrep.eval.benchmarks.matching import MatchingBenchmark
from diffrep.eval.benchmarks.networks import DepthBenchmark, FeaturesBenchmark, SegmentationBenchmark
from diffrep.eval.benchmarks.samplers import SamplersBenchmark
from diffrep.eval.benchmarks.timing import PairedBenchmark, Row, table

Part = Literal["features", "depth", "segmentation", "matching", "samplers", "heads", "tests"]


@dataclass(frozen=True)
class GpuBenchmark(PairedBenchmark):
    """Compare everything that runs on a CUDA device with the plain ways; under ten minutes on one H200."""

    device: str = "cuda"
    repeats: int = 7
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    size: Literal["sd", "small"] = "sd"
    parts: tuple[Part, ...] = ("features", "depth", "segmentation", "matching", "samplers", "heads", "tests")

    def benchmarks(self) -> Iterator[PairedBenchmark]:
        """The benchmarks of the parts, at the sizes of the published models."""
        side = {"sd": (768, 1024), "small": (64, 128)}[self.size]
        shared = {"repeats": self.repeats, "device": self.device, "size": self.size, "dtype": self.dtype}
        if "features" in self.parts:
            yield FeaturesBenchmark(side=side[0], **shared)  # type: ignore[arg-type]
        if "depth" in self.parts:
            yield DepthBenchmark(side=side[0], families=("lotus-d",), **shared)  # type: ignore[arg-type]
        if "segmentation" in self.parts:
            yield SegmentationBenchmark(side=side[1], **shared)  # type: ignore[arg-type]
        if "matching" in self.parts:
            yield MatchingBenchmark(repeats=self.repeats, device=self.device)
        if "samplers" in self.parts:
            yield SamplersBenchmark(repeats=self.repeats, device=self.device)
        if "heads" in self.parts:
            yield HeadsBenchmark(side=side[0], **{**shared, "repeats": 3})  # type: ignore[arg-type]

    def run(self) -> list[Row]:
        """Print the card, the table part by part as it is measured, and what the tests say.

        Raises:
            SystemExit: there is no CUDA device, or a test failed.
        """
        if self.device != "cpu" and not torch.cuda.is_available():
            raise SystemExit("gpu: PyTorch sees no CUDA device here")
        card = torch.cuda.get_device_name() if self.device != "cpu" else "CPU"
        print(f"{card}, PyTorch {torch.__version__}, {self.dtype}", flush=True)
        rows: list[Row] = []
        for benchmark in self.benchmarks():
            for row in benchmark.rows():
                print(table([row]), flush=True)
                rows.append(row)
            if self.device != "cpu":
                torch.cuda.empty_cache()
        if "tests" in self.parts:
            tests = Path(__file__).parents[2] / "tests"
            ended = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)], check=False)
            if ended.returncode:
                raise SystemExit(f"gpu: the tests that need a card ended with {ended.returncode}")
        return rows
