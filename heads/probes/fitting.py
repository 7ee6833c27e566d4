"""Training a head on features: hyperparameters are chosen on val, then the choice is trained on train and val."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.heads.probes.grid import GridSettings, Standardiser, class_weights, cross_entropy, fit_grid
from diffrep.heads.probes.layouts import FeatureHead, Layout, build_head, gallery_head
from diffrep.heads.probes.recipe import ProbeRecipe, check_settings, train_recipe
from diffrep.heads.probes.rows import FeatureRows, blocks_of


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
        check_settings(self, positive=("inverse_penalties", "learning_rates", "batch_size", "ks"))


@dataclass(frozen=True)
class Fitted:
    """A head that was trained on train only, what was chosen, and its scores of val.

    Attributes:
        choice: the hyperparameters, JSON-ready.
        tried: one row per setting: hyperparameters and accuracy on val.
        scores: (n, K) of the val rows.
    """

    head: FeatureHead
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
    """Train on the train rows for every setting and choose by accuracy on the val rows, then by cross-entropy."""
    fit = fit or ProbeFit()
    truth = labels[list(val)]
    if layout.kind == "linear":
        grid = fit_grid(features, labels, train, layout.classes, fit.grid)
        logits = grid.logits(features, val)
        accuracy = (logits.argmax(2) == truth).float().mean(1)
        best = _best(accuracy, cross_entropy(logits, truth))
        tried = tuple(
            {"learning_rate": rate, "weight_decay": decay, "val": float(a)}
            for (rate, decay), a in zip(grid.heads, accuracy, strict=True)
        )
        return Fitted(_linear(layout, *grid.linear(best)), _chosen(tried[best]), tried, logits[best])
    settings = _settings(layout, fit)
    heads = [train_head(layout, features, labels, train, fit, choice) for choice in settings]
    scores = torch.stack([head_scores(head, features, val) for head in heads])
    accuracy = (scores.argmax(2) == truth).float().mean(1)
    # votes are shares already
    losses = cross_entropy(scores.clamp(min=1e-6).log() if layout.kind == "knn" else scores, truth)
    best = _best(accuracy, losses)
    tried = tuple({**choice, "val": float(a)} for choice, a in zip(settings, accuracy, strict=True))
    return Fitted(heads[best], settings[best], tried, scores[best])


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
        return gallery_head(filled, features.read(list(rows)), labels[list(rows)])
    head = build_head(layout, seed=fit.grid.seed)
    # the published attention heads have their own norms only, which leave a channel's mean over the images in place
    head.standardise_by(Standardiser.of(features, rows))
    weights = class_weights(labels[list(rows)], layout.classes) if fit.grid.balanced else None
    recipe = dataclasses.replace(fit.recipe, learning_rate=choice["learning_rate"])

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng([fit.grid.seed, epoch])
        shuffled = order.permutation(np.asarray(rows, dtype=np.int64))
        for start in range(0, len(shuffled), fit.batch_size):
            some = shuffled[start : start + fit.batch_size]
            if len(some) > 1 or len(shuffled) == 1:  # batch norm has no statistics of one image
                yield features.read(some), labels[torch.from_numpy(some)]

    train_recipe(head, batches, recipe, weights=weights)
    return head


@torch.no_grad()
def head_scores(head: FeatureHead, features: FeatureRows, rows: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    """(n, K) scores of some rows, in the order given."""
    chosen = np.asarray(rows, dtype=np.int64)
    return torch.cat([head(features.read(block)) for block in blocks_of(chosen, features.width)])


def _settings(layout: Layout, fit: ProbeFit) -> list[dict[str, Any]]:
    if layout.kind == "logistic":
        return [{"C": c} for c in fit.inverse_penalties]
    if layout.kind == "knn":
        return [{"k": k} for k in fit.ks]
    return [{"learning_rate": rate} for rate in fit.learning_rates]


def _best(accuracy: Tensor, losses: Tensor) -> int:
    finite = [i for i in range(len(losses)) if bool(losses[i].isfinite())]
    if not finite:
        raise ValueError("training diverged with every setting: choose smaller learning rates")
    return min(finite, key=lambda i: (-float(accuracy[i]), float(losses[i])))


def _chosen(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "val"}


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

    x, y = features.read(list(rows)).double().numpy(), labels[list(rows)].numpy()
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


def softmax(scores: Tensor, layout: Layout) -> Tensor:
    """(n, K) scores as probabilities; the votes of k-NN are that already, up to their sum."""
    return F.normalize(scores, p=1, dim=1) if layout.kind == "knn" else scores.softmax(1)
