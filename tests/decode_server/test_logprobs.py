"""Log-probabilities that nobody is told, on vLLM's own processor of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # importing vLLM can take minutes on a busy machine


class Refuses:
    """A tokenizer that is not to be asked."""

    def decode(self, ids: Any) -> str:
        raise AssertionError


def state(logprobs: int | None) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.logprobs import LogprobsProcessor

    request: Any = SimpleNamespace(sampling_params=SamplingParams(logprobs=logprobs))
    tokenizer: Any = Refuses()
    return SimpleNamespace(logprobs_processor=LogprobsProcessor.from_new_request(tokenizer, request))


def step(*rows: list[float]) -> Any:
    """What the engine says of tokens: of each its own log-probability, then its candidates'."""
    from vllm.v1.outputs import LogprobsLists

    lists = LogprobsLists(
        np.array([[7 + i for i in range(len(row))] for row in rows]),
        np.array(rows, np.float32),
        np.ones(len(rows), np.int64),
        None,
    )
    return SimpleNamespace(
        new_logprobs=lists, new_prompt_logprobs_tensors=None, prompt_token_id_logprobs=None
    )


def test_the_sum_is_that_of_the_sampled_tokens() -> None:
    from decode_server.logprobs import lighten

    light = state(0)
    lighten(light, sum_only=True)
    for output in (step([-0.5]), step([-0.25], [-1.0])):
        light.logprobs_processor.update_from_output(output)
    assert light.logprobs_processor.cumulative_logprob == -1.75
    assert light.logprobs_processor.logprobs == []


def test_candidates_stay_without_their_text() -> None:
    from decode_server.logprobs import lighten

    light = state(2)
    lighten(light, sum_only=False)
    light.logprobs_processor.update_from_output(step([-0.5, -0.25, -2.0]))
    processor = light.logprobs_processor
    assert processor.cumulative_logprob == -0.5
    assert [{t: one.logprob for t, one in p.items()} for p in processor.logprobs] == [
        {7: -0.5, 8: -0.25, 9: -2.0}
    ]
    assert all(one.decoded_token is None for one in processor.logprobs[0].values())


def test_where_none_were_asked_for_nothing_changes() -> None:
    from decode_server.logprobs import lighten

    untouched = state(None)
    before = untouched.logprobs_processor
    lighten(untouched, sum_only=True)
    assert untouched.logprobs_processor is before
    lighten(SimpleNamespace(logprobs_processor=None), sum_only=True)
