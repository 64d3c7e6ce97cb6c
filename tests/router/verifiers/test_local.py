"""Verifiers that ask nobody."""

from __future__ import annotations

import math

import pytest

from router.strategies.scored import Scored
from router.verifiers.base import Check, Critic, check
from router.verifiers.local import ArithmeticVerifier, LogprobVerifier
from tests.router.strategies.scripted import Scripted, sample
from tests.router.verifiers.chains import CHAT, run_of, scores


async def test_the_score_is_the_share_of_right_equations() -> None:
    texts = ["1+1=2. 2+2=5. 3+3=6. 4+4=8.", "1+1=3.", "nothing", "<think>1+1=3</think>1+1=2"]
    assert await scores(ArithmeticVerifier(), texts) == [0.75, 0.0, None, 1.0]


async def test_the_reason_names_what_is_wrong() -> None:
    samples = [Scored(sample(0, "12*34=409. 409+1=410. 5/4 = 1.3")), Scored(sample(1, "1+1=2"))]
    told = await check(ArithmeticVerifier(), run_of(Scripted([sample(0)])), CHAT, samples)
    assert told[0].score == pytest.approx(1 / 3)
    assert told[0].feedback == "12*34 = 408, not 409.\n5/4 = 1.25, not 1.3."
    assert told[1] == Check(1.0, "")


async def test_logprob_is_the_mean_probability_of_a_token() -> None:
    samples = [
        Scored(sample(0, "a", logprob=-2.0, tokens=4)),
        Scored(sample(1, "b", logprob=None)),
        Scored(sample(2, "c", logprob=0.1, tokens=1)),
        Scored(sample(3, "d", logprob=-1.0, tokens=0)),
    ]
    told = await LogprobVerifier().score(run_of(Scripted([sample(0)])), CHAT, samples)
    assert told == [pytest.approx(math.exp(-0.5)), None, 1.0, None]


async def test_a_verifier_without_reasons_gives_none() -> None:
    assert not isinstance(LogprobVerifier(), Critic)
    told = await check(
        LogprobVerifier(), run_of(Scripted([sample(0)])), CHAT, [Scored(sample(0, "a", logprob=-10.0))]
    )
    assert [one.score for one in told] == [pytest.approx(math.exp(-1))]
    assert [one.feedback for one in told] == [""]
