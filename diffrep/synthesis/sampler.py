"""Sampling: single patches, and canvases of any size from overlapping windows.

On a canvas every window is denoised under the embedding at its place, the predictions are averaged where windows
overlap, and one scheduler step is taken for all of them together. The canvas is swept from top to bottom; no more
than a band of it is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.backbones.diffusion import draw_noise, keyed_generator
from diffrep.backbones.partial import PartialNetwork
from diffrep.sampling.samplers import named_sampler
from diffrep.settings import NOT_NEGATIVE, POSITIVE, check
from diffrep.synthesis.canvas import (
    Block,
    Lines,
    Position,
    RowSweep,
    Run,
    Weighting,
    WindowPlan,
    window_shares,
    window_weights,
)
from diffrep.synthesis.grids import EmbeddingGrid, GridError
from diffrep.synthesis.model import SynthesisModel
from diffrep.synthesis.schedulers import Stepper, build_scheduler


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """How an image is sampled. The result depends on all of these but batch_size and band, and on those by rounding."""

    scheduler: str = "unipc"  # a sampler, see `diffrep sample`
    steps: int = 12
    timesteps: tuple[int, ...] = ()  # falling, in place of the steps
    orders: tuple[int, ...] = ()  # of the sampler, one for each timestep; its own where left out
    skipped: tuple[str, ...] = ()  # for each timestep the units of the U-Net that are left out: "3,4", or "" for none
    inherit: int = 1  # every how many steps all of the U-Net runs; the others inherit its deep features (DeepCache)
    branch: int = 0  # how deep these others go: block times units a block, plus units of it
    # for each step how deep it goes, such a number, or -1: whole; in place of the two above
    depths: tuple[int, ...] = ()
    guidance: float | None = None  # null + guidance * (conditional - null); 1: none; the model's own where left out
    eta: float = 0.0  # of ddim: 0 deterministic, 1 as noisy as DDPM
    stride: int | None = None  # latent pixels between windows; half a window where left out
    # of a window's predictions where windows overlap: uniform is the published average; hann lets cells flow into each
    # other; with cells they only do where they are alike: windows between others count little and have no condition
    weights: Weighting = "cells"
    decode_stride: int | None = None  # latent pixels between decoded windows; half a window where left out
    decode_weights: Literal["hann", "official"] = "hann"  # of decoded windows; official: a Gaussian, which leaves steps
    decode_sigma: float = 0.8  # width of that Gaussian, in halves of a window's side
    quantize: bool = True  # VQ autoencoders: decode entries of the codebook
    timestep_shift: float = 0.0  # added to the timestep that the network gets; the published sampler has 1
    seed: int = 0
    batch_size: int = 16  # windows that go through the network together, each twice with guidance
    band: int | None = None  # rows of windows in memory; as many as fill a batch where left out

    def __post_init__(self) -> None:
        check(
            self,
            steps="1..", batch_size="1..", band="1..", stride="1..", decode_stride="1..", seed="[0, 2^63)",
            decode_sigma=POSITIVE, eta="[0, 1]", guidance=NOT_NEGATIVE, timesteps="0..", orders="1..", inherit="1..",
            branch="0..", depths="-1..",
        )  # fmt: skip
        named_sampler(self.scheduler)
        for name in ("orders", "skipped"):
            if (count := len(getattr(self, name))) not in (0, len(self.timesteps)):
                raise ValueError(f"{name} must have one entry for each of {len(self.timesteps)} timesteps, got {count}")
        if wrong := [units for units in self.skipped if not all(part.isdigit() for part in units.split(",") if units)]:
            raise ValueError(f"skipped must be numbers of units, for example 3,4, got {wrong[0]!r}")

    def build(self, config: Mapping[str, Any]) -> Any:
        """The scheduler, for a model with this configuration of its own.

        Raises:
            ValueError: it does not go with the model or the timesteps.
        """
        options: dict[str, Any] = {"eta": self.eta}
        options |= {"timesteps": self.timesteps, "order": self.orders} if self.timesteps else {}
        steps = len(self.timesteps) or self.steps
        return build_scheduler(self.scheduler, config, steps, **{k: v for k, v in options.items() if v})

    def stepper(self, model: SynthesisModel, scheduler: Any = None) -> Stepper:
        """`build` for a model, or a scheduler of its caller's, to step canvases with."""
        return Stepper(self.build(model.scheduler)) if scheduler is None else Stepper(scheduler, eta=self.eta)

    def part(self, model: Any, steps: int) -> PartialNetwork:
        """A model's network without what its steps skip and inherit.

        Raises:
            ValueError: the network cannot run by parts, or not one depth was given for each of the steps.
        """
        if len(self.depths) not in (0, steps):
            raise ValueError(f"depths have one entry for each of {steps} steps, got {len(self.depths)}")
        skipped = [[int(unit) for unit in units.split(",") if unit] for units in self.skipped]
        network = getattr(model, "unet", None)  # models without one are whole
        return PartialNetwork(network, interval=self.inherit, branch=self.branch, depths=self.depths, skipped=skipped)


