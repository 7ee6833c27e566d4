"""From labelled images to a probe: read features, choose on val, train the choice again, look at test once.

How right a probe is, and how sure one can be of it, are `Scores`.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffrep
from diffrep.backbones import Backbone
from diffrep.heads.probes.cells import Cell, PooledFeatures, ReadPlan, read_features
from diffrep.heads.probes.grid import FeatureRows
from diffrep.heads.probes.labelled import PARTS, DataError, LabelledImages, RowSplit, split_rows
from diffrep.heads.probes.layouts import HeadShape, Kind, Layout
from diffrep.heads.probes.probe import Probe
from diffrep.heads.probes.training import ProbeFit, fit_head, head_scores, train_head


@dataclass(frozen=True)
class ProbeData:
    """Labelled images that are split and whose features have been read; images that cannot be read are left out."""

    data: LabelledImages
    split: RowSplit
    features: Mapping[str, PooledFeatures]  # by backbone

    @classmethod
    def read(
        cls,
        data: LabelledImages,
        backbones: Mapping[str, Backbone],
        readings: Sequence[ReadPlan],
        folder: str | Path,
        *,
        shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
        seed: int = 0,
        workers: int = 0,
        dtype: Any = "float16",
        progress: bool = True,
    ) -> ProbeData:
        """Split, then read what the folder lacks.

        Raises:
            DataError: see `split_rows`; or images that cannot be read leave a part without a class.
        """
        split = split_rows(data, shares=shares, seed=seed)  # before any work, and whatever can be read
        options: dict[str, Any] = {"dtype": dtype, "workers": workers, "progress": progress}
        features = {
            reading.backbone: read_features(data.images, backbones[reading.backbone], reading, folder, **options)
            for reading in readings
        }
        usable = np.logical_and.reduce([one.readable for one in features.values()])
        readable = RowSplit(**{part: tuple(row for row in split.part(part) if usable[row]) for part in PARTS})
        trained = {data.labels[row] for row in readable.train}
        for number, name in enumerate(data.classes):
            if number not in trained:
                reasons = [line for one in features.values() for line in one.unreadable()]
                raise DataError(
                    f"{data.name}: no training image of class {name!r} can be read ({'; '.join(reasons[:1])})"
                )
        if not readable.val or not readable.test:
            raise DataError(f"{data.name}: no image of the {'val' if not readable.val else 'test'} split can be read")
        return cls(data, readable, features)

    @property
    def labels(self) -> Tensor:
        """(N,) int64, of all images."""
        return torch.tensor(self.data.labels)

    def unreadable(self) -> list[str]:
        """Why images were left out."""
        return sorted({line for one in self.features.values() for line in one.unreadable()})

    def rows(self, cells: Sequence[Cell]) -> FeatureRows:
        """Features of some cells, side by side."""
        return FeatureRows.side_by_side([self.features[cell.backbone].rows(cell) for cell in cells])

    def layout(self, kind: Kind, cells: Sequence[Cell], *, shape: HeadShape | None = None, **options: Any) -> Layout:
        """A head on some cells.

        Args:
            options: fields of the shape that are changed.
        """
        options = asdict(shape or HeadShape()) | options
        channels = tuple(self.features[c.backbone].rows(c).width // c.pool**2 for c in cells)
        return Layout(kind=kind, cells=tuple(cells), channels=channels, classes=len(self.data.classes), **options)


@dataclass(frozen=True)
class ProbeResult:
    """A probe that was trained on train and val, with its scores of test.

    Attributes:
        val: of the chosen setting, trained on train alone; chosen by it, so an optimistic number.
        test: looked at once.
        scores: (n, K) of the test images, in the order of `RowSplit.test`.
        seconds: that training took; the only number that a second run does not repeat.
    """

    probe: Probe
    choice: dict[str, Any]
    tried: tuple[dict[str, Any], ...]
    val: Scores
    test: Scores
    scores: Tensor
    seconds: float

    def document(self) -> dict[str, Any]:
        """What the probe says about itself, and the seconds."""
        return {**self.probe.about, "seconds": self.seconds}


def train_probe(prepared: ProbeData, layout: Layout, fit: ProbeFit | None = None, *, seed: int = 0) -> ProbeResult:
    """Choose hyperparameters on val, train the choice on train and val, and score test once."""
    fit, start, voted = fit or ProbeFit(), time.monotonic(), layout.kind == "knn"
    data, split, labels, rows = prepared.data, prepared.split, prepared.labels, prepared.rows(layout.cells)
    fitted = fit_head(layout, rows, labels, split.train, split.val, fit)
    val = score(fitted.scores, labels[list(split.val)], data.classes, voted_only=voted)
    head = train_head(layout, rows, labels, sorted([*split.train, *split.val]), fit, fitted.choice)
    scores = head_scores(head, rows, split.test)
    test = score(scores, labels[list(split.test)], data.classes, voted_only=voted)
    about = {
        "data": data.name,
        "images": split.counts(),
        "unreadable": len(prepared.unreadable()),
        "split_seed": seed,
        "selection": "hyperparameters chosen on val, trained again on train and val, test scored once",
        "choice": fitted.choice,
        "tried": list(fitted.tried),
        "fit": asdict(fit),
        "val": val.document(),
        "test": test.document(),
        "versions": {"diffrep": diffrep.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    probe = Probe(
        network=head,
        features={cell.backbone: prepared.features[cell.backbone].features for cell in layout.cells},
        about=json.loads(json.dumps(about)),
        classes=data.classes,
        layout=head.layout,
    )
    return ProbeResult(probe, fitted.choice, fitted.tried, val, test, scores, round(time.monotonic() - start, 2))


# -- scores -------------------------------------------------------------------------------------------------


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


def top_accuracy(scores: Tensor, labels: Tensor, n: int, *, voted_only: bool = False) -> float:
    """Share of rows whose label is among the n highest scores; with fewer than n classes, among all of them.

    Args:
        scores: (Q, K). labels: (Q,).
        voted_only: a class with the score 0 counts as wrong, for k-NN with few neighbours, where the order of the
            classes without votes means nothing.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : min(n, scores.shape[1])]
    right = order == labels[:, None]
    if voted_only:
        right &= scores.gather(1, order) > 0
    return right.any(1).float().mean().item()
