"""How good a large image is: does one see the windows, and does it look as its embeddings say, cell by cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.images import LUMINANCE, ImageLike, load_image
from diffrep.synthesis.conditions import ImageEncoder
from diffrep.synthesis.grids import EmbeddingGrid


def seam_ratio(image: ImageLike, period: int, *, offset: int = 0) -> float:
    """Steps across tile borders, relative to the steps right beside them; 1 where no seam is to be seen.

    With c(x) the mean over rows of |L(x + 1) - L(x)|, L the luminance, and X the columns before a border:
    sum c(X) / sum (c(X - 1) + c(X + 1)) / 2, averaged over both axes. Single images of few borders scatter by a few
    percent around 1; average over several.

    Args:
        image: see `load_image`.
        period: pixels between borders, at least 3.
        offset: of the first border, pixels; the image's own edges are none.

    Raises:
        ValueError: the period is too small, or no border lies inside the image.
    """
    if period < 3:
        raise ValueError(f"period must be at least 3 pixels, got {period}")
    pixels = np.asarray(load_image(image)).astype(np.float64) @ np.array(LUMINANCE)
    ratios = []
    for lines in (pixels, pixels.T):
        steps = np.abs(np.diff(lines, axis=1)).mean(0)  # steps[x] lies between columns x and x + 1
        before = np.arange(offset % period, lines.shape[1], period) - 1
        before = before[(before >= 1) & (before <= len(steps) - 2)]
        if not len(before):
            raise ValueError(
                f"no border every {period} pixels lies inside an image of {pixels.shape[0]} x {pixels.shape[1]}"
            )
        beside = (steps[before - 1] + steps[before + 1]).sum() / 2
        ratios.append(float(steps[before].sum() / beside) if beside > 0 else 1.0)
    return float(np.mean(ratios))


@dataclass(frozen=True)
class Consistency:
    """How well each of N cells of an image agrees with the conditions.

    Attributes:
        similarity: (N, N) float32, cosine between the embedding of painted cell i and condition j.
    """

    similarity: Tensor

    @property
    def own(self) -> float:
        """Mean cosine between a cell and its own condition."""
        return float(self.similarity.diagonal().mean())

    @property
    def other(self) -> float:
        """Mean cosine between a cell and the condition that it resembles most among the others."""
        return float(self._best_other.mean())

    @property
    def right(self) -> float:
        """Share of cells that are closer to their own condition than to any other cell's."""
        return float((self.similarity.diagonal() > self._best_other).float().mean())

    @property
    def _best_other(self) -> Tensor:
        diagonal = torch.eye(len(self.similarity), dtype=torch.bool)
        return self.similarity.masked_fill(diagonal, -torch.inf).amax(1)


def consistency(image: ImageLike, grid: EmbeddingGrid, encoder: ImageEncoder) -> Consistency:
    """Embed an image again, cell by cell, and compare with the grid that it was painted from.

    Args:
        image: covers the grid exactly: one cell for each embedding.
        encoder: the one that made the grid.

    Raises:
        ValueError: the grid has a single cell, or embeddings of another width.
    """
    if grid.dim != encoder.dim or grid.shape == (1, 1):
        raise ValueError(
            f"needs at least 2 cells and embeddings as wide as {encoder.name}'s ({encoder.dim}), got a grid of"
            f" {grid.shape[0]} x {grid.shape[1]} of width {grid.dim}"
        )
    painted = F.normalize(encoder.grid(image, grid.shape).embeddings.flatten(0, 1), dim=1)
    wanted = F.normalize(grid.embeddings.flatten(0, 1), dim=1)
    return Consistency(painted @ wanted.T)
