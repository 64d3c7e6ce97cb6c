"""Universal self-consistency: the model itself picks the answer that agrees most with the others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from braid.thinking import without_thinking
from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import Run, collect, conclude
from router.strategies.options import ManyOptions
from router.strategies.prompt import in_prose, sampled, with_trigger
from router.strategies.scored import Scored
from router.strategies.utility import expected

INSTRUCTION = (
    "Evaluate these responses. Select the most consistent response based on majority consensus. "
    'Start your answer with "The most consistent response is Response X" (without quotes).'
)
_PICK = re.compile(r"most\s+consistent\s+response\s+is\W{0,8}(?:response\W{0,8})?([0-9]{1,4})\b", re.I)
_BARE = re.compile(r"\W*(?:response\W{0,8})?([0-9]{1,4})\W*", re.I)


class UniversalConsistencyOptions(ManyOptions):
    """Options of ``universal_consistency``."""

    n: int = Field(8, ge=1, le=64)
    """Samples of the prompt: the call that picks reads them all."""
    instruction: str = Field(INSTRUCTION, min_length=1, max_length=4000)
    """How the model is asked to pick, after the responses."""


def candidates(texts: Sequence[str], instruction: str) -> str:
    """What follows the question in the call that picks; responses are numbered from 1."""
    listed = "\n\n".join(f"Response {number}: {text}" for number, text in enumerate(texts, 1))
    intro = "I have generated the following responses to the question above."
    return f"\n{intro}\n\n{listed}\n\n{instruction}"


def picked(text: str, count: int) -> int | None:
    """The number, 1 to ``count``, that a picking text names; None if it names none."""
    text = without_thinking(text)
    found = _PICK.search(text) or _BARE.fullmatch(text.strip())
    return int(found[1]) if found and 1 <= int(found[1]) <= count else None


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: UniversalConsistencyOptions, progress: Progress
) -> Answer:
    """One more call reads the N samples and names the most consistent; the medoid if it names none.

    Chen et al. 2023, "Universal Self-Consistency for Large Language Model Generation" (arXiv 2311.17311):
    works for answers that can't be compared by form. The call is greedy, and its tokens count. The medoid
    is the sample with the highest mean token F1 to all; it also decides where a bound leaves no call.
    """
    got = await collect(sampler, sampled(body, options), options, progress)
    responses = got.finished
    texts = [without_thinking(one.sample.text).strip() for one in responses]
    number = await _ask(got, body, texts, options) if len(texts) > 1 else 1
    chosen = responses[number - 1] if number else await _medoid(responses, texts)
    by = "model" if number else "medoid"
    return await conclude("universal_consistency", got, chosen, selected_by=by if len(texts) > 1 else "only")


async def _ask(
    got: Run, body: Mapping[str, Any], texts: Sequence[str], options: UniversalConsistencyOptions
) -> int | None:
    question = with_trigger(in_prose(body), candidates(texts, options.instruction))
    said = await got.draw({**question, "temperature": 0}, 1, role="selection")
    return picked(said[0].sample.text, len(texts)) if said else None


async def _medoid(responses: Sequence[Scored], texts: Sequence[str]) -> Scored:
    means = await expected(texts, "token_f1")
    return responses[max(range(len(texts)), key=lambda place: (means[place], -place))]
