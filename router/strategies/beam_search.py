"""Beam search over tokens: the most probable text that a search of some width finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from braid.errors import BadRequest
from router.sampler import Answer, Progress, Sampler
from router.strategies.collect import Run, conclude
from router.strategies.confidence import as_asked, with_top
from router.strategies.continuation import limit_of
from router.strategies.options import Options
from router.strategies.scored import finite

_IGNORED = (
    *(
        "stop",
        "stop_token_ids",
        "bad_words",
        "allowed_token_ids",
        "logit_bias",
        "min_tokens",
        "echo",
        "tools",
    ),
    *("response_format", "structured_outputs", "presence_penalty", "frequency_penalty"),
)
"""What the engine's search would pass over without a word."""


class BeamSearchOptions(Options):
    """Options of ``beam_search``."""

    n: int = Field(4, ge=1, le=10)
    """Beams. The engine ranks twice as many tokens a step, and by default gives no more than 20."""
    tokens: int = Field(256, ge=1, le=32768)
    """The most tokens of a beam where the request has no `max_tokens`. The engine's search always runs this
    long, since an unfinished beam might still win."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: BeamSearchOptions, progress: Progress
) -> Answer:
    """The beam with the highest sum of log-probabilities: maximum a posteriori decoding, as far as a search
    of this width finds it.

    The engine's own search (vLLM's ``use_beam_search``) on one decode worker, deterministic; beam search in
    neural decoders is told by Wu et al. 2016 (arXiv 1609.08144). To the router it is one sample, whose tokens
    are those of all beams. The request's field ``length_penalty`` (0 here) divides the sum by the length of
    prompt and text to this power. Stop strings, grammars, penalties and token masks have no effect in the
    engine's search and are refused. At a bound there is no answer: beams are known when the search ends.
    """
    for field in _IGNORED:
        if body.get(field):
            raise BadRequest(f"beam_search can't take {field} into account: leave it out", param=field)
    limit = limit_of(body) or options.tokens
    extra = {**(body.get("vllm_xargs") or {}), "beam_width": options.n}
    asked = {**with_top(body, 0), "use_beam_search": True, "vllm_xargs": extra, "temperature": 0}
    asked["length_penalty"] = body.get("length_penalty") or 0.0
    asked = {key: value for key, value in asked.items() if key != "max_completion_tokens"}
    run = Run(sampler, options, progress)
    drawn = await run.draw({**asked, "max_tokens": limit}, 1)
    run.fail_unless_finished()
    choice = as_asked(drawn[0].sample.choice, body)
    beams = [{**one, "logprob": _rounded(one.get("logprob"))} for one in choice.pop("beams", None) or ()]
    if not options.return_samples:
        beams = [{key: value for key, value in one.items() if key != "text"} for one in beams]
    chosen = replace(drawn[0], sample=replace(drawn[0].sample, choice=choice))
    return await conclude("beam_search", run, chosen, beams=beams)


def _rounded(value: float | None) -> float | None:
    return None if value is None else finite(value)
