"""Pose alignment: a target that is the source's mirror image is matched from the mirrored source."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffrep.eval.correspondence import mirrored_is_nearer, predict_posed
from diffrep.eval.datasets.pairs import AnnotatedImage, AnnotatedPair, table_of
from diffrep.eval.protocols import PROTOCOLS, CellSearch
from diffrep.features import Descriptors

from .parity.features_protocols import as_released

SIDE, CELLS = 64, 8
CAT = table_of("spair", "cat")
PROTOCOL = replace(PROTOCOLS["spair-geoaware"], frame=SIDE, search=CellSearch(cells=CELLS, centre=4.0, metric="cosine"))


def scene() -> tuple[AnnotatedPair, Descriptors, Descriptors, Descriptors]:
    """A cat and its mirror image: what was the right paw is now the left one."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(CELLS, CELLS, 16, generator=generator)
    other_side = cells + 0.2 * torch.randn(cells.shape, generator=generator)  # features feel the point of view
    partner = CAT.mirror
    here = {8: (20.0, 12.0), 9: (12.0, 52.0), 10: (44.0, 36.0), 13: (60.0, 4.0)}
    there = {partner.get(i, i): (SIDE - x, y) for i, (x, y) in here.items()}
    source, target = (
        AnnotatedImage(name, (SIDE, SIDE), points, (0, 0, SIDE, SIDE)) for name, points in (("a", here), ("b", there))
    )
    pair = AnnotatedPair("a-b:cat", "cat", source, target, tuple(here))
    own = Descriptors.from_vectors(other_side, (SIDE, SIDE))
    mirrored = Descriptors.from_vectors(cells.flip(1).contiguous(), (SIDE, SIDE))
    return pair, own, mirrored, mirrored


def test_a_mirrored_target_is_matched_from_the_mirrored_source() -> None:
    pair, source, mirrored, target = scene()
    assert mirrored_is_nearer(source, mirrored, target)
    found = predict_posed(pair, PROTOCOL, source, mirrored, target, CAT.mirror)
    assert bool(PROTOCOL.hits(pair, found).all(1)[0])
    # without it the appearance is found, on the wrong side
    assert PROTOCOL.search is not None
    plain = PROTOCOL.search(source, target, pair.source.points(pair.ids), SIDE)
    right = dict(zip(pair.ids, PROTOCOL.hits(pair, plain)[0].tolist(), strict=True))
    assert right == {8: True, 9: False, 10: False, 13: True}


def test_a_target_seen_from_the_same_side_is_matched_as_it_is() -> None:
    pair, source, mirrored, _ = scene()
    same = replace(pair, target=pair.source)
    mask = torch.ones(SIDE, SIDE)
    for masks in (None, (mask, mask)):
        assert not mirrored_is_nearer(source, mirrored, source, masks=masks)
        found = predict_posed(same, PROTOCOL, source, mirrored, source, CAT.mirror, masks=masks)
        assert bool(PROTOCOL.hits(same, found)[0].all())


def test_pose_needs_a_square() -> None:
    pair, source, mirrored, target = scene()
    with pytest.raises(ValueError, match="spair-dift does not"):
        predict_posed(pair, PROTOCOLS["spair-dift"], source, mirrored, target, {})


def test_the_released_numbering_differs_only_where_the_table_is_out_of_order() -> None:
    used = [0, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    released = as_released(CAT, used)
    assert {i: released.mirror[i] for i in (2, 3, 9, 12)} == {2: 3, 3: 2, 9: 10, 12: 11}
    assert released.mirror[0] == 0  # its partner never occurs
    assert frozenset({9, 10, 11, 12}) in released.groups
    bus = as_released(table_of("spair", "bus"), [0, 1, 2, 3, 5, 6, 7])
    assert bus.mirror[5] == 6  # the tail lights, right by chance: number 4 is missing, and the plates come after them
    assert as_released(table_of("spair", "bus"), range(8)).mirror[4] == 5  # meant were the tail lights, 5 and 6
