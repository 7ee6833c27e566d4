"""A probe of whole images: a head on the pooled features of one or several backbones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from diffrep.backbones import Backbone
from diffrep.heads.probes.cells import Cell, ReadPlan, read_cells
from diffrep.heads.probes.fitting import softmax
from diffrep.heads.probes.layouts import FeatureHead, Layout
from diffrep.heads.probes.saved import SavedKind, SavedProbe, batches_of
from diffrep.images import ImageLike, fit_image, load_image
from diffrep.results import Result
from diffrep.store.manifest import extract_config


@dataclass(frozen=True, repr=False)
class Prediction(Result):
    """Probabilities (B, K) of the classes, in the order of the images."""

    MAIN = "probabilities"

    probabilities: Tensor
    classes: tuple[str, ...]

    def columns(self) -> Mapping[str, Any]:
        """The likeliest class of each image, and the probability of every class."""
        return {"class": self.labels(), **dict(zip(self.classes, self.probabilities.T, strict=True))}

    def labels(self) -> list[str]:
        """The likeliest class of each image."""
        return [self.classes[i] for i in self.probabilities.argmax(1).tolist()]

    def top(self, n: int) -> list[list[tuple[str, float]]]:
        """The n likeliest classes of each image with their probabilities."""
        values, numbers = self.probabilities.topk(min(n, len(self.classes)), dim=1)
        return [
            [(self.classes[i], v) for i, v in zip(row, shares, strict=True)]
            for row, shares in zip(numbers.tolist(), values.tolist(), strict=True)
        ]


@dataclass(frozen=True, repr=False)
class Probe(SavedProbe):
    """A head and how its features are read.

    Attributes:
        classes: names of the K classes.
        features: backbone -> provenance of its features: hash of the weights and every extraction setting.
        about: how it was trained and what it scored, JSON-ready.
    """

    KIND: ClassVar[SavedKind] = "classification"

    head: FeatureHead
    classes: tuple[str, ...]
    features: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Where the features are read."""
        return self.head.layout.cells

    @property
    def provenances(self) -> Mapping[str, Mapping[str, Any]]:
        """The same as `features`."""
        return self.features

    @property
    def network(self) -> nn.Module:
        """The same as `head`."""
        return self.head

    def document(self) -> dict[str, Any]:
        """Classes and layout."""
        return {"classes": list(self.classes), "layout": self.head.layout.document()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], backbone: Backbone | None) -> Self:
        """A head of the layout."""
        layout, classes = Layout.read(document["layout"]), tuple(map(str, document["classes"]))
        if len(classes) != layout.classes or {cell.backbone for cell in layout.cells} != set(document["features"]):
            raise ValueError("its layout, classes and features do not belong together")
        return cls(FeatureHead(layout), classes, document["features"], document["about"])

    def summary(self) -> str:
        """Kind of head, classes, and the score of test where it is known."""
        test = self.about.get("test", {}).get("top1")
        scored = "" if test is None else f", {100 * test:.1f} % of test"
        return f"{self.head.layout.kind}, {len(self.classes)} classes{scored},"

    def __repr__(self) -> str:
        return f"Probe({self.summary()} on {'; '.join(map(str, self.cells))})"

    @torch.no_grad()
    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        backbones: Mapping[str, Backbone] | None = None,
        device: str = "auto",
        batch_size: int = 32,
    ) -> Prediction:
        """Classify images of any size.

        Args:
            backbones: by the names in `features`, where they are loaded already.

        Raises:
            ImageError: an image cannot be read.
            ValueError: no image is given, or a backbone is not the one the probe was trained on.
        """
        backbones = backbones if backbones is not None else self.load_backbones(device)
        if missing := sorted(set(self.features) - set(backbones)):
            raise ValueError(f"the probe reads {', '.join(self.features)}; no {', '.join(missing)} is given")
        for name in self.features:
            self.check(backbones[name], name)
        readings = {name: self._reading(name).resolve(backbones[name]) for name in self.features}
        scores = [self.head(self._read(batch, backbones, readings)) for batch in batches_of(images, batch_size)]
        if not scores:
            raise ValueError("predict needs at least one image")
        return Prediction(softmax(torch.cat(scores), self.head.layout), self.classes)

    def _reading(self, name: str) -> ReadPlan:
        cells = [cell for cell in self.cells if cell.backbone == name]
        taps, timesteps, pools = (
            tuple(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("tap", "timestep", "pool")
        )
        extract = extract_config({**self.features[name], "taps": taps, "timestep": timesteps[0]})
        return ReadPlan(name, taps, timesteps, pools, extract)

    def _read(
        self, images: Sequence[ImageLike], backbones: Mapping[str, Backbone], readings: Mapping[str, ReadPlan]
    ) -> Tensor:
        """(B, D): the features of all cells side by side."""
        loaded = [load_image(image) for image in images]
        by_cell: dict[Cell, Tensor] = {}
        for name, reading in readings.items():
            assert reading.extract.sizing is not None  # resolved
            canvases = [fit_image(image, reading.extract.sizing) for image in loaded]
            by_size: dict[tuple[int, int], list[int]] = {}
            for row, (_, placement) in enumerate(canvases):
                by_size.setdefault(placement.canvas_size, []).append(row)
            for rows in by_size.values():
                pixels = torch.stack([canvases[row][0] for row in rows])
                placements = [canvases[row][1] for row in rows]
                for timestep, vectors in read_cells(
                    backbones[name], pixels, placements, reading, reading.timesteps or ()
                ):
                    for (tap, pool), values in vectors.items():
                        cell = Cell(name, timestep, tap, pool)
                        if cell in self.cells:
                            whole = by_cell.setdefault(cell, torch.empty(len(loaded), values.shape[1]))
                            whole[rows] = values
        return torch.cat([by_cell[cell] for cell in self.cells], dim=1)
