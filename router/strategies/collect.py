"""The usual ways through a run: one group, or waves of it, and the answer with its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from router.sampler import Answer, Progress, Sampler
from router.strategies.options import Options
from router.strategies.run import Run, Settled, Standing
from router.strategies.scored import Scored, most_confident


async def collect(
    sampler: Sampler,
    body: Mapping[str, Any],
    options: Options,
    progress: Progress,
    standing: Standing | None = None,
    settled: Settled | None = None,
) -> Run:
    """Draw ``options.n`` samples of ``body`` as one group, inside the options' bounds.

    Returns with every sample ended and the group closed; at least one has finished.

    Raises:
        BadRequest: the caller's pattern is refused.
        DeadlineExceeded: no sample finished in time.
        UpstreamFailed: every sample failed, or one did under ``on_failure: all``.
    """
    run = Run(sampler, options, progress, standing)
    await run.draw(body, options.n, settled=settled)
    run.fail_unless_finished()
    return run


async def collect_waves(
    run: Run,
    body: Mapping[str, Any],
    size: Callable[[int], int],
    between: Settled,
    within: Settled | None = None,
) -> Run:
    """Draw waves of ``body``, never more than ``run.n`` samples in all; returns and raises as
    :func:`collect`.

    Args:
        size: of the k-th wave, k from 0; cut to what is left of ``n``.
        between: asked after each whole wave; a reason ends the run.
        within: asked after each sample; a reason cancels the wave. It must not depend on which samples end
            first: :meth:`Run.prefix` is safe, and so is an outcome that no sample can change.
    """
    wave = 0
    while run.stopped is None and run.drawn < run.n:
        await run.draw(body, min(max(1, size(wave)), run.n - run.drawn), settled=within)
        wave += 1
        if run.stopped is None and run.drawn < run.n:
            run.stopped = between(run)
    run.fail_unless_finished()
    return run


async def conclude(name: str, run: Run, chosen: Scored, **fields: Any) -> Answer:
    """The answer that returns ``chosen``, told to a streaming client too. ``fields`` go into the report
    (``answer`` and ``votes`` unless they are the chosen sample's own)."""
    usages = run.usages
    report: dict[str, Any] = {
        "strategy": name,
        "n": run.n,
        "samples": [scored.report(run.options.return_samples) for scored in run.in_order()],
        "votes": [],
        "answer": chosen.answer,
        "chosen": chosen.sample.index,
        "confidence": None,
        "stopped_early": run.stopped,
        "samples_cancelled": sum(scored.sample.state == "stopped_early" for scored in run.ended),
        "tokens": sum(usage.completion_tokens for usage in usages),
        **fields,
    }
    told = ("answer", "confidence", "stopped_early", "samples_cancelled")
    await run.progress({"event": "decided", **{key: report[key] for key in told}})
    return Answer({**chosen.sample.choice, "index": 0}, report, usages, chosen.sample.tokens)


__all__ = ["Run", "Scored", "collect", "collect_waves", "conclude", "most_confident"]
