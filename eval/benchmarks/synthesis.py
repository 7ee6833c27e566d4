"""Large images: windows per second and memory against area, and the official structure against ours.

The official structure puts every window of the canvas, twice, through the network in one batch, and keeps sums as
large as the canvas. Ours goes through the same windows in batches, line by line; both give the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffrep.eval.benchmarks.timing import Claim, PairedBenchmark, Row, peak_memory
from diffrep.synthesis import (
    OFFICIAL,
    ConditionEmbedder,
    EmbeddingGrid,
    SynthesisModel,
    SynthesisSettings,
    build_scheduler,
    denoise_canvas,
)
from diffrep.synthesis.canvas import WindowPlan
from diffrep.synthesis.sampler import GivenNoise
from diffrep.table_scheduler import TableScheduler

DIM = 384  # of the embeddings


@dataclass(frozen=True)
class SynthesisBenchmark(PairedBenchmark):
    """Time the official loop and ours on equal windows, then measure ours on growing canvases."""

    repeats: int = 3
    size: Literal["small", "published"] = "small"  # published: 401 M parameters, windows of 64 latent pixels
    side: int = 3  # cells a side of the canvas on which both are timed
    sides: tuple[int, ...] = (2, 4, 8)  # cells a side of the canvases that ours alone paints
    steps: int = 2
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    memory: bool = True  # measure peak memory too, each side in a process of its own

    def run(self) -> list[Row]:
        """Print both tables; returns the rows of the first."""
        rows, model = super().run(), self.model()
        print(f"\n{'latent':>12}  {'windows':>8}  {'windows/s':>10}  {'peak MiB':>9}  side")
        for side in self.sides:
            pixels, start = side * model.window, time.perf_counter()
            windows = len(WindowPlan((pixels, pixels), model.window, self.settings(model).stride or 1))
            denoise_canvas(model, random_grid(side), (pixels, pixels), self.settings(model))
            rate = f"{windows * self.steps / (time.perf_counter() - start):.1f}"
            for name in ("ours", "official") if self.memory else ("ours",):
                peak = f"{replace(self, steps=1).peak_elsewhere(side, name):.0f}" if self.memory else "-"
                speed = rate if name == "ours" else "-"
                print(f"{pixels:>5} x {pixels:<4}  {windows:>8}  {speed:>10}  {peak:>9}  {name}", flush=True)
        return rows

    def model(self) -> SynthesisModel:
        """The model that both sides call."""
        return random_model(self.size, self.device, getattr(torch, self.dtype))

    def settings(self, model: SynthesisModel) -> SynthesisSettings:
        """The published sampler, for windows of this size: a quarter of a window apart."""
        return replace(OFFICIAL, stride=max(model.window // 4, 1), steps=self.steps, batch_size=self.batch_size)

    def claims(self) -> Iterator[Claim]:
        model = self.model()
        grid, settings, side = random_grid(self.side), self.settings(model), self.side * model.window
        generator = torch.Generator().manual_seed(1)
        start = torch.randn(model.channels, side, side, generator=generator)
        steps = torch.randn(self.steps, *start.shape, generator=generator)

        def ours() -> Tensor:
            noise = GivenNoise.of_canvas(start, steps)
            fresh = build_scheduler("official", model.scheduler, self.steps)
            lines = denoise_canvas(model, grid, (side, side), settings, scheduler=fresh, noise=noise)
            return lines.tensor(0, side).movedim(0, 1)

        def plain() -> Tensor:
            scheduler = build_scheduler("official", model.scheduler, self.steps)
            return official_loop(model, grid, start, steps, scheduler, settings)

        windows = len(WindowPlan((side, side), model.window, settings.stride or 1))
        about = f"{self.steps} steps, guided, {self.size} U-Net, {self.dtype} on {self.device}"
        yield Claim(f"{windows} windows, {about}", plain, ours)

    def peak(self, side: int, name: str) -> float:
        """MiB that a canvas of side x side cells takes at its peak beside the model, in this process."""
        torch.set_num_threads(1)
        model = self.model()
        pixels, grid, settings = side * model.window, random_grid(side), self.settings(model)

        # what a first call allocates once belongs to neither side
        denoise_canvas(model, random_grid(1), (model.window, model.window), replace(settings, batch_size=1))
        before = peak_memory(self.device)
        if name == "ours":
            denoise_canvas(model, grid, (pixels, pixels), settings)
        else:
            start, scheduler = (
                torch.zeros(model.channels, pixels, pixels),
                build_scheduler("official", model.scheduler, 1),
            )
            official_loop(model, grid, start, start[None], scheduler, settings)
        return peak_memory(self.device) - before


@torch.inference_mode()
def official_loop(
    model: SynthesisModel,
    grid: EmbeddingGrid,
    start: Tensor,
    noise: Tensor,
    scheduler: TableScheduler,
    settings: SynthesisSettings,
) -> Tensor:
    """The structure of the authors' loop: all windows in one batch, sums and counts of the whole canvas.

    Args:
        start: (c, H, W); noise: (steps, c, H, W).
    """
    plan = WindowPlan((start.shape[1], start.shape[2]), model.window, settings.stride or 1)
    corners = [(i, j) for i in plan.rows for j in plan.columns]
    context = model.context(grid.at(torch.tensor(corners), model.window).to(model.device, model.dtype))
    both = torch.cat([context, model.null_context(len(corners))])
    x, guidance, side = start[None], settings.guidance or 1.0, plan.window
    for step, timestep in enumerate(scheduler.timesteps):
        windows = torch.cat([x[:, :, i : i + side, j : j + side] for i, j in corners]).to(model.device, model.dtype)
        shifted = (timestep.float() + settings.timestep_shift).to(model.device)
        conditional, null = model(windows.repeat(2, 1, 1, 1), shifted, both).float().cpu().chunk(2)
        predicted = null + guidance * (conditional - null)
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for (i, j), value in zip(corners, predicted, strict=True):
            total[:, :, i : i + side, j : j + side] += value
            count[:, :, i : i + side, j : j + side] += 1
        x = scheduler.step(total / count, timestep, x, variance_noise=noise[step][None]).prev_sample
    return x[0]


def random_grid(side: int) -> EmbeddingGrid:
    """side x side embeddings."""
    return EmbeddingGrid(torch.randn(side, side, DIM, generator=torch.Generator().manual_seed(0)))


def random_model(size: Literal["small", "published"], device: str, dtype: torch.dtype) -> SynthesisModel:
    """The published architecture with random weights, whole or with narrow layers and small windows."""
    from diffusers import UNet2DConditionModel, VQModel

    width, window, base = (192, 64, 128) if size == "published" else (32, 16, 16)
    torch.manual_seed(0)  # the libraries' initialisation draws from the global generator
    unet: Any = UNet2DConditionModel(
        sample_size=window,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 3 * width, 5 * width),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        cross_attention_dim=512,
        attention_head_dim=1,
    )
    unet.conv_out.weight.data *= 0.1  # a random U-Net diverges on this schedule: let it say little
    autoencoder: Any = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(base, 2 * base, 4 * base),
        norm_num_groups=16,
        num_vq_embeddings=64,
    )
    schedule = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    model = SynthesisModel(unet, ConditionEmbedder([DIM], 512), autoencoder, schedule, name=f"random {size}")
    return model.eval().requires_grad_(False).to(device, dtype)
