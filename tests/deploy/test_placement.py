"""Which cores or GPU each engine gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.placement import Hardware, count_gpus, decode_workers, seats, split_cores


@pytest.mark.parametrize(
    ("cores", "prefill", "decode", "expected"),
    [
        ([0], 1, 2, [(0,), (0,), (0,)]),
        ([0, 1], 1, 2, [(0,), (1,), (1,)]),
        ([0, 1], 2, 2, [(0,), (0,), (1,), (1,)]),
        ([4, 5, 6], 1, 2, [(4,), (5,), (6,)]),
        (range(8), 1, 2, [(0, 1), (2, 3), (4, 5)]),
        ([0, 1, 2], 1, 4, [(0,), (1,), (2,), (1,), (2,)]),
    ],
)
def test_cores(cores: list[int], prefill: int, decode: int, expected: list[tuple[int, ...]]) -> None:
    assert split_cores(cores, prefill, decode) == expected


@given(st.integers(2, 64), st.integers(1, 8), st.integers(1, 8))
def test_prefill_and_decode_share_no_core(cores: int, prefill: int, decode: int) -> None:
    split = split_cores(range(cores), prefill, decode)
    first, second = split[:prefill], split[prefill:]
    assert len(split) == prefill + decode
    assert all(split)
    assert not {c for s in first for c in s} & {c for s in second for c in s}


@pytest.mark.parametrize(
    ("cores", "gpus", "others", "workers"),
    [(1, 0, 1, 1), (2, 0, 1, 1), (3, 0, 1, 2), (4, 0, 3, 1), (64, 0, 1, 2), (64, 1, 1, 1), (1, 3, 1, 2)],
)
def test_a_second_decode_worker_has_a_core_or_gpu_of_its_own(
    cores: int, gpus: int, others: int, workers: int
) -> None:
    assert decode_workers(Hardware(tuple(range(cores)), gpus), others) == workers


def test_a_cpu_seat_binds_threads() -> None:
    assert seats(Hardware((2, 3)), 1, 1)[0].env == {"VLLM_CPU_OMP_THREADS_BIND": "2"}


def test_engines_on_one_gpu_share_its_memory() -> None:
    placed = seats(Hardware((0,), gpus=2), 1, 2)
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in placed] == ["0", "1", "0"]
    assert [s.flags[1] for s in placed] == ["0.45", "0.90", "0.45"]


def test_gpus_are_ignored_where_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_FLAVOR", "cpu")
    assert count_gpus() == 0
