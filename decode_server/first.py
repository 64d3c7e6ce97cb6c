"""The first token of a sample, where the prefill worker has drawn it.

A prefill engine draws a token behind the prompt in any case. Where a request has one sample, that token is
its first: the decode engine then goes on behind it, with a step less to compute, and the client has it
before that engine has scheduled anything. It counts only once the prompt's KV is in the decode worker's
cache and the sample has its seat; what happens to the stream after that is what happens to any stream.
"""

from __future__ import annotations

import asyncio
import copy
import time
from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.metrics.stats import IterationStats

WAIT_S = 0.03
"""How long a sample whose KV has come waits for the token: twice what drawing it here takes."""

_FREE = frozenset(
    {"n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "ignore_eos", "detokenize"}
    | {"stop", "stop_token_ids", "include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone"}
    | {"skip_special_tokens", "spaces_between_special_tokens", "output_text_buffer_length", "extra_args"}
    | {"flat_logprobs", "watermarking", "_eos_token_id", "_all_stop_token_ids", "_watermarking_skipped"}
)
"""Fields of sampling parameters that may have any value: a first token is drawn without them, or by a prefill
worker as here. Of the others a request has the defaults, or draws its first token here."""
_PLAIN = SamplingParams()
_FIXED = [
    (f.name, getattr(_PLAIN, f.name)) for f in msgspec.structs.fields(SamplingParams) if f.name not in _FREE
]


class First:
    """The token that the prefill worker of a dispatch draws."""

    def __init__(self) -> None:
        self._told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def tell(self, token: int) -> None:
        """It has been drawn. Idempotent."""
        if not self._told.done():
            self._told.set_result(token)

    async def wait(self) -> int | None:
        """The token, or None if it did not come in time."""
        if not self._told.done():
            await asyncio.wait([self._told], timeout=WAIT_S)
        return self._told.result() if self._told.done() else None


def drawable(params: SamplingParams) -> bool:
    """Whether a first token drawn elsewhere is as good as one drawn here.

    It is not where more than temperature, ``top_p``, ``top_k`` and ``min_p`` shapes it, where its
    log-probability is wanted, where a seed says which it is, and where it is the only one.
    """
    greedy = params.sampling_type == SamplingType.GREEDY
    if params.watermarking or set(params.extra_args or ()) - {"kv_transfer_params"}:
        return False
    if not greedy and params.seed is not None:
        return False
    if params.max_tokens is not None and params.max_tokens < 2:
        return False
    return all(getattr(params, name) == default for name, default in _FIXED)


def ends(params: SamplingParams, token: int) -> bool:
    """Whether a sample ends with this token: an end that the engine has to find."""
    return token == params.eos_token_id or token in (params.stop_token_ids or ())


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
    """Pass the token on as the first output of a request that ``processor`` (vLLM's OutputProcessor) knows;
    False if that has ended it (a stop string).

    To vLLM's metrics it is the prefill engine's token: they begin with the decode engine's own first.
    """
    stats = IterationStats() if processor.log_stats else None
    processor.process_outputs([EngineCoreOutput(request.request_id, [token])], time.monotonic(), stats)
    state = processor.request_states.get(request.request_id)
    if state is None:
        return False
    state.is_prefilling = True
    return True
