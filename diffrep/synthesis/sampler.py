"""Sampling: single patches, and canvases of any size from overlapping windows.

On a canvas every window is denoised under the embedding at its place, the predictions are averaged where windows
overlap, and one scheduler step is taken for all of them together. The canvas is swept from top to bottom; no more
than a band of it is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.synthesis.canvas import Lines, Position, Run
from diffrep.synthesis.grids import EmbeddingGrid, GridError
from diffrep.synthesis.model import About
from diffrep.synthesis.noise import KeyedNoise, Noise
from diffrep.synthesis.schedulers import Stepper, build_scheduler
from diffrep.synthesis.windows import (
    DecodeWeighting,
    RowSweep,
    Weighting,
    WindowPlan,
    window_shares,
    window_weights,
)

SchedulerName = Literal[
    "dpmpp_2m", "dpmpp_2m_sde", "ddim", "ddpm", "unipc", "deis", "euler", "euler_ancestral", "heun", "pndm", "lms",
    "official",
]  # fmt: skip


class PatchDenoiser(Protocol):
    """What the sampler needs of a `SynthesisModel`."""

    window: int
    channels: int
    factor: int
    scheduler: dict[str, Any]
    about: About

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def context(self, *embeddings: Tensor) -> Tensor: ...

    def null_context(self, batch: int = 1) -> Tensor: ...

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor, *, quantize: bool = True) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """How an image is sampled. The result depends on all of these but batch_size and band, and on those by rounding."""

    scheduler: SchedulerName = "dpmpp_2m"
    steps: int = 20
    guidance: float | None = None  # null + guidance * (conditional - null); 1: none; the model's own where left out
    eta: float = 0.0  # of ddim: 0 deterministic, 1 as noisy as DDPM
    stride: int | None = None  # latent pixels between windows; half a window where left out
    # of a window's predictions where windows overlap: uniform is the published average; hann lets cells flow into each
    # other; with cells they only do where they are alike: windows between others count little and are told none
    weights: Weighting = "cells"
    decode_stride: int | None = None  # latent pixels between decoded windows; half a window where left out
    decode_weights: DecodeWeighting = "hann"  # of decoded windows; official: a Gaussian, which leaves steps
    decode_sigma: float = 0.8  # width of that Gaussian, in halves of a window's side
    quantize: bool = True  # VQ autoencoders: decode entries of the codebook
    timestep_shift: float = 0.0  # added to the timestep that the network is told; the published sampler has 1
    seed: int = 0
    batch_size: int = 16  # windows that go through the network together, each twice with guidance
    band: int | None = None  # rows of windows in memory; as many as fill a batch where left out

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "band", "stride", "decode_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2^63 - 1, got {self.seed}")
        if not (math.isfinite(self.decode_sigma) and self.decode_sigma > 0):
            raise ValueError(f"decode_sigma must be more than 0, got {self.decode_sigma}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in 0..1, got {self.eta}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be 0 or more, got {self.guidance}")


OFFICIAL = SynthesisSettings(
    scheduler="official", steps=50, guidance=4.0, stride=16, weights="uniform", decode_stride=16,
    decode_weights="official", timestep_shift=1,
)  # fmt: skip
"""The authors' large-image code, for windows of 64 latent pixels; they write guidance - 1, which is 3."""


@torch.inference_mode()
def predict(
    model: PatchDenoiser,
    latents: Tensor,
    timestep: Tensor,
    embeddings: Sequence[Tensor],
    settings: SynthesisSettings,
    *,
    told: Tensor | None = None,
) -> Tensor:
    """The guided prediction for a batch of windows.

    Args:
        latents: (B, c, h, w), as the scheduler scales them.
        embeddings: (B, dim) for each token, raw.
        told: (B,) in 0..1, how strongly each window is told its embedding: factor of the guidance. Where that leaves
            a scale of 0 or 1, the window passes the network once instead of twice. All 1 where left out.

    Returns:
        (B, c, h, w) float32 on the CPU.
    """
    guidance = model.about.guidance if settings.guidance is None else settings.guidance
    scale = guidance * (torch.ones(len(latents)) if told is None else told)
    conditional, null = scale != 0, scale != 1  # which of the two predictions are needed
    context = model.context(*(e[conditional].to(model.device, model.dtype) for e in embeddings))
    contexts = torch.cat([context, model.null_context(int(null.sum()))])
    both = torch.cat([latents[conditional], latents[null]]).to(model.device, model.dtype)
    time = (timestep.float() + settings.timestep_shift).to(model.device)
    found = model(both, time, contexts).float().cpu()
    predicted = torch.zeros(latents.shape)
    predicted[null] = found[len(context) :] * (1 - scale[null])[:, None, None, None]
    predicted[conditional] += found[: len(context)] * scale[conditional][:, None, None, None]
    return predicted


