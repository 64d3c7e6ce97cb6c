from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.strategies.voting import Ballot, confidence, is_decided, tally, weight_of

WEIGHTS = st.one_of(st.just(1.0), st.floats(0, 1))


@st.composite
def elections(draw: st.DrawFn) -> tuple[list[Ballot | None], list[int]]:
    """The outcome of each sample (None: it has no vote) and an order in which they end."""
    keys = draw(st.lists(st.none() | st.sampled_from("abc"), min_size=1, max_size=24))
    uniform = draw(st.booleans())
    ballots = [
        None if key is None else Ballot(index, key, key, 1.0 if uniform else draw(WEIGHTS))
        for index, key in enumerate(keys)
    ]
    return ballots, draw(st.permutations(range(len(keys))))


@given(elections())
def test_stopping_when_decided_never_changes_the_winner(
    election: tuple[list[Ballot | None], list[int]],
) -> None:
    ballots, order = election
    final = tally(ballot for ballot in ballots if ballot)
    for heard in range(1, len(order)):
        so_far = tally(ballot for ballot in map(ballots.__getitem__, order[:heard]) if ballot)
        if is_decided(so_far, len(order) - heard):
            assert so_far[0].answer == final[0].answer


@given(elections())
def test_a_tally_does_not_depend_on_the_order(election: tuple[list[Ballot | None], list[int]]) -> None:
    ballots, order = election
    cast = [ballot for ballot in ballots if ballot]
    assert tally(cast) == tally(ballot for ballot in map(ballots.__getitem__, order) if ballot)


@given(elections())
def test_every_ballot_counts_once_and_the_first_class_is_the_heaviest(
    election: tuple[list[Ballot | None], list[int]],
) -> None:
    cast = [ballot for ballot in election[0] if ballot]
    votes = tally(cast)
    assert sorted(i for one in votes for i in one.indices) == [ballot.index for ballot in cast]
    assert all(one.weight <= votes[0].weight for one in votes)


def test_the_rule_is_as_early_as_it_may_be() -> None:
    nine = [Ballot(i, "a", "a") for i in range(9)]
    assert is_decided(tally(nine), 8)
    assert not is_decided(tally(nine[:8]), 8)


def test_a_tie_goes_to_the_lowest_submission_index() -> None:
    cast = [Ballot(0, "b", "b"), Ballot(1, "a", "a"), Ballot(2, "a", "a"), Ballot(3, "b", "b")]
    assert tally(reversed(cast))[0].answer == "b"


def test_an_answer_is_shown_as_its_first_voter_wrote_it() -> None:
    assert tally([Ballot(4, "4.0", "=4"), Ballot(2, "4", "=4")])[0].answer == "4"


def test_nothing_is_decided_without_votes() -> None:
    assert not is_decided([], 0)
    assert confidence([]) is None


def test_confidence_is_the_share_of_the_weight() -> None:
    assert confidence(tally([Ballot(0, "a", "a", 0.9), Ballot(1, "b", "b", 0.1)])) == pytest.approx(0.9)
    assert confidence(tally([Ballot(0, "a", "a", 0.0)])) is None


@given(st.floats(allow_nan=True))
def test_a_weight_is_never_over_one(mean_logprob: float) -> None:
    assert 0.0 <= weight_of(mean_logprob) <= 1.0


def test_a_weight_is_the_probability_of_a_token() -> None:
    assert weight_of(math.log(0.5)) == pytest.approx(0.5)
    assert weight_of(float("-inf")) == 0.0
