"""Noise that depends on a seed and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(shape: Sequence[int], seed: int, draw: int = 0, *, stream: int = 0) -> Tensor:
    """Standard normal noise (1, *shape) that depends on the seed and the number of the draw only.

    Drawn contiguously on the CPU, so that it is the same on every device and in every batch. Draw 0 of
    stream 0 is the plain generator seeded with `seed`, as sd-dino draws it.
    """
    return torch.randn(1, *shape, generator=keyed_generator(seed, draw, stream=stream))


def keyed_generator(seed: int, draw: int = 0, *, stream: int = 0) -> torch.Generator:
    """The generator of one draw of one stream."""
    mixed = (seed + draw * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) % 2**63
    return torch.Generator().manual_seed(mixed)
