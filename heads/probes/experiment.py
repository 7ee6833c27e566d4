"""From labelled images to a probe: read features, choose on val, train the choice again, look at test once."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones import Backbone
from diffrep.heads.probes.cache import PooledFeatures, read_features
from diffrep.heads.probes.cells import Cell, ReadPlan
from diffrep.heads.probes.fitting import Fitted, ProbeFit, fit_head, head_scores, train_head
from diffrep.heads.probes.labelled import DataError, LabelledImages
from diffrep.heads.probes.layouts import HeadShape, Kind, Layout
from diffrep.heads.probes.probe import Probe
from diffrep.heads.probes.rows import FeatureRows, SideBySide
from diffrep.heads.probes.scores import Scores, score
from diffrep.heads.probes.splits import RowSplit, split_rows


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
        features = {
            reading.backbone: read_features(
                data.images,
                backbones[reading.backbone],
                reading,
                folder,
                dtype=dtype,
                workers=workers,
                progress=progress,
            )
            for reading in readings
        }
        usable = next(iter(features.values())).readable
        for other in features.values():
            usable = usable & other.readable
        readable = RowSplit(*(tuple(row for row in split.part(p) if usable[row]) for p in ("train", "val", "test")))  # type: ignore[arg-type]
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
        parts = [self.features[cell.backbone].rows(cell) for cell in cells]
        return parts[0] if len(parts) == 1 else SideBySide(parts)

    def layout(self, kind: Kind, cells: Sequence[Cell], *, shape: HeadShape | None = None, **options: Any) -> Layout:
        """A head on some cells.

        Args:
            options: fields of the shape that are changed.
        """
        options = asdict(shape or HeadShape()) | options
        channels = tuple(self.features[c.backbone].rows(c).width // c.pool**2 for c in cells)
        return Layout(kind=kind, cells=tuple(cells), channels=channels, classes=len(self.data.classes), **options)

    def fit(self, layout: Layout, fit: ProbeFit) -> Fitted:
        """Train on train, choose on val."""
        return fit_head(layout, self.rows(layout.cells), self.labels, self.split.train, self.split.val, fit)


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
    fit = fit or ProbeFit()
    start = time.monotonic()
    data, split, labels = prepared.data, prepared.split, prepared.labels
    fitted = prepared.fit(layout, fit)
    voted = layout.kind == "knn"
    val = score(fitted.scores, labels[list(split.val)], data.classes, voted_only=voted)
    rows = prepared.rows(layout.cells)
    head = train_head(layout, rows, labels, sorted([*split.train, *split.val]), fit, fitted.choice)
    scores = head_scores(head, rows, split.test)
    test = score(scores, labels[list(split.test)], data.classes, voted_only=voted)
    about = {
        "data": data.name,
        "images": {part: len(split.part(part)) for part in ("train", "val", "test")},  # type: ignore[arg-type]
        "unreadable": len(prepared.unreadable()),
        "split_seed": seed,
        "selection": "hyperparameters chosen on val, trained again on train and val, test scored once",
        "choice": fitted.choice,
        "tried": list(fitted.tried),
        "fit": asdict(fit),
        "val": val.document(),
        "test": test.document(),
        "versions": _versions(),
    }
    features = {cell.backbone: prepared.features[cell.backbone].features for cell in layout.cells}
    probe = Probe(head, data.classes, features, json.loads(json.dumps(about)))
    return ProbeResult(probe, fitted.choice, fitted.tried, val, test, scores, round(time.monotonic() - start, 2))


def _versions() -> dict[str, str]:
    import diffrep

    return {"diffrep": diffrep.__version__, "torch": torch.__version__, "python": platform.python_version()}
