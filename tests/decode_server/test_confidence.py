"""Confidence measured on the worker is what the router measures from shipped log-probabilities."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.wire import Watch
from decode_server.confidence import Confidence
from router.strategies.confidence import token_confidence, trace_confidence

Tops = list[list[float]]


def grown(tops: Tops, upto: int, finish: str | None = None) -> Any:
    logprobs = [
        {token: SimpleNamespace(logprob=value) for token, value in enumerate(top)} for top in tops[:upto]
    ]
    return SimpleNamespace(logprobs=logprobs, finish_reason=finish)


def measured(tops: Tops, watch: Watch, chunk: int = 1) -> tuple[Confidence, int | None]:
    """The measure, and after how many tokens the sample is to be ended."""
    confidence = Confidence(watch)
    for upto in range(chunk, len(tops) + chunk, chunk):
        if confidence.falls(grown(tops, upto)):
            return confidence, upto
    return confidence, None


class Llm:
    """Each sample is these tops, one token an output, until it is aborted."""

    def __init__(self, tops: Tops) -> None:
        self.tops = tops
        self.aborted: list[str] = []
        self.asked: list[Any] = []

    async def abort(self, names: list[str]) -> None:
        self.aborted += names

    async def plain(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        from vllm.outputs import CompletionOutput, RequestOutput

        self.asked.append(params)
        for upto in range(1, len(self.tops) + 1):
            gone = request_id in self.aborted
            reason = "abort" if gone else "stop" if upto == len(self.tops) else None
            logprobs: Any = grown(self.tops, upto).logprobs
            made = CompletionOutput(0, "x" * upto, [7] * upto, 0.0, logprobs, finish_reason=reason)
            yield RequestOutput(request_id, None, [1, 2], None, [made], reason is not None)
            if gone:
                return


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_sample_below_is_aborted_and_says_how_confident_it_was() -> None:
    from vllm.sampling_params import RequestOutputKind

    from tests.decode_server.test_samples import Run

    llm = Llm(of(9, 9, 1, 1, 9, 9, 9))
    run = Run(llm, 2, final=True, report=True)  # type: ignore[arg-type]
    run.job.watch = Watch(2, 1, least=1.5)
    run.job.keep = True
    await run.outputs()
    assert llm.aborted == ["r-0", "r-1"]
    assert run.job.confidence == {0: 1.0, 1: 1.0}
    assert [(number, last.outputs[0].finish_reason) for number, last, _ in run.reports] == [
        (0, "abort"),
        (1, "abort"),
    ]
    assert run.job.generated == {0: 5, 1: 5}
    assert (llm.asked[0].logprobs, llm.asked[0].output_kind) == (1, RequestOutputKind.CUMULATIVE)
    assert sorted(run.released) == ["0-0", "0-1"], "nothing goes on from it"


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_confident_sample_runs_to_its_end() -> None:
    from tests.decode_server.test_samples import Run

    llm = Llm(of(9, 2, 2, 9))
    run = Run(llm, 1, final=True, report=True)  # type: ignore[arg-type]
    run.job.watch = Watch(2, 1, least=1.5)
    outputs = await run.outputs()
    assert (llm.aborted, run.job.confidence, run.job.generated) == ([], {0: 2.0}, {0: 4})
    assert len(outputs) == 1, "the last alone"
    assert [len(one.outputs[0].token_ids) for _, one, _ in run.reports] == [4]


def of(*confidences: float) -> Tops:
    return [[-value] for value in confidences]


@given(
    st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=5), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 7),
)
def test_worker_and_router_agree(tops: Tops, window: int, top: int, chunk: int) -> None:
    confidence, ended = measured(tops, Watch(window, top), chunk)
    expected = trace_confidence([token_confidence(one, top) for one in tops], "lowest_group", window)
    assert confidence.lowest == pytest.approx(expected, abs=1e-9)
    assert ended is None, "without a least none is ended"


def test_a_sample_is_ended_with_the_first_whole_group_below() -> None:
    tops = of(1, 1, 9, 9, 2, 2, 1, 9)
    assert measured(tops, Watch(2, 1, least=1.9))[1] == 2
    assert measured(tops, Watch(3, 1, least=1.9))[1] == 7
    assert measured(tops, Watch(2, 1, least=1.0))[1] is None, "below it, not at it"
    assert measured(tops, Watch(99, 1, least=5.0))[1] is None, "a group that is not whole ends nothing"


def test_several_tokens_at_once_are_all_looked_at() -> None:
    assert measured(of(9, 1, 1, 9, 9, 9), Watch(2, 1, least=2.0), chunk=6)[1] == 6


def test_a_sample_that_has_ended_is_not_ended_again() -> None:
    confidence = Confidence(Watch(1, 1, least=5.0))
    assert not confidence.falls(grown(of(1), 1, "stop"))
    assert confidence.lowest == 1.0


def test_without_tokens_there_is_no_confidence() -> None:
    confidence = Confidence(Watch(4, 4, least=1.0))
    assert not confidence.falls(SimpleNamespace(logprobs=None, finish_reason=None))
    assert confidence.lowest is None


def test_an_impossible_token_is_no_infinity() -> None:
    confidence, _ = measured([[-math.inf, 0.0], [0.0, 0.0]], Watch(1, 2))
    assert confidence.lowest == 0.0
