"""The training loop of all probes: the released one of classification (arXiv 2307.08702, 2311.17921), probe3d's, and
that of DDPM-seg, which stops early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_SEED = 2**32 - 1


def check_settings(settings: object, *, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Refuse numbers that mean nothing in training settings: each field is one number or several.

    Args:
        positive: fields whose numbers are finite and above 0.
        not_negative: fields whose numbers are finite and at least 0. A field `seed` is also at most `MOST_SEED`.

    Raises:
        ValueError: a field has another number, or none.
    """
    for name in (*positive, *not_negative):
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers:
            raise ValueError(f"{name} needs at least one value")
        bound = "above 0" if name in positive else "at least 0"
        for number in numbers:
            if not math.isfinite(number) or number < 0 or (number == 0 and name in positive):
                raise ValueError(f"{name} must be finite and {bound}, got {number}")
            if name == "seed" and number > MOST_SEED:
                raise ValueError(f"seed must be at most {MOST_SEED}, got {number}")


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe:
    """A learning rate that falls in steps; the published values, for a global batch of 128.

    The schedule "quarter cosine" is that of probe3d (arXiv 2404.08636): it rises from 1 % during `warmup` epochs, then
    falls along a quarter of a cosine to 1 %, step by step.
    """

    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"  # published: sgd; adamw is what small data sets need
    learning_rate: float = 1e-2  # linear and DifFeed; attention and DifFormer 5e-2
    epochs: int = 28
    step: int = 7  # epochs after which the learning rate is multiplied by `gamma`
    gamma: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["steps", "quarter cosine"] = "steps"
    warmup: float = 1.5  # epochs, of the quarter cosine

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("learning_rate", "step", "gamma"),
            not_negative=("epochs", "momentum", "weight_decay", "warmup"),
        )

    def rate(self, epoch: float) -> float:
        """The learning rate after so many epochs.

        >>> dense = ProbeRecipe(learning_rate=1.0, epochs=10, schedule="quarter cosine")
        >>> [round(dense.rate(epoch), 3) for epoch in (0, 0.75, 1.5, 5.75, 10)]
        [0.01, 0.505, 1.0, 0.71, 0.01]
        """
        if self.schedule == "steps":
            return self.learning_rate * self.gamma ** (int(epoch) // self.step)
        if epoch < self.warmup:
            share = epoch / self.warmup
        else:
            share = math.cos(math.pi / 2 * min((epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9), 1.0))
        return self.learning_rate * (0.01 + 0.99 * share)


def _optimiser(parameters: list[nn.Parameter], recipe: ProbeRecipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser != "sgd":
        kind = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
        return kind(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=recipe.momentum, weight_decay=decay)


def train_recipe(
    head: nn.Module,
    batches: Callable[[int], Iterable[tuple[Any, Any]]],
    recipe: ProbeRecipe,
    *,
    forward: Callable[[Any], Tensor] | None = None,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    weights: Tensor | None = None,
    steps: int = 1,
    done: Callable[[int, float], bool] | None = None,
) -> list[float]:
    """Train a head in place and return the loss of every step.

    The head is in training mode in every epoch (the released loop leaves batch norms frozen after its first
    evaluation).

    Args:
        batches: epoch -> (input, target) of each step; with cross-entropy the target is labels (B,).
        forward: input -> logits (B, K), where it is not `head` itself.
        loss: (what `forward` gives, target) -> scalar; None: cross-entropy.
        weights: (K,) of the classes in the cross-entropy.
        steps: batches of an epoch, for schedules that change the learning rate from step to step.
        done: (epoch, loss of a step) -> whether to stop there.

    Raises:
        ValueError: the loss is no longer a number.
    """
    forward = forward or head
    measure = loss or (lambda logits, labels: F.cross_entropy(logits, labels, weight=weights))
    trained = [p for p in head.parameters() if p.requires_grad]
    optimiser = _optimiser(trained, recipe)
    losses = []
    for epoch in range(recipe.epochs):
        head.train()
        for step, (x, target) in enumerate(batches(epoch)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(epoch + (step / steps if recipe.schedule == "quarter cosine" else 0))
            value = measure(forward(x), target)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                rate = f"{recipe.rate(epoch):g}"
                raise ValueError(f"training diverged at step {len(losses)}: choose a learning rate below {rate}")
            if done is not None and done(epoch, losses[-1]):
                head.eval()
                return losses
    head.eval()
    return losses
