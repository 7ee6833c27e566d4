"""From labelled images to a probe: split without leakage, read features, choose on val, train again, test once.

How right a probe is, and how sure one can be of it, are `Scores`.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections import defaultdict
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
from diffrep.heads.probes.labelled import PARTS, DataError, LabelledImages, Part
from diffrep.heads.probes.layouts import HeadShape, Kind, Layout
from diffrep.heads.probes.probe import Probe
from diffrep.heads.probes.training import ProbeFit, fit_head, head_scores, train_head


@dataclass(frozen=True)
class RowSplit:
    """Rows of each part. No row, and no group, lies in two of them."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    def part(self, name: Part) -> tuple[int, ...]:
        """The rows of one part."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def counts(self) -> dict[str, int]:
        """Part -> images."""
        return {part: len(self.part(part)) for part in PARTS}


def split_rows(
    data: LabelledImages, *, shares: tuple[float, float, float] = (0.6, 0.2, 0.2), seed: int = 0
) -> RowSplit:
    """Split stratified by class; a part that the source names stays as it is.

    A source with train and test gives up a part of its train for val; one with train and val is split the other
    way: its val is the test, since it is what published numbers are reported on, and val is taken from train. What
    a class's images are split into depends on the seed and their names only.

    Args:
        shares: of train, val and test in each class.

    Raises:
        DataError: a part would be empty or lack a class; a class that has too few images is named.
    """
    if min(shares) < 0 or not 0.999 < sum(shares) < 1.001 or shares[0] == 0:
        raise ValueError(f"shares of train, val and test must add up to 1, got {shares}")
    named = data.parts or ("train",) * len(data)
    rows = {part: [row for row, name in enumerate(named) if name == part] for part in PARTS}
    divided, total = PARTS, 1.0
    if data.parts is not None:
        if not rows["train"]:
            raise DataError(f"{data.name}: names no training images")
        if not rows["test"]:
            rows["test"], rows["val"] = rows["val"], []
        divided, total = () if rows["val"] else ("train", "val"), shares[0] + shares[1]
    if divided:
        among, rows["train"] = rows["train"], []
        wanted = {part: share / total for part, share in zip(PARTS, shares, strict=True) if part in divided and share}
        _divide(data, among, wanted, rows, seed)
    split = RowSplit(tuple(sorted(rows["train"])), tuple(sorted(rows["val"])), tuple(sorted(rows["test"])))
    _check(data, split)
    return split


def _divide(
    data: LabelledImages, among: Sequence[int], shares: Mapping[Part, float], rows: dict[Part, list[int]], seed: int
) -> None:
    """Deal the groups of each class out to the parts, biggest first, to the part that lacks most."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row in among:
        groups[data.groups[row] if data.groups is not None else data.images[row].name].append(row)
    by_class: dict[int, list[list[int]]] = defaultdict(list)
    for name in sorted(groups):
        members = groups[name]
        majority = int(np.bincount([data.labels[row] for row in members]).argmax())
        by_class[majority].append(members)
    what = "groups" if data.groups is not None else "images"
    for label, lots in sorted(by_class.items()):
        if len(lots) < len(shares):
            count = f"{len(lots)} {what if len(lots) > 1 else what[:-1]}"
            raise DataError(
                f"{data.name}: class {data.classes[label]!r} has {count}; {' and '.join(shares)} need one each"
            )
        order = np.random.default_rng([seed, label]).permutation(len(lots))
        total = sum(map(len, lots))
        filled = dict.fromkeys(shares, 0)
        queue = sorted((lots[i] for i in order), key=len, reverse=True)
        for number, members in enumerate(queue):
            left, empty = len(queue) - number, [part for part in shares if not filled[part]]
            choice = empty if left <= len(empty) else list(shares)  # every part gets one
            part = max(choice, key=lambda p: shares[p] * total - filled[p])
            filled[part] += len(members)
            rows[part] += members


def _check(data: LabelledImages, split: RowSplit) -> None:
    for part in PARTS:
        if not split.part(part):
            raise DataError(f"{data.name}: the {part} split is empty")
    trained = {data.labels[row] for row in split.train}
    for part in ("val", "test"):
        if untrained := sorted({data.labels[row] for row in split.part(part)} - trained):
            names = ", ".join(repr(data.classes[label]) for label in untrained[:5])
            raise DataError(f"{data.name}: {part} has the class {names}, which train lacks")
    if data.groups is not None and data.parts is not None:
        owner: dict[str, Part] = {}
        for part in PARTS:
            for row in split.part(part):
                if owner.setdefault(data.groups[row], part) != part:
                    group, first = data.groups[row], owner[data.groups[row]]
                    raise DataError(f"{data.name}: group {group!r} lies in {first} and in {part}")


def balance(data: LabelledImages, split: RowSplit) -> str:
    """A table of images per class and part, with a warning line where a class is rare."""
    counts = {part: data.counts(split.part(part)) for part in PARTS}
    width = max(map(len, [*data.classes, "class"]))
    shown = list(data.classes) if len(data.classes) <= 30 else []
    lines = [f"{'class':<{width}}" + "".join(f"{part:>8}" for part in PARTS)]
    lines += [f"{name:<{width}}" + "".join(f"{counts[part][name]:>8}" for part in PARTS) for name in shown]
    lines.append(f"{'all':<{width}}" + "".join(f"{len(split.part(part)):>8}" for part in PARTS))
    train = counts["train"]
    low, high = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
    lines.append(
        f"{len(data.classes)} classes; smallest in train {low!r} ({train[low]}), largest {high!r} ({train[high]})"
        + (": unbalanced, see mean per-class accuracy and --balanced" if train[high] > 3 * train[low] else "")
    )
    return "\n".join(lines)


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
