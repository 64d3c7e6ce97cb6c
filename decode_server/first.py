"""The first token of a sample, where the prefill worker has drawn it.

A prefill engine draws a token behind the prompt in any case. Where a request has one sample, that token is
its first: the decode engine then goes on behind it, with a step less to compute, and the client has it
before that engine has scheduled anything. It counts only once the prompt's KV is in the decode worker's
cache and the sample has its seat; what happens to the stream after that is what happens to any stream.

Whether it is taken never depends on which token it is: what is thrown away for its value and drawn again has
another distribution.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import IterationStats

from braid.worker.shape import shape_of
from braid.worker.told import Told
from decode_server.metrics import FIRST

_FREE = frozenset(
    {"n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "ignore_eos", "detokenize"}
    | {"stop", "stop_token_ids", "include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone"}
    | {"skip_special_tokens", "spaces_between_special_tokens", "output_text_buffer_length", "extra_args"}
    | {"flat_logprobs", "watermarking", "_eos_token_id", "_all_stop_token_ids", "_watermarking_skipped"}
)
"""Fields of sampling parameters that may have any value: they shape no token, or a prefill worker knows them
too, or they are looked at here. Of the others a request has the defaults, or draws its first token here."""
_PLAIN = SamplingParams()
_FIXED = [
    (f.name, getattr(_PLAIN, f.name)) for f in msgspec.structs.fields(SamplingParams) if f.name not in _FREE
]


class First(Told):
    """The token that the prefill worker of a dispatch draws.

    Args:
        roomy: whether the engine goes on at once with what it is given: a stream that has begun is cut if it
            is silent for long, and can't move to another worker.
    """

    def __init__(self, roomy: Callable[[], bool]) -> None:
        super().__init__()
        self._roomy = roomy

    async def of(self, params: SamplingParams) -> int | None:
        """The token if a sample of these parameters begins with it; waits for it."""
        if not drawable(params):
            return None
        first = await self.wait()
        if first is None:
            outcome = "late"
        elif first.shape != shape_of(params):
            outcome = "unlike"
        else:
            outcome = "taken" if self._roomy() else "full"
        FIRST.labels(outcome).inc()
        return first.token if first is not None and outcome == "taken" else None


def drawable(params: SamplingParams) -> bool:
    """Whether a first token drawn elsewhere is as good as one drawn here.

    It is not where more than temperature, ``top_p``, ``top_k`` and ``min_p`` shapes it, where its
    log-probability is wanted, and where a seed says which it is.
    """
    greedy = params.sampling_type == SamplingType.GREEDY
    if params.watermarking or set(params.extra_args or ()) - {"kv_transfer_params"}:
        return False
    if not greedy and params.seed is not None:
        return False
    return all(_same(getattr(params, name), default) for name, default in _FIXED)


def _same(value: Any, default: Any) -> bool:
    return value is default or (value is not None and default is not None and value == default)


def end_of(params: SamplingParams, token: int) -> tuple[FinishReason | None, int | None]:
    """Why a sample ends with its first token, and vLLM's ``stop_reason``; None where it goes on."""
    if token == params.eos_token_id:
        return FinishReason.STOP, None
    if token in (params.stop_token_ids or ()):
        return FinishReason.STOP, token
    return (FinishReason.LENGTH if params.max_tokens == 1 else None), None


def following(request: EngineCoreRequest, token: int) -> EngineCoreRequest:
    """What the engine is to compute of a request whose first token is there."""
    rest, params = copy.copy(request), copy.copy(request.sampling_params)
    assert params is not None
    assert params.max_tokens is not None
    assert rest.prompt_token_ids is not None
    params.max_tokens -= 1
    rest.sampling_params, rest.prompt_token_ids = params, [*rest.prompt_token_ids, token]
    return rest


def begin(processor: Any, request: EngineCoreRequest, token: int) -> bool:
    """Pass the token on as the first output of a request that ``processor`` (vLLM's OutputProcessor) knows.

    Returns whether the sample goes on. vLLM's metrics of this engine begin with its own first token; the one
    that the prefill engine drew is among that engine's.
    """
    assert request.sampling_params is not None
    reason, stop = end_of(request.sampling_params, token)
    output = EngineCoreOutput(request.request_id, [token], finish_reason=reason, stop_reason=stop)
    stats = IterationStats() if processor.log_stats else None
    processor.process_outputs([output], time.monotonic(), stats)
    state = processor.request_states.get(request.request_id)
    if state is None:  # that was all, or it has completed a stop string
        return False
    state.is_prefilling = True
    if state.stats is not None:
        state.stats.num_generation_tokens = 0
    return True
