"""The released training loop of the classification probes (arXiv 2307.08702, 2311.17921)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A learning rate that falls in steps; the published values, for a global batch of 128."""

    optimiser: Literal["sgd", "adamw"] = "sgd"  # published: sgd; adamw is what small data sets need
    learning_rate: float = 1e-2  # linear and DifFeed; attention and DifFormer 5e-2
    epochs: int = 28
    step: int = 7  # epochs after which the learning rate is multiplied by `gamma`
    gamma: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0


def _optimiser(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=recipe.momentum, weight_decay=decay)


def train_recipe(
    head: nn.Module,
    batches: Callable[[int], Iterable[tuple[Any, Tensor]]],
    recipe: Recipe,
    *,
    forward: Callable[[Any], Tensor] | None = None,
    weights: Tensor | None = None,
    each_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a head in place by cross-entropy and return the loss of every step.

    The head is in training mode in every epoch (the released loop leaves batch norms frozen after its first
    evaluation).

    Args:
        batches: epoch -> (input, labels (B,)) of each step.
        forward: input -> logits (B, K), where it is not `head` itself.
        weights: (K,) of the classes in the loss.
        each_epoch: called behind every epoch with its number.
    """
    forward = forward or head
    trained = [p for p in head.parameters() if p.requires_grad]
    optimiser = _optimiser(trained, recipe)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, recipe.step, recipe.gamma)
    losses = []
    for epoch in range(recipe.epochs):
        head.train()
        for x, labels in batches(epoch):
            loss = F.cross_entropy(forward(x), labels, weight=weights)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        schedule.step()
        if each_epoch is not None:
            each_epoch(epoch)
    head.eval()
    return losses
