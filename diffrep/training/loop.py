"""One training loop for every network here: bf16, moving average, schedule, checkpoints that resume exactly.

What makes it resume exactly is that a batch is a function of (seed, step) alone: everything random, from the
choice of images to the noise, is drawn while the batch is made, from a generator of that step. The state of a run
is then weights, their moving average, the optimiser's moments, the step and the time spent.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from diffrep.devices import resolve_device
from diffrep.files import one_line, read_weights, save_weights
from diffrep.settings import NOT_NEGATIVE, POSITIVE, check
from diffrep.training.sara import SaRA

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How one network is trained."""

    steps: int  # optimiser steps; the run ends after them
    minutes: float | None = None  # or after this many minutes of training, whichever comes first
    learning_rate: float = 1e-3  # the highest
    warmup: int = 100  # steps in which the learning rate rises from 0
    schedule: Literal["cosine", "constant", "exponential", "diffdis"] = "cosine"  # how it falls after that
    epochs: int = 100  # what the schedule "diffdis" counts in
    final_rate: float = 0.02  # share of the learning rate that is left at the end
    weight_decay: float = 0.02  # of AdamW
    decay: Literal["matrices", "all"] = "matrices"  # what decays: not biases and norms, or every parameter
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    epsilon: float = 1e-8  # of AdamW
    faster: tuple[tuple[str, float], ...] = ()  # (part of parameters' names, factor of their learning rate)
    sara: float | None = None  # train only weights of a smaller magnitude (SaRA); the papers have 2e-3 to 1e-2
    sara_rank: float = 5e-4  # weight of the nuclear norm of their change (SaRA)
    accumulate: int = 1  # batches whose gradients are averaged in each step
    clip: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.999  # of the moving average that is kept; it starts faster
    bf16: bool = True  # autocast to bfloat16
    seed: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        check(
            self,
            steps="1..", accumulate="1..", epochs="1..", warmup="0..", minutes=POSITIVE, learning_rate=POSITIVE,
            sara=POSITIVE, sara_rank=NOT_NEGATIVE,
            epsilon=POSITIVE, clip="(0, inf]", ema_decay="[0, 1)", betas="[0, 1)", final_rate="[0, 1]",
            weight_decay=NOT_NEGATIVE,
        )  # fmt: skip

    def rate(self, progress: float, step: int) -> float:
        """Learning rate at a share `progress` of the run: linear warm-up, then as `schedule` says."""
        if self.schedule == "exponential":
            reached = round(progress * self.steps, 6)  # a warm-up may last longer than the schedule
            return self.learning_rate * exponential_factor(reached, self.steps, self.final_rate, self.warmup)
        rising = min((step + 1) / (self.warmup + 1), 1.0)
        if self.schedule == "constant":
            return self.learning_rate * rising
        if self.schedule == "diffdis":
            return diffdis_rate(1 + int(min(progress, 1.0) * self.epochs), self.learning_rate) * rising
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * rising * (self.final_rate + (1 - self.final_rate) * cosine)


def exponential_factor(step: float, total: int, final_ratio: float, warmup: int) -> float:
    """Marigold's and E2E-FT's factor of the learning rate: linear warm-up from 0, then down to `final_ratio`."""
    if step < warmup:
        return step / warmup
    return final_ratio if step >= total else final_ratio ** ((step - warmup) / (total - warmup))


