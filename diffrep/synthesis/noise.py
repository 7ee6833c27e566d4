"""Noise of a canvas, line by line, so that it depends on the place and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffrep.backbones.diffusion import keyed_generator


class Noise(Protocol):
    """Where the noise of a canvas, or of a batch of patches, comes from. A line is (c, h, w) of any shape."""

    def start(self, lines: Sequence[int], shape: Sequence[int]) -> Tensor:
        """(lines, *shape) standard normal noise to start from."""

    def arguments(self, step: int, lines: Sequence[int]) -> Mapping[str, Any]:
        """What a scheduler's `step` is told of noise, for the given lines as a batch."""


class KeyedNoise:
    """Every line of every step has a generator of its own, on the CPU."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, lines: Sequence[int], shape: Sequence[int]) -> Tensor:
        draws = [torch.randn(*shape, generator=keyed_generator(self.seed, line)) for line in lines]
        return torch.stack(draws)

    def arguments(self, step: int, lines: Sequence[int]) -> Mapping[str, Any]:
        return {"generator": [keyed_generator(self.seed, line, stream=step + 1) for line in lines]}


class GivenNoise:
    """Noise that was drawn elsewhere.

    Args:
        first: (lines, c, h, w) to start from, already scaled to the scheduler's first level.
        steps: (steps, lines, c, h, w), one for each step that uses one; None for samplers without noise.
    """

    def __init__(self, first: Tensor, steps: Tensor | None = None) -> None:
        self.first, self.steps = first, steps

    @classmethod
    def of_canvas(cls, first: Tensor, steps: Tensor | None = None) -> GivenNoise:
        """From fields (c, H, W) and (steps, c, H, W): their rows are the lines."""
        rows = first.movedim(1, 0)[:, :, None]
        return cls(rows, None if steps is None else steps.movedim(2, 1)[:, :, :, None])

    def start(self, lines: Sequence[int], shape: Sequence[int]) -> Tensor:
        found = self.first[list(lines)]
        if tuple(found.shape[1:]) != tuple(shape):
            raise ValueError(f"the noise given has lines of {tuple(found.shape[1:])}, the canvas has {tuple(shape)}")
        return found

    def arguments(self, step: int, lines: Sequence[int]) -> Mapping[str, Any]:
        if self.steps is None or step >= len(self.steps):
            return {}
        return {"variance_noise": self.steps[step][list(lines)]}
