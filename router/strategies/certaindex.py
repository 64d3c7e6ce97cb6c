"""Certaindex: reasoning is probed for its answer as it goes, and ends once the answer no longer changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from router.sampler import Answer, Progress, Sample, Sampler
from router.strategies.collect import Run, conclude
from router.strategies.continuation import (
    NOTHING,
    check_continuable,
    check_not_thinking,
    extended,
    joined,
    limit_of,
)
from router.strategies.options import ReasonedOptions, SingleOptions
from router.strategies.prompt import reasoned
from router.strategies.scored import Scored, score

HEDGES = ("wait", "hold", "but", "okay", "no", "hmm")


class CertaindexOptions(SingleOptions, ReasonedOptions):
    """Options of ``certaindex``."""

    every: int = Field(64, ge=1, le=32768)
    """Tokens between two probes (c)."""
    agree: int = Field(3, ge=1, le=64)
    """So many equal answers of the last probes end it (m)."""
    probe: str = Field("\n\nThe answer is", min_length=1, max_length=2000)
    """What follows the reasoning so far to have the answer now."""
    probe_tokens: int = Field(24, ge=1, le=1024)
    """The most tokens of a probe's answer; a line's end ends it too."""
    hedges: tuple[str, ...] = Field(HEDGES, max_length=100)
    """A probe with one of these words is no certain answer."""


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: CertaindexOptions, progress: Progress
) -> Answer:
    """One chain of thought in chunks of ``every`` tokens, each followed by a probe that asks for the answer
    now; it ends when the last ``agree`` probes give equal answers without hedging, or by itself.

    Fu et al. 2024, "Efficiently Serving LLM Reasoning Programs with Certaindex" (arXiv 2412.20993), with the
    stopping rule of their Dynasor-CoT. A probe is greedy and is no part of the chain; the last one ends the
    text that is returned. At a bound, and at the request's ``max_tokens``, the last probe answers.
    """
    check_continuable(body)
    question, most = reasoned(body, options), limit_of(body)
    run = Run(sampler, options, progress)
    chain, last, probes = NOTHING, None, list[Scored]()
    while run.stopped is None and chain.tokens != most:
        left = options.every if most is None else min(options.every, most - chain.tokens)
        chunk = extended(question, chain.text, left, chain.tokens)
        drawn = await run.draw(chunk, 1, role="chain", keep=True, after=last)
        run.fail_unless_finished()
        if not drawn:
            break
        last = drawn[0].sample
        check_not_thinking(last)
        chain = joined(chain, last, chain.text + last.text)
        if run.stopped is None and (last.finish_reason != "length" or last.tokens < left):
            return await _conclude(run, chain, probes, ended=True)
        asked = extended(question, chain.text + options.probe, options.probe_tokens)
        greedy = {**asked, "temperature": 0, "stop": ["\n"], "min_tokens": 0}
        said = await run.draw(greedy, 1, role="probe", after=last)
        if not said:
            break
        text = chain.text + options.probe + said[0].sample.text
        probes.append(await score(joined(chain, said[0].sample, text), options, run.left_s, "probe"))
        if options.early_stop and certain(probes, options):
            run.stopped = run.stopped or "certain"
    return await _conclude(run, chain, probes, ended=False)


def certain(probes: Sequence[Scored], options: CertaindexOptions) -> bool:
    """Whether the last ``agree`` probes give the same answer, none of them hedging."""
    last = probes[-options.agree :]
    return (
        len(last) == options.agree
        and last[0].key is not None
        and all(one.key == last[0].key and not hedged(one.sample.text, options) for one in last)
    )


def hedged(text: str, options: CertaindexOptions) -> bool:
    """Whether a probe's text, from the last probe on, has a word of doubt."""
    said = text.rpartition(options.probe)[2].casefold()
    return any(re.search(rf"\b{re.escape(word.casefold())}\b", said) for word in options.hedges)


async def _conclude(run: Run, chain: Sample, probes: Sequence[Scored], ended: bool) -> Answer:
    """The chain if it has ended or no probe found an answer, else the last probe that did."""
    answered = [one for one in probes if one.key is not None]
    whole = await score(chain, run.options, run.left_s, "chain")
    chosen = whole if ended or not answered else answered[-1]
    told = [{"index": one.sample.index, "answer": one.answer} for one in probes]
    return await conclude("certaindex", run, chosen, probes=told)
