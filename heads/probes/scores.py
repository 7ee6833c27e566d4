"""How right a probe is, and how sure one can be of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.heads.probes.neighbours import top_accuracy


@dataclass(frozen=True)
class Scores:
    """Accuracies in [0, 1] over n images.

    Attributes:
        low, high: of top-1, a 95 % bootstrap interval over the images; Wilson's where all are right or all wrong.
        top5: with fewer than five classes, over all of them.
        mean_per_class: mean of the classes' accuracies; classes without an image are left out.
        per_class: class -> accuracy.
    """

    n: int
    top1: float
    low: float
    high: float
    top5: float
    mean_per_class: float
    per_class: dict[str, float]

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def score(scores: Tensor, labels: Tensor, classes: Sequence[str], *, voted_only: bool = False, seed: int = 0) -> Scores:
    """Score (n, K) class scores against (n,) labels.

    Args:
        voted_only: see `top_accuracy`.
    """
    right = scores.argmax(1) == labels
    low, high = bootstrap(right.double().numpy(), seed=seed)
    if low == high:  # all right or all wrong: resampling says nothing
        low, high = wilson(int(right.sum()), len(right))
    per_class = {
        name: right[labels == number].float().mean().item()
        for number, name in enumerate(classes)
        if bool((labels == number).any())
    }
    return Scores(
        n=len(labels),
        top1=right.float().mean().item(),
        low=low,
        high=high,
        top5=top_accuracy(scores, labels, 5, voted_only=voted_only),
        mean_per_class=sum(per_class.values()) / len(per_class),
        per_class=per_class,
    )


def bootstrap(values: np.ndarray[Any, Any], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values, resampled over them."""
    if len(values) == 0:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, which also holds near 0 and 1 (Wilson 1927).

    >>> wilson(10, 10)[1]
    1.0
    """
    z = 1.959964
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return 0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half


def paired_gain(ours: Tensor, theirs: Tensor, labels: Tensor, *, seed: int = 0) -> tuple[float, float, float]:
    """(gain, low, high) of top-1 of (n, K) class scores over others on the same images, bootstrapped in pairs."""
    gain = ((ours.argmax(1) == labels).double() - (theirs.argmax(1) == labels).double()).numpy()
    low, high = bootstrap(gain, seed=seed)
    return float(gain.mean()), low, high


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """(K, K) counts: rows are true classes, columns predicted ones."""
    classes = scores.shape[1]
    return torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)
