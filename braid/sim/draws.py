"""What simulated samples say: deterministic text, length, answer and log-probabilities.

A sample is a function of prompt, seed and its number in the group alone, so it is the same on whatever worker
it runs. Votes over samples mean something: each has the right answer with probability ``accuracy``, else one
of ``answers`` wrong ones, likely ones first, and those that are right are more confident. A sample that
is cut, or that ``ignore_eos`` makes go on, has no answer: the answer stands at the end.

A prompt may say ``[sim answer=42 accuracy=0.7 tokens=200]``, any of these, to set its right answer and to
override the worker's :class:`Profile`. Without it the right answer is drawn from the prompt's hash.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence

import msgspec

from braid.sim.tokens import PIECE, Prompt, pieces, token_id

_HINT = re.compile(r"\[sim((?:\s+[a-z]+=-?[0-9.]+)+)\s*\]")
_FILLER = (
    "We read what is given and write it down. We look for what is asked.\n\n"
    "We take one number after another and put them together. We check the sign.\n\n"
    "We look at the parts again, since it is easy to miss one of them.\n\n"
    "We add what belongs together and leave out what does not. So we go on.\n\n"
)


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How samples are distributed.

    Attributes:
        tokens: median length; lengths are lognormal with ``sigma``.
        accuracy: probability of the right answer; ``answers`` wrong ones share the rest as 1, 1/2, 1/3...
        right, wrong: mean log-probability of a token of a sample with the right and with a wrong answer.
    """

    tokens: float = 48.0
    sigma: float = 0.4
    accuracy: float = 0.6
    answers: int = 4
    right: float = -0.15
    wrong: float = -0.35


class Draw:
    """One sample as it will come out, if nothing stops it.

    Attributes:
        text: all of it; ``tokens`` of :data:`~braid.sim.tokens.PIECE` characters each.
        finish: ``stop`` or ``length``.
        answer: its answer, None if it was cut before it.
    """

    __slots__ = ("_key", "_mean", "_pieces", "answer", "finish", "text", "tokens")

    def __init__(
        self, text: str, tokens: int, finish: str, answer: int | None, key: int, mean: float
    ) -> None:
        self.text = text
        self.tokens = tokens
        self.finish = finish
        self.answer = answer
        self._key = key
        self._mean = mean
        self._pieces: list[str] | None = None

    def piece(self, i: int) -> str:
        """Text of token ``i``; empty for the tokens of a stop string, which is not shown."""
        return self.text[i * PIECE : (i + 1) * PIECE]

    def said(self, count: int) -> str:
        """Text of the first ``count`` tokens."""
        return self.text[: count * PIECE]

    def ids(self, count: int) -> list[int]:
        """Ids of the first ``count`` tokens."""
        if self._pieces is None:
            cut = pieces(self.text)
            self._pieces = cut + [""] * (self.tokens - len(cut))
        return [token_id(piece) for piece in self._pieces[:count]]

    def logprob(self, i: int) -> float:
        """Natural log-probability of token ``i``, spread around the sample's mean."""
        return self._mean * (0.5 + ((self._key >> (i * 7 % 53)) & 0x7F) / 127)

    def cumulative(self, count: int) -> float:
        """Sum over the first ``count`` tokens."""
        return math.fsum(self.logprob(i) for i in range(count))

    def top(self, i: int, count: int) -> list[tuple[str, float]]:
        """The ``count`` likeliest tokens at place ``i``: the sampled one, and made-up others that halve what
        probability it leaves."""
        rest = math.log(max(1e-9, 1 - math.exp(self.logprob(i))))
        others = [(f"~{k}", rest - (k + 1) * math.log(2)) for k in range(count - 1)]
        return sorted([(self.piece(i), self.logprob(i)), *others], key=lambda pair: -pair[1])[:count]

    def ended_at(self, count: int) -> Draw:
        """The sample as it is when it is aborted after ``count`` tokens."""
        return Draw(self.said(count), count, "abort", None, self._key, self._mean)


class Limits(msgspec.Struct, frozen=True):
    """What a request says about length. ``most`` and ``least``: tokens; ``stops``: strings that end a
    sample and are not part of it; ``ignore_eos``: go on to ``most``."""

    most: int
    least: int = 0
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False


def draw(prompt: Prompt, profile: Profile, limits: Limits, seed: int | None, number: int) -> Draw:
    """Sample ``number`` of a prompt. Greedy ones are number 0 without a seed."""
    digest = prompt.digest
    hints = _hints(prompt.text)
    key = int.from_bytes(hashlib.blake2b(digest + f"{seed}:{number}".encode(), digest_size=8).digest())
    rng = random.Random(key)
    right = int(hints.get("answer", 100 + int.from_bytes(digest[:4]) % 900))
    is_right = rng.random() < hints.get("accuracy", profile.accuracy)
    answer = right if is_right or not profile.answers else _wrong(rng, right, profile.answers)
    length = rng.lognormvariate(math.log(max(1.0, hints.get("tokens", profile.tokens))), profile.sigma)
    ending = f" The answer is {answer}."
    tokens = max(round(length), limits.least, -(-len(ending) // PIECE))
    mean = profile.right if answer == right else profile.wrong
    if tokens > limits.most or limits.ignore_eos:
        said = Draw(_filler(key, limits.most * PIECE), limits.most, "length", None, key, mean)
    else:
        text = _filler(key, tokens * PIECE - len(ending)) + ending
        said = Draw(text, tokens, "stop", answer, key, mean)
    return _stopped(said, limits, key, mean)


def _filler(key: int, characters: int) -> str:
    start = key % len(_FILLER)
    return (_FILLER * (2 + characters // len(_FILLER)))[start : start + characters]


def _stopped(said: Draw, limits: Limits, key: int, mean: float) -> Draw:
    """A sample up to its first stop string."""
    found = _stop(said.text, limits)
    if found is None:
        return said
    at, end = found
    return Draw(said.text[:at], -(-end // PIECE), "stop", None, key, mean)


def _stop(text: str, limits: Limits) -> tuple[int, int] | None:
    """Where the first stop string begins, and where it ends."""
    least = limits.least * PIECE
    found = [(text.find(stop, least), stop) for stop in limits.stops]
    places = [(at, at + len(stop)) for at, stop in found if at >= 0]
    return min(places, key=lambda place: place[1]) if places else None


def _wrong(rng: random.Random, right: int, answers: int) -> int:
    weights = [1 / (i + 1) for i in range(answers)]
    return right + 1 + rng.choices(range(answers), weights)[0]


def _hints(text: str) -> dict[str, float]:
    match = _HINT.search(text)
    if match is None:
        return {}
    pairs: Sequence[Sequence[str]] = [item.split("=") for item in match.group(1).split()]
    try:
        return {name: float(value) for name, value in pairs}
    except ValueError:
        return {}
