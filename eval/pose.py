"""Adaptive pose alignment: match from the mirrored source where that looks more like the target.

GeoAware-SC ("Telling Left from Right", section 3.2): two images of one object from opposite sides are far
apart for any descriptor, and mirroring one of them brings them together. A keypoint's place in a mirror
image is that of its left-right partner, so the answers are asked for at the partners.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffrep.eval.datasets.pairs import AnnotatedPair
from diffrep.eval.protocols import Protocol
from diffrep.fusion import Descriptors
from diffrep.matching import masked_distance, mutual_distance


def mirrored_is_nearer(
    source: Descriptors,
    mirrored: Descriptors,
    target: Descriptors,
    *,
    masks: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Whether the mirrored source is nearer to the target than the source itself.

    Args:
        masks: of source and target, (H', W') over the whole map; None compares mutually nearest cells.
    """
    if masks is None:
        return bool(mutual_distance(mirrored, target) < mutual_distance(source, target))
    source_mask, target_mask = masks
    plain = masked_distance(source, target, source_mask, target_mask)
    return bool(masked_distance(mirrored, target, source_mask.flip(-1), target_mask) < plain)


def predict_posed(
    pair: AnnotatedPair,
    protocol: Protocol,
    source: Descriptors,
    mirrored: Descriptors,
    target: Descriptors,
    partners: Mapping[int, int],
    *,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Where a pair's keypoints lie in the target, (N, 2) float32 in the protocol's square.

    Where the mirrored source is the nearer one, a keypoint whose partner is visible in both images is
    looked for from there, at its partner's place; the others from the source as it is.

    Args:
        mirrored: descriptors of the source's mirror image.
        partners: keypoint -> the one that takes its place in a mirror image; those left out are their own.

    Raises:
        ValueError: the protocol does not match on a square.
    """
    if protocol.search is None or protocol.frame is None:
        raise ValueError(f"pose alignment needs a protocol that matches on a square, {protocol.name} does not")
    side = protocol.frame
    predicted = protocol.search(source, target, protocol.to_frame(pair.source.points(pair.ids), pair.source), side)
    asked = [partners.get(i, i) for i in pair.ids]
    visible = torch.tensor([i in pair.ids for i in asked], dtype=torch.bool)
    if not bool(visible.any()) or not mirrored_is_nearer(source, mirrored, target, masks=masks):
        return predicted
    queries = protocol.to_frame(pair.source.points([i for i in asked if i in pair.ids]), pair.source)
    queries[:, 0] = side - queries[:, 0]
    predicted[visible] = protocol.search(mirrored, target, queries, side)
    return predicted
