"""PCK: what counts, and the four ways to average it."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffrep.eval.protocols import AGGREGATES, PairCount, Pck, chance_within, difference_interval, within

COUNTS = st.lists(
    st.builds(
        lambda category, points, share: PairCount("p", category, points, (round(points * share), points)),
        st.sampled_from(["bird", "boat", "cat"]),
        st.integers(0, 20),
        st.floats(0, 1),
    ),
    max_size=12,
)


def test_the_threshold_itself_counts_only_where_inclusive() -> None:
    predicted, target = torch.tensor([[3.0, 4.0], [0.0, 4.9], [6.0, 0.0]]), torch.zeros(3, 2)
    assert within(predicted, target, 50, [0.1, 0.05]).tolist() == [[True, True, False], [False, False, False]]
    assert within(predicted, target, 50, [0.1], inclusive=False).tolist() == [[False, True, False]]
    scales = torch.tensor([50.0, 10.0, 60.0])
    assert within(predicted, target, scales, [0.1]).tolist() == [[True, False, True]]


def test_points_that_are_not_finite_are_wrong() -> None:
    predicted = torch.tensor([[math.nan, 0.0], [math.inf, 0.0]])
    assert not within(predicted, torch.zeros(2, 2), 1e9, [1.0]).any()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"both be \(N, 2\), got \(3, 2\) and \(2, 2\)"):
        within(torch.zeros(3, 2), torch.zeros(2, 2), 1.0, [0.1])
    with pytest.raises(ValueError, match="1 counts for 2 alphas"):
        Pck((0.1, 0.2), (PairCount("a", "cat", 2, (1,)),))


def test_the_four_averages_by_hand() -> None:
    pck = Pck(
        (0.1,),
        (
            PairCount("1", "cat", 10, (10,)),
            PairCount("2", "cat", 2, (0,)),
            PairCount("3", "cat", 0, (0,)),  # nothing visible in both: counts nowhere
            PairCount("4", "dog", 4, (1,)),
        ),
    )
    assert pck.value("per point") == (11 / 16,)
    assert pck.value("per image") == pytest.approx(((1 + 0 + 0.25) / 3,))
    assert pck.value("category mean") == pytest.approx(((10 / 12 + 1 / 4) / 2,))
    assert pck.value("pair-weighted category") == pytest.approx(((2 * 10 / 12 + 1 / 4) / 3,))
    assert pck.of("dog").value() == (0.25,)
    assert pck.points == 16
    with pytest.raises(ValueError, match="no aggregate 'mean'"):
        pck.value("mean")  # type: ignore[arg-type]


def test_nothing_counted_is_nan() -> None:
    empty = Pck((0.1,), (PairCount("1", "cat", 0, (0,)),))
    for aggregate in AGGREGATES:
        assert math.isnan(empty.value(aggregate)[0])
    assert all(map(math.isnan, empty.interval()[0]))


@given(COUNTS, st.randoms())
def test_averages_do_not_depend_on_the_order(pairs: list[PairCount], random: Random) -> None:
    shuffled = random.sample(pairs, len(pairs))
    for aggregate in AGGREGATES:
        one, other = (Pck((0.05, 0.1), tuple(some)).value(aggregate) for some in (pairs, shuffled))
        assert str(one) == str(other)  # as text: NaN equals NaN


def test_the_interval_holds_the_value_and_narrows_with_more_pairs() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(pairs: int) -> Pck:
        hits = torch.rand(pairs, 8, generator=generator) < 0.6
        return Pck((0.1,), tuple(PairCount.of(str(i), "cat", h[None]) for i, h in enumerate(hits)))

    few, many = draw(20), draw(2000)
    for pck in (few, many):
        ((low, high),) = pck.interval()
        assert low < pck.value()[0] < high
    spread = [pck.interval()[0][1] - pck.interval()[0][0] for pck in (few, many)]
    assert spread[1] < spread[0] / 5
    assert spread[1] == pytest.approx(2 * 1.96 * math.sqrt(0.6 * 0.4 / (8 * 2000)), rel=0.15)
    assert few.interval() == few.interval()


def test_chance_is_the_share_of_pixels_in_the_disc() -> None:
    targets = torch.tensor([[50.0, 40.0], [0.0, 0.0]])
    centre, corner = chance_within(targets, 100, [0.1], (81, 101))[0].tolist()
    disc = sum(x * x + y * y <= 100 for x in range(-10, 11) for y in range(-10, 11))
    quarter = sum(x * x + y * y <= 100 for x in range(11) for y in range(11))
    assert centre == pytest.approx(disc / (81 * 101))
    assert corner == pytest.approx(quarter / (81 * 101))


def test_a_difference_over_the_same_pairs_is_sharper_than_two_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(200, 1, generator=generator)  # what makes a pair hard is hard for both
    ours, theirs = (
        Pck(
            (0.1,),
            tuple(
                PairCount.of(str(i), "cat", h[None])
                for i, h in enumerate(torch.rand(200, 8, generator=generator) < share * hard)
            ),
        )
        for share in (1.0, 0.8)
    )
    ((low, high),) = difference_interval(ours, theirs)
    assert 0 < low < ours.value()[0] - theirs.value()[0] < high
    assert high - low < sum(b - a for a, b in (*ours.interval(), *theirs.interval())) / 2
    assert difference_interval(ours, ours) == ((0.0, 0.0),)
    with pytest.raises(ValueError, match="the same pairs"):
        difference_interval(ours, theirs.where(lambda pair: pair.pair != "3"))