@torch.inference_mode()
def sample_patches(
    model: PatchDenoiser,
    embeddings: Tensor | Sequence[Tensor],
    settings: SynthesisSettings | None = None,
    *,
    size: tuple[int, int] | None = None,
    scheduler: Any = None,
    noise: Noise | None = None,
) -> Tensor:
    """Single patches, each painted by the network in one piece.

    Args:
        embeddings: (B, dim) raw, or one such tensor for each token.
        size: (H, W) of the latents, as far as the U-Net can halve and double them; a window, which is what the model
            was trained on, where left out.
        scheduler: any diffusers scheduler with its timesteps set, in place of that of the settings.
        noise: whose lines are the patches; keyed by the seed and the number of the patch where left out.

    Returns:
        (B, c, H, W) float32 latents, scaled; `SynthesisModel.decode` makes images of them.

    Raises:
        ValueError: the size is not positive.
    """
    settings, (height, width) = settings or SynthesisSettings(), size or (model.window, model.window)
    if min(height, width) < 1:
        raise ValueError(f"size must be positive, got {height} x {width}")
    tokens = [embeddings] if isinstance(embeddings, Tensor) else list(embeddings)
    scheduler = scheduler or build_scheduler(settings.scheduler, model.scheduler, settings.steps)
    noise = noise or KeyedNoise(settings.seed)
    lines = range(len(tokens[0]))
    latents = noise.start(lines, (model.channels, height, width)) * float(scheduler.init_noise_sigma)
    stepper, kept = Stepper(scheduler, eta=settings.eta), dict[str, Tensor]()
    while stepper.position < len(stepper):
        scaled, found = stepper.scale(latents), []
        for part in torch.arange(len(latents)).split(settings.batch_size):
            found.append(predict(model, scaled[part], stepper.timestep, [t[part] for t in tokens], settings))
        draws = noise.arguments(stepper.position, lines)
        latents, kept = stepper.step(torch.cat(found), latents, kept, draws)
        stepper.advance()
    return latents