def diffdis_rate(epoch: int, learning_rate: float = 3e-5) -> float:
    """DiffDIS' learning rate in an epoch, counted from 1: after each epoch e it is multiplied by 0.95^(e // 30).

    >>> [f"{diffdis_rate(epoch):.2e}" for epoch in (1, 30, 31, 32, 101)]
    ['3.00e-05', '3.00e-05', '2.85e-05', '2.71e-05', '5.46e-08']
    """
    return learning_rate * 0.95 ** sum(e // 30 for e in range(1, epoch))


Module = TypeVar("Module", bound=nn.Module)

Loss = Callable[[Module, Module, Batch], Mapping[str, Tensor]]
"""(module, its moving average so far, batch) -> scalars by name; "loss" is the one that is minimised."""


def step_generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """The generator from which everything random of one step is drawn."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + process * 0x8CB92BA72F3D8DD7) % 2**63
    return torch.Generator().manual_seed(mixed)


def fit(
    module: Module,
    batches: Callable[[torch.Generator], Batch],
    loss: Loss[Module],
    settings: FitSettings,
    folder: str | os.PathLike[str],
    *,
    validate: Callable[[Module, int], Mapping[str, float]] | None = None,
    validate_every: int = 1000,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Module:
    """Train a module and return the moving average of its weights, in eval mode.

    Called again with the same folder, an interrupted run goes on and ends with the same weights (as long as no
    time limit ended it), and a finished one returns at once. Losses go to ``log.jsonl`` in the folder.

    Args:
        module: trained in place.
        batches: makes the batch of a step from that step's generator.
        loss: see `Loss`.
        folder: of the checkpoint and the log; made where missing.
        validate: given the moving average and the step, every `validate_every` steps and at the end; what it
            returns is logged.
        device: where, as of `diffrep.devices.resolve_device`; batches may lie there already.
        progress: show a bar on stderr.

    Raises:
        ValueError: the folder's checkpoint was made with other settings or for another module.
        FloatingPointError: the loss is not finite; on a GPU, which would have to be waited for, it is looked at where
            the log is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = accelerator_of(device)
    place = accelerator.device
    ema = deepcopy(module).to(place)
    ema.eval().requires_grad_(False)
    trained = module.to(place)
    trained.train()
    averages = Averages(ema, trained)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimiser = make_optimiser(trained, settings)
    step, spent = _load_checkpoint(folder, trained, ema, optimiser, settings)
    called, optimiser = accelerator.prepare(trained, optimiser)
    log = _Log(folder / "log.jsonl", step)
    bar = tqdm(total=settings.steps, initial=step, desc=folder.name, unit="step", disable=not progress)
    saved = started = time.monotonic()
    spent_before = spent

    def done() -> float:
        share = step / settings.steps
        return share if settings.minutes is None else max(share, spent / (60 * settings.minutes))

    while done() < 1:
        for part in range(settings.accumulate):
            generator = step_generator(settings.seed, step * settings.accumulate + part, accelerator.process_index)
            batch = {name: value.to(place) for name, value in batches(generator).items()}
            with torch.autocast(place.type, dtype=torch.bfloat16, enabled=settings.bf16):
                losses = loss(called, ema, batch)
            if place.type == "cpu":
                check_finite(folder.name, losses["loss"].item(), step)
            accelerator.backward(losses["loss"] / settings.accumulate)
            log.add(losses)
        accelerator.unscale_gradients()
        clip_gradients(parameters, settings.clip)
        for group in optimiser.param_groups:
            group["lr"] = settings.rate(done(), step) * group["factor"]
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        averages.update(min(settings.ema_decay, (1 + step) / (10 + step)))
        now = time.monotonic()
        spent = spent_before + now - started
        bar.update(1)
        if step % 50 == 0 or done() >= 1:
            row = log.write(step, spent)
            check_finite(folder.name, row["loss"], step)
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k not in ("step", "seconds")})
        if validate is not None and (step % validate_every == 0 or done() >= 1):
            log.write(step, spent, validate(ema, step))
        if accelerator.is_main_process and (now - saved > settings.checkpoint_seconds or done() >= 1):
            _save_checkpoint(folder, trained, ema, optimiser, settings, step, spent)
            saved = now
    bar.close()
    return ema


