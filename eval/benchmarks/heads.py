"""A folder of photographs through a head, as `diffrep depth` takes it, against the bare network on ready canvases."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.commands.image_runs import Item, find_inputs, run_images, write_map
from diffrep.eval.benchmarks.networks import NetworkBenchmark, as_loaded, random_parts
from diffrep.eval.benchmarks.timing import Row, summary
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.families import FAMILIES
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.one_step import OneStep
from diffrep.images import load_image


@dataclass(frozen=True)
class HeadsBenchmark(NetworkBenchmark):
    """The share of the bare network's images per second that a folder of JPEGs reaches, files written.

    On CUDA by wall time. On a CPU by the time of the computing thread: what it spends beside the network is lost, and
    what the threads do that read and write is not, on a machine with a core for them.
    """

    images: int = 32
    batch_size: int = 4
    image_size: tuple[int, int] = (480, 640)  # (height, width) of the files, pixels
    family: str = "lotus-d"
    repeats: int = 3

    def rows(self) -> Iterator[Row]:
        family = FAMILIES[self.family]
        parts = random_parts(self.size, family, self.device, getattr(torch, self.dtype))
        model = OneStep(as_loaded(parts.unet), as_loaded(parts.vae), parts.context(), parts.schedule, family)
        head = DenseHead(model, "disparity", name="random")
        config = PredictConfig(size=self.side, batch_size=self.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            yield self._compared(head, config, Path(folder))

    def _compared(self, head: DenseHead, config: PredictConfig, folder: Path) -> Row:
        photographs = folder / "photographs"
        photographs.mkdir()
        for number in range(self.images):
            cells = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
            picture = Image.fromarray(cells).resize(self.image_size[::-1], Image.Resampling.BICUBIC)
            picture.save(photographs / f"{number:04d}.jpg")
        inputs = find_inputs([str(photographs)], folder)
        files = [np.array(load_image(item.path)) for item in inputs[: self.batch_size]]
        batch = torch.stack([torch.from_numpy(pixels).permute(2, 0, 1) for pixels in files])
        canvas = head.canvas(batch, config)[0].to(head.device)
        noise = head.model.draw((canvas.shape[-2] // head.model.stride, canvas.shape[-1] // head.model.stride), 0, 0)
        first = noise if head.family.first_latent == "noise" else None

        @torch.inference_mode()
        def network() -> Tensor:
            for _ in range(-(-self.images // self.batch_size)):
                latents = head.model.encode(canvas, batch_size=self.batch_size)
                maps = head.model.predict(latents, first, batch_size=self.batch_size)
                drawn = head.model.draw_maps(maps, canvas, batch_size=self.batch_size)
            return drawn

        def write(item: Item, image: Any, result: DepthMap | NormalMap) -> list[Path]:
            return write_map(item.place, result, ["png"])

        def pipeline(turn: int) -> list[Any]:
            output = folder / f"maps{turn}"
            return run_images(head, inputs, output, config, write)

        def clock() -> float:
            if self.device == "cpu":
                return time.thread_time()
            torch.cuda.synchronize()
            return time.perf_counter()

        seconds: dict[str, list[float]] = {"network": [], "pipeline": []}
        for turn in range(self.repeats + 1):  # the first warms up
            for name, run in (("network", network), ("pipeline", lambda turn=turn: pipeline(turn))):
                begun = clock()
                run()
                seconds[name] += [clock() - begun] if turn else []
        times = {name: summary(values) for name, values in seconds.items()}
        rates = {name: self.images / timing.median for name, timing in times.items()}
        return Row(
            f"{self.images} JPEGs of {self.image_size[1]} x {self.image_size[0]} to 16-bit maps and previews,"
            f" {head.family.name}, {self.about}, batches of {self.batch_size}",
            times["network"],
            times["pipeline"],
            f"{rates['network']:.1f} images/s against {rates['pipeline']:.1f}: the folder reaches"
            f" {rates['pipeline'] / rates['network']:.1%} of the bare network",
        )
