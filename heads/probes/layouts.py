"""Heads on the concatenated features of one or several cells, as one interface: (n, D) features to (n, K) scores.

The cells' vectors are (C, row, column) in the order of the cells. A layout holds everything that is needed to build
the head again before its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.heads.probes.attention import AttentionFusion, readout_string
from diffrep.heads.probes.cells import Cell
from diffrep.heads.probes.grid import Standardiser
from diffrep.heads.probes.neighbours import TEMPERATURE, NearestNeighbours
from diffrep.heads.probes.recipe import check_settings

Kind: TypeAlias = Literal["linear", "logistic", "mlp", "cnn", "attention", "knn"]
KINDS: tuple[Kind, ...] = ("linear", "logistic", "mlp", "cnn", "attention", "knn")


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The sizes inside a head; each kind uses its own."""

    hidden: tuple[int, ...] = (256,)  # mlp: widths of the hidden layers
    width: int = 128  # cnn, attention: channels inside; the papers' attention has 1024
    heads: int = 8  # attention
    ratio: float = 4  # attention: width of the inner layers over `width`
    depth: int = 2  # attention: transformer blocks
    norm: Literal["layer", "batch"] = "layer"  # attention: of each map
    temperature: float = TEMPERATURE  # knn: of the votes' weights

    def __post_init__(self) -> None:
        numbers = ("width", "heads", "ratio", "depth", "temperature")
        check_settings(self, positive=(*numbers, "hidden") if self.hidden else numbers)


@dataclass(frozen=True, kw_only=True)
class Layout(HeadShape):
    """What a head looks like.

    Attributes:
        kind: "attention" over the taps of one timestep is the papers' attention head, over several its DifFormer.
        cells: that it reads, in order.
        channels: of each cell's map.
    """

    kind: Kind
    cells: tuple[Cell, ...]
    channels: tuple[int, ...]
    classes: int
    k: int = 20  # knn: neighbours
    gallery: int = 0  # knn: training features; known after training

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"no head {self.kind!r}; there are {', '.join(KINDS)}")
        if not self.cells or len(self.channels) != len(self.cells):
            raise ValueError(f"a head reads at least one cell, each with its channels, got {len(self.cells)}")
        if self.kind == "cnn" and len(self.cells) != 1:
            raise ValueError(f"a cnn head reads one cell, got {len(self.cells)}")
        if self.kind == "attention":
            taps = self._by_timestep()
            backbones = {cell.backbone for cell in self.cells}
            if len(backbones) > 1 or len({tuple(t) for t in taps.values()}) > 1:
                raise ValueError("an attention head reads the same taps of one backbone at every timestep")

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers per image of each cell."""
        return tuple(c * cell.pool**2 for c, cell in zip(self.channels, self.cells, strict=True))

    def _by_timestep(self) -> dict[int, list[str]]:
        taps: dict[int, list[str]] = {}
        for cell in self.cells:
            taps.setdefault(cell.timestep, []).append(cell.tap)
        return taps

    def document(self) -> dict[str, Any]:
        """JSON-ready; `Layout.read` reads it back."""
        return asdict(self)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Layout:
        """From `document`."""
        cells = tuple(Cell(**cell) for cell in values["cells"])
        lists = {key: tuple(values[key]) for key in ("channels", "hidden")}
        return cls(**{**values, **lists, "cells": cells})


class FeatureHead(nn.Module):
    """A head with the standardisation of its features: `mean` and `scale` are (D,), 0 and 1 where there is none."""

    mean: Tensor
    scale: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        width = sum(layout.widths)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.head = _inner(layout)

    def standardise_by(self, standardiser: Standardiser) -> None:
        """Bring every channel to variance 1: layers behind this one are initialised for that."""
        self.mean.copy_(standardiser.mean)
        self.scale.copy_(standardiser.scale * len(self.mean) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, K) logits, or votes of k-NN."""
        scores: Tensor = self.head((x - self.mean) * self.scale)
        return scores


class _Flat(nn.Module):
    """A head for a map of one cell, given a vector."""

    def __init__(self, inner: nn.Module, channels: int, side: int) -> None:
        super().__init__()
        self.inner, self.shape = inner, (channels, side, side)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.unflatten(1, self.shape))
        return out


