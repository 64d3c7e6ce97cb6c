"""Log-probabilities that only the worker reads: nobody is told their tokens, so they are not spelled out.

vLLM makes text of every candidate of every token as it comes, which takes the front of a worker longer than
all else that it does for a sample.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists


class SumOnly(LogprobsProcessor):  # type: ignore[misc]
    """Keeps the sum over the sampled tokens, and no candidates."""

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        assert self.cumulative_logprob is not None
        for row in logprobs_lists[1]:
            self.cumulative_logprob += float(row[0])  # the sampled token is first


def lighten(state: Any, sum_only: bool) -> None:
    """Have vLLM's ``RequestState`` keep of its samples' log-probabilities their sum only, or the candidates
    without their text. Nothing if none were asked for."""
    processor: LogprobsProcessor | None = state.logprobs_processor
    if processor is None or processor.num_logprobs is None:
        return
    processor.tokenizer = None
    if sum_only:
        fields = {field.name: getattr(processor, field.name) for field in dataclasses.fields(processor)}
        state.logprobs_processor = SumOnly(**fields)
