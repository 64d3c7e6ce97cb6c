"""Seeds of a group's samples."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from decode_server.seeds import sample_seed

seeds = st.integers(-(2**63), 2**63 - 1)


@given(seeds)
def test_sample_0_keeps_the_clients_seed(seed: int) -> None:
    assert sample_seed(seed, 0) == seed


@given(seeds)
def test_the_samples_of_a_group_and_of_its_neighbours_differ(seed: int) -> None:
    drawn = [sample_seed(seed + d, index) for d in range(3) for index in range(1, 17)]
    assert len(set(drawn)) == len(drawn)


@given(seeds, st.integers(1, 16))
def test_a_derived_seed_is_one_that_an_engine_takes(seed: int, index: int) -> None:
    derived = sample_seed(seed, index)
    assert derived is not None
    assert 0 <= derived < 2**63


def test_seeds_do_not_change_between_versions() -> None:
    assert sample_seed(1, 1) == 5186469624960807611


def test_without_a_seed_every_sample_is_random() -> None:
    assert [sample_seed(None, index) for index in range(3)] == [None] * 3
