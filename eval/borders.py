"""What depth and normals do at the outlines of objects: halos, and whether thin parts are seen.

A head that blurs draws a band along every outline whose depth belongs to neither side. A pixel is a halo where the
predicted depth lies more than a quarter of the way from its own depth to that of the other side, by logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_opening, distance_transform_edt, label

REACH = 8.0  # pixels from an outline that are looked at
STEP = 1.1  # ratio of the depths on both sides of an outline from which on it counts
HALO = 0.25  # share of the way to the other side's depth
WIDE = 2.0  # pixels: no halo is to be wider

Depths = NDArray[np.floating]


def thin_places(mask: NDArray[np.bool_], width: int = 4, least: int = 8) -> NDArray[np.bool_]:
    """The parts of an object that no square of `width` pixels fits into: antennas, legs of chairs, spokes, tails.

    Args:
        least: pixels of a part; what is smaller is a corner.
    """
    thin = mask & ~binary_opening(mask, np.ones((width, width)))
    parts, count = label(thin, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray(sizes[parts] >= least)


@dataclass(frozen=True)
class Borders:
    """The pixels of a scene that lie near its object's outline, where depth jumps there.

    Attributes:
        distance: (H, W) to the nearest pixel of the other side, 1 beside the outline.
        other: (H, W) depth of that pixel.
        counted: (H, W) bool, within `REACH`, with a depth that differs from the other side's by `STEP` or more.
    """

    distance: Depths
    other: Depths
    counted: NDArray[np.bool_]

    @classmethod
    def of(cls, mask: NDArray[np.bool_], depth: Depths) -> Borders | None:
        """Of a mask and depths (H, W) without infinities; None where the picture has no outline."""
        if mask.all() or not mask.any():
            return None
        distance, other = np.zeros(mask.shape), np.zeros(mask.shape)
        for side in (mask, ~mask):
            away, (rows, columns) = distance_transform_edt(side, return_indices=True)
            distance[side], other[side] = away[side], depth[rows, columns][side]
        ratio = np.maximum(depth / other, other / depth)
        return cls(distance, other, (distance <= REACH) & (ratio >= STEP))

    def share_crossed(self, predicted: Depths, depth: Depths) -> Depths:
        """(H, W): 0 where the prediction has the pixel's own depth, 1 where it has the other side's; by logarithms."""
        way = np.log(np.where(self.counted, self.other / depth, np.e))
        return np.log(predicted / depth) / way


def halo_metrics(predicted: Depths, depth: Depths, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Halos of one scene, of aligned depth (H, W) against the truth, both positive and finite.

    Returns:
        "halo": pixels of halo for each pixel of outline, on both sides together; "wide halos": of 100 pixels farther
        than `WIDE` from the outline and within `REACH`, how many are halo; "thin seen": of 100 pixels of thin parts,
        how many have a depth nearer to their own than to the other side's. NaN where there is nothing to count.
    """
    borders = Borders.of(mask, depth)
    if borders is None:
        return dict.fromkeys(("halo", "wide halos", "thin seen"), float("nan"))
    crossed = borders.share_crossed(predicted, depth)
    halo, counted = (crossed > HALO) & borders.counted, borders.counted
    along, far, thin = (
        counted & (borders.distance < 1.5),
        counted & (borders.distance > WIDE),
        thin_places(mask) & counted,
    )

    def share(part: NDArray[np.bool_], of: NDArray[np.bool_], factor: float) -> float:
        return factor * float((part & of).sum()) / float(of.sum()) if of.any() else float("nan")

    outline = float(along.sum()) / 2  # both sides have a pixel of it
    return {
        "halo": float(halo.sum()) / outline if outline else float("nan"),
        "wide halos": share(halo, far, 100.0),
        "thin seen": share(crossed < 0.5, thin, 100.0),
    }
