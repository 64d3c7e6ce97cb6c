"""DeepConf: only samples whose least confident stretch is confident enough vote, by their confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from braid.wire import Watch
from router.sampler import Answer, Progress, Sampler
from router.strategies.ballots import conclude_vote
from router.strategies.collect import Run
from router.strategies.confidence import MAX_TOP, Measure, as_asked, with_top
from router.strategies.confident import Judge
from router.strategies.options import ManyOptions
from router.strategies.prompt import sampled


class DeepconfOptions(ManyOptions):
    """Options of ``deepconf``."""

    n: int = Field(32, ge=1, le=1024)
    """The most samples."""
    warmup: int = Field(16, ge=1, le=1024)
    """Samples of the first wave, which set the threshold."""
    wave: int = Field(8, ge=1, le=128)
    """Samples of each later wave."""
    filter: Literal["low", "high"] = "low"
    """`low` (fewer tokens) lets the most confident 10 % of the warm-up vote, `high` all but the least
    confident 10 %."""
    measure: Measure = "lowest_group"
    """A sample's confidence: of its least confident group of tokens, the mean of its lowest 10 % of groups,
    of its last `window` tokens, or of all."""
    window: int = Field(2048, ge=1, le=32768)
    """Tokens of a group (W)."""
    top: int = Field(MAX_TOP, ge=1, le=MAX_TOP)
    """Log-probabilities of a position that make up a token's confidence (k)."""
    tau: float = Field(0.95, gt=0, le=1)
    """Stopping level: the winner's share of the confidence of all samples with an answer, also of those
    under the threshold: the few over it may well agree by chance."""

    @property
    def slots(self) -> int:
        """The largest wave; all samples at once without `early_stop`."""
        return min(self.n, max(self.warmup, self.wave)) if self.early_stop else self.n


async def run(
    sampler: Sampler, body: Mapping[str, Any], options: DeepconfOptions, progress: Progress
) -> Answer:
    """Votes weighted by confidence, of the samples over a percentile of the warm-up's confidence; waves are
    drawn until one answer has ``tau`` of the confidence of all samples.

    Fu et al. 2025, "Deep Think with Confidence" (arXiv 2508.15260): C_t = -(1/k) sum of the k largest log
    P_t(j), a group's confidence C_G is the mean over W tokens. With ``measure`` ``lowest_group`` the decode
    workers measure, and end a sample of a later wave once its C_G is below the threshold; other measures
    need the log-probabilities sent, and all samples run to their end. Without ``early_stop`` this is the
    offline form: all n are drawn and none is ended, and the percentile is of all.
    """
    run, judge, online = Run(sampler, options, progress), Judge(options), options.measure == "lowest_group"
    prompt = sampled(body, options) if online else with_top(sampled(body, options), options.top)
    while run.stopped is None and run.drawn < run.n:
        least = judge.threshold(run) if run.finished else None
        watch = Watch(options.window, options.top, least) if online else None
        size = options.wave if run.drawn else options.warmup if options.early_stop else options.n
        await run.draw(prompt, min(size, run.n - run.drawn), watch=watch)
        if options.early_stop and judge.consensus(run) >= options.tau and run.drawn < run.n:
            run.stopped = run.stopped or "agreed"
    run.fail_unless_finished()
    answer = await conclude_vote("deepconf", run, judge.votes(run), **judge.report(run))
    return replace(answer, choice=as_asked(answer.choice, body))