OFFICIAL = SynthesisSettings(
    scheduler="official", steps=50, guidance=4.0, stride=16, weights="uniform", decode_stride=16,
    decode_weights="official", timestep_shift=1,
)  # fmt: skip
"""The authors' large-image code, for windows of 64 latent pixels; they write guidance - 1, which is 3."""


class KeyedNoise:
    """Noise of a canvas, or of a batch of patches, from a generator for every line of every step, on the CPU."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, lines: Sequence[int], shape: Sequence[int]) -> Tensor:
        """(lines, *shape) standard normal noise to start from; a line is (c, h, w) of any shape."""
        return torch.cat([draw_noise(shape, self.seed, line) for line in lines])

    def arguments(self, step: int, lines: Sequence[int]) -> Mapping[str, Any]:
        """Arguments of a scheduler's `step` about noise, for lines as a batch."""
        return {"generator": [keyed_generator(self.seed, line, stream=step + 1) for line in lines]}


class GivenNoise:
    """Noise that was drawn elsewhere.

    Args:
        first: (lines, c, h, w) to start from, already scaled to the scheduler's first level.
        steps: (steps, lines, c, h, w), one for each step that uses one; None for samplers without noise.
    """

    def __init__(self, first: Tensor, steps: Tensor | None = None) -> None:
        self.first, self.steps = first, steps

    @classmethod
    def of_canvas(cls, first: Tensor, steps: Tensor | None = None) -> GivenNoise:
        """From fields (c, H, W) and (steps, c, H, W): their rows are the lines."""
        rows = first.movedim(1, 0)[:, :, None]
        return cls(rows, None if steps is None else steps.movedim(2, 1)[:, :, :, None])

    def start(self, lines: Sequence[int], shape: Sequence[int]) -> Tensor:
        noise = self.first[list(lines)]
        if tuple(noise.shape[1:]) != tuple(shape):
            raise ValueError(f"the noise has lines of {tuple(noise.shape[1:])}, the canvas has {tuple(shape)}")
        return noise

    def arguments(self, step: int, lines: Sequence[int]) -> Mapping[str, Any]:
        if self.steps is None or step >= len(self.steps):
            return {}
        return {"variance_noise": self.steps[step][list(lines)]}


Noise: TypeAlias = KeyedNoise | GivenNoise


class DeepFeatures:
    """What windows inherit from their last whole step: of each window and half of guidance a line of an array.

    Args:
        network: of which a whole step is run once, for the shapes.
        size: (H, W) of a window's latents.
        run: has the arrays, `count` windows each.
    """

    def __init__(
        self, model: SynthesisModel, network: PartialNetwork, size: tuple[int, int], run: Run, count: int
    ) -> None:
        self.network = network
        one_window(model, network, 0, size)
        shapes = {branch: tuple(value.shape[1:]) for branch, value in network.carried.items()}
        self.lines = {branch: run.lines(f"deep-{branch}", (2 * count, *shape)) for branch, shape in shapes.items()}

    def take_up(self, rows: Sequence[int], like: Tensor) -> None:
        """Before the network runs on a batch: what its samples, by their rows in the arrays, inherit."""
        if (branch := self.network.depth) in self.lines:
            values = torch.cat([self.lines[branch].tensor(row, row + 1) for row in rows])
            self.network.carried[branch] = values.to(like)

    def put_down(self, rows: Sequence[int]) -> None:
        """After it ran: what later steps inherit."""
        for branch, lines in self.lines.items() if self.network.depth < 0 else ():
            for row, value in zip(rows, self.network.carried[branch].float().cpu().numpy(), strict=True):
                lines.write(row, value[None])


