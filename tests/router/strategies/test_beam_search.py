"""The engine's beam search as a strategy: one sample that is the best of its beams."""

from __future__ import annotations

from typing import Any

import pytest

from braid.errors import BadRequest, DeadlineExceeded
from router import strategies
from tests.router.strategies.scripted import Scripted, ask, sample
from tests.router.strategies.stepping import chose

CHAT = {"messages": [{"role": "user", "content": "2+2?"}]}
BEAMS = [
    {"text": "The answer is 4.", "logprob": -0.12345678, "tokens": 5, "finish_reason": "stop"},
    {"text": "5", "logprob": None, "tokens": 1, "finish_reason": "length"},
]


def found() -> Scripted:
    return Scripted([chose(sample(0, "The answer is 4.", None, 40), beams=BEAMS, logprobs={"content": []})])


async def test_a_search_is_one_sample_of_the_engine_s() -> None:
    sampler = found()
    got, _ = await ask("beam_search", sampler, {**CHAT, "max_completion_tokens": 50}, n=3)
    ((sent, n),) = sampler.opened
    assert (n, sent["use_beam_search"], sent["vllm_xargs"], sent["temperature"]) == (
        1,
        True,
        {"beam_width": 3},
        0,
    )
    assert (sent["max_tokens"], sent["logprobs"], sent["length_penalty"]) == (50, True, 0.0)
    assert "max_completion_tokens" not in sent
    assert (got.report["answer"], got.report["tokens"]) == ("4", 40)
    assert got.report["beams"][0] == {"logprob": -0.123457, "tokens": 5, "finish_reason": "stop"}
    assert "beams" not in got.choice
    assert got.choice["logprobs"] is None


async def test_texts_of_beams_are_told_if_asked_for() -> None:
    got, _ = await ask("beam_search", found(), n=2, return_samples=True)
    assert [one["text"] for one in got.report["beams"]] == ["The answer is 4.", "5"]


async def test_a_request_without_a_limit_has_that_of_the_option() -> None:
    sampler = found()
    await ask("beam_search", sampler, n=2, tokens=64)
    assert sampler.opened[0][0]["max_tokens"] == 64


@pytest.mark.parametrize("field", ["stop", "response_format", "logit_bias", "frequency_penalty", "tools"])
async def test_what_the_search_would_ignore_is_refused(field: str) -> None:
    body: dict[str, Any] = {**CHAT, field: 1}
    with pytest.raises(BadRequest) as caught:
        await ask("beam_search", found(), body, n=2)
    assert caught.value.param == field


async def test_a_search_past_its_deadline_has_no_answer() -> None:
    with pytest.raises(DeadlineExceeded):
        await ask("beam_search", Scripted([sample(0)], hang_from=0), n=2, deadline_s=0.02)


def test_a_search_takes_a_slot_a_beam() -> None:
    assert strategies.get("beam_search").parse({"n": 6}).slots == 6
