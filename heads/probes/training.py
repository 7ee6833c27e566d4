"""The training loop of all probes, and the choice of hyperparameters on val for heads on kept features.

The loop is the released one of classification (arXiv 2307.08702, 2311.17921), probe3d's, and that of DDPM-seg, which
stops early. What is chosen on val is trained again on train and val.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.heads.probes.grid import (
    FeatureRows,
    GridSettings,
    RowNumbers,
    Standardiser,
    blocks_of,
    class_weights,
    fit_grid,
)
from diffrep.heads.probes.layouts import FeatureHead, Layout, build_head, gallery_head
from diffrep.settings import NOT_NEGATIVE, POSITIVE, check


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
        check(self, learning_rate=POSITIVE, step=POSITIVE, gamma=POSITIVE)
        check(self, epochs=NOT_NEGATIVE, momentum=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE, warmup=NOT_NEGATIVE)

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

    def optimise(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of some parameters."""
        common: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimiser == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum, **common)
        return (torch.optim.AdamW if self.optimiser == "adamw" else torch.optim.Adam)(parameters, **common)


def train_recipe(
    head: nn.Module,
    batches: Callable[[int], Iterable[tuple[Any, Any]]],
    recipe: ProbeRecipe,
    *,
    forward: Callable[[Any], Tensor] | None = None,
    loss: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    steps: int = 1,
    done: Callable[[int, float], bool] | None = None,
) -> list[float]:
    """Train a head in place and return the loss of every step.

    The head is in training mode in every epoch (the released loop leaves batch norms frozen after its first
    evaluation).

    Args:
        batches: epoch -> (input, target) of each step; with cross-entropy the target is labels (B,).
        forward: input -> logits (B, K), where it is not `head` itself.
        loss: (what `forward` gives, target) -> scalar.
        steps: batches of an epoch, for schedules that change the learning rate from step to step.
        done: (epoch, loss of a step) -> whether to stop there.

    Raises:
        ValueError: the loss is no longer a number.
    """
    forward = forward or head
    optimiser = recipe.optimise([p for p in head.parameters() if p.requires_grad])
    losses: list[float] = []
    for epoch in range(recipe.epochs):
        head.train()
        for step, (x, target) in enumerate(batches(epoch)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(epoch + (step / steps if recipe.schedule == "quarter cosine" else 0))
            value = loss(forward(x), target)
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


def shuffled(rows: RowNumbers, size: int, seed: int, epoch: int) -> Iterator[Any]:
    """The rows of each batch of an epoch, in an order that depends on seed and epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(np.asarray(rows, dtype=np.int64))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """How a head is trained, and among which hyperparameters the choice is made."""

    grid: GridSettings = field(default_factory=GridSettings)  # linear
    inverse_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # logistic: scikit-learn's C
    learning_rates: tuple[float, ...] = (1e-3, 4e-3)  # mlp, cnn, attention; take the place of the recipe's
    recipe: ProbeRecipe = field(
        default_factory=lambda: ProbeRecipe(optimiser="adamw", weight_decay=0.02)
    )  # of the same
    batch_size: int = 64  # of the same
    ks: tuple[int, ...] = (10, 20, 100, 200)  # knn

    def __post_init__(self) -> None:
        check(self, inverse_penalties=POSITIVE, learning_rates=POSITIVE, batch_size=POSITIVE, ks=POSITIVE)

    def choices(self, layout: Layout) -> list[dict[str, Any]]:
        """The hyperparameters that are tried for a head, JSON-ready."""
        if layout.kind == "linear":
            return [{"learning_rate": rate, "weight_decay": decay} for rate, decay in self.grid.heads()]
        if layout.kind == "logistic":
            return [{"C": c} for c in self.inverse_penalties]
        if layout.kind == "knn":
            return [{"k": k} for k in self.ks]
        return [{"learning_rate": rate} for rate in self.learning_rates]


@dataclass(frozen=True)
class Fitted:
    """What was chosen for a head that was trained on train only, and its scores of val.

    Attributes:
        choice: the hyperparameters, JSON-ready.
        tried: one row per setting: hyperparameters and accuracy on val.
        scores: (n, K) of the val rows.
    """

    choice: dict[str, Any]
    tried: tuple[dict[str, Any], ...]
    scores: Tensor


def fit_head(
    layout: Layout,
    features: FeatureRows,
    labels: Tensor,
    train: Sequence[int],
    val: Sequence[int],
    fit: ProbeFit | None = None,
) -> Fitted:
    """Train on the train rows for every setting and choose by accuracy on the val rows, then by cross-entropy.

    Raises:
        ValueError: training diverged with every setting.
    """
    fit = fit or ProbeFit()
    truth, choices = labels[list(val)], fit.choices(layout)
    if layout.kind == "linear":  # all at once
        scores = fit_grid(features, labels, train, layout.classes, fit.grid).logits(features, val)
    else:
        heads = (train_head(layout, features, labels, train, fit, choice) for choice in choices)
        scores = torch.stack([head_scores(head, features, val) for head in heads])
    accuracy = (scores.argmax(2) == truth).float().mean(1).tolist()
    logits = scores.clamp(min=1e-6).log() if layout.kind == "knn" else scores  # votes are shares already
    losses = [float(F.cross_entropy(one, truth)) for one in logits]
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise ValueError("training diverged with every setting: choose smaller learning rates")
    best = min(finite, key=lambda i: (-accuracy[i], losses[i]))
    tried = tuple({**choice, "val": value} for choice, value in zip(choices, accuracy, strict=True))
    return Fitted(choices[best], tried, scores[best])


def train_head(
    layout: Layout, features: FeatureRows, labels: Tensor, rows: Sequence[int], fit: ProbeFit, choice: dict[str, Any]
) -> FeatureHead:
    """Train one head with chosen hyperparameters, on any rows."""
    if layout.kind == "linear":
        rate, decay = choice["learning_rate"], choice["weight_decay"]
        one = dataclasses.replace(fit.grid, learning_rates=(rate,), weight_decays=(decay,))
        return _linear(layout, *fit_grid(features, labels, rows, layout.classes, one).linear(0))
    if layout.kind == "logistic":
        return _logistic(layout, features, labels, rows, choice["C"], fit.grid)
    if layout.kind == "knn":
        filled = dataclasses.replace(layout, k=choice["k"], gallery=len(rows))
        return gallery_head(filled, features.read(rows), labels[list(rows)])
    head = build_head(layout, seed=fit.grid.seed)
    # the published attention heads have their own norms only, which leave a channel's mean over the images in place
    standardise = Standardiser.of(features, rows)
    head.mean.copy_(standardise.mean)
    head.scale.copy_(standardise.scale * features.width**0.5)  # variance 1: the layers are initialised for that
    weights = class_weights(labels[list(rows)], layout.classes) if fit.grid.balanced else None
    recipe = dataclasses.replace(fit.recipe, learning_rate=choice["learning_rate"])

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for some in shuffled(rows, fit.batch_size, fit.grid.seed, epoch):
            if len(some) > 1 or len(rows) == 1:  # batch norm has no statistics of one image
                yield features.read(some), labels[torch.from_numpy(some)]

    train_recipe(head, batches, recipe, loss=nn.CrossEntropyLoss(weights))
    return head


@torch.no_grad()
def head_scores(head: FeatureHead, features: FeatureRows, rows: RowNumbers) -> Tensor:
    """(n, K) scores of some rows, in the order given."""
    return torch.cat([head(features.read(block)) for block in blocks_of(rows, features.width)])


def _linear(layout: Layout, weight: Tensor, bias: Tensor) -> FeatureHead:
    head = FeatureHead(layout)
    head.load_state_dict({**head.state_dict(), "head.weight": weight, "head.bias": bias})
    return head.eval()


def _logistic(
    layout: Layout, features: FeatureRows, labels: Tensor, rows: Sequence[int], penalty: float, settings: GridSettings
) -> FeatureHead:
    """scikit-learn's `LogisticRegression` behind a `StandardScaler`; the pipeline is folded into one linear layer."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = features.read(rows).double().numpy(), labels[list(rows)].numpy()
    weigh = "balanced" if settings.balanced else None
    solver = LogisticRegression(C=penalty, max_iter=1000, class_weight=weigh)
    scaler, solver = make_pipeline(StandardScaler(), solver).fit(x, y)
    coefficients, offsets = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
    if len(solver.classes_) == 2:  # one row of coefficients: the log odds of the second class
        coefficients, offsets = torch.cat([-coefficients / 2, coefficients / 2]), torch.cat([-offsets / 2, offsets / 2])
    folded = coefficients / torch.from_numpy(scaler.scale_)
    weight = torch.zeros(layout.classes, x.shape[1], dtype=torch.float64)
    bias = torch.full((layout.classes,), -1e4, dtype=torch.float64)  # of classes that no row has
    present = torch.from_numpy(solver.classes_)
    weight[present] = folded
    bias[present] = offsets - folded @ torch.from_numpy(scaler.mean_)
    return _linear(layout, weight.float(), bias.float())