@torch.inference_mode()
def denoise_canvas(
    model: PatchDenoiser,
    grid: EmbeddingGrid,
    size: tuple[int, int],
    settings: SynthesisSettings | None = None,
    *,
    run: Run | None = None,
    scheduler: Any = None,
    noise: Noise | None = None,
    after_step: Callable[[int, Lines], None] | None = None,
    progress: bool = False,
) -> Lines:
    """Denoise a whole canvas.

    Args:
        size: (H, W) of the canvas in latent pixels; the grid must have a cell for every window's side, begun or whole.
        run: keeps the canvas, and takes up one that was interrupted; in memory where left out.
        scheduler: any diffusers scheduler with its timesteps set, in place of that of the settings.
        noise: whose lines are the rows of the canvas; keyed by the seed where left out.
        after_step: given the number of each finished step and the canvas.
        progress: show a bar with the time left on stderr.

    Returns:
        (H, c, W) float32 lines of the scaled latents.

    Raises:
        GridError: the grid does not cover the canvas, or its embeddings are not as wide as the model's.
        ValueError: the canvas is smaller than a window.
    """
    settings = settings or SynthesisSettings()
    run = run or Run(None, {})
    plan = WindowPlan(size, model.window, settings.stride or max(model.window // 2, 1))
    check_grid(grid, size, model)
    stepper = Stepper(
        scheduler or build_scheduler(settings.scheduler, model.scheduler, settings.steps), eta=settings.eta
    )
    noise, shape = noise or KeyedNoise(settings.seed), (size[0], model.channels, size[1])
    if run.position == Position():
        _start(run.lines("0-canvas", shape), noise, float(stepper.scheduler.init_noise_sigma))
    steps = len(stepper) if run.position.stage != "denoise" else run.position.step
    for _ in range(steps):
        stepper.advance()
    bar = tqdm(
        total=len(stepper) * len(plan), initial=steps * len(plan), desc="denoise", unit="window", disable=not progress
    )
    while stepper.position < len(stepper):
        _denoise_step(model, grid, plan, settings, run, stepper, noise, shape, bar)
        if after_step is not None:
            after_step(stepper.position - 1, run.lines(f"{stepper.position % 2}-canvas", shape))
    bar.close()
    return run.lines(f"{len(stepper) % 2}-canvas", shape)


def _start(canvas: Lines, noise: Noise, sigma: float) -> None:
    _, channels, width = canvas.shape
    for line in range(canvas.shape[0]):
        canvas.write(line, (noise.start([line], (channels, 1, width)) * sigma)[:, :, 0].float().numpy())


def _denoise_step(
    model: PatchDenoiser,
    grid: EmbeddingGrid,
    plan: WindowPlan,
    settings: SynthesisSettings,
    run: Run,
    stepper: Stepper,
    noise: Noise,
    shape: tuple[int, int, int],
    bar: tqdm,
) -> None:
    """One step of the whole canvas, row of windows by row of windows."""
    step, now, after = stepper.position, stepper.position % 2, (stepper.position + 1) % 2
    old, new = run.lines(f"{now}-canvas", shape), run.lines(f"{after}-canvas", shape)
    kept_names = stepper.kept
    weights = window_weights(settings.weights, plan.window)
    sweep = RowSweep(plan, weights, model.channels)
    first_row = run.position.row
    if run.carry is not None:
        sweep.resume(first_row, run.carry)
        run.carry = None
    bar.update(first_row * len(plan.columns))

    def finish(start: int, predicted: np.ndarray) -> None:
        """The lines from `start` on are predicted: step them."""
        stop = start + len(predicted)
        sample, kept = _batch(old.tensor(start, stop)), {}
        for name in kept_names:
            kept[name] = _batch(run.lines(f"{now}-kept-{name}", shape).tensor(start, stop))
        draws = noise.arguments(step, range(start, stop))
        sample, kept = stepper.step(_batch(torch.from_numpy(predicted)), sample, kept, draws)
        new.write(start, sample[:, :, 0].float().numpy())
        for name, value in kept.items():
            run.lines(f"{after}-kept-{name}", shape).write(start, value[:, :, 0].float().numpy())

    band = settings.band or max(settings.batch_size // len(plan.columns), 1)
    for first in range(first_row - first_row % band, len(plan.rows), band):
        rows = range(max(first, first_row), min(first + band, len(plan.rows)))
        top = plan.rows[rows[0]]
        lines = old.tensor(top, plan.rows[rows[-1]] + plan.window).movedim(1, 0)
        places = [(row, column) for row in rows for column in range(len(plan.columns))]
        # batches of one size: a remainder of a few windows costs more than its share
        count = math.ceil(len(places) / math.ceil(len(places) / settings.batch_size))
        for start in range(0, len(places), count):
            part = places[start : start + count]
            corners = [(plan.rows[row], plan.columns[column]) for row, column in part]
            windows = torch.stack([lines[:, i - top : i - top + plan.window, j : j + plan.window] for i, j in corners])
            offsets = torch.tensor(corners)
            embeddings = grid.at(offsets, model.window)
            shares, told = window_shares(settings.weights, plan, offsets, grid, unrelated=model.about.unrelated)
            found = predict(model, stepper.scale(windows), stepper.timestep, [embeddings], settings, told=told)
            for (row, column), share, value in zip(part, shares.tolist(), found.numpy(), strict=True):
                for ready in sweep.add(row, column, value, share):
                    finish(*ready)
            bar.update(len(part))
        for ready in sweep.end_row():
            finish(*ready)
        run.checkpoint(Position("denoise", step, rows[-1] + 1), sweep.carry)
    stepper.advance()
    stage = "denoise" if stepper.position < len(stepper) else "decode"
    run.checkpoint(Position(stage, stepper.position if stage == "denoise" else 0), None, force=True)


def _batch(lines: Tensor) -> Tensor:
    """(n, c, W) lines as a batch (n, c, 1, W)."""
    return lines[:, :, None]


def check_grid(grid: EmbeddingGrid, size: tuple[int, int], model: PatchDenoiser) -> None:
    """Refuse a grid before any work is done for it.

    Raises:
        GridError: it has not one cell for each window's side of the canvas, or its embeddings have another width.
    """
    needed = (math.ceil(size[0] / model.window), math.ceil(size[1] / model.window))
    if grid.shape != needed:
        cell = model.window * model.factor
        raise GridError(
            f"an image of {size[0] * model.factor} x {size[1] * model.factor} pixels needs {needed[0]} x {needed[1]}"
            f" embeddings, one for each {cell} pixels, the grid has {grid.shape[0]} x {grid.shape[1]}"
            f" (`EmbeddingGrid.resized` stretches it)"
        )
    dims = getattr(getattr(model, "embedder", None), "dims", (grid.dim,))
    if grid.dim != dims[0]:
        raise GridError(f"this model takes embeddings of width {dims[0]}, the grid has {grid.dim}")