def one_window(model: SynthesisModel, network: PartialNetwork, step: int, size: tuple[int, int]) -> None:
    """Run a step of the network on a single empty window, without a condition."""
    network.at(step)
    latents = torch.zeros(1, model.channels, *size, device=model.device, dtype=model.dtype)
    model(latents, torch.zeros((), device=model.device), model.null_context(1))


@torch.inference_mode()
def deep_bytes(model: SynthesisModel, settings: SynthesisSettings) -> int:
    """Bytes that a window inherits from step to step."""
    with settings.part(model, len(settings.stepper(model))) as network:
        if network.whole:
            return 0
        one_window(model, network, 0, (model.window, model.window))
        return sum(8 * value[0].numel() for value in network.carried.values())


@torch.inference_mode()
def share_of_operations(model: SynthesisModel, settings: SynthesisSettings) -> float:
    """What all steps together compute of what the whole network would, counted on one window."""
    from torch.utils.flop_counter import FlopCounterMode

    steps, counted = len(settings.stepper(model)), dict[Any, int]()
    network, window = settings.part(model, steps), (model.window, model.window)
    if network.whole:
        return 1.0

    def count(step: int) -> int:
        network.at(step)
        if network.running not in counted:
            with FlopCounterMode(display=False) as counter:
                one_window(model, network, step, window)
            counted[network.running] = counter.get_total_flops()
        return counted[network.running]

    with network:
        operations = sum(count(step) for step in range(steps))
    with FlopCounterMode(display=False) as counter:
        one_window(model, network, 0, window)
    return operations / (steps * counter.get_total_flops())


