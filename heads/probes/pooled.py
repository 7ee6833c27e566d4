"""Heads on one average-pooled map: linear, MLP and CNN.

Linear and MLP are those of "Diffusion Models Beat GANs on Image Classification" (arXiv 2307.08702) as released: an
average pool, flattened as (C, h, w), then linear layers with ReLU between them; no norm, no dropout. The hidden
widths that the paper used are not published. Of its CNN head only the name is published: the layers here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


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