def make_optimiser(module: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """AdamW, or SaRA, over the parameters that require gradients; a group's "factor" is that of its learning rate."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = math.prod(f for part, f in settings.faster if part in name)
            groups.setdefault((parameter.ndim >= 2 or settings.decay == "all", factor), []).append(parameter)
    chosen: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decayed else 0.0,
            "lr": settings.learning_rate * factor,
            "factor": factor,
        }
        for (decayed, factor), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
    options: dict[str, Any] = {"betas": settings.betas, "eps": settings.epsilon}
    if settings.sara is not None:
        return SaRA(chosen, settings.sara, lr=settings.learning_rate, lambda_rank=settings.sara_rank, **options)
    return torch.optim.AdamW(chosen, fused=True, **options)


def accelerator_of(device: str | torch.device = "auto") -> Accelerator:
    """What trains on a device; of several processes, on the one that is this process's.

    Raises:
        DeviceError: this machine has no such device.
        ValueError: an earlier training of this process ran on another one.
    """
    wanted = resolve_device(device)
    if wanted.type == "cuda" and wanted.index is not None:
        torch.cuda.set_device(wanted)
    accelerator = Accelerator(cpu=wanted.type == "cpu")
    if accelerator.device.type != wanted.type:
        raise ValueError(f"this process trains on {accelerator.device.type} already, it cannot go on on {wanted.type}")
    return accelerator


def check_finite(name: str, loss: float, step: int) -> None:
    """Refuse to go on with a loss that is no number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: the loss is {loss} at step {step}")


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Scale all gradients together down to a norm of at most `most`; the device is not waited for."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and math.isfinite(most):
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


class Averages:
    """The moving averages of a module's parameters and buffers, in a copy of it, updated by one call for all.

    Args:
        ema: the copy; module: what is averaged. Both stay where they are, and so do their tensors.
    """

    def __init__(self, ema: nn.Module, module: nn.Module) -> None:
        pairs = list(zip(ema.state_dict().values(), module.state_dict().values(), strict=True))
        self.averages, self.values = ([p[side] for p in pairs if p[0].is_floating_point()] for side in (0, 1))
        self.others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * module; what is no floating-point number is copied."""
        torch._foreach_lerp_(self.averages, self.values, 1 - decay)
        for average, value in self.others:
            average.copy_(value)


class _Log:
    """Mean losses of the steps since the last line, one JSON object a line."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.sums: dict[str, Any] = {}
        self.count = 0
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def write(self, step: int, seconds: float, values: Mapping[str, float] | None = None) -> dict[str, float]:
        if values is None:
            values = {name: total.item() / self.count for name, total in self.sums.items()}
            self.sums, self.count = {}, 0
        row = {"step": step, "seconds": round(seconds, 1), **{k: round(v, 5) for k, v in values.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def _identity(settings: FitSettings) -> dict[str, Any]:
    """The settings that a run cannot change on the way."""
    free = ("checkpoint_seconds", "minutes")
    return {k: v for k, v in asdict(settings).items() if k not in free}


def _save_checkpoint(
    folder: Path, module: nn.Module, ema: nn.Module, optimiser: Any, settings: FitSettings, step: int, spent: float
) -> None:
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{k}": v for k, v in moments.items()}
    tensors = {k: v.clone() if v.ndim == 0 else v for k, v in tensors.items()}
    about = json.dumps({"step": step, "spent": spent, "settings": _identity(settings)})
    save_weights(folder / "checkpoint.safetensors", tensors, run=about)


def _load_checkpoint(
    folder: Path, module: nn.Module, ema: nn.Module, optimiser: Any, settings: FitSettings
) -> tuple[int, float]:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    tensors, metadata = read_weights(path)
    about = json.loads(metadata["run"])
    ours = json.loads(json.dumps(_identity(settings)))
    if changed := [f"{k} {v!r}, not {ours.get(k)!r}" for k, v in about["settings"].items() if ours.get(k) != v]:
        raise ValueError(f"{path}: was made with {'; '.join(changed)}; choose another folder or delete it")
    for part, target in (("module", module), ("ema", ema)):
        state = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        try:
            target.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path}: is of another network ({one_line(error)})") from None
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape and value.ndim:
                # the fused optimiser walks through memory: moments must lie as their parameter does (channels-last)
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            moments.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(about["step"]), float(about["spent"])
