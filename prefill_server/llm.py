"""The engine of a prefill worker: whatever is asked of it, it computes a prompt's KV and one token."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from braid import wire
from braid.worker.prompt import Prompt, shareable
from braid.worker.shape import shape_of, shaped
from kvtransfer.adapter.options import PARAM
from kvtransfer.wire import Key


class Unshareable(Exception):
    """This prompt's KV can't be moved (multimodal input, embeddings), or its lease was refused."""


class Staging(Protocol):
    """Where finished blocks go."""

    async def open(self, key: Key, prompt: Prompt) -> None:
        """Reserve room and tell the subscribers what will come. Raises :class:`Unshareable`."""


@dataclass(slots=True)
class Job:
    """One ``Prefill``: its prompts so far. ``keys`` are those with a lease. ``on_first`` is set if the token
    behind its one prompt is wanted, and called with it and what it was drawn with."""

    ticket_id: bytes
    attempt: int
    staging: Staging
    keys: list[Key] = field(default_factory=list)
    parts: int = 0
    done: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    refusal: str = ""
    on_first: Callable[[int, wire.Shape], None] | None = None


JOB: contextvars.ContextVar[Job] = contextvars.ContextVar("job")
"""The job that the running task serves; set around the call of vLLM's OpenAI application."""


class PrefillLLM(AsyncLLM):
    """``AsyncLLM`` whose ``generate`` prefills for :data:`JOB`.

    The client's sampling parameters have no meaning for a prompt's KV, and are dropped as a whole. Where the
    first token is wanted, it is drawn with those that shape it (:mod:`decode_server.first`).
    """

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        job = JOB.get()
        key = Key(job.ticket_id, job.attempt, job.parts)
        job.parts += 1
        lora_request = options.get("lora_request")
        shared = shareable(prompt, lora_request)
        if shared is None:
            job.refusal = "unshareable"
            raise Unshareable("only token prompts can be moved")
        job.keys.append(key)
        await job.staging.open(key, shared)
        shape = shape_of(sampling_params)
        on_first = None if self.model_config.logits_processors else job.on_first
        params = SamplingParams(max_tokens=1, temperature=0.0) if on_first is None else shaped(shape)
        params.detokenize = False
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.extra_args = {"kv_transfer_params": {PARAM: [key.id, key.attempt, key.part]}}
        inner = super().generate(prompt, params, request_id, lora_request=lora_request)
        async for output in inner:
            if output.finished:
                if on_first is not None and output.outputs[0].token_ids:
                    on_first(output.outputs[0].token_ids[0], shape)
                job.done += 1
                job.prompt_tokens += len(shared.tokens)
                job.cached_tokens += output.num_cached_tokens or 0
            yield output