@torch.inference_mode()
def predict(
    model: SynthesisModel,
    latents: Tensor,
    timestep: Tensor,
    embeddings: Sequence[Tensor],
    settings: SynthesisSettings,
    *,
    shares: Tensor | None = None,
    deep: DeepFeatures | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    """The guided prediction for a batch of windows.

    Args:
        latents: (B, c, h, w), as the scheduler scales them.
        embeddings: (B, dim) for each token, raw.
        shares: (B,) in 0..1, factors of the guidance. Where that leaves a scale of 0 or 1, the window passes the
            network once instead of twice. All 1 where left out.
        deep, numbers: what windows inherit, and (B,) the windows' numbers.

    Returns:
        (B, c, h, w) float32 on the CPU.
    """
    guidance = model.about.guidance if settings.guidance is None else settings.guidance
    scale = guidance * (torch.ones(len(latents)) if shares is None else shares)
    conditional, null = scale != 0, scale != 1  # which of the two predictions are needed
    context = model.context(*(e[conditional].to(model.device, model.dtype) for e in embeddings))
    contexts = torch.cat([context, model.null_context(int(null.sum()))])
    both = torch.cat([latents[conditional], latents[null]]).to(model.device, model.dtype)
    time = (timestep.float() + settings.timestep_shift).to(model.device)
    rows = [] if numbers is None else torch.cat([2 * numbers[conditional], 2 * numbers[null] + 1]).tolist()
    if deep is not None:
        deep.take_up(rows, both)
    outputs = model(both, time, contexts).float().cpu()
    if deep is not None:
        deep.put_down(rows)
    predicted = torch.zeros(latents.shape)
    predicted[null] = outputs[len(context) :] * (1 - scale[null])[:, None, None, None]
    predicted[conditional] += outputs[: len(context)] * scale[conditional][:, None, None, None]
    return predicted


@torch.inference_mode()
def sample_patches(
    model: SynthesisModel,
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
    noise = noise or KeyedNoise(settings.seed)
    lines = range(len(tokens[0]))
    stepper, memory = settings.stepper(model, scheduler), dict[str, Tensor]()
    latents = noise.start(lines, (model.channels, height, width)) * float(stepper.scheduler.init_noise_sigma)
    with settings.part(model, len(stepper)) as network:
        deep = None if network.whole else DeepFeatures(model, network, (height, width), Run(None, {}), len(latents))
        while stepper.position < len(stepper):
            network.at(stepper.position)
            scaled, predicted = stepper.scale(latents), []
            for part in torch.arange(len(latents)).split(settings.batch_size):
                rows = [t[part] for t in tokens]
                predicted.append(
                    predict(model, scaled[part], stepper.timestep, rows, settings, deep=deep, numbers=part)
                )
            draws = noise.arguments(stepper.position, lines)
            latents, memory = stepper.step(torch.cat(predicted), latents, memory, draws)
            stepper.advance()
    return latents


@torch.inference_mode()
def denoise_canvas(
    model: SynthesisModel,
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
    stepper = settings.stepper(model, scheduler)
    if stepper.whole:
        raise ValueError(f"{settings.scheduler} needs whole images, and cannot step a canvas by strips")
    noise, shape = noise or KeyedNoise(settings.seed), (size[0], model.channels, size[1])
    if run.position == Position():
        canvas, sigma = run.lines("0-canvas", shape), float(stepper.scheduler.init_noise_sigma)
        for line in range(size[0]):
            start = noise.start([line], (model.channels, 1, size[1])) * sigma
            canvas.write(line, start[:, :, 0].float().numpy())
    steps = len(stepper) if run.position.stage != "denoise" else run.position.step
    for _ in range(steps):
        stepper.advance()
    bar = tqdm(
        total=len(stepper) * len(plan), initial=steps * len(plan), desc="denoise", unit="window", disable=not progress
    )
    with settings.part(model, len(stepper)) as network:
        window = (model.window, model.window)
        deep = None if network.whole else DeepFeatures(model, network, window, run, len(plan))
        while stepper.position < len(stepper):
            network.at(stepper.position)
            _denoise_step(model, grid, plan, settings, run, stepper, noise, deep, bar)
            if after_step is not None:
                after_step(stepper.position - 1, run.lines(f"{stepper.position % 2}-canvas", shape))
    bar.close()
    return run.lines(f"{len(stepper) % 2}-canvas", shape)


def _denoise_step(
    model: SynthesisModel,
    grid: EmbeddingGrid,
    plan: WindowPlan,
    settings: SynthesisSettings,
    run: Run,
    stepper: Stepper,
    noise: Noise,
    deep: DeepFeatures | None,
    bar: tqdm,
) -> None:
    """One step of the whole canvas, row of windows by row of windows."""
    step, now, after = stepper.position, stepper.position % 2, (stepper.position + 1) % 2
    shape, names = (plan.size[0], model.channels, plan.size[1]), stepper.carried
    old, new = run.lines(f"{now}-canvas", shape), run.lines(f"{after}-canvas", shape)
    sweep = RowSweep(plan, window_weights(settings.weights, plan.window), model.channels)
    first_row = run.take_up(sweep, run.position.row)
    bar.update(first_row * len(plan.columns))

    def batch(lines: Tensor) -> Tensor:  # (n, c, W) lines as a batch (n, c, 1, W)
        return lines[:, :, None]

    def finish(blocks: Iterable[Block]) -> None:
        """Lines are predicted: step them."""
        for start, predicted in blocks:
            stop = start + len(predicted)
            memory = {k: batch(run.written(f"{now}-kept-{k}", shape).tensor(start, stop)) for k in names}
            sample, memory = stepper.step(
                batch(torch.from_numpy(predicted)), batch(old.tensor(start, stop)), memory,
                noise.arguments(step, range(start, stop)),
            )  # fmt: skip
            new.write(start, sample[:, :, 0].float().numpy())
            for name, value in memory.items():
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
            embeddings = [grid.at(offsets, model.window)]
            weights, shares = window_shares(settings.weights, plan, offsets, grid, unrelated=model.about.unrelated)
            scaled = stepper.scale(windows)
            numbers = torch.tensor([row * len(plan.columns) + column for row, column in part])
            predicted = predict(
                model, scaled, stepper.timestep, embeddings, settings, shares=shares, deep=deep, numbers=numbers
            ).numpy()
            for (row, column), weight, value in zip(part, weights.tolist(), predicted, strict=True):
                finish(sweep.add(row, column, value, weight))
            bar.update(len(part))
        finish(sweep.end_row())
        run.checkpoint(Position("denoise", step, rows[-1] + 1), sweep.carry)
    stepper.advance()
    last = stepper.position == len(stepper)
    run.checkpoint(Position("decode") if last else Position("denoise", stepper.position), None, force=True)


def check_grid(grid: EmbeddingGrid, size: tuple[int, int], model: SynthesisModel) -> None:
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
    dims = model.embedder.dims
    if grid.dim != dims[0]:
        raise GridError(f"this model takes embeddings of width {dims[0]}, the grid has {grid.dim}")
