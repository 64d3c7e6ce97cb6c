"""The verdict of a sample, measured where its log-probabilities are."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from braid import wire
from decode_server.pieces import Pieces
from decode_server.verdicts import probability as probability_of

VERDICT = wire.Verdict(("yes",), ("no",), 20)


TEXTS: dict[int, str] = {}
"""What the tokens of the completions below spell."""
PIECES = Pieces(TEXTS.__getitem__, lambda tokens: "".join(TEXTS[token] for token in tokens))


def probability(said: Any, verdict: wire.Verdict) -> float | None:
    return probability_of(said, verdict, PIECES)


def completion(*said: tuple[str, dict[str, float]], finish: str = "stop", logprobs: bool = True) -> Any:
    """Tokens with the probabilities of the candidates in their places."""
    for token in {t for own, c in said for t in (own, *c)}:
        if token not in TEXTS.values():
            TEXTS[len(TEXTS)] = token
    ids = {text: token for token, text in TEXTS.items()}
    tops = [
        {ids[t]: SimpleNamespace(decoded_token=None, logprob=math.log(p)) for t, p in candidates.items()}
        for _, candidates in said
    ]
    return SimpleNamespace(
        text="".join(token for token, _ in said),
        token_ids=[ids[token] for token, _ in said],
        logprobs=tops if logprobs else None,
        finish_reason=finish,
    )


MARK = ("Verification:", {"Verification:": 0.9})


def test_all_that_begins_a_yes_counts() -> None:
    said = completion(MARK, (" Yes", {" Yes": 0.5, " yes": 0.2, " No": 0.3}), ("\n", {"\n": 1.0}))
    assert probability(said, VERDICT) == pytest.approx(0.7)


def test_it_is_of_the_place_not_of_the_token_that_was_drawn() -> None:
    assert probability(completion(MARK, (" No", {" Yes": 0.8, " No": 0.2})), VERDICT) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "said",
    [
        completion(("well", {"well": 1.0})),
        completion(MARK, (" Yes", {" Yes": 0.5}), logprobs=False),
        completion(("yes", {"yes": 0.5}), finish="length"),
    ],
)
def test_without_a_verdict_it_is_unknown(said: Any) -> None:
    assert probability(said, VERDICT) is None