class _Fused(nn.Module):
    """`AttentionFusion` for the concatenated vectors of several cells."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        first = [
            (cell, channels)
            for cell, channels in zip(layout.cells, layout.channels, strict=True)
            if cell.timestep == layout.cells[0].timestep
        ]
        self.fusion = AttentionFusion(
            {cell.tap: channels for cell, channels in first},
            {cell.tap: cell.pool for cell, _ in first},
            layout.classes,
            readout=readout_string(layout.width, layout.heads, ratio=layout.ratio, depth=layout.depth),
            norm=layout.norm,
            timesteps=len({cell.timestep for cell in layout.cells}),
        )

    def forward(self, x: Tensor) -> Tensor:
        maps: dict[int, dict[str, Tensor]] = {}
        parts = x.split(self.layout.widths, dim=1)
        for cell, channels, part in zip(self.layout.cells, self.layout.channels, parts, strict=True):
            maps.setdefault(cell.timestep, {})[cell.tap] = part.unflatten(1, (channels, cell.pool, cell.pool))
        logits: Tensor = self.fusion(list(maps.values()))
        return logits


class _Voters(nn.Module):
    """k-NN: each cell's vector is brought to unit length, so that all of them count alike."""

    gallery: Tensor
    labels: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("gallery", torch.zeros(layout.gallery, sum(layout.widths)))
        self.register_buffer("labels", torch.zeros(layout.gallery, dtype=torch.int64))
        self._voters: NearestNeighbours | None = None

    def unit(self, x: Tensor) -> Tensor:
        parts = x.float().split(self.layout.widths, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        k = min(self.layout.k, len(self.gallery))
        return self.voters().votes(self.unit(x), [k])[k]

    def voters(self) -> NearestNeighbours:
        """With the index over the gallery, made when it is first asked."""
        if self._voters is None:
            layout = self.layout
            self._voters = NearestNeighbours(self.gallery, self.labels, layout.classes, temperature=layout.temperature)
        return self._voters


def _inner(layout: Layout) -> nn.Module:
    if layout.kind in ("linear", "logistic"):
        return nn.Linear(sum(layout.widths), layout.classes)
    if layout.kind == "mlp":
        inner = PooledHead(sum(layout.widths), layout.classes, hidden=layout.hidden)
        return _Flat(inner, sum(layout.widths), 1)
    if layout.kind == "cnn":
        side = layout.cells[0].pool
        return _Flat(
            CnnHead(layout.channels[0], layout.classes, pool=side, width=layout.width), layout.channels[0], side
        )
    return _Fused(layout) if layout.kind == "attention" else _Voters(layout)


def build_head(layout: Layout, *, seed: int = 0) -> FeatureHead:
    """A head with initial weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(seed)
        return FeatureHead(layout)


def gallery_head(layout: Layout, features: Tensor, labels: Tensor) -> FeatureHead:
    """A k-NN head from (N, D) features and (N,) labels."""
    head = FeatureHead(layout)
    voters = head.head
    assert isinstance(voters, _Voters)
    voters.gallery.copy_(voters.unit(features))
    voters.labels.copy_(labels)
    return head


class PooledHead(nn.Module):
    """Average pool to `pool` x `pool` cells, then a linear layer, or linear layers with ReLU between them.

    Args:
        channels: of the map.
        hidden: widths of the hidden layers; none for the linear head.

    State: ``fcs.N.weight`` and ``fcs.N.bias``, the released names.
    """

    def __init__(self, channels: int, classes: int, *, pool: int = 1, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.pool = pool
        widths = [channels * pool * pool, *hidden, classes]
        self.fcs = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K)."""
        x = F.adaptive_avg_pool2d(maps, self.pool).flatten(1)
        for layer in self.fcs[:-1]:
            x = layer(x).relu()
        logits: Tensor = self.fcs[-1](x)
        return logits


class CnnHead(nn.Module):
    """Average pool to `pool` x `pool` cells, two 3x3 convolutions with batch norm and ReLU, mean, linear layer.

    Not the paper's: of its CNN head no layer is published.
    """

    def __init__(self, channels: int, classes: int, *, pool: int = 8, width: int = 128) -> None:
        super().__init__()
        self.pool = pool
        layers: list[nn.Module] = []
        for before in (channels, width):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K)."""
        x = self.convolutions(F.adaptive_avg_pool2d(maps, self.pool))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
