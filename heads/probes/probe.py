"""A trained probe: a head with everything needed to use it on images, kept as safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffrep.backbones import Backbone, load_backbone
from diffrep.files import save_weights, write_whole
from diffrep.heads.probes.cells import Cell, Reading, read_cells
from diffrep.heads.probes.fitting import softmax
from diffrep.heads.probes.layouts import FeatureHead, Layout
from diffrep.images import ImageLike, fit_image, load_image
from diffrep.store.manifest import difference, extract_config, provenance, weights_sha256

FORMAT, VERSION = "diffrep-probe", 1
ABOUT, _WEIGHTS = "probe.json", "probe.safetensors"
_NOT_COMPARED = frozenset({"taps", "timestep", "backbone"})  # the name of a folder may change, its weights may not


@dataclass(frozen=True)
class Prediction:
    """Probabilities (B, K) of the classes, in the order of the images."""

    probabilities: Tensor
    classes: tuple[str, ...]

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


@dataclass(frozen=True)
class Probe:
    """A head and how its features are read.

    Attributes:
        classes: names of the K classes.
        features: backbone -> provenance of its features: hash of the weights and every extraction setting.
        about: how it was trained and what it scored, JSON-ready.
    """

    head: FeatureHead
    classes: tuple[str, ...]
    features: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Where the features are read."""
        return self.head.layout.cells

    def save(self, folder: str | Path) -> None:
        """Write ``probe.json`` and ``probe.safetensors``; what was there is replaced by whole files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v for k, v in self.head.state_dict().items() if not k.endswith("num_batches_tracked")}
        save_weights(folder / _WEIGHTS, state)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "classes": list(self.classes),
            "layout": self.head.layout.document(),
            "features": {name: dict(values) for name, values in self.features.items()},
            "about": dict(self.about),
        }
        write_whole(folder / ABOUT, json.dumps(document, indent=1).encode() + b"\n")

    def load_backbones(self, device: str = "cpu") -> dict[str, Backbone]:
        """The backbones that it was trained on, in the precision that it was trained with."""
        return {name: load_recorded(name, values, device) for name, values in self.features.items()}

    def check(self, backbone: Backbone, name: str) -> None:
        """Refuse a backbone that is not the one the probe was trained on.

        Raises:
            ValueError: its weights or its precision differ; the message names the first difference.
        """
        kept = self.features[name]
        check_weights_of(name, kept, backbone)
        given = provenance(backbone, self._reading(name).extract)
        if found := difference(kept, given, ignore=_NOT_COMPARED):
            raise ValueError(f"the probe was trained on {name}, this backbone is another ({found})")

    @torch.no_grad()
    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        backbones: Mapping[str, Backbone] | None = None,
        device: str = "cpu",
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

    def _reading(self, name: str) -> Reading:
        cells = [cell for cell in self.cells if cell.backbone == name]
        taps, timesteps, pools = (
            tuple(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("tap", "timestep", "pool")
        )
        extract = extract_config({**self.features[name], "taps": taps, "timestep": timesteps[0]})
        return Reading(name, taps, timesteps, pools, extract)

    def _read(
        self, images: Sequence[ImageLike], backbones: Mapping[str, Backbone], readings: Mapping[str, Reading]
    ) -> Tensor:
        """(B, D): the features of all cells side by side."""
        loaded = [load_image(image) for image in images]
        found: dict[Cell, Tensor] = {}
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
                            whole = found.setdefault(cell, torch.empty(len(loaded), values.shape[1]))
                            whole[rows] = values
        return torch.cat([found[cell] for cell in self.cells], dim=1)


def batches_of(images: Iterable[ImageLike], size: int) -> Iterator[list[ImageLike]]:
    """The images in lists of at most `size`."""
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch


def load_probe(folder: str | Path) -> Probe:
    """Read a probe that `Probe.save` wrote.

    Raises:
        ValueError: the folder holds no probe, or one that is damaged or was made by a newer version.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{folder}: holds no probe (no {ABOUT}); `diffrep probe train` makes one")
    try:
        document = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is not of format {FORMAT!r}, version {VERSION}")
        head = FeatureHead(Layout.read(document["layout"]))
        tracked = {k: v for k, v in head.state_dict().items() if k.endswith("num_batches_tracked")}
        head.load_state_dict(load_file(folder / _WEIGHTS) | tracked)
        return Probe(head.eval(), tuple(document["classes"]), document["features"], document["about"])
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the probe cannot be read ({' '.join(str(error).split())[:300]})") from None


def load_recorded(name: str, features: Mapping[str, Any], device: str = "cpu") -> Backbone:
    """The backbone that a probe was trained on, in the precision that it was trained with.

    Args:
        features: provenance of its features.
    """
    return load_backbone(name, device=device, dtype=getattr(torch, features["dtype"]))


def check_weights_of(name: str, features: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a backbone that is not the one the probe was trained on.

    Args:
        name: of the one that it was trained on.
        features: provenance of its features.

    Raises:
        ValueError: it has other weights.
    """
    if weights_sha256(backbone) != features["weights_sha256"]:
        raise ValueError(f"the probe was trained on the features of {name}; {backbone.name} has other weights")


class OneBackbone:
    """Base of probes whose `features` are the provenance of one backbone's features."""

    features: Mapping[str, Any]

    @property
    def backbone(self) -> str:
        """The name of its backbone."""
        return str(self.features["backbone"])

    def load_own(self, device: str = "cpu") -> Backbone:
        """See `load_recorded`."""
        return load_recorded(self.backbone, self.features, device)

    def check(self, backbone: Backbone) -> None:
        """See `check_weights_of`."""
        check_weights_of(self.backbone, self.features, backbone)
