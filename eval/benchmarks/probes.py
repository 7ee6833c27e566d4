"""Probes: a grid on cached features against the released loop, and a grid on a million features in little memory.

The released loop (arXiv 2307.08702) runs the whole U-Net over every image in every epoch, once per learning rate.
Ours reads each image once, ends the pass at the tap, and trains all learning rates over one read of the cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.backbones import load_backbone
from diffrep.backbones.diffusion import DiffusionBackbone
from diffrep.devices import initial_weights
from diffrep.eval.benchmarks.timing import Row, interleave, peak_memory, table
from diffrep.eval.probe_data import digit_images
from diffrep.features import ExtractConfig
from diffrep.heads.probes.cells import Cell, block_taps, noisy_input, readings_of
from diffrep.heads.probes.experiment import ProbeData, train_probe
from diffrep.heads.probes.grid import FeatureRows, GridSettings, fit_grid
from diffrep.heads.probes.labelled import LabelledImages
from diffrep.heads.probes.layouts import PooledHead
from diffrep.heads.probes.training import ProbeFit, ProbeRecipe, shuffled, train_recipe
from diffrep.images import decode_image, fit_image, stack_pixels
from diffrep.settings import check


@dataclass(frozen=True)
class ProbesBenchmark:
    """Compare a cached grid with the released loop, or train a grid on many memory-mapped features."""

    part: Literal["loop", "memory"] = "loop"
    images: int = 120  # loop: handwritten digits that are used
    epochs: int = 8  # loop: of both sides
    rows: int = 1_000_000  # memory: features
    width: int = 2048  # memory: of each, half precision: rows * width * 2 bytes on disk
    passes: int = 2  # memory: epochs
    classes: int = 100  # memory
    limit_gib: float = 8.0  # memory: of resident memory, exceeded: exit code 1
    folder: Path | None = None  # memory: where the features are written; a temporary folder

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> None:
        torch.set_num_threads(1)
        if self.part == "loop":
            print(self._loop())
            return
        text, peak = self._memory()
        print(text)
        if peak > self.limit_gib:
            raise SystemExit(1)

    def _loop(self) -> str:
        backbone, rates = load_backbone("tiny"), (1.0, 3.0, 10.0)
        assert isinstance(backbone, DiffusionBackbone)
        cell = Cell("tiny", 50, backbone.recommended.taps[0], 2)
        grid = GridSettings(learning_rates=rates, weight_decays=(0.0,), epochs=self.epochs, batch_size=32)
        results: dict[str, tuple[float, ProbeData]] = {}
        with tempfile.TemporaryDirectory() as folder:
            digits = digit_images(Path(folder) / "digits")
            rows = [i for i, label in enumerate(digits.labels) if label < 4][: self.images]
            images, labels = tuple(digits.images[i] for i in rows), tuple(digits.labels[i] for i in rows)
            data = LabelledImages("digits", images, labels, ("0", "1", "2", "3"))

            def ours() -> None:
                plan = readings_of([cell], ExtractConfig())
                prepared = ProbeData.read(data, {"tiny": backbone}, plan, folder, progress=False, dtype="float32")
                fitted = train_probe(prepared, prepared.layout("linear", [cell]), ProbeFit(grid=grid))
                results["ours"] = fitted.val.top1, prepared

            def plain() -> None:
                prepared = results["ours"][1]  # its split and settings
                results["plain"] = self._released(prepared, backbone, cell.tap, rates), prepared

            times = interleave({"ours": ours, "plain": plain}, repeats=1, warmups=0)
        scores = ", ".join(f"{side} {100 * results[side][0]:.1f} %" for side in ("plain", "ours"))
        equality = f"best accuracy on val: {scores} ({len(results['ours'][1].split.val)} images)"
        claim = f"{len(rates)} learning rates, {self.epochs} epochs, {len(data)} images, one cell"
        return table([Row(claim, times["plain"], times["ours"], equality)])

    def _released(self, prepared: ProbeData, backbone: DiffusionBackbone, tap: str, rates: Sequence[float]) -> float:
        """Every epoch through the VAE and the whole U-Net; one run per learning rate; best accuracy on val."""
        extract, labels, last = prepared.features["tiny"].reading.extract, prepared.labels, block_taps(backbone)[-1]

        @torch.no_grad()
        def maps(rows: Sequence[int]) -> Tensor:
            images = [decode_image(prepared.data.images[row].read(), "image") for row in rows]
            assert extract.sizing is not None  # resolved
            pixels = stack_pixels([fit_image(image, extract.sizing)[0] for image in images])
            noisy = noisy_input(backbone, *backbone.encode(pixels), extract.conditions())
            return backbone.network_maps(noisy, [tap, last, "out"], extract.conditions())[tap]

        train, val = prepared.split.train, prepared.split.val
        first = maps(train[:32])
        mean, std = first.mean((0, 2, 3), keepdim=True), first.std((0, 2, 3), keepdim=True) * first.shape[1] ** 0.5

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for rows in shuffled(train, 32, 0, epoch):
                yield (maps(rows) - mean) / std, labels[rows]

        best = 0.0
        for rate in rates:
            with initial_weights(0):
                head = PooledHead(first.shape[1], len(prepared.data.classes), pool=2)
            recipe = ProbeRecipe(learning_rate=rate, epochs=self.epochs, step=max(1, self.epochs // 4), momentum=0.9)
            train_recipe(head, batches, recipe)
            with torch.no_grad():
                right = head((maps(val) - mean) / std).argmax(1) == labels[list(val)]
            best = max(best, float(right.float().mean()))
        return best

    def _memory(self) -> tuple[str, float]:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            start = time.perf_counter()
            matrix, labels = self._written(Path(place))
            written = time.perf_counter() - start
            before = peak_memory() / 2**10
            train = np.arange(int(0.95 * self.rows))
            settings = GridSettings(epochs=self.passes, batch_size=4096, weight_decays=(0.0, 1e-4))
            start = time.perf_counter()
            grid = fit_grid(matrix, labels, train, self.classes, settings)
            seconds = time.perf_counter() - start
            accuracy = grid.accuracies(matrix, labels, np.arange(len(train), self.rows))
        peak = peak_memory() / 2**10
        size = 2 * self.rows * self.width / 2**30
        lines = [
            f"{self.rows:,} x {self.width} features, {size:.2f} GiB on disk, written in {written:.0f} s",
            f"{len(grid.heads)} heads x {self.passes} epochs over {self.classes} classes in {seconds:.0f} s",
            f"best accuracy on {self.rows - len(train):,} held-out rows {100 * float(accuracy.max()):.1f} %"
            f" (chance {100 / self.classes:.1f} %)",
            f"peak resident memory {peak:.2f} GiB (before training {before:.2f}), limit {self.limit_gib:g} GiB",
        ]
        return "\n".join(lines), peak

    def _written(self, folder: Path) -> tuple[FeatureRows, Tensor]:
        """Overlapping clusters in half precision, written shard by shard and mapped."""
        random = np.random.default_rng(0)
        labels = random.integers(self.classes, size=self.rows)
        centres = random.normal(0, 0.12, (self.classes, self.width)).astype(np.float32)
        pieces = []
        for number, start in enumerate(range(0, self.rows, 16384)):
            classes = labels[start : start + 16384]
            values = random.standard_normal((len(classes), self.width), dtype=np.float32) + centres[classes]
            file = folder / f"{number:04d}.f16"
            values.astype(np.float16).tofile(file)
            pieces.append(np.memmap(file, np.float16, "r", shape=(len(classes), self.width)))
        return FeatureRows(pieces), torch.from_numpy(labels)
